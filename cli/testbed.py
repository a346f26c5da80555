"""`vitarium testbed`: every mixer in one macro design, trained with one recipe and compared."""

from __future__ import annotations

from argparse import ArgumentError

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from rich import box
from rich.console import Console
from rich.table import Table

from vitarium.train import ConfigError, Interrupted, TrainConfig
from vitarium.train.config import find_recipe


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Train mixers in one macro design with one recipe and several seeds, measure "
        "them, and draw accuracy over operations, latency and memory. What is recorded in the "
        "output is not done again: the same command goes on where it ended.",
    )
    add_arguments(parser, recipe="testbed", output="runs/testbed")
    parser.add_argument(
        "--seconds", type=NonNegativeFloat, default=2.0, help="of measuring, per mixer"
    )
    return parser


def add_arguments(parser: ArgumentParser, recipe: str, output: str) -> None:
    """Arguments of commands that train mixers with one recipe."""
    parser.add_argument("names", metavar="MIXER", type=str, nargs="*", help="all, if none")
    parser.add_argument("--seeds", type=PositiveInt, default=3, help="trainings of each mixer")
    parser.add_argument("--jobs", type=PositiveInt, default=1, help="processes of one thread each")
    parser.add_argument(
        "--config", metavar="RECIPE", type=str, default=recipe, help="recipe by name, or a file"
    )
    parser.add_argument(
        "--epochs", type=PositiveInt | None, default=None, help="the recipe's, if not given"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", type=str, default=output,
        help="of records, table and picture",
    )  # fmt: skip


def recipe_of(config: Namespace) -> TrainConfig:
    """What is trained, as `add_arguments` has it.

    Raises:
        ArgumentError: there is no such recipe, or it is wrong.
    """
    try:
        recipe = TrainConfig.from_yaml(*find_recipe(config.config))
        return recipe if config.epochs is None else recipe.with_epochs(int(config.epochs))
    except ConfigError as error:
        raise ArgumentError(None, str(error)) from None


def run(config: Namespace) -> int:
    from vitarium.benchmarks.testbed import bench_testbed

    console = Console()
    recipe = recipe_of(config)
    try:
        rows = bench_testbed(
            config.names,
            seeds=config.seeds,
            jobs=config.jobs,
            recipe=recipe,
            seconds=config.seconds,
            output=config.output,
            progress=lambda line: console.print(line, style="dim", highlight=False, markup=False),
        )
    except Interrupted as interruption:
        return 128 + interruption.signum
    console.print(_table(rows))
    console.print(f"written to {config.output}", highlight=False, soft_wrap=True)
    return 1 if any(row.failures for row in rows) else 0


def _table(rows: list) -> Table:
    from vitarium.benchmarks.testbed_views import COLUMNS, cells

    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in COLUMNS[:-1]:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*cells(row)[:-1])
    return table
