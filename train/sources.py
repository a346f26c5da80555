"""Where images come from: what a source such as "folder:PATH" names, as splits to train on.

Every source is read by index, never as a stream, so that the order of an epoch is a function of
(seed, epoch) whatever the storage. Only its index is in memory: names, places and labels, in
arrays, so that neither millions of images nor several worker processes cost more than that.

Labels follow timm's readers: a class is the name of the folder that holds the image, classes are
in natural order ("2" before "10"), and a class map says which there are and in which order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data.readers.class_map import load_class_map
from timm.utils.misc import natural_key

from vitarium.train.config import SourceConfig, nearest
from vitarium.train.images import AnyImage, BrokenImages

HELD_OUT = 0.2  # part of the images that is held out where the data has no split of its own
DIGITS_SIZE = 32  # pixels; scikit-learn's scans have 8, which is too few to crop and rotate
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "eval", "evaluation", "test")


class Split(NamedTuple):
    """Images, where each is stored, and the index of the class of each."""

    images: Sequence[AnyImage]
    targets: Sequence[int]


@dataclass(frozen=True)
class ImageData:
    """What is trained on, what is held out, and the names of the classes in order.

    `broken` collects the images of both splits that turn out to be unreadable.
    """

    train: Split
    held_out: Split
    classes: list[str]
    broken: BrokenImages = field(default_factory=BrokenImages, compare=False)


class Labelled(NamedTuple):
    """One split as a source holds it.

    Args:
        images: where each image is stored.
        labels: indices into `classes`, `(len(images),)` of int32.
        classes: their names, in natural order.
        empty: classes that the source names, but of which it has no image.
        ignored: number of files that are no images, by their suffix.
    """

    images: Sequence[AnyImage]
    labels: np.ndarray
    classes: list[str]
    empty: Sequence[str] = ()
    ignored: Mapping[str, int] = {}


# The splits of a source by name; "" where it has no names for them. Read when called.
Splits = Mapping[str, Callable[[], Labelled]]


class Picked(Sequence[AnyImage]):
    """Some of `images`, without a copy of what they are."""

    def __init__(self, images: Sequence[AnyImage], indices: np.ndarray) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.images[i] for i in self.indices[index]]
        return self.images[int(self.indices[index])]


class StoredImages(Sequence[AnyImage]):
    """Images by index, each made from a few array entries when it is asked for."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.item(i) for i in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(f"image {index} of {self.length}")
        return self.item(index % self.length)

    def item(self, index: int) -> AnyImage:
        """The image number `index`, from 0."""
        raise NotImplementedError


def text_array(texts: Sequence[str]) -> np.ndarray:
    """Strings of any length in one array, a fraction of the size of a list of them.

    Raises:
        ValueError: a file name is not UTF-8.
    """
    try:
        return np.array(texts, dtype=np.dtypes.StringDType())
    except UnicodeEncodeError as error:
        raise ValueError(f"the file name {error.object!r} is not UTF-8") from None


def number_labels(labels: Iterable[str]) -> tuple[np.ndarray, list[str]]:
    """Names of classes as indices, and the names in natural order."""
    position: dict[str, int] = {}
    indices = np.fromiter((position.setdefault(name, len(position)) for name in labels), np.int32)
    classes = sorted(position, key=natural_key)
    order = np.empty(len(classes), np.int32)
    for new, name in enumerate(classes):
        order[position[name]] = new
    return order[indices] if len(indices) else indices, classes


# --- what a source names -------------------------------------------------------------------------


def load_data(source: str, options: SourceConfig | None = None) -> ImageData:
    """The data that `source` names, as `TrainConfig.data` says.

    Args:
        source: scheme, and where the data are.
        options: which splits, classes and columns to take; the defaults if None.

    Raises:
        ValueError: the scheme is unknown, or what is there cannot be trained on, or the package
            that reads it is not installed.
        FileNotFoundError: something is missing: the data, a split, the images of a class.
    """
    options = options or SourceConfig()
    splits = find_splits(source, options)
    name = choose_split(source, splits, "train_split", options.train_split, TRAIN_NAMES)
    held_out_name = choose_split(source, splits, "val_split", options.val_split, VAL_NAMES)
    if name is None:
        if len(splits) > 1:
            raise ValueError(
                f"data={source!r} has the splits {', '.join(splits)}; name the one to train on "
                "with source.train_split"
            )
        name, held_out_name = next(iter(splits)), None
    found = held_out_name is not None or options.val_data is not None
    if not found and name in TRAIN_NAMES and source.startswith("folder:"):
        root = source.partition(":")[2]
        raise FileNotFoundError(
            f"{root} holds {name}/ but no val/ (nor {', '.join(VAL_NAMES[1:])}); source.val_data "
            f"takes another place, and folder:{Path(root) / name} holds out a part of {name}/"
        )
    train = _with_class_map(source, _checked(source, splits[name]()), options)
    if options.val_data is not None:
        other = find_splits(options.val_data, options)
        other_name = choose_split(
            options.val_data, other, "val_split", options.val_split, VAL_NAMES
        )
        if other_name is None:
            if len(other) > 1:
                raise ValueError(
                    f"source.val_data={options.val_data!r} has the splits {', '.join(other)}; "
                    "name one with source.val_split"
                )
            other_name = next(iter(other))
        held_out = _checked(options.val_data, other[other_name]())
        return _join(options.val_data, train, held_out, options)
    if held_out_name is not None:
        return _join(source, train, _checked(source, splits[held_out_name]()), options)
    return _hold_out(source, train, options)


