"""Dense attention: both ways of its portable path, what it hides, and random geometry."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vitarium.ops import (
    OPERATORS,
    attention,
    backend,
    dense,
    dense_chunks,
    mixture_of_head_attention,
)
from vitarium.ops.dispatch import TRITON_INTERPRET, Case, Operator

MODULE = importlib.import_module("vitarium.ops.attention")
BACKENDS = ["torch", *(["triton"] if TRITON_INTERPRET else [])]
CALLS = [
    pytest.param(OPERATORS[name], case, id=f"{name}-{case.note}")
    for name in ("attention", "mixture_of_head_attention")
    for case in OPERATORS[name].cases
]


def _run(function: Any, tensors: dict[str, Tensor], **kwargs: Any) -> list[Tensor]:
    """The output, and the gradients for a fixed gradient of it."""
    leaves = {
        name: tensor.detach().clone().requires_grad_(tensor.is_floating_point())
        for name, tensor in tensors.items()
    }
    output = function(**leaves, **kwargs)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator).to(output))
    return [output.detach(), *(leaf.grad for leaf in leaves.values() if leaf.requires_grad)]


@contextlib.contextmanager
def nothing_is_small() -> Iterator[None]:
    """Nothing is too small for the custom operator, for packing and for several bands."""
    with (
        mock.patch.object(MODULE, "SMALL", (0, 0)),
        mock.patch.object(MODULE, "SMALL_INFERENCE", 0),
        mock.patch.object(dense, "PACKING_PAYS", 0),
        mock.patch.object(dense_chunks, "ROWS", 4),
        mock.patch.object(dense_chunks, "CPU_SCORES", (150, 150)),
    ):
        yield


@pytest.fixture
def chunked() -> Iterator[None]:
    with nothing_is_small():
        yield


@pytest.mark.skipif(TRITON_INTERPRET, reason="not about kernels")
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("kept", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("operator", "case"), CALLS)
def test_portable_path_in_chunks(
    operator: Operator,
    case: Case,
    dtype: torch.dtype,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not kept:
        monkeypatch.setattr(dense, "WEIGHTS_KEPT", 0)
        monkeypatch.setattr(dense, "WEIGHTS_KEPT_BYTES", 0)
    drawn = case.draw(torch.Generator().manual_seed(0))
    tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in drawn.items()}
    wide = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
    found = _run(operator.function, tensors, backend="torch", **case.kwargs)
    plain = _run(operator.function, tensors, backend="reference", **case.kwargs)
    exact = _run(operator.function, wide, backend="reference", **case.kwargs)
    for ours, theirs, want in zip(found, plain, exact, strict=True):
        if want.numel():
            error = (ours.double() - want).abs().max().item()
            allowed = 2 * (theirs.double() - want).abs().max().item()
            rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
            assert error <= allowed + rounding * (1 + want.abs().max().item())


@pytest.mark.skipif(TRITON_INTERPRET, reason="not about kernels")
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("bias", [None, (2, 19, 19)], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_custom_operator(bias: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    """Schema, fake kernel and derivative, where calls this small would not reach it."""
    query, key, value = (
        torch.randn(2, 19, 2, 8, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    added = None if bias is None else torch.randn(bias, dtype=dtype, requires_grad=True)
    active = torch.rand(2, 19, 2) < 0.5
    gate = torch.randn(2, 19, 2, dtype=dtype, requires_grad=True)
    for training in (False, True):
        torch.library.opcheck(
            torch.ops.vitarium.attention.default,
            (query, key, value, added, False, 0.3, training, False),
        )
        torch.library.opcheck(
            torch.ops.vitarium.mixture_of_head_attention.default,
            (query, key, value, added, gate, active, False, 0.3, training, False),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.skipif(TRITON_INTERPRET, reason="not about kernels")
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [20.0, -20.0, 80.0, -500.0])
def test_scores_of_any_size(shift: float, dtype: torch.dtype) -> None:
    """A common term of all scores changes nothing, however large."""
    torch.manual_seed(0)
    query, key, value, bias = torch.randn(4, 2, 21, 2, 24).unbind()
    query[..., 0], key[..., 0] = shift, 1.0
    tensors = {"query": query[..., :16], "key": key[..., :16], "value": value}
    results = []
    for wide, name in ((dtype, "torch"), (dtype, "reference"), (torch.float64, "reference")):
        given = {k: t.to(dtype).to(wide) for k, t in tensors.items()}
        added = bias[0, :, 0, :21].expand(2, 21, 21).to(dtype).to(wide)
        results.append(_run(attention, {**given, "bias": added}, scale=1.0, backend=name))
    for ours, plain, exact in zip(*results, strict=True):
        assert ours.isfinite().all()
        error, allowed = ((t.double() - exact).abs().max().item() for t in (ours, plain))
        assert error <= 2 * allowed + 1e-5 * exact.abs().max().item()


@pytest.mark.skipif(TRITON_INTERPRET, reason="not about kernels")
def test_calls_of_every_size_agree_with_float64() -> None:
    """On each side of every limit of the portable path, as it is shipped."""
    for batch, tokens, heads, width, value_width, dtype in (
        (1, 300, 2, 8, 8, torch.float32),  # the fused attention of PyTorch
        (1, 530, 4, 8, 16, torch.float32),  # more scores than are small
        (1, 1100, 1, 8, 8, torch.bfloat16),
        (1, 1100, 4, 8, 8, torch.bfloat16),
    ):
        shapes = {"query": width, "key": width, "value": value_width}
        tensors = {
            name: torch.randn(batch, tokens, heads, size).to(dtype) for name, size in shapes.items()
        }
        tensors["bias"] = torch.randn(1, heads, tokens, tokens).to(dtype)
        found = _run(attention, tensors)
        exact = _run(attention, {k: t.double() for k, t in tensors.items()}, backend="reference")
        tolerance = 2e-6 if dtype == torch.float32 else 3e-2
        for ours, want in zip(found, exact, strict=True):
            error = (ours.double() - want).norm() / want.norm()
            assert error < tolerance, (tokens, dtype, error)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("width", [4, 6], ids=["equal widths", "unequal widths"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_queries_that_see_no_key(name: str, is_causal: bool, width: int, learned: bool) -> None:
    """Output 0 and no gradient, neither from it nor a NaN; the others as if nothing was."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 5, 2, 4)
    value = torch.randn(2, 5, 2, width)
    bias = torch.randn(2, 5, 5)
    bias[0, 2] = bias[1, 0] = -torch.inf
    bias[1, 4, :2] = -torch.inf
    bias[0, 1, 0:2] = -torch.inf  # with a causal mask, no key is left
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    leaves.append(bias.clone().requires_grad_(learned))
    output = attention(*leaves[:3], bias=leaves[3], is_causal=is_causal, backend=name)
    hidden = [(2, 0), (0, 1), *([(1, 0)] if is_causal else [])]
    for token, head in hidden:
        assert not output[:, token, head].any()
    assert (output.abs().sum(-1) > 0).sum() == 20 - 2 * len(hidden)
    output.square().sum().backward()
    for leaf in leaves[:3] + leaves[3:] * learned:
        assert leaf.grad.isfinite().all()
    for token, head in hidden:
        assert not leaves[0].grad[:, token, head].any()
        assert not learned or not leaves[3].grad[head, token].any()


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_no_keys(name: str) -> None:
    tensors = {"query": torch.randn(2, 3, 2, 4)}
    tensors |= dict.fromkeys(("key", "value"), torch.randn(2, 0, 2, 4))
    output, *grads = _run(attention, tensors, backend=name)
    assert output.shape == (2, 3, 2, 4) and not output.any()
    assert not any(grad.any() for grad in grads)


