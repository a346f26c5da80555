"""Killed at random instants, a run ends with the weights of one that was left alone.

`python tests/train/test_kill.py 25` makes that many kills and says where they struck.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from vitarium.train import TrainConfig, resume, train
from vitarium.train.checkpoint import load_training_state, state_paths
from vitarium.train.config import AugmentConfig, CheckpointConfig, OptimizerConfig, ScheduleConfig
from vitarium.train.data import digit_image

KILLS = 6
pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes by POSIX signals")


def run_until_killed(config: TrainConfig, folder: Path) -> None:
    """Begin the run or go on with it, in a process of its own that leads a group."""
    os.setsid()
    resume(folder) if (folder / "config.yaml").exists() else train(config, output=folder)


def kill_and_resume(config: TrainConfig, folder: Path, kills: int) -> list[str]:
    """Kill the run at random instants, then let it end; where the kills struck.

    Processes are forked from one that has imported everything. After every kill, what lies there
    under its final name must be whole.
    """
    draw = random.Random(0)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["vitarium.train.loop", "vitarium.train.model_card"])
    killed: list[str] = []
    seconds = 2.0  # that a process takes to the end, about
    while True:
        process = server.Process(target=run_until_killed, args=(config, folder))
        start = time.monotonic()
        process.start()
        process.join(None if len(killed) == kills else draw.uniform(0, seconds))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed.append(inspect(folder))
            if not state_paths(folder):
                seconds *= 1.5  # it had not come to its first state
            continue
        assert process.exitcode == 0
        if len(killed) == kills:
            return killed
        seconds = time.monotonic() - start  # it was faster than the kill: begin anew
        shutil.rmtree(folder)


def inspect(folder: Path) -> str:
    """Check that nothing under its final name is half-written; say what there is."""
    states = state_paths(folder)
    for path in states:
        load_training_state(path)
    for path in folder.glob("*.safetensors"):
        load_file(path)
    config = folder / "config.yaml"
    if config.exists():
        TrainConfig.from_yaml(config.read_text())
    torn = [path.name for path in folder.rglob(".*.tmp")]
    step = load_training_state(states[0])["step"] if states else None
    return f"after state of step {step}" + (f", while writing {', '.join(torn)}" if torn else "")


def assert_equal_weights(one: Path, other: Path) -> None:
    """Weights for use, and everything in the last state but the times, are the same bits."""
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    states = [load_training_state(state_paths(run)[0]) for run in (one, other)]
    assert states[0]["step"] == states[1]["step"]
    for part in ("model", "ema"):
        for key, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][key]), key
    for index, entry in states[0]["optimizer"]["state"].items():
        for key, value in entry.items():
            assert torch.equal(value, states[1]["optimizer"]["state"][index][key]), key
    assert states[0]["loss_sum"] == states[1]["loss_sum"]


def test_killed_at_random_instants(tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config, checkpoint=CheckpointConfig(every_steps=2))
    whole = train(config, output=tmp_path / "whole").folder
    killed = kill_and_resume(config, tmp_path / "run", KILLS)
    assert len(killed) == KILLS
    assert_equal_weights(whole, tmp_path / "run")
    assert not list((tmp_path / "run").rglob(".*.tmp"))


def main(kills: int) -> None:
    """Many kills of a run of 4 epochs of 4 steps."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            data=f"folder:{write_images(Path(folder, 'images'))}",
            model="dinat_nano",
            model_kwargs={"drop_path_rate": 0.2},
            image_size=32,
            epochs=4,
            batch_size=12,
            optimizer=OptimizerConfig(lr=1e-3, clip_grad=1.0),
            schedule=ScheduleConfig(warmup_epochs=1),
            augment=AugmentConfig(rotation=5, mixup=0.5, cutmix=0.5, random_erasing=0.3),
            ema_decay=0.9,
            device="cpu",
            workers=0,
            threads=1,
            checkpoint=CheckpointConfig(every_steps=2),
        )
        whole = train(config, output=Path(folder, "whole")).folder
        killed = kill_and_resume(config, Path(folder, "run"), kills)
        for number, where in enumerate(killed, 1):
            print(f"kill {number}: {where}")
        assert_equal_weights(whole, Path(folder, "run"))
        print(f"{kills} kills; the weights at the end are equal to the last bit")


def write_images(root: Path) -> Path:
    """Three class folders of 20 scanned digits each."""
    digits = load_digits()
    for label in (1, 4, 7):
        (root / str(label)).mkdir(parents=True)
        for number, scan in enumerate(digits.images[digits.target == label][:20]):
            digit_image(scan).save(root / str(label) / f"{number}.png")
    return root


if __name__ == "__main__":
    main(int(sys.argv[1]))
