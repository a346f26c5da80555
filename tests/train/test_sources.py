"""Sources: one set of drawn images, stored in every way, is read as timm reads it."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from vitarium.train.config import ConfigError, SourceConfig
from vitarium.train.data import Split, load_data
from vitarium.train.images import read_image
from vitarium.train.sources import find_splits

CLASSES = ("class_2", "class_10", "class_a")  # in natural order; "class_10" < "class_2" as strings
COUNT = {"train": 12, "val": 3}  # images of each class


def drawn(split: str, label: int, number: int) -> np.ndarray:
    """A small image that no other one equals."""
    generator = np.random.default_rng((split == "val", label, number))
    return generator.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def everything(split: str) -> list[tuple[int, str, bytes]]:
    """Class, file name and content of every image."""
    return [
        (label, f"{number:02}.png", encoded(drawn(split, label, number)))
        for label in range(len(CLASSES))
        for number in range(COUNT[split])
    ]


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images in every layout that is documented, by name."""
    root = tmp_path_factory.mktemp("stored")
    for split in COUNT:
        samples = everything(split)
        named = [(f"{CLASSES[label]}/{name}", content) for label, name, content in samples]
        for name, content in named:
            path = root / "folders" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        write_tar(root / "tars" / f"{split}.tar", named)
        for name in CLASSES:  # a tar file of every class
            own = [(f"{n.split('/')[1]}", c) for n, c in named if n.startswith(f"{name}/")]
            write_tar(root / "class_tars" / split / f"{name}.tar", own)
        shards = [samples[0::2], samples[1::2]]
        for number, shard in enumerate(shards):
            for layout, path in (
                ("names", f"drawn-{split}-{number:04}.tar"),
                ("shards", f"{split}/{number}.tar"),
            ):
                members = []
                for label, name, content in shard:
                    key = f"{label}_{name[:2]}"
                    members += [(f"{key}.png", content), (f"{key}.cls", str(label).encode())]
                    members += [(f"{key}.json", json.dumps({"wnid": CLASSES[label]}).encode())]
                write_tar(root / layout / path, members)
    write_tar(
        root / "whole.tar",
        [
            (f"data/{split}/{CLASSES[label]}/{name}", content)
            for split in COUNT
            for label, name, content in everything(split)
        ],
    )
    nested = root / "nested"
    write_tar(
        nested / "nested.tar",
        [
            (path.name, path.read_bytes())
            for path in sorted((root / "class_tars" / "train").iterdir())
        ],
    )
    (root / "shards" / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "map.txt").write_text("class_a\nclass_2\n")
    (root / "names.txt").write_text("\n".join(CLASSES))
    return root


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as Hugging Face data sets on disk."""
    import datasets

    root = tmp_path_factory.mktemp("tables")
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=list(CLASSES)),
        wnid=datasets.Value("string"),
    )
    both = {}
    for split in COUNT:
        rows = everything(split)
        columns = {
            "image": [{"bytes": content, "path": name} for _, name, content in rows],
            "label": [label for label, _, _ in rows],
            "wnid": [CLASSES[label] for label, _, _ in rows],
        }
        both[split] = datasets.Dataset.from_dict(columns, features)
        (root / "parquet" / "data").mkdir(parents=True, exist_ok=True)
        both[split].to_parquet(root / "parquet" / "data" / f"{split}-00000-of-00001.parquet")
    datasets.DatasetDict(both).save_to_disk(root / "saved")
    both["train"].save_to_disk(root / "one")
    return root


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scans in MNIST's files."""
    root = tmp_path_factory.mktemp("mnist")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">iiii", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = struct.pack(">ii", 0x801, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return root


def contents(split: Split) -> list[tuple[bytes, int]]:
    """Pixels and class of every image, in an order that no storage decides."""
    pairs = [(read_image(image).tobytes(), int(t)) for image, t in zip(split.images, split.targets)]
    return sorted(pairs)


def expected(split: str) -> list[tuple[bytes, int]]:
    return sorted(
        (drawn(split, label, number).tobytes(), label)
        for label in range(len(CLASSES))
        for number in range(COUNT[split])
    )


TWO_SPLITS = [
    "folder:{stored}/folders",
    "tar:{stored}/tars",
    "tar:{stored}/class_tars",
    "tar:{stored}/whole.tar",
    "wds:{stored}/shards",
    "wds:{stored}/names",
    "hfds:{tables}/saved",
    "hfds:{tables}/parquet",
]


@pytest.mark.parametrize("source", TWO_SPLITS)
def test_splits_by_their_names(source: str, stored: Path, tables: Path) -> None:
    data = load_data(source.format(stored=stored, tables=tables))
    names = source.startswith("wds") and source.endswith("names")
    assert data.classes == (["0", "1", "2"] if names else list(CLASSES))
    assert contents(data.train) == expected("train")
    assert contents(data.held_out) == expected("val")
    assert data.broken.total == 45


ONE_SPLIT = [
    "folder:{stored}/folders/train",
    "tar:{stored}/tars/train.tar",
    "tar:{stored}/class_tars/train",
    "tar:{stored}/nested/nested.tar",
    "wds:{stored}/shards/train",
    "wds:{stored}/names/drawn-train-{{0000..0001}}.tar",
    "wds:{stored}/names/drawn-train-{{0000,0001}}.tar",
    "wds:{stored}/shards/train/0.tar::{stored}/shards/train/1.tar",
    "wds:{stored}/names/*-train-*.tar",
    "hfds:{tables}/one",
    "hfds:{tables}/parquet/data/train-00000-of-00001.parquet",
]


@pytest.mark.parametrize("source", ONE_SPLIT)
def test_a_fifth_of_every_class_is_held_out(source: str, stored: Path, tables: Path) -> None:
    source = source.format(stored=stored, tables=tables)
    data, again = load_data(source), load_data(source)
    assert sorted(contents(data.train) + contents(data.held_out)) == expected("train")
    assert contents(data.held_out) == contents(again.held_out)
    counts = np.bincount(data.held_out.targets)
    assert len(counts) == 3 and counts.min() >= 2 and counts.max() <= 3


def test_another_place_for_the_held_out_images(stored: Path) -> None:
    options = SourceConfig(val_data=f"tar:{stored}/tars/val.tar")
    data = load_data(f"folder:{stored}/folders/train", options)
    assert contents(data.train) == expected("train") and contents(data.held_out) == expected("val")
    options = SourceConfig(train_split="val", val_split="train")
    data = load_data(f"tar:{stored}/tars", options)
    assert contents(data.train) == expected("val") and contents(data.held_out) == expected("train")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("folder:{stored}/folders/train", ""),
        ("tar:{stored}/tars/train.tar", ""),
    ],
)
def test_as_timm_reads_it(source: str, name: str, stored: Path) -> None:
    source = source.format(stored=stored)
    ours = find_splits(source, SourceConfig())[""]()
    theirs = create_dataset(name, source.partition(":")[2])
    key = "class_to_idx" if hasattr(theirs.reader, "class_to_idx") else "class_name_to_idx"
    assert {c: i for i, c in enumerate(ours.classes)} == getattr(theirs.reader, key)
    want = sorted((image.tobytes(), int(target)) for image, target in theirs)
    assert contents(Split(ours.images, ours.labels.tolist())) == want


