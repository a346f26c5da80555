"""Local attention on strips, by the fused attention that PyTorch has for CPUs.

A strip holds all positions of the first axis and one halo of the others. The keys of a tile are
then a matrix inside a strip, and those of the next tile another that overlaps it: nothing is copied
along the first axis, so its tiles can be as low as two rows, and no scores are stored.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitarium.ops.additive import Additive
from vitarium.ops.plan import CPU_CHUNK, Plan
from vitarium.ops.tiles import LEAD, Axis, cut

ROWS = 2  # queries per tile along the first axis, away from its ends


@dataclass(frozen=True)
class Section:
    """Consecutive tiles of the first axis, cut on their own.

    Attributes:
        first: position of the first query.
        key: position of the first key of the first tile.
        tile, halo, tiles: of the first axis.
        masks: what is added to the scores, `(heads or 1, strips, tiles or 1, queries, keys)`.
    """

    first: int
    key: int
    tile: int
    halo: int
    tiles: int
    masks: Tensor


@functools.lru_cache(maxsize=256)
def split(axis: Axis) -> tuple[Axis, tuple[tuple[int, Axis], ...]]:
    """The axis as one tile, and as sections (first query, axis): low tiles between the ends.

    At the ends windows are pushed inside, so that one tile takes all queries there. Where windows
    do not move evenly with the query (strides, window attention), the axis stays as it is.
    """
    if axis.classes > 1 or axis.lead or axis.border:
        return axis, ((0, axis),)
    n = axis.length
    ranges = [axis.seen(query) for query in range(n)]
    relative = [(keys.start - query, keys.stop - query) for query, keys in enumerate(ranges)]
    first = last = n // 2
    while first > 0 and relative[first - 1] == relative[n // 2]:
        first -= 1
    while last < n and relative[last] == relative[n // 2]:
        last += 1
    last -= (last - first) % ROWS
    if 2 * (last - first) < n:
        return axis, ((0, axis),)

    def part(begin: int, end: int, tile: int) -> tuple[int, Axis]:
        moved = [range(keys.start - begin, keys.stop - begin) for keys in ranges[begin:end]]
        return begin, cut(end - begin, 1, tile, [moved])

    bounds = ((0, first, first), (first, last, ROWS), (last, n, n - last))
    parts = tuple(part(*bound) for bound in bounds if bound[0] < bound[1])
    return cut(n, 1, n, [ranges]), parts


def attend_strips(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    axes: Sequence[Axis],
    scale: float,
) -> Tensor:
    """What `vitarium.ops.tiled.attend` computes, for float32 and float64 on a CPU."""
    axis, parts = split(axes[0])
    plan = Plan(query, (axis, *axes[1:]), strips=True)
    sections = [
        section
        for first, part in parts
        for section in _sections(plan, axis, first, part, bias, query)
    ]
    group = query.shape[-2] // key.shape[-2]
    output = query.new_empty(query.shape)
    for chunk in plan.chunks:
        query_grid = plan.queries_of("query grid", chunk.of(query))
        key_grid = plan.keys_of("key grid", chunk.of(key, group))
        value_grid = plan.keys_of("value grid", chunk.of(value, group))
        result = plan.results_of("output grid", chunk.of(output))
        # Buffers and views of them serve all pairs: little is left to do for each.
        strips = _strip_view(plan, key_grid)
        keys = plan.work.take("key", strips.shape, query.dtype)
        values = plan.work.take("value", strips.shape, query.dtype)
        calls = [
            (
                section.masks,
                _TileView(plan, section, query_grid),
                _TileView(plan, section, result),
                _keys(plan, section, keys),
                _keys(plan, section, values),
            )
            for section in sections
        ]
        for image, head in itertools.product(*map(range, chunk.pairs)):
            for grid, buffer in ((key_grid, keys), (value_grid, values)):
                offset = grid.storage_offset() + image * grid.stride(0) + head * grid.stride(1)
                buffer.copy_(grid.as_strided(strips.shape, strips.stride(), offset))
            for masks, source, target, k, v in calls:
                tiles = plan.work.take("query", source.shape, query.dtype)
                tiles.copy_(source.of(query_grid, image, head))
                found, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    tiles.view(*k.shape[:2], -1, k.shape[-1]),
                    k,
                    v,
                    attn_mask=masks[(chunk.heads.start + head) % len(masks)],
                    scale=scale,
                )
                target.of(result, image, head).copy_(found.reshape(target.shape))
        plan.finish(result, output, chunk)
    plan.work.close()
    return output


def _sections(
    plan: Plan, whole: Axis, first: int, axis: Axis, bias: Tensor | None, like: Tensor
) -> list[Section]:
    """A section of the first axis, or several where its mask would be large."""
    axes = (axis, *plan.axes[1:])
    additive = Additive(axes, bias, like.dtype, plan.work, f"section {first}")
    uniform = all(len(set(row)) == 1 for row in axis.which)
    strips = math.prod(other.classes * other.tiles for other in axes[1:]) * axis.classes
    row = strips * additive.table[0, 0].numel() * like.element_size()
    step = axis.tiles if uniform else max(1, min(axis.tiles, 4 * CPU_CHUNK // row))
    found = []
    for begin in range(0, axis.tiles, step):
        band = begin, min(begin + step, axis.tiles)
        seen = (begin, begin + 1) if uniform else band
        masks = additive.band(seen, strips=True).unflatten(1, (-1, seen[1] - seen[0]))
        query = first + begin * axis.tile
        key = whole.before + query - axis.before
        found.append(Section(query, key, axis.tile, axis.halo, band[1] - band[0], masks))
    return found


def _strip_view(plan: Plan, grid: Tensor) -> Tensor:
    """The strips of the first image and head of a grid of keys, as an overlapping view.

    `(*classes, *tiles of the other axes, positions of the first, *halos of the others, channels)`.
    """
    rank, strides = len(plan.axes), grid.stride()[LEAD:]
    inner = strides[rank:-1]
    steps = (axis.tile * stride for axis, stride in zip(plan.axes[1:], inner[1:]))
    tiles = (axis.tiles for axis in plan.axes[1:])
    shape = (*plan.classes, *tiles, plan.axes[0].keys, *plan.halo[1:], grid.shape[-1])
    return grid.as_strided(shape, (*strides[:rank], *steps, *inner, strides[-1]))


def _keys(plan: Plan, section: Section, strips: Tensor) -> Tensor:
    """The keys of a section's tiles in strips, `(strips, tiles, keys, channels)`: they overlap."""
    channels = strips.shape[-1]
    row = math.prod(plan.halo[1:]) * channels
    length = plan.axes[0].keys * row
    return strips.as_strided(
        (strips.numel() // length, section.tiles, section.halo * row // channels, channels),
        (length, section.tile * row, channels, 1),
        strips.storage_offset() + section.key * row,
    )


class _TileView:
    """Where a section's tiles lie in a grid, in the order of its keys.

    `shape` is `(*classes, *tiles of the other axes, tiles, *tile, channels)`.
    """

    def __init__(self, plan: Plan, section: Section, grid: Tensor) -> None:
        rank, strides = len(plan.axes), grid.stride()[LEAD:]
        inner = strides[rank:-1]
        steps = [axis.tile * stride for axis, stride in zip(plan.axes[1:], inner[1:])]
        tiles = (*(axis.tiles for axis in plan.axes[1:]), section.tiles)
        self.shape = (*plan.classes, *tiles, section.tile, *plan.tile[1:], grid.shape[-1])
        first = section.tile * inner[0]
        self._strides = (*strides[:rank], *steps, first, *inner, strides[-1])
        self._offset = section.first * inner[0]

    def of(self, grid: Tensor, image: int, head: int) -> Tensor:
        """The tiles of one image and head."""
        offset = grid.storage_offset() + image * grid.stride(0) + head * grid.stride(1)
        return grid.as_strided(self.shape, self._strides, offset + self._offset)
