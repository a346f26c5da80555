"""The kernels of causal linear attention, beyond what the generated suite asks of all."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from vitarium.ops import causal_linear_attention  # noqa: E402
from vitarium.ops.kernels import causal_linear as kernels  # noqa: E402
from vitarium.ops.kernels import launch, rows  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


def draw(tokens: int, dims: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value of one head, as the first half of wider ones."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(1, tokens, 1, 2 * dim, generator=generator).to(dtype)[..., :dim]
        for dim in (dims[0], *dims)
    ]


def results(name: str, tensors: list[Tensor], decay: float | None, dtype: torch.dtype) -> list:
    """Output and gradients, in float64."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    output = causal_linear_attention(*leaves, decay=decay, scale=0.3, backend=name)
    grads = torch.autograd.grad(output.square().sum(), leaves)
    return [tensor.double() for tensor in (output, *grads)]


def assert_exact(tensors: list[Tensor], decay: float | None, tolerance: float) -> None:
    """The kernels' results against the definition in float64, relative to the largest."""
    found = results("triton", tensors, decay, tensors[0].dtype)
    for ours, exact in zip(found, results("reference", tensors, decay, torch.float64)):
        atol = tolerance * exact.abs().max().item()
        torch.testing.assert_close(ours, exact, rtol=0, atol=atol)


@interpreted_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_views(dtype: torch.dtype) -> None:
    assert_exact(draw(70, (16, 48), dtype), 0.9, 2**-5)


@interpreted_only
def test_heads_in_parts() -> None:
    """Output channels by several launches, each the sum of several, one of them narrow."""
    assert_exact(draw(40, (72, 40)), 0.97, 1e-6)


@interpreted_only
@pytest.mark.parametrize("decay", [None, 0.99, 0.0])
def test_segments(decay: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with programs of its own, the last one with fewer chunks."""
    monkeypatch.setattr(kernels, "CHUNKS", 2)
    launched = []

    def count(kernel, programs, *args, **kwargs):
        launched.append((kernel.__name__, programs))
        return launch_kernel(kernel, programs, *args, **kwargs)

    launch_kernel = launch.launch
    monkeypatch.setattr(launch, "launch", count)
    assert_exact(draw(32 * 7 - 5, (16, 16)), decay, 1e-6)
    assert launched == [("state_kernel", 2), ("attend_kernel", 3)] * 4


@interpreted_only
def test_large_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets of 64 bits change nothing where 32 suffice."""
    tensors = draw(40, (16, 16))
    expected = results("triton", tensors, 0.9, torch.float32)
    rows._told.cache_clear()
    monkeypatch.setattr(rows, "LARGEST_OFFSET", 0)
    try:
        large = results("triton", tensors, 0.9, torch.float32)
    finally:
        rows._told.cache_clear()
    for found, want in zip(large, expected):
        assert torch.equal(found, want)


@pytest.mark.parametrize("element_size", [2, 4])
def test_every_width_has_a_configuration(element_size: int) -> None:
    """Chunks and widths that matrix products take."""
    for width, (block, values, *_) in kernels._SIZES[element_size].items():
        for size in (width, block, values):
            assert size >= 16 and size & (size - 1) == 0
