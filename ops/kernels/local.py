"""Launches the kernels of local attention: maps of one to three dimensions to one source.

Windows that fit one tile have kernels of their own, which `vitarium.ops.kernels.window` launches.
A map of lower rank gets leading axes of length 1. The kernels take a positive scale; a negative or
zero one is moved into the query. Arguments are those that the public functions have checked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitarium.ops.kernels import local_backward, local_forward
from vitarium.ops.kernels import window as one_tile
from vitarium.ops.kernels.launch import (
    diagonal_sums,
    large,
    launch,
    map_strides,
    positive_scale,
    row_strides,
    three,
    widths,
)
from vitarium.ops.kernels.tiles import cell, tiles
from vitarium.ops.windows import Block, Pattern, Window

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
    query: Tensor, key: Tensor, value: Tensor, windows: Sequence[Pattern]
) -> dict[str, Any]:
    """Arguments that do not depend on the tiles, and the same for all kernels."""
    return {
        "query": query,
        "key": key,
        "value": value,
        "query_strides": map_strides(query),
        "key_strides": map_strides(key),
        "value_strides": map_strides(value),
        **_pattern_arguments(tuple(query.shape[1:-2]), tuple(windows)),
        "GROUP": query.shape[-2] // key.shape[-2],
        **widths(query, value),
    }


@functools.lru_cache(maxsize=1024)
def _pattern_arguments(spatial: tuple[int, ...], windows: tuple[Pattern, ...]) -> dict[str, Any]:
    axes = _three_windows(windows)
    return {
        "lengths": three(spatial, 1),
        "dilation": tuple(window.dilation for window in axes),
        "rules": tuple(map(_rule, axes)),
    }


def _three_windows(windows: Sequence[Pattern]) -> tuple[Pattern, ...]:
    """The patterns, with those of axes of length 1 in front that a map of lower rank lacks."""
    fill = Block(1, 1, 0, 0, 0) if isinstance(windows[0], Block) else Window(1, 1, 1, False)
    return three(tuple(windows), fill)


def _rule(window: Pattern) -> tuple[Any, ...]:
    """One axis as `vitarium.ops.kernels.patterns` has it.

    Sizes of windows may come with the map; so they are no compile-time constants.
    """
    if isinstance(window, Block):
        return window.window_size, window.lead, window.halo, window.border
    values = (window.kernel_size, window.stride, bool(window.is_causal))
    return tuple(tl.constexpr(value) for value in values)


def _layout(window: Pattern, tile: int, *, keys: bool) -> tuple[Any, Any]:
    """Where tiles of tokens lie along an axis: length of a cell, and what lies before the axis.

    Cells of window attention hold whole windows; so a tile of queries sees one range of keys, and
    without a halo a tile of keys is seen from one range of queries.
    """
    if isinstance(window, Window):
        return tl.constexpr(tile), tl.constexpr(0)
    if keys and window.halo:
        return tile, 0
    return cell(window, tile), window.lead


@functools.lru_cache(maxsize=1024)
def _tiling(
    kernel: str,
    head_dim: int,
    element_size: int,
    spatial: tuple[int, ...],
    windows: tuple[Pattern, ...],
) -> tuple[int, dict[str, Any]]:
    """Number of tiles of all classes, the arguments about them, and options of the launch.

    The tiles are those of the keys for the kernel of keys and values, else of the queries. In a
    cell of one window all queries of a tile see the same keys. So do all queries that see a tile of
    keys, if there is no halo.
    """
    config = tiles(
        len(spatial), head_dim, windows,
        kernel=kernel, element_size=element_size, lengths=spatial,
    )  # fmt: skip
    query_tile, key_tile = three(config.query, 1), three(config.key, 1)
    keys = kernel == "key_value"
    tile = key_tile if keys else query_tile
    axes = _three_windows(windows)
    layout = tuple(_layout(*pair, keys=keys) for pair in zip(axes, tile))
    counts = []
    for length, window, size, (span, lead) in zip(three(spatial, 1), axes, tile, layout):
        tokens = triton.cdiv(length, window.dilation) + (2 * window.border if keys else 0)
        span, lead = (getattr(number, "value", number) for number in (span, lead))
        counts.append(triton.cdiv(tokens + lead, span) * triton.cdiv(span, size))
    alike = all(
        isinstance(window, Block)
        and cell(window, size) == window.window_size
        and not (keys and window.halo)
        for window, size in zip(axes, tile)
    )
    return math.prod(counts) * math.prod(window.dilation for window in axes), {
        "layout": layout,
        "tiles": tuple(counts),
        "ALIKE": alike,
        "QUERY_TILE": query_tile,
        "KEY_TILE": key_tile,
        **config.options,
    }


def _tiles_of(
    kernel: str, query: Tensor, value: Tensor, windows: Sequence[Pattern]
) -> tuple[int, dict[str, Any]]:
    """`_tiling` of a call."""
    head_dim = max(query.shape[-1], value.shape[-1])
    spatial = tuple(query.shape[1:-2])
    return _tiling(kernel, head_dim, query.element_size(), spatial, tuple(windows))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    windows: Sequence[Pattern],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Local attention.

    Args:
        query: `(B, *spatial, num_heads, head_dim)`, any strides; key and value alike, but for the
            borders that `windows` say they have.
        bias: relative position bias `(num_heads, 2 * reach + 1, ...)`, or None.
        windows: the pattern of every spatial dimension.
        scale: factor on the scores.

    Returns:
        The output `(B, *spatial, num_heads, value_dim)`, contiguous, and the base-2 log-sum-exp of
        the scores, `(B, *spatial, num_heads)`, float32.
    """
    if query.numel() and one_tile.fits("forward", query, key, value, windows):
        return one_tile.forward(query, key, value, bias, windows, scale)
    sign, scale = positive_scale(scale)
    if sign != 1:
        query = query * sign
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if output.numel() == 0:
        return output, logsumexp
    common = _common_arguments(query, key, value, windows)
    count, tiling = _tiles_of("forward", query, value, windows)
    batch, heads = query.shape[0], query.shape[-2]
    launch(
        local_forward.forward_kernel,
        batch * heads * count,
        query.device,
        output=output,
        logsumexp=logsumexp,
        output_strides=map_strides(output),
        logsumexp_strides=row_strides(logsumexp),
        heads=heads,
        scale=scale,
        LARGE=large(query, key, value, output),
        **common,
        **tiling,
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
    windows: Sequence[Pattern],
    scale: float,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias, contiguous; the last is empty if it needs none.

    Args:
        grad_output: `(B, *spatial, num_heads, value_dim)`, any strides.
        output, logsumexp: what `forward` returned; the other arguments are what it got.
    """
    if query.numel() and one_tile.fits("backward", query, key, value, windows):
        return one_tile.backward(
            grad_output, query, key, value, bias, logsumexp, windows, scale, bias_needs_grad
        )
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
    batch, heads, heads_kv = query.shape[0], query.shape[-2], key.shape[-2]

    count, tiling = _tiles_of("query", query, value, windows)
    launch(
        local_backward.query_kernel,
        batch * heads * count,
        query.device,
        output=output,
        output_strides=map_strides(output),
        grad_query=grad_query,
        grad_query_strides=map_strides(grad_query),
        heads=heads,
        **common,
        **tiling,
    )
    count, tiling = _tiles_of("key_value", query, value, windows)
    launch(
        local_backward.key_value_kernel,
        batch * heads_kv * count,
        query.device,
        grad_key=grad_key,
        grad_key_strides=map_strides(grad_key),
        grad_value=grad_value,
        grad_value_strides=map_strides(grad_value),
        heads=heads_kv,
        **common,
        **tiling,
    )
    if sign != 1:
        grad_query = grad_query * sign
    if bias is not None and bias_needs_grad:
        grad_bias = _grad_bias(query, value, bias, windows, common)
    return grad_query, grad_key, grad_value, grad_bias


def _relative_tiles(window: Pattern, q_size: int, k_size: int) -> tuple[int, int]:
    """Tiles of keys that hold all keys that a tile of queries may see, wherever it lies.

    Returns:
        The first key of the first tile, in positions from the first query, and their number.
    """
    if isinstance(window, Block):
        span = cell(window, q_size)
        tiles_before = triton.cdiv((triton.cdiv(span, q_size) - 1) * q_size, k_size)
        before, after = tiles_before * k_size + window.halo, span + window.halo
    else:  # One tile begins with the window of a query in the middle of the map.
        k = window.kernel_size
        before = triton.cdiv(k - 1 - k // 2, k_size) * k_size + k // 2
        after = q_size + k - 1
    return -before, triton.cdiv(before + after, k_size)


def _grad_bias(
    query: Tensor,
    value: Tensor,
    bias: Tensor,
    windows: Sequence[Pattern],
    common: dict[str, Any],
) -> Tensor:
    """Gradient of the bias: tiles of score gradients summed by the kernel, then along diagonals."""
    count, tiling = _tiles_of("bias", query, value, windows)
    query_tile, key_tile = tiling["QUERY_TILE"], tiling["KEY_TILE"]
    axes = _three_windows(windows)
    first, key_tiles = zip(*map(_relative_tiles, axes, query_tile, key_tile))
    batch, heads = query.shape[0], query.shape[-2]
    relative_tiles = heads * math.prod(key_tiles)
    tile_bytes = 4 * math.prod(query_tile) * math.prod(key_tile)
    parts = min(
        BIAS_PROGRAMS // relative_tiles,
        BIAS_BYTES // (relative_tiles * tile_bytes),
        batch * count // BIAS_TILES_PER_PROGRAM,
    )
    parts = max(1, parts)
    partial_sums = query.new_empty(
        (parts, heads, *key_tiles, *query_tile, *key_tile), dtype=torch.float32
    )
    tiling = {name: value for name, value in tiling.items() if name != "tiles"}  # it counts itself
    launch(
        local_backward.bias_kernel,
        parts * relative_tiles,
        query.device,
        partial_sums=partial_sums,
        heads=heads,
        images=batch,
        parts=parts,
        FIRST=tuple(begin + window.border for begin, window in zip(first, axes)),
        KEY_TILES=key_tiles,
        **common,
        **tiling,
    )
    # (heads, then per axis: query in tile, key relative to the tile's first query)
    sums = partial_sums.sum(0).permute(0, 4, 1, 7, 5, 2, 8, 6, 3, 9)
    spans = [tiles * size for tiles, size in zip(key_tiles, key_tile)]
    sums = sums.reshape(heads, *(n for pair in zip(query_tile, spans) for n in pair))
    table = diagonal_sums(sums, first, [window.reach for window in axes])
    return table.reshape(bias.shape).to(bias.dtype)
