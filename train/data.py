"""Images and labels for training and evaluation, in an order that depends on nothing but the seed.

Nothing random carries over from one batch to the next. The order of an epoch is a function of
(seed, epoch), the variation of an image of (seed, epoch, image), and what the training step draws
(dropout, Mixup) of (seed, step): all of it is the same whichever process reads an image, and
whether or not the run was interrupted before.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from vitarium.train.config import AugmentConfig, nearest

HELD_OUT = 0.2  # part of the images that is held out where the data has no split of its own
ORDER, IMAGE, STEP = range(3)  # what a seed is for; see `seed_all`
DIGITS_SIZE = 32  # pixels; scikit-learn's scans have 8, which is too few to crop and rotate


class Split(NamedTuple):
    """Images (or the paths of files) and the index of the class of each."""

    images: Sequence[Image.Image | Path]
    targets: Sequence[int]


@dataclass(frozen=True)
class ImageData:
    """What is trained on, what is held out, and the names of the classes in order."""

    train: Split
    held_out: Split
    classes: list[str]


def load_data(source: str) -> ImageData:
    """The data that `source` names: "digits" or "folder:PATH".

    Raises:
        ValueError: the scheme is unknown, or the folder's contents cannot be trained on.
        FileNotFoundError: the folder, its class folders or the images of a class are missing.
    """
    scheme, _, argument = source.partition(":")
    if scheme not in SCHEMES:
        raise ValueError(
            f"data={source!r} has the unknown scheme {scheme!r}{nearest(scheme, SCHEMES)}; "
            "allowed are digits and folder:PATH"
        )
    return SCHEMES[scheme](argument)


def _load_digits(argument: str) -> ImageData:
    """1,797 scanned handwritten digits of 8x8 pixels, upsampled (Alpaydin and Kaynak, 1998)."""
    from sklearn.datasets import load_digits

    if argument:
        raise ValueError(f"data='digits:{argument}': digits takes no argument")
    digits: Any = load_digits()
    images = [digit_image(scan) for scan in digits.images]
    return _hold_out("digits", Split(images, digits.target.tolist()), list("0123456789"))


def digit_image(scan: np.ndarray) -> Image.Image:
    """A scan of 8x8 values from 0 to 16 as an image of `DIGITS_SIZE`.

    The strokes of a scan touch its border: a margin of one pixel keeps them whole in most crops.
    """
    pixels = np.pad((scan * (255 / 16)).round().astype(np.uint8), 1)
    image = Image.fromarray(pixels)
    size = (DIGITS_SIZE, DIGITS_SIZE)
    return image.resize(size, Image.Resampling.BICUBIC).convert("RGB")


def _load_folder(argument: str) -> ImageData:
    """One folder of images per class, or `train/` and `val/` that hold such folders."""
    if not argument:
        raise ValueError("data='folder:' lacks the path: folder:PATH")
    root = Path(argument).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data='folder:{argument}': {root} is not a folder")
    if not (root / "train").is_dir():
        return _hold_out(str(root), *_read_class_folders(root))
    if not (root / "val").is_dir():
        raise FileNotFoundError(f"{root} holds train/ but no val/")
    train, classes = _read_class_folders(root / "train")
    held_out, held_out_classes = _read_class_folders(root / "val")
    if classes != held_out_classes:
        differ = sorted(set(classes) ^ set(held_out_classes))
        raise ValueError(f"{root}: train/ and val/ have different classes: {', '.join(differ)}")
    return ImageData(train, held_out, classes)


def _read_class_folders(root: Path) -> tuple[Split, list[str]]:
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(root))  # names the class folders that hold no image
    if len(folder.classes) < 2:
        raise ValueError(f"{root} holds one class folder, {folder.classes[0]!r}; two are needed")
    paths, targets = zip(*folder.samples)
    return Split([Path(path) for path in paths], list(targets)), folder.classes


SCHEMES: dict[str, Callable[[str], ImageData]] = {"digits": _load_digits, "folder": _load_folder}


def _hold_out(origin: str, split: Split, classes: list[str]) -> ImageData:
    """A fixed fifth of every class held out: the same images whatever the run's seed."""
    from sklearn.model_selection import train_test_split

    try:
        parts = train_test_split(
            range(len(split.targets)),
            test_size=HELD_OUT,
            stratify=split.targets,
            random_state=0,
        )
    except ValueError as error:
        raise ValueError(
            f"{origin} has {len(split.targets)} images in {len(classes)} classes, too few to hold "
            f"out a fifth of every class ({error})"
        ) from None
    train, held_out = (
        Split([split.images[i] for i in part], [split.targets[i] for i in part]) for part in parts
    )
    return ImageData(train, held_out, classes)


