"""`vitarium bench`: measure models or operators, and draw what was measured.

The first word says what is done, by a name in `_WHAT`; without it, words are models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from rich.console import Console

from vitarium.cli import bench_measures, bench_report
from vitarium.cli.bench_kernels import all_parser, kernels_parser, run_all, run_kernels
from vitarium.cli.bench_measures import add_selection, with_selected

Dtype = Literal["float32", "bfloat16", "float16"]
RESULTS = Path("benchmarks/results")  # in a checkout: records that are kept
RUNS = Path("runs/bench")
_OUTPUT = (
    f"records are appended here; {RESULTS}/<processor>/{{name}} in a checkout of the repository "
    f"and {RUNS}/<processor>/{{name}} elsewhere, if not given"
)


class _Parser(ArgumentParser):
    """Takes `bench resnet18` for `bench models resnet18`."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any
    ) -> Namespace:
        args = list(args or [])
        if args and args[0] not in (*_WHAT, "-h", "--help"):
            args = ["models", *args]
        return super().parse_args(args, *rest, **kwargs)


def parser() -> ArgumentParser:
    parser = _Parser(
        prog="vitarium bench",
        exit_on_error=False,
        description="Measure models or operators, and draw what was measured. "
        "`bench MODEL...` is short for `bench models MODEL...`.",
    )
    commands = parser.add_subcommands(dest="what", required=True)
    for name, (build, _, help_text) in _WHAT.items():
        commands.add_subcommand(name, build(), help=help_text)
    return parser


def run(config: Namespace) -> int | None:
    return _WHAT[config.what][1](config[config.what])


# --- models --------------------------------------------------------------------------------------


def _models_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Parameters, GFLOPs, activations, latency, throughput and peak memory of any "
        "models that timm knows, ours or not, side by side and measured in turns."
    )
    add_selection(parser)
    parser.add_argument(
        "--modes",
        type=Literal["forward", "training", "step"],
        nargs="+",
        default=["forward"],
        help="training is forward and backward, step an AdamW step too",
    )
    parser.add_argument("--batch-size", type=PositiveInt, default=1, help="images per call")
    parser.add_argument(
        "--image-size", type=PositiveInt, default=None, help="side of the images, pixels"
    )
    parser.add_argument("--dtype", type=Dtype, default="float32", help="of weights and input")
    _add_place(parser, threads=None)
    parser.add_argument("--channels-last", action="store_true", help="memory format")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile(model)")
    parser.add_argument("--profile", action="store_true", help="share of time by part of the model")
    parser.add_argument("--seconds", type=NonNegativeFloat, default=5.0, help="per model")
    parser.add_argument(
        "--limit", type=PositiveFloat, default=60.0, help="seconds that a call may take"
    )
    parser.add_argument(
        "--output", type=str, default=str(RUNS / "models.jsonl"), help="records are appended here"
    )
    return parser


def _run_models(config: Namespace) -> int:
    from vitarium.benchmarks import bench_models, print_table

    console = Console()
    arguments = with_selected(config)
    records = bench_models(
        **arguments, progress=lambda line: console.print(line, style="dim", highlight=False)
    )
    print_table(records, console)
    _say_where(config.output)
    return 1 if any(r.failure is not None for r in records) else 0


# --- operators -----------------------------------------------------------------------------------


def _operators_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Our implementations of the operators against the floor and against peers, "
        "each checked against the float64 reference first. Records already in the output, of "
        "this machine, these versions and this commit, are not measured again, so that the same "
        "command goes on where it ended."
    )
    parser.add_argument("names", metavar="OPERATOR", type=str, nargs="*", help="all, if none")
    _add_place(parser, threads=1)
    parser.add_argument("--batch-size", type=PositiveInt, default=None, help="images")
    parser.add_argument("--dtypes", type=Dtype, nargs="+", default=None, help="data types")
    parser.add_argument(
        "--modes",
        type=Literal["forward", "backward", "training"],
        nargs="+",
        default=None,
        help="training is forward and backward in one",
    )
    parser.add_argument("--match", type=str, default="", help="only cases whose note has this")
    parser.add_argument(
        "--peers", type=str, nargs="*", default=None, help="gather, sdpa_masked, flex, ..."
    )
    parser.add_argument("--seconds", type=NonNegativeFloat, default=5.0, help="per setting")
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="time kernels without their launches"
    )
    parser.add_argument(
        "--minutes", type=PositiveFloat, default=None, help="begin nothing after so many"
    )
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help=_OUTPUT.format(name="operators.jsonl"),
    )
    return parser