@pytest.mark.parametrize("place", ["class_tars/train", "nested/nested.tar"])
def test_tars_of_classes_as_timm_reads_them(place: str, stored: Path) -> None:
    ours = find_splits(f"tar:{stored / place}", SourceConfig())[""]()
    reader = ReaderImageInTar(str(stored / place))
    assert {c: i for i, c in enumerate(ours.classes)} == reader.class_name_to_idx
    want = [(read_image(Image.open(file)).tobytes(), int(target)) for file, target in reader]
    assert contents(Split(ours.images, ours.labels.tolist())) == sorted(want)


def test_hugging_face_as_timm_reads_it(tables: Path) -> None:
    theirs = create_dataset(f"hfds/{tables}/parquet", str(tables / "cache"), split="train")
    ours = load_data(f"hfds:{tables}/parquet").train
    assert list(ours.targets) == [int(target) for _, target in theirs]
    assert all(read_image(a).tobytes() == b.tobytes() for a, (b, _) in zip(ours.images, theirs))


def test_torchvision(mnist: Path) -> None:
    data = load_data(f"torch:mnist@{mnist}")
    assert (len(data.train.targets), len(data.held_out.targets)) == (40, 20)
    assert data.classes[3] == "3 - three" and list(data.train.targets) == [*range(10)] * 4
    theirs = create_dataset("torch/mnist", str(mnist), split="train")
    for ours, (image, _) in zip(data.train.images, theirs):
        assert read_image(ours).tobytes() == image.convert("RGB").tobytes()


