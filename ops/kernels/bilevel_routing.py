"""Launches the kernels of bi-level routing attention.

The kernels take a positive scale; a negative or zero one is moved into the query. Arguments are
those that `vitarium.ops.bilevel_routing_attention` has checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from vitarium.ops.kernels import bilevel_routing_backward, bilevel_routing_forward
from vitarium.ops.kernels.launch import (
    large,
    launch,
    map_strides,
    positive_scale,
    row_strides,
    widths,
)

# (kernel, element size) -> by padded head_dim: queries, keys, num_warps, num_stages and, where the
# assembler would else spill, max_registers. Read off ahead-of-time compilation, `sheet.py`.
_SIZES: dict[tuple[str, int], dict[int, tuple[int, ...]]] = {
    ("forward", 2): {
        32: (64, 64, 4, 2),
        64: (64, 64, 4, 2),
        128: (64, 32, 4, 2, 255),
        256: (64, 32, 8, 2),
    },
    ("forward", 4): {
        32: (32, 32, 4, 2),
        64: (32, 32, 4, 1, 255),
        128: (32, 16, 8, 1),
        256: (32, 16, 8, 1, 255),
    },
    ("query", 2): {
        32: (64, 32, 4, 2),
        64: (64, 32, 4, 2),
        128: (64, 32, 8, 2),
        256: (32, 32, 8, 2),
    },
    ("query", 4): {
        32: (32, 16, 4, 2),
        64: (16, 32, 4, 2),
        128: (16, 32, 8, 2, 255),
        256: (16, 16, 8, 2),
    },
    ("key_value", 2): {
        32: (32, 64, 4, 2),
        64: (32, 64, 4, 2),
        128: (32, 64, 8, 2),
        256: (32, 32, 8, 1),
    },
    ("key_value", 4): {
        32: (32, 16, 4, 2),
        64: (32, 32, 8, 2, 255),
        128: (16, 16, 8, 1),
        256: (16, 16, 8, 1),
    },
}


@dataclass(frozen=True)
class Config:
    """Tokens of a tile of queries and of keys, and launch options."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What `launch` takes."""
        return {
            "BLOCK_M": self.queries,
            "BLOCK_N": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "max_registers": self.max_registers,
        }