def _run_operators(config: Namespace) -> int:
    from vitarium.benchmarks import bench_operators, print_table

    console = Console()
    arguments = {**vars(config), "output": _output(config, "operators.jsonl")}
    outcome = bench_operators(
        **arguments, progress=lambda line: console.print(line, style="dim", highlight=False)
    )
    print_table(outcome.records, console)
    for line in outcome.refused:
        console.print(f"not timed: {line}", style="red", markup=False, highlight=False)
    if outcome.remaining:
        console.print(f"{outcome.remaining} settings remain; the same command goes on with them")
    _say_where(arguments["output"])
    return 1 if outcome.refused else 0


# --- mixers --------------------------------------------------------------------------------------


def _mixers_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Our mixers, projections included, beside timm's modules with the same weights."
    )
    parser.add_argument("names", metavar="MIXER", type=str, nargs="*", help="all, if none")
    _add_place(parser, threads=1)
    parser.add_argument("--batch-size", type=PositiveInt, default=16, help="images")
    parser.add_argument(
        "--dtypes", type=Dtype, nargs="+", default=["float32", "bfloat16"], help="data types"
    )
    _add_modes(parser, ["forward", "training"])
    parser.add_argument("--match", type=str, default="", help="only settings whose note has this")
    parser.add_argument("--seconds", type=NonNegativeFloat, default=5.0, help="per setting")
    parser.add_argument(
        "--output", type=str | None, default=None, help=_OUTPUT.format(name="mixers.jsonl")
    )
    return parser


def _run_mixers(config: Namespace) -> int:
    from vitarium.benchmarks.mixers import bench_mixers

    return _run_compared(bench_mixers, config, "mixers.jsonl")


def _run_compared(bench: Any, config: Namespace, file: str) -> int:
    """Measure ours beside others, print both, say what was not timed."""
    from vitarium.benchmarks.report import compared_table

    console = Console()
    arguments = {**vars(config), "output": _output(config, file)}
    outcome = bench(
        **arguments, progress=lambda line: console.print(line, style="dim", highlight=False)
    )
    console.print(compared_table(outcome.records))
    for line in outcome.refused:
        console.print(f"not timed: {line}", style="red", markup=False, highlight=False)
    _say_where(arguments["output"])
    return 1 if outcome.refused else 0


# --- growth with tokens ---------------------------------------------------------------------------


def _scaling_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="The same mixers on maps of 196 to 65,536 tokens, or the same models on images "
        "of several sizes and on batches: by which power of their number does time grow?"
    )
    parser.add_argument(
        "names",
        metavar="NAME",
        type=str,
        nargs="*",
        help="mixers and registered models; the mixers that claim to be linear, if none",
    )
    _add_place(parser, threads=1)
    parser.add_argument("--batch-size", type=PositiveInt, default=1, help="images, of mixers")
    parser.add_argument("--dtypes", type=Dtype, nargs="+", default=["float32"], help="data types")
    _add_modes(parser, ["forward"])
    parser.add_argument(
        "--resolutions",
        type=PositiveInt,
        nargs="*",
        default=[128, 256, 512, 1024, 2048],
        help="sides of the images of models, one image per call",
    )
    parser.add_argument(
        "--batch-sizes",
        type=PositiveInt,
        nargs="*",
        default=[1, 4, 16, 64, 256],
        help="images of a model's own size per call",
    )
    parser.add_argument(
        "--limit", type=PositiveFloat, default=60.0, help="seconds that a model's call may take"
    )
    parser.add_argument(
        "--seconds", type=NonNegativeFloat, default=5.0, help="per mixer, or model and size"
    )
    parser.add_argument(
        "--output", type=str | None, default=None, help=_OUTPUT.format(name="scaling.jsonl")
    )
    return parser


