"""Pictures of an evaluation: what is taken for what, and how far confidence can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vitarium.train.imagenet import ALEXNET_ERRORS, CorruptionErrors, lemmas
from vitarium.train.metrics import Calibration
from vitarium.train.plots import save_png

_WITH_NUMBERS = 20  # classes up to which every cell has its number
_WITH_NAMES = 60  # and up to which every class has its name
_CELLS = 250  # along a side of the matrix: of more classes, neighbours share one
_PAIRS = 25  # most frequent mistakes that are listed


def display_name(name: str) -> str:
    """A synset's first word with the synset, "tench (n01440764)"; any other name as it is."""
    words = lemmas().get(name)
    return name if words is None else f"{words.split(',')[0]} ({name})"


def most_confused(matrix: np.ndarray, number: int) -> list[tuple[int, int, int]]:
    """The most frequent mistakes of a confusion matrix: class, what it is taken for, how often."""
    wrong = matrix - np.diag(matrix.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:number]
    pairs = zip(*np.unravel_index(order, matrix.shape))
    return [(int(i), int(j), int(wrong[i, j])) for i, j in pairs if wrong[i, j]]


def confusion_picture(matrix: np.ndarray, classes: Sequence[str], path: Path, title: str) -> None:
    """`confusion_figure` as a PNG."""
    save_png(confusion_figure(matrix, classes, title), path)


def confusion_figure(matrix: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """A confusion matrix.

    Few classes: every cell with its number. Many: the matrix, and beside it a list of the most
    frequent mistakes, which at a pixel per cell nobody would find. Colours are parts of a row.

    Args:
        matrix: `(C, C)` of counts: rows are classes of images, columns what they were taken for.
        classes: their names.
        title: above the picture.
    """
    kept = np.arange(len(classes))
    if len(classes) > _WITH_NAMES:  # of a folder with a part of the classes, only those that occur
        kept = np.flatnonzero(matrix.sum(0) + matrix.sum(1))
    shown, names = matrix[np.ix_(kept, kept)], [display_name(classes[i]) for i in kept]
    listed = len(kept) > _WITH_NUMBERS
    side = min(9.0, max(4.5, 0.32 * len(kept) + 2))
    figure = Figure(figsize=(side * (1.85 if listed else 1.15), side), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(1, 2, width_ratios=(1.25, 1)) if listed else [figure.subplots()]
    parts = shown / np.maximum(shown.sum(1, keepdims=True), 1)
    _matrix(figure, grid[0], shown, parts, names)
    if listed:
        _mistakes(grid[1], shown, names)
    return figure


def _matrix(
    figure: Figure, axes: Axes, counts: np.ndarray, parts: np.ndarray, names: Sequence[str]
) -> None:
    number = len(names)
    if number > _CELLS:  # the largest of the cells that share one: single mistakes stay visible
        step = -(-number // _CELLS)
        padded = np.pad(parts, (0, -number % step))
        shape = (len(padded) // step, step)
        parts = padded.reshape(*shape, *shape).max((1, 3))
    drawn = axes.imshow(
        np.where(parts > 0, parts, np.nan),
        norm=LogNorm(max(1e-3, parts[parts > 0].min(initial=1)) * 0.999, 1),
        cmap="viridis_r",
        interpolation="nearest",
        extent=(-0.5, number - 0.5, number - 0.5, -0.5),
    )
    bar = figure.colorbar(drawn, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label("part of the class's images", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axes.set_xlabel("taken for", fontsize=9)
    axes.set_ylabel("is", fontsize=9)
    if number <= _WITH_NAMES:
        axes.set_xticks(range(number), names, rotation=90, fontsize=6 if number > 25 else 8)
        axes.set_yticks(range(number), names, fontsize=6 if number > 25 else 8)
    else:
        axes.tick_params(labelsize=7)
    if number <= _WITH_NUMBERS:
        for i, j in zip(*np.nonzero(counts)):
            colour = "white" if parts[i, j] > 0.1 else "black"
            axes.text(j, i, f"{counts[i, j]}", ha="center", va="center", color=colour, fontsize=7)


def _mistakes(axes: Axes, matrix: np.ndarray, names: Sequence[str]) -> None:
    pairs = most_confused(matrix, _PAIRS)
    axes.set_title("most frequent mistakes" if pairs else "no mistakes", fontsize=9)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    if not pairs:
        axes.set_axis_off()
        return
    counts = [count for *_, count in pairs]
    axes.barh(range(len(pairs)), counts, color="0.85")
    labels = [f"{count}  {names[i]} as {names[j]}" for i, j, count in pairs]
    for place, label in enumerate(labels):
        axes.text(0, place, f" {label}", va="center", fontsize=7)
    axes.set(ylim=(len(pairs) - 0.5, -0.5), yticks=[], xticks=[], xlim=(0, 1.02 * max(counts)))


def reliability_diagram(calibration: Calibration, path: Path, title: str) -> None:
    """`reliability_figure` as a PNG."""
    save_png(reliability_figure(calibration, title), path)


def reliability_figure(calibration: Calibration, title: str) -> Figure:
    """Accuracy by confidence, over how many images have which.

    Args:
        calibration: as `vitarium.train.metrics.calibration` gives it.
        title: above the picture.
    """
    bins = len(calibration.count)
    centres, width = (np.arange(bins) + 0.5) / bins, 1 / bins
    figure = Figure(figsize=(4.6, 5.4), layout="constrained")
    figure.suptitle(f"{title}\nexpected calibration error {calibration.error:.2%}", fontsize=10)
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    filled = calibration.count > 0
    accuracy, confidence = calibration.accuracy[filled], calibration.confidence[filled]
    above.bar(centres[filled], accuracy, 0.94 * width, color="C0", label="accuracy")
    above.bar(
        centres[filled], confidence - accuracy, 0.94 * width, accuracy,
        color="none", edgecolor="C3", hatch="////", linewidth=0.6, label="to mean confidence",
    )  # fmt: skip
    above.plot([0, 1], [0, 1], color="0.4", linewidth=0.9, linestyle="--")
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="top-1 accuracy")
    above.legend(frameon=False, fontsize=8, loc="upper left")
    below.bar(centres, calibration.count / calibration.count.sum(), 0.94 * width, color="0.6")
    below.set(xlabel=f"confidence, {bins} bins", ylabel="images")
    for axis in (above.yaxis, above.xaxis, below.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def corruption_picture(errors: CorruptionErrors, path: Path, title: str) -> None:
    """Errors on ImageNet-C by corruption, beside AlexNet's, as a PNG."""
    names = errors.corruptions
    figure = Figure(figsize=(max(4.0, 0.5 * len(names) + 1.5), 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(names)), [errors.mean(name) for name in names], color="C0", label=title)
    known = [(i, ALEXNET_ERRORS[name]) for i, name in enumerate(names) if name in ALEXNET_ERRORS]
    if known:
        style = {"color": "black", "label": "AlexNet", "s": 260, "marker": "_"}
        axes.scatter(*zip(*known), **style)
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], rotation=90)
    axes.set(ylim=(0, 1), ylabel="top-1 error, mean over severities")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=2)
    save_png(figure, path)
