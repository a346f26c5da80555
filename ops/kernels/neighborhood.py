"""Launches the neighborhood attention kernels: maps of one to three dimensions to one source.

A map of lower rank gets leading axes of length 1. The kernels take a positive scale; a negative or
zero one is moved into the query. Arguments are those that `vitarium.ops.neighborhood_attention` has
checked.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from vitarium.ops.dispatch import TRITON_INTERPRET
from vitarium.ops.kernels import neighborhood_backward, neighborhood_forward
from vitarium.ops.kernels.tiles import TileConfig, tiles

Windows = tuple[tuple[int, int, int, bool], ...]

AXES = 3
SMALLEST_SCALE = 1e-37  # a smaller one is no normal float32 number: it counts as zero
# The bias gradient is split among this many programs, as far as its partial sums stay this small
# and each program has some tiles to add. Constants, so that the result does not depend on a device.
BIAS_PROGRAMS = 4096
BIAS_BYTES = 64 << 20
BIAS_TILES_PER_PROGRAM = 8

# Called in place of a launch with (kernel, arguments, options), for ahead-of-time compilation.
recorder: Callable[[Any, dict[str, Any], dict[str, Any]], None] | None = None


def _launch(
    kernel: Any, programs: int, config: TileConfig, device: torch.device, **arguments: Any
) -> None:
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
        "maxnreg": config.max_registers,
    }
    if recorder is not None:
        recorder(kernel, arguments, options)
        return
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[(programs,)](**arguments, **options)


def _three(values: tuple[Any, ...], fill: Any) -> tuple[Any, ...]:
    """`values` with leading entries added for the axes that a map of lower rank lacks."""
    return (fill,) * (AXES - len(values)) + tuple(values)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of `(B, *spatial, heads, channels)` as (batch, z, y, x, head, channel)."""
    batch, *spatial, head, channel = tensor.stride()
    return (batch, *_three(tuple(spatial), 0), head, channel)


