"""How much of a tiled attention kernel's work a window leaves it: a count, no measurement.

After the analysis of Generalized Neighborhood Attention (arXiv 2504.16922, section 3.3). A kernel
computes scores tile by tile: all queries of a query tile against all keys of a key tile. It can
skip key tiles that no query of the tile sees, but not parts of one. So the number of key tiles it
visits, not the number of pairs in the windows, bounds its speed-up over dense attention. Counts are
per head of one image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vitarium.ops import dispatch
from vitarium.ops.kernels.tiles import shapes, tiles
from vitarium.ops.windows import Window, pairs_seen, walk


@dataclass(frozen=True)
class Simulation:
    """The tiles of one kernel on one map.

    Attributes:
        query_tile, key_tile: shapes, an entry per spatial dimension.
        visited: pairs of a query tile and a key tile whose scores are computed.
        perfect: such pairs if every computed score were wanted (a fraction).
        dense: such pairs in attention of every token to every token.
    """

    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    visited: int
    perfect: float
    dense: int

    @property
    def waste(self) -> float:
        """Scores computed for each score that is wanted."""
        return self.visited / self.perfect

    @property
    def speedup_bound(self) -> float:
        """At most this many times faster than dense attention with the same tiles."""
        return self.dense / self.visited

    @property
    def perfect_speedup(self) -> float:
        """The same if no score were wasted."""
        return self.dense / self.perfect


def simulate(
    spatial: Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    query_tile: Sequence[int] | None = None,
    key_tile: Sequence[int] | None = None,
    head_dim: int = 32,
) -> Simulation:
    """Count the tiles that our kernel's forward visits.

    A query tile is a patch of one residue class; its walk over keys begins at the first key that
    any of its queries sees and ends with the last.

    Args:
        spatial: size of the map, 1 to 3 entries.
        kernel_size, stride, dilation, is_causal: as in `neighborhood_attention`.
        query_tile, key_tile: shapes of the tiles; those of the kernel's table if None.
        head_dim: for which the table is asked.

    Raises:
        ValueError: sizes do not fit each other.
        TypeError: a size is no integer.
    """
    windows = _windows(spatial, kernel_size, stride, dilation, is_causal)
    rank = len(windows)
    table = tiles(rank, head_dim, windows, lengths=tuple(spatial))
    query_tile = dispatch.per_dimension("simulate", "query_tile", query_tile or table.query, rank)
    key_tile = dispatch.per_dimension("simulate", "key_tile", key_tile or table.key, rank)
    visited = dense = 1
    for length, window, queries, keys in zip(spatial, windows, query_tile, key_tile):
        visited *= walk(length, window, queries, keys)
        dense *= -(-length // queries) * -(-length // keys)
    area = math.prod(query_tile) * math.prod(key_tile)
    return Simulation(
        query_tile, key_tile, visited, pairs_seen(tuple(spatial), windows) / area, dense
    )


def rank_tiles(
    spatial: Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    queries: int = 64,
    keys: int = 32,
    **pattern: int | Sequence[int] | bool | Sequence[bool],
) -> list[Simulation]:
    """Every shape of a query tile of `queries` and a key tile of `keys` tokens, least waste first.

    Raises:
        ValueError: `queries` or `keys` is no power of two, or the pattern does not fit the map.
    """
    for name, tokens in (("queries", queries), ("keys", keys)):
        if tokens < 1 or tokens & (tokens - 1):
            raise ValueError(f"rank_tiles: {name}={tokens} must be a power of two")
    rank = len(spatial)
    found = [
        simulate(spatial, kernel_size, query_tile=query, key_tile=key, **pattern)
        for query in shapes(queries, rank)
        for key in shapes(keys, rank)
    ]
    return sorted(found, key=lambda simulation: simulation.waste)


def _windows(
    spatial: Sequence[int], kernel_size: object, stride: object, dilation: object, causal: object
) -> tuple[Window, ...]:
    rank = len(spatial)
    if rank not in (1, 2, 3):
        raise ValueError(f"simulate: spatial={tuple(spatial)} must have 1 to 3 entries")
    dispatch.per_dimension("simulate", "spatial", tuple(spatial), rank)
    windows = tuple(
        Window(*entries)
        for entries in zip(
            dispatch.per_dimension("simulate", "kernel_size", kernel_size, rank),
            dispatch.per_dimension("simulate", "stride", stride, rank),
            dispatch.per_dimension("simulate", "dilation", dilation, rank),
            dispatch.per_dimension("simulate", "is_causal", causal, rank, bool),
        )
    )
    for length, window in zip(spatial, windows):
        window.check("simulate", length)
    return windows