def read_image(path: Path | Image.Image) -> Image.Image:
    """The image in a file, in RGB; an image is returned as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no image that can be read.
    """
    if isinstance(path, Image.Image):
        return path
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path} does not exist") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from None


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


def random_erasing(augment: AugmentConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Erases rectangles of normalised images, as NAT's and most recipes do: noise per pixel."""
    return RandomErasing(augment.random_erasing, mode="pixel", device=str(device))


def seed_all(*numbers: int) -> None:
    """Set the state of every global random generator as a function of `numbers`.

    Convention: (seed, one of ORDER, IMAGE and STEP, further numbers), so that uses do not meet.
    """
    torch.manual_seed(_seed_cpu(*numbers))


def _seed_cpu(*numbers: int) -> int:
    """`seed_all` without accelerators, which is several times as fast; returns the seed."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


class Samples(Dataset[tuple[Any, int] | Exception]):
    """Transformed images by index, or by (index, *numbers), which then seed the transform.

    An image that cannot be read is returned as the exception that says so: raised in a worker
    process it would arrive as a traceback.
    """

    def __init__(self, split: Split, transform: Callable[[Image.Image], Any]) -> None:
        self.split = split
        self.transform = transform

    def __len__(self) -> int:
        return len(self.split.targets)

    def __getitem__(self, key: int | tuple[int, ...]) -> tuple[Any, int] | Exception:
        index, *numbers = (key,) if isinstance(key, int) else key
        try:
            image = read_image(self.split.images[index])
        except (OSError, ValueError) as error:
            return error
        if numbers:
            _seed_cpu(*numbers, index)
        return self.transform(image), self.split.targets[index]


class EpochBatches(Sampler[list[tuple[int, ...]]]):
    """The batches of one epoch as keys of `Samples`, from any batch on.

    The order is a function of (seed, epoch). A batch of all processes together is a run of the
    order, of which each process takes its part; images that fill no batch are left out.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, process: int = 0, processes: int = 1
    ) -> None:
        if length < batch_size * processes:
            raise ValueError(
                f"batch_size={batch_size} on {processes} process(es) exceeds the {length} "
                "training images"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.process, self.processes = process, processes
        self.epoch, self.first = 0, 0

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.processes)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        order = np.random.default_rng((self.seed, ORDER, self.epoch)).permutation(self.length)
        for batch in range(self.first, len(self)):
            start = (batch * self.processes + self.process) * self.batch_size
            part = order[start : start + self.batch_size].tolist()
            yield [(index, self.seed, IMAGE, self.epoch) for index in part]


def _collate(samples: list[tuple[Any, int] | Exception]) -> tuple[Tensor, Tensor] | Exception:
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    return fast_collate(samples)


def _start_worker(_: int) -> None:
    # Ctrl-C and a cluster's SIGTERM reach every process; the main one decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def create_loader(samples: Samples, workers: int, **kwargs: Any) -> DataLoader[Any]:
    """A loader of batches, `(B, 3, H, W)` of uint8 and `(B,)`; `batches` iterates over it.

    No more than a worker per core is started: batches do not depend on their number.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: the cores that we may use
    workers = min(workers, len(affinity(0)) if affinity else os.cpu_count() or 1)
    return DataLoader(
        samples,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        **kwargs,
    )


def batches(loader: DataLoader[Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `loader` on `device`.

    Raises:
        ValueError, OSError: an image cannot be read; the message names it.
    """
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        images, targets = batch
        yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
