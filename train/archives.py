"""Images in tar files: class folders that were packed, and WebDataset shards.

Members of an uncompressed tar file lie in it as they are, so an index of their offsets makes it a
data set with random access. The headers of all files are read once, when a run starts, by as many
processes as there are cores; images are then read straight from their offsets.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from vitarium.train.config import SourceConfig
from vitarium.train.images import StoredImage, image_suffixes
from vitarium.train.sources import (
    TRAIN_NAMES,
    VAL_NAMES,
    Labelled,
    Splits,
    StoredImages,
    existing_path,
    number_labels,
    text_array,
)

_MOST_CLASSES = 1_000_000  # a larger number in a label is something else
_PARALLEL_BYTES = 2**28  # archives of less than this are indexed without further processes


class Index(NamedTuple):
    """Images of one archive: names, first bytes, sizes in bytes, and the label of each."""

    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    ignored: dict[str, int]


class Members(StoredImages):
    """Images at places in archives.

    Args:
        paths: the archives.
        indices: what is in each of them.
    """

    def __init__(self, paths: Sequence[Path], indices: Sequence[Index]) -> None:
        self.paths = list(paths)
        self.names = np.concatenate([index.names for index in indices])
        self.offsets = np.concatenate([index.offsets for index in indices])
        self.sizes = np.concatenate([index.sizes for index in indices])
        self.ends = np.cumsum([len(index.names) for index in indices])
        super().__init__(len(self.names))

    def item(self, index: int) -> StoredImage:
        path = self.paths[int(np.searchsorted(self.ends, index, side="right"))]
        return StoredImage(
            f"{path}/{self.names[index]}",
            partial(_read, path, int(self.offsets[index]), int(self.sizes[index])),
        )


def _read(path: Path, offset: int, size: int) -> bytes:
    # Opened anew each time: a file that workers share would share its position, too.
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise ValueError(f"the archive ends after {len(content)} of {size} bytes")
    return content


def _walk(file: IO[bytes] | None, path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The regular files of an archive; what was read is forgotten at once.

    Raises:
        ValueError: it is compressed, damaged, or no tar file.
    """
    try:
        with tarfile.open(path, "r:", fileobj=file) as archive:
            while (member := archive.next()) is not None:
                if member.isreg():
                    yield member, archive
                archive.members = []
            # tarfile takes a header that is cut off or damaged for the end of the archive.
            archive.fileobj.seek(archive.offset)  # type: ignore[union-attr]
            mark = archive.fileobj.read(tarfile.BLOCKSIZE)  # type: ignore[union-attr]
            if mark != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header and no end at byte {archive.offset}")
    except tarfile.TarError as error:
        raise ValueError(
            f"archive {path} cannot be read as an uncompressed tar file: {error}"
        ) from None


# --- tar files of class folders ------------------------------------------------------------------


def index_tar(path: Path, prefix: str = "") -> Index:
    """The images of a tar file, and of tar files in it, which count as folders.

    Args:
        path: the archive.
        prefix: the folder that the archive itself counts as, or nothing.
    """
    return _index(path, partial(_tar_entries, path, prefix))


def _tar_entries(
    path: Path, prefix: str, ignored: Counter[str]
) -> Iterator[tuple[str, int, int, str]]:
    suffixes = image_suffixes()
    for member, archive in _walk(None, path):
        stem, suffix = os.path.splitext(member.name)
        if suffix.lower() == ".tar":
            inner: Any = archive.extractfile(member)
            for entry, _ in _walk(inner, Path(f"{path}/{member.name}")):
                name = f"{stem}/{entry.name}"
                if os.path.splitext(name)[1].lower() in suffixes:
                    folder = os.path.basename(os.path.dirname(name))
                    yield name, member.offset_data + entry.offset_data, entry.size, folder
                else:
                    ignored[os.path.splitext(name)[1].lower()] += 1
        elif suffix.lower() in suffixes:
            folder = os.path.dirname(f"{prefix}/{member.name}".lstrip("./"))
            yield member.name, member.offset_data, member.size, os.path.basename(folder)
        else:
            ignored[suffix.lower()] += 1


def find_tars(argument: str, options: SourceConfig) -> Splits:
    """The splits of "tar:ARGUMENT", laid out as timm's `ReaderImageInTar` expects.

    - a tar file of class folders, which may stand in folders `train/`, `val/`;
    - a folder with `train.tar`, `val.tar`, ..., or `train/`, `val/` with tar files in them;
    - a folder of tar files of a class each, or of class folders.
    """
    path = existing_path("tar", argument)
    wanted = {options.train_split, options.val_split} - {None}
    names = {*TRAIN_NAMES, *VAL_NAMES, *wanted}
    if path.is_file():
        return _splits_inside(path, wanted)
    tars = sorted(path.glob("*.tar"))
    if wanted & {tar.stem for tar in tars} or any(tar.stem in TRAIN_NAMES for tar in tars):
        return {tar.stem: partial(_read_tars, [tar], [""]) for tar in tars if tar.stem in names}
    folders = {folder.name: sorted(folder.glob("*.tar")) for folder in sorted(path.iterdir())}
    folders = {name: inner for name, inner in folders.items() if inner and name in names}
    if folders:
        return {
            name: partial(_read_tars, inner, [tar.stem for tar in inner])
            for name, inner in folders.items()
        }
    if not tars:
        raise FileNotFoundError(f"data='tar:{argument}': {path} holds no .tar file")
    return {"": partial(_read_tars, tars, [tar.stem for tar in tars])}


