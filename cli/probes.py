"""`vitarium probes`: mixers trained on drawn tasks that tell what they see."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace
from rich import box
from rich.console import Console
from rich.table import Table

from vitarium.cli.testbed import add_arguments, recipe_of
from vitarium.train import Interrupted


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Train mixers, one block of each, on small drawn tasks that tell them apart by "
        "what they see, and draw accuracies with confidence intervals as a heat map. What is "
        "recorded in the output is not done again: the same command goes on where it ended.",
    )
    add_arguments(parser, recipe="probe", output="runs/probes")
    parser.add_argument(
        "--probes", metavar="PROBE", type=str, nargs="+", default=[],
        help="of texture, pair, counting and path; all, if not given",
    )  # fmt: skip
    return parser


def run(config: Namespace) -> int:
    from vitarium.benchmarks.probes import bench_probes
    from vitarium.benchmarks.probes_views import cell

    console = Console()
    try:
        seen, _ = bench_probes(
            config.names,
            probes=config.probes,
            seeds=config.seeds,
            jobs=config.jobs,
            recipe=recipe_of(config),
            output=config.output,
            progress=lambda line: console.print(line, style="dim", highlight=False, markup=False),
        )
    except Interrupted as interruption:
        return 128 + interruption.signum
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("mixer", *seen[0].probes):
        table.add_column(heading, overflow="fold")
    for s in seen:
        table.add_row(s.mixer, *(cell(row) for row in s.probes.values()))
    console.print(table)
    console.print(f"written to {config.output}", highlight=False, soft_wrap=True)
    return 1 if any(row.failures for s in seen for row in s.probes.values()) else 0
