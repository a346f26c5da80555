"""Wrong options: one clear error that names the key, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vitarium.cli.main import main
from vitarium.train import TrainConfig, train
from vitarium.train.config import ConfigError

CONFIGURATIONS = [
    ("task: classify", "task='classify'"),
    ("task: distil", "did you mean 'distillation'?"),
    ("task: distillation", "distillation.teacher=None"),
    ("distillation: {teacher: resnet18}", "no teacher"),
    ("distillation: {checkpoint: a.pth}", "distillation.checkpoint='a.pth'"),
    ("distillation: {weight: 1.5}", "distillation.weight=1.5"),
    ("distillation: {temperature: 0}", "distillation.temperature=0"),
    ("distillation: {tempreature: 2}", "did you mean 'distillation.temperature'?"),
    ("distillation: {kind: firm}", "firm"),
    ("accumulate_steps: 0", "accumulate_steps=0"),
    ("accumulate_steps: 1.5", "accumulate_steps"),
    ("grad_chekpointing: true", "did you mean 'grad_checkpointing'?"),
    ("compile: perhaps", "compile"),
    ("freeze: -1", "freeze=-1"),
    ("freeze: []", "freeze=[]"),
    ("freeze: {stem: true}", "freeze"),
    ("initial_checkpoint: ''", "initial_checkpoint=''"),
    ("{initial_checkpoint: a.pth, pretrained: true}", "only source of weights"),
    ("optimizer: {layer_decay: 0}", "optimizer.layer_decay=0"),
    ("optimizer: {layer_decay: 1.1}", "optimizer.layer_decay=1.1"),
    ("optimizer: {layer_dekay: 0.8}", "did you mean 'optimizer.layer_decay'?"),
    ("progressive: {start: 128}", "did you mean 'progressive.start_size'?"),
    ("progressive: {start_size: 16}", "progressive.start_size=16"),
    ("progressive: {epochs: 3}", "progressive.epochs=3"),
    ("{epochs: 9, progressive: {start_size: 64, epochs: 10}}", "progressive.epochs=10"),
    ("{image_size: 64, progressive: {start_size: 96}}", "at most image_size=64"),
    ("schedule: {decay_milestones: [3, 2]}", "schedule.decay_milestones=[3, 2]"),
    ("schedule: {decay_rate: 2}", "schedule.decay_rate=2"),
    ("schedule: {on_epochs: true}", "schedule.on_epochs"),
    ("augment: {mixup_mode: half}", "half"),
    ("augment: {mixup_prob: -0.1}", "augment.mixup_prob=-0.1"),
    ("augment: {mixup_switch_prob: 2}", "augment.mixup_switch_prob=2"),
    ("bce_target_thresh: 0.2", "bce_target_thresh=0.2"),
    ("{bce_loss: true, bce_target_thresh: 2}", "bce_target_thresh=2"),
]


@pytest.mark.parametrize(("text", "culprit"), CONFIGURATIONS)
def test_configurations(text: str, culprit: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_yaml(text)
    assert culprit in str(error.value)


RUNS = [  # what only the model or the data can tell
    ("freeze: [stages.7]", ConfigError, "freeze='stages.7' names no parameter"),
    ("freeze: [stem.convv1]", ConfigError, "did you mean 'stem.conv1'?"),
    ("freeze: 99", ConfigError, "must leave something to train"),
    ("{model: convit_tiny, grad_checkpointing: true}", ConfigError, "grad_checkpointing=True"),
    ("accumulate_steps: 1000", ConfigError, "accumulate_steps=1000"),
    ("initial_checkpoint: nowhere.safetensors", FileNotFoundError, "nowhere.safetensors"),
    ("{task: distillation, distillation: {teacher: no_such}}", FileNotFoundError, "no_such"),
    ("{task: distillation, distillation: {teacher: dinat_nano}}", ValueError, "dinat_nano"),
    ("optimizer: {name: adamv}", ConfigError, "optimizer.name='adamv'"),
]


@pytest.mark.parametrize(("text", "kind", "culprit"), RUNS)
def test_runs(
    text: str, kind: type[Exception], culprit: str, digit_folders: Path, tmp_path: Path
) -> None:
    defaults = {"data": f"folder:{digit_folders}", "model": "dinat_nano", "image_size": 32}
    defaults |= {"batch_size": 16, "device": "cpu", "workers": 0}
    config = TrainConfig.from_yaml(yaml.safe_dump(defaults | yaml.safe_load(text)))
    with pytest.raises(kind) as error:
        train(config, output=tmp_path / "run")
    assert culprit in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--accumulate_step", "2"], "did you mean 'accumulate_steps'?"),
        (["--optimizer.layerdecay", "0.8"], "did you mean 'optimizer.layer_decay'?"),
        (["--config", "agent_deitt"], "did you mean 'agent_deit'?"),
        (["--freeze", "-2"], "freeze=-2"),
    ],
)
def test_commands(
    arguments: list[str], culprit: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = ["--output", str(tmp_path / "run")]
    assert main(["train", *arguments, *output]) == 2
    errors = capsys.readouterr().err
    assert culprit in errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()
