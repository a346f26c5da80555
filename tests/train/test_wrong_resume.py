"""Wrong inputs of saving and resuming: one clear error, and nothing written over."""

from __future__ import annotations

import dataclasses
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vitarium.train import TrainConfig, resume, train
from vitarium.train.bad_batch import load_bad_batch
from vitarium.train.checkpoint import (
    load_training_state,
    save_training_state,
    state_paths,
    write_text,
)
from vitarium.train.config import CheckpointConfig, ConfigError, OptimizerConfig
from vitarium.train.setup import share_batch


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("checkpoint: {keep: 0}", "checkpoint.keep=0"),
        ("checkpoint: {keep: 1.5}", "checkpoint"),
        ("checkpoint: {every_steps: 0}", "checkpoint.every_steps=0"),
        ("checkpoint: {every_steps: often}", "checkpoint"),
        ("checkpoint: {every_minutes: 0}", "checkpoint.every_minutes=0"),
        ("checkpoint: {every_minutes: .inf}", "checkpoint.every_minutes=inf"),
        ("checkpoint: {every_step: 3}", "did you mean 'checkpoint.every_steps'?"),
        ("checkpoint: 3", "checkpoint=3 must be a mapping"),
        ("distributed: fsdp", "fsdp"),
    ],
)
def test_wrong_configurations(text: str, culprit: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_yaml(text, "recipe.yaml")
    assert culprit in str(error.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config: TrainConfig) -> Path:
    config = dataclasses.replace(tiny_config.with_epochs(2), checkpoint=CheckpointConfig(keep=3))
    return train(config, output=tmp_path_factory.mktemp("saved") / "run").folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    """One bit of a weight: the file has its length and its directory, but not its checksums."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_state_is_passed_over(
    run: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    newest, _ = state_paths(tmp_path)
    damage(newest)
    with pytest.raises(ValueError, match="cannot be read"):
        load_training_state(newest)
    expected = load_training_state(state_paths(run)[0])["model"]
    resume(tmp_path)
    log = (tmp_path / "train.log").read_text()
    assert f"{newest} cannot be read" in log and "from step 3" in log
    again = load_training_state(newest)["model"]
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())


def no_whole_state(folder: Path) -> None:
    for path in state_paths(folder):
        cut(path)


def no_configuration(folder: Path) -> None:
    (folder / "config.yaml").unlink()


def foreign_state(folder: Path) -> None:
    for path in state_paths(folder):
        save_training_state(path, {"step": 3})


def broken_configuration(folder: Path) -> None:
    (folder / "config.yaml").write_text("epochs: [")


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (no_whole_state, ValueError, "holds no state that can be read"),
        (no_configuration, FileNotFoundError, "holds no run to resume"),
        (foreign_state, ValueError, "does not fit the run"),
        (broken_configuration, ConfigError, "is not YAML"),
    ],
)
def test_wrong_runs_are_left_as_they_are(
    run: Path, tmp_path: Path, spoil: Callable[[Path], None], kind: type, message: str
) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(kind, match=message):
        resume(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_batch_that_cannot_be_shared_is_refused(tiny_config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="batches of 16 images over all processes, which 3"):
        share_batch(tiny_config, {"total_batch": 16}, 3)
    assert share_batch(tiny_config, {"total_batch": 16}, 2).batch_size == 8


def test_wrong_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_bad_batch(tmp_path / "none.safetensors")
    (tmp_path / "some.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match="holds no batch"):
        load_bad_batch(tmp_path / "some.safetensors")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits the size of files in a child")
def test_a_full_disk_harms_no_file(tmp_path: Path) -> None:
    """A process that may write no more than 1000 bytes to a file, as on a disk that is full."""
    path = tmp_path / "state"
    write_text(path, "before")
    child = os.fork()
    if child == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_text(path, "after" * 1000)
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["state"]


def test_a_loss_that_is_not_finite_leaves_its_batch(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(
        tiny_config, optimizer=OptimizerConfig(name="sgd", lr=1e30, clip_grad=None)
    )
    with pytest.raises(FloatingPointError, match="its batch is kept in") as error:
        train(config, output=tmp_path / "run")
    (path,) = (tmp_path / "run").glob("nonfinite-*.safetensors")
    assert str(path) in str(error.value) and path.with_suffix(".png").exists()
    batch = load_bad_batch(path)
    assert batch.images.shape == (16, 3, 32, 32) and batch.images.dtype == torch.uint8
    assert f"at step {batch.step} " in str(error.value) and batch.seed == 3
    assert not torch.isfinite(torch.tensor(batch.loss))
