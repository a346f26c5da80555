"""The Triton kernels of windows that fit one tile: how they divide the map, and who walks where.

On a CUDA device these run as they are. Without one they are skipped here, and
`test_kernels_interpreter.py` runs them in Triton's interpreter.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from vitarium.ops import window_attention  # noqa: E402
from vitarium.ops.kernels import window as launcher  # noqa: E402
from vitarium.ops.kernels.window_kernels import axis_tokens  # noqa: E402
from vitarium.ops.windows import Block  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs CUDA or TRITON_INTERPRET=1"),
    *([pytest.mark.gpu] if CUDA else []),
]


@triton.jit
def _axis_kernel(
    result, length, size, dilation, lead, wrap, window,
    SHIFTED: tl.constexpr, PATCH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tokens of all places (tile, residue, index in a tile)."""
    place = tl.arange(0, BLOCK)
    index = place % COLUMNS
    residue = place // COLUMNS % dilation
    tile = place // COLUMNS // dilation
    axis = (length, size, dilation, lead, wrap, window)
    token, exists, part = axis_tokens(tile, index, residue, axis, SHIFTED, PATCH)
    tl.store(result + place, tl.where(exists, token, -1))
    tl.store(result + BLOCK + place, part)


@pytest.mark.parametrize(("size", "windows"), [(1, 1), (3, 1), (4, 1), (1, 4), (2, 2)])
def test_windows_of_an_axis(size: int, windows: int) -> None:
    """Every token lies in one tile, with those that it sees and no others in its part."""
    columns = 4
    for dilation, shift, length in itertools.product((1, 2, 3), range(size), (1, 2, 5, 8, 9, 12)):
        if dilation > length:
            continue
        window = Block(size, dilation, shift, 0, 0)
        patch = window._replace(window_size=size * windows, shift=-window.lead % (size * windows))
        tiles, first, alike, wrap = launcher._axis(length, patch)
        block = triton.next_power_of_2(tiles * dilation * columns)
        result = torch.empty(2, block, dtype=torch.int32, device=DEVICE)
        axis = (length, size * windows, dilation, window.lead, wrap, size)
        _axis_kernel[(1,)](result, *axis, window.lead > 0, windows > 1, columns, block)
        tokens, parts = result[:, : tiles * dilation * columns].cpu().view(2, -1, dilation, columns)
        assert sorted(tokens[tokens >= 0].tolist()) == list(range(length))
        for tile, residue in itertools.product(range(tiles), range(dilation)):
            here = [
                (token, part)
                for token, part in zip(
                    tokens[tile, residue].tolist(), parts[tile, residue].tolist()
                )
                if token >= 0
            ]
            n = -(-(length - residue) // dilation)
            for token, part in here:
                assert token % dilation == residue
                seen = {other // dilation for other, its in here if its == part}
                assert seen == set(window.keys_seen(token // dilation, n))
            if first <= tile < first + alike:
                full = [tile * size * windows - window.lead + i for i in range(size * windows)]
                assert [token // dilation for token, _ in here] == full


def _call(
    spatial: tuple[int, ...], layout: str, dtype: torch.dtype, **kwargs: Any
) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """Tensors, other arguments, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    kwargs = {"batch": 3, "heads": (2, 2), "dims": (16, 16), "bias": True} | kwargs
    batch, heads, dims = kwargs.pop("batch"), kwargs.pop("heads"), kwargs.pop("dims")

    def draw(heads: int, dim: int) -> Tensor:
        if layout == "cropped":  # images do not lie one behind the other
            larger = (batch, spatial[0] + 1, *spatial[1:], heads, dim)
            return torch.randn(larger, generator=generator)[:, 1:].to(DEVICE, dtype)
        if layout == "channels first":
            drawn = torch.randn(batch, heads, dim, *spatial, generator=generator)
            return drawn.to(DEVICE, dtype).movedim((1, 2), (-2, -1))
        drawn = torch.randn(batch, *spatial, 3, heads, dim, generator=generator)
        return drawn.to(DEVICE, dtype).select(-3, 1)

    tensors = {
        "query": draw(heads[0], dims[0]),
        "key": draw(heads[1], dims[0]),
        "value": draw(heads[1], dims[1]),
    }
    if kwargs.pop("bias"):
        sizes = kwargs["window_size"]
        sizes = sizes if isinstance(sizes, tuple) else (sizes,) * len(spatial)
        table = torch.randn(heads[0], *(2 * size - 1 for size in sizes), generator=generator)
        tensors["bias"] = table.to(DEVICE)
    return tensors, kwargs, draw(heads[0], dims[1])


def _run(call: tuple, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors, kwargs, grad = call
    leaves = {}
    for name, tensor in tensors.items():
        kind = torch.promote_types(dtype, torch.float32) if name == "bias" else dtype
        leaves[name] = tensor.detach().to(kind).requires_grad_()
    output = window_attention(**leaves, **kwargs, backend=backend)
    grads = torch.autograd.grad(output, list(leaves.values()), grad.to(dtype))
    return {"output": output.detach(), **dict(zip(leaves, grads))}


def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results begin as NaN, so that what nobody writes is found."""
    allocate = Tensor.new_empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        return allocate(*args, **kwargs).fill_(math.nan)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


CALLS = {
    # Note: (map, layout, arguments). Walks of several steps need few programs: see below.
    "whole windows, images in one walk": ((8, 8), "fused", {"window_size": 4}),
    "whole windows, images apart": ((8, 4), "cropped", {"window_size": 4}),
    "shifted windows, one image": ((12, 6), "fused", {"window_size": 3, "shift": 1, "batch": 1}),
    "ragged and shifted": ((11, 5), "fused", {"window_size": (3, 4), "shift": (1, 2), "batch": 2}),
    "cut at the end only": ((10, 6), "channels first", {"window_size": (3, 6), "batch": 2}),
    "dilated grid": ((6, 9), "fused", {"window_size": 3, "dilation": (2, 3)}),
    "grid of unequal classes": ((7, 5), "fused", {"window_size": (4, 2), "dilation": (2, 3)}),
    "windows of 5, in rows of 5": ((5, 10), "fused", {"window_size": 5, "dims": (20, 24)}),
    "groups of heads": ((4, 5), "fused", {"window_size": 4, "shift": 1, "heads": (2, 1)}),
    "a row": ((23,), "fused", {"window_size": 9, "shift": 4, "scale": -0.4}),
    "without bias": ((6, 8), "fused", {"window_size": (2, 4), "bias": False, "scale": 0.0}),
}


@pytest.mark.parametrize("programs", [2, 1000])
@pytest.mark.parametrize("note", CALLS)
def test_walks(note: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spatial, layout, kwargs = CALLS[note]
    dtype = torch.float16 if programs == 2 else torch.float32
    monkeypatch.setattr(launcher, "PROGRAMS", {"forward": programs, "backward": programs})
    launcher._geometry.cache_clear()
    call = _call(spatial, layout, dtype, **kwargs)
    with monkeypatch.context() as patch:
        _poisoned(patch)
        ours = _run(call, "triton", dtype)
    launcher._geometry.cache_clear()
    exact, plain = _run(call, "reference", torch.float64), _run(call, "reference", dtype)
    for name, expected in exact.items():
        assert ours[name].shape == expected.shape
        error = (ours[name].double() - expected).abs().max().item()
        allowed = 2 * (plain[name].double() - expected).abs().max().item()
        allowed += 16 * torch.finfo(torch.float32).eps * max(1.0, expected.abs().max().item())
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("note", ["ragged and shifted", "whole windows, images in one walk"])
def test_large_offsets_and_repeated_runs(note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits do not depend on the run, nor on whether offsets have 64 of them."""
    spatial, layout, kwargs = CALLS[note]
    call = _call(spatial, layout, torch.float32, **kwargs)
    expected, again = (_run(call, "triton", torch.float32) for _ in range(2))
    monkeypatch.setattr(launcher, "large", lambda *tensors: True)
    large = _run(call, "triton", torch.float32)
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor), name
        assert torch.equal(large[name], tensor), name
