"""Answers of a model on held-out images, during training and of saved weights: the same code."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from vitarium.train.data import ImageData, InputConfig, Samples, Split, batches, create_loader
from vitarium.train.images import BrokenImages
from vitarium.train.metrics import Evaluation, Predictions


def precision_here(device: str, precision: str) -> str:
    """The precision, or "no" for "fp16" where there is only a CPU, as after training on a GPU."""
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    return "no" if precision == "fp16" and on_cpu else precision


def create_accelerator(device: str, precision: str) -> Accelerator:
    """Accelerate's view of the device ("auto" or "cpu"), the processes and the precision.

    Raises:
        ValueError: "fp16" on a CPU, which accelerate would silently compute in float32.
    """
    if precision_here(device, precision) != precision:
        raise ValueError(f"{precision=} needs a GPU; allowed on a CPU are 'no' and 'bf16'")
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


class NumberedSamples(Samples):
    """Transformed images, each with its place in the data set instead of its class.

    So every answer is known to belong to an image, however images are shared out and read.
    """

    def __init__(
        self, split: Split, transform: Callable[[Image.Image], Any], broken: BrokenImages
    ) -> None:
        super().__init__(Split(split.images, range(len(split.targets))), transform, broken)
        self.targets = np.asarray(split.targets, dtype=np.int64)


def held_out_loader(
    data: ImageData, inputs: InputConfig, batch_size: int, workers: int, accelerator: Accelerator
) -> DataLoader[Any]:
    """The held-out images in batches; over all processes, each image is in exactly one."""
    return numbered_loader(data.held_out, data.broken, inputs, batch_size, workers, accelerator)


def numbered_loader(
    split: Split,
    broken: BrokenImages,
    inputs: InputConfig,
    batch_size: int,
    workers: int,
    accelerator: Accelerator,
) -> DataLoader[Any]:
    """The images of `split` in batches; over all processes, each image is in exactly one."""
    samples = NumberedSamples(split, inputs.transform(), broken)
    part = range(accelerator.process_index, len(samples), accelerator.num_processes)
    return create_loader(samples, workers, batch_size=batch_size, sampler=part)


@torch.no_grad()
def score(
    model: nn.Module,
    loader: DataLoader[Any],
    inputs: InputConfig,
    accelerator: Accelerator,
    before_batch: Callable[[], None] = lambda: None,
    columns: Sequence[int] | None = None,
) -> Evaluation:
    """Evaluate `model` on `loader`, which `held_out_loader` or `numbered_loader` made.

    Args:
        model: on the accelerator's device; it is left in evaluation mode.
        loader: the held-out images.
        inputs: how the model takes them.
        accelerator: device, precision and processes.
        before_batch: called before every batch; may raise to stop.
        columns: which of the logits are those of the classes of `loader`; None for all.

    Returns:
        The same in every process, and whatever their number.

    Raises:
        BrokenDataError: more images than `source.max_broken` allows cannot be read.
        ValueError: there is none that can be read.
    """
    model.eval()
    targets = loader.dataset.targets  # type: ignore[attr-defined]
    chosen = None if columns is None else torch.tensor(columns, device=accelerator.device)
    parts: list[Predictions] = []
    num_classes, times = 0, list[tuple[int, float]]()
    for images, places in batches(loader, accelerator.device):
        before_batch()
        start = time.perf_counter()
        with accelerator.autocast():
            logits = model(inputs.normalize(images))
        if chosen is not None:
            logits = logits[:, chosen]
        index = places.cpu().numpy()
        parts.append(Predictions.from_logits(logits, targets[index], index))  # waits for the device
        times.append((len(index), time.perf_counter() - start))
        num_classes = logits.shape[-1]
    timed = times[1:] or times  # the first batch warms up, if there is another
    rates = [sum(count for count, _ in timed) / sum(s for _, s in timed)] if timed else []
    counts = [num_classes]
    if accelerator.num_processes > 1:  # a process may have had no image
        parts, rates, counts = map(gather_object, (parts, rates, counts))
    if not parts:
        raise ValueError(f"none of the {len(targets)} held-out images can be read")
    predictions = Predictions.joined(parts)
    broken = len(targets) - len(predictions)
    return Evaluation(predictions, max(counts), broken, sum(rates))
