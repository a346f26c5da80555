"""`vitarium eval`: a model's figures on held-out images and on the test sets around ImageNet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from accelerate import PartialState
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vitarium.cli.weights import add_source_arguments
from vitarium.train.evaluation_files import claim_output, write_results
from vitarium.train.imagenet import NAMES, SEVERITIES
from vitarium.train.suite import TOLERANCE, Result, evaluate_suite, record_evaluation
from vitarium.train.weights import load_weights

_CropPct = restricted_number_type("CropPct", float, [(">", 0), ("<=", 1)])


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Evaluate a run, a checkpoint or a named model: top-1 and top-5 accuracy, "
        "loss, calibration and throughput, beside the published accuracy."
    )
    parser.add_argument(
        "model",
        metavar="MODEL_OR_CHECKPOINT",
        type=str,
        help="a run's folder (its best checkpoint), a .safetensors file that training wrote, or a "
        "model's name",
    )
    add_source_arguments(parser)
    parser.add_argument(
        "--pretrained",
        action="store_true",
        help="of a named model, the weights that timm downloads (so it is without --checkpoint)",
    )
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        type=str,
        nargs="+",
        default=None,
        help=f"one or several of {', '.join(f'{name}:PATH' for name in NAMES)}, or as in training "
        "(folder:PATH, ...); what the run held out if absent",
    )
    parser.add_argument(
        "--image_size", "--image-size", metavar="SIDE", type=PositiveInt, nargs="+", default=None,
        help="sides of the square images, in pixels; the model's own if absent",
    )  # fmt: skip
    parser.add_argument(
        "--crop_pct",
        type=_CropPct | None,
        help="part of the image's shorter side that is seen; the model's own if absent",
    )
    parser.add_argument(
        "--real_labels", metavar="JSON", type=str | None,
        help="labels of imagenet-real; timm's copy if absent",
    )  # fmt: skip
    parser.add_argument(
        "--batch_size", type=PositiveInt | None, help="images per batch; as trained (128) if absent"
    )
    parser.add_argument(
        "--workers", type=NonNegativeInt | None, help="reading processes; as trained (4) if absent"
    )
    parser.add_argument(
        "--device", type=Literal["auto", "cpu"] | None, help="device; as trained (auto) if absent"
    )
    parser.add_argument(
        "--precision",
        type=Literal["no", "bf16", "fp16"] | None,
        help="as trained (no, which is float32) if absent",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=str | None,
        help="for figures as JSON and CSV, those of classes and images, and pictures",
    )
    return parser


def run(config: Namespace) -> None:
    if config.pretrained and (config.checkpoint is not None or config.random):
        raise ValueError("--pretrained excludes --checkpoint and --random")
    if config.pretrained and Path(config.model).exists():
        raise ValueError(f"{config.model} is a checkpoint already; --pretrained is for names")
    loaded = load_weights(config.model, config.checkpoint, random=config.random)
    output = None if config.output is None else claim_output(config.output)
    main = PartialState().is_main_process
    console = Console(quiet=not main)
    results: list[Result] = []
    written: dict[Path, None] = {}
    for result in evaluate_suite(
        loaded,
        config.data,
        image_sizes=config.image_size or [None],
        crop_pct=config.crop_pct,
        batch_size=config.batch_size,
        workers=config.workers,
        device=config.device,
        precision=config.precision,
        real_labels=config.real_labels,
    ):
        results.append(result)
        console.print(summary(result), highlight=False, soft_wrap=True)
        if not main:
            continue
        log = record_evaluation(result)
        if log is not None:
            written[log] = None
        if output is not None:
            write_results(results, output)
            written[output] = None
    console.print(figures_table(results))
    for result in results:
        if result.corruptions is not None:
            console.print(corruption_table(result))
        for line in remarks(result):
            console.print(line, highlight=False, soft_wrap=True)
    for path in written:
        console.print(f"recorded in {path}", highlight=False, soft_wrap=True)


def summary(result: Result) -> str:
    """One line for one result."""
    found = result.evaluation
    loss = "" if math.isnan(found.loss) else f", loss {found.loss:.4f}"
    broken = f"; {found.broken} broken images are in no figure" if found.broken else ""
    where = escape(f"{result.name} at {_size(result)}")
    return f"{where}: accuracy {found.accuracy:.2%} ({found.correct}/{found.total}){loss}{broken}"


def figures_table(results: Sequence[Result]) -> Table:
    """A row per data set and size."""
    compared = any(result.difference is not None for result in results)
    caption = "ECE: expected calibration error, 15 bins. img/s: the model alone."
    if compared:
        caption += f" !: more than {TOLERANCE:g} points off the published accuracy."
    table = Table(
        title=results[0].model, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
        caption=caption, caption_justify="left", padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("data", overflow="fold")
    columns = ["size", "crop", "images", "top-1", "top-5", "loss", "ECE", "img/s"]
    for heading in [*columns, *(["published", "diff."] if compared else [])]:
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        found = result.evaluation
        table.add_row(
            result.name,
            _size(result),
            f"{result.inputs.crop_pct:g}",
            f"{found.total:,}",
            f"{100 * found.accuracy:.2f}",
            _percent(found.accuracy_top5),
            "" if math.isnan(found.loss) else f"{found.loss:.3f}",
            _percent(found.calibration_error),
            f"{found.images_per_second:.0f}" if found.images_per_second else "",
            *(_published_cells(result) if compared else ()),
        )
    return table


def _published_cells(result: Result) -> tuple[str, str]:
    if result.published_top1 is None or result.difference is None:
        return "", ""
    published, difference = f"{result.published_top1:g}", f"{result.difference:+.2f}"
    if result.differs:
        return published, f"[bold red]{difference} !"
    return published, difference if result.comparable else f"({difference})"


def remarks(result: Result) -> list[str]:
    """What a reader of the figures has to know, a line each."""
    lines = []
    if result.differs:
        lines.append(
            f"{result.model}: top-1 differs from the published {result.published_top1:g} % by "
            f"{result.difference:+.2f} points, more than {TOLERANCE:g}"
        )
    elif result.difference is not None and not result.comparable:
        assert result.published is not None
        size = result.published.resolution
        why = "" if result.whole else f" and {result.evaluation.total:,} of 50,000 images"
        lines.append(
            f"{result.model}: the published {result.published_top1:g} % is of the whole set at "
            f"size {size}; this is {_size(result)}{why}, so the difference says little"
        )
    elif result.whole is False:
        lines.append(f"{result.name}: {result.evaluation.total:,} images are a part of the set")
    if result.corruptions is not None and result.corruptions.mean_corruption_error is None:
        lines.append("imagenet-c: the mean corruption error needs 15 corruptions at 5 severities")
    return lines


def corruption_table(result: Result) -> Table:
    """Errors on ImageNet-C, a row per corruption."""
    errors = result.corruptions
    assert errors is not None
    table = Table(
        title=f"{result.name} at {_size(result)}: top-1 error in percent", title_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False, show_footer=errors.mean_corruption_error is not None,
    )  # fmt: skip
    table.add_column("corruption", footer="mean corruption error")
    for severity in SEVERITIES:
        table.add_column(str(severity), justify="right")
    table.add_column("mean", justify="right")
    table.add_column("of AlexNet's", justify="right", footer=_percent(errors.mean_corruption_error))
    for name in errors.corruptions:
        levels = [_percent(errors.errors.get((name, severity))) for severity in SEVERITIES]
        table.add_row(
            escape(name), *levels, _percent(errors.mean(name)), _percent(errors.relative(name))
        )
    return table


def _size(result: Result) -> str:
    return "x".join(str(side) for side in dict.fromkeys(result.inputs.image_size))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
