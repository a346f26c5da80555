"""The tile counts, against a walk over the definition's mask."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vitarium.ops.simulator import rank_tiles, simulate
from vitarium.ops.windows import Window, axis_pattern

CASES = [
    ((20,), (Window(5, 1, 2, False),), (4,), (3,)),
    ((13, 17), (Window(3, 2, 2, False), Window(7, 1, 1, True)), (4, 3), (2, 5)),
    ((16, 16), (Window(4, 4, 1, False),) * 2, (4, 4), (4, 4)),
    ((5, 6, 8), (Window(2, 1, 1, True), Window(3, 3, 2, False), Window(4, 2, 1, False)),
     (2, 2, 4), (1, 2, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("spatial", "windows", "query_tile", "key_tile"), CASES)
def test_counts(
    spatial: tuple[int, ...],
    windows: tuple[Window, ...],
    query_tile: tuple[int, ...],
    key_tile: tuple[int, ...],
) -> None:
    visited, pairs = 1, 1
    for length, window, queries, keys in zip(spatial, windows, query_tile, key_tile):
        seen = axis_pattern(length, window, torch.device("cpu"))[0]
        pairs *= int(seen.sum())
        count = 0
        for group in range(window.dilation):
            row = seen[group :: window.dilation, group :: window.dilation]
            for tile in row.split(queries):
                columns = tile.any(0).nonzero().flatten()
                count += math.ceil((int(columns[-1]) - int(columns[0]) + 1) / keys)
        visited *= count
    kernel_size, stride, dilation, is_causal = zip(*windows)
    found = simulate(
        spatial,
        kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        query_tile=query_tile,
        key_tile=key_tile,
    )
    assert found.visited == visited
    area = math.prod(query_tile) * math.prod(key_tile)
    assert found.perfect == pytest.approx(pairs / area)
    assert found.waste == pytest.approx(visited * area / pairs)
    tiles = (math.ceil(n / t) for t in (query_tile, key_tile) for n, t in zip(spatial, t))
    assert found.dense == math.prod(tiles)
    assert found.waste >= 1 and found.speedup_bound <= found.perfect_speedup


def test_blocked_windows_waste_nothing() -> None:
    """Windows that are blocks, in tiles that divide them: every score computed is wanted."""
    found = simulate((32, 32), 8, stride=8, query_tile=(8, 8), key_tile=(4, 8))
    assert found.waste == 1
    assert found.speedup_bound == found.perfect_speedup == 16


def test_ranking() -> None:
    found = rank_tiles((56, 56), 7, queries=32, keys=32)
    assert [s.waste for s in found] == sorted(s.waste for s in found)
    assert {s.query_tile for s in found} == {(1, 32), (2, 16), (4, 8), (8, 4), (16, 2), (32, 1)}
    for simulation in found:
        assert math.prod(simulation.query_tile) == math.prod(simulation.key_tile) == 32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"spatial": (8, 8, 8, 8)}, ValueError, "must have 1 to 3 entries"),
        ({"spatial": (8, 0)}, ValueError, "must be at least 1"),
        ({"kernel_size": 9}, ValueError, "kernel_size=9 exceeds the feature map 8"),
        ({"stride": 4}, ValueError, "stride=4 exceeds kernel_size=3"),
        ({"query_tile": (4,)}, ValueError, "query_tile=.* has 1 entries"),
        ({"key_tile": (4, "8")}, TypeError, "key_tile=.* must hold int, got str"),
    ],
)
def test_wrong_calls(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        simulate(**{"spatial": (8, 8), "kernel_size": 3, **arguments})
    for count in (0, 48):
        with pytest.raises(ValueError, match=f"queries={count} must be a power of two"):
            rank_tiles((8, 8), 3, queries=count)


def test_shapes_have_the_tokens_asked_for() -> None:
    for rank, tokens in itertools.product((1, 2, 3), (1, 8, 64)):
        shapes = {s.query_tile for s in rank_tiles((9,) * rank, 3, queries=tokens, keys=1)}
        assert shapes
        assert all(len(shape) == rank and math.prod(shape) == tokens for shape in shapes)


@pytest.mark.parametrize(
    ("side", "dilation"), [(56, 1), (56, 8), (28, 1), (28, 4), (14, 1), (14, 2), (7, 1)]
)
def test_kernel_tiles_waste_little(side: int, dilation: int) -> None:
    """On every layer of DiNAT the kernel's tiles are close to the best of their size."""
    chosen = simulate((side, side), 7, dilation=dilation)
    queries, keys = math.prod(chosen.query_tile), math.prod(chosen.key_tile)
    best = rank_tiles((side, side), 7, dilation=dilation, queries=queries, keys=keys)[0]
    assert chosen.waste <= 1.3 * best.waste
