"""Neighborhood attention: its windows, against the rule spelled out; drawn shapes; wrong calls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitarium.ops import NeighborhoodAttention, neighborhood_attention
from vitarium.ops.dispatch import NATTEN_INSTALLED
from vitarium.ops.tiles import cut
from vitarium.ops.windows import Window, axis_pattern, plain_axis, tiles_for


def rule(length: int, k: int, s: int, d: int, causal: bool, token: int) -> set[int]:
    """The tokens that a token sees: the published rule, read literally, in plain integers."""
    group, position = token % d, token // d
    row = [other for other in range(length) if other % d == group]
    n = len(row)
    if causal:
        leader = min((position // s) * s + s - 1, n - 1)
        return {row[q] for q in range(n) if q <= position and leader - q < k}
    leader = min((position // s) * s + s // 2, n - 1)
    start = min(max(leader - k // 2, 0), n - k)
    return {row[q] for q in range(start, start + k)}


@st.composite
def axes(draw: Any, longest: int = 40, widest: int = 9, sparsest: int = 4) -> tuple[int, Window]:
    k = draw(st.integers(1, widest))
    s = draw(st.integers(1, k))
    d = draw(st.integers(1, sparsest))
    length = draw(st.integers(k * d, max(k * d, longest)))
    return length, Window(k, s, d, draw(st.booleans()))


@settings(max_examples=150, deadline=None)
@given(axes(), st.integers(1, 12))
def test_windows(axis: tuple[int, Window], tile: int) -> None:
    """Definition, tiles and exportable tiles show every query the keys of the rule."""
    length, window = axis
    d = window.dilation
    expected = [rule(length, *window, token) for token in range(length)]
    seen, offset = axis_pattern(length, window, torch.device("cpu"))
    for token in range(length):
        assert set(seen[token].nonzero().flatten().tolist()) == expected[token]
        for other in expected[token]:
            assert offset[token, other] == (other - token) // d
            assert abs(offset[token, other]) < window.kernel_size
    ranges = []
    for group in range(d):
        n = -(-(length - group) // d)
        ranges.append([window.keys_seen(position, n) for position in range(n)])
    tiles = cut(length, d, tile, ranges)
    plain = plain_axis(length, window, torch.device("cpu"))
    for token in range(length):
        group, position = token % d, token // d
        t, row = divmod(position, tile)
        start, stop = tiles.patterns[tiles.which[group][t]][row]
        assert 0 <= start < stop <= tiles.halo
        first = t * tile - tiles.before
        found = {(first + key) * d + group for key in range(start, stop)}
        assert found == expected[token]
        t, row = divmod(position, plain.tile)
        bounds = range(int(plain.start[group, t, row]), int(plain.stop[group, t, row]))
        assert {key * d + group for key in bounds} == expected[token]
        assert bounds.start >= t * plain.tile - plain.before
        assert bounds.stop <= t * plain.tile - plain.before + plain.halo


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    rank = draw(st.integers(1, 3))
    limits = ((60, 9, 4), (16, 7, 3), (6, 3, 2))[rank - 1]  # at most 21 * 21 tokens
    pairs = [draw(axes(*limits)) for _ in range(rank)]
    heads_kv = draw(st.integers(1, 2))
    return {
        "spatial": tuple(length for length, _ in pairs),
        "windows": tuple(window for _, window in pairs),
        "batch": draw(st.integers(1, 3)),
        "heads": (heads_kv * draw(st.integers(1, 2)), heads_kv),
        "dims": (draw(st.integers(1, 20)), draw(st.integers(1, 20))),
        "bias": draw(st.booleans()),
    }


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(calls(), st.sampled_from([1, 1 << 12, 1 << 20]), st.sampled_from([1, 1000]))
def test_drawn_calls(
    monkeypatch: pytest.MonkeyPatch, call: dict[str, Any], chunk: int, strips_pay: int
) -> None:
    """Whatever the shape, and however the work is cut into chunks, all paths agree."""
    monkeypatch.setattr("vitarium.ops.plan.CPU_CHUNK", chunk)
    monkeypatch.setattr("vitarium.ops.tiled.STRIPS_PAY", strips_pay)
    base = (call["batch"], *call["spatial"])
    (heads, heads_kv), (head_dim, value_dim) = call["heads"], call["dims"]
    kernel_size, stride, dilation, is_causal = zip(*call["windows"])
    generator = torch.Generator().manual_seed(0)
    shapes = [(*base, heads, head_dim), (*base, heads_kv, head_dim), (*base, heads_kv, value_dim)]
    if call["bias"]:
        shapes.append((heads, *(2 * k - 1 for k in kernel_size)))
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    grad = torch.randn(*base, heads, value_dim, generator=generator, dtype=torch.float64)

    def run(backend: str, function: Any = neighborhood_attention) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = function(
            *leaves[:3],
            kernel_size,
            stride=stride,
            dilation=dilation,
            is_causal=is_causal,
            bias=leaves[3] if call["bias"] else None,
            backend=backend,
        )
        return [output, *torch.autograd.grad(output, leaves, grad)]

    expected = run("reference")
    for found, wanted in zip(run("torch"), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    with monkeypatch.context() as patch:
        patch.setattr("vitarium.ops.dispatch.plain_aten", lambda: True)
        for found, wanted in zip(run("torch"), expected):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spatial", [(56, 56), (57, 31), (14, 14), (7, 7), (200, 304)])
def test_tiles_cover_the_map(spatial: tuple[int, int]) -> None:
    found = tiles_for(spatial, (Window(7, 1, 1, False),) * 2)
    for length, axis in zip(spatial, found):
        assert (axis.tiles - 1) * axis.tile < length <= axis.tiles * axis.tile
        assert axis.halo <= length + 6


def test_operations_are_those_of_the_mask() -> None:
    """The formula equals what the definition's mask lets through, and counts no tile's waste."""
    cases = [
        ((9, 11), (Window(7, 1, 1, False), Window(3, 2, 3, True))),
        ((37,), (Window(9, 4, 2, True),)),
        ((4, 6, 7), (Window(2, 1, 2, False), Window(3, 1, 1, True), Window(3, 3, 2, False))),
    ]
    for spatial, windows in cases:
        pairs = math.prod(
            int(axis_pattern(length, window, torch.device("cpu"))[0].sum())
            for length, window in zip(spatial, windows)
        )
        shapes = (2, *spatial, 4, 8), (2, *spatial, 2, 8), (2, *spatial, 2, 5)
        kernel_size, stride, dilation, is_causal = zip(*windows)
        for device in ("cpu", "meta"):
            with FlopCounterMode(display=False) as counter:
                output = neighborhood_attention(
                    *(torch.randn(shape, device=device, requires_grad=True) for shape in shapes),
                    kernel_size,
                    stride=stride,
                    dilation=dilation,
                    is_causal=is_causal,
                )
            assert counter.get_total_flops() == 2 * 2 * 4 * pairs * (8 + 5)
            with FlopCounterMode(display=False) as counter:
                output.sum().backward()
            assert counter.get_total_flops() == 2 * 2 * 4 * pairs * (3 * 8 + 2 * 5)


@pytest.mark.skipif(not NATTEN_INSTALLED, reason="natten is not installed")
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_natten_agrees(rank: int) -> None:
    spatial, kernel_size = (16, 12, 8)[:rank], (5, 4, 3)[:rank]
    query, key, value = (torch.randn(1, *spatial, 2, 32) for _ in range(3))
    arguments: dict[str, Any] = {"kernel_size": kernel_size, "stride": 2, "dilation": 2}
    with torch.no_grad():
        found = neighborhood_attention(query, key, value, **arguments, backend="natten")
        expected = neighborhood_attention(query, key, value, **arguments, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_natten_is_refused_what_it_cannot_do() -> None:
    query = torch.randn(1, 8, 8, 2, 16)
    for arguments, reason in (
        ({"bias": torch.zeros(2, 5, 5)}, "no relative position bias"),
        ({"kernel_size": 1}, "kernel_size >= 2"),
    ):
        arguments = {"kernel_size": 3, **arguments}
        reason = reason if NATTEN_INSTALLED else "natten is not installed"
        with pytest.raises(ValueError, match=f"backend='natten' cannot run.*{reason}"):
            neighborhood_attention(query, query, query, **arguments, backend="natten")


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


MAP = tensor(1, 8, 9, 2, 16)
WRONG = [
    # (arguments that differ from a right call, error, what the message says)
    ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
    ({"query": tensor(1, 8, 9, 2, 16, dtype=torch.int64)}, TypeError, "query must be floating"),
    ({"key": tensor(1, 8, 9, 2, 16, dtype=torch.float64)}, TypeError, "key has dtype torch.float6"),
    ({"value": tensor(1, 8, 9, 2, 16, device="meta")}, ValueError, "value is on meta"),
    ({"query": tensor(8, 2, 16)}, ValueError, r"query has shape \(8, 2, 16\)"),
    ({"query": tensor(1, 2, 2, 2, 2, 2, 4)}, ValueError, "allowed are 4 to 6 dimensions"),
    ({"key": tensor(1, 8, 8, 2, 16)}, ValueError, r"key \(1, 8, 8, 2, 16\)"),
    ({"key": tensor(2, 8, 9, 2, 16)}, ValueError, "batch and spatial dimensions must agree"),
    ({"value": tensor(1, 8, 9, 16)}, ValueError, "value has shape"),
    ({"key": tensor(1, 8, 9, 2, 8)}, ValueError, "key has head_dim 8, query 16"),
    ({"value": tensor(1, 8, 9, 1, 16)}, ValueError, "value has 1 heads, key 2"),
    (
        {"key": tensor(1, 8, 9, 3, 16), "value": tensor(1, 8, 9, 3, 16)},
        ValueError,
        "key has 3 heads, which do not divide the query's 2",
    ),
    ({"value": tensor(1, 8, 9, 2, 0)}, ValueError, "value has head_dim 0"),
    ({"kernel_size": 0}, ValueError, "kernel_size=0 must be at least 1"),
    ({"kernel_size": (3, -1)}, ValueError, r"kernel_size=\(3, -1\) must be at least 1"),
    ({"kernel_size": 3.0}, TypeError, "kernel_size=3.0 must hold int, got float"),
    ({"kernel_size": True}, TypeError, "kernel_size=True must hold int, got bool"),
    ({"kernel_size": "7"}, TypeError, "kernel_size='7' must hold int, got str"),
    ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size=.* has 3 entries"),
    (
        {"kernel_size": (8, 10)},
        ValueError,
        r"kernel_size=10 exceeds the feature map \(8, 9\) along W at dilation 1",
    ),
    ({"dilation": 3}, ValueError, r"kernel_size=3 exceeds .* along H at dilation 3"),
    ({"dilation": 0}, ValueError, "dilation=0 must be at least 1"),
    ({"stride": 4}, ValueError, "stride=4 along H exceeds kernel_size=3"),
    ({"stride": (1,)}, ValueError, "stride=.* has 1 entries"),
    ({"is_causal": 1}, TypeError, "is_causal=1 must hold bool, got int"),
    ({"is_causal": (True, "no")}, TypeError, "must hold bool, got str"),
    ({"bias": 0.5}, TypeError, "bias must be a tensor or None, got float"),
    ({"bias": tensor(2, 5, 5, dtype=torch.int32)}, TypeError, "bias must be floating-point"),
    ({"bias": tensor(2, 5, 5, device="meta")}, ValueError, "bias is on meta"),
    ({"bias": tensor(2, 3, 5)}, ValueError, r"bias has shape \(2, 3, 5\); allowed is \(2, 5, 5\)"),
    ({"scale": "1"}, TypeError, "scale must be a number or None, got str"),
    ({"scale": math.nan}, ValueError, "scale=nan must be finite"),
    ({"backend": "cuda"}, ValueError, "backend='cuda' is unknown"),
    ({"backend": 3}, ValueError, "backend=3 is unknown"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_wrong_calls(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"query": MAP, "key": MAP, "value": MAP, "kernel_size": 3, **arguments}
    with pytest.raises(error, match=message) as caught:
        neighborhood_attention(**call)
    assert str(caught.value).startswith("neighborhood_attention: ")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_heads": 5}, ValueError, "num_heads=5 must divide dim=32"),
        ({"num_heads": 0}, ValueError, "num_heads=0"),
        ({"kernel_size": 0}, ValueError, "kernel_size=0 must be at least 1"),
        ({"stride": 4}, ValueError, "stride=4 exceeds kernel_size=3"),
        ({"dilation": "2"}, TypeError, "dilation='2' must be int"),
        ({"window_size": 7}, TypeError, "window_size"),
    ],
)
def test_wrong_modules(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NeighborhoodAttention(32, **{"num_heads": 2, "kernel_size": 3, **arguments})


def test_attention_map_is_what_forward_uses() -> None:
    """Summing values with the map's weights gives the operator's output at that position."""
    for arguments in ({"kernel_size": 3, "dilation": 2}, {"kernel_size": (4, 5), "stride": 2}):
        mixer = NeighborhoodAttention(32, num_heads=2, **arguments).double()
        x = torch.randn(2, 11, 9, 32, dtype=torch.float64)
        weights = mixer.attention_map(x, (4, 7))
        torch.testing.assert_close(weights.sum((-1, -2)), torch.ones_like(weights[..., 0, 0]))
        value = mixer.qkv(x).unflatten(-1, (3, 2, 16))[..., 2, :, :]
        mixed = torch.einsum("bhyx,byxhd->bhd", weights, value).flatten(1)
        torch.testing.assert_close(mixer.proj(mixed), mixer(x)[:, 4, 7])


SIZES = {
    0: torch.export.Dim("batch", min=1, max=64),
    1: torch.export.Dim("height", min=10, max=200),
    2: torch.export.Dim("width", min=10, max=200),
}
needs_new_exporter = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13),
    reason="the exporter of torch 2.11 refuses a dynamic width",
)


def _module() -> tuple[NeighborhoodAttention, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    module = NeighborhoodAttention(32, num_heads=2, kernel_size=5, dilation=2).eval()
    others = [torch.randn(*size, 32) for size in ((1, 10, 30), (3, 14, 10), (2, 33, 41))]
    return module, torch.randn(2, 13, 15, 32), others


@needs_new_exporter
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_any_size(strict: bool) -> None:
    module, x, others = _module()
    program = torch.export.export(module, (x,), dynamic_shapes=(SIZES,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if "vitarium" in target]
    for y in (x, *others):
        torch.testing.assert_close(program.module()(y), module(y), rtol=1e-4, atol=1e-5)


@needs_new_exporter
def test_onnx_of_any_size(tmp_path: Any) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    module, x, others = _module()
    path = tmp_path / "attention.onnx"
    torch.onnx.export(module, (x,), path, dynamo=True, dynamic_shapes=(SIZES,), verbose=False)
    session = onnxruntime.InferenceSession(path)
    for y in (x, *others):
        (found,) = session.run(None, {session.get_inputs()[0].name: y.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(y), rtol=1e-4, atol=1e-4)


def test_activation_checkpointing_and_inference_mode() -> None:
    module, x, _ = _module()
    with torch.inference_mode():  # buffers kept from here must not leak into what follows
        expected = module(x)
    plain = torch.autograd.grad(module(x).square().sum(), module.rpb)[0]
    again = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    assert torch.equal(again, expected)
    assert torch.equal(torch.autograd.grad(again.square().sum(), module.rpb)[0], plain)


def test_compile_with_marked_sizes() -> None:
    module, x, others = _module()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for dimension in range(3):
        torch._dynamo.mark_dynamic(x, dimension)
    for y in (x, *others):
        torch.testing.assert_close(compiled(y), module(y))
