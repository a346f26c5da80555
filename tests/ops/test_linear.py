"""Linear attention and its mixers, beyond what the generated suite asks of all."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import build_mixer, flow_attention, linear_attention
from vitarium.ops import linear_portable as portable
from vitarium.ops.inline_mixers import SMALL, dynamic_convolution
from vitarium.ops.partition import Partition


def maps(*shape: int, count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def ones(query: Tensor) -> Tensor:
    """A value for which the output is the sum of a query's weights."""
    return torch.ones_like(query[..., :1])


def test_weights_sum_to_one() -> None:
    query, key = maps(2, 5, 7, 2, 8, count=2)
    for kwargs in ({"feature_map": "elu"}, {"feature_map": "focused"}):
        total = linear_attention(query, key, ones(query), eps=0.0, **kwargs)
        torch.testing.assert_close(total, ones(query))
    kwargs = {"feature_map": "identity", "normalization": "injective"}
    torch.testing.assert_close(linear_attention(query, key, ones(query), **kwargs), ones(query))


def test_injective_weights_tell_parallel_queries_apart() -> None:
    """Which weights divided by their sum do not (arXiv 2412.06590, figure 2)."""
    query, key, value = maps(1, 9, 1, 8)
    query, key = query.abs(), key.abs()
    for normalization, same in (("sum", True), ("injective", False)):
        kwargs = {"feature_map": "relu", "normalization": normalization, "eps": 0.0}
        outputs = [linear_attention(scale * query, key, value, **kwargs) for scale in (1, 3)]
        assert torch.allclose(*outputs) == same


