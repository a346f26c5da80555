"""Continuous position bias: the same however the table is cut, and for sizes of any ratio."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitarium.ops import build_mixer, position
from vitarium.ops.position import continuous_position_bias, relative_coordinates


@pytest.mark.parametrize("pretrain_size", [None, (7, 12)])
@pytest.mark.parametrize("key_size", [(9, 13), (3, 4), (4, 6), (1, 1)], ids=str)
def test_coordinates(key_size: tuple[int, int], pretrain_size: tuple[int, int] | None) -> None:
    """Every pair's entry follows from the means of what adaptive pooling puts together."""
    query_size = (9, 13)
    index, table = relative_coordinates(query_size, key_size, pretrain_size)
    found = table[index].view(*query_size, *key_size, 2)
    expected = []
    for length, pooled, extent in zip(query_size, key_size, pretrain_size or query_size):
        query = torch.arange(length, dtype=torch.float64)
        key = F.adaptive_avg_pool1d(query[None], pooled)[0]
        distance = (query[:, None] - key) / (extent - 1) * 8
        expected.append(distance.sign() * (distance.abs() + 1).log2() / 3)
    down = expected[0][:, None, :, None].expand(found.shape[:-1])
    right = expected[1][None, :, None].expand(found.shape[:-1])
    torch.testing.assert_close(found.double(), torch.stack([down, right], -1), rtol=0, atol=1e-6)
    assert len(index.unique()) == len(table) == len(table.unique(dim=0))
    assert torch.equal(table, table.unique(dim=0, sorted=True))


@pytest.mark.parametrize(("chunk", "kept"), [(7, 1 << 14), (7, 5), (1000, 1000)])
def test_bias_in_chunks(chunk: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(2, 5, dtype=torch.float64), nn.Linear(5, 3, dtype=torch.float64)
    parameters = [*fc1.parameters(), *fc2.parameters()]
    index, table = relative_coordinates((6, 7), (3, 3))
    expected = fc2(F.relu(fc1(table.double())))[index].permute(2, 0, 1)
    grads = torch.autograd.grad(expected.square().sum(), parameters)
    monkeypatch.setattr(position, "CPU_ROWS", chunk)
    monkeypatch.setattr(position, "KEPT_ROWS", kept)
    found = continuous_position_bias(fc1, fc2, (6, 7), (3, 3))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), parameters), grads)
    with torch.no_grad():
        torch.testing.assert_close(continuous_position_bias(fc1, fc2, (6, 7), (3, 3)), expected)


def test_one_token_has_no_distance() -> None:
    index, table = relative_coordinates((1, 1), (1, 1))
    assert index.tolist() == [[0]] and table.tolist() == [[0.0, 0.0]]


def _interpolation(length: int, wanted: int) -> torch.Tensor:
    """Matrix `(wanted, length)` of linear interpolation between centres of cells."""
    place = ((torch.arange(wanted) + 0.5) * length / wanted - 0.5).clamp(0, length - 1)
    return (1 - (place[:, None] - torch.arange(length)).abs()).clamp(min=0)


def test_bias_of_another_size_is_interpolated() -> None:
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(2, 16), nn.Linear(16, 3)
    trained, pooled, wanted, wanted_pooled = (6, 4), (3, 2), (7, 5), (2, 3)
    bias = continuous_position_bias(fc1, fc2, trained, pooled, (6, 6))
    factors = [
        _interpolation(length, size)
        for length, size in zip(trained + pooled, wanted + wanted_pooled)
    ]
    bias = bias.unflatten(1, trained).unflatten(3, pooled)
    expected = torch.einsum("nabcd,ia,jb,kc,ld->nijkl", bias, *factors)
    found = continuous_position_bias(fc1, fc2, wanted, wanted_pooled, (6, 6), of=(trained, pooled))
    torch.testing.assert_close(found, expected.flatten(3).flatten(1, 2))


@pytest.mark.parametrize(
    ("mixer", "arguments"),
    [
        ("length_scaled_cosine", {}),
        ("mixture_of_head", {"shared_head": 1, "routed_head": 1}),
        ("aggregated", {"sr_ratio": 2}),
        ("aggregated_mixture_of_head", {"sr_ratio": 2, "shared_head": 1, "routed_head": 1}),
    ],
)
def test_mixers_interpolate_if_asked(mixer: str, arguments: dict[str, int]) -> None:
    torch.manual_seed(0)
    arguments = {"num_heads": 3, "pretrain_size": 4, **arguments}
    extrapolating = build_mixer((mixer, arguments), 12)
    arguments |= {"is_extrapolation": False}
    with pytest.raises(ValueError, match="is_extrapolation=False needs input_resolution"):
        build_mixer((mixer, arguments), 12)
    interpolating = build_mixer((mixer, {**arguments, "input_resolution": (6, 5)}), 12)
    interpolating.load_state_dict(extrapolating.state_dict())
    native, other = torch.randn(1, 6, 5, 12), torch.randn(1, 4, 7, 12)
    torch.testing.assert_close(interpolating(native), extrapolating(native))
    assert (interpolating(other) - extrapolating(other)).abs().max() > 1e-5
