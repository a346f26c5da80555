"""Two CPU processes: as one with twice the batch, sharded or not; and what happens if one dies."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vitarium.train import TrainConfig, resume, train
from vitarium.train.checkpoint import load_newest_state
from vitarium.train.config import AugmentConfig, CheckpointConfig

# Sums over a batch are taken in two parts; Adam's first steps divide small gradients by their size.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def config(tiny_config: TrainConfig) -> TrainConfig:
    """A run without what each process draws for itself: no drop path, no Mixup, no erasing."""
    return dataclasses.replace(
        tiny_config,
        model_kwargs={},
        epochs=2,
        augment=AugmentConfig(label_smoothing=0.1),
        checkpoint=CheckpointConfig(keep=8, every_steps=2),
    )


def work(rank: int, port: int, call: str, arguments: dict[str, Any], errors: Any) -> None:
    """One process of a job, as `torchrun` starts it."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    try:
        {"train": train, "resume": resume}[call](**arguments)
    except Exception as error:
        errors.put((rank, f"{type(error).__name__}: {error}"))
        os._exit(1)
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_processes(call: str, **arguments: Any) -> dict[int, str]:
    """Run in two processes; the errors that they ended with, by process."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["vitarium.train.loop", "vitarium.train.model_card"])
    port = free_port()
    errors = server.SimpleQueue()
    jobs = [server.Process(target=work, args=(r, port, call, arguments, errors)) for r in (0, 1)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(300)
    found = {}
    while not errors.empty():
        rank, message = errors.get()
        found[rank] = message
    assert [job.exitcode for job in jobs] == [int(rank in found) for rank in (0, 1)]
    return found


def halved(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, batch_size=config.batch_size // 2, **changes)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_close(one: Path, other: Path) -> None:
    ours, theirs = (load_file(run / "last.safetensors") for run in (one, other))
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < TOLERANCE, name
    for record, expected in zip(records(one), records(other), strict=True):
        assert record["total"] == expected["total"] == 12
        assert record["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-4)
        assert record["loss"] == pytest.approx(expected["loss"], abs=1e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, config: TrainConfig) -> Path:
    return train(config, output=tmp_path_factory.mktemp("alone") / "run").folder


@pytest.mark.parametrize("distributed", ["ddp", "fsdp2"])
def test_two_processes_are_as_one(alone, config, tmp_path: Path, distributed: str) -> None:
    """And their states go on in one process, and those of one process in two."""
    run = tmp_path / "run"
    assert not two_processes("train", config=halved(config, distributed=distributed), output=run)
    assert_close(run, alone)
    for path in sorted((run / "checkpoints").iterdir())[1:]:
        path.unlink()  # all but the state after two steps, mid-epoch
    resume(run)
    assert_close(run, alone)
    if distributed == "fsdp2":
        other = tmp_path / "other"
        half = dataclasses.replace(config, distributed=distributed)
        train(half, output=other)
        for path in sorted((other / "checkpoints").iterdir())[1:]:
            path.unlink()
        assert not two_processes("resume", folder=other)
        assert_close(other, alone)


def test_evaluation_counts_every_image_once(config, digit_folders, tmp_path: Path) -> None:
    """9 held-out images on two processes in batches of 4: 5 and 4, two batches and one."""
    for split, part in (("train", slice(0, 8)), ("val", slice(8, 11))):
        for label in ("class_1", "class_4", "class_7"):
            (tmp_path / split / label).mkdir(parents=True)
            for path in sorted((digit_folders / label).iterdir())[part]:
                shutil.copy(path, tmp_path / split / label)
    few = dataclasses.replace(
        config.with_epochs(1), data=f"folder:{tmp_path}", batch_size=4, distributed="fsdp2"
    )
    assert not two_processes("train", config=few, output=tmp_path / "run")
    assert records(tmp_path / "run")[0]["total"] == 9


def test_an_error_of_one_process_ends_the_job(config, tmp_path: Path) -> None:
    """What the main process alone can find, the folder that is taken, is raised in all."""
    (tmp_path / "config.yaml").write_text("epochs: 1\n")
    errors = two_processes("train", config=halved(config), output=tmp_path)
    assert errors.keys() == {0, 1}
    assert all("holds a run already" in message for message in errors.values())


def torchrun(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


PLANTED = """
import os, sys
from vitarium.train import TrainConfig, loop

def die(run, images, targets, step=loop._Run._train_step):
    if run.step == 4 and os.environ["RANK"] == "1":
        {how}
    step(run, images, targets)

loop._Run._train_step = die
with open(sys.argv[1]) as file:
    loop.train(TrainConfig.from_yaml(file.read()), output=sys.argv[2])
"""


@pytest.mark.parametrize(
    ("how", "shown"),
    [
        ("raise RuntimeError('the second process is ill')", "the second process is ill"),
        ("os.kill(os.getpid(), 9)", "SIGKILL"),
    ],
    ids=["error", "killed"],
)
def test_a_process_that_dies_ends_the_job(config, tmp_path: Path, how, shown) -> None:
    """Under `torchrun`, which shows the error; the last state is whole."""
    (tmp_path / "planted.py").write_text(PLANTED.format(how=how))
    (tmp_path / "recipe.yaml").write_text(halved(config).to_yaml())
    options = ["--standalone", "--nproc-per-node=2"]
    with torchrun(tmp_path, *options, "planted.py", "recipe.yaml", "run") as job:
        _, errors = job.communicate(timeout=240)
    assert job.returncode == 1
    assert shown in errors
    state, damaged = load_newest_state(tmp_path / "run")
    assert not damaged
    assert state is not None and state["step"] == 4


SIGNALLED = """
import os, signal, sys
from vitarium.cli.main import main
from vitarium.train import loop

def step(run, images, targets, step=loop._Run._train_step):
    if run.step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    step(run, images, targets)

loop._Run._train_step = step
sys.exit(main(sys.argv[1:]))
"""


def test_two_machines_stop_at_the_signal_of_one_and_one_goes_on(alone, config, tmp_path) -> None:
    """What is printed is printed once."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    (tmp_path / "recipe.yaml").write_text(halved(config).to_yaml())
    place = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    place += [f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    command = ["signalled.py", "train", "--config", "recipe.yaml", "--output", "run"]
    machines = [torchrun(tmp_path, *place, f"--node-rank={rank}", *command) for rank in (0, 1)]
    errors = [machine.communicate(timeout=240)[1] for machine in machines]
    assert all(machine.returncode for machine in machines)
    assert "".join(errors).count("interrupted by SIGTERM") == 1
    options = ["--standalone", "--nproc-per-node=2", "-m", "vitarium.cli.main"]
    with torchrun(tmp_path, *options, "train", "--resume", "run") as job:
        output, _ = job.communicate(timeout=240)
    assert job.returncode == 0 and output.count("written to run") == 1
    assert_close(tmp_path / "run", alone)


def test_a_batch_that_cannot_be_shared_is_refused(alone, config, tmp_path: Path) -> None:
    from vitarium.train.setup import share_batch

    with pytest.raises(ValueError, match="batches of 16 images over all processes, which 3"):
        share_batch(config, {"total_batch": 16}, 3)
