"""Pictures of a run: learning curves, and where a model looks in real images."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image
from torch import Tensor, nn

from vitarium.train.checkpoint import Description, write_atomic
from vitarium.train.data import read_image
from vitarium.train.explain import (
    HeadImportance,
    MixerView,
    attention_views,
    evenly,
    last_of_stages,
)


def save_png(figure: Figure, path: Path) -> None:
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def learning_curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss and accuracy over the epochs as a PNG.

    Args:
        records: one per epoch, as in a run's `metrics.jsonl`.
        path: the file to write.
    """
    save_png(curves_figure(records), path)


def curves_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and accuracy over the epochs, of records as in a run's `metrics.jsonl`."""
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
    return figure


@dataclasses.dataclass(frozen=True)
class Panel:
    """Where one mixer looks, drawn over the image.

    Attributes:
        title: above it.
        weights: `(H, W)` of its map, or None.
        query: row and column of the position that looks.
        note: what to say where there are no weights.
    """

    title: str
    weights: Tensor | None
    query: tuple[int, int]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class PanelRow:
    """A row of a picture of attention: an image, and panels over it.

    Attributes:
        label: to the left of the row.
        title: above the image.
        pixels: `(3, H, W)` of uint8.
        point: the position that looks, row and column as parts of height and width.
        panels: as many as in every other row; None leaves a place empty.
        colour: of the label.
    """

    label: str
    title: str
    pixels: Tensor
    point: tuple[float, float]
    panels: Sequence[Panel | None]
    colour: str = "black"


def draw_attention(rows: Sequence[PanelRow], title: str, path: Path) -> None:
    """A picture of attention as a PNG: rows of an image and of what mixers look at in it.

    Every panel is coloured by the weight over the panel's largest, on a scale by square roots that
    keeps small weights visible. A cross marks the position that looks, a box its token.
    """
    columns = 1 + max(len(row.panels) for row in rows)
    height, width = rows[0].pixels.shape[-2:]
    side = 1.9
    figure = Figure(
        figsize=(side * columns + 0.9, (side * height / width + 0.2) * len(rows) + 0.8),
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)  # type: ignore[union-attr]
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    panels = [panel for row in rows for panel in row.panels if panel is not None]
    lowest = -1 if any(p.weights is not None and p.weights.min() < 0 for p in panels) else 0
    for axes_row, row in zip(grid, rows):
        for axes in axes_row:
            axes.set(xticks=[], yticks=[])
            axes.set_box_aspect(row.pixels.shape[1] / row.pixels.shape[2])
        axes_row[0].imshow(row.pixels.permute(1, 2, 0).numpy(), extent=(0, 1, 1, 0), aspect="auto")
        axes_row[0].set_ylabel(row.label, fontsize=9, color=row.colour)
        axes_row[0].set_title(row.title, fontsize=8)
        _cross(axes_row[0], row.point)
        for axes, panel in zip(axes_row[1:], [*row.panels, *[None] * columns]):
            if panel is None:
                axes.set_axis_off()
            else:
                _draw_panel(axes, panel, row)
    bar = figure.colorbar(
        ScalarMappable(_scale(), _WEIGHTS), ax=grid, fraction=0.02, pad=0.01, aspect=30
    )
    bar.set_ticks([t for t in (-1, -0.5, -0.1, 0, 0.1, 0.25, 0.5, 1) if t >= lowest])
    bar.set_label("attention weight / largest of the panel", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.ax.set_ylim(lowest, 1)
    save_png(figure, path)


def _draw_panel(axes: Axes, panel: Panel, row: PanelRow) -> None:
    axes.set_title(panel.title, fontsize=8)
    grey = row.pixels.float().mean(0) / 255
    axes.imshow(
        0.3 + 0.6 * grey.numpy(), extent=(0, 1, 1, 0), cmap="gray", vmin=0, vmax=1, aspect="auto"
    )
    if panel.weights is None:
        axes.text(
            0.5, 0.5, textwrap.fill(panel.note, 26), ha="center", va="center", fontsize=7,
            bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0},
        )  # fmt: skip
        return
    relative = panel.weights / panel.weights.abs().max().clamp_min(1e-30)
    axes.imshow(relative.numpy(), extent=(0, 1, 1, 0), cmap=_WEIGHTS, norm=_scale(), aspect="auto")
    height, width = panel.weights.shape
    corner = (panel.query[1] / width, panel.query[0] / height)
    box = Rectangle(
        corner, 1 / width, 1 / height, fill=False, edgecolor="deepskyblue", linewidth=1.6
    )
    axes.add_patch(box)