def test_torchvision_by_the_names_of_splits(tmp_path: Path) -> None:
    root = tmp_path / "gtsrb"
    rows = ["Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;Filename;ClassId"]
    for number in range(6):
        folders = (root / "GTSRB/Training" / f"{number % 2:05}", root / "GTSRB/Final_Test/Images")
        for seed, folder in enumerate(folders):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn("train", seed, number)).save(folder / f"{number:05}.ppm")
        rows.append(f"9;6;0;0;9;6;{number:05}.ppm;{number % 2}")
    (root / "GT-final_test.csv").write_text("\n".join(rows))
    data = load_data(f"torch:GTSRB@{tmp_path}")
    assert data.classes == ["0", "1"]
    assert contents(data.train) == sorted((drawn("train", 0, i).tobytes(), i % 2) for i in range(6))
    assert contents(data.held_out) == sorted(
        (drawn("train", 1, i).tobytes(), i % 2) for i in range(6)
    )


@pytest.mark.skipif(os.name != "posix", reason="names are bytes there")
def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        with open(os.fsencode(tmp_path / label) + b"/\xff.png", "wb") as file:
            file.write(encoded(drawn("train", 0, 0)))
    with pytest.raises(ValueError, match="is not UTF-8"):
        load_data(f"folder:{tmp_path}")


def test_class_maps(stored: Path, tmp_path: Path) -> None:
    """Which classes there are and in which order; the rest is left out, as timm does."""
    options = SourceConfig(class_map=str(stored / "map.txt"))
    data = load_data(f"folder:{stored}/folders", options)
    assert data.classes == ["class_a", "class_2"]
    swapped = {2: 0, 0: 1}
    for split, name in ((data.train, "train"), (data.held_out, "val")):
        assert contents(split) == sorted(
            (pixels, swapped[label]) for pixels, label in expected(name) if label in swapped
        )
    with open(tmp_path / "map.pkl", "wb") as file:
        pickle.dump({"class_2": 0, "class_10": 1, "class_a": 1}, file)  # two classes as one
    data = load_data(f"tar:{stored}/tars", SourceConfig(class_map=str(tmp_path / "map.pkl")))
    assert data.classes == ["class_2", "class_10"]
    assert np.bincount(data.train.targets).tolist() == [12, 24]
    # Names for the numbers of shards, and a field of their .json.
    options = SourceConfig(class_map=str(stored / "names.txt"))
    assert load_data(f"wds:{stored}/names", options).classes == list(CLASSES)
    data = load_data(f"wds:{stored}/names", SourceConfig(target_key="wnid"))
    assert data.classes == list(CLASSES) and contents(data.train) == expected("train")


def test_columns(tables: Path) -> None:
    data = load_data(f"hfds:{tables}/saved", SourceConfig(target_key="wnid", input_key="image"))
    assert data.classes == list(CLASSES) and contents(data.held_out) == expected("val")


