"""Configuration: checks, recipes, and the way through YAML and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

import vitarium.zoo  # noqa: F401  registers our models
from vitarium.train.config import (
    AugmentConfig,
    ConfigError,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    config_keys,
    find_recipe,
    nearest,
    recipe_names,
)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_complete_configurations(name: str) -> None:
    config = TrainConfig.from_yaml(*find_recipe(name))
    assert TrainConfig.from_yaml(config.to_yaml()) == config
    assert timm.is_model(config.model)


def test_yaml_keeps_every_value() -> None:
    config = TrainConfig(
        data="folder:/somewhere",
        model_kwargs={"drop_path_rate": 0.3, "depths": [1, 2]},
        image_size=48,
        epochs=7,
        optimizer=OptimizerConfig(name="sgd", lr=1 / 3, betas=(0.9, 0.95), clip_grad=None),
        schedule=ScheduleConfig(name="poly", warmup_epochs=2, min_lr=1e-7),
        augment=AugmentConfig(scale=(0.3, 0.7), auto_augment="rand-m9"),
        ema_decay=0.99,
        precision="bf16",
    )
    again = TrainConfig.from_yaml(config.to_yaml())
    assert again == config
    assert isinstance(again.augment.scale, tuple)


def test_keys_are_dotted() -> None:
    keys = config_keys()
    assert {"epochs", "optimizer.lr", "augment.mixup", "schedule.name"} <= set(keys)
    assert "optimizer" not in keys


@pytest.mark.parametrize(
    ("name", "expected"),
    [("epoch", "epochs"), ("lr", "optimizer.lr"), ("optimiser.lr", "optimizer.lr")],
)
def test_nearest_name(name: str, expected: str) -> None:
    assert repr(expected) in nearest(name, config_keys())


def test_nothing_is_near_nonsense() -> None:
    assert nearest("xyzzy", config_keys()) == ""


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("epoch: 3", "'epoch' (did you mean 'epochs'?)"),
        ("optimizer: {learning_rate: 1}", "'optimizer.learning_rate'"),
        ("optimizer: {weight_decy: 1}", "did you mean 'optimizer.weight_decay'?"),
        ("augment: [1, 2]", "augment=[1, 2] must be a mapping"),
        ("epochs: many", "epochs"),
        ("optimizer: {lr: fast}", "optimizer"),
        ("schedule: {name: cosin}", "cosin"),
        ("precision: fp8", "precision"),
        ("- 1\n- 2", "mapping"),
        ("epochs: [1", "not YAML"),
        ("epochs: 0", "epochs=0"),
        ("batch_size: -4", "batch_size=-4"),
        ("ema_decay: 1.5", "ema_decay=1.5"),
        ("optimizer: {lr: .nan}", "optimizer.lr=nan"),
        ("augment: {scale: [0.9, 0.1]}", "augment.scale"),
        ("augment: {hflip: 2}", "augment.hflip=2"),
        ("schedule: {warmup_epochs: 300}", "schedule.warmup_epochs=300"),
        ("{batch_size: 7, augment: {mixup: 0.2}}", "batch_size=7"),
    ],
)
def test_bad_recipes_name_the_key(text: str, culprit: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_yaml(text, "recipe.yaml")
    assert culprit in str(error.value)


def test_recipes_by_name_and_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 2\n")
    assert find_recipe(str(path)) == ("epochs: 2\n", str(path))
    assert "dinat_nano" in find_recipe("digits")[0]
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        find_recipe("digit")
