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
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def negative(dtype: torch.dtype) -> float:
    """What hides a score: finite, so that no query turns into NaN, and far from overflow."""
    return max(-1e30, torch.finfo(dtype).min / 2)


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

    @property
    def is_grid(self) -> bool:
        """Whether the axis is a grid of queries as it is."""
        return self.classes == 1 and self.queries == self.length and not self.lead

    @property
    def is_key_grid(self) -> bool:
        """Whether the keys of the axis are a grid of keys as they are."""
        length = self.length + 2 * self.border
        before = self.before - self.border
        return self.classes == 1 and self.keys == length and not self.lead and not before

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


def tile_view(
    grid: Tensor, axes: Sequence[Axis], band: tuple[int, int], sizes: Sequence[int]
) -> Tensor:
    """View of a grid as `(images, heads, *classes, *tiles, *sizes, channels)`.

    `band` is the first tile, and the one after the last, of the first axis; tiles that are larger
    than their spacing overlap.
    """
    place = LEAD + len(axes)
    strides = grid.stride()
    inner = strides[place:-1]
    counts = (band[1] - band[0], *(axis.tiles for axis in axes[1:]))
    steps = (axis.tile * stride for axis, stride in zip(axes, inner))
    return grid.as_strided(
        (*grid.shape[:place], *counts, *sizes, grid.shape[-1]),
        (*strides[:place], *steps, *inner, strides[-1]),
        grid.storage_offset() + band[0] * axes[0].tile * inner[0],
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


class Patterns:
    """The distinct patterns of all axes together, as tensors."""

    def __init__(self, axes: Sequence[Axis], device: torch.device) -> None:
        rank = len(axes)
        self.axes = axes
        self.device = device
        inside = torch.ones((), dtype=torch.bool, device=device)
        self.offsets: list[Tensor] = []  # per axis: key minus query
        for i, axis in enumerate(axes):
            seen = torch.tensor(axis.patterns, device=device)
            key = torch.arange(axis.halo, device=device)
            query = torch.arange(axis.tile, device=device)[:, None]
            shape = [1] * (3 * rank)
            shape[i::rank] = len(axis.patterns), axis.tile, axis.halo
            inside = inside & ((key >= seen[..., :1]) & (key < seen[..., 1:])).view(shape)
            shape[i] = 1
            self.offsets.append((key - axis.before - query).view(shape))
        self.outside = ~inside.reshape(  # (patterns, queries, keys)
            *(math.prod(inside.shape[i * rank : (i + 1) * rank]) for i in range(3))
        )
        self.all_inside = not bool(self.outside.any())
        self.which = functools.cache(self._which)

    def _which(self, band: tuple[int, int], strips: bool = False) -> Tensor:
        """The pattern of every (class, tile) of a band, flattened.

        With `strips`, tiles of the first axis come last.
        """
        rank = len(self.axes)
        index = torch.zeros((), dtype=torch.long, device=self.device)
        for i, axis in enumerate(self.axes):
            first, last = band if i == 0 else (0, axis.tiles)
            rows = torch.tensor([row[first:last] for row in axis.which], device=self.device)
            shape = [1] * (2 * rank)
            shape[i::rank] = rows.shape
            index = index * len(axis.patterns) + rows.view(shape)
        return (index.movedim(rank, -1) if strips else index).flatten()

    def bias_index(self, bias: Tensor) -> list[Tensor]:
        """Indices into a bias table `(num_heads, 2 * reach + 1, ...)`, one per axis."""
        return [
            (offset + size // 2).clamp(0, size - 1)
            for offset, size in zip(self.offsets, bias.shape[1:])
        ]


_patterns = functools.lru_cache(maxsize=128)(Patterns)


class Additive:
    """The mask, and the bias where there is one, that is added to the scores of a band of tiles.

    Tiles that look alike share a pattern, so both are made once per pattern and then copied.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        bias: Tensor | None,
        like: Tensor,
        work: Workspace,
        name: str = "additive",
    ) -> None:
        self.work = work
        self.name = name
        self.patterns = _patterns(tuple(axes), like.device)
        outside = self.patterns.outside
        self.needed = bias is not None or not self.patterns.all_inside
        if bias is None:
            table = like.new_zeros((1, *outside.shape))
        else:
            table = bias[(slice(None), *self.patterns.bias_index(bias))].to(like.dtype)
            table = table.reshape(-1, 1, *outside.shape[1:])
        self.table = table.masked_fill(outside, negative(like.dtype))
        self._bands: dict[tuple[Any, ...], Tensor] = {}

    def band(self, band: tuple[int, int], strips: bool = False) -> Tensor:
        """`(num_heads or 1, classes and tiles, queries, keys)` of a band."""
        alike = tuple(row[slice(*band)] for row in self.patterns.axes[0].which)
        if alike not in self._bands:
            which = self.patterns.which(band, strips)
            shape = (self.table.shape[0], *which.shape, *self.table.shape[2:])
            name = f"{self.name} {len(self._bands)}"
            self._bands[alike] = torch.index_select(
                self.table, 1, which, out=self.work.take(name, shape, self.table.dtype)
            )
        return self._bands[alike]

    def grad_bias(self, grad: Tensor, bias: Tensor) -> Tensor:
        """The gradient of the bias from that of `table`, `(num_heads, patterns, queries, keys)`."""
        grad = grad.masked_fill(self.patterns.outside, 0)
        offsets = torch.broadcast_tensors(*self.patterns.bias_index(bias))
        heads = torch.arange(grad.shape[0], device=grad.device).view(-1, *[1] * offsets[0].dim())
        return grad.new_zeros(bias.shape).index_put_(
            (heads, *offsets), grad.sum(1).view(-1, *offsets[0].shape), accumulate=True
        )


class Workspace:
    """Buffers that every chunk reuses, so that they stay in cache.

    Small ones on a CPU are kept for the thread's next call: a fresh buffer costs a page fault for
    every 4 KiB, as much as what is done with it.
    """

    KEPT = 1 << 22  # bytes of the largest buffer that is kept
    _kept = threading.local()

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        # Tensors of inference mode may not be written to outside of it.
        key = f"buffers{torch.is_inference_mode_enabled()}"
        if like.device.type == "cpu":
            self._buffers = self._kept.__dict__.setdefault(key, {})

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor that holds whatever was left in it."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name, dtype] = self._like.new_empty(size, dtype=dtype)
        return buffer[:size].view(shape)

    def close(self) -> None:
        """Let go of large buffers."""
        for key, buffer in list(self._buffers.items()):
            if buffer.nbytes > self.KEPT:
                del self._buffers[key]


# Bytes of the scores of one chunk in float32. On a CPU they should stay near the second-level cache
# (with half as many bytes an element, twice the bytes were best); elsewhere few large launches are
# better.
CPU_CHUNK = 1 << 20
DEVICE_CHUNK = 1 << 28


@dataclass(frozen=True)
class Chunk:
    """Some heads of some images."""

    images: slice
    heads: slice

    @property
    def pairs(self) -> tuple[int, int]:
        return self.images.stop - self.images.start, self.heads.stop - self.heads.start

    def of(self, x: Tensor, group: int = 1) -> Tensor:
        """View `(images, heads, *spatial, channels)` of `(B, *spatial, num_heads, channels)`.

        With `group` query heads to a head of `x`, heads repeat (and are copied).
        """
        x = x[self.images].movedim(-2, 1)
        if group == 1:
            return x[:, self.heads]
        return x[:, [head // group for head in range(self.heads.start, self.heads.stop)]]


class Plan:
    """How one call is cut up: bands of tiles of the first axis, and chunks of images and heads."""

    def __init__(self, query: Tensor, axes: Sequence[Axis], *, strips: bool = False) -> None:
        self.axes = axes
        self.classes = tuple(axis.classes for axis in axes)
        self.tile = tuple(axis.tile for axis in axes)
        self.halo = tuple(axis.halo for axis in axes)
        limit = CPU_CHUNK if query.device.type == "cpu" else DEVICE_CHUNK
        limit = limit * 4 // query.element_size()
        batch, num_heads = query.shape[0], query.shape[-2]
        count = axes[0].tiles
        row = self._scores_of_a_row() * query.element_size()
        # Several heads of an image together, if they fit: in memory they lie side by side.
        if strips:  # no scores are stored: only the grids count
            grid = math.prod(axis.classes * axis.keys for axis in axes) * query.shape[-1]
            heads, images = min(num_heads, max(1, limit // (grid * query.element_size()))), 1
            step = count
        else:
            heads = min(num_heads, max(1, limit // row))
            step = min(count, max(1, limit // (row * heads)))
            images = max(1, limit // (row * heads * step))
        self.bands = [(first, min(first + step, count)) for first in range(0, count, step)]
        self.chunks = [
            Chunk(slice(b, min(b + images, batch)), slice(h, min(h + heads, num_heads)))
            for b in range(0, batch, images)
            for h in range(0, num_heads, heads)
        ]
        self.work = Workspace(query)
        # Where nothing is dilated and whole tiles fit, a map is a grid already.
        self.plain = all(axis.is_grid for axis in axes)
        self.plain_keys = all(axis.is_key_grid for axis in axes)
        self.dense = all(axis.classes == 1 and axis.tiles == 1 for axis in axes)
        self._cleared: set[str] = set()

    def _scores_of_a_row(self) -> int:
        """Scores of one row of tiles, of all classes, of one head."""
        tiles = math.prod(axis.classes for axis in self.axes)
        tiles *= math.prod(axis.tiles for axis in self.axes[1:])
        return tiles * math.prod(self.tile) * math.prod(self.halo)

    def grid(self, name: str, x: Tensor, dtype: torch.dtype, *, keys: bool = False) -> Tensor:
        """A grid for the map `(images, heads, *spatial, channels)`, without its contents.

        Positions beyond the map are zero, or as the last user of the name in this plan left them.
        """
        positions = (axis.keys if keys else axis.queries for axis in self.axes)
        shape = (*x.shape[:LEAD], *self.classes, *positions, x.shape[-1])
        grid = self.work.take(name, shape, dtype)
        if name not in self._cleared:
            self._cleared.add(name)
            grid.zero_()
        return grid

    def keys_of(self, name: str, x: Tensor) -> Tensor:
        """The map as a grid of keys, a view of it where that is possible."""
        if self.plain_keys:
            return x[(slice(None), slice(None), *(None for _ in self.axes))]
        grid = self.grid(name, x, x.dtype, keys=True)
        for source, target in map_views(x, grid, self.axes, keys=True):
            target.copy_(source)
        return grid

    def queries_of(self, name: str, x: Tensor, *, fill: bool = True) -> Tensor:
        """The map as a grid of queries, a view of it where that is possible."""
        if self.plain:
            return x[(slice(None), slice(None), *(None for _ in self.axes))]
        grid = self.grid(name, x, x.dtype)
        if fill:
            for source, target in map_views(x, grid, self.axes, keys=False):
                target.copy_(source)
        return grid

    def finish(self, grid: Tensor, x: Tensor, *, keys: bool = False) -> None:
        """Copy a grid into the map it was made for, unless it is a view of it."""
        if keys or not self.plain:
            for target, source in map_views(x, grid, self.axes, keys):
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

    def put_queries(self, tiles: Tensor, grid: Tensor, band: tuple[int, int]) -> None:
        """Write query tiles into their grid, unless they are there already."""
        view = tile_view(grid, self.axes, band, self.tile)
        if tiles.data_ptr() != view.data_ptr():
            view.copy_(tiles.view(view.shape))

    def keys(self, name: str, grid: Tensor, band: tuple[int, int]) -> Tensor:
        """The halos of a band: `(pairs * classes * tiles, keys, channels)`."""
        view = tile_view(grid, self.axes, band, self.halo)
        return self._matrices(name, view).view(-1, math.prod(self.halo), grid.shape[-1])

    def add_keys(self, tiles: Tensor, grid: Tensor, band: tuple[int, int]) -> None:
        """Add halos back to where `keys` took them from, one axis after the other."""
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

    def weights(
        self,
        query: Tensor,
        key: Tensor,
        additive: Additive,
        scale: float,
        chunk: Chunk,
        band: tuple[int, int],
    ) -> Tensor:
        """Softmax of the scores of tiles, in the buffer "weights"."""
        shape = (query.shape[0], query.shape[1], key.shape[1])
        scores = self.work.take("scores", shape, query.dtype)
        if additive.needed:
            table = additive.band(band)
            table = table[chunk.heads] if table.shape[0] > 1 else table
            scores.view(*chunk.pairs, -1, *shape[1:]).copy_(table)
        scores.baddbmm_(query, key.mT, beta=1 if additive.needed else 0, alpha=scale)
        return torch.softmax(scores, -1, out=self.work.take("weights", shape, query.dtype))
