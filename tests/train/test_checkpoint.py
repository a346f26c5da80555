"""Checkpoint files: atomic, complete, and refused with a reason when damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from vitarium.train.checkpoint import (
    Description,
    claim_folder,
    find_checkpoint,
    load_model,
    load_training_state,
    save_training_state,
    save_weights,
    write_atomic,
)
from vitarium.train.config import TrainConfig
from vitarium.train.data import InputConfig

CLASSES = ["cat", "dog"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("dinat_nano", num_classes=2, mlp_ratio=1.0)
    inputs = InputConfig((32, 32), (0.5,) * 3, (0.25,) * 3, "bicubic", 0.9)
    config = TrainConfig(model_kwargs={"mlp_ratio": 1.0})
    description = Description("dinat_nano", {"mlp_ratio": 1.0}, CLASSES, inputs, config, {"a": 1})
    save_weights(tmp_path / "best.safetensors", model, description)
    return tmp_path / "best.safetensors"


def test_weights_come_back_with_their_description(checkpoint: Path) -> None:
    torch.manual_seed(0)
    original = timm.create_model("dinat_nano", num_classes=2, mlp_ratio=1.0)
    model, description = load_model(checkpoint)
    assert not model.training
    assert description.classes == CLASSES
    assert description.input.mean == (0.5, 0.5, 0.5)
    assert description.config.model_kwargs == {"mlp_ratio": 1.0}
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_timm_loads_the_weights_file(checkpoint: Path) -> None:
    model = timm.create_model(
        "dinat_nano", num_classes=2, mlp_ratio=1.0, checkpoint_path=str(checkpoint)
    )
    ours, _ = load_model(checkpoint)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_folder_means_its_best_checkpoint(checkpoint: Path) -> None:
    assert find_checkpoint(checkpoint.parent) == checkpoint
    checkpoint.rename(checkpoint.with_name("last.safetensors"))
    assert find_checkpoint(checkpoint.parent).name == "last.safetensors"


@pytest.mark.parametrize("failure", ["before", "during", "after"])
def test_failed_writing_leaves_the_old_file(tmp_path: Path, failure: str, monkeypatch) -> None:
    path = tmp_path / "last.training.pt"
    save_training_state(path, {"step": 1, "w": torch.ones(1000)})
    before = path.read_bytes()

    def write(temporary: Path) -> None:
        if failure == "during":
            temporary.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        torch.save({"step": 2}, temporary)

    def no_space(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    if failure == "before":
        monkeypatch.setattr(os, "fsync", no_space)
    if failure == "after":
        monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, write)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert load_training_state(path)["step"] == 1
    assert os.listdir(tmp_path) == [path.name]


def test_damaged_weights_are_refused(checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        checkpoint.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"best\.safetensors cannot be read"):
            load_model(checkpoint)


def test_foreign_and_malformed_weights_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(2)}, foreign)
    with pytest.raises(ValueError, match="not written by vitarium train"):
        load_model(foreign)

    _, description = load_model(checkpoint)
    header = description.to_header()
    cases = {
        "not registered": {**header, "model": "dinat_nono"},
        "malformed header": {**header, "classes": "[1, 2"},
        "refuses model_kwargs": {**header, "model_kwargs": json.dumps({"bogus": 1})},
        "does not fit its model": header,
    }
    for message, changed in cases.items():
        save_file({"weight": torch.ones(2)}, foreign, metadata=changed)
        with pytest.raises(ValueError, match=message):
            load_model(foreign)


def test_training_state_never_executes_code(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    path = tmp_path / "last.training.pt"
    torch.save({"step": Hostile()}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_training_state(path)
    assert not (tmp_path / "executed").exists()


def test_damaged_training_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.training.pt"
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        load_training_state(path)
    save_training_state(path, {"w": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"last\.training\.pt cannot be read"):
        load_training_state(path)


def test_runs_get_folders_of_their_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [claim_folder(None, "digits").name for _ in range(3)]
    assert names == ["digits", "digits-2", "digits-3"]
    taken = tmp_path / "taken"
    claim_folder(taken, "unused")
    (taken / "config.yaml").write_text("epochs: 1\n")
    with pytest.raises(FileExistsError, match="holds a run already"):
        claim_folder(taken, "unused")
    assert (taken / "config.yaml").read_text() == "epochs: 1\n"


def test_a_folder_that_a_killed_run_was_claiming_is_claimed_again(tmp_path: Path) -> None:
    torn, other = tmp_path / ".config.yaml.123.tmp", tmp_path / ".notes.tmp"
    torn.write_text("epo")
    other.write_text("a user's")
    assert claim_folder(tmp_path, "unused") == tmp_path
    assert not torn.exists() and other.exists()
