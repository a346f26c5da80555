"""`vitarium export`: a model as a torch.export program or as ONNX, checked against the model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from rich.console import Console

from vitarium.cli.weights import add_weight_arguments, weights_of
from vitarium.train.checkpoint import write_atomic
from vitarium.zoo.export import SUFFIXES, Export, ExportReport, trace


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Write a model, ours or any other of timm's, as files that need none of this "
        "code: a program of torch.export (.pt2) and ONNX (.onnx). Every file is read back, run "
        "(ONNX by onnxruntime) and compared with the model at several batch sizes before the "
        "command says that it is written."
    )
    add_weight_arguments(parser)
    parser.add_argument(
        "--format",
        type=Literal["torch", "onnx", "both"] | None,
        help="which files; if absent, what OUTPUT's ending says, or both",
    )
    parser.add_argument(
        "--output", metavar="PATH", type=str | None, help="by default MODEL.pt2 and MODEL.onnx here"
    )
    parser.add_argument(
        "--image-size", metavar=("H", "W"), type=PositiveInt, nargs=2, default=None,
        help="pixels; the model's own if absent",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=PositiveInt | None, help="images per batch; any number if absent"
    )
    parser.add_argument(
        "--dynamic-size",
        action="store_true",
        help="leave height and width free, where the model's path does not depend on them",
    )
    parser.add_argument(
        "--overwrite", type=bool, default=False, help="whether the files may exist already"
    )
    return parser


def run(config: Namespace) -> None:
    formats = _formats(config)
    paths = {name: _output(config, SUFFIXES[name]) for name in formats}
    for path in paths.values():
        if not path.parent.is_dir():
            raise ValueError(f"output={str(path)!r}: there is no folder {str(path.parent)!r}")
        if path.exists() and not config.overwrite:
            raise ValueError(f"{path} exists; --overwrite true replaces it")
    loaded = weights_of(config)
    model, inputs = loaded.model, loaded.inputs
    height, width = config.image_size or inputs.image_size
    export = trace(
        model,
        (height, width),
        batch_size=config.batch_size,
        dynamic_size=config.dynamic_size,
        in_chans=len(inputs.mean),
    )
    console = Console()
    for name, path in paths.items():
        reports: list[ExportReport] = []
        write_atomic(path, lambda temporary: reports.append(export.write(temporary, name)))  # noqa: B023
        (report,) = reports
        console.print(
            f"written {path}: {report.bytes / 2**20:.1f} MiB; differs from {config.model} by "
            f"{report.error:.0e} of the largest output at most, on images of "
            f"{', '.join('x'.join(map(str, shape)) for shape in report.shapes)}",
            highlight=False,
            soft_wrap=True,
        )
    for line in _remarks(export):
        console.print(line, highlight=False, soft_wrap=True)


def _formats(config: Namespace) -> list[str]:
    if config.format in SUFFIXES:
        return [config.format]
    ending = Path(config.output or "").suffix
    by_ending = [name for name, suffix in SUFFIXES.items() if suffix == ending]
    return by_ending if by_ending and config.format is None else list(SUFFIXES)


def _output(config: Namespace, suffix: str) -> Path:
    if config.output is None:
        return Path(f"{config.model}{suffix}")
    path = Path(config.output)
    if path.suffix == suffix:
        return path
    if path.suffix in SUFFIXES.values() or path.is_dir():
        raise ValueError(
            f"output={str(path)!r} must be a file ending in {suffix}, or the name of both files "
            "without an ending"
        )
    return path.with_name(path.name + suffix)


def _remarks(export: Export) -> list[str]:
    """What is free, and what the files do not serve."""
    lines = []
    for name, (low, high) in export.ranges.items():
        lines.append(f"{name}: {low} " + ("or more" if high is None else f"to {high}"))
    for shape, reason in export.refused.items():
        size = "x".join(map(str, shape))
        lines.append(f"not for images of {size}: {reason}")
    if export.refused:
        lines.append("a .pt2 file refuses such images; an .onnx file has no check of its own")
    return lines
