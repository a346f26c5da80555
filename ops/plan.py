"""How one call of local attention is cut into chunks, and the steps on the tiles of a chunk."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vitarium.ops.tiles import LEAD, Axis, fold, grid_view, map_views, tile_view
from vitarium.ops.workspace import Workspace

# Bytes of the scores of one chunk in float32. On a CPU they should stay near the second-level cache
# (with half as many bytes an element, twice the bytes were best); elsewhere few large launches are
# better.
CPU_CHUNK = 1 << 20
DEVICE_CHUNK = 1 << 28


@dataclass(frozen=True)
class Chunk:
    """Some heads of some images.

    Attributes:
        images, heads: which.
        all_images, all_heads: whether these are all, so that nothing need be taken.
    """

    images: slice
    heads: slice
    all_images: bool
    all_heads: bool

    @property
    def pairs(self) -> tuple[int, int]:
        return self.images.stop - self.images.start, self.heads.stop - self.heads.start

    def tokens_of(self, x: Tensor) -> Tensor:
        """View `(images, heads, *spatial, channels)` of `(B, *spatial, heads, channels)`."""
        return (x if self.all_images else x[self.images]).movedim(-2, 1)

    def of(self, x: Tensor, group: int = 1) -> Tensor:
        """View `(images, heads, *spatial, channels)` of `(B, *spatial, num_heads, channels)`.

        With `group` query heads to a head of `x`, heads repeat (and are copied).
        """
        x = self.tokens_of(x)
        if group == 1:
            return x if self.all_heads else x[:, self.heads]
        return x[:, [head // group for head in range(self.heads.start, self.heads.stop)]]


def _portions(count: int, most: int) -> list[tuple[int, int]]:
    """The numbers up to `count` in as few ranges of at most `most` as will do, about as long."""
    step = -(-count // max(1, -(-count // most)))
    return [(first, min(first + step, count)) for first in range(0, count, step or 1)]


class _Facts(NamedTuple):
    """What follows from the axes of a plan.

    Attributes:
        classes, tile, halo: of every axis.
        plain: whether a map is a grid of queries already, and the same for keys.
        full: whether no position of a grid of queries, or of keys, is beyond the map.
        overlaps: whether a key is in several tiles, so that its gradient is a sum.
        single: whether there is one tile.
    """

    classes: tuple[int, ...]
    tile: tuple[int, ...]
    halo: tuple[int, ...]
    plain: tuple[bool, bool]
    full: tuple[bool, bool]
    overlaps: bool
    single: bool


@functools.lru_cache(maxsize=256)
def _facts(axes: tuple[Axis, ...]) -> _Facts:
    return _Facts(
        tuple(axis.classes for axis in axes),
        tuple(axis.tile for axis in axes),
        tuple(axis.halo for axis in axes),
        (all(axis.is_grid(False) for axis in axes), all(axis.is_grid(True) for axis in axes)),
        (all(axis.fills(False) for axis in axes), all(axis.fills(True) for axis in axes)),
        any(axis.halo != axis.tile for axis in axes),
        all(axis.classes == axis.tiles == 1 for axis in axes),
    )


@functools.lru_cache(maxsize=1024)
def portioned(
    pairs: tuple[int, int], rows: int, row: int, limit: int
) -> tuple[list[tuple[int, int]], list[Chunk]]:
    """Bands of rows of tiles, and chunks, that take at most `limit` bytes, if possible.

    Args:
        pairs: number of images and of heads.
        rows: rows of tiles of a map.
        row: bytes that a row of one head takes.
        limit: of bytes.
    """
    batch, num_heads = pairs
    # Several heads of an image together, if they fit: in memory they lie side by side.
    heads = min(num_heads, max(1, limit // row))
    step = min(rows, max(1, limit // (row * heads)))
    images = max(1, limit // (row * heads * step))
    chunks = [
        Chunk(
            slice(*some_images),
            slice(*some_heads),
            some_images == (0, batch),
            some_heads == (0, num_heads),
        )
        for some_images in _portions(batch, images)
        for some_heads in _portions(num_heads, heads)
    ]
    return _portions(rows, step), chunks


def row_tiles(axes: Sequence[Axis]) -> int:
    """Tiles of a row of tiles along the first axis, of all classes."""
    tiles = math.prod(axis.classes for axis in axes)
    return tiles * math.prod(axis.tiles for axis in axes[1:])


class Plan:
    """How one call is cut up: bands of tiles of the first axis, and chunks of images and heads."""

    def __init__(self, query: Tensor, axes: Sequence[Axis], *, strips: bool = False) -> None:
        self.axes = axes = tuple(axes)
        self.classes, self.tile, self.halo, self.plain, self.full, self.overlaps, self.single = (
            _facts(axes)
        )
        limit = CPU_CHUNK if query.device.type == "cpu" else DEVICE_CHUNK
        limit = limit * 4 // query.element_size()
        rows, row = axes[0].tiles, row_tiles(axes) * math.prod(self.tile) * math.prod(self.halo)
        if strips:  # no scores are stored: only the grids count
            rows, row = 1, math.prod(axis.classes * axis.keys for axis in axes) * query.shape[-1]
        pairs = query.shape[0], query.shape[-2]
        self.bands, self.chunks = portioned(pairs, rows, row * query.element_size(), limit)
        self.work = Workspace(query)
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self._cleared: set[str] = set()

    def grid(self, name: str, x: Tensor, dtype: torch.dtype, *, keys: bool = False) -> Tensor:
        """A grid for the map `(images, heads, *spatial, channels)`, without its contents.

        Positions beyond the map are zero, or as the last user of the name in this plan left them.
        """
        positions = (axis.keys if keys else axis.queries for axis in self.axes)
        shape = (*x.shape[:LEAD], *self.classes, *positions, x.shape[-1])
        grid = self.work.take(name, shape, dtype)
        if name not in self._cleared:
            self._cleared.add(name)
            if not self.full[keys]:
                grid.zero_()
        return grid

    def keys_of(self, name: str, x: Tensor) -> Tensor:
        """The map as a grid of keys, a view of it where that is possible."""
        return self._grid_of(name, x, keys=True, fill=True)

    def queries_of(self, name: str, x: Tensor) -> Tensor:
        """The map as a grid of queries, a view of it where that is possible."""
        return self._grid_of(name, x, keys=False, fill=True)

    def results_of(self, name: str, x: Tensor) -> Tensor:
        """A grid of queries for results, a view of the map where that is possible."""
        return self._grid_of(name, x, keys=False, fill=False)

    def _grid_of(self, name: str, x: Tensor, *, keys: bool, fill: bool) -> Tensor:
        if self.plain[keys]:
            return grid_view(x, self.axes)
        grid = self.grid(name, x, x.dtype, keys=keys)
        if fill:
            for source, target in map_views(x, grid, self.axes, keys):
                target.copy_(source)
        return grid

    def sums_of(self, name: str, x: Tensor) -> Tensor:
        """A grid of keys to which `add_keys` adds, for the map of a gradient."""
        if not self.overlaps:
            return self._grid_of(name, x, keys=True, fill=False)
        grid = self.grid(name, x, self.wide, keys=True)
        return grid.zero_() if len(self.bands) > 1 else grid

    def finish(self, grid: Tensor, x: Tensor, chunk: Chunk, *, keys: bool = False) -> None:
        """Copy a grid into the chunk of a map it was made for, unless it is a view of it."""
        if not self.plain[keys] or (keys and self.overlaps):
            for target, source in map_views(chunk.of(x), grid, self.axes, keys):
                target.copy_(source)

    def queries(self, name: str, grid: Tensor, band: tuple[int, int]) -> Tensor:
        """The query tiles of a band: `(pairs * classes * tiles, queries, channels)`."""
        view = tile_view(grid, self.axes, band, self.tile)
        return self._matrices(name, view).view(-1, math.prod(self.tile), grid.shape[-1])

    def _matrices(self, name: str, view: Tensor) -> Tensor:
        """The view, copied if it is not contiguous; nobody may write to it."""
        if view.is_contiguous():
            return view
        return self.work.take(name, view.shape, view.dtype).copy_(view)

    def results(self, name: str, grid: Tensor, band: tuple[int, int]) -> Tensor:
        """Where to write the query tiles of a band: in the grid itself, if they are matrices."""
        view = tile_view(grid, self.axes, band, self.tile)
        if not view.is_contiguous():
            view = self.work.take(name, view.shape, view.dtype)
        return view.view(-1, math.prod(self.tile), grid.shape[-1])

    def put_queries(
        self, tiles: Tensor, grid: Tensor, band: tuple[int, int], sums: Tensor | None = None
    ) -> None:
        """Write query tiles, divided by `sums`, into their grid, if they are not there already."""
        view = tile_view(grid, self.axes, band, self.tile)
        tiles = tiles.view(view.shape)
        there = tiles.data_ptr() == view.data_ptr()
        if sums is not None:
            sums = sums.view(*view.shape[:-1], 1)
            torch.div(tiles, sums, out=tiles if there else view)
        elif not there:
            view.copy_(tiles)

    def keys(self, name: str, grid: Tensor, band: tuple[int, int]) -> Tensor:
        """The halos of a band: `(pairs * classes * tiles, keys, channels)`."""
        view = tile_view(grid, self.axes, band, self.halo)
        return self._matrices(name, view).view(-1, math.prod(self.halo), grid.shape[-1])

    def add_keys(self, tiles: Tensor, grid: Tensor, band: tuple[int, int]) -> None:
        """Add halos back to where `keys` took them from, one axis after the other."""
        if not self.overlaps:
            self.put_queries(tiles, grid, band)
            return
        rank = len(self.axes)
        halos = tiles.view(tile_view(grid, self.axes, band, self.halo).shape)
        first, count = band[0] * self.tile[0], band[1] - band[0]
        grid = grid.narrow(LEAD + rank, first, (count - 1) * self.tile[0] + self.halo[0])
        for i, axis in enumerate(self.axes):
            place = LEAD + rank + i
            halos = halos.movedim(place + rank - i, place + 1)  # beside the axis's tiles
            last = i == rank - 1
            total = grid
            if not last:
                shape = list(halos.shape)
                shape[place : place + 2] = [grid.shape[place]]
                total = self.work.take(f"fold {i}", shape, grid.dtype)
            fold(total, halos, axis, place, fresh=not last or len(self.bands) == 1)
            halos = total
