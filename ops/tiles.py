"""Local attention on ordinary tensor operations: tiles of queries against the keys around them.

An axis is cut into tiles of consecutive queries. All keys that the queries of a tile may see lie
in one stretch, the tile's halo, of a length common to all tiles; what a single query does not see
of it is masked. Gathering halos into a workspace that stays in cache, and batched matrix products
on it, is an order of magnitude faster than gathering the keys of every query.

Dilation splits an axis into residue classes, which are independent rows. Everything below works on
grids `(G, *classes, *sizes, channels)`: class-major copies of `(G, *spatial, channels)` maps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NEGATIVE = -1e30  # finite: a query beyond the end of its class must not turn into NaN


@dataclass(frozen=True)
class Pattern:
    """What the queries of one tile see of its halo.

    Attributes:
        seen: for each query the half-open range of halo positions that it sees.
        shift: first position of the halo, minus first position of the tile.
    """

    seen: tuple[tuple[int, int], ...]
    shift: int


@dataclass(frozen=True)
class Axis:
    """One axis cut into tiles.

    Attributes:
        length: tokens on the axis.
        classes: residue classes (the dilation).
        tile: queries per tile.
        halo: keys per tile.
        origins: first key of each tile, in positions of a class.
        patterns: the distinct patterns.
        which: `(classes, tiles)` index into `patterns`.
    """

    length: int
    classes: int
    tile: int
    halo: int
    origins: tuple[int, ...]
    patterns: tuple[Pattern, ...]
    which: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Positions of the longest class."""
        return -(-self.length // self.classes)

    @property
    def tiles(self) -> int:
        return len(self.origins)

    def pieces(self) -> list[tuple[slice, int, int]]:
        """The axis as blocks of whole class steps: (tokens, first position, classes present)."""
        whole, rest = divmod(self.length, self.classes)
        blocks = [(slice(0, whole * self.classes), 0, self.classes)] if whole else []
        if rest:
            blocks.append((slice(whole * self.classes, self.length), whole, rest))
        return blocks

    def runs(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Tiles first ... last - 1 as runs of evenly spaced origins: (first tile, count, step)."""
        found: list[tuple[int, int, int]] = []
        start = first
        while start < last:
            step = self.origins[start + 1] - self.origins[start] if start + 1 < last else 0
            end = start + 1
            while end < last and self.origins[end] - self.origins[end - 1] == step:
                end += 1
            found.append((start, end - start, step))
            start = end
        return found


def cut(length: int, classes: int, tile: int, ranges: Sequence[Sequence[range]]) -> Axis:
    """Cut an axis into tiles of `tile` queries.

    Args:
        length: tokens on the axis.
        classes: number of residue classes.
        tile: queries per tile.
        ranges: for each class the keys that each of its queries sees, in positions of the class.
    """
    size = -(-length // classes)
    count = -(-size // tile)
    halo, firsts = 1, []
    for t in range(count):
        rows = [r for row in ranges for r in row[t * tile : (t + 1) * tile]]
        firsts.append(min(r.start for r in rows))
        halo = max(halo, max(r.stop for r in rows) - firsts[-1])
    origins = tuple(max(0, min(first, size - halo)) for first in firsts)
    patterns: dict[Pattern, int] = {}
    which = []
    for row in ranges:
        ids = []
        for t, origin in enumerate(origins):
            queries = row[t * tile : (t + 1) * tile]
            seen = [(r.start - origin, r.stop - origin) for r in queries]
            seen += [(0, 1)] * (tile - len(seen))  # no query: any finite result will do
            pattern = Pattern(tuple(seen), origin - t * tile)
            ids.append(patterns.setdefault(pattern, len(patterns)))
        which.append(tuple(ids))
    return Axis(length, classes, tile, halo, origins, tuple(patterns), tuple(which))


LEAD = 2  # grids and tiles begin with (images, heads)


def _blocks(x: Tensor, grid: Tensor, axes: Sequence[Axis]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of views of one shape, of the map `x` and of its grid, that cover the map."""
    rank = len(axes)
    positions = [LEAD + 2 * i for i in range(rank)]
    residues = [position + 1 for position in positions]
    for choice in itertools.product(*(axis.pieces() for axis in axes)):
        source, target = x, grid
        for i, (tokens, first, classes) in enumerate(choice):
            source = source.narrow(LEAD + 2 * i, tokens.start, tokens.stop - tokens.start)
            source = source.unflatten(LEAD + 2 * i, (-1, classes))
            target = target.narrow(LEAD + i, 0, classes)
            target = target.narrow(LEAD + rank + i, first, source.shape[LEAD + 2 * i])
        yield source.permute(0, 1, *residues, *positions, source.dim() - 1), target


def to_grid(x: Tensor, grid: Tensor, axes: Sequence[Axis]) -> None:
    """Copy the map `(images, heads, *spatial, channels)` into its grid, class-major.

    A grid is `(images, heads, *classes, *positions, channels)` with whole tiles of positions;
    those beyond the map are left as they are.
    """
    for source, target in _blocks(x, grid, axes):
        target.copy_(source)


def from_grid(grid: Tensor, x: Tensor, axes: Sequence[Axis]) -> None:
    """Copy a grid into the map `(images, heads, *spatial, channels)`."""
    for target, source in _blocks(x, grid, axes):
        target.copy_(source)


def query_tiles(grid: Tensor, axes: Sequence[Axis], band: tuple[int, int]) -> Tensor:
    """View of a grid as `(images, heads, *classes, *tiles, *tile, channels)`.

    `band` is the first tile, and the one after the last, of the first axis.
    """
    rank = len(axes)
    place = LEAD + rank
    grid = grid.narrow(place, band[0] * axes[0].tile, (band[1] - band[0]) * axes[0].tile)
    for i, axis in enumerate(axes):
        grid = grid.unflatten(place + 2 * i, (-1, axis.tile))
    counts = [place + 2 * i for i in range(rank)]
    inner = [count + 1 for count in counts]
    return grid.permute(*range(place), *counts, *inner, grid.dim() - 1)


def gather_halos(grid: Tensor, out: Tensor, axes: Sequence[Axis], band: tuple[int, int]) -> None:
    """Copy the halos of a band into `out`, `(images, heads, *classes, *tiles, *halo, channels)`."""
    place = LEAD + len(axes)
    strides = grid.stride()
    outer, inner = strides[:place], strides[place:-1]
    limits = [band, *((0, axis.tiles) for axis in axes[1:])]
    for choice in itertools.product(*(a.runs(*limit) for a, limit in zip(axes, limits))):
        target, offset, steps, counts = out, grid.storage_offset(), [], []
        for i, (first, count, step) in enumerate(choice):
            target = target.narrow(place + i, first - limits[i][0], count)
            offset += axes[i].origins[first] * inner[i]
            steps.append(step * inner[i])
            counts.append(count)
        shape = (*grid.shape[:place], *counts, *(axis.halo for axis in axes), grid.shape[-1])
        target.copy_(grid.as_strided(shape, (*outer, *steps, *inner, strides[-1]), offset))


def add_halos(halos: Tensor, grid: Tensor, axes: Sequence[Axis], band: tuple[int, int]) -> None:
    """Add every halo of a band back to where `gather_halos` took it from, axis by axis."""
    rank = len(axes)
    for i, axis in enumerate(axes):
        place = LEAD + rank + i
        halos = halos.movedim(place + rank - i, place + 1)  # tiles and halo of this axis adjoin
        total = grid
        if i < rank - 1:
            shape = list(halos.shape)
            shape[place : place + 2] = [grid.shape[place]]
            total = grid.new_zeros(shape)
        first, last = band if i == 0 else (0, axis.tiles)
        for t in range(first, last):
            total.narrow(place, axis.origins[t], axis.halo).add_(halos.select(place, t - first))
        halos = total


class Additive:
    """The mask, and the bias where there is one, that is added to the scores of a band of tiles.

    Tiles that look alike share a pattern, so both are made once per pattern and then copied.
    """

    def __init__(self, axes: Sequence[Axis], bias: Tensor | None, like: Tensor) -> None:
        rank = len(axes)
        device = like.device
        self.axes = axes
        inside = torch.ones((), dtype=torch.bool, device=device)
        self.offsets: list[Tensor] = []  # per axis: index into the bias table
        for i, axis in enumerate(axes):
            seen = torch.tensor([pattern.seen for pattern in axis.patterns], device=device)
            shift = torch.tensor([pattern.shift for pattern in axis.patterns], device=device)
            key = torch.arange(axis.halo, device=device)
            query = torch.arange(axis.tile, device=device)
            shape = [1] * (3 * rank)
            shape[i::rank] = len(axis.patterns), axis.tile, axis.halo
            inside = inside & ((key >= seen[..., :1]) & (key < seen[..., 1:])).view(shape)
            if bias is not None:
                last = bias.shape[1 + i] - 1
                offset = shift[:, None, None] + key - query[:, None] + last // 2
                self.offsets.append(offset.clamp(0, last).view(shape))
        self.inside = inside.reshape(
            *(math.prod(inside.shape[i * rank : (i + 1) * rank]) for i in range(3))
        )
        base = like.new_zeros((1, *self.inside.shape))
        if bias is not None:
            base = bias[(slice(None), *self.offsets)].reshape(-1, *self.inside.shape)
        self.table = base.to(like.dtype).masked_fill(~self.inside, NEGATIVE)
        self.needed = bias is not None or not bool(self.inside.all())
        self._bands: dict[tuple[Any, ...], Tensor] = {}

    def which(self, band: tuple[int, int]) -> Tensor:
        """The pattern of every (class, tile) of a band, flattened."""
        rank = len(self.axes)
        index = torch.zeros((), dtype=torch.long)
        for i, axis in enumerate(self.axes):
            first, last = band if i == 0 else (0, axis.tiles)
            rows = torch.tensor([row[first:last] for row in axis.which])
            shape = [1] * (2 * rank)
            shape[i::rank] = rows.shape
            index = index * len(axis.patterns) + rows.view(shape)
        return index.flatten().to(self.table.device)

    def band(self, band: tuple[int, int]) -> Tensor:
        """`(num_heads or 1, classes and tiles, queries, keys)` of a band."""
        alike = tuple(row[slice(*band)] for row in self.axes[0].which)
        if alike not in self._bands:
            self._bands[alike] = self.table.index_select(1, self.which(band))
        return self._bands[alike]

    def grad_bias(self, grad: Tensor, bias: Tensor) -> Tensor:
        """The gradient of the bias from that of `table`, `(num_heads, patterns, queries, keys)`."""
        grad = grad.masked_fill(~self.inside, 0)
        shape = torch.broadcast_shapes(*(offset.shape for offset in self.offsets))
        heads = torch.arange(grad.shape[0], device=grad.device).view(-1, *[1] * len(shape))
        index = (heads, *(offset.expand(shape) for offset in self.offsets))
        return grad.new_zeros(bias.shape).index_put_(
            index, grad.view(-1, *shape), accumulate=True
        )


class Workspace:
    """Buffers that are made once and reused by every chunk, so that they stay in cache."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor; zeros at first, later whatever was left in it."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._like.new_zeros(size, dtype=dtype)
        return self._buffers[name][:size].view(shape)


# Scores of one chunk. On a CPU they should stay in the second-level cache; elsewhere few large
# launches are better.
CPU_CHUNK = 1 << 18
DEVICE_CHUNK = 1 << 26


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

    def __init__(self, query: Tensor, axes: Sequence[Axis]) -> None:
        self.axes = axes
        self.classes = tuple(axis.classes for axis in axes)
        self.positions = tuple(axis.tiles * axis.tile for axis in axes)
        self.tile = tuple(axis.tile for axis in axes)
        self.halo = tuple(axis.halo for axis in axes)
        limit = CPU_CHUNK if query.device.type == "cpu" else DEVICE_CHUNK
        row = math.prod(self.classes) * math.prod(axis.tiles for axis in axes[1:])
        row *= math.prod(self.tile) * math.prod(self.halo)
        count = axes[0].tiles
        step = min(count, max(1, limit // row))
        self.bands = [(first, min(first + step, count)) for first in range(0, count, step)]
        pairs = max(1, limit // (row * step))
        batch, num_heads = query.shape[0], query.shape[-2]
        heads = min(pairs, num_heads)
        images = max(1, pairs // num_heads)
        self.chunks = [
            Chunk(slice(b, min(b + images, batch)), slice(h, min(h + heads, num_heads)))
            for b in range(0, batch, images)
            for h in range(0, num_heads, heads)
        ]
        self.work = Workspace(query)

    def empty_grid(self, name: str, pairs: Sequence[int], channels: int, dtype: Any) -> Tensor:
        return self.work.take(name, (*pairs, *self.classes, *self.positions, channels), dtype)

    def grid(self, name: str, x: Tensor) -> Tensor:
        """The map `(images, heads, *spatial, channels)` as a grid."""
        grid = self.empty_grid(name, x.shape[:LEAD], x.shape[-1], x.dtype)
        to_grid(x, grid, self.axes)
        return grid

    def queries(self, name: str, grid: Tensor, band: tuple[int, int]) -> Tensor:
        """The query tiles of a band: `(pairs * classes * tiles, queries, channels)`."""
        view = query_tiles(grid, self.axes, band)
        tiles = self.work.take(name, view.shape, grid.dtype)
        tiles.copy_(view)
        return tiles.view(-1, math.prod(self.tile), grid.shape[-1])

    def keys(self, name: str, grid: Tensor, band: tuple[int, int]) -> Tensor:
        """The halos of a band: `(pairs * classes * tiles, keys, channels)`."""
        tiles = self.work.take(name, self._halo_shape(grid, band), grid.dtype)
        gather_halos(grid, tiles, self.axes, band)
        return tiles.view(-1, math.prod(self.halo), grid.shape[-1])

    def put_queries(self, tiles: Tensor, grid: Tensor, band: tuple[int, int]) -> None:
        view = query_tiles(grid, self.axes, band)
        view.copy_(tiles.view(view.shape))

    def add_keys(self, tiles: Tensor, grid: Tensor, band: tuple[int, int]) -> None:
        add_halos(tiles.view(self._halo_shape(grid, band)), grid, self.axes, band)

    def _halo_shape(self, grid: Tensor, band: tuple[int, int]) -> tuple[int, ...]:
        counts = (band[1] - band[0], *(axis.tiles for axis in self.axes[1:]))
        return (*grid.shape[: LEAD + len(self.axes)], *counts, *self.halo, grid.shape[-1])

    def weights(
        self, query: Tensor, key: Tensor, additive: Additive, chunk: Chunk, band: tuple[int, int]
    ) -> Tensor:
        """Softmax of the scores of tiles, in the buffer "weights"."""
        shape = (query.shape[0], query.shape[1], key.shape[1])
        scores = torch.bmm(
            query, key.transpose(1, 2), out=self.work.take("scores", shape, query.dtype)
        )
        if additive.needed:
            table = additive.band(band)
            if table.shape[0] > 1:
                table = table[chunk.heads]
            scores.view(*chunk.pairs, -1, *shape[1:]).add_(table)
        return torch.softmax(scores, -1, out=self.work.take("weights", shape, query.dtype))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    axes: Sequence[Axis],
    scale: float,
) -> Tensor:
    """Attention of every token to the keys that the axes' patterns show it.

    Args:
        query: `(B, *spatial, num_heads, head_dim)`.
        key: `(B, *spatial, num_heads_kv, head_dim)`.
        value: `(B, *spatial, num_heads_kv, value_dim)`.
        bias: `(num_heads, 2 * reach + 1, ...)` per axis, added at `key - query + reach`.
        axes: the tiles of every spatial axis.
        scale: factor on the scores.

    Returns:
        `(B, *spatial, num_heads, value_dim)`.
    """
    plan = Plan(query, axes)
    additive = Additive(axes, bias, query)
    group = query.shape[-2] // key.shape[-2]
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    for chunk in plan.chunks:
        query_grid = plan.grid("query grid", chunk.of(query)).mul_(scale)
        key_grid = plan.grid("key grid", chunk.of(key, group))
        value_grid = plan.grid("value grid", chunk.of(value, group))
        result = plan.empty_grid("output grid", chunk.pairs, value.shape[-1], query.dtype)
        for band in plan.bands:
            q = plan.queries("query", query_grid, band)
            k = plan.keys("key", key_grid, band)
            v = plan.keys("value", value_grid, band)
            weights = plan.weights(q, k, additive, chunk, band)
            shape = (*q.shape[:2], v.shape[2])
            tiles = torch.bmm(weights, v, out=plan.work.take("output", shape, query.dtype))
            plan.put_queries(tiles, result, band)
        from_grid(result, chunk.of(output), axes)
    return output


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    axes: Sequence[Axis],
    scale: float,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (empty where it needs none) of `attend`.

    The weights are computed again, so that nothing larger than a chunk is ever stored. Sums over
    tiles are kept in float32 at least.
    """
    plan = Plan(query, axes)
    additive = Additive(axes, bias, query)
    work, dtype = plan.work, query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    group = query.shape[-2] // key.shape[-2]
    grad_query = query.new_empty(query.shape)
    heads = query.shape[-2:-1]
    grad_key = key.new_empty(*key.shape[:-2], *heads, key.shape[-1])
    grad_value = value.new_empty(*value.shape[:-2], *heads, value.shape[-1])
    if bias_needs_grad:
        grad_table = additive.table.new_zeros(additive.table.shape, dtype=wide)
    for chunk in plan.chunks:
        query_grid = plan.grid("query grid", chunk.of(query)).mul_(scale)
        key_grid = plan.grid("key grid", chunk.of(key, group))
        value_grid = plan.grid("value grid", chunk.of(value, group))
        # Beyond the map it must be zero, or queries that do not exist would send gradients.
        grad_grid = plan.grid("grad grid", chunk.of(grad))
        query_total = plan.empty_grid("query total", chunk.pairs, query.shape[-1], dtype)
        key_total = plan.empty_grid("key total", chunk.pairs, key.shape[-1], wide).zero_()
        value_total = plan.empty_grid("value total", chunk.pairs, value.shape[-1], wide).zero_()
        for band in plan.bands:
            q = plan.queries("query", query_grid, band)
            k = plan.keys("key", key_grid, band)
            v = plan.keys("value", value_grid, band)
            g = plan.queries("grad", grad_grid, band)
            weights = plan.weights(q, k, additive, chunk, band)
            halo = torch.bmm(weights.transpose(1, 2), g, out=work.take("grad halo", v.shape, dtype))
            plan.add_keys(halo, value_total, band)
            grad_weights = torch.bmm(
                g, v.transpose(1, 2), out=work.take("scores", weights.shape, dtype)
            )
            grad_scores = torch._softmax_backward_data(
                grad_weights,
                weights,
                -1,
                dtype,
                grad_input=work.take("grad scores", weights.shape, dtype),
            )
            halo = torch.bmm(
                grad_scores.transpose(1, 2), q, out=work.take("grad halo", k.shape, dtype)
            )
            plan.add_keys(halo, key_total, band)
            tiles = torch.bmm(grad_scores, k, out=work.take("output", q.shape, dtype))
            plan.put_queries(tiles, query_total, band)
            if bias_needs_grad:
                grad_scores = grad_scores.view(*chunk.pairs, -1, *weights.shape[1:])
                grad_table[chunk.heads].index_add_(
                    1, additive.which(band), grad_scores.sum(0, dtype=wide)
                )
        from_grid(query_total.mul_(scale), chunk.of(grad_query), axes)
        from_grid(key_total, chunk.of(grad_key), axes)
        from_grid(value_total, chunk.of(grad_value), axes)
    if group > 1:
        grad_key = grad_key.unflatten(-2, (-1, group)).sum(-2)
        grad_value = grad_value.unflatten(-2, (-1, group)).sum(-2)
    if bias_needs_grad:
        grad_bias = additive.grad_bias(grad_table, bias).to(bias.dtype)
    else:
        grad_bias = query.new_empty(0)
    return grad_query, grad_key, grad_value, grad_bias