def test_agrees_with_scaled_dot_product_attention() -> None:
    query, key, value = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    bias = torch.randn(4, 9, 9, dtype=torch.float64)
    for kwargs in ({}, {"attn_mask": bias}, {"is_causal": True}, {"scale": -0.2}):
        ours = {"bias" if k == "attn_mask" else k: v for k, v in kwargs.items()}
        found = attention(*(t.transpose(1, 2) for t in (query, key, value)), **ours)
        want = F.scaled_dot_product_attention(query, key, value, **kwargs).transpose(1, 2)
        torch.testing.assert_close(found, want)


BIAS = st.sampled_from([None, (1,), (0,), (1, 1), (0, 1), (1, 0), (0, 0)])  # 1: broadcast


@settings(max_examples=6 if TRITON_INTERPRET else 40, deadline=None, derandomize=True)
@given(
    queries=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    keys=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    batch=st.integers(1, 2),
    group=st.integers(1, 3),
    heads_kv=st.integers(1, 2),
    widths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    bias=BIAS,
    is_causal=st.booleans(),
    share=st.sampled_from([None, 0.0, 0.4, 1.0]),
)
def test_random_geometry(
    queries: list[int],
    keys: list[int],
    batch: int,
    group: int,
    heads_kv: int,
    widths: tuple[int, int],
    bias: tuple[int, ...] | None,
    is_causal: bool,
    share: float | None,
) -> None:
    heads = group * heads_kv
    dtype = torch.float32 if TRITON_INTERPRET else torch.float64
    tensors = {
        "query": torch.randn(batch, *queries, heads, widths[0], dtype=dtype),
        "key": torch.randn(batch, *keys, heads_kv, widths[0], dtype=dtype),
        "value": torch.randn(batch, *keys, heads_kv, widths[1], dtype=dtype),
    }
    if bias is not None:
        sizes = (batch, heads)[-len(bias) :]
        shape = [1 if broadcast else size for broadcast, size in zip(bias, sizes)]
        tokens = [torch.Size(size).numel() for size in (queries, keys)]
        tensors["bias"] = torch.randn(*shape, *tokens, dtype=dtype)
    function = attention
    if share is not None:
        function = mixture_of_head_attention
        tensors["gate"] = torch.randn(batch, *queries, heads, dtype=dtype)
        tensors["active"] = torch.rand(batch, *queries, heads) < share
    with nothing_is_small():
        found = _run(function, tensors, is_causal=is_causal, backend=BACKENDS[-1])
    want = _run(function, tensors, is_causal=is_causal, backend="reference")
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(TRITON_INTERPRET, reason="not about kernels")
@pytest.mark.parametrize(
    ("dtype", "width", "bias", "grad", "expected"),
    [
        (torch.bfloat16, 32, False, False, "torch"),
        (torch.bfloat16, 32, False, True, "triton"),
        (torch.bfloat16, 32, True, False, "triton"),
        (torch.bfloat16, 16, False, False, "triton"),
        (torch.float32, 32, False, False, "triton"),
        (torch.float64, 32, False, False, "torch"),
    ],
)
def test_choice_on_a_gpu(
    dtype: torch.dtype,
    width: int,
    bias: bool,
    grad: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernels, but for what PyTorch's own kernels are made for; on tensors without data."""
    monkeypatch.setattr("vitarium.ops.dispatch.TRITON_INSTALLED", True)
    ran = []
    implementations = OPERATORS["attention"].implementations
    for name in ("torch", "triton"):
        changed = dataclasses.replace(
            implementations[name], run=lambda query, *_, name=name: ran.append(name) or query
        )
        monkeypatch.setitem(implementations, name, changed)
    with FakeTensorMode():
        query, value = (
            torch.empty(2, 9, 2, size, device="cuda", dtype=dtype).requires_grad_(grad)
            for size in (32, width)
        )
        added = torch.empty(2, 9, 9, device="cuda", dtype=dtype) if bias else None
        attention(query, query, value, bias=added)
    assert ran == [expected]


def test_bad_calls() -> None:
    query, key, value = torch.randn(3, 2, 5, 4, 8)
    for change, message in (
        ({"query": query[0]}, "query has shape"),
        ({"key": key[..., :7]}, "key has head_dim 7, query 8"),
        ({"key": key[:, :, :3], "value": value[:, :, :3]}, "key has 3 heads"),
        ({"value": value[:, :4]}, "value has shape"),
        ({"key": key[:1], "value": value[:1]}, "key has batch size 1, query 2"),
        ({"value": value[..., :0]}, "value has head_dim 0"),
        ({"bias": torch.randn(4, 5, 4)}, "bias has shape"),
        ({"bias": torch.randn(3, 4, 5, 5)}, "bias has shape"),
        ({"bias": torch.randn(5, 5)}, "bias has shape"),
        ({"scale": float("inf")}, "scale=inf must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(**{"query": query, "key": key, "value": value, **change})
    for change, message in (
        ({"key": key.double()}, "key has dtype torch.float64"),
        ({"bias": torch.ones(4, 5, 5, dtype=torch.bool)}, "bias must be floating-point"),
        ({"bias": [0.0]}, "bias must be a tensor or None, got list"),
        ({"is_causal": 1}, "is_causal must be True or False, got 1"),
        ({"scale": "1"}, "scale must be a number or None, got str"),
    ):
        with pytest.raises(TypeError, match=message):
            attention(**{"query": query, "key": key, "value": value, **change})
    wide = torch.randn(1, 4, 1, 257)
    with pytest.raises(ValueError, match="head_dim 257 exceeds 256"), backend("triton"):
        attention(wide, wide, wide)


@pytest.mark.skipif(TRITON_INTERPRET, reason="not about kernels")
def test_training_on_long_sequences_stores_no_scores() -> None:
    """What the graph holds between forward and backward grows with tokens, not their square."""

    def held(tokens: int, dtype: torch.dtype, value_width: int) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        leaves = [
            torch.randn(1, tokens, 5, width, dtype=dtype, requires_grad=True)
            for width in (8, 8, value_width)
        ]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attention(*leaves)
        return sum(storages.values())

    for dtype, width in ((torch.float32, 8), (torch.float32, 12), (torch.bfloat16, 8)):
        assert held(4096, dtype, width) <= 2 * held(2048, dtype, width)
