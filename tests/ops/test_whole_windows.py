"""Windows that fill the map: the portable path's own way, and how projections lie in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitarium.ops import (
    fused_windows,
    neighborhood_attention,
    whole_windows,
    window_attention,
)
from vitarium.ops.mixer import qkv_heads
from vitarium.ops.packed import joint, packed
from vitarium.ops.tiles import Axis
from vitarium.ops.windows import Block, tiles_for


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.data())
def test_parts_of_tiles_cover_an_axis_once(windows: int, size: int, dilation: int, data) -> None:
    block = Block(size, dilation, data.draw(st.integers(0, size - 1)), 0, 0)
    length = windows * size * dilation
    (axis,) = tiles_for((length,), (block,), "whole")
    assert isinstance(axis, Axis) and axis.fills(False)
    tokens = {}
    for first, tile, tiles, offset, count in axis.parts():
        for t in range(tiles):
            for p in range(count):
                for group in range(dilation):
                    place = (group, tile + t, offset + p)
                    assert place not in tokens
                    tokens[place] = first + (t * axis.tile + p) * dilation + group
    assert sorted(tokens.values()) == list(range(length))
    for (group, tile, _), token in tokens.items():
        others = {t for (g, i, _), t in tokens.items() if (g, i) == (group, tile)}
        first = (token // dilation - block.shift) // size
        same = {
            t
            for t in range(length)
            if t % dilation == group and (t // dilation - block.shift) // size == first
        }
        assert same <= others  # a window lies in one tile


@pytest.mark.parametrize("chunk", [1, 1 << 14, 1 << 22])
@pytest.mark.parametrize("shift", [0, (3, 1)])
@pytest.mark.parametrize("dilation", [1, (1, 3)])
@pytest.mark.parametrize("side_by_side", [True, False])
def test_pieces_of_work(
    monkeypatch: pytest.MonkeyPatch, chunk: int, shift: int, dilation: int, side_by_side: bool
) -> None:
    """Few windows at a time or all at once, of one projection or of three tensors."""
    monkeypatch.setattr(whole_windows, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 12, 3, 2, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(2, 7, 7, generator=generator, dtype=torch.float64)
    grad = torch.randn(3, 8, 12, 2, 5, generator=generator, dtype=torch.float64)
    for tensor in (x, bias):
        tensor.requires_grad_()

    def run(backend: str) -> list[Tensor]:
        parts = list(x.unbind(3))
        if not side_by_side:
            parts = [part.clone() for part in parts]
        assert (packed(*parts) is not None) == side_by_side
        output = window_attention(
            *parts, 4, shift=shift, dilation=dilation, bias=bias, backend=backend
        )
        return [output, *torch.autograd.grad(output, (x, bias), grad)]

    for found, expected in zip(run("torch"), run("reference")):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_some_gradients() -> None:
    """Tensors that need none get none."""
    query, key, value = (torch.randn(1, 4, 4, 2, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(2, 7, 7, dtype=torch.float64)
    tensors = [query, key, value, bias]
    for chosen in tensors:
        for tensor in tensors:
            tensor.requires_grad_(tensor is chosen)
        results = []
        for backend in ("torch", "reference"):
            output = window_attention(*tensors[:3], 4, bias=bias, backend=backend)
            results.append(torch.autograd.grad(output.square().sum(), chosen)[0])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_a_neighborhood_as_wide_as_the_map_is_a_window() -> None:
    tensors = [torch.randn(2, 7, 7, 2, 8, dtype=torch.float64) for _ in range(3)]
    torch.testing.assert_close(
        neighborhood_attention(*tensors, 7), window_attention(*tensors, 7), rtol=1e-12, atol=0
    )


def test_what_is_kept_for_the_backward() -> None:
    """Windows and weights, not the map as well; the way past the custom operator keeps no less."""
    qkv = torch.randn(2, 14, 14, 3, 4, 32, requires_grad=True)
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        window_attention(*qkv.unbind(3), 7)
    tokens = 2 * 14 * 14 * 4
    assert sum(sizes) == tokens * (3 * 32 + 49)


@pytest.mark.parametrize("together", [True, False])
def test_gradients_of_a_projection(together: bool) -> None:
    """Put together, or found together; also where only some parts are used, and twice over."""
    linear = nn.Linear(8, 24, dtype=torch.float64)
    x = torch.randn(2, 3, 3, 8, dtype=torch.float64, requires_grad=True)
    query, key, value = qkv_heads(linear, x, 2)
    whole = torch.randn(2, 3, 3, 3, 2, 4, dtype=torch.float64)
    grads = whole.unbind(-3) if together else [part.clone() for part in whole.unbind(-3)]
    assert (joint(*grads) is not None) == together
    (found,) = torch.autograd.grad((query, key, value), x, grads, retain_graph=True)
    (expected,) = torch.autograd.grad(linear(x), x, whole.flatten(-3))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad(key, x, grads[1], retain_graph=True)
    only = torch.zeros_like(whole)
    only[..., 1, :, :] = whole[..., 1, :, :]
    (expected,) = torch.autograd.grad(linear(x), x, only.flatten(-3))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = linear.weight
    (first,) = torch.autograd.grad((query * key * value).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    q, k, v = linear(x).unflatten(-1, (3, 2, 4)).unbind(-3)
    (first,) = torch.autograd.grad((q * k * v).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), weight)
    torch.testing.assert_close(second, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_does_not_depend_on_who_follows(dtype: torch.dtype) -> None:
    """The same with and without a backward to come: in half precision to the last bit.

    In float32 PyTorch's fused attention computes what no backward follows.
    """
    qkv = torch.randn(2, 14, 14, 3, 2, 16, dtype=dtype, requires_grad=True)
    bias = torch.randn(2, 13, 13, dtype=dtype)
    for shift in (0, 3):
        output = window_attention(*qkv.unbind(3), 7, shift=shift, bias=bias)
        with torch.no_grad():
            plain = window_attention(*qkv.unbind(3), 7, shift=shift, bias=bias)
        assert output.requires_grad
        tolerance = 1e-5 if dtype == torch.float32 else 0
        torch.testing.assert_close(output, plain, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("chunk", [1, 1 << 14, 1 << 22])
@pytest.mark.parametrize("shift", [0, (3, 1)])
@pytest.mark.parametrize("dilation", [1, (1, 3)])
@pytest.mark.parametrize("side_by_side", [True, False])
def test_fused_pieces_of_work(
    monkeypatch: pytest.MonkeyPatch, chunk: int, shift: int, dilation: int, side_by_side: bool
) -> None:
    """The fused attention for a few windows at a time or all at once, with and without a bias."""
    monkeypatch.setattr(fused_windows, "CHUNK", chunk)
    fused_windows._pieces.cache_clear()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 12, 3, 2, 5, generator=generator)
    parts = [part if side_by_side else part.clone() for part in x.unbind(3)]
    for bias in (None, torch.randn(2, 7, 7, generator=generator)):

        def run(*tensors: Tensor | None, backend: str) -> Tensor:
            *parts, bias = tensors
            return window_attention(
                *parts, 4, shift=shift, dilation=dilation, bias=bias, backend=backend
            )

        found = run(*parts, bias, backend="torch")
        exact = [None if t is None else t.double() for t in (*parts, bias)]
        expected = run(*exact, backend="reference").float()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    fused_windows._pieces.cache_clear()
