"""Token-aware pooling with official weights gives the outputs of the official blocks.

What is around the mixer in RVT and FAN is written here, with the official names of its parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import (
    TokenAwarePooling,
    attention_diversification_loss,
    build_mixer,
    with_attention_maps,
)
from vitarium.ops.tap import pool_scales

FOLDER = Path(__file__).parents[1] / "data" / "parity" / "ops"
BLOCKS = sorted(FOLDER.glob("tap_*_block*.json.xz"))
MODELS = sorted(FOLDER.glob("tap_*_model*.json.xz"))
LOSSES = sorted(FOLDER.glob("tapadl_adl_loss*.json.xz"))


def _name(path: Path) -> str:
    return path.name.split(".")[0]


class RVTMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.fc2, self.bn3 = nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn1(self.fc1(x.permute(0, 3, 1, 2))))
        x = F.gelu(self.bn2(self.dwconv(x)))
        return self.bn3(self.fc2(x)).permute(0, 2, 3, 1)


class RVTBlock(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        use_mask: bool = False,
        num_scales: int = 1,
        **_: Any,
    ) -> None:
        super().__init__()
        arguments = {"num_heads": num_heads, "qkv_bias": qkv_bias, "qk_scale": qk_scale}
        self.mixer = TokenAwarePooling(
            dim,
            mixer=("position_aware", {**arguments, "use_mask": use_mask}),
            num_scales=num_scales,
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = RVTMlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        return x + self.mlp(self.norm2(x))


class FANMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(hidden))
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = nn.Module()
        for name in ("conv1", "conv2"):
            convolution = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
            self.dwconv.add_module(name, convolution)
        self.dwconv.add_module("bn", nn.BatchNorm2d(hidden))

    def forward(self, x: Tensor) -> Tensor:
        x, part = self.fc1(x), self.dwconv
        mixed = part.conv2(part.bn(F.gelu(part.conv1(x.permute(0, 3, 1, 2)))))
        return self.fc2(self.gamma * mixed.permute(0, 2, 3, 1) + x)


class FANChannelProcessing(nn.Module):
    """Channels are gated by how much the places that they ask for hold."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, hidden: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.mlp_v, self.norm_v = FANMlp(dim, hidden), nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        heads = len(self.temperature)
        query = self.q(x).flatten(1, 2).softmax(1).unflatten(-1, (heads, -1))
        key = x.flatten(1, 2).softmax(1).unflatten(-1, (heads, -1)).mean(-1)
        gate = torch.einsum("bnhc,bnh->bhc", query, key).sigmoid() * self.temperature[..., 0]
        return gate.flatten(1)[:, None, None] * self.norm_v(self.mlp_v(x))


class FANBlock(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        eta: float = 1.0,
        c_head_num: int | None = None,
        num_scales: int = 1,
        downsample: None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        arguments = {"num_heads": num_heads, "qkv_bias": qkv_bias}
        self.mixer = TokenAwarePooling(dim, mixer=("attention", arguments), num_scales=num_scales)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = FANChannelProcessing(dim, c_head_num or num_heads, qkv_bias, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.mixer(x)
        return x + self.gamma2 * self.mlp(self.norm2(x))


class RVT(nn.Module):
    """The classifier: stem, stages with a convolution between them, mean and head."""

    def __init__(
        self,
        patch_size: int,
        base_dims: list[int],
        depth: list[int],
        heads: list[int],
        mlp_ratio: float,
        num_classes: int,
        num_scales: int,
        use_mask: bool = False,
        masked_block: int | None = None,
        in_chans: int = 3,
        **_: Any,
    ) -> None:
        super().__init__()
        dims = [base * number for base, number in zip(base_dims, heads)]
        side = 1 if patch_size == 4 else 4
        stem = (
            nn.Conv2d(in_chans, 32, 7, stride=2, padding=2),
            nn.BatchNorm2d(32),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(32, dims[0], side, stride=side),
        )
        self.patch_embed = nn.ModuleDict({"proj": nn.Sequential(*stem)})
        self.transformers, self.pools = nn.ModuleList(), nn.ModuleList()
        for stage, dim in enumerate(dims):
            blocks = (
                RVTBlock(dim, heads[stage], mlp_ratio, True, num_scales=num_scales,
                         use_mask=use_mask and not stage and i < (masked_block or 0))
                for i in range(depth[stage])
            )  # fmt: skip
            self.transformers.append(nn.ModuleDict({"blocks": nn.Sequential(*blocks)}))
        for before, after in pairwise(dims):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, groups=before)
            self.pools.append(nn.ModuleDict({"conv": convolution}))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x)
        for stage, transformer in enumerate(self.transformers):
            if stage:
                x = self.pools[stage - 1]["conv"](x)
            x = transformer["blocks"](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.norm(x.mean((2, 3))))


def _load(module: nn.Module, golden: Mapping[str, Any], parity: Any) -> None:
    """The official state dict, whose blocks hold the parts of the mixer beside their own."""
    state = {
        re.sub(r"(?=\b(norm1|attn|dilation_predictor)\.)", "mixer.", name): tensor
        for name, tensor in parity.state_dict(golden["state_dict"]).items()
    }
    module.load_state_dict(state, strict=True)


def _values(spec: Mapping[str, Any]) -> Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(0)).standard_normal(spec["shape"]))


