"""`vitarium simulate`: what a tiled kernel can gain from a window, by counting."""

from __future__ import annotations

import math

from jsonargparse import ArgumentParser, Namespace
from rich import box
from rich.console import Console
from rich.table import Table

from vitarium.ops.simulator import Simulation, rank_tiles, simulate


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Count the key tiles that a neighborhood attention kernel must visit, and "
        "bound its speed-up over dense attention."
    )
    parser.add_argument("map", type=int, nargs="+", help="size of the map, such as 56 56")
    parser.add_argument("--kernel-size", type=int, nargs="+", required=True)
    parser.add_argument("--stride", type=int, nargs="+", default=[1])
    parser.add_argument("--dilation", type=int, nargs="+", default=[1])
    parser.add_argument("--is-causal", type=bool, nargs="+", default=[False])
    parser.add_argument("--query-tile", type=int, nargs="+", help="default: the kernel's own")
    parser.add_argument("--key-tile", type=int, nargs="+", help="default: the kernel's own")
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--best", type=int, default=5, help="how many of the best shapes to show")
    return parser


def run(config: Namespace) -> None:
    pattern = {
        name: _spread(getattr(config, name), len(config.map))
        for name in ("kernel_size", "stride", "dilation", "is_causal")
    }
    chosen = simulate(
        config.map,
        **pattern,
        query_tile=config.query_tile,
        key_tile=config.key_tile,
        head_dim=config.head_dim,
    )
    queries, keys = _tokens(chosen.query_tile), _tokens(chosen.key_tile)
    table = Table(
        "query tile", "key tile", "visited", "perfect", "waste", "speed-up at most",
        "perfect speed-up", box=box.SIMPLE_HEAD,
        title=f"{' x '.join(map(str, config.map))}: counts per head of one image",
    )  # fmt: skip
    _add(table, chosen, style="bold")
    if queries & (queries - 1) == keys & (keys - 1) == 0:
        table.add_section()
        for simulation in rank_tiles(config.map, **pattern, queries=queries, keys=keys)[
            : config.best
        ]:
            _add(table, simulation)
    Console().print(table)


def _spread(values: list, rank: int) -> list:
    return values * rank if len(values) == 1 else values


def _tokens(tile: tuple[int, ...]) -> int:
    return math.prod(tile)


def _add(table: Table, simulation: Simulation, style: str | None = None) -> None:
    table.add_row(
        "x".join(map(str, simulation.query_tile)),
        "x".join(map(str, simulation.key_tile)),
        f"{simulation.visited:,}",
        f"{simulation.perfect:,.1f}",
        f"{simulation.waste:.2f}",
        f"{simulation.speedup_bound:.2f}",
        f"{simulation.perfect_speedup:.2f}",
        style=style,
    )
