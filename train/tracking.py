"""Records of a run for people: TensorBoard, Weights & Biases, pictures, a page and a model card.

    RUN/tensorboard/   the figures of every epoch, for `tensorboard --logdir RUN`
    RUN/curves.png     loss and accuracy over the epochs
    RUN/report.html    all about the run on one page (`vitarium.train.run_page`)
    RUN/README.md      the model card (`vitarium.train.model_card`)

`metrics.jsonl` is the truth; all of this is made from it. So a resumed run shows every point once
and none is missing, wherever the process before it was killed.
"""

from __future__ import annotations

import gc
import importlib
import logging
import math
import platform
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from vitarium.train.checkpoint import write_text
from vitarium.train.config import ConfigError
from vitarium.train.metrics import Evaluation
from vitarium.train.model_card import write_model_card
from vitarium.train.plots import learning_curves
from vitarium.train.run_page import RunFacts, write_run_page

_LOG = logging.getLogger("vitarium.train")
_REDRAW_SECONDS = 60.0  # pictures and the page are drawn anew at most this often while training
_NO_FIGURES = ("epoch", "step", "correct", "total")  # of a record: place, and what others are of
_GROUPS = {
    "train_loss": "loss/train",
    "loss": "loss/held_out",
    "accuracy": "accuracy/held_out",
    "accuracy_top5": "accuracy/held_out_top5",
    "calibration_error": "calibration_error/held_out",
}

Record = Mapping[str, Any]


class _Writer(Protocol):
    """A place that figures go to."""

    def add(self, record: Record) -> None:
        """The figures of one epoch."""

    def close(self) -> None:
        """After the last one."""


class Tracker:
    """Keeps the records of a run; a context, at whose end they are complete.

    Args:
        facts: what the run is.
        history: records of the epochs until now, as in `metrics.jsonl`.
        enabled: whether this process is the one that writes.

    Raises:
        ConfigError: tracking="wandb", but Weights & Biases is not installed.
    """

    def __init__(self, facts: RunFacts, history: Sequence[Record], *, enabled: bool) -> None:
        self.facts, self.history, self.enabled = facts, list(history), enabled
        self.evaluation: Evaluation | None = None
        self.writers: list[_Writer] = []
        self.drawn = time.monotonic()

    def __enter__(self) -> Tracker:
        if self.enabled:
            facts = self.facts
            self.writers.append(_TensorBoard(facts.folder / "tensorboard", self.history))
            if facts.config.tracking == "wandb":
                self.writers.append(_WeightsAndBiases(facts, self.history))
        return self

    def epoch(self, record: Record, evaluation: Evaluation | None) -> None:
        """After an epoch: its figures, and what the model took the held-out images for."""
        self.history.append(record)
        self.evaluation = evaluation
        for writer in self.writers:
            writer.add(record)
        if self.enabled and time.monotonic() - self.drawn > _REDRAW_SECONDS:
            self._draw()
            self.drawn = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        del rest  # holds the frames of the loop
        try:
            if self.enabled and self.history:
                self._draw()
                write_model_card(self.facts, self.history)
            for writer in self.writers:
                writer.close()
        except OSError as error:
            if kind is None:
                raise
            _LOG.error(
                "the run's records are not up to date: %s", error
            )  # what failed first counts

    def _draw(self) -> None:
        learning_curves(self.history, self.facts.folder / "curves.png")
        write_run_page(self.facts, self.history, self.evaluation)
        # Matplotlib's layout leaves cycles that hold the frames of its callers, down to the loop's:
        # its loaders would live on, and at exit wait forever for workers that nobody has told.
        gc.collect()


def figures(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of a record that are worth a curve, by name; those that are none are left out."""
    for key, value in record.items():
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        if known and key not in _NO_FIGURES and math.isfinite(value):
            yield _GROUPS.get(key, f"run/{key}"), float(value)


class _TensorBoard:
    """An event file, written anew from the history when a run goes on.

    Appending would leave the points of repeated epochs twice in the files, or, after a kill, lack
    those that were not flushed. It is written at once and not by torch's `SummaryWriter`, whose
    thread does not go well with the worker processes that loaders fork.
    """

    _SUFFIX = ".vitarium"

    def __init__(self, folder: Path, history: Sequence[Record]) -> None:
        folder.mkdir(exist_ok=True)
        for path in folder.glob(f"events.out.tfevents.*{self._SUFFIX}"):
            path.unlink()
        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}{self._SUFFIX}"
        self.file = open(folder / name, "wb")  # noqa: SIM115  closed by `close`
        self.writer = RecordWriter(self.file)
        now, last = time.time(), history[-1]["seconds"] if history else 0.0
        self._write(now, file_version="brain.Event:2")
        if history:  # a TensorBoard that is looking on forgets what it has read
            self._write(now, session_log=SessionLog(status=SessionLog.START))
        for record in history:  # on the clock of the training, without the pauses
            self._write_figures(record, now - (last - record["seconds"]))
        self.file.flush()

    def add(self, record: Record) -> None:
        self._write_figures(record, time.time())
        self.file.flush()

    def _write_figures(self, record: Record, wall_time: float) -> None:
        values = [scalar(name, value).value[0] for name, value in figures(record)]
        self._write(wall_time, step=record["step"], summary=Summary(value=values))

    def _write(self, wall_time: float, **content: Any) -> None:
        self.writer.write(Event(wall_time=wall_time, **content).SerializeToString())

    def close(self) -> None:
        self.file.close()


class _WeightsAndBiases:
    """A run of wandb that goes on under its identity; project and entity are those of its settings.

    Its service takes no second point of a step, so only those it has not are sent.
    """

    def __init__(self, facts: RunFacts, history: Sequence[Record]) -> None:
        wandb = import_wandb()
        identity = facts.folder / "wandb.id"
        if not identity.exists():
            write_text(identity, uuid.uuid4().hex[:12])
        self.run = wandb.init(
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",
            name=facts.folder.resolve().name,
            dir=str(facts.folder),
            config=facts.to_dict(),
        )
        for record in history:
            self.add(record)

    def add(self, record: Record) -> None:
        if record["step"] >= self.run.step:
            values = dict(figures(record)) | {"epoch": record["epoch"]}
            self.run.log(values, step=record["step"])

    def close(self) -> None:
        self.run.finish()


def import_wandb() -> Any:
    """The package of Weights & Biases.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ConfigError(
            "tracking='wandb' needs the package wandb: pip install wandb, or leave tracking out"
        ) from None