def _row_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of `(B, *spatial, heads)` as (batch, z, y, x, head)."""
    return _strides(tensor[..., None])[:-1]


def _bias_arguments(bias: Tensor | None) -> dict[str, Any]:
    if bias is None:
        return {"bias": None, "bias_strides": (0, 0, 0, 0)}
    head, *spatial = bias.stride()
    return {"bias": bias, "bias_strides": (head, *_three(tuple(spatial), 0))}


def _common_arguments(
    query: Tensor, key: Tensor, value: Tensor, windows: Windows
) -> dict[str, Any]:
    """Arguments that do not depend on the tiles, and the same for all kernels."""
    kernel_size, stride, dilation, is_causal = zip(*windows)
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    bfloat16 = query.dtype == torch.bfloat16
    return {
        "query": query,
        "key": key,
        "value": value,
        "query_strides": _strides(query),
        "key_strides": _strides(key),
        "value_strides": _strides(value),
        "lengths": _three(tuple(query.shape[1:-2]), 1),
        "dilation": _three(dilation, 1),
        "GROUP": query.shape[-2] // key.shape[-2],
        "K": _three(kernel_size, 1),
        "S": _three(stride, 1),
        "CAUSAL": _three(is_causal, False),
        "D": head_dim,
        "VALUE_D": value_dim,
        # Matrix products of less than 16 do not exist.
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_VALUE_D": max(16, triton.next_power_of_2(value_dim)),
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "UPCAST": TRITON_INTERPRET and bfloat16,
    }


def _large(*tensors: Tensor) -> bool:
    """Whether an offset within one image of any of the tensors exceeds 32 bits."""
    return any(
        sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:])) >= 1 << 31
        for t in tensors
    )


def _tile_counts(
    lengths: tuple[int, ...], dilation: tuple[int, ...], tile: tuple[int, ...]
) -> tuple[int, ...]:
    """Tiles per axis in the largest residue class."""
    return tuple(
        triton.cdiv(triton.cdiv(length, d), size)
        for length, d, size in zip(lengths, dilation, tile)
    )


def _positive_scale(scale: float) -> tuple[float, float]:
    """The factor that moves into the query, and the positive scale that remains."""
    if abs(scale) < SMALLEST_SCALE:
        return 0.0, 1.0
    return math.copysign(1.0, scale), abs(scale)


def _config(
    kernel: str, query: Tensor, value: Tensor, windows: Windows
) -> tuple[TileConfig, dict[str, Any]]:
    config = tiles(
        query.dim() - 3,
        max(query.shape[-1], value.shape[-1]),
        windows,
        kernel=kernel,
        element_size=query.element_size(),
        lengths=query.shape[1:-2],
    )
    return config, {"QUERY_TILE": _three(config.query, 1), "KEY_TILE": _three(config.key, 1)}


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    windows: Windows,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Neighborhood attention.

    Args:
        query: `(B, *spatial, num_heads, head_dim)`, any strides; key and value alike.
        bias: relative position bias `(num_heads, 2 * kernel_size - 1, ...)`, or None.
        windows: (kernel_size, stride, dilation, is_causal) per spatial dimension.
        scale: factor on the scores.

    Returns:
        The output `(B, *spatial, num_heads, value_dim)`, contiguous, and the base-2 log-sum-exp of
        the scores, `(B, *spatial, num_heads)`, float32.
    """
    sign, scale = _positive_scale(scale)
    if sign != 1:
        query = query * sign
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if output.numel() == 0:
        return output, logsumexp
    common = _common_arguments(query, key, value, windows)
    config, shapes = _config("forward", query, value, windows)
    counts = _tile_counts(common["lengths"], common["dilation"], shapes["QUERY_TILE"])
    batch, heads = query.shape[0], query.shape[-2]
    _launch(
        neighborhood_forward.forward_kernel,
        batch * heads * math.prod(common["dilation"]) * math.prod(counts),
        config,
        query.device,
        output=output,
        logsumexp=logsumexp,
        output_strides=_strides(output),
        logsumexp_strides=_row_strides(logsumexp),
        tiles=counts,
        heads=heads,
        scale=scale,
        LARGE=_large(query, key, value, output),
        **common,
        **shapes,
        **_bias_arguments(bias),
    )
    return output, logsumexp


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    windows: Windows,
    scale: float,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias, contiguous; the last is empty if it needs none.

    Args:
        grad_output: `(B, *spatial, num_heads, value_dim)`, any strides.
        output, logsumexp: what `forward` returned; the other arguments are what it got.
    """
    sign, scale = _positive_scale(scale)
    if sign != 1:
        query = query * sign
    grad_query = query.new_empty(query.shape)
    grad_key = key.new_empty(key.shape)
    grad_value = value.new_empty(value.shape)
    grad_bias = query.new_empty(0)
    if output.numel() == 0:
        if bias is not None and bias_needs_grad:
            grad_bias = torch.zeros_like(bias, memory_format=torch.contiguous_format)
        return grad_query, grad_key.zero_(), grad_value.zero_(), grad_bias
    delta = torch.empty_like(logsumexp)
    common = {
        **_common_arguments(query, key, value, windows),
        **_bias_arguments(bias),
        "scale": scale,
        "logsumexp": logsumexp,
        "logsumexp_strides": _row_strides(logsumexp),
        "delta": delta,
        "grad_output": grad_output,
        "grad_output_strides": _strides(grad_output),
        "LARGE": _large(query, key, value, output, grad_output),
    }
    lengths, dilation = common["lengths"], common["dilation"]
    batch, heads, heads_kv = query.shape[0], query.shape[-2], key.shape[-2]

    config, shapes = _config("query", query, value, windows)
    counts = _tile_counts(lengths, dilation, shapes["QUERY_TILE"])
    _launch(
        neighborhood_backward.query_kernel,
        batch * heads * math.prod(dilation) * math.prod(counts),
        config,
        query.device,
        output=output,
        output_strides=_strides(output),
        grad_query=grad_query,
        grad_query_strides=_strides(grad_query),
        tiles=counts,
        heads=heads,
        **common,
        **shapes,
    )
    config, shapes = _config("key_value", query, value, windows)
    counts = _tile_counts(lengths, dilation, shapes["KEY_TILE"])
    _launch(
        neighborhood_backward.key_value_kernel,
        batch * heads_kv * math.prod(dilation) * math.prod(counts),
        config,
        query.device,
        grad_key=grad_key,
        grad_key_strides=_strides(grad_key),
        grad_value=grad_value,
        grad_value_strides=_strides(grad_value),
        tiles=counts,
        heads=heads_kv,
        **common,
        **shapes,
    )
    if sign != 1:
        grad_query = grad_query * sign
    if bias is not None and bias_needs_grad:
        grad_bias = _grad_bias(query, value, bias, windows, common)
    return grad_query, grad_key, grad_value, grad_bias


def _grad_bias(
    query: Tensor, value: Tensor, bias: Tensor, windows: Windows, common: dict[str, Any]
) -> Tensor:
    """Gradient of the bias: tiles of score gradients summed by the kernel, then along diagonals."""
    config, shapes = _config("bias", query, value, windows)
    query_tile, key_tile = shapes["QUERY_TILE"], shapes["KEY_TILE"]
    # A query sees keys from K - 1 before to K - 1 after itself. Tiles of keys are laid so that one
    # begins with the window of a query in the middle of the map.
    first, key_tiles = [], []
    for k, q_size, k_size in zip(common["K"], query_tile, key_tile):
        before = triton.cdiv(k - 1 - k // 2, k_size) * k_size + k // 2
        first.append(-before)
        key_tiles.append(triton.cdiv(before + q_size + k - 1, k_size))
    batch, heads = query.shape[0], query.shape[-2]
    relative_tiles = heads * math.prod(key_tiles)
    tile_bytes = 4 * math.prod(query_tile) * math.prod(key_tile)
    counts = _tile_counts(common["lengths"], common["dilation"], query_tile)
    all_tiles = batch * math.prod(common["dilation"]) * math.prod(counts)
    parts = min(
        BIAS_PROGRAMS // relative_tiles,
        BIAS_BYTES // (relative_tiles * tile_bytes),
        all_tiles // BIAS_TILES_PER_PROGRAM,
    )
    parts = max(1, parts)
    partial_sums = query.new_empty(
        (parts, heads, *key_tiles, *query_tile, *key_tile), dtype=torch.float32
    )
    _launch(
        neighborhood_backward.bias_kernel,
        parts * relative_tiles,
        config,
        query.device,
        partial_sums=partial_sums,
        heads=heads,
        images=batch,
        parts=parts,
        FIRST=tuple(first),
        KEY_TILES=tuple(key_tiles),
        **common,
        **shapes,
    )
    # (heads, then per axis: query in tile, key relative to the tile's first query)
    sums = partial_sums.sum(0).permute(0, 4, 1, 7, 5, 2, 8, 6, 3, 9)
    spans = [tiles * size for tiles, size in zip(key_tiles, key_tile)]
    sums = sums.reshape(heads, *(n for pair in zip(query_tile, spans) for n in pair))
    # Entry t of the table collects key - query = t - (K - 1): a diagonal, by one step in each.
    shape, stride, start = [heads], [sums.stride(0)], 0
    for axis, (k, q_size, begin) in enumerate(zip(common["K"], query_tile, first)):
        key_stride = sums.stride(2 + 2 * axis)
        shape += [q_size, 2 * k - 1]
        stride += [sums.stride(1 + 2 * axis) + key_stride, key_stride]
        start += (-begin - (k - 1)) * key_stride
    table = sums.as_strided(shape, stride, start).sum((1, 3, 5))
    return table.reshape(bias.shape).to(bias.dtype)