def _read_tars(paths: Sequence[Path], prefixes: Sequence[str]) -> Labelled:
    return _labelled(paths, _map(index_tar, paths, prefixes))


def _splits_inside(path: Path, wanted: set[str | None]) -> Splits:
    """The splits of one tar file, by the first folder that not all of its images share."""
    index = index_tar(path)
    names = [name.removeprefix("./") for name in index.names]
    ends = [text.split("/")[:-1] for text in (min(names, default=""), max(names, default=""))]
    same = [one == other for one, other in zip(*ends)]  # what the first and the last share, all do
    depth = [*same, False].index(False)
    tops = text_array(["/".join(name.split("/")[depth:-1][:1]) for name in names])
    found = [str(name) for name in sorted(set(tops)) if name in (*TRAIN_NAMES, *VAL_NAMES, *wanted)]
    if not wanted & set(found) and not set(TRAIN_NAMES) & set(found):
        return {"": partial(_labelled, [path], [index])}

    def part(name: str) -> Labelled:
        here = np.flatnonzero(tops == name)
        return _labelled([path], [Index(*(entry[here] for entry in index[:4]), index.ignored)])

    return {name: partial(part, name) for name in found}


# --- WebDataset shards ---------------------------------------------------------------------------


def index_shard(path: Path, target_key: str | None = None) -> Index:
    """The images of a WebDataset shard: files of one name but for what follows its first dot.

    The label is the text in `.cls`, or `target_key` ("label" if None) of what is in `.json`.

    Raises:
        ValueError: a sample has no image or no label.
    """
    return _index(path, partial(_shard_entries, path, target_key))


def _shard_entries(
    path: Path, target_key: str | None, ignored: Counter[str]
) -> Iterator[tuple[str, int, int, str]]:
    suffixes = image_suffixes()
    key: str | None = None
    image: tarfile.TarInfo | None = None
    label: str | None = None

    def sample() -> tuple[str, int, int, str]:
        if image is None:
            raise ValueError(f"sample {key!r} of {path} has no image")
        if label is None:
            field = f"a .json with the field {target_key or 'label'!r}"
            needs = field if target_key else f".cls or {field}"
            raise ValueError(f"sample {key!r} of {path} has no label: it needs {needs}")
        return image.name, image.offset_data, image.size, label

    for member, archive in _walk(None, path):
        folder, _, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not stem or not dot:
            ignored[base] += 1  # the conventional files about the shard itself
            continue
        name = f"{folder}/{stem}" if folder else stem
        if name != key:
            if key is not None:
                yield sample()
            key, image, label = name, None, None
        suffix = suffix.lower()
        if f".{suffix}" in suffixes:
            if image is not None:
                raise ValueError(f"sample {key!r} of {path} has several images")
            image = member
        elif suffix == "cls" and target_key is None:
            label = _content(archive, member).decode().strip()
        elif suffix == "json" and label is None:
            label = _json_label(_content(archive, member), target_key or "label", name, path)
    if key is not None:
        yield sample()


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


def _json_label(content: bytes, key: str, name: str, path: Path) -> str | None:
    try:
        value = json.loads(content).get(key)
    except (ValueError, AttributeError):
        raise ValueError(f"the .json of sample {name!r} of {path} holds no object") from None
    if value is None or isinstance(value, (int, str)):
        return None if value is None else str(value)
    raise ValueError(f"{key!r} of sample {name!r} of {path} is no class: {str(value)[:40]}")


def find_shards(argument: str, options: SourceConfig) -> Splits:
    """The splits of "wds:ARGUMENT".

    - a pattern of shards such as `PATH/train-{0000..1023}.tar`, or with `*`: one split;
    - a folder with timm's `_info.json`, which lists them;
    - a folder with `train/`, `val/` that hold shards, or whose shards' names begin or end with
      the split's (`imagenet-train-0001.tar`); otherwise all shards are one split.

    `classnames.txt` beside the shards names the classes of numeric labels.
    """
    if not argument:
        raise ValueError("data='wds:' lacks the path: wds:PATH or wds:PATTERN")
    if re.search(r"[{*?\[]|::", argument) and not Path(argument).expanduser().exists():
        shards = [path for part in argument.split("::") for path in _expand(part)]
        missing = [str(path) for path in shards if not path.is_file()]
        if missing or not shards:
            raise FileNotFoundError(
                f"data='wds:{argument}': {len(missing)} of {len(shards)} shards are missing"
                + (f", the first is {missing[0]}" if missing else "")
            )
        return {"": partial(_read_shards, shards, options.target_key)}
    path = existing_path("wds", argument)
    if path.is_file():
        return {"": partial(_read_shards, [path], options.target_key)}
    by_split = _shards_by_split(path, options)
    if not any(by_split.values()):
        raise FileNotFoundError(f"data='wds:{argument}': {path} holds no .tar file")
    return {
        name: partial(_read_shards, shards, options.target_key)
        for name, shards in by_split.items()
        if shards
    }


