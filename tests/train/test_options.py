"""Options of training: each does what it says, and a run with it can be repeated and resumed."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from vitarium.train import ConfigError, TrainConfig, resume, train
from vitarium.train.data import InputConfig, batches
from vitarium.train.distill import Teacher, distillation_loss
from vitarium.train.interrupt import Interrupted
from vitarium.train.loop import _Run
from vitarium.train.options import (
    AugmentConfig,
    DistillationConfig,
    OptimizerConfig,
    ProgressiveConfig,
    ScheduleConfig,
)
from vitarium.train.start import freeze

PLAIN = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, color_jitter=0.0)


@pytest.fixture
def plain(tiny_config: TrainConfig) -> TrainConfig:
    """A run without anything random but the order and the weights."""
    return dataclasses.replace(tiny_config, augment=PLAIN, model_kwargs={}, ema_decay=None)


def steps(config: TrainConfig, number: int) -> _Run:
    """A run after its first steps."""
    run = _Run(config)
    parts: list[Any] = []
    run.model.train()
    run.task.start_epoch(0)
    for part in itertools.islice(batches(run.loader, torch.device("cpu")), number * run.accumulate):
        parts.append(part)
        if len(parts) == run.accumulate:
            run._train_step(*map(torch.cat, zip(*parts)))
            parts = []
    run.watch.flush()
    assert run.step == number
    return run


def assert_close(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    """Every weight is the same, but for `tolerance` of the largest one."""
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        error = (tensor - states[1][name]).abs().max() / tensor.abs().max().clamp(min=1e-6)
        assert error < tolerance, (name, error)


def test_accumulated_steps_are_those_of_the_whole_batch(plain: TrainConfig) -> None:
    sgd = dataclasses.replace(plain, optimizer=OptimizerConfig(name="sgd", lr=0.1, clip_grad=1.0))
    whole = steps(sgd, 2)
    half = dataclasses.replace(sgd, batch_size=8, accumulate_steps=2)
    parts = steps(half, 2)
    assert_close(whole.network, parts.network, 2e-5)
    assert parts.watch.loss_sum == pytest.approx(whole.watch.loss_sum, rel=1e-5)
    assert parts.steps_per_epoch == whole.steps_per_epoch
    untrained = _Run(sgd)
    with pytest.raises(AssertionError):
        assert_close(whole.network, untrained.network, 2e-5)


@pytest.mark.parametrize(
    "option", [{"grad_checkpointing": True}, {"channels_last": True}, {"compile": True}]
)
def test_how_it_is_computed_changes_no_weight(
    plain: TrainConfig, option: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    original = nn.Module.compile

    def compile_eagerly(module: nn.Module) -> None:  # Inductor would take a minute
        compiled.append(module)
        original(module, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    run = steps(dataclasses.replace(plain, **option), 2)
    assert_close(steps(plain, 2).network, run.network, 1e-4)
    assert compiled == ([run.network] if "compile" in option else [])
    assert not any("_orig_mod" in name for name in run.task.module.state_dict())
    if "grad_checkpointing" in option:
        assert all(stage.grad_checkpointing for stage in run.network.stages)
    if "channels_last" in option:
        weight = run.network.stem.conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_layer_decay(plain: TrainConfig) -> None:
    decayed = dataclasses.replace(plain.optimizer, layer_decay=0.5)
    run = _Run(dataclasses.replace(plain, optimizer=decayed))
    names = {id(parameter): name for name, parameter in run.network.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in run.optimizer.param_groups for p in g["params"]}
    assert rates["head.fc.weight"] == max(rates.values())
    assert rates["stem.conv1.weight"] == min(rates.values())
    first, second = (rates[f"stages.0.blocks.{i}.mlp.fc1.weight"] for i in (0, 1))
    assert second == pytest.approx(2 * first)


@pytest.mark.parametrize(
    ("what", "trained"),
    [
        ("backbone", ["head.fc.weight", "head.fc.bias"]),
        (["stem", "stages.*"], ["norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"]),
        (0, None),
    ],
)
def test_frozen_parameters_stay(plain: TrainConfig, what: Any, trained: list[str] | None) -> None:
    config = dataclasses.replace(plain, freeze=what)
    before, after = _Run(config).network.state_dict(), steps(config, 2).network
    names = [name for name, p in after.named_parameters() if p.requires_grad]
    assert trained is None or names == trained
    for name, tensor in after.named_parameters():
        assert torch.equal(tensor, before[name]) != (name in names), name


def test_frozen_groups_are_those_from_the_stem_on(plain: TrainConfig) -> None:
    run = _Run(dataclasses.replace(plain, freeze=2))
    frozen = {name for name, p in run.network.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"stem", "stages"}
    assert all(name.startswith(("stem.", "stages.0.")) for name in frozen)
    run.model.train()
    run.task.start_epoch(0)
    assert not run.network.stem.training and not run.network.stages[0].training
    assert run.network.stages[1].training and run.network.head.training


def test_a_frozen_batch_norm_keeps_its_statistics() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    frozen = freeze(network, ["0", "1"])
    network.train()
    for module in frozen:
        module.eval()
    network(torch.randn(8, 3, 5, 5))
    assert torch.equal(network[1].running_mean, torch.zeros(4))
    assert network[2].training


def test_sizes_grow() -> None:
    growing = ProgressiveConfig(start_size=128, epochs=4)
    assert growing.sizes(224, 6) == [128, 160, 192, 192, 224, 224]
    assert ProgressiveConfig(start_size=128).sizes(224, 4) == [128, 192, 224, 224]
    assert ProgressiveConfig().sizes(224, 2) == [224, 224]


def test_growing_images_are_resumed_exactly(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = ProgressiveConfig(start_size=16, epochs=2, multiple=8)
    config = dataclasses.replace(tiny_config, progressive=growing, accumulate_steps=2, batch_size=8)
    seen: list[int] = []

    def watch(run: _Run) -> None:
        run.network.register_forward_pre_hook(
            lambda network, inputs: seen.append(inputs[0].shape[-1]) if network.training else None
        )

    original, request = _Run._train_step, _Run._loop
    monkeypatch.setattr(_Run, "_loop", lambda run, *given: (watch(run), request(run, *given)))
    whole = train(config, output=tmp_path / "whole").folder
    assert seen == [16] * 6 + [24] * 6 + [32] * 6

    def interrupted(run: _Run, images: torch.Tensor, targets: torch.Tensor) -> None:
        if run.step == 4:
            run._stop()
        original(run, images, targets)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_train_step", interrupted)
        with pytest.raises(Interrupted):
            train(config, output=tmp_path / "stopped")
    again = resume(tmp_path / "stopped").folder
    one, other = (load_file(run / "last.safetensors") for run in (whole, again))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_saved_configuration_repeats_the_run(tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(
        tiny_config,
        epochs=2,
        freeze=1,
        schedule=ScheduleConfig(name="multistep", warmup_epochs=0, decay_milestones=[1]),
        optimizer=dataclasses.replace(tiny_config.optimizer, layer_decay=0.8),
        bce_loss=True,
        bce_target_thresh=0.2,
    )
    first = train(config, output=tmp_path / "first").folder
    saved = TrainConfig.from_yaml((first / "config.yaml").read_text())
    assert saved == config
    second = train(saved, output=tmp_path / "second").folder
    one, other = (load_file(run / "last.safetensors") for run in (first, second))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def learning_rates(config: TrainConfig, schedule: ScheduleConfig, epochs: int) -> list[float]:
    """The learning rate at each of 4 steps of every epoch."""
    from vitarium.train.setup import create_scheduler, set_learning_rate

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    config = dataclasses.replace(config, epochs=epochs, schedule=schedule)
    scheduler = create_scheduler(optimizer, config, 4)
    rates = []
    for step in range(4 * epochs):
        set_learning_rate(scheduler, step, 4)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_schedules(tiny_config: TrainConfig) -> None:
    linear = ScheduleConfig(name="poly", warmup_epochs=0)
    assert learning_rates(tiny_config, linear, 2) == pytest.approx([1 - i / 8 for i in range(8)])
    by_epoch = dataclasses.replace(linear, on_updates=False)
    assert learning_rates(tiny_config, by_epoch, 2) == pytest.approx([1.0] * 4 + [0.5] * 4)
    falls = ScheduleConfig(
        name="multistep", warmup_epochs=0, decay_milestones=[1, 2], decay_rate=0.5
    )
    assert learning_rates(tiny_config, falls, 3)[::4] == pytest.approx([1.0, 0.5, 0.25])
    steps = ScheduleConfig(name="step", warmup_epochs=0, decay_epochs=2, decay_rate=0.5)
    assert learning_rates(tiny_config, steps, 4)[::4] == pytest.approx([1.0, 1.0, 0.5, 0.5])
    warm = ScheduleConfig(name="poly", warmup_epochs=1, warmup_lr=0.0, warmup_prefix=True)
    assert learning_rates(tiny_config, warm, 2)[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_mixing_stops(tiny_config: TrainConfig) -> None:
    augment = dataclasses.replace(tiny_config.augment, mixup_off_epoch=1, random_erasing=0.0)
    task = _Run(dataclasses.replace(tiny_config, augment=augment)).task
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    targets = torch.tensor([0, 1, 2, 0])
    task.start_epoch(0)
    assert not torch.equal(task.prepare(images, targets)[0], task.inputs.normalize(images))
    task.start_epoch(1)
    mixed, smooth = task.prepare(images, targets)
    assert torch.equal(mixed, task.inputs.normalize(images))
    assert torch.equal(smooth.argmax(-1), targets)


def test_distillation_losses() -> None:
    student, teacher = torch.randn(2, 5, 4).unbind()
    soft = DistillationConfig("teacher", temperature=3.0)
    p, q = (F.softmax(logits / 3.0, -1) for logits in (teacher, student))
    expected = 9.0 * (p * (p / q).log()).sum(-1).mean()
    assert distillation_loss(student, teacher, soft) == pytest.approx(expected.item(), rel=1e-5)
    hard = DistillationConfig("teacher", kind="hard")
    expected = -F.log_softmax(student, -1)[torch.arange(5), teacher.argmax(-1)].mean()
    assert distillation_loss(student, teacher, hard) == pytest.approx(expected.item(), rel=1e-5)


def test_a_run_teaches_at_its_own_size(tiny_config: TrainConfig, tmp_path: Path) -> None:
    """The teacher is another run, of other pixels and normalisation, and stays as it is."""
    plain = dataclasses.replace(tiny_config, epochs=1, schedule=ScheduleConfig(warmup_epochs=0))
    taught = train(dataclasses.replace(plain, image_size=48), output=tmp_path / "teacher").folder
    student = InputConfig((32, 32), (0.4,) * 3, (0.3,) * 3, "bicubic", 1.0)
    options = DistillationConfig(str(taught), weight=1.0, temperature=2.0)
    teacher = Teacher(options, 3, student, torch.device("cpu"))
    assert not teacher.model.training and teacher.inputs.image_size == (48, 48)
    gray = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    answers = teacher(student.normalize(gray))
    big = teacher.model(teacher.inputs.normalize(gray.new_full((1, 3, 48, 48), 128)))
    assert torch.allclose(answers, big, atol=1e-4)
    config = dataclasses.replace(plain, task="distillation", distillation=options)
    before = load_file(taught / "last.safetensors")
    result = train(config, output=tmp_path / "student")
    assert result.last["train_loss"] > 0
    after = load_file(taught / "last.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    start = dataclasses.replace(plain, initial_checkpoint=str(result.folder))
    network = _Run(start).network.state_dict()
    best = load_file(result.folder / "best.safetensors")
    assert all(torch.equal(tensor, network[name]) for name, tensor in best.items())
    other = dataclasses.replace(options, teacher="dinat_nano", checkpoint=None)
    with pytest.raises(ValueError, match="dinat_nano"):
        Teacher(other, 3, student, torch.device("cpu"))
    with pytest.raises(ConfigError, match="3 classes, and the data have 10"):
        Teacher(options, 10, student, torch.device("cpu"))
