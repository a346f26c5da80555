"""Images and labels for training and evaluation, in an order that depends on nothing but the seed.

Nothing random carries over from one batch to the next. The order of an epoch is a function of
(seed, epoch), the variation of an image of (seed, epoch, image), and what the training step draws
(dropout, Mixup) of (seed, step): all of it is the same whichever process reads an image, and
whether or not the run was interrupted before.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from multiprocessing.sharedctypes import RawValue
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from vitarium.train.config import AugmentConfig
from vitarium.train.images import Broken, BrokenImages, image_name, read_image
from vitarium.train.sources import ImageData, Split, digit_image, load_data

# What is used with the loaders comes from here, whichever file it is in.
__all__ = [
    "EpochBatches",
    "ImageData",
    "InputConfig",
    "Samples",
    "Split",
    "available_cores",
    "batches",
    "create_loader",
    "digit_image",
    "finishing",
    "load_data",
    "random_erasing",
    "read_image",
    "seed_all",
    "start_worker",
]

ORDER, IMAGE, STEP, OTHER = range(4)  # what a seed is for; see `seed_all`
_ATTEMPTS = 100  # images that are tried in the place of a broken one


@dataclass(frozen=True)
class InputConfig:
    """What a model's input looks like; saved with its weights.

    Args:
        image_size: height and width in pixels.
        mean, std: of the normalisation, one per channel, for values from 0 to 1.
        interpolation: how images are resized.
        crop_pct: part of the shorter side that evaluation sees.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    def transform(self, augment: AugmentConfig | None = None) -> Callable[[Image.Image], Any]:
        """From an image to `(3, H, W)` of uint8: varied if `augment` is given, else centred."""
        random_choices: dict[str, Any] = {}
        if augment is not None:
            random_choices = {
                "scale": tuple(augment.scale),
                "ratio": tuple(augment.ratio),
                "hflip": augment.hflip,
                "color_jitter": augment.color_jitter or None,
                "auto_augment": augment.auto_augment,
            }
        transform: Any = create_transform(
            self.image_size,
            is_training=augment is not None,
            interpolation=self.interpolation if augment is None else "random",
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            use_prefetcher=True,  # uint8: `normalize` finishes on the device, for the whole batch
            **random_choices,
        )
        if augment is None or augment.rotation == 0:
            return transform
        bilinear = transforms.InterpolationMode.BILINEAR
        return transforms.Compose(
            [transforms.RandomRotation(augment.rotation, interpolation=bilinear), transform]
        )

    def normalize(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` of uint8 as the model takes them."""
        mean, std = (images.new_tensor(v, dtype=torch.float32) * 255 for v in (self.mean, self.std))
        return (images - mean[:, None, None]) / std[:, None, None]


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's; of no bits a black image, as before Pillow 13, which raises."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep)


# RandAugment keeps no bits at its highest magnitude, which the recipes of most papers reach.
for _name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    auto_augment.NAME_TO_OP[_name] = _posterize


def random_erasing(augment: AugmentConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Erases rectangles of normalised images, as NAT's and most recipes do: noise per pixel."""
    return RandomErasing(augment.random_erasing, mode="pixel", device=str(device))


def seed_all(*numbers: int) -> None:
    """Set the state of every global random generator as a function of `numbers`.

    Convention: (seed, one of ORDER, IMAGE, STEP and OTHER, further numbers): uses do not meet.
    """
    seed = _seed_cpu(*numbers)
    if torch.accelerator.is_available():
        torch.manual_seed(
            seed
        )  # looks at every kind of accelerator, which takes half a millisecond


def _seed_cpu(*numbers: int) -> int:
    """`seed_all` without accelerators, which is several times as fast; returns the seed."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


class Sample(NamedTuple):
    """A transformed image with its class; None if it is broken and nothing stands in for it.

    `broken` are the images that were tried before it and could not be read. They are returned,
    because what a worker process raises or logs is lost.
    """

    image: Any
    target: int
    broken: tuple[Broken, ...] = ()


class Samples(Dataset[Sample]):
    """Transformed images by index, or by (index, *numbers), which then seed the transform.

    Another image stands in for one that cannot be read where numbers are given, which is when
    training: the same one whenever index and numbers are the same.

    Args:
        split: the images.
        transform: from an image in RGB to an array.
        broken: takes note of what cannot be read, and stops the run if it is too much.
    """

    def __init__(
        self,
        split: Split,
        transform: Callable[[Image.Image], Any],
        broken: BrokenImages | None = None,
    ) -> None:
        self.split = split
        self.transform = transform
        self.broken = BrokenImages() if broken is None else broken

    def __len__(self) -> int:
        return len(self.split.targets)

    def __getitem__(self, key: int | tuple[int, ...]) -> Sample:
        index, *numbers = (key,) if isinstance(key, int) else key
        broken: list[Broken] = []
        for chosen in self._candidates(index, numbers):
            image = self.split.images[chosen]
            try:
                read = read_image(image)
            except (OSError, ValueError) as error:
                broken.append(Broken(image_name(image, chosen), str(error)))
                continue
            if numbers:
                _seed_cpu(*numbers, index)
            return Sample(self.transform(read), self.split.targets[chosen], tuple(broken))
        return Sample(None, -1, tuple(broken))

    def _candidates(self, index: int, numbers: Sequence[int]) -> Iterator[int]:
        """The image to read, and those that are tried one after another if it is broken."""
        yield index
        if numbers:
            seed, *rest = numbers
            draw = np.random.default_rng((seed, OTHER, *rest, index))
            for _ in range(_ATTEMPTS):
                yield int(draw.integers(len(self)))


class EpochBatches(Sampler[list[tuple[int, ...]]]):
    """The batches of one epoch as keys of `Samples`, from any batch on.

    The order is a function of (seed, epoch). A batch of all processes together is a run of the
    order, of which each process takes its part; images that fill no batch are left out.

    With `repeats`, the order has every image that often in a row, varied each time anew, and the
    processes take turns, so that they see different variations (as timm's `RepeatAugSampler`). An
    epoch has as many images as without, of which fewer differ.

    Args:
        length: number of images.
        batch_size: images per process.
        seed: of the order.
        process, processes: which process this is, of how many.
        repeats: how often an image comes in an epoch that has it.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
        repeats: int = 1,
    ) -> None:
        if length < batch_size * processes:
            raise ValueError(
                f"batch_size={batch_size} on {processes} process(es) exceeds the {length} "
                "training images"
            )
        if repeats < 1:
            raise ValueError(f"repeats={repeats} is not allowed; it must be at least 1")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.process, self.processes, self.repeats = process, processes, repeats
        self.epoch, self.first = 0, 0

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.processes)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        order = np.random.default_rng((self.seed, ORDER, self.epoch)).permutation(self.length)
        for batch in range(self.first, len(self)):
            start = batch * self.processes * self.batch_size
            if self.repeats == 1:
                start += self.process * self.batch_size
                part = order[start : start + self.batch_size].tolist()
                yield [(index, self.seed, IMAGE, self.epoch) for index in part]
            else:
                places = start + self.process + self.processes * np.arange(self.batch_size)
                images, variations = np.divmod(places, self.repeats)
                keys = zip(order[images].tolist(), variations.tolist())
                yield [(index, self.seed, IMAGE, self.epoch, number) for index, number in keys]


class _Batch(NamedTuple):
    images: Tensor | None
    targets: Tensor
    broken: list[Broken]


def _collate(samples: list[Sample]) -> _Batch:
    broken = [entry for sample in samples for entry in sample.broken]
    whole = [(sample.image, sample.target) for sample in samples if sample.image is not None]
    if not whole:
        return _Batch(None, torch.empty(0, dtype=torch.long), broken)
    return _Batch(*fast_collate(whole), broken)


_FINISHED = RawValue("b", 0)  # shared with the worker processes


def start_worker() -> Callable[[int], None]:
    """What a worker process is to do first (`worker_init_fn`).

    Ctrl-C and a cluster's SIGTERM reach every process; the main one decides when to stop. Until
    it has, SIGTERM is ignored.
    """
    return partial(_start_worker, _FINISHED)


def _start_worker(finished: Any, _: int) -> None:
    def end_if_finished(*_: object) -> None:
        if finished.value:
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_if_finished)


def _end_workers() -> None:
    _FINISHED.value = 1
    for process in active_children():
        if process.daemon:
            process.terminate()


def finishing(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader whose workers `start_worker` prepares.

    If an error ends the program, they end with it: the interpreter would wait for them for ever.
    """
    iterator = iter(loader)
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)  # last, to be called before torch's own, which waits
    try:
        yield from iterator
    finally:
        if loader.num_workers and not loader.persistent_workers:
            iterator._shutdown_workers()


@contextlib.contextmanager
def ending_workers(*loaders: DataLoader[Any]) -> Iterator[None]:
    """At its end the worker processes of these loaders end.

    The garbage collector would end them too, at some time and in an order of its own: the message
    to them may find its thread gone, they are waited for, 5 seconds each, and stay.
    """
    try:
        yield
    finally:
        for loader in loaders:
            iterator, loader._iterator = loader._iterator, None
            if iterator is not None:
                iterator._shutdown_workers()


def available_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def create_loader(samples: Samples, workers: int, **kwargs: Any) -> DataLoader[Any]:
    """A loader of batches, `(B, 3, H, W)` of uint8 and `(B,)`; `batches` iterates over it.

    No more than a worker per core is started: batches do not depend on their number.
    """
    workers = min(workers, available_cores())
    return DataLoader(
        samples,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=start_worker(),
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        **kwargs,
    )


def batches(loader: DataLoader[Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `loader` on `device`.

    Images that cannot be read are left to `loader.dataset.broken`. Training batches are whole all
    the same, because others stand in for them; evaluation has smaller ones, or one less.

    Raises:
        BrokenDataError: more images than allowed cannot be read; the message names some.
    """
    broken: BrokenImages = loader.dataset.broken  # type: ignore[attr-defined]
    for batch in finishing(loader):
        broken.add(batch.broken)
        if batch.images is not None:
            yield (
                batch.images.to(device, non_blocking=True),
                batch.targets.to(device, non_blocking=True),
            )
