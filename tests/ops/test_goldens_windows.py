"""Attention of CrossFormer and HAT within their blocks gives the outputs of the official blocks.

The blocks around the mixers are written here, with the official names of their parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from vitarium.ops import (
    DynamicPositionBias,
    LongShortDistanceAttention,
    OverlappingCrossAttention,
    WindowAttention,
    backend,
)

FOLDER = Path(__file__).parents[1] / "data" / "parity" / "ops"
GOLDENS = sorted(
    path
    for pattern in ("crossformer_*", "dynamic_position_bias*", "hat_*")
    for path in FOLDER.glob(f"{pattern}.json.xz")
)

# Arguments of the official CrossFormer block that are the attention's.
ATTENTION = ("num_heads", "group_size", "interval", "lsda_flag", "qkv_bias", "qk_scale",
             "pad_type", "no_mask", "adaptive_interval")  # fmt: skip


def _pick(arguments: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: arguments[name] for name in names if name in arguments}


class CrossFormerBlock(nn.Module):
    """The block of CrossFormer, and of CrossFormer++ with its cooling layer (`ex_conv`)."""

    def __init__(self, dim: int, input_resolution: tuple[int, int], **arguments: Any) -> None:
        super().__init__()
        self.size = input_resolution
        self.norm1 = nn.LayerNorm(dim)
        use_cpe = arguments.get("use_cpe", False)
        self.attn = LongShortDistanceAttention(
            dim, position_bias=not use_cpe, **_pick(arguments, ATTENTION)
        )
        height = input_resolution[0]
        self.cpe = nn.Conv2d(height, height, 3, padding=1, groups=height) if use_cpe else None
        self.norm_cpe = nn.LayerNorm(dim) if use_cpe else None
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * arguments.get("mlp_ratio", 4.0)))
        cooling = arguments.get("use_extra_conv", True)
        self.ex_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if cooling else None
        self.ex_ln = nn.LayerNorm(dim) if cooling else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, self.size)
        normed = self.norm1(x)
        if self.cpe is not None and self.norm_cpe is not None:
            normed = normed + self.norm_cpe(self.cpe(normed))
        x = x + self.attn(normed)
        x = x + self.mlp(self.norm2(x))
        if self.ex_conv is not None and self.ex_ln is not None:
            x = self.ex_ln(self.ex_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x.flatten(1, 2)


class ChannelAttention(nn.Module):
    """Squeeze and excitation, in HAT's convolutional branch."""

    def __init__(self, dim: int, squeeze_factor: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(dim, dim // squeeze_factor, 1),
            nn.ReLU(),
            nn.Conv2d(dim // squeeze_factor, dim, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.attention(x)


class HybridAttentionBlock(nn.Module):
    """HAT's block of window attention beside a convolutional branch."""

    def __init__(self, dim: int, input_resolution: tuple[int, int], **arguments: Any) -> None:
        super().__init__()
        self.size = input_resolution
        self.conv_scale = arguments.get("conv_scale", 0.01)
        window_size, shift_size = arguments.get("window_size", 7), arguments.get("shift_size", 0)
        if min(input_resolution) <= window_size:
            window_size, shift_size = min(input_resolution), 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(
            dim,
            window_size=window_size,
            shift_size=shift_size,
            **_pick(arguments, ("num_heads", "qkv_bias", "qk_scale")),
        )
        hidden = dim // arguments.get("compress_ratio", 3)
        self.conv_block = nn.ModuleDict(
            {
                "cab": nn.Sequential(
                    nn.Conv2d(dim, hidden, 3, padding=1),
                    nn.GELU(),
                    nn.Conv2d(hidden, dim, 3, padding=1),
                    ChannelAttention(dim, arguments.get("squeeze_factor", 30)),
                )
            }
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * arguments.get("mlp_ratio", 4.0)))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, self.size)
        normed = self.norm1(x)
        convolved = self.conv_block["cab"](normed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.attn(normed) + self.conv_scale * convolved
        return (x + self.mlp(self.norm2(x))).flatten(1, 2)


class OverlappingCrossAttentionBlock(nn.Module):
    """HAT's block of overlapping cross attention, whose attention has no name of its own."""

    def __init__(self, dim: int, input_resolution: tuple[int, int], **arguments: Any) -> None:
        super().__init__()
        self.size = input_resolution
        self.norm1 = nn.LayerNorm(dim)
        names = ("num_heads", "window_size", "overlap_ratio", "qkv_bias", "qk_scale")
        self.attn = OverlappingCrossAttention(dim, **_pick(arguments, names))
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * arguments.get("mlp_ratio", 2)))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, self.size)
        x = x + self.attn(self.norm1(x))
        return (x + self.mlp(self.norm2(x))).flatten(1, 2)


