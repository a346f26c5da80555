"""The training loop: repeatable, resumable at any step, and stopped cleanly."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from vitarium.train import Interrupted, TrainConfig, evaluate, resume, train
from vitarium.train.checkpoint import load_training_state, state_paths
from vitarium.train.config import OptimizerConfig
from vitarium.train.loop import _Run

EPOCHS, STEPS_PER_EPOCH = 3, 3  # of `tiny_config`
MEASURED = (
    "seconds",
    "images_per_second",
    "data_wait",
    "peak_memory_device",
    "peak_memory_resident",
)
SIGNALS = [signal.SIGINT, signal.SIGTERM]
posix_signals = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")


def leaves(state: Any, name: str = "") -> dict[str, Any]:
    """The tensors and numbers of a nested state, by path."""
    if isinstance(state, dict):
        entries = state.items()
    elif isinstance(state, (list, tuple)):
        entries = enumerate(state)
    else:
        return {name: state}
    return {k: v for key, value in entries for k, v in leaves(value, f"{name}/{key}").items()}


def assert_same_run(one: Path, other: Path) -> None:
    """Both ended with the same weights, optimizer, moving average and metrics, to the last bit."""
    for file in [path.relative_to(one) for path in state_paths(one)]:
        states = [leaves(load_training_state(run / file)) for run in (one, other)]
        assert states[0].keys() == states[1].keys()
        assert sum(isinstance(value, torch.Tensor) for value in states[0].values()) > 100
        for name, value in states[0].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, states[1][name]), name
            elif name.rpartition("/")[2] not in MEASURED:
                assert value == states[1][name], name
    for file in ("last.safetensors", "best.safetensors"):
        weights = [load_file(run / file) for run in (one, other)]
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert metrics(one) == metrics(other)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The run's records without what is measured anew each time."""
    with open(run / "metrics.jsonl") as file:
        return [{**json.loads(line), **dict.fromkeys(MEASURED)} for line in file]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def random_states() -> list[Any]:
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_config: TrainConfig) -> tuple[Path, list[Any], list[Any]]:
    """An uninterrupted run, its batches, and the states of all random generators at its end."""
    batches: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        record_batches(patch, batches)
        result = train(tiny_config, output=tmp_path_factory.mktemp("whole") / "run")
    return result.folder, batches, random_states()


def record_batches(patch: pytest.MonkeyPatch, batches: list[Any]) -> None:
    """Note every batch that is trained on."""
    original = _Run._train_step

    def step(self: _Run, images: torch.Tensor, targets: torch.Tensor) -> None:
        batches.append((self.step, images.clone(), targets.clone()))
        return original(self, images, targets)

    patch.setattr(_Run, "_train_step", step)


def send_at_step(patch: pytest.MonkeyPatch, at: int, signum: int) -> None:
    """Send this process a signal while step number `at` runs."""
    original = _Run._train_step

    def step(self: _Run, images: torch.Tensor, targets: torch.Tensor) -> None:
        if self.step == at:
            os.kill(os.getpid(), signum)
        return original(self, images, targets)

    patch.setattr(_Run, "_train_step", step)


def test_a_run_leaves_what_it_says(whole, tiny_config: TrainConfig) -> None:
    folder = whole[0]
    assert sorted(os.listdir(folder)) == [
        "README.md",
        "best.safetensors",
        "checkpoints",
        "config.yaml",
        "curves.png",
        "last.safetensors",
        "metrics.jsonl",
        "report.html",
        "tensorboard",
        "train.log",
    ]
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    records = metrics(folder)
    assert [record["step"] for record in records] == [3, 6, 9]
    assert all(record["total"] == 12 for record in records)
    assert TrainConfig.from_yaml((folder / "config.yaml").read_text()) == tiny_config
    log = (folder / "train.log").read_text()
    assert torch.__version__ in log and "48 training and 12 held-out images" in log


