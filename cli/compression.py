"""What `vitarium prune` and `vitarium quantize` share: arguments, comparison, report."""

from __future__ import annotations

import dataclasses
import datetime
import json
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from vitarium.benchmarks.compression import comparison_rows, latencies
from vitarium.train import environment
from vitarium.train.checkpoint import write_text
from vitarium.train.suite import evaluate_suite
from vitarium.train.weights import LoadedModel, load_weights


def add_compression_arguments(parser: ArgumentParser) -> None:
    """CHECKPOINT, the folder for the result, and the images that figures are of."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=str,
        help="a .safetensors file that training wrote, or a run's folder (its best checkpoint)",
    )
    parser.add_argument("--output", metavar="FOLDER", type=str, required=True, help="a new folder")
    parser.add_argument(
        "--data", metavar="SOURCE", type=str | None, help="as in training; as trained if absent"
    )
    parser.add_argument(
        "--batch_size", type=PositiveInt | None, help="images per batch; as trained if absent"
    )
    parser.add_argument(
        "--workers", type=NonNegativeInt | None, help="reading processes; as trained if absent"
    )
    parser.add_argument(
        "--latency_batch_size", type=PositiveInt, default=1, help="images per batch that is timed"
    )


def checkpoint_of(config: Namespace) -> LoadedModel:
    """The model of the checkpoint, on the CPU.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, or was not written by `vitarium train`.
    """
    if not Path(config.checkpoint).exists():
        raise FileNotFoundError(f"checkpoint {config.checkpoint} does not exist")
    loaded = load_weights(config.checkpoint)
    assert loaded.config is not None and loaded.path is not None  # of every checkpoint of ours
    return loaded


def claim_files(output: str, *names: str) -> Path:
    """The folder for files of these names, which is not made yet.

    Raises:
        ArgumentError: `output` is a file, or holds a run or one of the files already.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(None, f"output={output!r} is a file; it must be a folder")
    taken = [name for name in (*names, "config.yaml") if (folder / name).exists()]
    if taken:
        raise ArgumentError(None, f"output={output!r} holds {taken[0]} already; choose another")
    return folder


def example(loaded: LoadedModel, batch: int) -> Tensor:
    """Drawn images of the size that a model takes, `(batch, 3, H, W)`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, *loaded.inputs.image_size, generator=generator)


def figures_of(config: Namespace, loaded: LoadedModel, model: nn.Module) -> dict[str, Any]:
    """Accuracy and loss of a model in the place of the loaded one, on the CPU.

    Raises:
        ValueError, FileNotFoundError: the images cannot be used.
    """
    (result,) = evaluate_suite(
        dataclasses.replace(loaded, model=model),
        None if config.data is None else [config.data],
        batch_size=config.batch_size,
        workers=config.workers,
        device="cpu",
        precision="no",
    )
    found = result.evaluation
    return {"accuracy": found.accuracy, "loss": found.loss, "images": found.total}


def add_latencies(
    config: Namespace,
    loaded: LoadedModel,
    models: Sequence[nn.Module],
    figures: Sequence[dict[str, Any]],
) -> None:
    """Add the latencies of models, the original first, to the figures of each."""
    assert loaded.config is not None
    images = example(loaded, config.latency_batch_size)
    by_place = {str(place): model for place, model in enumerate(models)}
    timed = latencies(by_place, images, threads=loaded.config.threads)
    for entry, latency in zip(figures, timed.values()):
        entry["latency_ms"], entry["cpu_time"] = latency.milliseconds, latency.relative


def print_comparison(
    console: Console, title: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    """A row per figure."""
    table = Table(title=title, title_justify="left")
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right")
    for row in comparison_rows(before, after):
        table.add_row(*row)
    console.print(table)


def write_report(
    path: Path,
    loaded: LoadedModel,
    settings: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    further: Mapping[str, Any],
) -> None:
    """The figures as JSON, with what they are of."""
    assert loaded.config is not None
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": loaded.name,
        "checkpoint": str(loaded.path),
        "settings": dict(settings),
        "before": dict(before),
        "after": dict(after),
        **further,
        "threads": loaded.config.threads or torch.get_num_threads(),
        "versions": environment.versions(),
        "processor": environment.processor("cpu"),
    }
    write_text(path, json.dumps(content, indent=2) + "\n")
