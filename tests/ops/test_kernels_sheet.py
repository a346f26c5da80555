"""Compiles the kernels ahead of time and reads the binaries: no spills, within limits."""

from __future__ import annotations

import os

import pytest
import torch

from vitarium.ops.kernels.tiles import HEAD_DIMS, KERNELS, tiles

WINDOW = (7, 1, 1, False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_tiles_fit_matrix_products(rank: int, element_size: int, kernel: str) -> None:
    for head_dim in (1, 16, 33, 80, 129, 256):
        for lengths in (None, (5,) * rank):
            config = tiles(
                rank, head_dim, (WINDOW,) * rank,
                kernel=kernel, element_size=element_size, lengths=lengths,
            )  # fmt: skip
            for tile in (config.query, config.key):
                tokens = torch.Size(tile).numel()
                assert len(tile) == rank
                assert tokens >= 16 and tokens & (tokens - 1) == 0


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_configuration_compiles_well(
    head_dim: int, capability: int, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from vitarium.ops.kernels import sheet

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    chosen = [call for call in sheet.calls() if call.head_dim == head_dim]
    # The call that needs most registers, and the usual one in half precision, for each target;
    # tiles of other shapes and equal size compile alike: for one of the targets.
    turn = sheet.CAPABILITIES.index(capability) + HEAD_DIMS.index(head_dim)
    usual = sheet.Call(2, head_dim)
    chosen = [
        call
        for number, call in enumerate(chosen)
        if call.has_bias or call == usual or (number + turn) % 3 == 0
    ]
    rows = sheet.sheet(chosen, [capability])
    assert {row.kernel for row in rows} == {
        "forward_kernel", "query_kernel", "key_value_kernel", "bias_kernel",
    }  # fmt: skip
    faults = [
        f"{row.kernel} {row.call.dtype} {row.query_tile} {row.key_tile}: {fault}"
        for row in rows
        for fault in row.faults
    ]
    assert not faults, "\n".join(faults)
    assert all(0 < row.registers <= 255 for row in rows)
