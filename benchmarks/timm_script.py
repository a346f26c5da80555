"""Our `train` command beside timm's `train.py`, on the same folder of images and settings.

Whole commands take turns, each in a process of its own, with one thread and one process that reads
images; what an epoch takes is the difference between a run of several epochs and a run of one, over
the epochs more. So imports and the building of the model do not count, but all that either does
with every batch and every epoch: reading, training, evaluation, checkpoints, logs.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from vitarium.benchmarks import record
from vitarium.benchmarks.record import Record

CLASSES = 4


def bench_timm_script(
    script: str | os.PathLike[str],
    name: str = "resnet18",
    *,
    images: int = 512,
    batch_size: int = 32,
    image_size: int = 64,
    epochs: int = 3,
    rounds: int = 5,
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Record]:
    """Measure an epoch of our command and of timm's script on the CPU, in turns.

    Both train with AdamW and a cosine schedule on random crops with flips and colour jitter, and
    evaluate after every epoch on a quarter as many images.

    Args:
        script: timm's `train.py`.
        name: a model of timm's registry that timm's script knows, too.
        images: drawn JPEG files of 128 pixels to train on, in a temporary folder.
        batch_size: images per step.
        image_size: side of the crops.
        epochs: of the longer runs.
        rounds: samples of each.
        output: JSON Lines file that the records are appended to.
        progress: called with a line about each round.

    Returns:
        Records named by `implementation`: "vitarium" and "timm".

    Raises:
        FileNotFoundError: there is no such script.
        ValueError: an argument is out of range.
        ChildProcessError: a command failed; its last line is in the message.
    """
    script = Path(script).resolve()
    if not script.is_file():
        raise FileNotFoundError(f"script: {script} is no file")
    if epochs < 2:
        raise ValueError(f"epochs={epochs} must be at least 2: runs of one epoch are compared with")
    for key, value, least in (("rounds", rounds, 1), ("images", images, 4 * CLASSES)):
        if value < least:
            raise ValueError(f"{key}={value} must be at least {least}")
    samples: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "images"
        _draw(data, images)
        for number in range(rounds):
            for implementation, command in _commands(
                script, data, name, batch_size, image_size
            ).items():
                used = {}
                for length in (1, epochs):
                    with tempfile.TemporaryDirectory(dir=place) as folder:
                        used[length] = _run([*command(length, Path(folder) / "run")])
                for clock in ("wall", "cpu"):
                    taken = (used[epochs][clock] - used[1][clock]) / (epochs - 1)
                    samples.setdefault(implementation, {}).setdefault(clock, []).append(taken)
            line = ", ".join(f"{key} {value['cpu'][-1]:.2f} s" for key, value in samples.items())
            progress(f"round {number + 1} of {rounds}: {line} of CPU per epoch")
    records = [
        record.measured(
            samples=value,
            clock="cpu",
            machine=record.this_machine("cpu"),
            kind="run",
            name=name,
            implementation=implementation,
            mode="training",
            dtype="float32",
            shapes={"input": [batch_size, 3, image_size, image_size]},
            arguments={"epoch": True, "images": images, "epochs": epochs},
            images=images,
        )
        for implementation, value in samples.items()
    ]
    if output is not None:
        record.append(output, records)
    return records


def _draw(folder: Path, images: int) -> None:
    """Coloured noise, smooth as photographs are: `images` to train on, a quarter more held out."""
    generator = np.random.default_rng(0)
    for split, count in (("train", images), ("val", images // 4)):
        for number in range(count):
            label = number % CLASSES
            path = folder / split / f"class_{label}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            coarse[..., label % 3] //= 2
            Image.fromarray(coarse).resize((128, 128), Image.Resampling.BICUBIC).save(path)


def _commands(
    script: Path, data: Path, name: str, batch_size: int, image_size: int
) -> dict[str, Callable[[int, Path], list[str]]]:
    """How a run of so many epochs is started, by implementation."""

    def ours(epochs: int, output: Path) -> list[str]:
        options = {
            "data": f"folder:{data}",
            "model": name,
            "image_size": image_size,
            "crop_pct": 1.0,
            "epochs": epochs,
            "batch_size": batch_size,
            "optimizer.lr": 1e-3,
            "optimizer.weight_decay": 0.05,
            "schedule.warmup_epochs": 0,
            "schedule.on_updates": False,
            "device": "cpu",
            "workers": 1,
            "threads": 1,
            "output": output,
        }
        words = [f"--{key}={value}" for key, value in options.items()]
        return [sys.executable, "-m", "vitarium.cli.main", "train", *words]

    def theirs(epochs: int, output: Path) -> list[str]:
        options = {
            "data-dir": data,
            "model": name,
            "num-classes": CLASSES,
            "img-size": image_size,
            "crop-pct": 1.0,
            "epochs": epochs,
            "batch-size": batch_size,
            "opt": "adamw",
            "lr": 1e-3,
            "weight-decay": 0.05,
            "sched": "cosine",
            "warmup-epochs": 0,
            "val-split": "val",
            "device": "cpu",
            "workers": 1,
            "output": output,
        }
        return [
            sys.executable,
            str(script),
            *(f"--{key}={value}" for key, value in options.items()),
        ]

    return {"timm": theirs, "vitarium": ours}


def _run(command: list[str]) -> dict[str, float]:
    """Wall time and process CPU time of a command and of the processes that it started.

    Raises:
        ChildProcessError: it failed.
    """

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    wall, cpu = time.perf_counter(), used()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    taken = {"wall": time.perf_counter() - wall, "cpu": used() - cpu}
    if result.returncode:
        said = (result.stderr or result.stdout).strip().splitlines() or ["(nothing)"]
        raise ChildProcessError(f"{command[1]} ended with {result.returncode}: {said[-1]}")
    return taken
