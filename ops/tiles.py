"""Local attention on ordinary tensor operations: tiles of queries against the keys around them.

An axis is cut into tiles of consecutive queries. All keys that the queries of a tile may see lie
in one stretch, the tile's halo, of a length common to all tiles; what a single query does not see
of it is masked. Gathering halos into a workspace that stays in cache, and batched matrix products
on it, is an order of magnitude faster than gathering the keys of every query.

Dilation splits an axis into residue classes, which are independent rows. Everything below works on
grids `(G, *classes, *sizes, channels)`: class-major copies of `(G, *spatial, channels)` maps.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Axis:
    """One axis cut into evenly spaced tiles.

    Attributes:
        length: tokens on the axis.
        classes: residue classes (the dilation).
        tile: queries per tile.
        tiles: number of tiles in a class.
        before: how far the halo of a tile begins before its first query.
        halo: keys per tile, counting positions before the first and after the last of a class.
        patterns: the distinct patterns: for each query of a tile the halo positions that it sees.
        which: `(classes, tiles)` index into `patterns`.
        lead: queries of the first tile that lie before the axis; -s if instead the first s
            positions of a class come last, at the end of the last tile.
        border: positions that keys have beyond either end of a class.
    """

    length: int
    classes: int
    tile: int
    tiles: int
    before: int
    halo: int
    patterns: tuple[tuple[tuple[int, int], ...], ...]
    which: tuple[tuple[int, ...], ...]
    lead: int = 0
    border: int = 0

    @property
    def queries(self) -> int:
        """Positions of a grid of queries: whole tiles."""
        return self.tiles * self.tile

    @property
    def keys(self) -> int:
        """Positions of a grid of keys: whole halos."""
        return (self.tiles - 1) * self.tile + self.halo

    def is_grid(self, keys: bool) -> bool:
        """Whether the tokens of the axis are a grid of queries or keys as they are."""
        return self.pieces(keys) == [(0, self.tokens(keys), 0, self.classes)] and self.fills(keys)

    def fills(self, keys: bool) -> bool:
        """Whether a grid of queries or keys holds tokens everywhere."""
        positions = self.keys if keys else self.queries
        return positions * self.classes == self.tokens(keys)

    def tokens(self, keys: bool) -> int:
        """Tokens along the axis."""
        return self.length + 2 * self.border * self.classes * keys

    def seen(self, query: int) -> range:
        """The keys that a query of the first class sees, where there is no lead."""
        t, row = divmod(query, self.tile)
        start, stop = self.patterns[self.which[0][t]][row]
        origin = t * self.tile - self.before
        return range(origin + start, origin + stop)

    def pieces(self, keys: bool) -> list[tuple[int, int, int, int]]:
        """The axis as blocks of whole steps: (first token, tokens, place in the grid, classes)."""
        place = self.lead
        whole, rest = divmod(self.length, self.classes)
        if keys:
            place += self.before - self.border
            whole += 2 * self.border
        blocks = []
        last = max(0, -self.lead)
        if last:
            blocks.append((0, last, place + self.queries, self.classes))
        if whole > last:
            blocks.append((last, whole - last, place + last, self.classes))
        if rest:
            blocks.append((whole, 1, place + whole, rest))
        return [
            (first * self.classes, count * classes, place, classes)
            for first, count, place, classes in blocks
        ]

    def parts(self) -> list[tuple[int, int, int, int, int]]:
        """An axis that tiles fill as parts of tiles that are alike.

        Each is (first token, first tile, tiles, first position in them, positions in them).
        """
        found = []
        for token, count, place, classes in self.pieces(keys=False):
            position, last = place, place + count // classes
            while position < last:
                tile, offset = divmod(position, self.tile)
                tiles, length = 1, min(self.tile - offset, last - position)
                if length == self.tile:
                    tiles = (last - position) // length
                found.append((token + (position - place) * classes, tile, tiles, offset, length))
                position += tiles * length
        return found


@dataclass(frozen=True)
class PlainAxis:
    """An axis for `attend_plain`, of a length that may be symbolic.

    Attributes are those of `Axis`, but for the keys that queries see: positions of a class
    `start ... stop - 1`, each `(classes, tiles, tile)`.
    """

    length: int
    classes: int
    tile: int
    tiles: int
    before: int
    halo: int
    lead: int
    border: int
    start: Tensor
    stop: Tensor


def cut(
    length: int,
    classes: int,
    tile: int,
    ranges: Sequence[Sequence[range]],
    lead: int = 0,
    border: int = 0,
) -> Axis:
    """Cut an axis into tiles of `tile` queries.

    Args:
        length: tokens on the axis.
        classes: number of residue classes.
        tile: queries per tile.
        ranges: for each class the keys that each of its queries sees, in positions of the class.
        lead, border: as of `Axis`.
    """
    tiles = -(-(len(ranges[0]) + max(0, lead)) // tile)
    rows = []  # for each class and place of its grid: the keys seen, relative to the tile
    for row in ranges:
        seen: list[tuple[int, int] | None] = [None] * (tiles * tile)
        for query, keys in enumerate(row):
            place = (query + lead) % len(seen)
            moved = place - query - place // tile * tile
            seen[place] = keys.start + moved, keys.stop + moved
        rows.append(seen)
    bounds = [pair for row in rows for pair in row if pair]
    before = -min(start for start, _ in bounds)
    halo = max(stop for _, stop in bounds) + before
    patterns: dict[tuple[tuple[int, int], ...], int] = {}
    which = []
    for row in rows:
        # Where there is no query, any finite result will do.
        halos = [(pair[0] + before, pair[1] + before) if pair else (0, 1) for pair in row]
        tiled = (tuple(halos[t * tile : (t + 1) * tile]) for t in range(tiles))
        which.append(tuple(patterns.setdefault(seen, len(patterns)) for seen in tiled))
    return Axis(
        length, classes, tile, tiles, before, halo, tuple(patterns), tuple(which), lead, border
    )


LEAD = 2  # grids and tiles begin with (images, heads)


def map_views(
    x: Tensor, grid: Tensor, axes: Sequence[Axis], keys: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of views of one shape, of a map and of its grid of queries or keys, that cover the map.

    The map is `(images, heads, *spatial, channels)`; a grid is class-major,
    `(images, heads, *classes, *positions, channels)`.
    """
    place = LEAD + len(axes)
    outer, spatial, channels = x.stride()[:LEAD], x.stride()[LEAD:-1], x.stride(-1)
    strides = grid.stride()
    for choice in itertools.product(*(axis.pieces(keys) for axis in axes)):
        shape = [*x.shape[:LEAD]]
        shape += [classes for *_, classes in choice]
        shape += [tokens // classes for _, tokens, _, classes in choice]
        shape.append(x.shape[-1])
        steps = [axis.classes * stride for axis, stride in zip(axes, spatial)]
        offset = sum(token * stride for (token, *_), stride in zip(choice, spatial))
        source = x.as_strided(
            shape, (*outer, *spatial, *steps, channels), x.storage_offset() + offset
        )
        offset = grid.storage_offset()
        offset += sum(first * stride for (_, _, first, _), stride in zip(choice, strides[place:]))
        yield source, grid.as_strided(shape, strides, offset)


def grid_view(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """The map `(images, heads, *spatial, channels)` as a grid, where `Axis.is_grid` is true."""
    return x.as_strided(*_grid_geometry(x.shape, x.stride(), axes))


@functools.lru_cache(maxsize=1024)
def _grid_geometry(
    shape: tuple[int, ...], strides: tuple[int, ...], axes: tuple[Axis, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of `grid_view`."""
    classes = [axis.classes for axis in axes]
    spatial = strides[LEAD:-1]
    positions = [length // count for length, count in zip(shape[LEAD:-1], classes)]
    steps = [count * stride for count, stride in zip(classes, spatial)]
    return (
        (*shape[:LEAD], *classes, *positions, shape[-1]),
        (*strides[:LEAD], *spatial, *steps, strides[-1]),
    )


def tile_view(
    grid: Tensor, axes: tuple[Axis, ...], band: tuple[int, int], sizes: tuple[int, ...]
) -> Tensor:
    """View of a grid as `(images, heads, *classes, *tiles, *sizes, channels)`.

    `band` is the first tile, and the one after the last, of the first axis; tiles that are larger
    than their spacing overlap.
    """
    first, last = band
    shape, strides, step = _tile_geometry(grid.shape, grid.stride(), axes, last - first, sizes)
    return grid.as_strided(shape, strides, grid.storage_offset() + first * step)


@functools.lru_cache(maxsize=1024)
def _tile_geometry(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    axes: tuple[Axis, ...],
    count: int,
    sizes: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape and strides of `tile_view`, and the step from tile to tile along the first axis."""
    place = LEAD + len(axes)
    inner = strides[place:-1]
    counts = (count, *(axis.tiles for axis in axes[1:]))
    steps = [axis.tile * stride for axis, stride in zip(axes, inner)]
    return (
        (*shape[:place], *counts, *sizes, shape[-1]),
        (*strides[:place], *steps, *inner, strides[-1]),
        steps[0],
    )


def fold(total: Tensor, halos: Tensor, axis: Axis, place: int, *, fresh: bool) -> None:
    """Add up the halos of one axis; `fresh` says that `total` holds nothing to keep.

    `total` has the positions of the axis at dimension `place`, `halos` its tiles and halo there.
    Halos overlap, so they are added in slices as long as their spacing, which do not.
    """
    strides = list(total.stride())
    strides[place : place + 1] = axis.tile * strides[place], strides[place]
    count = halos.shape[place]
    for begin in range(0, axis.halo, axis.tile):
        width = min(axis.tile, axis.halo - begin)
        shape = (*total.shape[:place], count, width, *total.shape[place + 1 :])
        offset = total.storage_offset() + begin * total.stride(place)
        part = total.as_strided(shape, strides, offset)
        source = halos.narrow(place + 1, begin, width)
        if begin or not fresh:
            part.add_(source)
        else:
            part.copy_(source)
            covered = (count - 1) * axis.tile + width
            total.narrow(place, covered, total.shape[place] - covered).zero_()
