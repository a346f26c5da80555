"""Bi-level routing attention: its definition, its routing, its memory, and its mixers."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitarium.ops import bilevel_portable as portable
from vitarium.ops import bilevel_routing_attention, build_mixer, route

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["reference", "torch"]


def region_of(y: int, x: int, size: tuple[int, int], grid: tuple[int, int]) -> int:
    return y // (size[0] // grid[0]) * grid[1] + x // (size[1] // grid[1])


def by_loops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routing: Tensor,
    grid: tuple[int, int],
    weights: Tensor | None = None,
    scale: float = 0.25,
) -> Tensor:
    """Every query by itself: the softmax over the tokens of the regions in its region's row."""
    batch, height, width, heads, _ = query.shape
    sizes = tuple(key.shape[1:3])
    group = heads // key.shape[-2]
    tokens: dict[int, list[tuple[int, int]]] = {}
    for y in range(sizes[0]):
        for x in range(sizes[1]):
            tokens.setdefault(region_of(y, x, sizes, grid), []).append((y, x))
    rows = []
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                row = region_of(y, x, (height, width), grid)
                for head in range(heads):
                    keys, values = [], []
                    for slot, region in enumerate(routing[b, row].tolist()):
                        factor = 1.0 if weights is None else weights[b, row, slot]
                        for i, j in tokens[region]:
                            keys.append(key[b, i, j, head // group] * factor)
                            values.append(value[b, i, j, head // group] * factor)
                    scores = torch.stack(keys) @ query[b, y, x, head] * scale
                    rows.append(scores.softmax(0) @ torch.stack(values))
    return torch.stack(rows).view(batch, height, width, heads, -1)


def draw(
    seed: int,
    batch: int,
    grid: tuple[int, int],
    tokens: tuple[int, int],
    tokens_kv: tuple[int, int],
    heads: tuple[int, int],
    dims: tuple[int, int],
    topk: int,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Query, key, value, routing (with repetitions) and weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    size = [n * t for n, t in zip(grid, tokens)]
    size_kv = [n * t for n, t in zip(grid, tokens_kv)]
    regions = grid[0] * grid[1]
    return [
        normal(batch, *size, heads[0], dims[0]),
        normal(batch, *size_kv, heads[1], dims[0]),
        normal(batch, *size_kv, heads[1], dims[1]),
        torch.randint(regions, (batch, regions, topk), generator=generator),
        torch.rand(batch, regions, topk, generator=generator).to(dtype),
    ]


@pytest.mark.skipif(INTERPRETED, reason="not about kernels")
@pytest.mark.parametrize("training", [False, True])
def test_small_maps_are_attended_to_as_a_whole(monkeypatch, training) -> None:
    query, key, value, routing, _ = draw(
        6, 2, (2, 3), (2, 3), (1, 2), (4, 2), (8, 8), 3, torch.float32
    )
    leaves = [t.requires_grad_(training) for t in (query, key, value)]

    def run() -> list[Tensor]:
        output = bilevel_routing_attention(*leaves, routing, (2, 3))
        grads = torch.autograd.grad(output.square().sum(), leaves) if training else ()
        return [output, *grads]

    assert portable.pays_dense(query, key, None, routing, [2, 3])
    assert not portable.pays_dense(query, key, None, routing[..., :1], [2, 3])
    found = run()
    monkeypatch.setattr(portable, "DENSE_TOKENS", 0)
    for have, want in zip(found, run()):
        torch.testing.assert_close(have, want)


@settings(max_examples=1 if INTERPRETED else 15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 2),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    tokens=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    tokens_kv=st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3)),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2)]),
    dims=st.sampled_from([(4, 4), (3, 5)]),
    topk=st.integers(1, 5),
    soft=st.booleans(),
    small=st.booleans(),
)
def test_any_geometry_and_table(
    seed, batch, grid, tokens, tokens_kv, heads, dims, topk, soft, small
) -> None:
    dtype = torch.float32 if INTERPRETED else torch.float64
    query, key, value, routing, weights = draw(
        seed, batch, grid, tokens, tokens_kv or tokens, heads, dims, topk, dtype
    )
    weights = weights if soft else None
    leaves = [t for t in (query, key, value, weights) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    expected = by_loops(query, key, value, routing, grid, weights)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    with pytest.MonkeyPatch.context() as patch:
        if small:  # one image and one row at a time
            patch.setattr(portable, "UNIT", 1)
            patch.setattr(portable, "SCORES", 1)
        for name in BACKENDS:
            output = bilevel_routing_attention(
                query, key, value, routing, grid, weights=weights, scale=0.25, backend=name
            )
            torch.testing.assert_close(output, expected)
            for found, want in zip(torch.autograd.grad(output, leaves, grad), expected_grads):
                torch.testing.assert_close(found, want)


@pytest.mark.skipif(INTERPRETED, reason="not about kernels")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_regions_are_taken_in_bands_of_queries(monkeypatch, dtype) -> None:
    query, key, value, routing, weights = draw(
        0, 2, (2, 1), (9, 8), (9, 8), (4, 2), (8, 8), 3, dtype
    )
    leaves = [query, key, value, weights]
    for leaf in leaves:
        leaf.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        output = bilevel_routing_attention(query, key, value, routing, (2, 1), weights=weights)
        return output, *torch.autograd.grad(output.square().sum(), leaves)

    whole = run()
    monkeypatch.setattr(portable, "SCORES", 1)
    plan = portable.Plan(query, key, value, routing, [2, 1])
    assert len(plan.bands) == 5 and plan.chunk == 1  # 144 queries of two heads in bands of 32
    tolerance = {"rtol": 0.1, "atol": 0.05} if dtype == torch.bfloat16 else {}
    for banded, expected in zip(run(), whole):
        torch.testing.assert_close(banded, expected, **tolerance)


@pytest.mark.skipif(INTERPRETED, reason="not about kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shift", "serve"), [(20.0, True), (-20.0, True), (80.0, False), (-500.0, False)]
)
def test_scores_of_any_size(monkeypatch, dtype, shift, serve) -> None:
    """A common term of all scores changes nothing, however large."""
    query, key, value, routing, _ = draw(
        5, 1, (2, 2), (2, 3), (2, 3), (2, 2), (8, 8), 3, torch.float64
    )
    query[..., 0], key[..., 0] = shift, 1.0  # the scores are shift + the others' product
    query, key, value = (t.to(dtype) for t in (query, key, value))
    monkeypatch.setattr(portable, "DENSE_TOKENS", 0)
    plans: list[portable.Plan] = []
    made = portable.Plan.__init__
    monkeypatch.setattr(
        portable.Plan, "__init__", lambda plan, *args: (made(plan, *args), plans.append(plan))[0]
    )
    results = []
    for name, wide in (("torch", dtype), ("reference", torch.float64), ("reference", dtype)):
        leaves = [t.detach().to(wide).requires_grad_() for t in (query, key, value)]
        output = bilevel_routing_attention(*leaves, routing, 2, scale=1.0, backend=name)
        grads = torch.autograd.grad(output.square().sum(), leaves)
        results.append([t.double() for t in (output, *grads)])
    assert plans[0].powers_serve == serve
    for found, exact, plain in zip(*results):
        allowed = 4 * (plain - exact).abs().max().item() + 1e-6
        assert (found - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("name", BACKENDS)
def test_a_repeated_region_counts_as_often_as_it_is_there(name) -> None:
    query, key, value, *_ = draw(1, 1, (1, 2), (2, 2), (2, 2), (1, 1), (16, 16), 1, torch.float32)
    table = torch.tensor([[[0, 0, 1], [1, 1, 1]]])
    output = bilevel_routing_attention(query, key, value, table, (1, 2), scale=1.0, backend=name)
    q_left, (k_left, k_right) = query[:, :, :2], key.split(2, 2)
    scores = torch.einsum("byxhd,bijhd->byxij", q_left, k_left)
    other = torch.einsum("byxhd,bijhd->byxij", q_left, k_right)
    both = torch.cat([scores.flatten(3) + math.log(2), other.flatten(3)], -1).softmax(-1)
    values = torch.cat([half.flatten(1, 2) for half in value.split(2, 2)], 1)
    expected = torch.einsum("byxn,bnhd->byxhd", both, values)
    torch.testing.assert_close(output[:, :, :2], expected)
    single = bilevel_routing_attention(
        query, key, value, table[..., -1:], (1, 2), scale=1.0, backend=name
    )
    torch.testing.assert_close(output[:, :, 2:], single[:, :, 2:])


@pytest.mark.skipif(not INTERPRETED, reason="about kernels: the generated suite tests the others")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_in_half_precision_on_views(dtype) -> None:
    tensors = draw(3, 1, (1, 2), (2, 3), (2, 3), (2, 2), (16, 48), 2, dtype)
    query, key, value, routing, weights = (
        torch.cat([t, t], -1)[..., : t.shape[-1]] if t.is_floating_point() else t for t in tensors
    )
    results = []
    for name, wide in (("triton", dtype), ("reference", torch.float64)):
        leaves = [t.detach().to(wide).requires_grad_() for t in (query, key, value, weights)]
        output = bilevel_routing_attention(
            *leaves[:3], routing, (1, 2), weights=leaves[3], backend=name
        )
        grads = torch.autograd.grad(output.square().sum(), leaves)
        results.append([t.double() for t in (output, *grads)])
    for found, expected in zip(*results):
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=scale * 2**-6)