def _run_scaling(config: Namespace) -> int:
    from vitarium.benchmarks.model_scaling import bench_model_scaling
    from vitarium.benchmarks.report import print_growth, scaling_table
    from vitarium.benchmarks.scaling import bench_scaling
    from vitarium.ops import MIXERS

    console = Console()
    shared = {**vars(config), "output": _output(config, "scaling.jsonl")}
    shared["progress"] = lambda line: console.print(line, style="dim", highlight=False)
    names = shared.pop("names")
    of_mixers = {"batch_size": shared.pop("batch_size")}
    of_models = {name: shared.pop(name) for name in ("resolutions", "batch_sizes", "limit")}
    mixers = [name for name in names if name in MIXERS]
    models = [name for name in names if name not in MIXERS]
    if mixers or not models:
        console.print(scaling_table(bench_scaling(mixers, **of_mixers, **shared)))
    records = bench_model_scaling(models, **of_models, **shared) if models else []
    print_growth(records, console)
    _say_where(shared["output"])
    return 0


# --- official code --------------------------------------------------------------------------------


def _official_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Our backbones beside the models of the official repositories, with the same "
        "weights. `git clone` those repositories into one folder first."
    )
    parser.add_argument("names", metavar="MODEL", type=str, nargs="*", help="all, if none")
    parser.add_argument("--clones", type=str, required=True, help="the folder of repositories")
    _add_place(parser, threads=1)
    parser.add_argument("--batch-size", type=PositiveInt, default=4, help="images")
    parser.add_argument("--image-size", type=PositiveInt, default=224, help="side of the images")
    parser.add_argument("--dtypes", type=Dtype, nargs="+", default=["float32"], help="data types")
    _add_modes(parser, ["forward", "training"])
    parser.add_argument("--seconds", type=NonNegativeFloat, default=10.0, help="per setting")
    parser.add_argument(
        "--output", type=str | None, default=None, help=_OUTPUT.format(name="official.jsonl")
    )
    return parser


def _run_official(config: Namespace) -> int:
    from vitarium.benchmarks.official import bench_official

    return _run_compared(bench_official, config, "official.jsonl")


# --- timm's models with our mixers ----------------------------------------------------------------


def _swap_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="timm's models with our mixers beside the same models with timm's, with the "
        "same weights, at their native size."
    )
    parser.add_argument(
        "names", metavar="MODEL", type=str, nargs="*", help="timm's names; one of a family, if none"
    )
    _add_place(parser, threads=1)
    parser.add_argument("--batch-size", type=PositiveInt, default=4, help="images")
    parser.add_argument("--dtypes", type=Dtype, nargs="+", default=["float32"], help="data types")
    _add_modes(parser, ["forward", "training"])
    parser.add_argument("--seconds", type=NonNegativeFloat, default=10.0, help="per setting")
    parser.add_argument(
        "--output", type=str | None, default=None, help=_OUTPUT.format(name="swap.jsonl")
    )
    return parser


def _run_swap(config: Namespace) -> int:
    from vitarium.benchmarks.swap import bench_swap

    return _run_compared(bench_swap, config, "swap.jsonl")


# --- the training loop ---------------------------------------------------------------------------


def _train_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="A step of our training loop beside a bare PyTorch loop, with the same model "
        "and the same images in memory; or the memory of a step with activation checkpointing."
    )
    parser.add_argument(
        "name", metavar="MODEL", type=str, nargs="?", default="dinat_nano", help="registered name"
    )
    _add_place(parser, threads=1)
    parser.add_argument("--batch-size", type=PositiveInt, default=64, help="images per step")
    parser.add_argument("--image-size", type=PositiveInt, default=32, help="side of the images")
    parser.add_argument("--seconds", type=NonNegativeFloat, default=20.0, help="for both loops")
    parser.add_argument("--memory-only", action="store_true", help="memory instead of time")
    parser.add_argument(
        "--output", type=str | None, default=None, help=_OUTPUT.format(name="training.jsonl")
    )
    return parser


def _run_train(config: Namespace) -> None:
    from vitarium.benchmarks.training import bench_training

    arguments = {**vars(config), "output": _output(config, "training.jsonl")}
    for entry in bench_training(**arguments):
        peak = "" if entry.peak_memory is None else f", {entry.peak_memory / 2**20:.1f} MiB at most"
        print(f"{entry.implementation}: {entry.median * 1e3:.2f} ms per step{peak}")
    _say_where(arguments["output"])


