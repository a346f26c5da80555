"""Recipes: each with its real model on the meta device, and two steps of it with a small one."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

from vitarium.train.config import TrainConfig, find_recipe, recipe_names
from vitarium.train.data import batches
from vitarium.train.loop import _Run
from vitarium.train.setup import create_optimizer

PIXELS = 64
SHALLOW = {"depths": (1, 1, 1, 1)}
HEADS = {"shared_head": (1, 2, 1, 2), "routed_head": (0, 0, 1, 2)}
# What makes the recipes' own models small: one block per stage, narrow, for few pixels.
SMALL: dict[str, dict[str, Any]] = {
    "agent_cswin": {**SHALLOW, "embed_dim": 16, "img_size": PIXELS, "split_size": (1, 2, 2, 2)},
    "agent_deit": {"embed_dim": 48, "depth": 2, "img_size": PIXELS, "agent_num": 4},
    "agent_pvt": {**SHALLOW, "embed_dims": (8, 16, 40, 64), "img_size": PIXELS},
    "agent_swin": {**SHALLOW, "replaced": (1, 1, 1, 0), "embed_dim": 32, "img_size": PIXELS},
    "biformer": {**SHALLOW, "embed_dim": 32, "n_win": 2, "topks": (1, 2, 4)},
    "crossformer": {**SHALLOW, "embed_dim": 32, "group_size": (2, 2, 2, 2)},
    "dinat": {**SHALLOW, "embed_dim": 32, "kernel_size": 3, "dilations": (2, 1, 1, 1)},
    "flowformer": {**SHALLOW, "embed_dim": 24, "img_size": PIXELS},
    "inline_cswin": {**SHALLOW, "embed_dim": 16, "img_size": PIXELS, "split_size": (1, 2, 2, 2)},
    "inline_deit": {"embed_dim": 48, "depth": 2, "img_size": PIXELS},
    "inline_pvt": {**SHALLOW, "embed_dims": (8, 16, 40, 64), "img_size": PIXELS},
    "inline_swin": {**SHALLOW, "replaced": (1, 1, 1, 0), "embed_dim": 32, "img_size": PIXELS},
    "litv2": {**SHALLOW, "embed_dim": 32},
    "moh": {**SHALLOW, "embed_dim": 24, **HEADS, "img_size": PIXELS},
    "nat": {**SHALLOW, "embed_dim": 32, "kernel_size": 3},
    "transnext": {**SHALLOW, "embed_dim": 24, "img_size": PIXELS},
    "vit": {"embed_dim": 48, "depth": 2, "num_heads": 2, "img_size": PIXELS},
}
NAMES = [
    name for name in recipe_names() if name not in ("digits", "probe", "testbed", "testbed_long")
]


def recipe(name: str) -> TrainConfig:
    return TrainConfig.from_yaml(*find_recipe(name))


@pytest.mark.parametrize("name", recipe_names())
def test_real_models_are_what_a_recipe_can_train(name: str) -> None:
    """On the meta device: the arguments are known, the optimizer and its layers can be made."""
    config = recipe(name)
    with torch.device("meta"):
        network = timm.create_model(config.model, num_classes=10, **config.model_kwargs)
    decayed = dataclasses.replace(config.optimizer, layer_decay=0.5)
    optimizer = create_optimizer(network, dataclasses.replace(config, optimizer=decayed))
    layers = group_parameters(network, network.group_matcher())  # type: ignore
    scales = sorted(group["lr_scale"] for group in optimizer.param_groups)
    assert scales[-1] == 1 and scales[0] == pytest.approx(0.5 ** max(layers))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        [*network.parameters()]
    )
    if config.image_size is not None and "_384" in name:
        assert network.pretrained_cfg["input_size"] == (3, 384, 384)


def small(config: TrainConfig, folder: Path) -> TrainConfig:
    """The recipe with a small model of its family, on few small images, in one process."""
    family = max((f for f in SMALL if config.model.startswith(f)), key=len)
    start: dict[str, Any] = {"pretrained": False}
    if config.task == "distillation":
        start["distillation"] = dataclasses.replace(config.distillation, teacher="teacher")
    return dataclasses.replace(
        config,
        data=f"folder:{folder}",
        model_kwargs={**config.model_kwargs, **SMALL[family]},
        image_size=PIXELS,
        batch_size=4,
        precision="no",
        device="cpu",
        workers=0,
        threads=1,
        **start,
    )


class Bright(nn.Module):
    """A teacher that answers with how bright the three channels are."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name: str, digit_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitarium.train import distill
    from vitarium.train.data import InputConfig
    from vitarium.train.weights import LoadedModel

    def teacher(options: str, checkpoint: str | None) -> LoadedModel:
        inputs = InputConfig((48, 48), (0.5,) * 3, (0.25,) * 3, "bicubic", 1.0)
        return LoadedModel("teacher", Bright(), inputs, None, None, None)

    monkeypatch.setattr(distill, "load_weights", teacher)
    run = _Run(small(recipe(name), digit_folders))
    run.model.train()
    run.task.start_epoch(0)
    before = {n: p.detach().clone() for n, p in run.network.named_parameters()}
    for batch in itertools.islice(batches(run.loader, torch.device("cpu")), 2):
        run._train_step(*batch)
    run.watch.flush()
    assert run.step == 2 and run.watch.loss > 0
    changed = {n for n, p in run.network.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in run.network.named_parameters() if p.requires_grad}
    assert changed <= trained
    assert len(changed) >= 0.8 * len(trained), sorted(trained - changed)
    assert (trained == {"head.fc.weight", "head.fc.bias"}) == (name == "linear_probe")
