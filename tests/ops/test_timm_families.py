"""Mixers of timm's families give what timm's modules give, with their weights, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.davit import ChannelAttention as TimmChannelAttention
from timm.models.davit import ChannelAttentionV2 as TimmChannelAttentionV2
from timm.models.efficientvit_msra import CascadedGroupAttention as TimmCascadedGroupAttention
from timm.models.efficientvit_msra import LocalWindowAttention as TimmLocalWindowAttention
from timm.models.focalnet import FocalModulation as TimmFocalModulation
from timm.models.volo import OutlookAttention as TimmOutlookAttention
from torch import Tensor, nn

from vitarium.ops import (
    CascadedGroupAttention,
    ChannelAttention,
    ChannelAttentionV2,
    FocalModulation,
    Mixer,
    OutlookAttention,
)


def _random(module: Any) -> Any:
    """The module in float64 with weights that leave no parameter without effect."""
    generator = torch.Generator().manual_seed(0)
    module.double().eval()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            noise = noise / max(1, tensor[0].numel()) ** 0.5 + (tensor.dim() == 1)
            tensor.copy_(noise.abs() + 0.1 if name.endswith("running_var") else noise)
    return module


def _map(*size: int) -> Tensor:
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _assert_same(
    mixer: Mixer, state: nn.Module, theirs: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    """Output, gradients of the input and of every parameter; the state dict loads as it is."""
    mixer = mixer.double().train(state.training)
    mixer.load_state_dict(state.state_dict(), strict=True)
    ours, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, expected = mixer(ours), theirs(other)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).double()
    for module, result in ((mixer, output), (state, expected)):
        module.zero_grad()
        result.backward(grad)
    torch.testing.assert_close(ours.grad, other.grad, rtol=1e-8, atol=1e-8)
    # Gradients and statistics as a state dict: what loads the weights loads them, too.
    wanted, found = (_after(module) for module in (state, mixer))
    mixer.load_state_dict(wanted, strict=True)
    torch.testing.assert_close(found, mixer.state_dict(), rtol=1e-8, atol=1e-8)


def _after(module: nn.Module) -> dict[str, Any]:
    """Gradients of the parameters, and the buffers."""
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return state | {name: parameter.grad for name, parameter in module.named_parameters()}


def _train(module: Any, training: bool) -> None:
    """timm's own `train` returns nothing, which that of a parent cannot take."""
    for part in module.modules():
        part.training = training


def _tokens(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x.flatten(1, 2)).view(x.shape)


def _channels_last(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 3)], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_heads": 3, "stride": 2},
        {"num_heads": 2, "qkv_bias": True},
        {"num_heads": 1, "kernel_size": 5, "padding": 2, "stride": 2},
        {"num_heads": 2, "kernel_size": 5, "padding": 2, "stride": 3},
        {"num_heads": 2, "kernel_size": 1, "padding": 0},
    ],
    ids=str,
)
def test_outlook(arguments: dict[str, Any], size: tuple[int, int]) -> None:
    theirs = _random(TimmOutlookAttention(24, **arguments))
    _assert_same(OutlookAttention(24, **arguments), theirs, theirs, _map(*size, 24))


@pytest.mark.parametrize("size", [(8, 8), (5, 10), (1, 3)], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        {"focal_window": 3, "focal_level": 2},
        {"focal_window": 9, "focal_level": 3, "focal_factor": 4, "normalize_modulator": True},
        {"focal_window": 5, "focal_level": 1, "bias": False, "use_post_norm": True},
        {"focal_window": 3, "focal_level": 0, "normalize_modulator": True},
    ],
    ids=str,
)
def test_focal(arguments: dict[str, Any], size: tuple[int, int]) -> None:
    theirs = _random(TimmFocalModulation(16, **arguments))
    _assert_same(FocalModulation(16, **arguments), theirs, _channels_last(theirs), _map(*size, 16))


def test_focal_map_is_a_derivative() -> None:
    """Near levels reach as far as their kernels; the mean reaches everywhere."""
    mixer = _random(FocalModulation(8, focal_window=3, focal_level=2))
    maps = mixer.attention_map(_map(9, 11, 8), (4, 5))
    assert maps.shape == (2, 3, 9, 11)
    reach = torch.tensor([[maps[:, i].any(0)[4, 5 + d] for d in range(6)] for i in range(3)])
    assert reach.sum(1).tolist() == [2, 4, 6]


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("arguments", [{"num_heads": 2}, {"num_heads": 3, "qkv_bias": True}])
def test_channel(arguments: dict[str, Any], size: tuple[int, int]) -> None:
    theirs = _random(TimmChannelAttention(24, **arguments))
    _assert_same(ChannelAttention(24, **arguments), theirs, _tokens(theirs), _map(*size, 24))


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 1)], ids=str)
@pytest.mark.parametrize(
    "arguments", [{"num_heads": 2}, {"num_heads": 4, "qkv_bias": False, "dynamic_scale": False}]
)
def test_channel_v2(arguments: dict[str, Any], size: tuple[int, int]) -> None:
    theirs = _random(TimmChannelAttentionV2(24, **arguments))
    _assert_same(ChannelAttentionV2(24, **arguments), theirs, _tokens(theirs), _map(*size, 24))


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (10, 9), (3, 8)], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        {"key_dim": 8, "num_heads": 2, "attn_ratio": 2, "kernels": (5, 3)},
        {"key_dim": 5, "num_heads": 4, "attn_ratio": 1.6, "resolution": 4, "kernels": (7, 5, 3, 1)},
        {"key_dim": 4, "num_heads": 1, "attn_ratio": 3, "window_resolution": 4, "kernels": (3,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [False, True])
def test_cascaded_group(arguments: dict[str, Any], size: tuple[int, int], training: bool) -> None:
    theirs = _random(TimmLocalWindowAttention(32, **arguments))
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    _train(theirs, training)
    try:
        _channels_last(theirs)(_map(*size, 32))
    except AssertionError:
        pytest.skip("older timm takes maps of its resolution only")
    theirs.load_state_dict(state)
    _assert_same(
        CascadedGroupAttention(32, **arguments), theirs, _channels_last(theirs), _map(*size, 32)
    )


def test_cascaded_group_of_the_whole_map() -> None:
    arguments = {"key_dim": 8, "num_heads": 2, "attn_ratio": 2, "resolution": 9, "kernels": (5, 5)}
    theirs = _random(TimmCascadedGroupAttention(32, **arguments))
    mixer = CascadedGroupAttention(32, window_resolution=9, **arguments)
    _assert_same(mixer, theirs, _channels_last(theirs), _map(9, 9, 32))
