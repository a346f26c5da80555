"""Pictures of a run: learning curves, and where a model looks in real images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vitarium.train.checkpoint import write_atomic


def _save(figure: Figure, path: Path) -> None:
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def learning_curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss and accuracy over the epochs as a PNG.

    Args:
        records: one per epoch, as in a run's `metrics.jsonl`.
        path: the file to write.
    """
    epochs = [record["epoch"] for record in records]
    style = {"marker": "o", "markersize": 2.5, "linewidth": 1.5} if len(epochs) < 60 else {}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [r["train_loss"] for r in records], label="training", **style)
    loss.plot(epochs, [r["loss"] for r in records], label="held out", **style)
    loss.set(xlabel="epoch", ylabel="loss (nats)", title="Loss", ylim=(0, None))
    loss.legend(frameon=False)
    accuracy.plot(epochs, [r["accuracy"] for r in records], color="C1", **style)
    best = max(records, key=lambda r: (r["correct"], -r["loss"]))
    accuracy.axhline(best["accuracy"], color="0.6", linewidth=0.8, linestyle="--")
    accuracy.set(
        xlabel="epoch",
        ylabel="top-1 accuracy",
        title=f"Held-out accuracy, best {best['accuracy']:.2%} in epoch {best['epoch']}",
    )
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)