def test_an_index_is_small(tmp_path: Path) -> None:
    """Arrays, not objects: some tens of bytes per image, and none of it per worker process."""
    write_tar(tmp_path / "t.tar", [(f"c{i % 2}/{i:07}.png", b"x") for i in range(3000)])
    split = find_splits(f"tar:{tmp_path}/t.tar", SourceConfig())[""]()
    members: Any = split.images
    arrays = (members.names, members.offsets, members.sizes, split.labels)
    assert sum(array.nbytes for array in arrays) <= 40 * len(split.images)
    clone = pickle.loads(pickle.dumps(members))  # as worker processes that are spawned get it
    assert clone[2999].name == members[2999].name and clone[2999].read() == b"x"


# --- wrong sources -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, stored: Path) -> Path:
    root = tmp_path_factory.mktemp("bad")
    whole = (stored / "tars" / "train.tar").read_bytes()
    (root / "cut.tar").write_bytes(whole[: len(whole) // 2 + 100])
    header = 512 * (1 + -(-len(encoded(drawn("train", 0, 0))) // 512))
    (root / "damaged.tar").write_bytes(whole[:header] + b"\xff" * 512 + whole[header + 512 :])
    (root / "text.tar").write_text("hello" * 300)
    (root / "nothing.tar").write_bytes(b"")
    (root / "empty").mkdir()
    with tarfile.open(root / "packed.tar", "w:gz") as archive:
        archive.add(stored / "folders" / "val", "val")
    png = encoded(drawn("val", 0, 0))
    write_tar(root / "flat.tar", [("1.png", png)])
    write_tar(root / "no_label.tar", [("1.png", png), ("2.png", png)])
    write_tar(root / "no_image.tar", [("1.cls", b"0")])
    write_tar(root / "no_json.tar", [("1.png", png), ("1.json", b"[1")])
    write_tar(root / "list.tar", [("1.png", png), ("1.json", b'{"label": [1, 2]}')])
    write_tar(root / "date.tar", [("1.png", png), ("1.cls", b"20240131")])
    write_tar(root / "two.tar", [("1.png", png), ("1.jpg", png), ("1.cls", b"0")])
    (root / "info").mkdir()
    (root / "info" / "_info.json").write_text('{"splits": 3}')
    (root / "mixed").mkdir()
    for name in ("train-0.tar", "other.tar"):
        (root / "mixed" / name).write_bytes(whole)
    (root / "more").mkdir()
    for split, names in (("train", "ab"), ("val", "abc")):
        for name in names:
            (root / "more" / split / name).mkdir(parents=True)
            (root / "more" / split / name / "1.png").write_bytes(png)
    (root / "not.parquet").write_text("hello")
    (root / "gap.pkl").write_bytes(pickle.dumps({"a": 0, "b": 2}))
    (root / "code.pkl").write_bytes(pickle.dumps(print))
    (root / "twice.txt").write_text("a\na\n")
    (root / "others.txt").write_text("cat\ndog\n")
    return root


# Source, options, and what the message must say.
WRONG = [
    ("tar:", {}, "lacks the path"),
    ("tar:{bad}/nowhere", {}, "nowhere does not exist"),
    ("tar:{bad}/empty", {}, "holds no .tar file"),
    ("tar:{bad}/text.tar", {}, "text.tar cannot be read as an uncompressed tar file"),
    ("tar:{bad}/nothing.tar", {}, "nothing.tar cannot be read"),
    ("tar:{bad}/cut.tar", {}, "cut.tar cannot be read"),
    ("tar:{bad}/damaged.tar", {}, "no header and no end at byte"),
    ("tar:{bad}/packed.tar", {}, "packed.tar cannot be read as an uncompressed tar file"),
    ("tar:{bad}/flat.tar", {}, "1.png has no class"),
    ("wds:", {}, "wds:PATTERN"),
    ("wds:{bad}/empty", {}, "holds no .tar file"),
    ("wds:{bad}/x-{{00..12}}.tar", {}, "13 of 13 shards are missing, the first is {bad}/x-00.tar"),
    ("wds:{bad}/*.shard", {}, "shards are missing"),
    ("wds:{bad}/no_label.tar", {}, "sample '1' of {bad}/no_label.tar has no label: it needs .cls"),
    ("wds:{bad}/no_label.tar", {"target_key": "id"}, "a .json with the field 'id'"),
    ("wds:{bad}/no_image.tar", {}, "sample '1' of {bad}/no_image.tar has no image"),
    ("wds:{bad}/no_json.tar", {}, "the .json of sample '1'"),
    ("wds:{bad}/list.tar", {}, "is no class: [1, 2]"),
    ("wds:{bad}/date.tar", {}, "label 20240131 in {bad} is no index of a class"),
    ("wds:{bad}/two.tar", {}, "sample '1' of {bad}/two.tar has several images"),
    ("wds:{bad}/info", {}, "does not list the shards"),
    ("wds:{bad}/mixed", {}, "others do not: other.tar"),
    ("folder:{bad}/more", {}, "different classes: c"),
    ("folder:{stored}/folders", {"val_split": "vall"}, "source.val_split='vall'"),
    ("folder:{stored}/folders/val", {"train_split": "x"}, "has no named splits"),
    ("folder:{stored}/folders", {"val_data": "tar:{bad}/nowhere"}, "nowhere does not exist"),
    ("folder:{stored}/folders", {"class_map": "{bad}/no.txt"}, "no.txt' does not exist"),
    ("folder:{stored}/folders", {"class_map": "{bad}/flat.tar"}, "must end in .txt or .pkl"),
    ("folder:{stored}/folders", {"class_map": "{bad}/gap.pkl"}, "every index from 0 on"),
    ("folder:{stored}/folders", {"class_map": "{bad}/code.pkl"}, "not permitted"),
    ("folder:{stored}/folders", {"class_map": "{bad}/twice.txt"}, "names 'a' twice"),
    ("folder:{stored}/folders", {"class_map": "{bad}/others.txt"}, "names none of the classes"),
    ("hfds:{bad}/nowhere", {}, "nowhere does not exist"),
    ("hfds:{bad}/empty", {}, "nor .parquet files"),
    ("hfds:{bad}/not.parquet", {}, "cannot be read"),
    ("hfds:{tables}/saved", {"target_key": "lable"}, "did you mean 'label'?"),
    ("hfds:{tables}/saved", {"input_key": "img"}, "has the columns image, label, wnid"),
    ("hfds:{tables}/saved", {"target_key": "image"}, "holds no classes"),
    ("torch:mnist", {}, "must be torch:NAME@ROOT"),
    ("torch:mnits@{bad}", {}, "torchvision has no data set 'mnits' (did you mean"),
    ("torch:mnist@{bad}/empty", {}, "use source.download"),
    ("torch:fake_data@{bad}", {}, "FakeData is no data set in a folder"),
]


@pytest.mark.parametrize(("source", "options", "message"), WRONG)
def test_wrong_sources(
    source: str,
    options: dict[str, str],
    message: str,
    bad: Path,
    stored: Path,
    tables: Path,
) -> None:
    def fill(text: str) -> str:
        return text.format(bad=bad, stored=stored, tables=tables)

    before = sorted(bad.rglob("*"))
    chosen: Any = {key: fill(value) for key, value in options.items()}
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_data(fill(source), SourceConfig(**chosen))
    assert fill(message) in str(error.value) and "\n" not in str(error.value)
    assert sorted(bad.rglob("*")) == before


def test_without_hugging_face(tables: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'vitarium\[data\]'"):
        load_data(f"hfds:{tables}/saved")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_broken": -1}, "source.max_broken=-1"),
        ({"max_broken": 2.5}, "a fraction below 1, or a whole number"),
        ({"val_data": ""}, "source.val_data=''"),
        ({"train_split": "a", "val_split": "a"}, "another split than source.train_split"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        SourceConfig(**options)
    assert message in str(error.value)