def _close(found: Tensor, spec: Mapping[str, Any]) -> None:
    want = torch.tensor(spec["data"], dtype=torch.float64).reshape(spec["shape"])
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


@pytest.mark.parametrize("path", BLOCKS, ids=_name)
@torch.no_grad()
def test_official_blocks(path, parity):
    golden = parity.load(path)
    kind = FANBlock if "_fan_" in path.name else RVTBlock
    block = kind(**golden["constructor"]).double().eval()
    _load(block, golden, parity)
    x = _values(golden["input"]["x"])
    side = round(x.shape[1] ** 0.5)
    x = x.unflatten(1, (side, side))
    output, want = block(x), golden["output"]["x"]
    if "pred_scale" in golden["output"]:
        _close(block.mixer.scales(x)[:, None], golden["output"]["pred_scale"])
    if len(want["shape"]) == 3:
        _close(output.flatten(1, 2), want)
    else:
        _close(output.permute(0, 3, 1, 2), want)


@pytest.mark.parametrize("path", MODELS, ids=_name)
@torch.no_grad()
def test_official_models(path, parity):
    golden = parity.load(path)
    model = RVT(**golden["constructor"]).double().eval()
    _load(model, golden, parity)
    _close(model(_values(golden["input"]["x"])), golden["output"]["logits"])


def _maps(shape: Sequence[int], bias: float) -> list[Tensor]:
    """The maps that the golden of the loss describes."""
    columns = (shape[0], 1, 1, shape[-1])
    draw = [np.random.Generator(np.random.PCG64(seed)).standard_normal for seed in (0, 1, 10, 11)]
    scores = [2 * draw[i](shape) + bias * draw[i + 2](columns) for i in (0, 1)]
    return [torch.from_numpy(part).softmax(-1) for part in scores]


@pytest.mark.parametrize("path", LOSSES, ids=_name)
def test_attention_diversification_loss(path, parity):
    golden = parity.load(path)
    shape = golden["input"]["attn"]["shape"]
    for name, want in golden["output"].items():
        threshold = float(name.split()[0].removeprefix("th="))
        loss = attention_diversification_loss(_maps(shape, 3 * ("bias" in name)), threshold)
        assert loss.item() == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_loss_is_of_the_maps_of_a_model():
    """Maps hold the weights that the operators used, have gradients, and can be diversified."""
    torch.manual_seed(0)
    specs = (("attention", {"num_heads": 2}), ("window", {"num_heads": 2, "window_size": 3}))
    model = nn.Sequential(*(TokenAwarePooling(8, mixer=spec) for spec in specs)).double()
    x = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    output, maps = with_attention_maps(model, x)
    torch.testing.assert_close(output, model(x))
    assert [tuple(part.shape) for part in maps] == [(1, 2, 20, 20), (1, 2, 36, 36)]
    for part in maps:
        torch.testing.assert_close(part.sum(-1), torch.ones_like(part[..., 0]))
    loss = attention_diversification_loss(maps, threshold=1)
    loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if name.endswith("qkv.weight")]
    assert len(grads) == 2 and all(grad.isfinite().all() and grad.any() for grad in grads)
    # One head, whose rows are alike: the loss is that of one layer, 1 but for the count's 1e-6.
    alike = torch.zeros(2, 1, 5, 4).index_fill_(-1, torch.tensor(2), 1.0)
    assert attention_diversification_loss([alike]).item() == pytest.approx(1, abs=1e-5)
    for bad, kwargs, message in (
        ([], {}, "is empty"),
        ([alike[0]], {}, "has shape"),
        ([alike], {"threshold": -1}, "threshold=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_diversification_loss(bad, **kwargs)


@torch.no_grad()
def test_pools_are_averages_with_zeros_around():
    """On a map of ones the pools say how much of them lies inside; a corner sees four ninths."""
    ones = torch.ones(1, 5, 6, 4)
    for i, corner in enumerate((1, 4 / 9, 4 / 9)):
        scales = F.one_hot(torch.full((1, 5, 6), i), 3).float()
        pooled = pool_scales(ones, scales)
        assert pooled[0, 0, 0].tolist() == pytest.approx([corner] * 4)
        assert pooled[0, 2, 3].tolist() == pytest.approx([1] * 4)


@torch.no_grad()
def test_position_aware_tables_fit_any_map():
    """As official up to as many tokens as the table has; a table of one value stays what it is."""
    mixer = build_mixer(("position_aware", {"num_heads": 2, "mask_size": (3, 4)}), 8)
    mixer.att_mask.fill_(0.3)
    assert mixer._factors(2, 3).shape == (2, 6, 6)
    larger = mixer._factors(5, 4)
    torch.testing.assert_close(larger, torch.full((2, 20, 20), 0.3))
    # A table of row distances, on a map of twice the height.
    rows = torch.arange(3.0).repeat_interleave(4)
    mixer.att_mask.copy_((rows[:, None] - rows).expand(2, -1, -1))
    larger = mixer._factors(6, 4).unflatten(1, (6, 4)).unflatten(3, (6, 4))
    assert larger[0, :, 1, 0, 2].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2]


def test_there_are_goldens_of_every_kind():
    assert {"_rvt_block", "_fan_block"} <= {_name(path)[3:13] for path in BLOCKS}
    assert MODELS and LOSSES
