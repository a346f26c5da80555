"""Progress of a run on a console: a live bar on a terminal, one line per epoch anywhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar


class Progress:
    """Shows steps and epochs; with `console=None` it shows nothing.

    Args:
        console: where to show progress.
        epochs: number of epochs of the run.
        steps_per_epoch: steps in each.
    """

    def __init__(self, console: Console | None, epochs: int, steps_per_epoch: int) -> None:
        self.console, self.epochs = console, epochs
        self.steps_per_epoch = steps_per_epoch
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=console is None or not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=epochs * steps_per_epoch)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def step(self, step: int, loss: float) -> None:
        """After step number `step`, whose loss was `loss`."""
        epoch = (step - 1) // self.steps_per_epoch + 1
        text = f"epoch {epoch}/{self.epochs}  loss {loss:.3f}"
        self.bar.update(self.task, completed=step, description=text)

    def epoch(self, record: dict[str, Any]) -> None:
        """After an epoch, of which `record` holds the figures."""
        if self.console is None:
            return
        self.bar.console.print(
            f"epoch {record['epoch']:>3}/{self.epochs}  train loss {record['train_loss']:.3f}  "
            f"held-out loss {record['loss']:.3f}  "
            f"accuracy {record['accuracy']:.2%} ({record['correct']}/{record['total']})",
            highlight=False,
        )
