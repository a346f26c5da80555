"""Token-aware pooling and attention diversification of whole networks."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import vitarium.zoo  # noqa: F401  registers our models
from vitarium.ops import attention_diversification_loss, auxiliary_losses, with_attention_maps
from vitarium.train import TrainConfig, train
from vitarium.train.checkpoint import build_model, load_model
from vitarium.train.config import AugmentConfig, ScheduleConfig
from vitarium.zoo.robust import PooledNorm

VIT = ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2})
NANO = ("testbed_position_aware_nano", {})


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "kwargs"), [VIT, NANO])
def test_the_loss_is_that_of_the_maps(name, kwargs) -> None:
    torch.manual_seed(0)
    model = build_model(name, 5, {**kwargs, "attention_diversification": 0.5}).train()
    model(images())
    found = auxiliary_losses(model)
    assert len(found) == len([m for m in model.modules() if hasattr(m, "qkv")])
    assert all(0 < loss.item() <= 1 for loss in found)
    sum(found).backward()
    qkv = [m.qkv.weight.grad for m in model.modules() if hasattr(m, "qkv")]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in qkv)
    copy.deepcopy(model)  # as moving averages do, whatever the last step left
    model.eval()(images())
    if name == NANO[0]:
        mixer = model.stages[0].blocks[0].mixer.train()
        x = torch.randn(2, 4, 4, mixer.dim)
        mixer(x)
        _, maps = with_attention_maps(mixer.eval(), x)
        expected = attention_diversification_loss(maps, 0.5)
        assert mixer.auxiliary_loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("name", "kwargs"), [VIT, NANO, ("dinat_nano", {})])
def test_pooling_starts_from_the_plain_network(name, kwargs) -> None:
    """Where scales are told to leave tokens alone, the network is the plain one."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5, **kwargs).eval()
    torch.manual_seed(0)
    model = build_model(name, 5, {**kwargs, "token_aware_pooling": 3}).eval()
    norms = [m for m in model.modules() if isinstance(m, PooledNorm)]
    assert len(norms) == len([m for m in plain.modules() if hasattr(m, "norm1")])
    names = {key.replace("norm1.norm.", "norm1.") for key in model.state_dict()}
    assert set(plain.state_dict()) <= names
    state = {k.replace("norm1.", "norm1.norm."): v for k, v in plain.state_dict().items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    with torch.no_grad():
        assert not torch.allclose(model(images()), plain(images()), atol=1e-4)
        for norm in norms:
            norm.dilation_predictor.forward = lambda x: torch.cat(
                [x.new_full((*x.shape[:3], 1), 50.0), x.new_zeros(*x.shape[:3], 2)], -1
            )
        torch.testing.assert_close(model(images()), plain(images()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "kwargs"), [VIT, NANO])
def test_two_steps_of_training(name, kwargs, digit_run_config, tmp_path) -> None:
    robust = {"token_aware_pooling": True, "attention_diversification": 0.5}
    config = digit_run_config(name, {**kwargs, **robust})
    result = train(config, output=tmp_path / "run")
    model, description = load_model(result.folder)
    assert description.model_kwargs["token_aware_pooling"] is True
    assert any(isinstance(m, PooledNorm) for m in model.modules())


@pytest.fixture
def digit_run_config(tmp_path):
    from sklearn.datasets import load_digits

    from vitarium.train.data import digit_image

    digits = load_digits()
    for label in (0, 1):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        for number, scan in enumerate(digits.images[digits.target == label][:20]):
            digit_image(scan).save(tmp_path / "data" / str(label) / f"{number}.png")

    def make(name: str, kwargs: dict) -> TrainConfig:
        return TrainConfig(
            data=f"folder:{tmp_path / 'data'}", model=name, model_kwargs=kwargs, image_size=32,
            epochs=1, batch_size=16, workers=0, threads=1, device="cpu", auxiliary_loss=1.0,
            ema_decay=0.9, schedule=ScheduleConfig(warmup_epochs=0),
            augment=AugmentConfig(hflip=0.0),
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("agent_deit_tiny", {"token_aware_pooling": True}, "not for this DeiT"),
        ("resnet10t", {"attention_diversification": True}, "not for this ResNet"),
        ("dinat_nano", {"attention_diversification": True}, "not for this Pyramid"),
        ("testbed_tap_nano", {"token_aware_pooling": True}, "already"),
        (*NANO[:1], {"token_aware_pooling": 1}, "at least 2"),
        (*NANO[:1], {"token_aware_pooling": 2.5}, "whole number"),
        (*NANO[:1], {"token_aware_pooling": "yes"}, "true, false or a number"),
        (*NANO[:1], {"attention_diversification": -1}, "at least 0"),
    ],
)
def test_wrong_arguments(name, kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(name, 5, kwargs)
