"""ImageNet-1k and the test sets around it, in the folders in which they are published.

    imagenet:PATH         PATH/val/SYNSET/*.JPEG, or PATH/SYNSET/*.JPEG
    imagenet-real:PATH    the images of imagenet:PATH, in folders or not, by their file names
    imagenet-v2:PATH      PATH/0/*.jpeg to PATH/999/*.jpeg
    imagenet-a:PATH       PATH/SYNSET/*.jpg, 200 classes (also below PATH/imagenet-a)
    imagenet-r:PATH       PATH/SYNSET/*.jpg, 200 classes (also below PATH/imagenet-r)
    imagenet-sketch:PATH  PATH/SYNSET/*.JPEG (also below PATH/sketch)
    imagenet-c:PATH       PATH/CORRUPTION/SEVERITY/SYNSET/*.JPEG (also PATH/GROUP/CORRUPTION/...)

Folders of classes may be named by synset (n01440764) or by number (0 to 999) in any of them.
Synsets and subsets of classes are timm's.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from vitarium.train.config import nearest
from vitarium.train.data import Split
from vitarium.train.images import BrokenImages, image_suffixes

# AlexNet's top-1 error on ImageNet-C, mean over the five severities: what a corruption error is
# relative to (Hendrycks and Dietterich, arXiv 1903.12261; github.com/hendrycks/robustness).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
SEVERITIES = (1, 2, 3, 4, 5)
_REAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)


@dataclass(frozen=True)
class TestSet:
    """Images to evaluate on, and what the right answers are.

    Attributes:
        name: of the data set, such as "imagenet-a".
        split: paths of images, and the index of the class of each.
        classes: names of the classes, here synsets.
        restrict: whether a model chooses among these classes only, even if it knows others.
        labels: for every image all the classes that are right, where that may be several.
        corruption: of ImageNet-C, the corruption and its severity.
        images: how many images the whole set has; None if any number is.
        broken: takes note of what cannot be read; as many as training allows by default if None.
    """

    __test__ = False  # pytest takes every class whose name starts like this for a test

    name: str
    split: Split
    classes: list[str]
    restrict: bool = False
    labels: list[list[int]] | None = None
    corruption: tuple[str, int] | None = None
    images: int | None = None
    broken: BrokenImages | None = None


@dataclass(frozen=True)
class _Published:
    """A set as published: folders that may hold the classes, how many images, which classes."""

    folders: tuple[str, ...]
    images: int
    subset: str | None = None


_SETS = {
    "imagenet": _Published(("val", "validation", "ILSVRC/Data/CLS-LOC/val"), 50_000),
    "imagenet-real": _Published((), 46_837),
    "imagenet-v2": _Published(
        tuple(
            f"imagenetv2-{kind}-format-val"
            for kind in ("matched-frequency", "threshold0.7", "top-images")
        ),
        10_000,
    ),
    "imagenet-a": _Published(("imagenet-a",), 7_500, "imagenet_a"),
    "imagenet-r": _Published(("imagenet-r",), 30_000, "imagenet_r"),
    "imagenet-sketch": _Published(("sketch",), 50_889),
    "imagenet-c": _Published((), 50_000),
}
NAMES = tuple(_SETS)


@functools.cache
def synsets(subset: str = "imagenet") -> list[str]:
    """The synsets of ImageNet-1k, "imagenet_a" or "imagenet_r", in the order of the classes."""
    text = _timm_file(f"{subset}_synsets.txt")
    return text.split()


@functools.cache
def lemmas() -> dict[str, str]:
    """The words of every synset: "n01440764" is "tench, Tinca tinca"."""
    return ImageNetInfo().label_descriptions(as_dict=True)  # type: ignore[return-value]


def is_imagenet(source: str) -> bool:
    """Whether a source of data is one of those of this module."""
    return source.partition(":")[0] in _SETS


def load_test_sets(source: str, real_labels: Path | str | None = None) -> Iterator[TestSet]:
    """The set that `source` names; of ImageNet-C one per corruption and severity.

    Args:
        source: name and path, as in this module's description.
        real_labels: the JSON of ImageNet-Real; timm's copy if None.

    Raises:
        FileNotFoundError: the path, or what has to be in it, is missing.
        ValueError: a folder is not of the set, or the JSON is none of its labels.
    """
    name, _, argument = source.partition(":")
    if not argument:
        raise ValueError(f"data={source!r} lacks the path: {name}:PATH")
    root = Path(argument).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data={source!r}: {root} is not a folder")
    published = _SETS[name]
    if name == "imagenet-c":
        return _corruptions(root)
    if name == "imagenet-real":
        return iter([_real(root, real_labels)])
    classes = synsets(published.subset or "imagenet")
    found = next((root / f for f in published.folders if (root / f).is_dir()), root)
    split = _read_classes(found, name, classes)
    return iter([TestSet(name, split, classes, restrict=True, images=published.images)])


def _read_classes(root: Path, name: str, classes: Sequence[str]) -> Split:
    """The images below folders that are named by synset, or by number among ImageNet-1k's."""
    entries = sorted(root.iterdir())
    folders = [e for e in entries if e.is_dir() and not e.name.startswith(".")]
    if not folders:
        flat = any(_REAL_NAME.fullmatch(entry.name) for entry in entries)
        hint = "; its images must be sorted into folders of synsets" if flat else ""
        raise FileNotFoundError(f"{name}: {root} holds no class folders{hint}")
    thousand, place = synsets(), {synset: i for i, synset in enumerate(classes)}
    images: list[Path] = []
    targets: list[int] = []
    for folder in folders:
        number = int(folder.name) if folder.name.isdecimal() else -1
        synset = thousand[number] if 0 <= number < len(thousand) else folder.name
        if synset not in place:
            raise ValueError(
                f"{name}: {folder} is not named by one of its {len(classes)} classes, a synset "
                f"such as {classes[0]} or a number such as {thousand.index(classes[0])}"
                f"{nearest(folder.name, classes)}"
            )
        files = _images(folder)
        images += files
        targets += [place[synset]] * len(files)
    if not images:
        raise FileNotFoundError(f"{name}: the class folders in {root} hold no images")
    return Split(images, targets)


