"""Continuous position bias: the same however the table is cut, and for sizes of any ratio."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitarium.ops import position
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
