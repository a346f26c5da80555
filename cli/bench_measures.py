"""`vitarium bench compare`, `flops`, `loader`.

Also which models a measurement is of, as options that several words of `bench` share.
"""

from __future__ import annotations

from argparse import ArgumentError
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt
from rich.console import Console

if TYPE_CHECKING:
    from vitarium.benchmarks.compare import Comparison

# --- which models --------------------------------------------------------------------------------


def add_selection(parser: ArgumentParser) -> None:
    """Names, `--family` and `--all-smallest`."""
    parser.add_argument("names", metavar="MODEL", type=str, nargs="*", help="registered names")
    parser.add_argument(
        "--family", type=str | None, default=None, help="all variants of a family of ours"
    )
    parser.add_argument(
        "--all-smallest", action="store_true", help="the smallest variant of every family of ours"
    )


def with_selected(config: Namespace) -> dict[str, Any]:
    """The options, with the models that they select as `names`.

    Raises:
        ArgumentError: they select none.
    """
    from vitarium.benchmarks.selection import chosen_models

    arguments = dict(vars(config))
    selected = {name: arguments.pop(name) for name in ("names", "family", "all_smallest")}
    if not any(selected.values()):
        raise ArgumentError(None, "required: a MODEL, --family NAME or --all-smallest")
    return {"names": chosen_models(**selected), **arguments}


# --- counters ------------------------------------------------------------------------------------


def _flops_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Multiply-adds and activations of models by three counters: ours, torch's "
        "and fvcore's. Nothing is timed; the exit status is 1 if they differ."
    )
    add_selection(parser)
    parser.add_argument("--all", action="store_true", help="every model of ours")
    parser.add_argument(
        "--image-size", type=PositiveInt, default=None, help="side of the images, pixels"
    )
    return parser


def _run_flops(config: Namespace) -> int:
    from vitarium import zoo
    from vitarium.benchmarks.counters import bench_flops, counters_table

    console = Console()
    if config.pop("all"):
        config.names = [*config.names, *zoo.list_models()]
    counted = bench_flops(
        **with_selected(config),
        progress=lambda line: console.print(line, style="dim", highlight=False),
    )
    console.print(counters_table(counted))
    return 0 if all(row.equal for row in counted) else 1


# --- comparison ----------------------------------------------------------------------------------


def _compare_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Is B faster than A? Two files of records: every setting that both have. Or "
        "two models: measured in turns in this process; the options are of these."
    )
    parser.add_argument("a", metavar="A", type=str, help="JSON Lines file of records, or a model")
    parser.add_argument("b", metavar="B", type=str, help="the same")
    parser.add_argument(
        "--mode",
        type=Literal["forward", "training", "step"],
        default="forward",
        help="training is forward and backward, step an AdamW step too",
    )
    parser.add_argument("--batch-size", type=PositiveInt, default=1, help="images per call")
    parser.add_argument(
        "--image-size", type=PositiveInt, default=None, help="side of the images, pixels"
    )
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16", "float16"],
        default="float32",
        help="of weights and input",
    )
    parser.add_argument("--device", type=str | None, default=None, help="cpu or cuda")
    parser.add_argument("--threads", type=PositiveInt, default=1, help="of torch, on the CPU")
    parser.add_argument("--seconds", type=NonNegativeFloat, default=10.0, help="per model")
    return parser


def _run_compare(config: Namespace) -> int:
    from vitarium.benchmarks import compare, record
    from vitarium.benchmarks.report import comparison_table

    arguments = dict(vars(config))
    a, b = arguments.pop("a"), arguments.pop("b")
    if any(name.endswith(".jsonl") or Path(name).is_file() for name in (a, b)):
        found = compare.compare(record.read(a), record.read(b))
        if not found.pairs:
            raise ValueError(f"{a} and {b} have no setting in common")
    else:
        found = _compared_models(a, b, arguments)
    Console().print(comparison_table(found))
    return 1 if any(pair.ratio is None for pair in found.pairs) else 0


def _compared_models(a: str, b: str, arguments: dict[str, Any]) -> Comparison:
    """Both measured in turns.

    Raises:
        ValueError: one is not registered, or they are the same.
    """
    from vitarium.benchmarks import bench_models, compare

    if a == b:
        raise ValueError(f"A and B are both {a!r}: two models are compared")
    first, second = bench_models([a, b], modes=[arguments.pop("mode")], **arguments)
    for r in (first, second):
        if r.failure is not None:
            print(f"{r.name} failed: {r.failure}")
    return compare.Comparison([compare.pair(first, second)], [], [])


# --- data loading --------------------------------------------------------------------------------


def _loader_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Images per second of the data loading that training uses, by number of "
        "worker processes; no model."
    )
    parser.add_argument(
        "source", metavar="SOURCE", type=str, nargs="?", default="digits", help="as `train --data`"
    )
    parser.add_argument(
        "--recipe", type=str | None, default=None, help="name or file: batch, size, augmentation"
    )
    parser.add_argument(
        "--workers", type=NonNegativeInt, nargs="*", default=[], help="0, 1, 2... if none"
    )
    parser.add_argument("--batch-size", type=PositiveInt, default=None, help="the recipe's if none")
    parser.add_argument("--image-size", type=PositiveInt, default=None, help="the recipe's if none")
    parser.add_argument("--seconds", type=NonNegativeFloat, default=5.0, help="for each number")
    parser.add_argument(
        "--output", type=str, default="runs/bench/loader.jsonl", help="records are appended here"
    )
    return parser


def _run_loader(config: Namespace) -> None:
    from vitarium.benchmarks.loader import bench_loader, loader_table

    console = Console()
    records = bench_loader(
        **vars(config),
        progress=lambda line: console.print(line, style="dim", highlight=False),
    )
    console.print(loader_table(records))
    print(f"records: {config.output}")


WHAT = {
    "loader": (_loader_parser, _run_loader, "images per second of the data loading"),
    "compare": (_compare_parser, _run_compare, "two files of records, or two models"),
    "flops": (_flops_parser, _run_flops, "models' multiply-adds by three counters"),
}