def test_the_saved_configuration_repeats_the_run(whole, tmp_path: Path, vitarium) -> None:
    process = vitarium("train", "--config", whole[0] / "config.yaml", "--output", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    assert_same_run(whole[0], tmp_path / "run")
    assert "epoch   3/3" in process.stdout and "best: epoch" in process.stdout


@posix_signals
@pytest.mark.parametrize("at", [0, 1, 2, 4])
def test_interrupted_and_resumed_equals_uninterrupted(
    whole, tiny_config: TrainConfig, tmp_path: Path, monkeypatch, at: int
) -> None:
    """Interrupted in the first step, mid-epoch, at the end of an epoch, and mid-epoch later."""
    folder, all_batches, states = whole
    batches: list[Any] = []
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        record_batches(patch, batches)
        send_at_step(patch, at, SIGNALS[at % 2])
        with pytest.raises(Interrupted, match=f"--resume {tmp_path / 'run'}") as stop:
            train(tiny_config, output=tmp_path / "run")
        assert stop.value.signum == SIGNALS[at % 2]
        assert len(batches) == at + 1
    assert signal.getsignal(signal.SIGINT) is before
    torch.manual_seed(at)  # what the interpreter draws between must not matter
    with monkeypatch.context() as patch:
        record_batches(patch, batches)
        result = resume(tmp_path / "run")
    assert_same_run(folder, result.folder)
    assert random_states() == states
    assert [step for step, _, _ in batches] == list(range(EPOCHS * STEPS_PER_EPOCH))
    for (_, images, targets), (_, expected_images, expected_targets) in zip(batches, all_batches):
        assert torch.equal(images, expected_images) and torch.equal(targets, expected_targets)


@posix_signals
def test_mixed_precision_goes_on_to_the_same_bits(
    whole, tiny_config: TrainConfig, tmp_path: Path, monkeypatch
) -> None:
    config = dataclasses.replace(tiny_config, precision="bf16")
    expected = train(config, output=tmp_path / "whole").folder
    with monkeypatch.context() as patch:
        send_at_step(patch, 4, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train(config, output=tmp_path / "run")
    assert_same_run(expected, resume(tmp_path / "run").folder)
    half, full = (load_file(run / "last.safetensors") for run in (expected, whole[0]))
    differences = [(half[name] - full[name]).abs().max() for name in half]
    assert 1e-6 < max(differences) < 0.1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_half_precision_of_gpus_is_float32_on_a_cpu_and_said_so(
    whole, tiny_config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(tiny_config, precision="fp16")
    run = train(config, output=tmp_path / "run", console=Console()).folder
    assert "warning: precision fp16 needs a GPU" in capsys.readouterr().out
    assert "precision: 'no'" in (run / "config.yaml").read_text()
    assert_same_run(whole[0], run)
    with pytest.raises(ValueError, match="precision='fp16' needs a GPU"):
        evaluate(run, precision="fp16")


@posix_signals
def test_interrupted_during_evaluation(
    whole, tiny_config: TrainConfig, tmp_path: Path, monkeypatch
) -> None:
    from vitarium.train import task

    original = task.score

    def score(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(task, "score", score)
        with pytest.raises(Interrupted):
            train(tiny_config, output=tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert_same_run(whole[0], resume(tmp_path / "run").folder)


def test_killed_between_checkpoints(whole, tiny_config, tmp_path: Path, monkeypatch) -> None:
    """A run that dies without a word goes on from its last checkpoint, or from the start."""

    def die_at(step: int) -> Callable[..., float]:
        original = _Run._train_step

        def train_step(self: _Run, *batch: torch.Tensor) -> float:
            if self.step == step:
                raise MemoryError
            return original(self, *batch)

        return train_step

    run = tmp_path / "run"
    for step, start in ((2, lambda: train(tiny_config, output=run)), (7, lambda: resume(run))):
        with monkeypatch.context() as patch:
            patch.setattr(_Run, "_train_step", die_at(step))
            with pytest.raises(MemoryError):
                start()
    with open(run / "metrics.jsonl", "a") as file:  # written, but the checkpoint after it was not
        file.write(json.dumps({**metrics(run)[-1], "epoch": 3, "step": 9}) + "\n")
    assert_same_run(whole[0], resume(run).folder)


def test_workers_do_not_change_the_run(whole, tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config, workers=2)
    result = train(config, output=tmp_path / "run")
    assert not multiprocessing.active_children()  # nor do they wait for the garbage collector
    assert metrics(result.folder) == metrics(whole[0])
    assert evaluate(result.folder, workers=1).correct == evaluate(whole[0]).correct
    assert not multiprocessing.active_children()


def test_another_seed_is_another_run(whole, tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config, seed=4, epochs=2)
    result = train(config, output=tmp_path / "run")
    assert metrics(result.folder)[0]["train_loss"] != metrics(whole[0])[0]["train_loss"]


def test_resuming_a_finished_run_changes_nothing(whole) -> None:
    before = {path.name: path.read_bytes() for path in whole[0].glob("*.safetensors")}
    result = resume(whole[0])
    assert result.last["step"] == 9
    assert {path.name: path.read_bytes() for path in whole[0].glob("*.safetensors")} == before


def test_evaluation_repeats_the_recorded_figures(whole) -> None:
    records = metrics(whole[0])
    last = evaluate(whole[0] / "last.safetensors", batch_size=5)
    assert (last.correct, last.total) == (records[-1]["correct"], 12)
    best = max(records, key=lambda record: (record["correct"], -record["loss"]))
    assert evaluate(whole[0]).correct == best["correct"]
    assert evaluate(whole[0]).loss == best["loss"]


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(
        tiny_config, optimizer=OptimizerConfig(name="sgd", lr=1e30, clip_grad=None)
    )
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step \d+ \(epoch"):
        train(config, output=tmp_path / "run")
    assert "FloatingPointError" in (tmp_path / "run" / "train.log").read_text()
    for path in (tmp_path / "run").glob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


def test_a_run_is_never_written_over(whole, tiny_config: TrainConfig) -> None:
    before = contents(whole[0])
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(tiny_config, output=whole[0])
    assert contents(whole[0]) == before


def test_resume_refuses_other_data(whole, tiny_config: TrainConfig, tmp_path: Path) -> None:
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    changed = dataclasses.replace(tiny_config, data="digits").to_yaml()
    (tmp_path / "config.yaml").write_text(changed)
    with pytest.raises(ValueError, match="was trained on"):
        resume(tmp_path)


@posix_signals
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_to_the_command(
    tiny_config: TrainConfig, tmp_path: Path, vitarium, signum: int, status: int
) -> None:
    """The command, its workers included, stopped by a real signal to the whole process group."""
    config = dataclasses.replace(tiny_config, epochs=6, workers=1)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "vitarium.cli.main", "train"]
        + ["--config", str(tmp_path / "config.yaml"), "--output", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signum)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == status, stderr
    name = signal.Signals(signum).name
    assert f"interrupted by {name}" in stderr and f"--resume {run}" in stderr
    assert "Traceback" not in stderr
    resumed = vitarium("train", "--resume", run)
    assert resumed.returncode == 0, resumed.stderr
    reference = train(config, output=tmp_path / "reference")
    assert_same_run(reference.folder, run)


def test_losses_of_mixers_are_trained_with(tiny_config: TrainConfig) -> None:
    """The balance of chosen heads is part of the loss, and the loop knows nothing of the mixer."""
    mixers = [("mixture_of_head", {"num_heads": 2, "shared_head": 0, "routed_head": 1})] * 3
    kwargs = {"mixers": mixers, "dims": (16, 16, 16)}

    def first_step(factor: float) -> tuple[float, torch.Tensor]:
        config = dataclasses.replace(tiny_config, model_kwargs=kwargs, auxiliary_loss=factor)
        run = _Run(config)
        run.model.train()
        (images, targets, *_), *_ = run.loader
        before = run.network.stages[0].blocks[0].mixer.router.wg.weight.clone()
        run._train_step(images, targets)
        return run.watch.loss, run.network.stages[0].blocks[0].mixer.router.wg.weight - before

    (plain, change), (balanced, other) = first_step(0.0), first_step(10.0)
    assert 5 < balanced - plain < 20  # about 1 where heads are chosen alike
    assert not torch.equal(change, other)
