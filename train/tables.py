"""Images in data sets of other libraries: Hugging Face's on disk, and torchvision's."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitarium.train.config import SourceConfig, nearest
from vitarium.train.images import StoredImage
from vitarium.train.sources import (
    TRAIN_NAMES,
    VAL_NAMES,
    Labelled,
    Splits,
    StoredImages,
    existing_path,
    number_labels,
)

# --- Hugging Face --------------------------------------------------------------------------------


class Rows(StoredImages):
    """Images in a column of a `datasets.Dataset`, as encoded bytes or as paths."""

    def __init__(self, name: str, dataset: Any, column: str) -> None:
        super().__init__(len(dataset))
        self.name, self.dataset, self.column = name, dataset, column

    def item(self, index: int) -> StoredImage:
        return StoredImage(f"{self.name}[{index}]", partial(self._read, index))

    def _read(self, index: int) -> bytes:
        value = self.dataset[index][self.column]
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                return Path(value["path"]).read_bytes()
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise ValueError("the row holds no bytes of an image")
        return value


def find_hugging_face(argument: str, options: SourceConfig) -> Splits:
    """The splits of "hfds:ARGUMENT": a folder of `save_to_disk`, or parquet files.

    Parquet files are turned into Arrow once, in the cache of Hugging Face's library, for random
    access.

    Raises:
        ValueError: Hugging Face's `datasets` is not installed, or cannot read what is there.
        FileNotFoundError: there is nothing of the kind.
    """
    path = existing_path("hfds", argument)
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"data='hfds:{argument}' needs Hugging Face's datasets: pip install 'vitarium[data]'"
        ) from None
    stored = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    files: dict[str, list[str]] = {}
    if not stored:
        found = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
        if (path.is_file() and path.suffix != ".parquet") or not found:
            raise FileNotFoundError(
                f"data='hfds:{argument}': {path} holds neither a saved data set "
                "(dataset_dict.json, state.json) nor .parquet files"
            )
        for file in found:
            files.setdefault(_split_of(file, path, options), []).append(str(file))
        if len(files) > 1 and "all" in files:
            raise ValueError(
                f"{path}: the names of some files tell their split, others do not: "
                f"{Path(files['all'][0]).name}"
            )
    try:
        if stored:
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset("parquet", data_files=files)
    except Exception as error:  # pyarrow's and datasets' own
        cause: Any = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200]
        raise ValueError(f"data='hfds:{argument}' cannot be read: {reason}") from None
    splits = loaded if isinstance(loaded, dict) else {"": loaded}
    return {
        "" if name == "all" else str(name): partial(
            _read_rows, f"{path}:{name}" if name else str(path), dataset, options
        )
        for name, dataset in splits.items()
    }


def _split_of(file: Path, root: Path, options: SourceConfig) -> str:
    """The split that the path of a parquet file tells: `data/train-00000-of-00005.parquet`."""
    names = (*TRAIN_NAMES, *VAL_NAMES, options.train_split, options.val_split)
    parts = [*file.relative_to(root).parts[:-1], *file.stem.replace("_", "-").split("-")]
    return next((part for part in parts if part in names), "all")


def _read_rows(name: str, dataset: Any, options: SourceConfig) -> Labelled:
    import datasets

    features = dataset.features
    image = _column(
        name,
        "input_key",
        options.input_key,
        features,
        [key for key, feature in features.items() if isinstance(feature, datasets.Image)],
        "image",
    )
    label = _column(
        name,
        "target_key",
        options.target_key,
        features,
        [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)],
        "label",
    )
    values = dataset.select_columns([label]).with_format("numpy")[:][label]
    rows = dataset.select_columns([image])
    if isinstance(features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    images = Rows(name, rows, image)
    values = np.asarray(values)
    if isinstance(features[label], datasets.ClassLabel):
        classes = list(features[label].names)
        if len(values) and not 0 <= values.min() <= values.max() < len(classes):
            raise ValueError(f"{name}: some rows have no label (column {label!r})")
        labels = values.astype(np.int32)
    elif values.ndim == 1 and values.dtype.kind in "iuUOT":
        labels, classes = number_labels(map(str, values.tolist()))
    else:
        raise ValueError(f"{name}: column {label!r} holds no classes but {features[label]}")
    present = set(np.unique(labels).tolist())
    empty = [entry for number, entry in enumerate(classes) if number not in present]
    return Labelled(images, labels, classes, empty)


def _column(
    name: str, key: str, wanted: str | None, features: Any, fitting: Sequence[str], usual: str
) -> str:
    if wanted is None:
        if len(fitting) == 1:
            return fitting[0]
        wanted = usual
        if usual in features:
            return usual
        raise ValueError(
            f"{name} has the columns {', '.join(features)}; source.{key} says which to take"
        )
    if wanted not in features:
        raise ValueError(
            f"source.{key}={wanted!r}: {name} has the columns {', '.join(features)}"
            f"{nearest(wanted, features)}"
        )
    return wanted


# --- torchvision ---------------------------------------------------------------------------------


class Items(StoredImages):
    """Images of a torchvision data set, which decodes them itself."""

    def __init__(self, name: str, dataset: Any) -> None:
        super().__init__(len(dataset))
        self.name, self.dataset = name, dataset

    def item(self, index: int) -> StoredImage:
        return StoredImage(f"{self.name}[{index}]", lambda: self.dataset[index][0])


def find_torchvision(argument: str, options: SourceConfig) -> Splits:
    """The splits of "torch:NAME@ROOT": a class of `torchvision.datasets`, by its name in any case.

    Nothing is downloaded unless `options.download` says so.
    """
    from torchvision import datasets

    wanted, _, root = argument.partition("@")
    if not wanted or not root:
        raise ValueError(f"data='torch:{argument}' must be torch:NAME@ROOT")
    known = {name.lower().replace("_", ""): name for name in datasets.__all__}
    name = known.get(wanted.lower().replace("_", ""))
    if name is None:
        raise ValueError(
            f"data='torch:{argument}': torchvision has no data set {wanted!r}"
            f"{nearest(wanted, datasets.__all__)}"
        )
    build: Any = getattr(datasets, name)
    parameters = inspect.signature(build.__init__).parameters
    if "root" not in parameters:
        raise ValueError(f"data='torch:{argument}': {name} is no data set in a folder")
    arguments: dict[str, Any] = {"root": str(Path(root).expanduser())}
    if options.download:
        if "download" not in parameters and "kwargs" not in parameters:
            raise ValueError(f"source.download: torchvision cannot download {name}")
        arguments["download"] = True
        Path(arguments["root"]).mkdir(parents=True, exist_ok=True)
    try:
        if "train" in parameters:
            choices = {"train": {"train": True}, "test": {"train": False}}
        elif "split" in parameters:
            named = (*TRAIN_NAMES, *VAL_NAMES, options.train_split, options.val_split)
            choices = {str(split): {"split": split} for split in named if split}
        else:
            choices = {"": {}}
        found = {}
        for split, choice in choices.items():
            try:
                found[split] = build(**arguments, **choice)
            except ValueError:
                if "split" not in choice:  # otherwise it has no split of that name
                    raise
        if not found:
            raise ValueError("it has none of the usual splits; source.train_split names one")
    except (RuntimeError, OSError, ValueError, ImportError, TypeError) as error:
        reason = " ".join(str(error).split())[:300].replace("download=True", "source.download")
        raise ValueError(f"data='torch:{argument}' cannot be read: {reason}") from None
    return {split: partial(_read_items, name, split, dataset) for split, dataset in found.items()}


def _read_items(name: str, split: str, dataset: Any) -> Labelled:
    title = f"torchvision's {name} {split}".strip()
    for attribute in ("targets", "labels", "_labels", "y", "_samples", "samples"):
        targets = getattr(dataset, attribute, None)
        if targets is None:
            continue
        if attribute.endswith("samples"):
            targets = [sample[-1] for sample in targets]
        break
    else:
        raise ValueError(f"{title} does not list labels")
    values = np.asarray(targets)
    if values.ndim != 1 or values.dtype.kind not in "iu" or (len(values) and values.min() < 0):
        raise ValueError(f"{title} has no class per image")
    listed = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None) or ()
    classes = [str(entry) for entry in listed]
    if len(values) and len(classes) <= values.max():
        classes = [str(number) for number in range(int(values.max()) + 1)]
    present = set(np.unique(values).tolist())
    empty = [entry for number, entry in enumerate(classes) if number not in present]
    return Labelled(Items(title, dataset), values.astype(np.int32), classes, empty)