def find_splits(source: str, options: SourceConfig) -> Splits:
    """The splits of a source by their own names, or one split by the name "".

    Raises:
        ValueError, FileNotFoundError: as `load_data`.
    """
    scheme, _, argument = source.partition(":")
    if scheme not in SCHEMES:
        raise ValueError(
            f"data={source!r} has the unknown scheme {scheme!r}{nearest(scheme, SCHEMES)}; "
            f"allowed are {', '.join(SCHEME_FORMS)}"
        )
    return SCHEMES[scheme](argument, options)


def existing_path(scheme: str, argument: str) -> Path:
    """The file or folder that `scheme:argument` names.

    Raises:
        ValueError, FileNotFoundError: it is not given, or not there.
    """
    if not argument:
        raise ValueError(f"data='{scheme}:' lacks the path: {scheme}:PATH")
    path = Path(argument).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data='{scheme}:{argument}': {path} does not exist")
    return path


def choose_split(
    source: str, splits: Splits, key: str, wanted: str | None, names: Sequence[str]
) -> str | None:
    """The split to take: the wanted one, else the first of `names` that exists."""
    if wanted is None:
        return next((name for name in names if name in splits), None)
    if wanted not in splits:
        has = f"has the splits {', '.join(splits)}" if any(splits) else "has no named splits"
        raise ValueError(f"source.{key}={wanted!r}: {source} {has}{nearest(wanted, splits)}")
    return wanted


def _checked(source: str, split: Labelled) -> Labelled:
    if len(split.images) == 0:
        classes = f" of the classes {_listed(split.empty)}" if split.empty else ""
        raise FileNotFoundError(f"{source} holds no image{classes}")
    return split


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names)})" if len(names) > 10 else "")


def _join(source: str, train: Labelled, held_out: Labelled, options: SourceConfig) -> ImageData:
    """Both splits with the same classes."""
    if options.class_map is not None:
        held_out = _with_class_map(source, held_out, options)
    elif train.classes != held_out.classes:
        differ = sorted(set(train.classes) ^ set(held_out.classes), key=natural_key)
        raise ValueError(
            f"{source}: training and held-out images have different classes: {_listed(differ)}; "
            "source.class_map says which to take"
        )
    _refuse_empty(source, train, options)
    return _image_data(
        Split(train.images, _targets(train.labels)),
        Split(held_out.images, _targets(held_out.labels)),
        train.classes,
        options,
    )


def _hold_out(source: str, split: Labelled, options: SourceConfig) -> ImageData:
    """A fixed fifth of every class held out: the same images whatever the run's seed."""
    from sklearn.model_selection import train_test_split

    _refuse_empty(source, split, options)
    try:
        parts = train_test_split(
            np.arange(len(split.labels)),
            test_size=HELD_OUT,
            stratify=split.labels,
            random_state=0,
        )
    except ValueError as error:
        raise ValueError(
            f"{source} has {len(split.labels)} images in {len(split.classes)} classes, too few to "
            f"hold out a fifth of every class ({error})"
        ) from None
    train, held_out = (
        Split(Picked(split.images, part), _targets(split.labels[part])) for part in parts
    )
    return _image_data(train, held_out, split.classes, options)


def _image_data(
    train: Split, held_out: Split, classes: list[str], options: SourceConfig
) -> ImageData:
    total = len(train.targets) + len(held_out.targets)
    return ImageData(train, held_out, classes, BrokenImages(total, options.max_broken))


def _targets(labels: np.ndarray) -> Any:
    """Labels as a sequence of ints that takes 4 bytes each."""
    from array import array

    return array("i", labels.astype(np.intc).tobytes())


def _refuse_empty(source: str, split: Labelled, options: SourceConfig) -> None:
    if options.class_map is not None:
        return
    if split.empty:
        raise FileNotFoundError(f"{source} holds no image of the classes {_listed(split.empty)}")
    if len(split.classes) < 2:
        raise ValueError(f"{source} holds one class, {split.classes[0]!r}; two are needed")


# --- class maps ----------------------------------------------------------------------------------