@pytest.mark.skipif(not INTERPRETED, reason="about kernels")
def test_large_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets of 64 bits change nothing where 32 suffice."""
    from vitarium.ops.kernels import bilevel_routing as kernels
    from vitarium.ops.kernels import rows

    query, key, value, routing, weights = draw(
        4, 1, (1, 2), (2, 3), (2, 3), (1, 1), (16, 16), 2, torch.float32
    )

    def run() -> tuple[Tensor, ...]:
        args = (query, key, value, weights, routing)
        output, logsumexp = kernels.forward(*args, [1, 2], 0.3)
        return output, *kernels.backward(output, *args, output, logsumexp, [1, 2], 0.3, True)[:4]

    expected = run()
    monkeypatch.setattr(rows, "LARGEST_OFFSET", 0)
    for found, want in zip(run(), expected):
        assert torch.equal(found, want)


@pytest.mark.parametrize("entry", [-1, 4, 1 << 40])
def test_entries_out_of_range(entry) -> None:
    query, key, value, routing, _ = draw(
        2, 1, (2, 2), (2, 2), (2, 2), (1, 1), (16, 16), 2, torch.float32
    )
    nearest = routing.clone()
    routing[0, 1, 1], nearest[0, 1, 1] = entry, min(max(entry, 0), 3)
    if INTERPRETED:  # the kernels cannot raise: they stay within the map
        results = []
        for table in (routing, nearest):
            leaves = [t.clone().requires_grad_() for t in (query, key, value)]
            output = bilevel_routing_attention(*leaves, table, 2, backend="triton")
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        for found, expected in zip(*results):
            torch.testing.assert_close(found, expected)
        return
    for name in BACKENDS:
        with pytest.raises(ValueError, match=r"routing has entries from .* allowed are 0 to 3"):
            bilevel_routing_attention(query, key, value, routing, 2, backend=name)


@pytest.mark.skipif(INTERPRETED, reason="not about kernels")
def test_bad_arguments() -> None:
    query, key, value, routing, weights = draw(
        0, 2, (2, 2), (2, 3), (2, 3), (2, 2), (4, 4), 2, torch.float32
    )

    def call(**kwargs: Any) -> Tensor:
        arguments: dict[str, Any] = dict(
            query=query, key=key, value=value, routing=routing, n_win=2, weights=weights
        )
        return bilevel_routing_attention(**{**arguments, **kwargs})

    for kwargs, error, message in (
        ({"n_win": 3}, ValueError, r"n_win=\(3, 3\) does not divide the map .* of query along H"),
        ({"n_win": (1, 2, 2)}, ValueError, "n_win=.* has 3 entries"),
        ({"n_win": 2.0}, TypeError, "n_win=2.0 must hold int"),
        ({"query": query[0]}, ValueError, "query has shape"),
        ({"key": key[:1]}, ValueError, "key has batch size 1"),
        ({"key": key[..., :3]}, ValueError, "key has head_dim 3, query 4"),
        ({"value": value[:, :2]}, ValueError, r"value has shape \(2, 2, 6, 2, 4\), key"),
        ({"query": query[..., :1, :]}, ValueError, "key has 2 heads, which do not divide"),
        ({"routing": routing[:, :3]}, ValueError, r"routing has shape .* allowed is \(2, 4, topk"),
        ({"routing": routing[..., :0]}, ValueError, "routing has shape"),
        ({"routing": routing.float()}, TypeError, "routing must be int32 or int64"),
        ({"routing": routing.tolist()}, TypeError, "routing must be a tensor, got list"),
        ({"weights": weights[..., :1]}, ValueError, "weights has shape"),
        ({"weights": routing}, TypeError, "weights must be floating-point"),
        ({"weights": 0.5}, TypeError, "weights must be a tensor or None"),
        ({"scale": math.inf}, ValueError, "scale=inf must be finite"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"key": key.double()}, TypeError, "key has dtype"),
        ({"routing": routing.to("meta")}, ValueError, "routing is on meta, query on cpu"),
    ):
        with pytest.raises(error, match=message):
            call(**kwargs)
    torch.testing.assert_close(call(routing=routing.int()), call())


# --- memory --------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Counts the bytes of new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        known |= {t.untyped_storage().data_ptr() for t in (kwargs or {}).values()
                  if isinstance(t, Tensor)}  # fmt: skip
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known:
            size = result.untyped_storage().nbytes()
            self.total += size
            self.largest = max(self.largest, size)
        return result


@pytest.mark.skipif(INTERPRETED, reason="not about kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_topk(dtype) -> None:
    """A 154 x 126 map, forward and backward: no buffer much larger than the map itself."""
    found = {}
    for topk in (1, 6):
        query, key, value, routing, _ = draw(
            0, 1, (7, 7), (22, 18), (22, 18), (1, 1), (8, 8), topk, dtype
        )
        portable.forward(query, key, value, None, routing, [7, 7], 0.3, True)  # fills caches
        with Allocations() as counted:
            args = (query, key, value, None, routing)
            output, saved = portable.forward(*args, [7, 7], 0.3, True)
            portable.backward(output, *args, output, saved, [7, 7], 0.3, True, False)
        assert saved.numel() == query[..., 0].numel()  # one number for every query
        found[topk] = counted
    a_map = query.numel() * 4
    assert found[6].largest <= max(a_map, portable.SCORES * 2)
    gathered = 2 * 6 * query.numel() * query.element_size()
    assert found[6].total - found[1].total < gathered / 2


# --- routing -------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="not about kernels")
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


@pytest.mark.skipif(INTERPRETED, reason="not about kernels")
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


@pytest.mark.skipif(INTERPRETED, reason="not about kernels")
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


@pytest.mark.skipif(INTERPRETED, reason="not about kernels")
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


@pytest.mark.skipif(INTERPRETED, reason="not about kernels")
def test_nchw_grids_are_ragged_where_official_ones_are() -> None:
    mixer = build_mixer(("bilevel_routing_nchw", {"num_heads": 2, "n_win": 3, "topk": 4}), 16)
    assert mixer.grid(13, 11) == (4, 4) and mixer.grid(9, 6) == (3, 3)
    assert mixer.routing(torch.randn(2, 13, 11, 16)).shape == (2, 16, 4)
    # Regions of one token, on maps smaller than the grid.
    assert mixer.grid(2, 1) == (2, 1)
    small = mixer.routing(torch.randn(2, 2, 1, 16))
    assert torch.equal(small.sort(-1).values, torch.arange(2).expand(2, 2, 2))


@pytest.mark.skipif(INTERPRETED, reason="not about kernels")
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


@pytest.mark.skipif(INTERPRETED, reason="not about kernels")
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
