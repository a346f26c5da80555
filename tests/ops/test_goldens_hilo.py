"""HiLo attention with official weights gives the outputs of the official code."""

import re
from pathlib import Path

import pytest
import torch

from vitarium.ops import HiLoAttention, backend

FOLDER = Path(__file__).parents[1] / "data" / "parity" / "ops"
GOLDENS = sorted(FOLDER.glob("hilo_*.json.xz"))


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name.removesuffix(".json.xz"))
@torch.no_grad()
def test_official_weights_give_official_outputs(path, implementation, parity):
    """In float64, to the ten digits that the golden holds."""
    golden = parity.load(path)
    arguments = dict(golden["constructor"])
    arguments.pop("attn_drop", None)  # of no effect on the official outputs
    mixer = HiLoAttention(**arguments, dtype=torch.float64)
    mixer.load_state_dict(parity.state_dict(golden["state_dict"]), strict=True)
    batch, height, width, channels = map(int, re.findall(r"\d+", golden["inputs"])[:4])
    images = parity.image(batch, channels, height, width).permute(0, 2, 3, 1)

    with backend(implementation):
        output = mixer.eval()(images).flatten(1, 2)

    parity.close(output, golden)


def test_there_are_goldens_of_every_form():
    assert len(GOLDENS) >= 8
    assert {path.name.split("_")[1][:3] for path in GOLDENS} == {"alp", "det", "ws1"}


@torch.no_grad()
def test_attention_map():
    """Windows for high frequencies; for low ones equal weights within a cell, and 1 in all."""
    mixer = HiLoAttention(32, num_heads=4, window_size=2, alpha=0.5, dtype=torch.float64)
    x = torch.randn(2, 6, 8, 32, dtype=torch.float64)
    weights = mixer.attention_map(x, (3, 4))
    assert weights.shape == (2, 4, 6, 8)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, 4, dtype=torch.float64))
    high, low = weights.split(2, 1)
    torch.testing.assert_close(high[:, :, 2:4, 4:6].sum((2, 3)), high.sum((2, 3)))
    cells = low.unflatten(3, (4, 2)).unflatten(2, (3, 2))
    torch.testing.assert_close(cells, cells[:, :, :, :1, :, :1].expand_as(cells))
    # What a high-frequency head outputs is linear in its values, with these weights.
    mixer.h_proj.weight.copy_(torch.eye(16))
    mixer.h_proj.bias.zero_()
    value = mixer.h_qkv(x)[..., 32:].unflatten(-1, (2, 8))
    torch.testing.assert_close(
        mixer(x)[:, 3, 4, :16], torch.einsum("bhyx,byxhc->bhc", high, value).flatten(1)
    )
