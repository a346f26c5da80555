"""Launches the neighborhood attention kernels: maps of one to three dimensions to one source.

A map of lower rank gets leading axes of length 1. The kernels take a positive scale; a negative or
zero one is moved into the query. Arguments are those that `vitarium.ops.neighborhood_attention` has
checked.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from vitarium.ops.kernels import local_backward, local_forward
from vitarium.ops.kernels.launch import (
    large,
    launch,
    map_strides,
    positive_scale,
    row_strides,
    three,
    widths,
)
from vitarium.ops.kernels.tiles import TileConfig, tiles

Windows = tuple[tuple[int, int, int, bool], ...]

# The bias gradient is split among this many programs, as far as its partial sums stay this small
# and each program has some tiles to add. Constants, so that the result does not depend on a device.
BIAS_PROGRAMS = 4096
BIAS_BYTES = 64 << 20
BIAS_TILES_PER_PROGRAM = 8


def _bias_arguments(bias: Tensor | None) -> dict[str, Any]:
    if bias is None:
        return {"bias": None, "bias_strides": (0, 0, 0, 0)}
    head, *spatial = bias.stride()
    return {"bias": bias, "bias_strides": (head, *three(tuple(spatial), 0))}


def _common_arguments(
    query: Tensor, key: Tensor, value: Tensor, windows: Windows
) -> dict[str, Any]:
    """Arguments that do not depend on the tiles, and the same for all kernels."""
    kernel_size, stride, dilation, is_causal = zip(*windows)
    return {
        "query": query,
        "key": key,
        "value": value,
        "query_strides": map_strides(query),
        "key_strides": map_strides(key),
        "value_strides": map_strides(value),
        "lengths": three(tuple(query.shape[1:-2]), 1),
        "dilation": three(dilation, 1),
        "GROUP": query.shape[-2] // key.shape[-2],
        "K": three(kernel_size, 1),
        "S": three(stride, 1),
        "CAUSAL": three(is_causal, False),
        **widths(query, value),
    }


def _tile_counts(
    lengths: tuple[int, ...], dilation: tuple[int, ...], tile: tuple[int, ...]
) -> tuple[int, ...]:
    """Tiles per axis in the largest residue class."""
    return tuple(
        triton.cdiv(triton.cdiv(length, d), size)
        for length, d, size in zip(lengths, dilation, tile)
    )


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
    return config, {"QUERY_TILE": three(config.query, 1), "KEY_TILE": three(config.key, 1)}


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
    sign, scale = positive_scale(scale)
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
    launch(
        local_forward.forward_kernel,
        batch * heads * math.prod(common["dilation"]) * math.prod(counts),
        query.device,
        **config.options,
        output=output,
        logsumexp=logsumexp,
        output_strides=map_strides(output),
        logsumexp_strides=row_strides(logsumexp),
        tiles=counts,
        heads=heads,
        scale=scale,
        LARGE=large(query, key, value, output),
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
    sign, scale = positive_scale(scale)
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
        "logsumexp_strides": row_strides(logsumexp),
        "delta": delta,
        "grad_output": grad_output,
        "grad_output_strides": map_strides(grad_output),
        "LARGE": large(query, key, value, output, grad_output),
    }
    lengths, dilation = common["lengths"], common["dilation"]
    batch, heads, heads_kv = query.shape[0], query.shape[-2], key.shape[-2]

    config, shapes = _config("query", query, value, windows)
    counts = _tile_counts(lengths, dilation, shapes["QUERY_TILE"])
    launch(
        local_backward.query_kernel,
        batch * heads * math.prod(dilation) * math.prod(counts),
        query.device,
        **config.options,
        output=output,
        output_strides=map_strides(output),
        grad_query=grad_query,
        grad_query_strides=map_strides(grad_query),
        tiles=counts,
        heads=heads,
        **common,
        **shapes,
    )
    config, shapes = _config("key_value", query, value, windows)
    counts = _tile_counts(lengths, dilation, shapes["KEY_TILE"])
    launch(
        local_backward.key_value_kernel,
        batch * heads_kv * math.prod(dilation) * math.prod(counts),
        query.device,
        **config.options,
        grad_key=grad_key,
        grad_key_strides=map_strides(grad_key),
        grad_value=grad_value,
        grad_value_strides=map_strides(grad_value),
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
    launch(
        local_backward.bias_kernel,
        parts * relative_tiles,
        query.device,
        **config.options,
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