def _timm_script_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="An epoch of `vitarium train` beside one of timm's train.py, on the same drawn "
        "images and settings: whole commands in turns, on the CPU."
    )
    parser.add_argument(
        "script", metavar="TRAIN.PY", type=str, help="timm's script, in a clone of its repository"
    )
    parser.add_argument(
        "name", metavar="MODEL", type=str, nargs="?", default="resnet18", help="timm's name"
    )
    parser.add_argument("--images", type=PositiveInt, default=512, help="to train on")
    parser.add_argument("--batch-size", type=PositiveInt, default=32, help="images per step")
    parser.add_argument("--image-size", type=PositiveInt, default=64, help="side of the crops")
    parser.add_argument("--rounds", type=PositiveInt, default=5, help="samples of each")
    parser.add_argument(
        "--output", type=str | None, default=None, help=_OUTPUT.format(name="training.jsonl")
    )
    return parser


def _run_timm_script(config: Namespace) -> None:
    from vitarium.benchmarks.timm_script import bench_timm_script

    arguments = {**vars(config), "output": _output(config, "training.jsonl")}
    for entry in bench_timm_script(**arguments, progress=print):
        print(f"{entry.implementation}: {entry.median:.2f} s of CPU per epoch")
    _say_where(arguments["output"])


# --- pictures ------------------------------------------------------------------------------------


def _plot_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Draw records: operators over their floor, or models by published accuracy "
        "and measured latency."
    )
    parser.add_argument("records", metavar="RECORDS", type=str, nargs="+", help="JSON Lines files")
    parser.add_argument("--name", type=str | None, default=None, help="only this operator")
    parser.add_argument("--dtype", type=Dtype | None, default=None, help="only this data type")
    parser.add_argument("--mode", type=str | None, default=None, help="only this mode")
    parser.add_argument(
        "--profile", action="store_true", help="models' time by stage and part, as stacked bars"
    )
    parser.add_argument("--output", "-o", type=str, required=True, help="such as operators.png")
    return parser


def _run_plot(config: Namespace) -> None:
    from vitarium.benchmarks import plot, plot_profile, record

    records = [r for path in config.records for r in record.read(path)]
    records = [
        r
        for r in records
        if all(
            getattr(config, what) in (None, getattr(r, what)) for what in ("name", "dtype", "mode")
        )
    ]
    if config.profile:
        plot_profile.plot_profile(records, config.output)
    elif any(r.kind == "operator" for r in records):
        plot.plot_operators(records, config.output)
    else:
        plot.plot_models(records, plot.published_accuracies(records), config.output)
    print(config.output)


# --- what they share -----------------------------------------------------------------------------


def _add_modes(parser: ArgumentParser, default: list[str]) -> None:
    parser.add_argument(
        "--modes",
        type=Literal["forward", "training"],
        nargs="+",
        default=default,
        help="training is forward and backward in one",
    )


def _add_place(parser: ArgumentParser, threads: int | None) -> None:
    parser.add_argument("--device", type=str | None, default=None, help="cpu or cuda")
    parser.add_argument("--threads", type=PositiveInt, default=threads, help="of torch, on the CPU")


def _output(config: Namespace, name: str) -> str:
    """Where records go: as asked for, or to the folder of this machine."""
    from vitarium.benchmarks import record
    from vitarium.benchmarks.arguments import device_named

    if config.output is not None:
        return config.output
    root = RESULTS if RESULTS.is_dir() else RUNS
    device = device_named(config.get("device", "cpu"))
    return str(root / record.this_machine(device).slug / name)


def _say_where(path: str) -> None:
    print(f"records: {path}")


_WHAT = {
    "models": (_models_parser, _run_models, "models side by side"),
    "ops": (_operators_parser, _run_operators, "operators against floor and peers"),
    "mixers": (_mixers_parser, _run_mixers, "mixers against timm's modules"),
    "scaling": (_scaling_parser, _run_scaling, "growth of mixers and models with their input"),
    "official": (_official_parser, _run_official, "backbones against official code"),
    "swap": (_swap_parser, _run_swap, "timm's models with our mixers against timm's"),
    "train": (_train_parser, _run_train, "a training step against a bare loop"),
    "kernels": (kernels_parser, run_kernels, "what the compiler makes of the kernels, no GPU"),
    "all": (all_parser, run_all, "operators, models, growth, report within minutes"),
    **bench_measures.WHAT,
    "timm-script": (
        _timm_script_parser,
        _run_timm_script,
        "`vitarium train` against timm's train.py",
    ),
    "plot": (_plot_parser, _run_plot, "a picture of records"),
    "report": (bench_report.parser, bench_report.run, "a page, tables or a picture of records"),
}
