"""Class folders: one folder of images per class, perhaps below `train/` and `val/`."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from vitarium.train.config import SourceConfig
from vitarium.train.images import image_suffixes
from vitarium.train.sources import (
    TRAIN_NAMES,
    VAL_NAMES,
    Labelled,
    Splits,
    StoredImages,
    number_labels,
    text_array,
)


class Files(StoredImages):
    """Image files below a folder.

    Args:
        root: the folder.
        names: their paths in it, an array of strings.
    """

    def __init__(self, root: Path, names: np.ndarray) -> None:
        super().__init__(len(names))
        self.root, self.names = root, names

    def item(self, index: int) -> Path:
        return self.root / self.names[index]


def find_folders(argument: str, options: SourceConfig) -> Splits:
    """The splits of "folder:ARGUMENT": the folders that are named as splits, else all of it."""
    if not argument:
        raise ValueError("data='folder:' lacks the path: folder:PATH")
    root = Path(argument).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data='folder:{argument}': {root} is not a folder")
    wanted = {options.train_split, options.val_split} - {None}
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    # A data set may have a class called "test"; what tells splits from classes is "train".
    if wanted & set(folders) or set(TRAIN_NAMES) & set(folders):
        names = [name for name in folders if name in (*TRAIN_NAMES, *VAL_NAMES, *wanted)]
        return {name: partial(read_class_folders, root / name) for name in names}
    return {"": partial(read_class_folders, root)}


def read_class_folders(root: Path) -> Labelled:
    """Every image below `root`; its class is the name of the folder that holds it.

    Files right in `root` have no class: they are ignored and counted, like files that are no
    images.

    Raises:
        FileNotFoundError: `root` holds no folder.
        OSError: a folder cannot be listed.
    """
    suffixes = image_suffixes()
    names: list[str] = []
    labels: list[str] = []
    leaves: set[str] = set()
    ignored: Counter[str] = Counter()
    for folder, folders, files in os.walk(root, onerror=_raise, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # to walk so
        relative = os.path.relpath(folder, root)
        inside = relative != os.curdir
        label = os.path.basename(relative)
        if inside and not folders:
            leaves.add(label)
        for file in sorted(files):
            suffix = os.path.splitext(file)[1].lower()
            if inside and suffix in suffixes:
                names.append(os.path.join(relative, file))
                labels.append(label)
            else:
                ignored[suffix or file] += 1
    if not labels and not leaves:
        raise FileNotFoundError(f"{root} holds no class folder")
    indices, classes = number_labels(labels)
    empty = sorted(leaves - set(classes))
    return Labelled(Files(root, text_array(names)), indices, classes, empty, dict(ignored))


def _raise(error: OSError) -> None:
    raise error