def config(kernel: str, head_dim: int, element_size: int, tokens: int) -> Config:
    """Launch parameters of a kernel.

    Args:
        kernel: "forward", "query" or "key_value".
        head_dim: the larger of the widths of query and value heads.
        element_size: bytes of an element of query.
        tokens: of a region, of queries or for "key_value" of keys: a tile that does not walk is
            no larger than needed.
    """
    sizes = _SIZES[kernel, element_size]
    queries, keys, num_warps, *options = sizes[min(d for d in sizes if d >= head_dim)]
    still, walked = (keys, queries) if kernel == "key_value" else (queries, keys)
    needed = max(16, triton.next_power_of_2(tokens))
    if 4 * needed <= still:  # so little work at a time that fewer warps do
        num_warps, walked = max(1, num_warps // 4), max(16, walked // 2)
    still = min(still, needed)
    queries, keys = (walked, still) if kernel == "key_value" else (still, walked)
    return Config(queries, keys, num_warps, *options)


def _common_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    routing: Tensor,
    grid: list[int],
) -> dict[str, Any]:
    """Arguments that are the same for all kernels."""
    return {
        "query": query,
        "key": key,
        "value": value,
        "weights": None if weights is None else weights.contiguous(),
        "query_strides": map_strides(query),
        "key_strides": map_strides(key),
        "value_strides": map_strides(value),
        "lengths": tuple(n // parts for n, parts in zip(query.shape[1:3], grid)),
        "key_lengths": tuple(n // parts for n, parts in zip(key.shape[1:3], grid)),
        "region_grid": tuple(grid),
        "topk": routing.shape[-1],
        "GROUP": query.shape[-2] // key.shape[-2],
        **widths(query, value),
    }


def _tiles(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, common: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Number of programs, and the arguments about tiles."""
    keys = kernel == "key_value"
    height, width = common["key_lengths" if keys else "lengths"]
    heads = (key if keys else query).shape[-2]
    widest = max(query.shape[-1], value.shape[-1])
    chosen = config(kernel, widest, query.element_size(), height * width)
    tiles = triton.cdiv(height * width, chosen.keys if keys else chosen.queries)
    regions = math.prod(common["region_grid"])
    return query.shape[0] * heads * regions * tiles, {
        "heads": heads,
        "tiles": tiles,
        **chosen.options,
    }


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    routing: Tensor,
    grid: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Bi-level routing attention.

    Args:
        query, key, value, weights, routing: any strides.
        grid: regions along H and W.
        scale: factor on the scores.

    Returns:
        The output `(B, H, W, num_heads, value_dim)`, contiguous, and the base-2 log-sum-exp of the
        scores, `(B, H, W, num_heads)`, float32.
    """
    sign, scale = positive_scale(scale)
    if sign != 1:
        query = query * sign
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if output.numel() == 0:
        return output, logsumexp
    common = _common_arguments(query, key, value, weights, routing, grid)
    programs, tiles = _tiles("forward", query, key, value, common)
    launch(
        bilevel_routing_forward.forward_kernel,
        programs,
        query.device,
        routing=routing.contiguous(),
        output=output,
        logsumexp=logsumexp,
        output_strides=map_strides(output),
        logsumexp_strides=row_strides(logsumexp),
        scale=scale,
        LARGE=large(query, key, value, output),
        **common,
        **tiles,
    )
    return output, logsumexp


def invert(routing: Tensor, regions: int) -> tuple[Tensor, Tensor]:
    """The table the other way round: who attends to a region.

    Args:
        routing: `(B, regions, topk)`; entries out of range count as the nearest region.
        regions: number of regions.

    Returns:
        `(B, regions * topk)`, int32: entries `region * topk + slot` of each image's table, sorted
        by the region they name; and `(B, regions + 1)`, int32: where those of a region begin.
    """
    named, entries = routing.flatten(1).clamp(0, regions - 1).sort(dim=1, stable=True)
    bounds = torch.arange(regions + 1, device=routing.device, dtype=named.dtype)
    starts = torch.searchsorted(named, bounds.expand(len(named), -1).contiguous(), out_int32=True)
    return entries.to(torch.int32), starts


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    routing: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    grid: list[int],
    scale: float,
    weights_need_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, weights (None where not needed), contiguous, and None.

    Args:
        grad_output: `(B, H, W, num_heads, value_dim)`, any strides.
        output, logsumexp: what `forward` returned; the other arguments are what it got.
    """
    sign, scale = positive_scale(scale)
    if sign != 1:
        query = query * sign
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    grad_weights = None
    if output.numel() == 0:
        if weights is not None and weights_need_grad:
            grad_weights = torch.zeros_like(weights)
        return grad_query, grad_key.zero_(), grad_value.zero_(), grad_weights, None
    delta = torch.empty_like(logsumexp)
    common = {
        **_common_arguments(query, key, value, weights, routing, grid),
        "logsumexp": logsumexp,
        "logsumexp_strides": row_strides(logsumexp),
        "delta": delta,
        "grad_output": grad_output,
        "grad_output_strides": map_strides(grad_output),
        "scale": scale,
        "LARGE": large(query, key, value, output, grad_output),
    }
    programs, tiles = _tiles("query", query, key, value, common)
    topk, sums = triton.next_power_of_2(routing.shape[-1]), None
    if weights_need_grad:
        sums = query.new_empty((programs, topk), dtype=torch.float32)
    launch(
        bilevel_routing_backward.query_kernel,
        programs,
        query.device,
        routing=routing.contiguous(),
        output=output,
        output_strides=map_strides(output),
        grad_query=grad_query,
        grad_query_strides=map_strides(grad_query),
        weight_sums=sums,
        TOPK=topk,
        **common,
        **tiles,
    )
    if weights is not None and sums is not None:
        batch, regions, used = routing.shape
        sums = sums.view(batch, query.shape[-2], regions, tiles["tiles"], topk)
        grad_weights = sums.sum((1, 3))[..., :used].to(weights.dtype)
    entries, starts = invert(routing, grid[0] * grid[1])
    programs, tiles = _tiles("key_value", query, key, value, common)
    launch(
        bilevel_routing_backward.key_value_kernel,
        programs,
        query.device,
        entries=entries,
        starts=starts,
        grad_key=grad_key,
        grad_key_strides=map_strides(grad_key),
        grad_value=grad_value,
        grad_value_strides=map_strides(grad_value),
        **common,
        **tiles,
    )
    if sign != 1:
        grad_query = grad_query * sign
    return grad_query, grad_key, grad_value, grad_weights, None
