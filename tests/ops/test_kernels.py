"""The Triton kernels of neighborhood attention against the reference in float64.

On a CUDA device these run as they are. Without one they are skipped here, and
`test_kernels_interpreter.py` runs them in Triton's interpreter, on the cases small enough for it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from vitarium.ops import neighborhood_attention, window_attention  # noqa: E402
from vitarium.ops.kernels import local as kernels  # noqa: E402
from vitarium.ops.kernels.patterns import axis_inverse, axis_union  # noqa: E402
from vitarium.ops.window import CASES as WINDOWS  # noqa: E402
from vitarium.ops.windows import Block, Pattern, Window, axis_pattern  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs CUDA or TRITON_INTERPRET=1"),
    *([pytest.mark.gpu] if CUDA else []),
]
gpu_only = pytest.mark.skipif(not CUDA, reason="needs CUDA")
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A call of the operator. `layout`: strides of query, key and value."""

    spatial: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1, 1)
    dilation: tuple[int, ...] = (1, 1, 1)
    is_causal: tuple[bool, ...] = (False, False, False)
    heads: int = 1
    heads_kv: int = 1
    head_dim: int = 16
    value_dim: int = 16
    batch: int = 1
    has_bias: bool = True
    scale: float | None = None
    dtype: torch.dtype = FLOAT32
    layout: str = "contiguous"

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.spatial))
        return f"{sizes}-k{self.kernel_size}-{self.dtype}-{self.layout}".replace("torch.", "")

    @property
    def options(self) -> dict:
        rank = len(self.spatial)
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride[:rank],
            "dilation": self.dilation[:rank],
            "is_causal": self.is_causal[:rank],
            "scale": self.scale,
        }

    @property
    def windows(self) -> tuple[Window, ...]:
        return tuple(map(Window, self.kernel_size, self.stride, self.dilation, self.is_causal))


def _random(shape: tuple[int, ...], case: Case, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if case.layout == "transposed":  # channels are not the last in memory
        tensor = torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator)
        return tensor.to(DEVICE, case.dtype).transpose(-1, -2)
    if case.layout == "fused":  # a third of a projection
        tensor = torch.randn(*shape[:-2], 3, *shape[-2:], generator=generator)
        return tensor.to(DEVICE, case.dtype).select(-3, seed % 3)
    return torch.randn(shape, generator=generator).to(DEVICE, case.dtype)


def _fence(tensor: Tensor) -> Tensor:
    """The same tensor, amid NaN along each dimension: what reads past its ends gets NaN."""
    margin = 9
    fenced = tensor.new_full([size + 2 * margin for size in tensor.shape], math.nan)
    inner = fenced[tuple(slice(margin, margin + size) for size in tensor.shape)]
    return inner.copy_(tensor)


def _inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """Query, key, value (and bias), and the gradient of the output."""
    base = (case.batch, *case.spatial)
    tensors = [
        _random((*base, case.heads, case.head_dim), case, 0),
        _random((*base, case.heads_kv, case.head_dim), case, 1),
        _random((*base, case.heads_kv, case.value_dim), case, 2),
    ]
    if case.has_bias:
        table = (case.heads, *(2 * k - 1 for k in case.kernel_size))
        generator = torch.Generator().manual_seed(3)
        tensors.append(torch.randn(table, generator=generator).to(DEVICE))
    if case.layout == "fenced":
        tensors = [_fence(tensor) for tensor in tensors]
    if case.layout == "fused":  # the gradient of a sum: all strides are zero
        grad = torch.ones((), device=DEVICE, dtype=case.dtype)
        return tensors, grad.expand(*base, case.heads, case.value_dim)
    return tensors, _random((*base, case.heads, case.value_dim), case, 4)