def read_class_map(path: str) -> dict[Any, int]:
    """Names of classes and the index of each, from a file that timm's `load_class_map` reads.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of these, or its indices leave gaps.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"source.class_map={path!r} does not exist")
    if file.suffix.lower() not in (".txt", ".pkl"):
        raise ValueError(f"source.class_map={path!r} must end in .txt or .pkl")
    try:
        indices = load_class_map(str(file))
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"source.class_map={path!r} cannot be read: {error}") from None
    lines = file.read_text(encoding="utf-8").split("\n") if file.suffix.lower() == ".txt" else []
    names = [line.strip() for line in lines if line.strip()]
    if len(names) != len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"source.class_map={path!r} names {twice!r} twice")
    indices.pop("", None)  # an empty last line
    if not indices or set(indices.values()) != set(range(len(set(indices.values())))):
        raise ValueError(f"source.class_map={path!r} must give every index from 0 on a class")
    return indices


def _with_class_map(source: str, split: Labelled, options: SourceConfig) -> Labelled:
    """The split with the classes of the class map; images of other classes are left out."""
    if options.class_map is None:
        return split
    indices = read_class_map(options.class_map)
    names: dict[int, str] = {}
    for name, index in indices.items():
        names.setdefault(index, str(name))
    classes = [names[index] for index in range(len(names))]
    by_name = {str(name): index for name, index in indices.items()}
    numbers = all(re.fullmatch(r"\d+", name) for name in split.classes)
    if numbers and not any(name in by_name for name in split.classes):
        by_name = {str(index): index for index in range(len(classes))}  # the map names the numbers
    new = np.array([by_name.get(name, -1) for name in split.classes], np.int32)
    if (new < 0).all():
        raise ValueError(
            f"source.class_map={options.class_map!r} names none of the classes of {source} "
            f"({', '.join(split.classes[:5])}, ...)"
        )
    labels = new[split.labels]
    kept = np.flatnonzero(labels >= 0)
    images = split.images if len(kept) == len(labels) else Picked(split.images, kept)
    return Labelled(images, labels[kept], classes)


# --- schemes -------------------------------------------------------------------------------------


def _digits(argument: str, _: SourceConfig) -> Splits:
    """1,797 scanned handwritten digits of 8x8 pixels, upsampled (Alpaydin and Kaynak, 1998)."""
    from sklearn.datasets import load_digits

    if argument:
        raise ValueError(f"data='digits:{argument}': digits takes no argument")

    def read() -> Labelled:
        digits: Any = load_digits()
        images = [digit_image(scan) for scan in digits.images]
        return Labelled(images, digits.target.astype(np.int32), list("0123456789"))

    return {"": read}


def digit_image(scan: np.ndarray) -> Image.Image:
    """A scan of 8x8 values from 0 to 16 as an image of `DIGITS_SIZE`.

    The strokes of a scan touch its border: a margin of one pixel keeps them whole in most crops.
    """
    pixels = np.pad((scan * (255 / 16)).round().astype(np.uint8), 1)
    image = Image.fromarray(pixels)
    size = (DIGITS_SIZE, DIGITS_SIZE)
    return image.resize(size, Image.Resampling.BICUBIC).convert("RGB")


def _probe(argument: str, _: SourceConfig) -> Splits:
    """A drawn task that tells mixers apart."""
    from vitarium.train.probes import HELD_OUT, TRAIN, drawn, probe

    classes = list(probe(argument).classes)
    counts = {"train": TRAIN, "val": HELD_OUT}
    return {
        name: lambda split=split, count=count: Labelled(*drawn(argument, count, split), classes)
        for split, (name, count) in enumerate(counts.items())
    }


def _folder(argument: str, options: SourceConfig) -> Splits:
    from vitarium.train.folders import find_folders

    return find_folders(argument, options)


def _tar(argument: str, options: SourceConfig) -> Splits:
    from vitarium.train.archives import find_tars

    return find_tars(argument, options)


def _shards(argument: str, options: SourceConfig) -> Splits:
    from vitarium.train.archives import find_shards

    return find_shards(argument, options)


def _hugging_face(argument: str, options: SourceConfig) -> Splits:
    from vitarium.train.tables import find_hugging_face

    return find_hugging_face(argument, options)


def _torchvision(argument: str, options: SourceConfig) -> Splits:
    from vitarium.train.tables import find_torchvision

    return find_torchvision(argument, options)


SCHEMES: dict[str, Callable[[str, SourceConfig], Splits]] = {
    "digits": _digits,
    "probe": _probe,
    "folder": _folder,
    "tar": _tar,
    "wds": _shards,
    "hfds": _hugging_face,
    "torch": _torchvision,
}
SCHEME_FORMS = (
    "digits",
    "probe:NAME",
    "folder:PATH",
    "tar:PATH",
    "wds:PATH",
    "hfds:PATH",
    "torch:NAME@ROOT",
)
