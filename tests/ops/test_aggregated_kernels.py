"""The kernels of aggregated attention, beyond what the generated suite asks of all."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from vitarium.benchmarks.kernel_compiler import compiling  # noqa: E402
from vitarium.ops import aggregated_attention  # noqa: E402
from vitarium.ops.kernels import aggregated as kernels  # noqa: E402
from vitarium.ops.kernels import rows  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="needs the compiler")


def tensors(
    size: tuple[int, int], pooled: int, window_size: int, *, batch: int = 1, dim: int = 16,
    heads: tuple[int, int] = (1, 1), dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Tensor]:  # fmt: skip
    """All eight tensors of a call; window weights as mixers make them, with tokens last."""
    generator = torch.Generator().manual_seed(5)
    base, places = (batch, *size), window_size**2
    shapes = [
        (*base, heads[0], dim),
        (*base, heads[1], dim),
        (*base, heads[1], dim),
        (batch, pooled, heads[1], dim),
        (batch, pooled, heads[1], dim),
        (heads[0], places),
        (heads[0], size[0] * size[1], pooled),
        (heads[0], places, *base),
    ]
    found = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [*found[:7], found[7].permute(2, 3, 4, 0, 1)]


def run(arguments: list[Tensor], window_size: int, backend: str) -> list[Tensor]:
    """Output and all gradients."""
    leaves = [t.detach().requires_grad_() for t in arguments]
    *qkv, bias, pooled_bias, window_weights = leaves
    output = aggregated_attention(
        *qkv,
        window_size,
        bias=bias,
        pooled_bias=pooled_bias,
        window_weights=window_weights,
        backend=backend,
    )
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


@interpreted_only
@pytest.mark.parametrize(
    ("size", "window_size", "heads", "walk"),
    [((9, 10), 3, (1, 1), 4), ((9, 10), 3, (1, 1), 2), ((5, 9), 5, (2, 1), 4)],
)
def test_walks_over_tiles(
    size: tuple[int, int], window_size: int, heads: tuple[int, int], walk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A program that takes several tiles, some of them beyond the map."""
    arguments = tensors(size, 5, window_size, heads=heads)
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    monkeypatch.setattr(kernels, "LONGEST_WALK", walk)
    kernels._shares.cache_clear()
    try:
        found = run(arguments, window_size, "triton")
    finally:
        kernels._shares.cache_clear()
    for ours, expected in zip(found, run(arguments, window_size, "reference")):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@interpreted_only
def test_large_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets of 64 bits change nothing where 32 suffice."""
    arguments = tensors((3, 5), 4, 3)
    expected = run(arguments, 3, "triton")
    rows._told.cache_clear()
    monkeypatch.setattr(rows, "LARGEST_OFFSET", 0)
    try:
        large = run(arguments, 3, "triton")
    finally:
        rows._told.cache_clear()
    for found, want in zip(large, expected):
        assert torch.equal(found, want)


@compiled_only
def test_other_sizes_of_map_compile_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = []
    with compiling(90) as compiled:
        for batch, size, pooled in ((1, (9, 13), 33), (2, (16, 7), 49), (3, (24, 32), 64)):
            arguments = tensors(
                size, pooled, 3, batch=batch, dim=32, dtype=torch.bfloat16, device="meta"
            )
            output, logsumexp = kernels.forward(*arguments, 3, 0.25)
            kernels.backward(output, *arguments, output, logsumexp, 3, 0.25, (True,) * 8)
            found.append([binary.hash for _, _, binary in compiled])
            compiled.clear()
    assert len(found[0]) == 5
    assert found[0] == found[1] == found[2]