def _shards_by_split(path: Path, options: SourceConfig) -> dict[str, list[Path]]:
    for info in ("_info.json", "info.json"):
        if (path / info).is_file():
            try:
                splits = json.loads((path / info).read_text(encoding="utf-8"))["splits"]
                return {str(k): [path / f for f in v["filenames"]] for k, v in splits.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{path / info} does not list the shards of splits") from None
    names = {*TRAIN_NAMES, *VAL_NAMES, options.train_split, options.val_split} - {None}
    folders = {str(name): sorted((path / str(name)).glob("*.tar")) for name in names}
    if any(folders.values()):
        return {name: shards for name, shards in sorted(folders.items()) if shards}
    found: dict[str, list[Path]] = {}
    for shard in sorted(path.glob("*.tar")):
        parts = re.split(r"[-_.]", shard.stem)
        found.setdefault(next((part for part in parts if part in names), ""), []).append(shard)
    if len(found) > 1 and "" in found:
        raise ValueError(
            f"{path}: the names of some shards tell their split, others do not: {found[''][0].name}"
        )
    return found


def _expand(pattern: str) -> list[Path]:
    """The paths that a pattern means: "{000..127}" and "{a,b}" as in a shell, then "*"."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        expanded = str(Path(pattern).expanduser())
        found = sorted(glob.glob(expanded)) if glob.has_magic(expanded) else [expanded]
        return [Path(path) for path in found]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        texts = [f"{number:0{len(bounds[1])}}" for number in range(first, last + 1)]
    else:
        texts = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [path for text in texts for path in _expand(before + text + after)]


def _read_shards(paths: Sequence[Path], target_key: str | None) -> Labelled:
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"shard {path} does not exist")
    split = _labelled(paths, _map(index_shard, paths, [target_key] * len(paths)))
    numeric = all(name.isdigit() for name in split.classes)
    if not numeric:
        return split
    # Numbers are indices by themselves: a class without an image here keeps its place.
    numbers = np.array([int(name) for name in split.classes], np.int64)
    count = int(numbers.max(initial=-1)) + 1
    if count > _MOST_CLASSES:
        raise ValueError(f"label {count - 1} in {paths[0].parent} is no index of a class")
    names = [str(number) for number in range(count)]
    for folder in {paths[0].parent, paths[0].parent.parent}:
        if (folder / "classnames.txt").is_file():
            text = (folder / "classnames.txt").read_text(encoding="utf-8")
            listed = [line.strip() for line in text.splitlines() if line.strip()]
            if len(listed) < count:
                raise ValueError(
                    f"{folder / 'classnames.txt'} names {len(listed)} classes, but there are "
                    f"labels up to {count - 1}"
                )
            names = listed
            break
    empty = [name for number, name in enumerate(names) if number not in set(numbers.tolist())]
    return split._replace(labels=numbers[split.labels].astype(np.int32), classes=names, empty=empty)


# --- both ----------------------------------------------------------------------------------------


def _index(
    path: Path, entries: Callable[[Counter[str]], Iterable[tuple[str, int, int, str]]]
) -> Index:
    names: list[str] = []
    labels: list[str] = []
    places, sizes = array("q"), array("q")
    ignored: Counter[str] = Counter()
    try:
        for name, offset, size, label in entries(ignored):
            names.append(name)
            places.append(offset)
            sizes.append(size)
            labels.append(label)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"archive {path} cannot be read: {error}") from None
    offsets, lengths = np.array(places, np.int64), np.array(sizes, np.int64)
    return Index(text_array(names), offsets, lengths, text_array(labels), dict(ignored))


def _map(index: Callable[..., Index], paths: Sequence[Path], *arguments: Sequence[Any]) -> Any:
    """`index` of every archive, in as many processes as there are cores if there is much to do."""
    if len(paths) < 2 or sum(path.stat().st_size for path in paths) < _PARALLEL_BYTES:
        return list(map(index, paths, *arguments))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(index, paths, *arguments))


def _labelled(paths: Sequence[Path], indices: Sequence[Index]) -> Labelled:
    labels, classes = number_labels(str(name) for index in indices for name in index.labels)
    if "" in classes:
        place = int(np.flatnonzero(labels == classes.index(""))[0])
        name = Members(paths, indices)[place].name
        raise ValueError(f"image {name} has no class: no folder in the archive holds it")
    ignored: Counter[str] = Counter()
    for index in indices:
        ignored.update(index.ignored)
    return Labelled(Members(paths, indices), labels, classes, ignored=dict(ignored))