@pytest.mark.parametrize("feature_map", ["identity", "relu", "elu", "focused"])
@pytest.mark.parametrize("normalization", ["sum", "injective", "none"])
def test_chunks_change_nothing(
    feature_map: str, normalization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of some tokens of an image, of several images, and all at once."""
    tensors = [x.requires_grad_() for x in maps(3, 4, 13, 2, 8)]
    temperature = (1 + torch.rand(2, 8, dtype=torch.float64)).requires_grad_()
    kwargs = {"feature_map": feature_map, "normalization": normalization, "eps": 0.5}
    if feature_map == "focused":
        kwargs["temperature"] = temperature
        tensors.append(temperature)
    results = []
    for chunk, small in ((1 << 19, 1 << 18), (700, 1), (2000, 1 << 18)):
        monkeypatch.setattr(portable, "CHUNK", chunk)
        monkeypatch.setattr(portable, "SMALL", small)
        output = linear_attention(*tensors[:3], **kwargs, backend="torch")
        results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    expected = linear_attention(*tensors[:3], **kwargs, backend="reference")
    torch.testing.assert_close(results[0][0], expected)
    for result in results[1:]:
        for found, want in zip(result, results[0]):
            torch.testing.assert_close(found, want)


def test_focused_features_of_tokens_without_a_positive_channel() -> None:
    """Powers of what is added are no normal numbers, and yet nothing overflows."""
    query, key, value = (x.float() for x in maps(1, 40, 1, 8))
    for factor in (3, 8, 30):
        output = linear_attention(
            -query.abs(), key, value, feature_map="focused", focusing_factor=factor, backend="torch"
        )
        assert output.isfinite().all()


def test_errors_name_what_is_wrong() -> None:
    query, key, value = maps(1, 6, 2, 8)
    for kwargs, message in (
        ({"feature_map": "softmax"}, "feature_map='softmax' is unknown"),
        ({"feature_map": lambda x: x[:, :3]}, "feature_map returned"),
        ({"normalization": "mean"}, "normalization='mean' is unknown"),
        ({"eps": -1.0}, "eps=-1.0 must be at least 0"),
        ({"focusing_factor": 0}, "focusing_factor=0 must be positive"),
        ({"temperature": torch.ones(2, 8)}, "temperature is of feature_map='focused'"),
        ({"temperature": torch.ones(2, 7), "feature_map": "focused"}, "temperature has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_attention(query, key, value, **kwargs)
    for bad, message in (
        ((query, key[..., :4], value), "key has head_dim 4"),
        ((query, key, value[:, :5]), "value has shape"),
        ((query, key[:, :, :0], value[:, :, :0]), "only the batch may be empty"),
        ((query[0], key[0], value[0]), "allowed is \\(B, \\*spatial"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_attention(*bad)
    with pytest.raises(ValueError, match="heads and head_dim must agree"):
        flow_attention(query, key[..., :1, :], value[..., :1, :])


def test_flow_is_conserved() -> None:
    """By definition, dense: every pair's flow, competition of sources, allocation of sinks."""
    query, key = maps(2, 6, 2, 8, count=2)
    value = maps(2, 9, 2, 4, count=1)[0]
    key = torch.cat([key, key[:, :3] + 1], 1)
    eps = 1e-6
    q, k = (x.sigmoid().transpose(1, 2) + eps for x in (query, key))
    incoming = 1 / (q * (k - eps).sum(-2, keepdim=True).add(eps)).sum(-1)
    outgoing = 1 / (k * (q - eps).sum(-2, keepdim=True).add(eps)).sum(-1)
    sink = (q * ((k - eps) * outgoing[..., None]).sum(-2, keepdim=True).add(eps)).sum(-1)
    source = (k * ((q - eps) * incoming[..., None]).sum(-2, keepdim=True).add(eps)).sum(-1)
    competition = source.clamp(-1, 1).softmax(-1) * 9
    weights = (q - eps) @ (k - eps).transpose(-1, -2) * competition[..., None, :]
    weights = weights * (incoming * torch.sigmoid(sink * 6 / 9))[..., None]
    expected = (weights @ value.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(flow_attention(query, key, value), expected)


@pytest.mark.parametrize("size", [(3, 5), (64, 65)])
def test_dynamic_convolution(size: tuple[int, int]) -> None:
    """Every image with weights of its own, small ones together and large ones alone."""
    (x,) = maps(2, *size, 4, count=1)
    assert (x[:1].numel() > SMALL) == (size[0] > 3)
    (weight,) = maps(2, 4, 9, count=1, seed=1)
    expected = [
        F.conv2d(image.permute(2, 0, 1), taps.view(4, 1, 3, 3), padding=1, groups=4)
        for image, taps in zip(x, weight)
    ]
    found = dynamic_convolution(x, weight).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("shift", [0, 2])
def test_windows_cover_the_map(shift: int) -> None:
    (x,) = maps(2, 7, 10, 3, count=1)
    for window in ((3, 4), (7, 5), (9, 9)):
        partition = Partition.of((7, 10), window, (shift, shift))
        windows = partition.split(x)
        assert windows.shape[1:3] == partition.window_size
        assert len(windows) == 2 * math.prod(partition.grid)
        assert torch.equal(partition.join(windows), x)


@pytest.mark.parametrize("name", ["inline_window", "focused_linear_window"])
@torch.no_grad()
def test_windows_are_computed_apart(name: str) -> None:
    arguments = {"num_heads": 2, "window_size": (3, 4)}
    mixer = build_mixer((name, arguments), 8, dtype=torch.float64)
    (x,) = maps(1, 6, 8, 8, count=1)
    output = mixer(x)
    alone = mixer(x[:, 3:, :4])
    torch.testing.assert_close(output[:, 3:, :4], alone)
    weights = mixer.attention_map(x, (4, 1))
    inside = mixer.attention_map(x[:, 3:, :4], (1, 1))
    torch.testing.assert_close(weights[:, :, 3:, :4], inside)
    assert not weights[:, :, :3].any() and not weights[..., 4:].any()


@torch.no_grad()
def test_cross_shaped_maps() -> None:
    """Half of the heads look down a stripe, half across."""
    mixer = build_mixer(
        ("inline_cross_shaped", {"num_heads": 2, "split_size": 2}), 8, dtype=torch.float64
    )
    (x,) = maps(1, 6, 8, 8, count=1)
    weights = mixer.attention_map(x, (4, 1))
    assert weights.shape == (1, 2, 6, 8)
    assert weights[:, 0, :, :2].all() and not weights[:, 0, :, 2:].any()
    assert weights[:, 1, 4:].all() and not weights[:, 1, :4].any()
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(1, 2, dtype=torch.float64))


@torch.no_grad()
def test_stripes_as_wide_as_the_map_are_one_branch() -> None:
    arguments = {"num_heads": 3, "split_size": 6, "resolution": 6}
    mixer = build_mixer(("inline_cross_shaped", arguments), 12)
    last = build_mixer(("inline_cross_shaped", {"num_heads": 3, "last_stage": True}), 12)
    last.load_state_dict(mixer.state_dict(), strict=True)
    x = torch.randn(2, 6, 6, 12)
    assert torch.equal(mixer(x), last(x))


@torch.no_grad()
def test_focused_with_pooled_keys() -> None:
    """Any map, and the official names of separate projections."""
    arguments = {"num_heads": 2, "num_patches": 64, "sr_ratio": 2, "qkv_bias": True}
    mixer = build_mixer(("focused_linear", arguments), 8)
    weights = mixer.state_dict()
    for kind in ("weight", "bias"):
        joint = weights.pop(f"qkv.{kind}")
        weights[f"q.{kind}"], weights[f"kv.{kind}"] = joint[:8], joint[8:]
    other = build_mixer(("focused_linear", arguments), 8)
    other.load_state_dict(weights, strict=True)
    for size in ((8, 8), (5, 9), (1, 1)):
        x = torch.randn(2, *size, 8)
        assert mixer(x).shape == x.shape
        assert torch.equal(mixer(x), other(x))
    with pytest.raises(NotImplementedError, match="keys are no positions"):
        mixer.attention_map(x, (0, 0))
