"""`vitarium predict`: labels and probabilities of image files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from vitarium.train.predict import Prediction, predict


def parser() -> ArgumentParser:
    parser = ArgumentParser(description="Classify image files with a checkpoint.")
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=str,
        help="a .safetensors file that training wrote, or a run's folder (its best checkpoint)",
    )
    parser.add_argument("images", metavar="IMAGE", type=str, nargs="+", help="image files")
    parser.add_argument("--top", type=PositiveInt, default=3, help="labels per image")
    parser.add_argument("--device", type=Literal["auto", "cpu"], default="auto", help="device")
    return parser


def run(config: Namespace) -> None:
    predictions = predict(config.checkpoint, config.images, top=config.top, device=config.device)
    Console().print(prediction_table(predictions))


def prediction_table(predictions: Sequence[Prediction]) -> Table:
    """A row per image: its labels with their probabilities."""
    ranks = [f"{rank}. label" for rank in range(1, len(predictions[0].labels) + 1)]
    table = Table(Column("image", overflow="fold"), *ranks)
    for prediction in predictions:
        ranked = zip(prediction.labels, prediction.probabilities)
        cells = [f"{label}  {probability:.1%}" for label, probability in ranked]
        table.add_row(escape(str(prediction.path)), *map(escape, cells))
    return table
