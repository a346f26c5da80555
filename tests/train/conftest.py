"""Data and models that several tests of training share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sklearn.datasets import load_digits

from vitarium.train.config import AugmentConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from vitarium.train.data import digit_image


@pytest.fixture(scope="session")
def digit_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders of 20 PNGs each."""
    root = tmp_path_factory.mktemp("digit_folders")
    digits = load_digits()
    for label in (1, 4, 7):
        folder = root / f"class_{label}"
        folder.mkdir()
        for number, scan in enumerate(digits.images[digits.target == label][:20]):
            digit_image(scan).save(folder / f"{number:02}.png")
    return root


@pytest.fixture(scope="session")
def tiny_config(digit_folders: Path) -> TrainConfig:
    """A run of 3 epochs of 3 steps that uses everything with a state or random numbers."""
    return TrainConfig(
        data=f"folder:{digit_folders}",
        model="dinat_nano",
        model_kwargs={"drop_path_rate": 0.2},
        image_size=32,
        crop_pct=1.0,
        epochs=3,
        batch_size=16,
        optimizer=OptimizerConfig(lr=2e-3, clip_grad=1.0),
        schedule=ScheduleConfig(warmup_epochs=1),
        augment=AugmentConfig(
            rotation=5,
            auto_augment="rand-m5",
            random_erasing=0.3,
            mixup=0.5,
            cutmix=0.5,
            label_smoothing=0.1,
        ),
        ema_decay=0.9,
        device="cpu",
        workers=0,
        threads=1,  # in this process as in those of the command line: sums depend on it
        seed=3,
    )


@pytest.fixture(scope="session")
def vitarium() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a process of its own, as a user does."""

    def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vitarium.cli.main", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)

    return run