def _run(case: Case, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients, computed in `dtype` (the bias in float32 at least)."""
    (query, key, value, *rest), grad = _inputs(case)
    leaves = [t.to(dtype).detach().requires_grad_() for t in (query, key, value)]
    bias = [t.to(torch.promote_types(dtype, FLOAT32)).requires_grad_() for t in rest]
    output = neighborhood_attention(
        *leaves, **case.options, bias=bias[0] if bias else None, backend=backend
    )
    output.backward(grad.to(dtype))
    names = ("query", "key", "value", "bias")
    return {"output": output.detach()} | {
        f"grad of {name}": leaf.grad for name, leaf in zip(names, leaves + bias)
    }


def _assert_close(case: Case, ours: dict[str, Tensor], slack: float = 4.0) -> None:
    """Error at most twice that of plain PyTorch in the same dtype, and a few float32 roundings."""
    exact = _run(case, "reference", torch.float64)
    plain = _run(case, "reference", case.dtype)
    assert ours["output"].is_contiguous()
    for name, expected in exact.items():
        assert ours[name].shape == expected.shape
        error = (ours[name].double() - expected).abs().max().item()
        allowed = 2 * (plain[name].double() - expected).abs().max().item()
        allowed += slack * torch.finfo(FLOAT32).eps * max(1.0, expected.abs().max().item())
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that PyTorch hands out uninitialised holds NaN."""

    def poisoned(allocate):
        def run(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return run

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


SMALL = (
    Case((37,), (7,), dilation=(2,), heads=2, heads_kv=2, layout="fused"),
    Case(
        (19,), (6,), (4,), (3,), (True,),
        heads=4, heads_kv=2, head_dim=20, value_dim=33, layout="transposed",
    ),
    Case((40,), (6,), (5,), layout="fenced"),
    Case((70,), (9,), (4,), is_causal=(True,), dtype=FLOAT16),
    Case((7,), (7,), dtype=FLOAT16),
    Case((9, 11), (7, 7), layout="fused"),
    Case((9, 10), (5, 4), dtype=BFLOAT16, layout="fenced"),
    Case(
        (5, 17), (4, 5), (2, 3), (1, 3), (True, False),
        heads=2, heads_kv=1, head_dim=24, value_dim=40, has_bias=False,
    ),
    Case((7, 7), (7, 7), dtype=FLOAT16, layout="transposed"),
    Case((6, 9), (3, 2), dilation=(2, 4), has_bias=False, batch=2, layout="fused"),
    Case((6, 10), (3, 3), scale=-0.7),
    Case((6, 10), (3, 3), scale=0.0, dtype=FLOAT16),
    Case((3, 4, 5), (2, 3, 3), layout="fenced"),
    Case((4, 3, 7), (3, 1, 2), (2, 1, 2), (1, 3, 3), (False, False, True), dtype=FLOAT16),
    # Facts from NATTEN's own problem tables (tests/test_fna.py).
    Case((128,), (3,), (2,), (5,), head_dim=32, value_dim=64, has_bias=False),
    Case((125,), (3,), (1,), (1,), (True,), head_dim=32, value_dim=32, has_bias=False),
    Case(
        (5, 25), (5, 16), (1, 16), is_causal=(False, True),
        heads=2, heads_kv=1, head_dim=32, value_dim=32, has_bias=False,
    ),
    Case((7, 3, 8), (7, 3, 7), head_dim=32, value_dim=24, has_bias=False),
)  # fmt: skip

LARGE = tuple(
    replace(case, dtype=dtype)
    for dtype in (FLOAT32, FLOAT16, BFLOAT16)
    for case in (
        Case((56, 56), (7, 7), heads=2, heads_kv=2, head_dim=32, value_dim=32, batch=4),
        Case((57, 61), (7, 7), (1, 1), (8, 7), heads=2, heads_kv=2, head_dim=32, value_dim=32),
        Case((28, 30), (13, 11), (4, 3), heads=4, heads_kv=2, head_dim=64, value_dim=64, batch=2),
        Case((31, 29), (5, 5), head_dim=128, value_dim=128, heads=2, heads_kv=2, layout="fused"),
        Case((16, 23), (6, 4), (3, 2), (2, 3), (True, False), head_dim=256, value_dim=192),
        Case((500,), (63,), (16,), (3,), heads=3, heads_kv=1, head_dim=80, value_dim=72),
        Case((9, 14, 13), (3, 5, 4), (1, 2, 3), (2, 1, 3), head_dim=48, value_dim=48, batch=2),
    )
)
CASES = SMALL + LARGE if CUDA else SMALL


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        _poison(patch)
        ours = _run(case, "triton", case.dtype)
    _assert_close(case, ours)


@pytest.mark.parametrize("case", (SMALL[2], SMALL[8], *(LARGE if CUDA else ())), ids=str)
def test_two_runs_are_bit_equal(case: Case) -> None:
    first, second = (_run(case, "triton", case.dtype) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@triton.jit
def _bounds_kernel(result, n, keys, count, rule, BLOCK: tl.constexpr):
    first = tl.arange(0, BLOCK)
    last = tl.minimum(first, n - 1)
    start, stop = axis_union(last, tl.minimum(first + count, n), n, rule)
    low, high = axis_inverse(first, tl.minimum(first + count, keys), n, rule)
    tl.store(result + first, start)
    tl.store(result + BLOCK + first, stop)
    tl.store(result + 2 * BLOCK + first, low)
    tl.store(result + 3 * BLOCK + first, high)


def _check_walks(window: Pattern, n: int) -> None:
    """Bounds of the walks over keys and over queries, against the definition, exhaustively."""
    block = 32
    seen, _ = axis_pattern(n, window, torch.device("cpu"))
    keys = seen.shape[1]
    for count in (1, 4):
        result = torch.empty(4, block, dtype=torch.int32, device=DEVICE)
        _bounds_kernel[(1,)](result, n, keys, count, kernels._rule(window), block)
        for first in range(n):
            start, stop, _, _ = result[:, first].tolist()
            found = seen[first : first + count].any(0).nonzero()
            assert (start, stop) == (found.min(), found.max() + 1)
        for first in range(keys):
            _, _, low, high = result[:, first].tolist()
            queries = seen[:, first : first + count].any(1).nonzero()
            if len(queries):
                assert (low, high) == (queries.min(), queries.max() + 1)
            else:
                assert low >= high


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 2, 5, 6])
def test_walks_visit_what_is_seen_and_no_more(kernel_size: int, is_causal: bool) -> None:
    for stride in range(1, kernel_size + 1):
        for n in range(kernel_size, 14):
            _check_walks(Window(kernel_size, stride, 1, is_causal), n)


@pytest.mark.parametrize("window_size", [1, 2, 5])
def test_walks_over_windows(window_size: int) -> None:
    for shift in range(window_size):
        for halo, border in ((0, 0), (1, 0), (1, 1), (4, 0), (4, 4)):
            for n in (1, 4, 5, 11):
                _check_walks(Block(window_size, 1, shift, halo, border), n)


@pytest.mark.parametrize(
    ("note", "dtype"),
    [
        ("ragged windows, shifted", FLOAT16),
        ("dilated halo with a border of keys", FLOAT32),
        ("halo, masked", FLOAT16),
    ],
)
def test_windows_amid_nan(note: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels read nothing beside the maps, and nothing that nobody wrote."""
    case = next(case for case in WINDOWS if case.note == note)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(DEVICE, dtype)
        for name, shape in case.shapes.items()
    }

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = {
            name: _fence(tensor.to(dtype)).requires_grad_() for name, tensor in tensors.items()
        }
        output = window_attention(**leaves, **case.kwargs, backend=backend)
        grads = torch.autograd.grad(output.sum(), list(leaves.values()))
        return [output.detach(), *grads]

    with monkeypatch.context() as patch:
        _poison(patch)
        ours = run("triton", dtype)
    for found, plain, exact in zip(ours, run("reference", dtype), run("reference", torch.float64)):
        error = (found.double() - exact).abs().max().item()
        allowed = 2 * (plain.double() - exact).abs().max().item()
        assert error <= allowed + 4 * torch.finfo(FLOAT32).eps * max(1.0, exact.abs().max().item())


def test_logsumexp() -> None:
    case = replace(SMALL[1], has_bias=False)
    (query, key, value), _ = _inputs(case)
    _, ours = kernels.forward(query, key, value, None, case.windows, 0.3)
    inside, _ = axis_pattern(case.spatial[0], case.windows[0], query.device)
    key = key.double().repeat_interleave(case.heads // case.heads_kv, dim=-2)
    scores = torch.einsum("bnhd,bmhd->bnhm", query.double(), key) * 0.3
    scores = scores.masked_fill(~inside[:, None, :], -math.inf)
    assert ours.dtype == FLOAT32
    expected = scores.logsumexp(-1) / math.log(2)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_empty_batch() -> None:
    case = replace(SMALL[5], batch=0)
    ours = _run(case, "triton", case.dtype)
    assert ours["output"].shape == (0, 9, 11, 1, 16)
    assert ours["grad of query"].shape == (0, 9, 11, 1, 16)
    assert torch.equal(ours["grad of bias"], torch.zeros(1, 13, 13, device=DEVICE))


def test_large_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets of 64 bits change nothing where 32 suffice."""
    case = SMALL[2]
    expected = _run(case, "triton", case.dtype)
    monkeypatch.setattr(kernels, "large", lambda *tensors: True)
    for name, tensor in _run(case, "triton", case.dtype).items():
        assert torch.equal(tensor, expected[name]), name


def test_operators_pass_opcheck() -> None:
    case = Case((7,), (3,))
    (query, key, value, bias), grad = _inputs(case)
    pattern = ([3], [1], [1], [False], 0.25, True)
    leaves = [t.requires_grad_() for t in (query, key, value, bias)]
    torch.library.opcheck(torch.ops.vitarium.neighborhood_attention.default, (*leaves, *pattern))
    output, logsumexp = torch.ops.vitarium.neighborhood_attention(*leaves, *pattern)
    for bias_needs_grad in (False, True):
        torch.library.opcheck(
            torch.ops.vitarium.neighborhood_attention_backward.default,
            (
                grad, *(t.detach() for t in leaves), output.detach(), logsumexp.detach(),
                *pattern, [1, 1, 1, int(bias_needs_grad)],
            ),
        )  # fmt: skip


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=gpu_only)])
def test_compiles_to_one_graph(compiler: str) -> None:
    case = Case((20,), (3,), layout="fused")
    expected = _run(case, "triton", case.dtype)

    def call(*tensors: Tensor) -> Tensor:
        *qkv, bias = tensors
        return neighborhood_attention(*qkv, **case.options, bias=bias, backend="triton")

    tensors, grad = _inputs(case)
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = torch.compile(call, fullgraph=True, backend=compiler)(*leaves)
    output.backward(grad)
    torch.testing.assert_close(output, expected["output"])
    for name, leaf in zip(("query", "key", "value", "bias"), leaves):
        torch.testing.assert_close(leaf.grad, expected[f"grad of {name}"])


