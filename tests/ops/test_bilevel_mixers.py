"""Routing of bi-level routing attention, and its mixers against BiFormer's formulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import build_mixer, route

# --- routing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("extent", [None, (5, 4), (3, 7)])
def test_route(extent) -> None:
    """Region means without padding, their products, the best of them and their softmax."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 6, 8, 2, 3, dtype=torch.float64)
    height, width = extent or (6, 8)
    inside = torch.zeros(6, 8, dtype=torch.float64)
    inside[:height, :width] = 1
    query, key = (x * inside[..., None, None] for x in (query, key))
    table, weights = route(query, key, (3, 4), 5, scale=0.7, extent=extent)
    means = torch.zeros(2, 2, 12, 6, dtype=torch.float64)
    for region in range(12):
        i, j = divmod(region, 4)
        part = slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2)
        count = inside[part].sum().clamp(min=1)
        for which, x in enumerate((query, key)):
            means[which, :, region] = x[:, *part].flatten(3).sum((1, 2)) / count
    affinity = means[0] @ means[1].mT * 0.7
    best = affinity.sort(dim=-1, descending=True).values[..., :5]
    torch.testing.assert_close(affinity.gather(-1, table), best)
    torch.testing.assert_close(weights, best.softmax(-1))
    assert table.dtype == torch.int64


def test_route_refuses() -> None:
    x = torch.randn(1, 6, 8, 4)
    for n_win, topk, message in (
        (5, 1, r"query has shape \(1, 6, 8, 4\)"),
        (2, 5, "topk=5 must be between 1 and the 4"),
        (2, 0, "topk=0 must be"),
    ):
        with pytest.raises(ValueError, match=message):
            route(x, x, n_win, topk)


# --- mixers --------------------------------------------------------------------------------------


