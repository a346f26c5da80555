"""`vitarium explain`: where a position of an image looks at every stage, and which heads matter.

With `--mixers`, which positions each mixer reads (`vitarium.cli.atlas`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vitarium.cli import atlas
from vitarium.cli.weights import add_weight_arguments, weights_of
from vitarium.train.data import InputConfig, read_image
from vitarium.train.explain import HeadImportance, head_importance
from vitarium.train.plots import explain_picture, head_importance_picture, most_contrast


class _Parser(ArgumentParser):
    """Leaves a command line with `--mixers` to the atlas, which takes no model and no image."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any
    ) -> Namespace:
        if args is None or "--mixers" not in args:
            return super().parse_args(args, *rest, **kwargs)
        other = atlas.parser()
        other.prog, other.exit_on_error = self.prog, False
        return other.parse_args(args, *rest, **kwargs)


def parser() -> ArgumentParser:
    parser = _Parser(
        description="Draw what a position of an image attends to at every stage of a model, and "
        "measure the importance of its heads: the size of the loss's derivative by a gate on the "
        "head (Michel et al., arXiv 1905.10650), mean over the images, for the model's own "
        "answers. `explain --mixers` instead draws which positions each mixer reads, and what it "
        "costs; `explain --mixers --help` says more."
    )
    add_weight_arguments(parser)
    parser.add_argument(
        "images", metavar="IMAGE", type=str, nargs="+",
        help="image files; the first is drawn, all serve to measure the heads",
    )  # fmt: skip
    parser.add_argument(
        "--position", metavar=("ROW", "COLUMN"), type=str, nargs=2, default=None,
        help="in the first image: pixels (12 40), or parts of its sides (0.3 0.75); by default "
        "where the image has most contrast",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="FILE.png", type=str, default="explain.png",
        help="the picture; one of the heads goes beside it, to FILE-heads.png; both are replaced",
    )  # fmt: skip
    return parser


def run(config: Namespace) -> None:
    if "mixers" in config:
        atlas.run(config)
        return
    output = Path(config.output)
    if output.suffix != ".png":
        raise ValueError(f"output={str(output)!r} must end in .png")
    if not output.parent.is_dir():
        raise ValueError(f"output={str(output)!r}: there is no folder {str(output.parent)!r}")
    images = [read_image(Path(path)) for path in config.images]
    loaded = weights_of(config)
    model, inputs, classes = loaded.model, loaded.inputs, loaded.classes
    transform = inputs.transform()
    pixels = torch.stack([torch.as_tensor(transform(image)) for image in images])
    if config.position is None:
        point = most_contrast(pixels[0])
    else:
        point = _point(config.position, images[0], inputs)
    normalized = inputs.normalize(pixels)
    explain_picture(config.model, model, pixels[0], normalized[:1], point, output, classes)
    console, written = Console(), [output]
    found = head_importance(model, normalized)
    if found:
        console.print(_table(found))
        written.append(output.with_name(f"{output.stem}-heads.png"))
        head_importance_picture(config.model, found, written[-1])
    else:
        console.print(f"{config.model} has no mixer of several heads with a projection of them")
    for path in written:
        console.print(f"written {path}", highlight=False, soft_wrap=True)


def _table(found: list[HeadImportance]) -> Table:
    table = Table(
        title="importance of heads", title_justify="left", box=box.SIMPLE_HEAD,
        collapse_padding=True, pad_edge=False,
        caption="|d loss / d gate| over its norm in the mixer; norm: how much the mixer matters",
    )  # fmt: skip
    table.add_column("mixer", overflow="fold")
    table.add_column("norm", justify="right")
    table.add_column("heads, first to last", overflow="fold")
    for mixer in found:
        heads = " ".join(f"{value:.2f}" for value in mixer.relative.tolist())
        table.add_row(mixer.name, f"{mixer.sensitivity.norm():.1e}", heads)
    return table


def _point(position: list[str], image: Image.Image, inputs: InputConfig) -> tuple[float, float]:
    """Where a position of an image file lies in what the model sees of it, as parts of its sides.

    Raises:
        ValueError: the position is malformed, or the model does not see it.
    """
    parts = []
    for text, name, length in zip(position, ("ROW", "COLUMN"), (image.height, image.width)):
        try:
            part = float(text) if "." in text else (int(text) + 0.5) / length
        except ValueError:
            part = -1.0
        if not 0 <= part < 1:
            raise ValueError(
                f"--position: {name}={text!r} is not in the image; allowed are 0 to {length - 1}, "
                "or a part such as 0.5, below 1"
            )
        parts.append(part)
    # The transform, whatever it crops, of an image whose colours are its coordinates.
    seen = inputs.transform()(_coordinates(image.height, image.width))
    distance = sum(
        (torch.as_tensor(seen)[i].float() / 255 - part).abs() for i, part in enumerate(parts)
    )
    assert isinstance(distance, Tensor)
    if distance.min() > 0.02:
        raise ValueError(
            f"--position {' '.join(position)}: the model crops this part of the image away; "
            "choose one nearer to the middle"
        )
    near = (distance <= distance.min() + 1e-3).nonzero().float().mean(0)
    return (
        float((near[0] + 0.5) / distance.shape[0]),
        float((near[1] + 0.5) / distance.shape[1]),
    )


def _coordinates(height: int, width: int) -> Image.Image:
    rows = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    columns = np.linspace(0, 255, width)[None].repeat(height, 0)
    return Image.fromarray(np.stack([rows, columns, 0 * rows], -1).round().astype(np.uint8))
