"""The kernels of linear attention, beyond what the generated suite asks of all."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from vitarium.benchmarks.kernel_compiler import compiling  # noqa: E402
from vitarium.ops import linear_attention  # noqa: E402
from vitarium.ops.kernels import linear as kernels  # noqa: E402
from vitarium.ops.kernels import rows  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="needs the compiler")


def maps(tokens: int, heads: int, dims: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value as the first half of wider heads."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(1, tokens, heads, 2 * dim, generator=generator).to(dtype)[..., :dim]
        for dim in (dims[0], *dims)
    ]


def run(tensors: list[Tensor], name: str, dtype: torch.dtype, **kwargs: object) -> list[Tensor]:
    """Output and gradients."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    output = linear_attention(*leaves, **kwargs, backend=name)
    grads = torch.autograd.grad(output.square().sum(), leaves)
    return [result.double() for result in (output, *grads)]


@interpreted_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_views(dtype: torch.dtype) -> None:
    tensors = maps(70, 1, (16, 48), dtype)
    found = run(tensors, "triton", dtype, eps=0.1)
    for ours, expected in zip(found, run(tensors, "reference", torch.float64, eps=0.1)):
        scale = expected.abs().max().item()
        atol = 8 * torch.finfo(dtype).eps * scale
        torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


@interpreted_only
@pytest.mark.parametrize("normalization", ["sum", "injective"])
def test_several_parts_and_blocks_of_channels(
    normalization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens in parts of several tiles, and heads of several blocks."""
    tensors = maps(40, 1, (24, 24), torch.float32)
    kwargs = {"normalization": normalization, "feature_map": "elu"}
    expected = run(tensors, "reference", torch.float64, **kwargs)
    monkeypatch.setattr(kernels, "STEPS", {4: 16})
    for programs in (1, 1000):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        kernels.plan.cache_clear()
        found = run(tensors, "triton", torch.float32, **kwargs)
        for ours, want in zip(found, expected):
            torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
    kernels.plan.cache_clear()


@interpreted_only
def test_large_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets of 64 bits change nothing where 32 suffice."""
    tensors = maps(20, 2, (16, 16), torch.float32)
    expected = run(tensors, "triton", torch.float32)
    rows._told.cache_clear()
    monkeypatch.setattr(rows, "LARGEST_OFFSET", 0)
    try:
        large = run(tensors, "triton", torch.float32)
    finally:
        rows._told.cache_clear()
    for found, want in zip(large, expected):
        assert torch.equal(found, want)


@pytest.mark.parametrize("most", [0, 8])
def test_parts_cover_all_tokens(most: int) -> None:
    for tokens in (1, 49, 64, 65, 3136, 65536):
        for programs in (1, 100, 5000):
            parts, length, options = kernels.plan("read", 2, tokens, programs, most)
            assert length % options["BLOCK"] == 0
            assert (parts - 1) * length < tokens <= parts * length
            assert not most or length <= most * options["BLOCK"]


@compiled_only
def test_other_sizes_of_map_compile_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = []
    with compiling(90) as compiled:
        for batch, tokens in ((2, 120), (3, 168), (4, 3136)):
            x = torch.empty(batch, tokens, 2, 32, device="meta", dtype=torch.bfloat16)
            args = (x, x, x, None)
            rest = ("elu", "sum", 3.0, 0.2, 1e-6)
            output, state = kernels.forward(*args, *rest)
            kernels.backward(output, *args, output, state, *rest, (True, True, True, False))
            found.append([binary.hash for _, _, binary in compiled])
            compiled.clear()
    assert len(found[0]) == 6
    assert found[0] == found[1] == found[2]