class OneGroup(nn.Module):
    """CrossFormer's attention of tokens that are one group."""

    def __init__(self, dim: int, group_size: list[int], **arguments: Any) -> None:
        super().__init__()
        self.size = group_size
        self.attn = LongShortDistanceAttention(dim, group_size=tuple(group_size), **arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x.unflatten(1, self.size)).flatten(1, 2)


# By the beginning of the golden's "op": our module, and the parameters that an official name
# belongs to, before it.
MODULES: dict[str, tuple[Any, str | None]] = {
    "CrossFormerBlock": (CrossFormerBlock, None),
    "Attention with dynamic position bias": (OneGroup, r".*"),
    "DynamicPosBias": (DynamicPositionBias, None),
    "HAB": (HybridAttentionBlock, None),
    "OCAB": (OverlappingCrossAttentionBlock, r"(qkv|proj|relative_position).*"),
}


def _module(golden: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    (kind,) = (entry for op, entry in MODULES.items() if golden["op"].startswith(op))
    build, inner = kind
    arguments = {
        name: value
        for name, value in golden["constructor"].items()
        if name not in ("attention_dim", "norm_layer")
    }
    module = build(**arguments).double().eval()
    if inner:
        state = {f"attn.{k}" if re.fullmatch(inner, k) else k: v for k, v in state.items()}
    module.load_state_dict(state, strict=True)
    return module


def _input(golden: dict[str, Any]) -> Tensor:
    """The tensor that the golden describes: normal numbers by seed, or all relative offsets."""
    entry = golden["inputs"][0] if "inputs" in golden else {"seed": 0, **golden["input"]["x"]}
    if "seed" in entry:
        generator = np.random.Generator(np.random.PCG64(entry["seed"]))
        return torch.from_numpy(generator.standard_normal(entry["shape"]) * entry.get("scale", 1))
    ranges = [map(int, part) for part in re.findall(r"(-?\d+)\.\.(-?\d+)", entry["rule"])]
    axes = [torch.arange(first, last + 1) for first, last in ranges] * (3 - len(ranges))
    return torch.cartesian_prod(*axes).double()


def _expected(golden: dict[str, Any]) -> Iterator[tuple[Tensor, slice]]:
    """Numbers of the flattened output, and where they stand."""
    for name in ("data", "values", "first"):
        if name in golden["output"]:
            numbers = torch.tensor(golden["output"][name], dtype=torch.float64)
            yield numbers, slice(len(numbers))


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name.split(".")[0])
@torch.no_grad()
def test_official_weights_give_official_outputs(path, implementation, parity):
    """In float64, to the ten digits that the golden holds."""
    golden = parity.load(path)
    module = _module(golden, parity.state_dict(golden["state_dict"]))
    with backend(implementation):
        output = module(_input(golden))
    assert list(output.shape) == golden["output"]["shape"]
    bound = 1e-9 * output.abs().max().item()
    compared = 0
    for numbers, where in _expected(golden):
        torch.testing.assert_close(output.flatten()[where], numbers, rtol=1e-9, atol=bound)
        compared += 1
    assert compared
    correction = int("data" in golden["output"])  # goldens of HAT hold the sample's deviation
    for name, value in (("mean", output.mean()), ("std", output.std(correction=correction))):
        assert value.item() == pytest.approx(golden["output"][name], rel=1e-8, abs=bound), name