@gpu_only
def test_cuda_graph_replays() -> None:
    case = LARGE[0]
    (query, key, value, bias), grad = _inputs(case)
    arguments = (query, key, value, bias, case.windows, 0.2)

    def step() -> tuple[Tensor, ...]:
        output, logsumexp = kernels.forward(*arguments)
        return output, *kernels.backward(
            grad, query, key, value, bias, output, logsumexp, case.windows, 0.2, True
        )

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    query.copy_(torch.randn_like(query))
    graph.replay()
    for recorded, fresh in zip(captured, step()):
        assert torch.equal(recorded, fresh)


@gpu_only
def test_tensor_beyond_32_bits() -> None:
    """One image of more than 2 ** 31 elements: the last tokens are as right as the first."""
    heads, head_dim, length = 64, 128, 300_000
    if torch.cuda.mem_get_info()[0] < 5 * 2 * heads * head_dim * length:
        pytest.skip("needs about 25 GB of free memory")
    query = torch.randn(1, length, heads, head_dim, device=DEVICE, dtype=BFLOAT16)
    output = neighborhood_attention(query, query, query, 7, backend="triton")
    tail = query[:, -64:, :1].double()
    expected = neighborhood_attention(tail, tail, tail, 7, backend="reference")
    # Away from the cut the windows of the tail are those of the whole.
    error = (output[:, -32:, :1].double() - expected[:, -32:]).abs().max()
    assert error < 0.05