def _cross(axes: Axes, point: tuple[float, float]) -> None:
    style = {"markersize": 9, "zorder": 5}
    axes.plot(point[1], point[0], "+", color="black", markeredgewidth=3.5, **style)
    axes.plot(point[1], point[0], "+", color="deepskyblue", markeredgewidth=1.8, **style)
    axes.set(xlim=(0, 1), ylim=(1, 0))


# From violet for the least weight over clear for none to orange for the largest.
_WEIGHTS = ListedColormap(
    [(0.45, 0.0, 0.85, 0.75 * i / 255) for i in range(255, 0, -1)]
    + [(1.0, 0.42, 0.0, 0.75 * i / 255) for i in range(256)]
)


def _scale() -> FuncNorm:
    """Signed square roots of weights from -1 to 1, whatever part of them is shown."""
    return FuncNorm(
        (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x)),
        vmin=-1,
        vmax=1,
    )


def attention_picture(
    model: nn.Module,
    description: Description,
    images: Sequence[Image.Image | Path],
    targets: Sequence[int],
    path: Path,
    columns: int = 4,
) -> None:
    """What a model attends to in real images, as a PNG: a row per image, a column per mixer.

    Every row looks from one token, that of the point of the image with the most contrast; weights
    are means over heads.

    Args:
        model: in evaluation mode, on the CPU.
        description: classes and input of the model, as `load_model` gives it.
        images: the images, or the paths of their files.
        targets: the index of the class of each.
        path: the file to write.
        columns: how many mixers to show at most, evenly chosen from first to last.
    """
    inputs, classes = description.input, description.classes
    transform = inputs.transform()
    rows = []
    for image, target in zip(images, targets):
        pixels = torch.as_tensor(transform(read_image(image)))
        point = most_contrast(pixels)
        logits, views = attention_views(model, inputs.normalize(pixels[None]), point)
        probability, answer = logits.softmax(-1)[0].max(-1)
        right = int(answer) == target
        rows.append(
            PanelRow(
                f"{classes[answer]}  {probability:.1%}"
                + ("" if right else f"  (is {classes[target]})"),
                "" if rows else "input, and its label",
                pixels,
                point,
                [_mean_panel(view, titled=not rows) for view in evenly(views, columns)],
                "black" if right else "firebrick",
            )
        )
    title = f"{description.model}: where one token (outlined) looks, mean over heads"
    draw_attention(rows, title, path)


def explain_picture(
    name: str,
    model: nn.Module,
    pixels: Tensor,
    image: Tensor,
    point: tuple[float, float],
    path: Path,
    classes: Sequence[str] | None = None,
    heads: int = 4,
) -> None:
    """What one position of an image attends to at every stage of a model, as a PNG.

    A column per stage, the last mixer of each; a row of means over heads, and rows of single heads.

    Args:
        name: of the model, for the title.
        model: in evaluation mode, on the CPU.
        pixels: `(3, H, W)` of uint8, the image as the model sees it.
        image: `(1, in_chans, H, W)`, the same, normalised.
        point: the position, row and column as parts of height and width, from 0 up to 1.
        path: the file to write.
        classes: names of the classes.
        heads: how many heads to show at most, evenly chosen from first to last.

    Raises:
        ValueError: the model has no mixer of ours.
    """
    logits, views = attention_views(model, image, point)
    probability, answer = logits.softmax(-1)[0].max(-1)
    label = f"class {int(answer)}" if classes is None else classes[int(answer)]
    shown = last_of_stages(model, views)
    rows = [
        PanelRow(
            "mean over heads",
            f"input: {label}, {probability:.1%}",
            pixels,
            point,
            [_mean_panel(view, titled=True) for view in shown],
        )
    ]
    counts = [0 if view.weights is None else len(view.weights) for view in shown]
    chosen = [evenly(range(count), heads) for count in counts]
    for i in range(max(map(len, chosen))):
        panels = [
            _head_panel(view, which[i]) if i < len(which) else None
            for view, which in zip(shown, chosen)
        ]
        rows.append(PanelRow("single head", "", pixels, point, panels))
    draw_attention(rows, f"{name}: where one position (marked) looks at every stage", path)


