"""Attention within small windows that fill the map, on ordinary tensor operations.

The most frequent case of local attention takes a portable path of its own: tokens go straight from
the map into windows and back, once in either direction. For a backward the forward keeps windows
and weights, not the map; for windows of 7 x 7 and heads of 32 channels weights are about half as
large as query, key and value together. Without a backward see `vitarium.ops.fused_windows`, too.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitarium.ops.additive import Additive
from vitarium.ops.packed import packed, unpacked
from vitarium.ops.plan import DEVICE_CHUNK, Chunk, portioned, row_tiles
from vitarium.ops.softmax import Softmax
from vitarium.ops.tiles import Axis
from vitarium.ops.workspace import Workspace

LARGEST = 200  # keys of a window; beyond, weights are computed again rather than kept
SHORT = 28  # bytes of one channel in a row of a window, below which tokens move as wholes
CHUNK = 1 << 22  # bytes in float32 of what a piece of work on a CPU touches

Axes = tuple[Axis, ...]
Band = tuple[int, int]


def serves(query: Tensor, key: Tensor, axes: Axes) -> bool:
    """Whether small windows fill the map, and every head has keys of its own."""
    return query.shape[-2] == key.shape[-2] and query.shape[0] > 0 and fill(axes)


@functools.lru_cache(maxsize=256)
def fill(axes: Axes) -> bool:
    """Whether the tiles are small and fill the map."""
    small = math.prod(axis.tile for axis in axes) <= LARGEST
    return small and all(axis.halo == axis.tile and axis.fills(False) for axis in axes)


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, axes: Axes, scale: float
) -> Tensor:
    """What `vitarium.ops.tiled.attend` computes, with a derivative."""
    tensors = (query, key, value, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Attention.apply(*tensors, axes, scale)
    return _attend(query, key, value, bias, axes, scale, None)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        axes: Axes,
        scale: float,
    ) -> Tensor:
        kept: list[Tensor] = []
        output = _attend(query, key, value, bias, axes, scale, kept)
        ctx.save_for_backward(bias, *kept)
        ctx.shapes = query.shape, value.shape
        ctx.packed = packed(query, key, value) is not None
        ctx.arguments = axes, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        bias, *kept = ctx.saved_tensors
        query, value = ctx.shapes
        if ctx.packed:  # gradients that lie as their tensors do need not be put together again
            together = grad.new_empty(*query[:-2], 3, *query[-2:])
            grads, whole = together.unbind(-3), unpacked(together)
        else:
            grads, whole = tuple(grad.new_empty(shape) for shape in (query, query, value)), None
        needs_bias = bias is not None and ctx.needs_input_grad[3]
        grad_bias = _differentiate(
            grad, grads, whole, kept, bias if needs_bias else None, *ctx.arguments
        )
        return *grads, grad_bias, None, None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    axes: Axes,
    scale: float,
    kept: list[Tensor] | None,
) -> Tensor:
    """The output; appends query, key, value and weights of every piece of work to `kept`."""
    work = Workspace(query)
    softmax = Softmax(query, work)
    additive = Additive(axes, bias, softmax.wide, work)
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    whole = packed(query, key, value)

    def take(name: str, shape: tuple[int, ...]) -> Tensor:
        return work.take(name, shape, query.dtype) if kept is None else query.new_empty(shape)

    for chunk, band in _pieces(query, axes):
        if whole is not None:
            part = _part(whole, chunk)
            if chunk.all_heads and axes[-1].tile * query.element_size() < SHORT:
                tiles = _gathered_together(part, axes, band, work, take)
            else:
                tiles = _gathered(part, axes, band, "tokens", take)
            q, k, v = tiles.view(3, -1, *_matrix(axes, part)).unbind()
        else:
            q, k, v = (
                _gathered(part, axes, band, name, take).view(-1, *_matrix(axes, part))
                for name, part in zip(
                    ("query", "key", "value"), (chunk.of(x) for x in (query, key, value))
                )
            )
        shape = (q.shape[0], q.shape[1], k.shape[1])
        table = additive.of(chunk.heads, band)
        weights, _ = softmax.weights(q, k, scale, table, chunk.pairs, take("weights", shape))
        tiles = torch.bmm(weights, v, out=work.take("output", v.shape, v.dtype))
        _scatter(tiles, chunk.of(output), axes, band)
        if kept is not None:
            kept += (q, k, v, weights)
    work.close()
    return output


def _differentiate(
    grad: Tensor,
    grads: Sequence[Tensor],
    whole: Tensor | None,
    kept: Sequence[Tensor],
    bias: Tensor | None,
    axes: Axes,
    scale: float,
) -> Tensor | None:
    """Fills the gradients of query, key and value; returns that of the bias, None without it."""
    work, dtype = Workspace(grad), grad.dtype
    wide = torch.promote_types(dtype, torch.float32)
    additive = Additive(axes, bias, wide, work)
    table = None if bias is None else additive.no_grad(grad.shape[-2], wide)
    pieces = list(_pieces(grad, axes))
    for number, (chunk, band) in enumerate(pieces):
        q, k, v, weights = kept[4 * number : 4 * number + 4]

        def take(name: str, shape: tuple[int, ...]) -> Tensor:
            return work.take(name, shape, dtype)

        g = _gathered(chunk.of(grad), axes, band, "grad", take).view(v.shape)
        if whole is not None:
            buffers = list(take("grads", (3, *q.shape)).unbind())
        else:
            buffers = [take(f"grad {i}", x.shape) for i, x in enumerate((q, k, v))]
        torch.bmm(weights.mT, g, out=buffers[2])
        grad_scores = torch._softmax_backward_data(
            torch.bmm(g, v.mT, out=take("grad weights", weights.shape)),
            weights,
            -1,
            dtype,
            grad_input=take("grad scores", weights.shape),
        )
        torch.baddbmm(buffers[0], grad_scores, k, beta=0, alpha=scale, out=buffers[0])
        torch.baddbmm(buffers[1], grad_scores.mT, q, beta=0, alpha=scale, out=buffers[1])
        if table is not None:
            scores = grad_scores.view(*chunk.pairs, -1, *weights.shape[1:])
            additive.add_grad(table[chunk.heads], scores, band)
        if whole is not None:
            _scatter(take("grads", (3, *q.shape)), _part(whole, chunk), axes, band)
        else:
            for buffer, x in zip(buffers, grads):
                _scatter(buffer, chunk.of(x), axes, band)
    work.close()
    return None if bias is None else additive.grad_bias(table, bias).to(bias.dtype)


def _pieces(query: Tensor, axes: Axes) -> Iterator[tuple[Chunk, Band]]:
    """The work in pieces that stay in cache."""
    limit = CHUNK if query.device.type == "cpu" else DEVICE_CHUNK
    window = math.prod(axis.tile for axis in axes)
    row = row_tiles(axes) * window * (window + 3 * query.shape[-1])  # scores; query, key, value
    bands, chunks = portioned((query.shape[0], query.shape[-2]), axes[0].tiles, 4 * row, limit)
    return itertools.product(chunks, bands)


def _part(whole: Tensor, chunk: Chunk) -> Tensor:
    """A chunk of `(3, B, heads, *spatial, channels)`."""
    return whole if chunk.all_images and chunk.all_heads else whole[:, chunk.images, chunk.heads]


def _matrix(axes: Axes, x: Tensor) -> tuple[int, int]:
    """Tokens of a window and channels."""
    return math.prod(axis.tile for axis in axes), x.shape[-1]


def _gathered(x: Tensor, axes: Axes, band: Band, name: str, take: Any) -> Tensor:
    """The windows `(*lead, *classes, *tiles, *tile, channels)` of a band of `(*lead, *spatial,
    channels)`: a view where possible, else copied into what `take` gives.
    """
    shape, parts = geometry(x.shape, x.stride(), axes, band)
    if len(parts) == 1:
        view = x.as_strided(shape, parts[0].map_strides, x.storage_offset() + parts[0].map_offset)
        return view if view.is_contiguous() else take(name, shape).copy_(view)
    tiles = take(name, shape)
    for part in parts:
        part.of_tiles(tiles).copy_(part.of_map(x))
    return tiles


def _gathered_together(x: Tensor, axes: Axes, band: Band, work: Workspace, take: Any) -> Tensor:
    """The same of `(3, images, heads, *spatial, channels)`: `(3, images, heads, tokens, channels)`.

    Tokens of all heads move as wholes and are parted in the cache: what one head has in a row of a
    window is short.
    """
    three, images, heads, *_, channels = x.shape
    tokens = x.movedim((0, 2), (-3, -2)).flatten(-3).unsqueeze(1)

    def buffer(name: str, shape: tuple[int, ...]) -> Tensor:
        return work.take(name, shape, x.dtype)

    found = _gathered(tokens, axes, band, "whole tokens", buffer)
    found = found.view(images, -1, three, heads, channels).permute(2, 0, 3, 1, 4)
    return take("tokens", found.shape).copy_(found)


def _scatter(tiles: Tensor, x: Tensor, axes: Axes, band: Band) -> None:
    """Write windows to where `_gathered` takes them from."""
    _, parts = geometry(x.shape, x.stride(), axes, band)
    for part in parts:
        part.of_map(x).copy_(part.of_tiles(tiles))


class Part(NamedTuple):
    """Parts of windows that lie alike in a map and in its windows."""

    shape: tuple[int, ...]
    map_strides: tuple[int, ...]
    map_offset: int
    tile_strides: tuple[int, ...]
    tile_offset: int

    def of_map(self, x: Tensor) -> Tensor:
        return x.as_strided(self.shape, self.map_strides, x.storage_offset() + self.map_offset)

    def of_tiles(self, tiles: Tensor) -> Tensor:
        offset = tiles.storage_offset() + self.tile_offset
        return tiles.as_strided(self.shape, self.tile_strides, offset)


@functools.lru_cache(maxsize=1024)
def geometry(
    shape: tuple[int, ...], strides: tuple[int, ...], axes: Axes, band: Band
) -> tuple[tuple[int, ...], tuple[Part, ...]]:
    """The shape of a band of windows of a map `(*lead, *spatial, channels)`, and its parts."""
    rank = len(axes)
    lead = len(shape) - rank - 1
    spatial = strides[lead:-1]
    classes = tuple(axis.classes for axis in axes)
    counts = (band[1] - band[0], *(axis.tiles for axis in axes[1:]))
    tile = tuple(axis.tile for axis in axes)
    whole = (*shape[:lead], *classes, *counts, *tile, shape[-1])
    inner = tuple(math.prod(whole[i + 1 :]) for i in range(len(whole)))
    tile_steps, position_steps = inner[lead + rank :], inner[lead + 2 * rank :]
    steps = tuple(axis.classes * stride for axis, stride in zip(axes, spatial))
    map_strides = (
        *strides[:-1],
        *(axis.tile * step for axis, step in zip(axes, steps)),
        *steps,
        strides[-1],
    )
    parts = []
    for choice in itertools.product(*(axis.parts() for axis in axes)):
        token, first, count, position, length = zip(*choice)
        begin, end = max(first[0], band[0]), min(first[0] + count[0], band[1])
        if begin >= end:
            continue
        map_offset = sum(t * stride for t, stride in zip(token, spatial))
        map_offset += (begin - first[0]) * axes[0].tile * steps[0]
        places = (begin - band[0], *first[1:])
        tile_offset = sum(place * step for place, step in zip(places, tile_steps))
        tile_offset += sum(p * step for p, step in zip(position, position_steps))
        part = (*shape[:lead], *classes, end - begin, *count[1:], *length, shape[-1])
        parts.append(Part(part, map_strides, map_offset, inner, tile_offset))
    return whole, tuple(parts)