def official(mixer: Any, x: Tensor, pool: nn.Module | None) -> Tensor:
    """The formulation of BiFormer's code: padding, projection, gathered keys, one softmax."""
    batch, height, width, dim = x.shape
    n = mixer.n_win[0]
    x = F.pad(x, (0, 0, 0, -width % n, 0, -height % n))
    query, key, value = mixer.qkv(x).split([mixer.qk_dim, mixer.qk_dim, dim], -1)

    def windows(t: Tensor) -> Tensor:  # (B, regions, C, h, w)
        t = t.unflatten(2, (n, -1)).unflatten(1, (n, -1))
        return t.permute(0, 1, 3, 5, 2, 4).flatten(1, 2)

    q, k, v = map(windows, (query, key, value))
    q_mean, k_mean = q.mean((-2, -1)), k.mean((-2, -1))
    if not mixer.diff_routing:
        q_mean, k_mean = q_mean.detach(), k_mean.detach()
    if mixer.route_embed is not None:
        q_mean, k_mean = mixer.route_embed(q_mean), mixer.route_embed(k_mean)
    best, chosen = (q_mean * mixer.scale @ k_mean.mT).topk(mixer.topk)
    if pool is not None:
        k, v = (pool(t.flatten(0, 1)).unflatten(0, (batch, -1)) for t in (k, v))
    image = torch.arange(batch)[:, None, None]
    k, v = (t.flatten(3)[image, chosen] for t in (k, v))  # (B, regions, topk, C, tokens)
    if mixer.soft_routing:
        k, v = (t * best.softmax(-1)[..., None, None] for t in (k, v))
    q = q.flatten(3).unflatten(2, (mixer.num_heads, -1))  # (B, regions, heads, channels, tokens)
    k, v = (
        t.unflatten(3, (mixer.num_heads, -1)).permute(0, 1, 3, 4, 2, 5).flatten(-2) for t in (k, v)
    )
    weights = (q.mT @ k * mixer.scale).softmax(-1)
    output = (weights @ v.mT).mT.flatten(2, 3)  # (B, regions, C, tokens)
    output = output.unflatten(3, (x.shape[1] // n, -1)).unflatten(1, (n, n))
    output = output.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)
    if mixer.lepe is not None:
        output = output + mixer.lepe(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    output = output if mixer.proj is None else mixer.proj(output)
    return output[:, :height, :width]


@pytest.mark.parametrize(
    ("arguments", "pool"),
    [
        ({"topk": 2}, None),
        ({"topk": 3, "side_dwconv": 0, "param_attention": "qkv"}, None),
        ({"qk_dim": 8, "qk_scale": -0.3}, None),
        ({"soft_routing": True}, None),
        ({"soft_routing": True, "diff_routing": True}, None),
        ({"soft_routing": True, "diff_routing": True, "param_routing": True}, None),
        ({"kv_downsample_mode": "ada_avgpool", "kv_per_win": 2}, nn.AdaptiveAvgPool2d(2)),
        ({"kv_downsample_mode": "ada_maxpool", "kv_per_win": 3}, nn.AdaptiveMaxPool2d(3)),
        ({"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2}, nn.AvgPool2d(2)),
        ({"kv_downsample_mode": "maxpool", "kv_downsample_ratio": 2}, nn.MaxPool2d(2)),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_official_formulation(arguments, pool) -> None:
    """Output and all gradients, on a map that is padded: what no golden fixes."""
    torch.manual_seed(0)
    arguments = {"num_heads": 2, "n_win": 3, **arguments}
    mixer = build_mixer(("bilevel_routing", arguments), 16, dtype=torch.float64)
    x = torch.randn(2, 14, 10, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *mixer.parameters()]
    grad = torch.randn_like(x)
    expected, found = official(mixer, x, pool), mixer(x)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, leaves, grad, materialize_grads=True)
    for have, want in zip(torch.autograd.grad(found, leaves, grad), wanted):
        torch.testing.assert_close(have, want)
    if pool is not None:
        with pytest.raises(NotImplementedError, match="are no positions of the map"):
            mixer.attention_map(x, (0, 0))


def test_attention_map_lies_on_the_routed_regions() -> None:
    torch.manual_seed(0)
    mixer = build_mixer(("bilevel_routing", {"num_heads": 2, "n_win": 4, "topk": 3}), 16)
    x = torch.randn(1, 8, 12, 16)
    table = mixer.routing(x)
    assert table.shape == (1, 16, 3) and not table.requires_grad
    weights = mixer.attention_map(x, (5, 7))
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(1, 2))
    seen = weights[0].sum(0).unflatten(1, (4, 3)).unflatten(0, (4, 2)).sum((1, 3)).flatten()
    assert set(seen.nonzero().flatten().tolist()) == set(table[0, 2 * 4 + 2].tolist())


def test_nchw_grids_are_ragged_where_official_ones_are() -> None:
    mixer = build_mixer(("bilevel_routing_nchw", {"num_heads": 2, "n_win": 3, "topk": 4}), 16)
    assert mixer.grid(13, 11) == (4, 4) and mixer.grid(9, 6) == (3, 3)
    assert mixer.routing(torch.randn(2, 13, 11, 16)).shape == (2, 16, 4)
    # Regions of one token, on maps smaller than the grid.
    assert mixer.grid(2, 1) == (2, 1)
    small = mixer.routing(torch.randn(2, 2, 1, 16))
    assert torch.equal(small.sort(-1).values, torch.arange(2).expand(2, 2, 2))


@pytest.mark.parametrize("name", ["bilevel_routing", "bilevel_routing_nchw"])
def test_dropout_follows_the_projection(name) -> None:
    torch.manual_seed(0)
    mixer = build_mixer((name, {"num_heads": 2, "n_win": 2, "proj_drop": 0.5}), 16)
    x = torch.randn(1, 8, 8, 16)
    dropped, kept = mixer(x), mixer.eval()(x)
    is_zero = dropped == 0
    assert 0.3 < is_zero.float().mean() < 0.7
    torch.testing.assert_close(dropped[~is_zero], 2 * kept[~is_zero])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("bilevel_routing", {"n_win": 3, "topk": 2, "soft_routing": True}),
        ("attention_lepe", {}),
    ],
)
def test_export_for_any_size(name, arguments) -> None:
    torch.manual_seed(0)
    mixer = build_mixer((name, {"num_heads": 2, **arguments}), 16).eval()
    some = torch.export.Dim.AUTO
    program = torch.export.export(
        mixer, (torch.randn(2, 10, 13, 16),), dynamic_shapes=({1: some, 2: some},)
    )
    x = torch.randn(2, 17, 11, 16)
    torch.testing.assert_close(program.module()(x), mixer(x))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bilevel_routing", {"num_heads": 3}, "num_heads=3 must divide dim=16"),
        ("bilevel_routing", {"num_heads": 4, "qk_dim": 6}, "num_heads=4 must divide qk_dim=6"),
        ("bilevel_routing", {"n_win": 2, "topk": 5}, "topk=5 must be between 1 and the 4 regions"),
        ("bilevel_routing", {"n_win": 0}, "n_win=0 must be at least 1"),
        ("bilevel_routing", {"side_dwconv": 4}, "side_dwconv=4 must be odd"),
        ("bilevel_routing", {"diff_routing": True}, "diff_routing=True needs soft_routing"),
        (
            "bilevel_routing",
            {"soft_routing": True, "param_routing": True},
            "param_routing=True needs diff_routing",
        ),
        ("bilevel_routing", {"param_attention": "none"}, "param_attention='none' is unknown"),
        ("bilevel_routing", {"kv_downsample_mode": "conv"}, "kv_downsample_mode='conv' is unknown"),
        (
            "bilevel_routing",
            {"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 0},
            "kv_downsample_ratio=0 must be at least 1",
        ),
        ("bilevel_routing_nchw", {"topk": 0}, "topk=0 must be at least 1"),
        ("attention_lepe", {"lepe_on": "key"}, "lepe_on='key' is unknown"),
        ("attention_lepe", {"attn_drop": 0.1}, "attn_drop=0.1 is not supported"),
        ("attention_lepe", {"num_heads": 5}, "num_heads=5 must divide dim=16"),
    ],
)
def test_bad_constructor_arguments(name, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer((name, arguments), 16)
