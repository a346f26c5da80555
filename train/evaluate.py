"""Accuracy on held-out images, during training and of a saved checkpoint: the same code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader

from vitarium.train.checkpoint import find_checkpoint, load_model
from vitarium.train.data import ImageData, InputConfig, Samples, batches, create_loader, load_data


@dataclass(frozen=True)
class Evaluation:
    """Figures of one pass over the held-out images.

    Args:
        correct: images whose most probable class is theirs.
        total: images seen, which are those that can be read.
        loss: mean cross-entropy in nats.
        broken: images that cannot be read; they are in none of the other figures.
    """

    correct: int
    total: int
    loss: float
    broken: int = 0

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy, from 0 to 1."""
        return self.correct / self.total

    def to_record(self) -> dict[str, Any]:
        """The figures by name, as they are written to files."""
        return {**dataclasses.asdict(self), "accuracy": self.accuracy}


def create_accelerator(device: str, precision: str) -> Accelerator:
    """Accelerate's view of the device ("auto" or "cpu"), the processes and the precision."""
    # Accelerate keeps one state per process and refuses another precision or device after that.
    if AcceleratorState._shared_state:
        state = AcceleratorState()
        if state.mixed_precision != precision or (state.device.type == "cpu") != (device == "cpu"):
            AcceleratorState._reset_state(reset_partial_state=state.num_processes == 1)
    return Accelerator(cpu=device == "cpu", mixed_precision=precision)


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Within the block, torch uses `count` CPU threads; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def held_out_loader(
    data: ImageData, inputs: InputConfig, batch_size: int, workers: int, accelerator: Accelerator
) -> DataLoader[Any]:
    """The held-out images in batches; over all processes, each image is in exactly one."""
    samples = Samples(data.held_out, inputs.transform(), data.broken)
    part = range(accelerator.process_index, len(samples), accelerator.num_processes)
    return create_loader(samples, workers, batch_size=batch_size, sampler=part)


@torch.no_grad()
def score(
    model: nn.Module,
    loader: DataLoader[Any],
    inputs: InputConfig,
    accelerator: Accelerator,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate `model` on `loader`, which `held_out_loader` made.

    Args:
        model: on the accelerator's device; it is left in evaluation mode.
        loader: the held-out images.
        inputs: how the model takes them.
        accelerator: device, precision and processes.
        before_batch: called before every batch; may raise to stop.

    Raises:
        BrokenDataError: more images than `source.max_broken` allows cannot be read.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # correct, total, loss, this process's share
    sums[3] = len(loader.sampler)  # type: ignore[arg-type]
    for images, targets in batches(loader, accelerator.device):
        before_batch()
        with accelerator.autocast():
            logits = model(inputs.normalize(images))
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        correct = (logits.argmax(-1) == targets).sum()
        sums[:3] += torch.tensor([correct.item(), len(targets), loss.item()], dtype=torch.float64)
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.float().to(accelerator.device), "sum").double().cpu()
    correct, total, loss, share = sums.tolist()
    if total == 0:
        raise ValueError(f"none of the {int(share)} held-out images can be read")
    return Evaluation(int(correct), int(total), loss / total, broken=int(share - total))


def evaluate(
    checkpoint: Path | str,
    *,
    data: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str | None = None,
) -> Evaluation:
    """Evaluate a checkpoint on held-out images, by default those of its own training run.

    Args:
        checkpoint: a `.safetensors` file that training wrote, or a run's folder (its best one).
        data, batch_size, workers, device: as in `TrainConfig`; those of the run if None.

    Raises:
        FileNotFoundError: the checkpoint or the data are missing.
        ValueError: the checkpoint or the data are unusable, or their classes differ.
    """
    model, description = load_model(checkpoint)
    config = description.config
    images = load_data(config.data, config.source) if data is None else load_data(data)
    if images.classes != description.classes:
        raise ValueError(
            f"the data have the classes {', '.join(images.classes)}, but the checkpoint "
            f"{checkpoint} was trained on {', '.join(description.classes)}"
        )
    accelerator = create_accelerator(device or config.device, config.precision)
    loader = held_out_loader(
        images,
        description.input,
        batch_size or config.batch_size,
        config.workers if workers is None else workers,
        accelerator,
    )
    with torch_threads(config.threads):
        return score(model.to(accelerator.device), loader, description.input, accelerator)


def record_evaluation(checkpoint: Path | str, data: str | None, evaluation: Evaluation) -> Path:
    """Append the figures to `evaluations.jsonl` beside the checkpoint; returns its path."""
    path = find_checkpoint(checkpoint)
    record = {"checkpoint": path.name, "data": data, **evaluation.to_record()}
    log = path.parent / "evaluations.jsonl"
    with open(log, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return log
