"""How the tiles of a chunk get from maps into matrices, and results back into maps.

Where the heads of a token lie side by side, as in the views of one projection, tokens are moved as
wholes and parted in the cache: a processor foresees reads that follow the order of memory, and
those of one head do not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitarium.ops.plan import Chunk, Plan
from vitarium.ops.tiles import tile_view

Band = tuple[int, int]


def joint(*maps: Tensor) -> Tensor | None:
    """Maps that lie side by side as one `(B, *spatial, 1, maps * heads * channels)`, or None."""
    first = maps[0]
    heads, channels = first.shape[-2:]
    start, strides = first.data_ptr(), first.stride()
    step = heads * channels * first.element_size()
    for number, x in enumerate(maps):
        alike = x.shape == first.shape and x.stride() == strides
        if not alike or x.data_ptr() != start + number * step:
            return None
    if heads < 2 or strides[-2:] != (channels, 1) or not first.numel():
        return None
    shape = (*first.shape[:-2], 1, len(maps) * heads * channels)
    return first.as_strided(shape, (*strides[:-2], 0, 1))


class Reader:
    """Tiles of query, key and value (numbers 0 to 2) of a chunk."""

    def __init__(self, plan: Plan, chunk: Chunk, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.plan = plan
        self.heads = query.shape[-2]
        tokens = None
        if not plan.overlaps and chunk.pairs[1] == self.heads:
            tokens = joint(query, key, value)
        if tokens is None:
            group = self.heads // key.shape[-2]
            self.tokens = None
            self.grids = (
                plan.queries_of("query grid", chunk.of(query)),
                plan.keys_of("key grid", chunk.of(key, group)),
                plan.keys_of("value grid", chunk.of(value, group)),
            )
        else:
            self.tokens = plan.queries_of("token grid", chunk.tokens_of(tokens))

    def load(self, band: Band) -> None:
        """Turn to a band."""
        self.band = band
        if self.tokens is not None:
            view = tile_view(self.tokens, self.plan.axes, band, self.plan.tile)
            if self.plan.plain[False]:  # else it is in the cache
                view = self.plan.work.take("tokens", view.shape, view.dtype).copy_(view)
            # (images, heads, ..., query or key or value, channels)
            self.parts = view[:, 0].unflatten(-1, (3, self.heads, -1)).movedim(-2, 1)

    def tiles(self, number: int, name: str) -> Tensor:
        """`(pairs * classes * tiles, queries or keys, channels)`, maybe in the buffer `name`."""
        if self.tokens is not None:
            part = self.parts.select(-2, number)
            found = self.plan.work.take(name, part.shape, part.dtype).copy_(part)
            return found.view(-1, math.prod(self.plan.tile), part.shape[-1])
        if number == 0:
            return self.plan.queries(name, self.grids[0], self.band)
        return self.plan.keys(name, self.grids[number], self.band)


class Writer:
    """Where tiles of results of a chunk go: into the map `x`, or to be summed up for it."""

    def __init__(
        self, plan: Plan, chunk: Chunk, name: str, x: Tensor, *, keys: bool = False
    ) -> None:
        self.plan = plan
        self.keys = keys
        self.heads = x.shape[-2]
        whole = chunk.pairs[1] == self.heads and not (keys and plan.overlaps)
        tokens = joint(x) if whole else None
        self.staged = tokens is not None
        if tokens is not None:
            self.map = chunk.tokens_of(tokens)
            self.grid = plan.results_of(f"{name} tokens", self.map)
        else:
            self.map = chunk.of(x)
            make = plan.sums_of if keys else plan.results_of
            self.grid = make(f"{name} grid", self.map)

    def matrix(self, name: str, shape: tuple[int, ...], band: Band) -> Tensor:
        """Where to write tiles before they are `put`."""
        if self.staged or self.keys:
            return self.plan.work.take(name, shape, self.map.dtype)
        return self.plan.results(name, self.grid, band)

    def put(self, tiles: Tensor, band: Band, sums: Tensor | None = None) -> None:
        """Write or add the tiles of a band, divided by `sums`."""
        if not self.staged:
            if self.keys:
                self.plan.add_keys(tiles, self.grid, band)
            else:
                self.plan.put_queries(tiles, self.grid, band, sums)
            return
        view = tile_view(self.grid, self.plan.axes, band, self.plan.tile)
        plain = self.plan.plain[False]
        tokens = self.plan.work.take("results", view.shape, view.dtype) if plain else view
        target = tokens[:, 0].unflatten(-1, (self.heads, -1)).movedim(-2, 1)
        tiles = tiles.view(target.shape)
        if sums is None:
            target.copy_(tiles)
        else:
            torch.div(tiles, sums.view(*target.shape[:-1], 1), out=target)
        if plain:
            view.copy_(tokens)

    def finish(self) -> None:
        """Copy what is not in the map yet."""
        self.plan.finish(self.grid, self.map, keys=self.keys and not self.staged)
