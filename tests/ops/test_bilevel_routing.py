"""Bi-level routing attention: its definition on every backend, wrong calls, and its memory."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitarium.ops import bilevel_portable as portable
from vitarium.ops import bilevel_routing_attention

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
