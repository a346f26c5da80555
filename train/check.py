"""Reads a data set once and says what is in it: sizes, broken images, duplicates, balance."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from vitarium.train.config import SourceConfig
from vitarium.train.data import available_cores, finishing, start_worker
from vitarium.train.images import AnyImage, decode_image, image_name, image_suffixes
from vitarium.train.sources import SCHEMES, Labelled, choose_split, find_splits

_CHUNK = 32  # images that a worker process reads at a time


@dataclass(frozen=True)
class SplitReport:
    """What is in one split.

    Args:
        images: number of images, broken ones included.
        megabytes: size of the encoded images, in 10^6 bytes.
        classes: number of images of each class.
        empty: classes without an image.
        balance: the largest class over the smallest one that is not empty.
        width, height: "min", "median" and "max" in pixels, of the images that can be read.
        modes: number of images by Pillow's name for the kind of their pixels.
        ignored: number of files that are no images, by suffix.
        broken: "image" and "reason" of each that cannot be read.
        duplicates: names of images with the same pixels, a list for each such group.
    """

    images: int
    megabytes: float
    classes: dict[str, int]
    empty: list[str]
    balance: float
    width: dict[str, float]
    height: dict[str, float]
    modes: dict[str, int]
    ignored: dict[str, int]
    broken: list[dict[str, str]]
    duplicates: list[list[str]]


@dataclass(frozen=True)
class DataReport:
    """What `check_data` found.

    Args:
        source: what was read.
        splits: by name; "all" where the source has no names for them.
        leaks: "split", "image" and "class" of images with the same pixels in several splits.
        contradictions: the same of images with the same pixels and several classes.
        unshared_classes: classes that only some of the splits have, and which do.
        seconds: time that reading took.
        images_per_second, megabytes_per_second: how fast, with `workers` processes.
    """

    source: str
    splits: dict[str, SplitReport]
    leaks: list[list[dict[str, str]]]
    contradictions: list[list[dict[str, str]]]
    unshared_classes: dict[str, list[str]]
    seconds: float
    images_per_second: float
    megabytes_per_second: float
    workers: int

    @property
    def problems(self) -> list[str]:
        """What keeps a run from starting, or from meaning what it says; a line each."""
        found = []
        for name, split in self.splits.items():
            if split.broken:
                found.append(f"{name}: {len(split.broken)} of {split.images} images are broken")
            if split.empty:
                found.append(f"{name}: {len(split.empty)} classes are empty")
        if self.leaks:
            found.append(f"{len(self.leaks)} images are in several splits")
        if self.unshared_classes:
            found.append(f"{len(self.unshared_classes)} classes are not in every split")
        return found

    def to_record(self) -> dict[str, Any]:
        """Everything by name, as JSON takes it."""
        return {**dataclasses.asdict(self), "problems": self.problems}


class _Facts(NamedTuple):
    """Of n images: width and height `(n, 2)`, bytes `(n,)`, digests `(n, 2)`; modes; the broken."""

    pixels: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    modes: Counter[str]
    broken: dict[int, str]


class _Chunks(Dataset[_Facts]):
    """The facts of `_CHUNK` images at a time."""

    def __init__(self, images: Sequence[AnyImage]) -> None:
        self.images = images

    def __len__(self) -> int:
        return -(-len(self.images) // _CHUNK)

    def __getitem__(self, number: int) -> _Facts:
        places = range(number * _CHUNK, min((number + 1) * _CHUNK, len(self.images)))
        facts = _Facts(
            np.zeros((len(places), 2), np.int32),
            np.zeros(len(places), np.int64),
            np.zeros((len(places), 2), np.uint64),
            Counter(),
            {},
        )
        for row, index in enumerate(places):
            try:
                image, mode, size = decode_image(self.images[index])
            except (OSError, ValueError) as error:
                facts.broken[index] = str(error)
                continue
            facts.pixels[row], facts.sizes[row] = image.size, size
            facts.modes[mode] += 1
            digest = hashlib.blake2b(str(image.size).encode(), digest_size=16)
            digest.update(image.tobytes())
            facts.digests[row] = np.frombuffer(digest.digest(), np.uint64)
        return facts


def check_data(
    source: str,
    options: SourceConfig | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DataReport:
    """Read every image of every split of a source once.

    Args:
        source: as `TrainConfig.data`.
        options: how images and labels are found there; `val_data` is read, too.
        workers: processes that read; one per core if None, 0 reads in this process.
        progress: called with the number of images read, and to be read.

    Raises:
        ValueError, FileNotFoundError: as `load_data`, but for what a report tells.
    """
    options = options or SourceConfig()
    cores = available_cores()
    workers = cores if workers is None else min(workers, cores)
    found = find_splits(source, options)
    for key, wanted in (("train_split", options.train_split), ("val_split", options.val_split)):
        choose_split(source, found, key, wanted, ())  # says that it is not there
    splits = {name or "all": read() for name, read in found.items()}
    if options.val_data is not None:
        for name, read in find_splits(options.val_data, options).items():
            splits[f"val_data/{name}" if name else "val_data"] = read()
    total = sum(len(split.images) for split in splits.values())
    if total == 0:
        raise FileNotFoundError(f"{source} holds no images")
    started, done = time.perf_counter(), 0
    facts: dict[str, _Facts] = {}
    for name, split in splits.items():
        chunks = []
        for chunk in finishing(_loader(split.images, workers)):
            chunks.append(chunk)
            done += len(chunk.sizes)
            progress(done, total)
        facts[name] = _together(chunks)
    seconds = time.perf_counter() - started
    place = {name: number for number, name in enumerate(splits)}
    same = sorted(_same_pixels(facts), key=lambda group: [(place[name], i) for name, i in group])
    megabytes = sum(float(fact.sizes.sum()) for fact in facts.values()) / 1e6
    return DataReport(
        source,
        {name: _report(name, splits[name], facts[name], same) for name in splits},
        [_entries(splits, group) for group in same if len({name for name, _ in group}) > 1],
        [
            entries
            for entries in (_entries(splits, group) for group in same)
            if len({entry["class"] for entry in entries}) > 1
        ],
        _unshared(splits),
        round(seconds, 3),
        round(total / seconds, 1),
        round(megabytes / seconds, 2),
        workers,
    )


def _unchanged(facts: _Facts) -> _Facts:
    return facts


def _loader(images: Sequence[AnyImage], workers: int) -> DataLoader[_Facts]:
    chunks = _Chunks(images)
    return DataLoader(
        chunks,
        batch_size=None,
        num_workers=min(workers, len(chunks)),
        collate_fn=_unchanged,
        worker_init_fn=start_worker(),
    )


def _together(chunks: Sequence[_Facts]) -> _Facts:
    if not chunks:
        return _Chunks([])[0]
    return _Facts(
        *(np.concatenate([chunk[column] for chunk in chunks]) for column in range(3)),
        sum((chunk.modes for chunk in chunks), Counter()),
        {index: reason for chunk in chunks for index, reason in chunk.broken.items()},
    )


def _same_pixels(facts: Mapping[str, _Facts]) -> Iterator[list[tuple[str, int]]]:
    """Groups of (split, index) of images whose pixels are equal."""
    names = list(facts)
    whole = {
        name: np.setdiff1d(np.arange(len(f.sizes)), list(f.broken)) for name, f in facts.items()
    }
    digests = np.concatenate([facts[name].digests[whole[name]] for name in names])
    split = np.repeat(np.arange(len(names)), [len(whole[name]) for name in names])
    index = np.concatenate([whole[name] for name in names])
    order = np.lexsort((index, split, digests[:, 1], digests[:, 0]))
    equal = (digests[order][1:] == digests[order][:-1]).all(1)
    # Runs of equal neighbours: `equal` turns true where one starts, and false after its last pair.
    edges = np.flatnonzero(np.diff(np.concatenate([[False], equal, [False]]).astype(np.int8)))
    for start, end in zip(edges[0::2], edges[1::2]):
        yield [(names[split[i]], int(index[i])) for i in order[start : end + 1]]


def _entries(
    splits: Mapping[str, Labelled], group: Sequence[tuple[str, int]]
) -> list[dict[str, str]]:
    return [
        {
            "split": name,
            "image": image_name(splits[name].images[index], index),
            "class": splits[name].classes[int(splits[name].labels[index])],
        }
        for name, index in group
    ]


def _report(
    name: str, split: Labelled, facts: _Facts, same: Sequence[Sequence[tuple[str, int]]]
) -> SplitReport:
    counts = np.bincount(split.labels, minlength=len(split.classes))
    present = counts[counts > 0]
    read = facts.pixels[facts.pixels[:, 0] > 0]
    own = [[index for where, index in group if where == name] for group in same]
    return SplitReport(
        images=len(split.images),
        megabytes=round(float(facts.sizes.sum()) / 1e6, 3),
        classes={entry: int(count) for entry, count in zip(split.classes, counts)},
        empty=list(split.empty),
        balance=round(float(present.max() / present.min()), 3) if len(present) else 0.0,
        width=_spread(read[:, 0]),
        height=_spread(read[:, 1]),
        modes=dict(facts.modes.most_common()),
        ignored=dict(split.ignored),
        broken=[
            {"image": image_name(split.images[index], index), "reason": reason}
            for index, reason in facts.broken.items()
        ],
        duplicates=[
            [image_name(split.images[index], index) for index in group]
            for group in own
            if len(group) > 1
        ],
    )


def _spread(values: np.ndarray) -> dict[str, float]:
    if len(values) == 0:
        return {}
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "max": float(values.max()),
    }


def _unshared(splits: Mapping[str, Labelled]) -> dict[str, list[str]]:
    """Classes that are not in every split, and the splits that have them."""
    where: dict[str, list[str]] = {}
    for name, split in splits.items():
        for entry in split.classes:
            where.setdefault(entry, []).append(name)
    return {entry: names for entry, names in where.items() if len(names) < len(splits)}


# --- which scheme a path is ----------------------------------------------------------------------


def guess_source(text: str) -> str:
    """A source for a path: by what is there; a text that has a scheme stays as it is.

    Raises:
        FileNotFoundError: there is no such file or folder.
    """
    if text.partition(":")[0] in SCHEMES:
        return text
    path = Path(text).expanduser()
    if not path.exists():
        if re.search(r"[{*].*\.tar", text):
            return f"wds:{text}"
        raise FileNotFoundError(f"{text} does not exist")
    if path.suffix == ".parquet" or any(
        (path / name).is_file() for name in ("dataset_dict.json", "state.json")
    ):
        return f"hfds:{text}"
    if path.is_file():
        return f"{_kind_of_tar(path)}:{text}"
    for pattern in ("*", "*/*"):
        for kind in (".tar", ".parquet"):
            found = next(iter(sorted(path.glob(f"{pattern}{kind}"))), None)
            if found is not None:
                return f"{'hfds' if kind == '.parquet' else _kind_of_tar(found)}:{text}"
    return f"folder:{text}"


def _kind_of_tar(path: Path) -> str:
    """ "wds" if the first image of a tar file has a label beside it, else "tar"."""
    try:
        with tarfile.open(path, "r:") as archive:
            names = [member.name for member, _ in zip(archive, range(8)) if member.isreg()]
    except (tarfile.TarError, OSError):
        return "tar"  # whose reader says what is wrong
    keys = {name.rpartition(".")[0] for name in names if Path(name).suffix in (".cls", ".json")}
    images = [name for name in names if Path(name).suffix.lower() in image_suffixes()]
    return "wds" if any(name.rpartition(".")[0] in keys for name in images) else "tar"