def _images(folder: Path) -> list[Path]:
    names = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in names if path.suffix.lower() in image_suffixes())


def _real(root: Path, labels: Path | str | None) -> TestSet:
    """ImageNet's validation images and their reassessed labels (Beyer et al., arXiv 2006.07159)."""
    every = _real_labels(labels)
    numbered = {
        int(match[1]): path
        for path in root.rglob("*")
        if (match := _REAL_NAME.fullmatch(path.name)) is not None
    }
    if not numbered:
        raise FileNotFoundError(
            f"imagenet-real: {root} holds no files named ILSVRC2012_val_00000001.JPEG and so on"
        )
    if max(numbered) > len(every):
        raise ValueError(
            f"imagenet-real: {numbered[max(numbered)]} is beyond the {len(every)} images that "
            f"{labels or 'the labels'} has labels for"
        )
    kept = [number for number in sorted(numbered) if every[number - 1]]  # as the paper: no label,
    if not kept:  # no part in the accuracy
        raise ValueError(f"imagenet-real: none of the images in {root} has a label")
    right = [every[number - 1] for number in kept]
    split = Split([numbered[number] for number in kept], [own[0] for own in right])
    images = _SETS["imagenet-real"].images
    return TestSet("imagenet-real", split, synsets(), True, labels=right, images=images)


def _real_labels(path: Path | str | None) -> list[list[int]]:
    """The classes of every validation image, none or several each."""
    origin = "timm's labels" if path is None else str(path)
    try:
        if path is None:
            content: Any = json.loads(_timm_file("imagenet_real_labels.json"))
        else:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"real_labels={origin} does not exist") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"real_labels={origin} cannot be read as JSON: {error}") from None
    fits = isinstance(content, list) and all(
        isinstance(own, list) and all(isinstance(c, int) and 0 <= c < 1000 for c in own)
        for own in content
    )
    if not fits:
        raise ValueError(
            f"real_labels={origin} must hold a list with a list of classes (0 to 999) per image"
        )
    return content


def _corruptions(root: Path) -> Iterator[TestSet]:
    """The sets of ImageNet-C, read one by one: all its 3.75 million paths at once are too many."""
    found = _levels(root) or {
        corruption: levels
        for group in sorted(entry for entry in root.iterdir() if entry.is_dir())
        for corruption, levels in _levels(group).items()
    }
    if not found:
        raise FileNotFoundError(
            f"imagenet-c: {root} holds no corruptions, folders such as gaussian_noise/1"
        )

    def sets() -> Iterator[TestSet]:
        for corruption, levels in found.items():
            for level in levels:
                split = _read_classes(corruption / str(level), "imagenet-c", synsets())
                yield TestSet(
                    "imagenet-c", split, synsets(), True,
                    corruption=(corruption.name, level), images=50_000,
                )  # fmt: skip

    return sets()


def _levels(folder: Path) -> dict[Path, list[int]]:
    """The severities of the corruptions in a folder."""
    found = {
        corruption: [level for level in SEVERITIES if (corruption / str(level)).is_dir()]
        for corruption in sorted(entry for entry in folder.iterdir() if entry.is_dir())
    }
    return {corruption: levels for corruption, levels in found.items() if levels}


@dataclass(frozen=True)
class CorruptionErrors:
    """Top-1 errors on ImageNet-C.

    Attributes:
        errors: from 0 to 1, by corruption and severity.
    """

    errors: dict[tuple[str, int], float]

    def mean(self, corruption: str) -> float:
        """Mean error of a corruption over its severities."""
        own = [error for (name, _), error in self.errors.items() if name == corruption]
        return sum(own) / len(own)

    def relative(self, corruption: str) -> float | None:
        """Corruption error: the mean error over AlexNet's, 1 for as good as AlexNet.

        None where not all five severities were seen, or AlexNet's error is not published.
        """
        levels = {level for name, level in self.errors if name == corruption}
        if corruption not in ALEXNET_ERRORS or levels != set(SEVERITIES):
            return None
        return self.mean(corruption) / ALEXNET_ERRORS[corruption]

    @property
    def corruptions(self) -> list[str]:
        """Those seen, in the paper's order, then further ones, which no mean has."""
        seen = list(dict.fromkeys(name for name, _ in self.errors))
        return [c for c in ALEXNET_ERRORS if c in seen] + [
            c for c in seen if c not in ALEXNET_ERRORS
        ]

    @property
    def mean_corruption_error(self) -> float | None:
        """mCE, the mean of the 15 relative errors; None unless all of them were seen."""
        relative = [self.relative(c) for c in ALEXNET_ERRORS if c in self.corruptions]
        if len(relative) < len(ALEXNET_ERRORS) or None in relative:
            return None
        return sum(relative) / len(relative)  # type: ignore[arg-type]


def _timm_file(name: str) -> str:
    return (importlib.resources.files("timm.data") / "_info" / name).read_text(encoding="utf-8")