def test_goldens_are_there() -> None:
    assert len(GOLDENS) >= 9


def _official_block(x: Tensor, attn: LongShortDistanceAttention, **arguments: Any) -> Tensor:
    """CrossFormer's grouping spelled out: pad, group by reshaping, attend with a mask, undo."""
    batch, height, width, dim = x.shape
    group, interval = arguments["group_size"], arguments.get("interval", 8)
    long = arguments.get("lsda_flag", 0)
    if min(height, width) <= group:
        group, long = min(height, width), 0
    if arguments.get("adaptive_interval"):
        interval = -(-height // group)
    interval = interval if long else 1
    lack = [-length % (group * interval) for length in (height, width)]
    first = [n // 2 if arguments.get("pad_type") else 0 for n in lack]
    padding = (first[1], lack[1] - first[1], first[0], lack[0] - first[0])
    heads = attn.num_heads
    qkv = F.linear(F.pad(x, (0, 0, *padding)), attn.qkv.weight, attn.qkv.bias)
    inside = F.pad(torch.ones(height, width, dtype=torch.bool), padding)
    rows, columns = (n // (group * interval) for n in inside.shape)

    def grouped(t: Tensor) -> Tensor:
        t = t.reshape(-1, rows, group, interval, columns, group, interval, t.shape[-1])
        return t.permute(0, 1, 4, 3, 6, 2, 5, 7).flatten(5, 6).flatten(1, 4)

    query, key, value = grouped(qkv).unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
    scores = query @ key.mT * attn.scale
    if attn.pos is not None:
        place = torch.cartesian_prod(torch.arange(group), torch.arange(group)).double()
        scores = scores + attn.pos(place[:, None] - place).permute(2, 0, 1)
    if not arguments.get("no_mask"):
        scores = scores + -1e6 * ~grouped(inside[None, ..., None]).squeeze(-1)[:, :, None, None]
    output = (scores.softmax(-1) @ value).transpose(2, 3).flatten(-2)
    output = output.unflatten(1, (rows, columns, interval, interval))
    output = output.unflatten(5, (group, group)).permute(0, 1, 5, 3, 2, 6, 4, 7)
    output = output.reshape(batch, *inside.shape, dim)
    output = output[:, first[0] : first[0] + height, first[1] : first[1] + width]
    return attn.proj(output)


@pytest.mark.parametrize("size", [(10, 13), (14, 14), (7, 23), (3, 8), (24, 12), (1, 1)], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        {"group_size": 4},
        {"group_size": 4, "pad_type": 1},
        {"group_size": 4, "no_mask": True, "pad_type": 1},
        {"group_size": 3, "interval": 2, "lsda_flag": 1},
        {"group_size": 3, "interval": 3, "lsda_flag": 1, "pad_type": 1},
        {"group_size": 2, "interval": 4, "lsda_flag": 1, "pad_type": 1, "qk_scale": 0.7},
        {"group_size": 3, "interval": 3, "lsda_flag": 1, "pad_type": 1, "no_mask": True},
        {"group_size": 4, "lsda_flag": 1, "adaptive_interval": True, "qkv_bias": False},
        {"group_size": 4, "lsda_flag": 1, "interval": 2, "position_bias": False},
        {"group_size": 5, "lsda_flag": 1, "interval": 1, "residual": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_crossformer_grouping(arguments: dict[str, Any], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    mixer = LongShortDistanceAttention(32, num_heads=2, **arguments, dtype=torch.float64)
    for parameter in mixer.parameters():
        parameter.normal_(std=0.4)
    x = torch.randn(2, *size, 32, dtype=torch.float64)
    expected = _official_block(x, mixer, **arguments)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-9)
