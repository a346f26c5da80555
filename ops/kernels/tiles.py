"""Launch parameters of the kernels of local attention; asking for them needs no Triton.

A tile is a patch of the map, so that the union of its queries' windows stays small. Its number of
tokens is chosen by kernel, head_dim and element size; the shape of the tile that is walked over by
counting, for the map at hand, how many of either shape must be visited. The sizes are
read off ahead-of-time compilation (`vitarium bench kernels`): no register spills and shared memory
within the limit on compute capability 8.0, 9.0 and 10.0.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vitarium.ops.windows import Block, Pattern, Window, walk

KERNELS = ("forward", "query", "key_value", "bias")

# Number of tokens -> shape of the tile, by number of spatial dimensions.
_SQUARE = {
    1: {16: (16,), 32: (32,), 64: (64,)},
    2: {16: (4, 4), 32: (4, 8), 64: (8, 8)},
    3: {16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4)},
}
# Walked along rows, a long tile covers the ragged union of windows with fewer tokens.
_LONG = {**_SQUARE, 2: {16: (1, 16), 32: (2, 16), 64: (4, 16)}}

# (kernel, element size) -> by padded head_dim: queries, keys, num_warps, num_stages and, where the
# assembler would else spill a few registers for one more block per multiprocessor, max_registers.
_SIZES: dict[tuple[str, int], dict[int, tuple[int, ...]]] = {
    ("forward", 2): {
        32: (32, 32, 1, 2),
        64: (64, 32, 4, 2, 192),
        128: (64, 32, 4, 2),
        256: (64, 32, 8, 2),
    },
    ("forward", 4): {
        32: (32, 32, 4, 2),
        64: (32, 32, 4, 1, 255),
        128: (32, 16, 8, 1, 255),
        256: (32, 16, 8, 1),
    },
    ("query", 2): {
        32: (64, 32, 4, 2),
        64: (64, 32, 4, 2),
        128: (64, 32, 8, 2),
        256: (32, 32, 8, 2, 255),
    },
    ("query", 4): {
        32: (32, 16, 4, 2, 255),
        64: (16, 32, 4, 2),
        128: (16, 32, 8, 2, 128),
        256: (16, 16, 8, 2, 255),
    },
    ("key_value", 2): {
        32: (32, 64, 4, 2),
        64: (32, 64, 4, 2),
        128: (32, 64, 8, 2, 255),
        256: (32, 32, 8, 1),
    },
    ("key_value", 4): {
        32: (32, 16, 4, 2),
        64: (32, 32, 8, 2, 255),
        128: (16, 16, 8, 1, 255),
        256: (16, 16, 8, 1),
    },
    ("bias", 2): {
        32: (64, 64, 8, 2),
        64: (64, 64, 8, 2),
        128: (32, 32, 4, 1),
        256: (32, 32, 8, 2, 255),
    },
    ("bias", 4): {
        32: (32, 32, 4, 1, 255),
        64: (32, 32, 4, 1, 255),
        128: (32, 32, 8, 1, 255),
        256: (16, 16, 8, 1),
    },
}
# What window attention has otherwise: tiles of queries that hold a window of 8, and no spills.
_BLOCK_SIZES: dict[tuple[str, int], dict[int, tuple[int, ...]]] = {
    ("forward", 2): {32: (64, 32, 4, 2, 128), 64: (64, 32, 4, 2, 255)},
    ("query", 2): {256: (32, 32, 8, 1, 255)},
    ("key_value", 2): {32: (32, 64, 4, 1), 64: (32, 64, 8, 2)},
    ("key_value", 4): {32: (32, 16, 4, 2, 255), 64: (32, 32, 8, 1), 256: (16, 16, 8, 1, 255)},
    ("bias", 2): {64: (64, 64, 8, 1, 255), 128: (32, 32, 4, 1, 255), 256: (16, 16, 4, 1, 255)},
    ("bias", 4): {256: (16, 16, 4, 1, 255)},
}
HEAD_DIMS = (32, 64, 128, 256)  # padded: the rows of the table


@dataclass(frozen=True)
class TileConfig:
    """Shapes of the query and key tiles, an entry per spatial dimension, and launch options."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread

    @property
    def options(self) -> dict[str, int | None]:
        """Options of the launch."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "max_registers": self.max_registers,
        }


def tiles(
    rank: int,
    head_dim: int,
    windows: Sequence[Pattern],
    *,
    kernel: str = "forward",
    element_size: int = 2,
    lengths: Sequence[int] | None = None,
) -> TileConfig:
    """The launch parameters of one kernel.

    Args:
        rank: number of spatial dimensions, 1 to 3.
        head_dim: the larger of the widths of query and value heads, 1 to 256.
        windows: the pattern of every spatial dimension.
        kernel: one of `KERNELS`.
        element_size: bytes of an element of query, 2 or 4.
        lengths: the map's size; None means large.
    """
    sizes, blocks = _SIZES[kernel, element_size], isinstance(windows[0], Block)
    if blocks:
        sizes = {**sizes, **_BLOCK_SIZES.get((kernel, element_size), {})}
    queries, keys, *options = sizes[min(d for d in HEAD_DIMS if d >= head_dim)]
    if blocks:
        return TileConfig(*_block_shapes(queries, keys, tuple(windows)), *options)
    fixed, walked = (keys, queries) if kernel == "key_value" else (queries, keys)
    shapes = _SQUARE
    if kernel != "bias":
        shapes = _walked_shapes(rank, fixed, walked, tuple(windows), lengths and tuple(lengths))
    if kernel == "key_value":
        return TileConfig(shapes[rank][queries], _SQUARE[rank][keys], *options)
    return TileConfig(_SQUARE[rank][queries], shapes[rank][keys], *options)


@functools.lru_cache(maxsize=1024)
def _walked_shapes(
    rank: int,
    fixed: int,
    walked: int,
    windows: tuple[Window, ...],
    lengths: tuple[int, ...] | None,
) -> dict[int, dict[int, tuple[int, ...]]]:
    """The table of shapes of which fewer tiles are visited; the long ones on large maps."""

    def visited(shapes: dict[int, dict[int, tuple[int, ...]]]) -> int:
        tiles_ = zip(lengths or (), windows, _SQUARE[rank][fixed], shapes[rank][walked])
        return math.prod(walk(*axis) for axis in tiles_)

    return min((_LONG, _SQUARE), key=visited)


def cell(window: Block, tile: int) -> int:
    """Positions of whole windows that are cut into tiles together."""
    return max(window.window_size, tile // window.window_size * window.window_size)


def shapes(tokens: int, rank: int) -> Iterator[tuple[int, ...]]:
    """Shapes of `tokens` tokens with powers of two as sides."""
    if rank == 1:
        yield (tokens,)
        return
    side = 1
    while side <= tokens:
        for rest in shapes(tokens // side, rank - 1):
            yield (side, *rest)
        side *= 2


@functools.lru_cache(maxsize=1024)
def _block_shapes(
    queries: int, keys: int, windows: tuple[Block, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of query and key tiles that visit the fewest pairs of tiles per query.

    Among equals the one with the longest rows, as neighbors in a row are neighbors in memory.
    """

    def visited(query: tuple[int, ...], key: tuple[int, ...]) -> float:
        pairs = 1.0
        for window, q_size, k_size in zip(windows, query, key):
            span = cell(window, q_size)
            seen = max(window.window_size, min(span, q_size)) + 2 * window.halo
            pairs *= -(-span // q_size) / span * -(-seen // k_size)
        return pairs

    rank = len(windows)
    pairs = itertools.product(shapes(queries, rank), shapes(keys, rank))
    return min(pairs, key=lambda pair: (visited(*pair), [-side for side in reversed(pair[0])]))
