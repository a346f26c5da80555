"""Launches the kernels of bi-level routing attention.

The kernels take a positive scale; a negative or zero one is moved into the query. Arguments are
those that `vitarium.ops.bilevel_routing_attention` has checked.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from vitarium.ops.kernels import bilevel_routing_backward, bilevel_routing_forward
from vitarium.ops.kernels.launch import launch, positive_scale, widths
from vitarium.ops.kernels.rows import view, views

# (kernel, element size) -> by padded head_dim: tokens of the tile that a program stays with and of
# those it walks over, num_warps, num_stages and, where the assembler would else spill,
# max_registers. Read off ahead-of-time compilation, `vitarium bench kernels`: the fewest
# instructions.
_SIZES: dict[tuple[str, int], dict[int, tuple[int, ...]]] = {
    ("forward", 2): {
        32: (64, 64, 2, 2),
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
        32: (64, 64, 4, 2),
        64: (64, 64, 4, 2),
        128: (64, 32, 8, 2),
        256: (32, 32, 8, 2),
    },
    ("query", 4): {
        32: (32, 16, 4, 2),
        64: (16, 32, 4, 1),
        128: (16, 16, 8, 2),
        256: (16, 16, 8, 2, 255),
    },
    ("key_value", 2): {
        32: (64, 64, 4, 2),
        64: (64, 32, 4, 2),
        128: (64, 32, 8, 2, 255),
        256: (32, 32, 8, 1),
    },
    ("key_value", 4): {
        32: (16, 16, 4, 1),
        64: (32, 32, 8, 2, 255),
        128: (16, 16, 8, 1, 255),
        256: (16, 16, 8, 1, 255),
    },
}


def cut(region: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Sides of tiles of `tokens` tokens that cover a region with the fewest tiles.

    Sides are powers of two, which is all that the compiler knows of a region. A region that fits
    into a smaller tile gets that.
    """
    height, width = (triton.next_power_of_2(n) for n in region)
    if height * width <= tokens:
        return height, width
    tiles = {}
    for power in range(tokens.bit_length()):
        down, across = tokens >> power, 1 << power
        tiles[down, across] = triton.cdiv(region[0], down) * triton.cdiv(region[1], across)
    # Of several the widest: tokens of a row lie next to each other.
    return min(tiles, key=lambda sides: (tiles[sides], -sides[1]))


@functools.lru_cache(maxsize=1024)
def plan(
    kernel: str,
    element_size: int,
    head_dim: int,
    own: tuple[int, int],
    walked: tuple[int, int],
    listed: int,
) -> tuple[int, dict[str, Any]]:
    """How many tiles a region has, and what is known of regions when compiling.

    Args:
        kernel: "forward", "query" or "key_value".
        element_size: bytes of an element of query.
        head_dim: the larger of the widths of query and value heads.
        own, walked: height and width of a region of queries and of one of keys; for "key_value" of
            keys and of queries.
        listed: regions in a row of the table.
    """
    sizes = _SIZES[kernel, element_size]
    tokens, step, num_warps, num_stages, *registers = sizes[min(d for d in sizes if d >= head_dim)]
    down, across = cut(own, tokens)
    tiles = triton.cdiv(own[0], down) * triton.cdiv(own[1], across)
    down = max(down, 16 // across)  # matrix products of less than 16 rows do not exist
    if down * across < tokens:
        num_warps, registers = max(1, num_warps * down * across // tokens), [255]
        if kernel == "key_value":
            step = min(step, 32)  # four tiles of scores at a time fill the registers of a warp

    step_down, step_across = cut(walked, step)
    size = step_down * step_across
    whole = step_down >= walked[0] and step_across >= walked[1]
    slots = 1
    if whole:
        slots = max(16 // size, min(step // size, triton.next_power_of_2(listed)))
    even = slots == 1
    if kernel != "key_value":  # for which the length of the list is that of the row
        even = listed % slots == 0
        if whole and listed <= slots:
            num_stages = 1  # a single step: nothing to load ahead

    tile = (down, across), own[0] % down == own[1] % across == 0
    walk = (step_down, step_across), even and walked[0] % step_down == walked[1] % step_across == 0
    of_queries, of_keys = (walk, tile) if kernel == "key_value" else (tile, walk)
    return tiles, {
        **dict(zip(("TILE", "FULL"), of_queries)),
        **dict(zip(("KEY_TILE", "KEY_FULL"), of_keys)),
        "SLOTS": slots,
        "WHOLE": whole,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "max_registers": registers[0] if registers else None,
    }


def _common_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    routing: Tensor,
    grid: list[int],
    **maps: Tensor,
) -> dict[str, Any]:
    """Arguments that are the same for all kernels."""
    return {
        **views(widths(query, value), query=query, key=key, value=value, **maps),
        "weights": None if weights is None else weights.contiguous(),
        "height": query.shape[1] // grid[0],
        "width": query.shape[2] // grid[1],
        "key_height": key.shape[1] // grid[0],
        "key_width": key.shape[2] // grid[1],
        "topk": routing.shape[-1],
        "GRID": tuple(grid),
        "GROUP": query.shape[-2] // key.shape[-2],
    }


def _tiles(
    kernel: str, query: Tensor, key: Tensor, common: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Number of programs, and the arguments about tiles."""
    stays, regions = query, (common["height"], common["width"])
    walked = (common["key_height"], common["key_width"])
    if kernel == "key_value":
        stays, regions, walked = key, walked, regions
    widest = max(common["D"], common["VALUE_D"])
    tiles, options = plan(kernel, query.element_size(), widest, regions, walked, common["topk"])
    batch, heads = stays.shape[0], stays.shape[-2]
    programs = batch * heads * math.prod(common["GRID"]) * tiles
    return programs, {"heads": heads, "tiles": tiles, **options}


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
    programs, tiles = _tiles("forward", query, key, common)
    launch(
        bilevel_routing_forward.forward_kernel,
        programs,
        query.device,
        routing=routing.contiguous(),
        output=view(output),
        logsumexp=logsumexp,
        scale=scale,
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
        **_common_arguments(query, key, value, weights, routing, grid, grad_output=grad_output),
        "logsumexp": logsumexp,
        "delta": delta,
        "scale": scale,
    }
    programs, tiles = _tiles("query", query, key, common)
    topk, sums = triton.next_power_of_2(routing.shape[-1]), None
    if weights_need_grad:
        sums = query.new_empty((programs, topk), dtype=torch.float32)
    launch(
        bilevel_routing_backward.query_kernel,
        programs,
        query.device,
        routing=routing.contiguous(),
        output=view(output),
        grad_query=view(grad_query),
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
    programs, tiles = _tiles("key_value", query, key, common)
    launch(
        bilevel_routing_backward.key_value_kernel,
        programs,
        query.device,
        entries=entries,
        starts=starts,
        grad_key=view(grad_key),
        grad_value=view(grad_value),
        **common,
        **tiles,
    )
    if sign != 1:
        grad_query = grad_query * sign
    return grad_query, grad_key, grad_value, grad_weights, None