def _mean_panel(view: MixerView, titled: bool) -> Panel:
    size = f"{view.size[0]} x {view.size[1]} tokens"
    title = f"{view.name.removesuffix('.mixer')}\n{size}"
    weights = None if view.weights is None else view.weights.mean(0)
    if weights is not None:
        title += f", largest {weights.abs().max():.1%}" + (f"\n{view.note}" if view.note else "")
    return Panel(title if titled else "", weights, view.query, view.note)


def _head_panel(view: MixerView, head: int) -> Panel:
    assert view.weights is not None
    weights = view.weights[head]
    title = f"head {head + 1} of {len(view.weights)}, largest {weights.abs().max():.1%}"
    return Panel(title, weights, view.query)


def head_importance_picture(name: str, found: Sequence[HeadImportance], path: Path) -> None:
    """Bars of the importance of the heads of every mixer, as a PNG: a row per stage.

    Args:
        name: of the model, for the title.
        found: what `head_importance` returns.
        path: the file to write.
    """
    stages: dict[str, list[HeadImportance]] = {}
    for mixer in found:
        stages.setdefault(mixer.name.rpartition("blocks.")[0].rstrip("."), []).append(mixer)
    if all(len(mixers) == 1 for mixers in stages.values()):  # stages of one block: one row
        stages = {"": list(found)}
    bars = max(sum(len(m.sensitivity) + 1 for m in mixers) for mixers in stages.values())
    figure = Figure(
        figsize=(min(16, max(6, 0.12 * bars + 1.5)), 1.7 * len(stages) + 0.8), layout="constrained"
    )
    figure.suptitle(
        f"{name}: importance of heads, a bar each\n|d loss / d gate|, over its norm in the mixer",
        fontsize=10,
    )
    grid = figure.subplots(len(stages), squeeze=False)[:, 0]
    for axes, (stage, mixers) in zip(grid, stages.items()):
        place, ticks = 0.0, []
        for number, mixer in enumerate(mixers):
            heads = np.arange(len(mixer.sensitivity))
            axes.bar(place + heads, mixer.relative.numpy(), width=0.85, color=f"C{number % 2}")
            ticks.append(place + heads.mean())
            place += len(heads) + 1
        names = [m.name.removesuffix(".mixer").removeprefix(f"{stage}.") for m in mixers]
        slanted = {"rotation": 45, "ha": "right"} if len(names) > 6 else {}
        axes.set_xticks(ticks, names, **slanted)
        axes.set(ylim=(0, 1), ylabel="importance", xlim=(-1, bars))
        axes.set_title(stage, fontsize=8, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    save_png(figure, path)


def most_contrast(pixels: Tensor, cells: int = 8) -> tuple[float, float]:
    """The middle of the cell of an 8x8 grid that differs most from the image's median.

    Args:
        pixels: `(3, H, W)`.
        cells: of the grid, along each axis.

    Returns:
        Row and column as parts of height and width.
    """
    grey = pixels.float().mean(0)[None, None]
    grid = F.adaptive_avg_pool2d((grey - grey.median()).abs(), cells)
    row, column = divmod(int(grid.flatten().argmax()), cells)
    return (row + 0.5) / cells, (column + 0.5) / cells
