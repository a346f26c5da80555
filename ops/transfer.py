"""How the tiles of a chunk get from maps into matrices.

Where the heads of a token lie side by side, as in the views of one projection, tokens are moved as
wholes and parted in the cache: a processor foresees reads that follow the order of memory, and
those of one head do not.
"""

from __future__ import annotations

import math

from torch import Tensor

from vitarium.ops.packed import joint
from vitarium.ops.plan import Chunk, Plan
from vitarium.ops.tiles import tile_view

Band = tuple[int, int]


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
