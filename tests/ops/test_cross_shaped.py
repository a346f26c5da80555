"""Cross-shaped windows against their definition, stripe by stripe."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import CrossShapedAttention


def _stripe(branch: torch.nn.Module, parts: list[Tensor], heads: int) -> Tensor:
    """Softmax attention and LePE of one stripe, `(B, h, w, C)`."""
    q, k, v = (x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in parts)
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1)
    attended = (weights @ v).transpose(1, 2).flatten(2).unflatten(1, parts[0].shape[1:3])
    return attended + branch.get_v(parts[2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _expected(mixer: CrossShapedAttention, x: Tensor, split: int) -> Tensor:
    halves = mixer.qkv(x).unflatten(-1, (3, 2, -1))
    found = []
    for idx, branch in enumerate(mixer.attns):
        axis = 2 - idx  # upright stripes first
        lack = -x.shape[axis] % split
        sides = [0, 0, lack // 2, lack - lack // 2] if axis == 2 else [0, 0, 0, 0]
        sides += [lack // 2, lack - lack // 2] if axis == 1 else []
        parts = [F.pad(halves[..., i, idx, :], sides) for i in range(3)]
        stripes = [
            _stripe(
                branch, [part.narrow(axis, start, split) for part in parts], mixer.num_heads // 2
            )
            for start in range(0, parts[0].shape[axis], split)
        ]
        found.append(torch.cat(stripes, axis).narrow(axis, lack // 2, x.shape[axis]))
    return mixer.proj(torch.cat(found, -1))


@pytest.mark.parametrize("size", [(6, 9), (7, 11), (2, 5), (1, 1)])
def test_stripes_are_padded_on_both_sides_and_see_the_zeros(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    mixer = CrossShapedAttention(8, num_heads=4, split_size=3, qkv_bias=True, dtype=torch.float64)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), _expected(mixer, x, 3))


def test_there_is_one_branch_where_a_stripe_is_the_map() -> None:
    for arguments in ({"last_stage": True}, {"split_size": 4, "resolution": 4}):
        mixer = CrossShapedAttention(6, num_heads=3, dtype=torch.float64, **arguments)
        (branch,) = mixer.attns
        x = torch.randn(1, 5, 3, 6, dtype=torch.float64)
        parts = list(mixer.qkv(x).chunk(3, -1))
        torch.testing.assert_close(mixer(x), mixer.proj(_stripe(branch, parts, 3)))


@torch.no_grad()
def test_the_map_of_weights_is_a_cross() -> None:
    """Heads of either half see their stripe alone; what the zeros got is missing from the sum."""
    mixer = CrossShapedAttention(8, num_heads=2, split_size=3)
    weights = mixer.attention_map(torch.randn(1, 7, 9, 8), (4, 5))
    upright, level = weights[0]
    assert upright[:, 3:6].sum().item() == pytest.approx(1)
    assert level.sum().item() == pytest.approx(level[2:5].sum().item())
    edge = mixer.attention_map(torch.randn(1, 7, 9, 8), (6, 5))[0, 1]
    assert edge.count_nonzero().item() == 2 * 9  # one row of the last stripe is zeros
    assert edge.sum().item() < 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "num_heads=3"),
        ({"num_heads": 5, "last_stage": True}, "num_heads=5"),
        ({"num_heads": 2, "split_size": 0}, "split_size=0"),
    ],
)
def test_impossible_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossShapedAttention(12, **arguments)
