"""`vitarium quantize`: a trained model in int8, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from rich.console import Console
from torch import Tensor

from vitarium.cli.compression import (
    add_compression_arguments,
    add_latencies,
    checkpoint_of,
    claim_files,
    figures_of,
    print_comparison,
    write_report,
)
from vitarium.train.checkpoint import write_atomic
from vitarium.train.data import Samples, batches, create_loader, load_data
from vitarium.train.quantize import MODES, Program, quantize_model, tensor_bytes
from vitarium.train.weights import LoadedModel

_TOLERANCE = 0.05  # a value on the edge between two integers may fall to either side


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Make a trained model compute in int8 through torchao, write it as a program "
        "of torch.export (.pt2), and compare it with what it was, on the CPU."
    )
    add_compression_arguments(parser)
    parser.add_argument(
        "--mode",
        type=Literal[MODES],  # type: ignore[valid-type]
        default="dynamic",
        help="ranges of activations found while it runs, or fixed by calibration",
    )
    parser.add_argument(
        "--calibration_images",
        type=PositiveInt,
        default=256,
        help="training images that ranges are calibrated with, for --mode static",
    )
    return parser


def run(config: Namespace) -> None:
    loaded = checkpoint_of(config)
    folder = claim_files(config.output, "model.pt2", "quantization.json")
    before = figures_of(config, loaded, loaded.model)
    images = _calibration(config, loaded) if config.mode == "static" else ()
    export = quantize_model(loaded.model, config.mode, loaded.inputs.image_size, images)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.pt2"
    write_atomic(path, lambda temporary: export.write(temporary, "torch", _TOLERANCE))
    int8 = Program(path)
    after = figures_of(config, loaded, int8)
    add_latencies(config, loaded, (loaded.model, int8), (before, after))
    before["bytes"], after["bytes"] = tensor_bytes(loaded.model), tensor_bytes(int8.program)
    console = Console()
    print_comparison(console, f"{loaded.name} in int8, {config.mode}", before, after)
    settings = {"mode": config.mode, "calibration_images": config.calibration_images}
    file = {"file_bytes": path.stat().st_size}
    write_report(folder / "quantization.json", loaded, settings, before, after, file)
    console.print(
        f"written {path} ({path.stat().st_size:,} bytes with its graph) and quantization.json",
        highlight=False,
        soft_wrap=True,
    )


def _calibration(config: Namespace, loaded: LoadedModel) -> Iterator[Tensor]:
    """Batches of training images as evaluation sees images, normalised."""
    assert loaded.config is not None
    trained = loaded.config
    data = load_data(config.data or trained.data, trained.source)
    samples = Samples(data.train, loaded.inputs.transform(), data.broken)
    count = min(config.calibration_images, len(samples))
    order = [i * len(samples) // count for i in range(count)]  # from all of the data
    batch_size = config.batch_size or trained.batch_size
    loader = create_loader(samples, 0, batch_size=batch_size, sampler=order)
    for images, _ in batches(loader, torch.device("cpu")):
        yield loaded.inputs.normalize(images)
