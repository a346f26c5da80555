"""Position reconstruction: masks, targets, loss and weights as defined, and that it learns."""

from __future__ import annotations

import copy

import PIL.Image
import pytest
import timm
import torch

import vitarium.zoo  # noqa: F401  registers our models
from vitarium.cli.main import main
from vitarium.train import TrainConfig, train
from vitarium.train.checkpoint import load_model
from vitarium.train.config import (
    AugmentConfig,
    ConfigError,
    DropPosConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from vitarium.train.droppos import (
    Answers,
    PositionReconstruction,
    position_loss,
    smoothed_targets,
)

VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 2}


def vit(**kwargs: object):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, **kwargs})


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_masks_and_positions() -> None:
    model = PositionReconstruction(vit(), mask_ratio=0.25, position_mask_ratio=0.5).eval()
    noise = torch.rand(2, 2, 16, generator=torch.Generator().manual_seed(2))
    answers = model(images(), noise)
    assert answers.logits.shape == (2, 6, 16)  # 12 seen, 6 told
    for row in range(2):
        seen = noise[0, row].argsort()[:12]
        untold = seen[noise[1, row, seen].argsort()[6:]]
        assert set(answers.positions[row].tolist()) == set(untold.tolist())
    assert (answers.weights > 0).all() and (answers.weights.sum(1) < 1).all()


def test_no_position_leaks() -> None:
    """Without any position told, patches that change places take their answers with them."""
    network = vit()
    model = PositionReconstruction(network, mask_ratio=0, position_mask_ratio=1).eval()
    noise = torch.arange(16.0).expand(2, 1, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    cells = images(1).unflatten(2, (4, 8)).unflatten(4, (4, 8))  # B, 3, rows, 8, columns, 8
    cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    moved = cells[:, order].unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5)
    moved = moved.flatten(4, 5).flatten(2, 3)
    with torch.no_grad():
        first, second = model(images(1), noise), model(moved, noise)
    torch.testing.assert_close(second.logits, first.logits[:, order], atol=1e-5, rtol=1e-4)


def test_smoothing_is_what_the_paper_says() -> None:
    targets = smoothed_targets(torch.tensor([[0, 4]]), (2, 3), 1.5)
    distance = torch.tensor([0, 1, 2, 1, 2**0.5, 5**0.5])
    expected = (-distance / 1.5**2).exp()
    torch.testing.assert_close(targets[0, 0], expected / expected.sum())
    assert targets.sum(-1).flatten().tolist() == pytest.approx([1, 1])
    assert smoothed_targets(torch.tensor([4]), (2, 3), 0)[0].tolist() == [0, 0, 0, 0, 1, 0]


def test_loss_weighs_patches_over_the_batch() -> None:
    torch.manual_seed(0)
    logits, positions = torch.randn(2, 3, 6), torch.randint(6, (2, 3))
    weights = torch.rand(2, 3)
    loss = position_loss(Answers(logits, positions, weights), (2, 3), 0)
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), positions.flatten(), reduction="none"
    )
    assert loss.item() == pytest.approx(((each * weights.flatten()).sum() / weights.sum()).item())


def test_gradients() -> None:
    """Finite differences of the loss along the gradient, in float64."""
    model = PositionReconstruction(vit(), mask_ratio=0.25, temperature=None).double().eval()
    noise, inputs = torch.rand(2, 2, 16), images().double()

    def loss(network: torch.nn.Module) -> torch.Tensor:
        return position_loss(network(inputs, noise), (4, 4), 1.0)

    loss(model).backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    unreached = {n for n, p in model.named_parameters() if p.grad is None}
    assert unreached == {"network.pos_embed", "network.head.weight", "network.head.bias"}
    square = sum((p.grad**2).sum() for p in trained).item()
    step, values = 1e-4, []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, q in zip(moved.parameters(), model.parameters()):
                if q.grad is not None:
                    p += sign * step * q.grad
            values.append(loss(moved).item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(square, rel=1e-3)


def pretraining(**changes: object) -> TrainConfig:
    values = {
        "data": "digits", "task": "droppos", "model": "vit_tiny_patch16_224", "model_kwargs": VIT,
        "image_size": 32, "crop_pct": 1.0, "epochs": 2, "batch_size": 64, "workers": 0,
        "threads": 1, "device": "cpu", "optimizer": OptimizerConfig(lr=2e-3),
        "schedule": ScheduleConfig(warmup_epochs=0),
        "augment": AugmentConfig(scale=(0.9, 1.0), hflip=0.0, color_jitter=0.0),
        "droppos": DropPosConfig(mask_ratio=0.0, position_mask_ratio=0.5, decoder_depth=1),
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def test_positions_are_learnt_and_weights_go_on(tmp_path, capsys) -> None:
    result = train(pretraining(), output=tmp_path / "pretrained")
    assert result.last["total"] == 360 * 8
    assert result.last["accuracy"] > 2 / 16  # chance is 1 in 16
    config = pretraining(task="classification", epochs=1, initial_checkpoint=str(result.folder))
    start, _ = load_model(result.folder)
    from vitarium.train.start import create_network

    network = create_network(config, 10)
    assert torch.equal(network.blocks[0].attn.qkv.weight, start.blocks[0].attn.qkv.weight)
    assert all(p.requires_grad for p in network.parameters())
    # A classifier that nobody has trained answers nothing.
    image = tmp_path / "digit.png"
    PIL.Image.new("L", (8, 8)).save(image)
    for command in (["eval"], ["predict", str(image)]):
        assert main([command[0], str(result.folder), *command[1:]]) == 1
        assert "has trained no classifier" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "dinat_nano", "model_kwargs": {}}, "VisionTransformer"),
        ({"model": "agent_deit_tiny", "model_kwargs": {}}, "whole maps"),
        ({"model_kwargs": {**VIT, "pos_embed": "none"}}, "lacks one"),
        ({"image_size": 64}, "img_size"),
        ({"augment": AugmentConfig(mixup=0.5)}, "mixup"),
        ({"droppos": DropPosConfig(mask_ratio=0.99)}, "patches"),
        ({"droppos": DropPosConfig(decoder_dim=50, decoder_num_heads=4)}, "multiple"),
    ],
)
def test_wrong_configurations(changes, message, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(pretraining(**changes), output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "values",
    [{"mask_ratio": 1.0}, {"position_mask_ratio": 0.0}, {"sigma": -1}, {"temperature": 0},
     {"decoder_depth": -1}, {"decoder_dim": 0}],
)  # fmt: skip
def test_wrong_settings(values) -> None:
    with pytest.raises(ConfigError, match=f"droppos.{next(iter(values))}"):
        DropPosConfig(**values)
