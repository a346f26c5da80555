"""`vitarium data check`: every finding, in every layout, and one clear error for a wrong call."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitarium.cli.main import main
from vitarium.train.check import check_data, guess_source


def draw(path: Path, seed: int, mode: str = "RGB", size: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, 6 and 3 images to train on, 2 each to hold out."""
    root = tmp_path_factory.mktemp("clean")
    for number in range(9):
        draw(root / "train" / ("cat" if number < 6 else "dog") / f"{number}.png", number)
    for number in range(4):
        draw(root / "val" / ("cat" if number < 2 else "dog") / f"{number}.png", 100 + number)
    return root


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one of each thing that is reported."""
    root = tmp_path_factory.mktemp("dirty")
    for number in range(9):
        draw(root / "train" / ("cat" if number < 6 else "dog") / f"{number}.png", number)
    for number in range(4):
        draw(root / "val" / ("cat" if number < 2 else "dog") / f"{number}.png", 100 + number)
    draw(root / "val" / "dog" / "leak.bmp", 8)  # train/dog/8.png in another format
    draw(root / "train" / "dog" / "twice.png", 7)
    draw(root / "train" / "dog" / "cat.png", 5)
    draw(root / "train" / "cat" / "large.png", 50, "L", (40, 30))
    (root / "train" / "cat" / "broken.jpg").write_text("hello")
    (root / "val" / "cat" / "empty.png").write_bytes(b"")
    (root / "train" / "cat" / "notes.txt").write_text("hello")
    (root / "train" / "nothing").mkdir()
    draw(root / "val" / "fish" / "1.png", 60)
    return root


def names(root: Path, *paths: str) -> list[str]:
    return [str(root / path) for path in paths]


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_is_found(dirty: Path, workers: int) -> None:
    seen = []
    report = check_data(
        f"folder:{dirty}", workers=workers, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (20, 20)
    train, val = report.splits["train"], report.splits["val"]
    assert (train.images, val.images) == (13, 7)
    assert train.classes == {"cat": 8, "dog": 5} and val.classes["dog"] == 3
    assert train.balance == 1.6 and train.empty == ["nothing"] and train.ignored == {".txt": 1}
    assert train.width == {"min": 12, "median": 12, "max": 40}
    assert train.height == {"min": 8, "median": 8, "max": 30}
    assert train.modes == {"RGB": 11, "L": 1}
    size = sum(path.stat().st_size for path in (dirty / "train").rglob("*.png"))
    assert train.megabytes == pytest.approx(size / 1e6, abs=1e-3)
    assert [entry["image"] for entry in train.broken] == names(dirty, "train/cat/broken.jpg")
    assert [entry["image"] for entry in val.broken] == names(dirty, "val/cat/empty.png")
    assert train.duplicates == [
        names(dirty, "train/cat/5.png", "train/dog/cat.png"),
        names(dirty, "train/dog/7.png", "train/dog/twice.png"),
    ]
    assert [[entry["image"] for entry in group] for group in report.leaks] == [
        names(dirty, "train/dog/8.png", "val/dog/leak.bmp")
    ]
    assert [entry["class"] for entry in report.contradictions[0]] == ["cat", "dog"]
    assert len(report.contradictions) == 1
    assert report.unshared_classes == {"fish": ["val"]}
    assert report.problems == [
        "train: 1 of 13 images are broken",
        "train: 1 classes are empty",
        "val: 1 of 7 images are broken",
        "1 images are in several splits",
        "1 classes are not in every split",
    ]
    assert report.images_per_second > 0 and report.megabytes_per_second > 0


def test_the_command_says_it_all(dirty: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "report.json"
    assert main(["data", "check", str(dirty), "--workers", "0", "--json", str(output)]) == 1
    shown = capsys.readouterr().out
    for text in (
        "1.60",
        "12 / 12 / 40",
        f"image {dirty}/train/cat/broken.jpg cannot be read: cannot identify image file",
        f"{dirty}/train/dog/8.png (dog) = {dirty}/val/dog/leak.bmp (dog)",
        "nothing",
        "fish (only in val)",
        "images/s",
    ):
        assert text in shown, text
    record = json.loads(output.read_text())
    assert record["splits"]["train"]["broken"][0]["image"].endswith("broken.jpg")
    assert len(record["problems"]) == 5


def test_nothing_to_find(clean: Path, capsys) -> None:
    assert main(["data", "check", str(clean), "--workers", "0"]) == 0
    assert "nothing broken, nothing in several splits" in capsys.readouterr().out
    draw(clean.parent / "elsewhere" / "cat" / "1.png", 3)
    draw(clean.parent / "elsewhere" / "dog" / "1.png", 99)
    arguments = ["--source.val_data", f"folder:{clean.parent / 'elsewhere'}", "--workers", "0"]
    assert main(["data", "check", f"folder:{clean}", *arguments]) == 1  # cat/3.png
    assert "1 images are in several splits" in capsys.readouterr().out


def pack(folder: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        archive.add(folder, folder.name)
    return path


def test_what_a_path_is(clean: Path, tmp_path: Path) -> None:
    """Without a scheme, by what is there; and the report is that of the folders."""
    whole = pack(clean, tmp_path / "all" / "whole.tar")
    shard = tmp_path / "shards" / "train-0.tar"
    shard.parent.mkdir()
    label = tmp_path / "0.cls"
    label.write_text("0")
    with tarfile.open(shard, "w") as archive:
        for number, path in enumerate(sorted((clean / "train").rglob("*.png"))):
            archive.add(path, f"{number}.png")
            archive.add(label, f"{number}.cls")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    for path, scheme in (
        (clean, "folder"),
        (whole, "tar"),
        (whole.parent, "tar"),
        (shard, "wds"),
        (shard.parent, "wds"),
        (tmp_path / "saved", "hfds"),
    ):
        assert guess_source(str(path)) == f"{scheme}:{path}"
    assert guess_source(f"{shard.parent}/train-{{0..0}}.tar").startswith("wds:")
    assert guess_source("digits") == "digits"
    sources = (f"folder:{clean}", f"tar:{whole}")
    folders, archive_report = (check_data(f"{s}", workers=0) for s in sources)
    for split, report in folders.splits.items():
        assert archive_report.splits[split].classes == report.classes
        assert archive_report.splits[split].megabytes == report.megabytes
    assert check_data(f"wds:{shard}", workers=0).splits["all"].images == 9


WRONG = [
    ("data", 2, "action"),
    ("data chekc .", 2, "chekc"),
    ("data check", 2, "path"),
    ("data check . --worker 2", 2, "did you mean 'workers'?"),
    ("data check . --workers -1", 2, "workers"),
    ("data check . --source.max_broken -1", 2, "source.max_broken=-1"),
    ("data check . --source.class_mpa x", 2, "did you mean 'source.class_map'?"),
    ("data check {tmp}/nowhere", 1, "nowhere does not exist"),
    ("data check tar:{tmp}/nowhere", 1, "nowhere does not exist"),
    ("data check {tmp}/empty", 1, "empty holds no class folder"),
    ("data check {tmp}/text.tar", 1, "text.tar cannot be read as an uncompressed tar file"),
    ("data check {clean} --json {tmp}", 1, "cannot be written"),
    ("data check {clean} --json {tmp}/nowhere/x.json", 1, "cannot be written"),
    ("data check {clean} --source.val_data fodler:x", 1, "did you mean 'folder'?"),
    ("data check {clean} --source.train_split trian", 1, "did you mean 'train'?"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), WRONG, ids=[row[0] for row in WRONG])
def test_wrong_calls(
    arguments: str, status: int, message: str, clean: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("hello")
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments.format(tmp=tmp_path, clean=clean).split()) == status
    stderr = capsys.readouterr().err
    assert stderr.startswith("vitarium: error: ") and message in stderr
    assert len(stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
