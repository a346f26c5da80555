"""The kernels of bi-level routing attention, beyond what the generated suite asks of all."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from vitarium.benchmarks.kernel_compiler import compiling  # noqa: E402
from vitarium.ops import bilevel_routing_attention  # noqa: E402
from vitarium.ops.kernels import bilevel_routing as kernels  # noqa: E402
from vitarium.ops.kernels import rows  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="needs the compiler")


def tensors(
    size: tuple[int, int], heads: int, dims: tuple[int, int], regions: int, topk: int,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:  # fmt: skip
    """Query, key, value, routing and weights, the maps as the first half of wider heads."""
    generator = torch.Generator().manual_seed(3)
    maps = [
        torch.randn(1, *size, heads, 2 * dim, generator=generator).to(dtype)[..., :dim]
        for dim in (dims[0], *dims)
    ]
    table = torch.randint(regions, (1, regions, topk), generator=generator)
    return [*maps, table, torch.rand(table.shape, generator=generator).to(dtype)]


@interpreted_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_views(dtype: torch.dtype) -> None:
    query, key, value, routing, weights = tensors((2, 6), 2, (16, 48), 2, 2, dtype)
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


@interpreted_only
def test_large_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets of 64 bits change nothing where 32 suffice."""
    query, key, value, routing, weights = tensors((2, 6), 1, (16, 16), 2, 2)

    def run() -> tuple[Tensor, ...]:
        args = (query, key, value, weights, routing)
        output, logsumexp = kernels.forward(*args, [1, 2], 0.3)
        return output, *kernels.backward(output, *args, output, logsumexp, [1, 2], 0.3, True)[:4]

    expected = run()
    rows._told.cache_clear()
    monkeypatch.setattr(rows, "LARGEST_OFFSET", 0)
    try:
        large = run()
    finally:
        rows._told.cache_clear()
    for found, want in zip(large, expected):
        assert torch.equal(found, want)


@interpreted_only
@pytest.mark.parametrize("size", [(10, 12), (36, 1), (3, 22)])
def test_regions_of_several_tiles(size: tuple[int, int]) -> None:
    """Both of queries and of keys, some tiles cut off."""
    query, key, value, routing, _ = tensors((size[0], 2 * size[1]), 1, (16, 16), 2, 2)
    results = []
    for name in ("triton", "reference"):
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        output = bilevel_routing_attention(*leaves, routing, (1, 2), backend=name)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_tiles_cover_a_region_with_the_fewest() -> None:
    for tokens in (16, 64):
        for height in range(1, 20):
            for width in range(1, 20):
                down, across = kernels.cut((height, width), tokens)
                assert down & (down - 1) == across & (across - 1) == 0
                whole = down >= height and across >= width
                assert down * across == tokens or (whole and down * across < tokens)
                fewest = min(
                    math.ceil(height / (tokens >> power)) * math.ceil(width / (1 << power))
                    for power in range(tokens.bit_length())
                )
                assert math.ceil(height / down) * math.ceil(width / across) == fewest


def test_views() -> None:
    """Maps whose tokens lie at equal distances are read in place, others copied."""
    qkv = torch.randn(2, 4, 5, 3, 2, 8)
    for part in qkv.unbind(3):
        found, token, head = rows.view(part)
        assert found is part and (token, head) == (48, 8)
    for other in (qkv[:, :3, :, 0], qkv[:, :, 1:, 0], qkv[..., 0, :, ::2], qkv[:, :, :, 0].mT):
        found, token, head = rows.view(other)
        assert found.is_contiguous() and torch.equal(found, other)
        assert (token, head) == (found.stride(2), found.stride(3))
    column = torch.randn(2, 5, 1, 2, 8)[:, :, :, :1]
    found, token, _ = rows.view(column)
    assert found is column and token == 16


@compiled_only
def test_other_sizes_of_map_compile_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = []
    with compiling(90) as compiled:
        for batch, size in ((1, (10, 12)), (2, (14, 12)), (3, (12, 14))):
            query = torch.empty(batch, *size, 2, 32, device="meta", dtype=torch.bfloat16)
            routing = torch.empty(batch, 4, 3, device="meta", dtype=torch.int64)
            args = (query, query, query, None, routing)
            output, logsumexp = kernels.forward(*args, [2, 2], 0.3)
            kernels.backward(output, *args, output, logsumexp, [2, 2], 0.3, False)
            found.append([binary.hash for _, _, binary in compiled])
            compiled.clear()
    assert len(found[0]) == 3
    assert found[0] == found[1] == found[2]
