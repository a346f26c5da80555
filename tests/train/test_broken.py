"""Broken images are named, counted, replaced while training, and never a right answer."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import ImageDataset
from timm.data.distributed_sampler import RepeatAugSampler
from torch import nn

from vitarium.cli.main import main
from vitarium.train import Interrupted, TrainConfig, evaluate, resume, train
from vitarium.train.config import AugmentConfig, SourceConfig
from vitarium.train.data import (
    EpochBatches,
    InputConfig,
    Samples,
    batches,
    create_loader,
    load_data,
    read_image,
)
from vitarium.train.evaluate import create_accelerator, held_out_loader, score
from vitarium.train.images import Broken, BrokenDataError, BrokenImages

INPUTS = InputConfig((8, 8), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
CPU = torch.device("cpu")


# --- what is read, and how -----------------------------------------------------------------------


def noise(*shape: int, most: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, most, shape)


def draw_odd_images(folder: Path) -> None:
    """Files that are unusual but whole."""
    folder.mkdir(parents=True)
    colours = noise(9, 12, 3).astype(np.uint8)
    image = Image.fromarray(colours)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("RGBA").save(folder / "rgba.png")
    image.convert("LA").save(folder / "la.png")
    image.convert("1").save(folder / "1.png")
    image.convert("L").save(folder / "grey.jpg")
    palette = image.quantize(16)
    palette.save(folder / "palette.png", transparency=bytes(range(16)))
    palette.save(folder / "palette_index.png", transparency=3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(folder / "exif.jpg", exif=exif)
    frames = [Image.fromarray(noise(9, 12, 3, most=level).astype(np.uint8)) for level in (99, 200)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    image.save(folder / "named_wrongly.jpg", "PNG")


def test_odd_images_are_read_as_timm_reads_them(tmp_path: Path, recwarn) -> None:
    draw_odd_images(tmp_path / "all" / "odd")
    names = sorted((tmp_path / "all" / "odd").iterdir())
    ours = {path.name: np.asarray(read_image(path)) for path in names}
    assert not [warning for warning in recwarn if "Palette" in str(warning.message)]
    assert len(ours) == 10 and ours["exif.jpg"].shape == (9, 12, 3)  # not turned
    for path in names:
        with Image.open(path) as image:
            theirs = np.asarray(image.convert("RGB"))
        assert (ours[path.name] == theirs).all(), path.name
    timm_images = ImageDataset(str(tmp_path / "all"))
    for number, name in enumerate(timm_images.filenames(basename=True)):
        assert (ours[name] == np.asarray(timm_images[number][0])).all(), name


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(suffix: str, tmp_path: Path) -> None:
    pixels = noise(9, 12, most=2**16).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"deep.{suffix}")
    assert (np.asarray(read_image(tmp_path / f"deep.{suffix}"))[..., 1] == pixels >> 8).all()


def chunk(name: bytes, content: bytes) -> bytes:
    check = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)


def break_image(path: Path, way: int) -> None:
    """Damage a PNG in one of several ways."""
    whole = path.read_bytes()
    bomb = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    ways = [
        whole[: len(whole) // 2],  # truncated
        b"",
        b"404: not found\n",
        whole[:8] + bomb + whole[33:],  # 2.5 billion pixels in a few bytes
        bytes(len(whole)),
        whole[:60] + b"\xff" * 20 + whole[80:],
    ]
    path.write_bytes(ways[way % len(ways)])


@pytest.mark.parametrize("way", range(6))
def test_every_way_to_be_broken_is_one_error(way: int, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(noise(32, 32, 3).astype(np.uint8)).save(path)
    break_image(path, way)
    with pytest.raises(ValueError, match=r"^image .*image\.png cannot be read: [^\n]+$"):
        read_image(path)


# --- samples -------------------------------------------------------------------------------------


def draw_folder(root: Path, count: int, broken: Iterable[int], classes: int = 2) -> list[str]:
    """Class folders of `count` drawn images, and the paths of those that are broken."""
    paths = []
    generator = np.random.default_rng(1)
    for number in range(count):
        label = number % classes
        path = root / f"class_{label}" / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 120, (24, 24, 3)) + 100 * label
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        paths.append(path)
    damaged = [paths[number] for number in broken]
    for way, path in enumerate(damaged):
        break_image(path, way)
    return sorted(map(str, damaged))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """60 images, 6 of them broken, in another way each."""
    root = tmp_path_factory.mktemp("broken")
    return root, draw_folder(root, 60, range(3, 60, 10))


def recorded(run: Path) -> list[str]:
    lines = (run / "broken.jsonl").read_text().splitlines()
    return sorted(json.loads(line)["image"] for line in lines)


@pytest.mark.parametrize("workers", [1, 2])
def test_another_image_stands_in_whoever_reads(folder, workers: int) -> None:
    data = load_data(f"folder:{folder[0]}")

    def epoch(workers: int, number: int) -> tuple[list[torch.Tensor], list[str]]:
        broken = BrokenImages(60, 10)
        samples = Samples(data.train, INPUTS.transform(AugmentConfig()), broken)
        loader = create_loader(samples, workers, batch_sampler=EpochBatches(len(samples), 8, 3))
        loader.batch_sampler.epoch = number  # type: ignore[union-attr]
        pairs = list(batches(loader, CPU))
        assert all(len(images) == len(targets) == 8 for images, targets in pairs)
        return [tensor for pair in pairs for tensor in pair], sorted(broken.found)

    first, found = epoch(0, 0)
    again, found_again = epoch(workers, 0)
    assert found == found_again and 1 <= len(found) <= 6 and set(found) <= set(folder[1])
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    other, _ = epoch(0, 1)
    assert not all(torch.equal(a, b) for a, b in zip(first, other))


def test_the_stand_in_is_a_function_of_seed_epoch_and_image(folder) -> None:
    data = load_data(f"folder:{folder[0]}")
    place = next(i for i, path in enumerate(data.train.images) if str(path) in folder[1])
    samples = Samples(data.train, np.asarray)
    keys = [(0, 0), (0, 1), (1, 0)]
    chosen = [samples[place, seed, 1, epoch].image.tobytes() for seed, epoch in keys]
    assert chosen[0] == samples[place, 0, 1, 0].image.tobytes()
    assert len(set(chosen)) == 3
    assert samples[place].image is None  # evaluation: nothing stands in
    assert samples[place].broken[0].name == str(data.train.images[place])


def test_nothing_is_broken_by_default(folder) -> None:
    samples = Samples(load_data(f"folder:{folder[0]}").train, INPUTS.transform())
    with pytest.raises(BrokenDataError, match=r"cannot be read, source.max_broken allows 0: image"):
        list(batches(create_loader(samples, 0, batch_size=8), CPU))


@pytest.mark.parametrize(
    ("total", "allowed", "limit"),
    [(2000, 0.01, 20), (60, 0.01, 1), (60, 0.25, 15), (60, 0, 0), (60, 1, 1), (60, 7, 7)],
)
def test_how_many_may_be_broken(total: int, allowed: float, limit: int) -> None:
    broken = BrokenImages(total, allowed)
    assert broken.limit == limit
    for number in range(limit):
        broken.add([Broken(f"{number}", f"image {number} cannot be read")] * 2)  # counted once
    with pytest.raises(BrokenDataError, match=rf"^{limit + 1} images of {total} cannot be read"):
        broken.add([Broken("more", "image more cannot be read")])


def test_processes_share_what_they_found(tmp_path: Path) -> None:
    ours, theirs = BrokenImages(100, 2), BrokenImages(100, 2)
    ours.record_in(tmp_path / "broken.jsonl", write=True)
    ours.add([Broken("a", "image a cannot be read")])
    theirs.add([Broken("b", "image b cannot be read")])
    gathered = [*ours.found.items(), *theirs.found.items()]
    for broken in (ours, theirs):
        broken.share(lambda _: gathered)
    assert recorded(tmp_path) == ["a", "b"] and sorted(theirs.found) == ["a", "b"]
    with open(tmp_path / "broken.jsonl", "a") as file:
        file.write('{"image": "half')  # as a process leaves it that is killed
    after = BrokenImages(100, 3)
    after.record_in(tmp_path / "broken.jsonl", write=True)
    after.add([Broken("a", "-"), Broken("c", "image c cannot be read")])
    lines = (tmp_path / "broken.jsonl").read_text().splitlines()
    assert [line for line in lines if '"c"' in line] == [lines[-1]] and len(after) == 3
    with pytest.raises(BrokenDataError):
        after.share(lambda found: [*found, ("d", "image d cannot be read")])


def test_an_error_ends_the_program_and_its_workers(tmp_path: Path) -> None:
    """Workers ignore the SIGTERM of a cluster, but not that of their program's end."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from vitarium.train.data import Samples, batches, create_loader, load_data\n"
        "loader = create_loader(Samples(load_data('digits').train, len), 1, batch_size=8)\n"
        "for _ in batches(loader, torch.device('cpu')):\n"
        "    pass\n"
    )
    command = [sys.executable, str(script)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1 and "TypeError" in process.stderr


# --- evaluation ----------------------------------------------------------------------------------


class Bright(nn.Module):
    """Class 1 for bright images, which is right for all images of `draw_folder`."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        light = images.mean((1, 2, 3))
        return torch.stack([torch.zeros_like(light), 100 * (light + 0.13)], 1)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_evaluation_leaves_broken_images_out_and_says_so(folder, batch_size: int) -> None:
    data = load_data(f"folder:{folder[0]}", SourceConfig(max_broken=0.5))
    data = dataclasses.replace(data, held_out=data.train)
    accelerator = create_accelerator("cpu", "no")
    loader = held_out_loader(data, INPUTS, batch_size, 0, accelerator)
    broken = sum(str(path) in folder[1] for path in data.train.images)
    evaluation = score(Bright(), loader, INPUTS, accelerator)
    assert evaluation.broken == broken > 0
    assert evaluation.correct == evaluation.total == len(data.train.targets) - broken
    assert sorted(data.broken.found) == [n for n in folder[1] if n in map(str, data.train.images)]


def test_nothing_to_evaluate(tmp_path: Path) -> None:
    draw_folder(tmp_path, 20, range(20))
    data = load_data(f"folder:{tmp_path}", SourceConfig(max_broken=20))
    accelerator = create_accelerator("cpu", "no")
    loader = held_out_loader(data, INPUTS, 2, 0, accelerator)
    with pytest.raises(ValueError, match="none of the 4 held-out images can be read"):
        score(Bright(), loader, INPUTS, accelerator)


# --- runs ----------------------------------------------------------------------------------------


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last.safetensors")


def test_a_run_says_which_images_are_broken(
    folder, tiny_config: TrainConfig, tmp_path: Path, monkeypatch
) -> None:
    """Also when it is interrupted: the same weights, and every image listed once."""
    config = dataclasses.replace(
        tiny_config, data=f"folder:{folder[0]}", source=SourceConfig(max_broken=0.1), epochs=2
    )
    whole = train(config, output=tmp_path / "whole")
    assert recorded(whole.folder) == folder[1]
    log = (whole.folder / "train.log").read_text()
    assert all(log.count(f"image {name} cannot be read") == 1 for name in folder[1])
    assert whole.last["broken"] + whole.last["total"] == 12
    original, calls = BrokenImages.add, []

    def add(self: BrokenImages, broken: Any) -> None:
        original(self, broken)
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(BrokenImages, "add", add)
    with pytest.raises(Interrupted):
        train(config, output=tmp_path / "parts")
    resume(tmp_path / "parts")
    assert recorded(tmp_path / "parts") == folder[1]
    for name, tensor in weights(whole.folder).items():
        assert torch.equal(tensor, weights(tmp_path / "parts")[name]), name
    evaluation = evaluate(whole.folder)
    assert (evaluation.broken, evaluation.total) == (whole.last["broken"], whole.last["total"])


def test_too_many_broken_images_stop_a_run(folder, tmp_path: Path, capsys) -> None:
    arguments = f"train --config digits --data folder:{folder[0]} --batch_size 8".split()
    arguments += ["--source.max_broken", "2", "--output", str(tmp_path / "run")]
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert message.startswith("vitarium: error: 3 images of 60 cannot be read")
    assert len(recorded(tmp_path / "run")) == 3
    assert all(name in message for name in recorded(tmp_path / "run"))
    assert "Traceback" not in (tmp_path / "run" / "train.log").read_text()


def test_broken_members_of_archives_are_named(folder, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for path in sorted(folder[0].rglob("*.png")):
            archive.add(path, f"{path.parent.name}/{path.name}")
    data = load_data(f"tar:{tmp_path}/all.tar", SourceConfig(max_broken=6))
    for split in (data.train, data.held_out):
        list(batches(create_loader(Samples(split, INPUTS.transform(), data.broken), 0), CPU))
    names = [f"{tmp_path}/all.tar{name.removeprefix(str(folder[0]))}" for name in folder[1]]
    assert sorted(data.broken.found) == names
    os.truncate(tmp_path / "all.tar", 2000)  # after it was indexed
    with pytest.raises(ValueError, match=r"all\.tar/class_.* cannot be read: the archive ends"):
        read_image(max(data.train.images, key=lambda image: image.name))


def test_a_file_that_vanishes_is_broken(folder, tmp_path: Path) -> None:
    shutil.copytree(folder[0], tmp_path / "copy")
    data = load_data(f"folder:{tmp_path / 'copy'}")
    Path(str(data.train.images[0])).unlink()
    sample = Samples(data.train, np.asarray)[0, 1, 1, 1]
    assert sample.broken[0].reason == f"image {data.train.images[0]} does not exist"
    assert sample.image is not None


# --- repeated augmentation -----------------------------------------------------------------------


def pattern(indices: Iterable[int]) -> list[int]:
    """The same, with every number replaced by the order in which it first comes."""
    seen: dict[int, int] = {}
    return [seen.setdefault(index, len(seen)) for index in indices]


@pytest.mark.parametrize(("repeats", "processes"), [(3, 1), (3, 2), (2, 3), (4, 2)])
def test_repeats_are_those_of_timm(repeats: int, processes: int) -> None:
    """Each process has the images that timm's sampler gives it, but for the drawing of them."""
    length, batch_size = 300, 10
    ours, theirs = [], []
    for process in range(processes):
        sampler = RepeatAugSampler(range(length), processes, process, num_repeats=repeats)
        theirs.append(list(sampler))
        order = EpochBatches(length, batch_size, 0, process, processes, repeats)
        ours.append([index for batch in order for index, *_ in batch])
    count = min(len(ours[0]), len(theirs[0]))
    assert count > 0.8 * length / processes
    both = [[each[i] for i in range(count) for each in side] for side in (ours, theirs)]
    assert pattern(both[0]) == pattern(both[1])


def test_repeats_vary_and_resume() -> None:
    order = EpochBatches(50, 6, 1, repeats=3)
    whole = list(order)
    assert len(whole) == len(order) == 8  # as long an epoch as without
    keys = [key for batch in whole for key in batch]
    assert len(set(keys)) == 48 and len({index for index, *_ in keys}) == 16
    order.first = 5
    assert list(order) == whole[5:]
    samples = Samples(load_data("digits").train, INPUTS.transform(AugmentConfig(scale=(0.3, 1.0))))
    one, two, three = (samples[key].image for key in whole[0][:3])
    assert (one != two).any() and (two != three).any()
    with pytest.raises(ValueError, match="repeats=0"):
        EpochBatches(50, 6, 1, repeats=0)
