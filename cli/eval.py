"""`vitarium eval`: the accuracy of a saved checkpoint on held-out images."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console

from vitarium.train.evaluate import evaluate, record_evaluation


def parser() -> ArgumentParser:
    parser = ArgumentParser(description="Evaluate a checkpoint on held-out images.")
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=str,
        help="a .safetensors file that training wrote, or a run's folder (its best checkpoint)",
    )
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        type=str | None,
        help="digits, folder:PATH, tar:PATH, ... (docs/data.md); as trained if absent",
    )
    parser.add_argument(
        "--batch_size", type=PositiveInt | None, help="images per batch; as trained if absent"
    )
    parser.add_argument(
        "--workers", type=NonNegativeInt | None, help="reading processes; as trained if absent"
    )
    parser.add_argument(
        "--device", type=Literal["auto", "cpu"] | None, help="device; as trained if absent"
    )
    return parser


def run(config: Namespace) -> None:
    evaluation = evaluate(
        config.checkpoint,
        data=config.data,
        batch_size=config.batch_size,
        workers=config.workers,
        device=config.device,
    )
    console = Console()
    console.print(
        f"accuracy {evaluation.accuracy:.2%} ({evaluation.correct}/{evaluation.total}), "
        f"loss {evaluation.loss:.4f}"
        + (f"; {evaluation.broken} broken images are in no figure" if evaluation.broken else ""),
        highlight=False,
    )
    path = record_evaluation(config.checkpoint, config.data, evaluation)
    console.print(f"recorded in {path}", highlight=False, soft_wrap=True)
