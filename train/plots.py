"""Pictures of a run: learning curves, and where a model looks in real images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image
from torch import Tensor, nn

from vitarium.ops import Mixer
from vitarium.train.checkpoint import Description, write_atomic
from vitarium.train.data import read_image


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


@torch.no_grad()
def attention_maps(
    model: nn.Module, image: Tensor, point: tuple[float, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Where each mixer of a model looks from one point of an image.

    Args:
        model: any model with mixers that have attention weights.
        image: `(1, in_chans, H, W)`, normalised.
        point: row and column as parts of height and width, from 0 up to 1.

    Returns:
        The logits `(1, num_classes)`, and by name of the mixer, in the order of their use, the
        weights of all tokens of its map, `(H', W')`, averaged over its heads.

    Raises:
        ValueError: no mixer of the model has attention weights.
    """
    seen: dict[str, tuple[Mixer, Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, Mixer):

            def keep(mixer: Mixer, inputs: tuple[Tensor], name: str = name) -> None:
                seen[name] = mixer, inputs[0]

            hooks.append(module.register_forward_pre_hook(keep))
    try:
        logits = model(image)
    finally:
        for hook in hooks:
            hook.remove()
    maps = {}
    for name, (mixer, x) in seen.items():
        position = (int(point[0] * x.shape[1]), int(point[1] * x.shape[2]))
        try:
            maps[name] = mixer.attention_map(x, position)[0].float().mean(0)
        except NotImplementedError:
            continue
    if not maps:
        raise ValueError(f"no mixer of {type(model).__name__} has attention weights to show")
    return logits, maps


def attention_picture(
    model: nn.Module,
    description: Description,
    images: Sequence[Image.Image | Path],
    targets: Sequence[int],
    path: Path,
    columns: int = 4,
) -> None:
    """What a model attends to in real images, as a PNG: a row per image, a column per mixer.

    Every row looks from one token, that of the point of the image with the most contrast.

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
    for image in images:
        pixels = torch.as_tensor(transform(read_image(image)))[None]
        point = _most_contrast(pixels)
        rows.append((pixels[0], point, *attention_maps(model, inputs.normalize(pixels), point)))
    names = list(rows[0][3])
    if len(names) > columns:
        names = [names[round(i * (len(names) - 1) / (columns - 1))] for i in range(columns)]
    figure = Figure(
        figsize=(1.75 * (len(names) + 1), 1.62 * len(rows) + 0.95), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)  # type: ignore[union-attr]
    figure.suptitle(
        f"{description.model}: where one token (outlined) looks; "
        "orange is the attention weight, mean over heads",
        fontsize=11,
    )
    grid = figure.subplots(len(rows), len(names) + 1, squeeze=False)
    for axes_row, (pixels, point, logits, maps), target in zip(grid, rows, targets):
        probability, answer = logits.softmax(-1)[0].max(-1)
        right = int(answer) == target
        text = f"{classes[answer]}  {probability:.1%}" + (
            "" if right else f"  (is {classes[target]})"
        )
        background = pixels.permute(1, 2, 0).numpy()
        for axes, name in zip(axes_row, [None, *names]):
            axes.imshow(background, extent=(0, 1, 1, 0), aspect="auto")
            axes.set(xticks=[], yticks=[])
            axes.set_box_aspect(pixels.shape[1] / pixels.shape[2])
            if name is not None:
                _overlay(axes, maps[name], point)
        axes_row[0].set_ylabel(text, fontsize=9, color="black" if right else "firebrick")
    grid[0][0].set_title("input, and its label", fontsize=9)
    for axes, name in zip(grid[0][1:], names):
        height, width = rows[0][3][name].shape
        axes.set_title(f"{name.removesuffix('.mixer')}\n{height} x {width} tokens", fontsize=8)
    _save(figure, path)


_WEIGHTS = ListedColormap([(1.0, 0.45, 0.0, 0.85 * i / 255) for i in range(256)])  # clear to orange


def _overlay(axes: Axes, weights: Tensor, point: tuple[float, float]) -> None:
    """Weights of the tokens over an image that fills the unit square, and the token at `point`."""
    relative = (weights / weights.max()).sqrt()  # the root keeps small weights visible
    axes.imshow(relative.numpy(), extent=(0, 1, 1, 0), cmap=_WEIGHTS, vmin=0, vmax=1, aspect="auto")
    height, width = weights.shape
    corner = (int(point[1] * width) / width, int(point[0] * height) / height)
    box = Rectangle(
        corner, 1 / width, 1 / height, fill=False, edgecolor="deepskyblue", linewidth=1.8
    )
    axes.add_patch(box)


def _most_contrast(pixels: Tensor, cells: int = 8) -> tuple[float, float]:
    """The middle of the cell of an 8x8 grid that differs most from the image's median.

    Args:
        pixels: `(1, 3, H, W)`.
        cells: of the grid, along each axis.

    Returns:
        Row and column as parts of height and width.
    """
    grey = pixels.float().mean(1, keepdim=True)
    grid = F.adaptive_avg_pool2d((grey - grey.median()).abs(), cells)
    row, column = divmod(int(grid.flatten().argmax()), cells)
    return (row + 0.5) / cells, (column + 0.5) / cells
