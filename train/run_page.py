"""A run on one HTML page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

import base64
import functools
import importlib.resources
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from vitarium.train import environment
from vitarium.train.checkpoint import write_text
from vitarium.train.config import TrainConfig
from vitarium.train.data import ImageData, InputConfig
from vitarium.train.evaluation_plots import confusion_figure, display_name, reliability_figure
from vitarium.train.images import read_image
from vitarium.train.metrics import Evaluation, calibration, class_table, confusion
from vitarium.train.plots import curves_figure

_MISTAKES = 24  # that are shown
_THUMBNAIL = 96  # pixels along a side
PAGE = "report.html"


@dataclass(frozen=True)
class RunFacts:
    """What a run is, apart from its figures.

    Attributes:
        folder: of the run.
        config: the resolved configuration.
        data: images and classes.
        inputs: size and normalisation of the images.
        parameters: of the model.
        device: "cuda", "cpu", ...
        processes: that train together.
    """

    folder: Path
    config: TrainConfig
    data: ImageData
    inputs: InputConfig
    parameters: int
    device: str
    processes: int

    def environment(self) -> dict[str, str]:
        """Versions, processor and commit, by name."""
        return {
            "processor": environment.processor(self.device),
            "device": f"{self.device}, {self.processes} process(es)",
            **environment.versions(),
            "commit": environment.commit() or "installed package, commit unknown",
        }

    def sizes(self) -> dict[str, str]:
        """What is trained on what, in a few lines."""
        height, width = self.inputs.image_size
        return {
            "model": f"{self.config.model}, {self.parameters:,} parameters",
            "data": self.config.data,
            "training images": f"{len(self.data.train.targets):,}",
            "held-out images": f"{len(self.data.held_out.targets):,}",
            "classes": f"{len(self.data.classes):,}",
            "input": f"{height}x{width} pixels, crop_pct {self.inputs.crop_pct:g}, "
            f"{self.inputs.interpolation}",
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values: the configuration's keys, and the facts beside them."""
        import yaml

        return {
            **yaml.safe_load(self.config.to_yaml()),
            "environment": self.environment(),
            "sizes": self.sizes(),
        }


def best_record(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The record of the epoch that did best on the held-out images: the first of equal ones."""
    return max(history, key=lambda record: (record["correct"], -record["loss"]))


def write_run_page(
    facts: RunFacts, history: Sequence[Mapping[str, Any]], evaluation: Evaluation | None
) -> None:
    """Write `report.html` into the run's folder, whole or not at all.

    Args:
        facts: what the run is.
        history: a record per epoch, at least one.
        evaluation: answers on the held-out images after the last epoch. Without them, in a run that
            is resumed at its end, a page of the same step stays as it is.
    """
    path = facts.folder / PAGE
    if evaluation is None and _step_of(path) == history[-1]["step"]:
        return
    values: dict[str, Any] = {
        "title": facts.folder.resolve().name,
        "step": history[-1]["step"],
        "last": history[-1],
        "best": best_record(history),
        "epochs": facts.config.epochs,
        "sizes": facts.sizes(),
        "curves": _svg(curves_figure(history)),
        "config": facts.config.to_yaml(),
        "environment": facts.environment(),
    }
    if evaluation is not None:
        predictions, classes = evaluation.predictions, facts.data.classes
        rows = class_table(predictions, classes)
        values |= {
            "classes": sorted(rows, key=lambda row: row["accuracy"]),
            "display_name": display_name,
            "confusion": _png(confusion_figure(confusion(predictions, len(classes)), classes, "")),
            "reliability": _svg(reliability_figure(calibration(predictions), "")),
            "mistakes": mistakes(facts, evaluation),
            "wrong": evaluation.total - evaluation.correct,
        }
    write_text(path, _page().render(values))


def read_template(name: str) -> str:
    """The text of a template of this package."""
    folder = importlib.resources.files("vitarium.train") / "templates"
    return (folder / name).read_text(encoding="utf-8")


def html_environment() -> jinja2.Environment:
    """What pages are made with: all values are escaped, and one that is missing is an error."""
    return jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )


@functools.cache
def _page() -> jinja2.Template:
    return html_environment().from_string(read_template("report.html"))


def _step_of(path: Path) -> int | None:
    """The step after which a page was written; None if there is no page."""
    if not path.is_file():
        return None
    with open(path, encoding="utf-8") as file:
        found = re.search(r'data-step="(\d+)"', file.read(500))
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Mistake:
    """A held-out image that was taken for another class.

    Attributes:
        picture: the image as the model saw it, as a `data:` address.
        name: the class.
        taken_for: the other one.
        confidence: that it is the other one, from 0 to 1.
    """

    picture: str
    name: str
    taken_for: str
    confidence: float


def mistakes(facts: RunFacts, evaluation: Evaluation) -> list[Mistake]:
    """The mistakes that the model was most sure of."""
    predictions, classes = evaluation.predictions, facts.data.classes
    wrong = np.flatnonzero(~predictions.hits[:, 0])
    order = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:_MISTAKES]
    transform, found = facts.inputs.transform(), []
    for i in order:
        try:
            image = read_image(facts.data.held_out.images[int(predictions.index[i])])
        except (OSError, ValueError):
            continue  # gone since it was evaluated: the others still tell something
        pixels = torch.as_tensor(transform(image)).permute(1, 2, 0).numpy()
        found.append(
            Mistake(
                _thumbnail(Image.fromarray(pixels)),
                display_name(classes[predictions.target[i]]),
                display_name(classes[predictions.top[i, 0]]),
                float(predictions.confidence[i]),
            )
        )
    return found


def _thumbnail(image: Image.Image) -> str:
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return _address("image/jpeg", buffer.getvalue())


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return _address("image/png", buffer.getvalue())


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _svg(figure: Figure) -> str:
    """The figure as an `<svg>` element in the page's own colours: black becomes the text's."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vitarium"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")
