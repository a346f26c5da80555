"""Compiles the kernels ahead of time and reads the binaries: no spills, within limits."""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path

import pytest
import torch

from vitarium.benchmarks import kernel_sheet
from vitarium.benchmarks.kernel_compiler import Row, compile_case, compiling
from vitarium.ops import OPERATORS, Case
from vitarium.ops.dispatch import Operator
from vitarium.ops.kernels.tiles import KERNELS, tiles
from vitarium.ops.windows import Block, Window

SHEET = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels.json"
PATTERNS = (Window(7, 1, 1, False), Block(7, 1, 3, 0, 0), Block(2, 1, 0, 3, 0))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_tiles_fit_matrix_products(rank: int, element_size: int, kernel: str) -> None:
    for head_dim, pattern in itertools.product((1, 16, 33, 80, 129, 256), PATTERNS):
        for lengths in (None, (5,) * rank):
            config = tiles(
                rank, head_dim, (pattern,) * rank,
                kernel=kernel, element_size=element_size, lengths=lengths,
            )  # fmt: skip
            for tile in (config.query, config.key):
                tokens = torch.Size(tile).numel()
                assert len(tile) == rank
                assert tokens >= 16 and tokens & (tokens - 1) == 0


# Windows and neighborhoods have the same kernels, for maps of the same kinds: every other launch of
# either is compiled, of one the even ones, or with VITARIUM_ALL_KERNELS=1 all.
SKIPPED = {"window_attention": 1, "neighborhood_attention": 0}
CASES = [
    pytest.param(operator, number, case, id=f"{operator.name}-{case.note}")
    for operator in OPERATORS.values()
    for number, case in enumerate(operator.launches)
    if SKIPPED.get(operator.name) != number % 2 or os.environ.get("VITARIUM_ALL_KERNELS") == "1"
]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")
@pytest.mark.parametrize(("operator", "number", "case"), CASES)
def test_every_configuration_compiles_well(
    operator: Operator, number: int, case: Case, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No spills, shared memory within limits, tensor cores at work; and no worse than the sheet.

    Every case in one data type for one of the targets, in turn: all together take too long.
    """
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    capabilities = list(kernel_sheet.TARGETS.values())
    dtype = kernel_sheet.DTYPES[number % len(kernel_sheet.DTYPES)]
    rows = compile_case(operator, case, dtype, capabilities[number % len(capabilities)])
    assert rows
    faults = [f"{row}: {fault}" for row in rows for fault in kernel_sheet.faults(row)]
    assert not faults, "\n".join(faults)
    assert all(0 < row.registers <= 255 for row in rows)
    if rows[0].key[:4] in _held():  # what the sheet lacks is said once, by the test below
        complaints = kernel_sheet.compare(rows, _sheet())
        assert not complaints, "\n".join(complaints)


@functools.cache
def _sheet() -> list[Row]:
    return kernel_sheet.rows(SHEET)


@functools.cache
def _held() -> set[kernel_sheet.Call]:
    return {row.key[:4] for row in _sheet()}


def test_the_sheet_is_of_every_configuration() -> None:
    lacking = set(kernel_sheet.calls()) - _held()
    assert not lacking, f"{len(lacking)} are not in the sheet; run `vitarium bench kernels`"
    assert _held() <= set(kernel_sheet.calls())
    assert len({row.triton for row in _sheet()}) == 1
    assert not [f"{row}: {fault}" for row in _sheet() for fault in kernel_sheet.faults(row)]


@pytest.mark.parametrize(
    ("arguments", "kernels"),
    [
        ({}, ["window_kernels", "window_kernels"]),
        ({"heads": 3}, ["window_kernels", "local_backward", "local_backward", "local_backward"]),
        ({"window_size": 9}, ["local_forward", *["local_backward"] * 3]),
        ({"halo": 1}, ["local_forward", *["local_backward"] * 3]),
        ({"spatial": (9,), "window_size": 40}, ["window_kernels", "window_kernels"]),
        ({"window_size": 2}, ["window_kernels", "window_kernels"]),
        ({"spatial": (9, 9, 9), "window_size": 2}, ["local_forward", *["local_backward"] * 3]),
    ],
)
def test_small_windows_have_kernels_of_their_own(
    arguments: dict, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from vitarium.ops.kernels import launch, local, window

    call = {"spatial": (14, 14), "window_size": 7, "heads": 1, "halo": 0, **arguments}
    rank = len(call["spatial"])
    key = torch.empty(2, *call["spatial"], 1, 32, device="meta")
    query = key.expand(*key.shape[:-2], call["heads"], 32)
    windows = (Block(call["window_size"], 1, 1, call["halo"], 0),) * rank
    bias = torch.empty(call["heads"], *(2 * w.reach + 1 for w in windows), device="meta")
    found = []
    monkeypatch.setattr(window, "capability", lambda: 90)
    monkeypatch.setattr(
        launch, "recorder", lambda kernel, *_: found.append(kernel.__module__.rpartition(".")[2])
    )
    output, logsumexp = local.forward(query, key, key, bias, windows, 0.2)
    assert output.shape == query.shape and logsumexp.shape == query.shape[:-1]
    grads = local.backward(output, query, key, key, bias, output, logsumexp, windows, 0.2, True)
    assert [grad.shape for grad in grads] == [t.shape for t in (query, key, key, bias)]
    assert found == kernels


@pytest.mark.parametrize(
    ("window_size", "element_size", "patch"),
    [
        ((2, 2), 2, (8, 8)),
        ((2, 2), 4, (4, 8)),
        ((1, 3), 2, (8, 6)),
        ((3, 2), 4, (3, 8)),
        ((8, 1), 4, (8, 1)),
        ((7, 7), 2, (7, 7)),
        ((2,), 2, (64,)),
    ],
)
def test_tiny_windows_share_a_tile(
    window_size: tuple[int, ...], element_size: int, patch: tuple[int, ...]
) -> None:
    pytest.importorskip("triton")
    from vitarium.ops.kernels import window

    windows = tuple(Block(size, 1, size // 2, 0, 0) for size in window_size)
    found = window._patch(windows, element_size)
    assert tuple(axis.window_size for axis in found) == patch
    assert [axis.lead for axis in found] == [axis.lead for axis in windows]
    tokens, columns = window._tile(found)
    assert tokens == (window.PATCH[element_size] if found != windows else max(16, tokens))
    assert columns >= patch[-1]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")
def test_maps_of_all_sizes_share_kernels(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training at several scales compiles the kernels of windows once."""
    pytest.importorskip("triton")
    from vitarium.ops.kernels import local

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bias = torch.empty(3, 13, 13, device="meta")
    windows = (Block(7, 1, 3, 0, 0),) * 2
    with compiling(90) as compiled:
        for batch, height, width in ((2, 14, 14), (3, 17, 23), (16, 32, 48), (1, 9, 1)):
            query = torch.empty(batch, height, width, 3, 32, device="meta", dtype=torch.bfloat16)
            saved = local.forward(query, query, query, bias, windows, 0.2)
            local.backward(query, query, query, query, bias, *saved, windows, 0.2, True)
    assert len(compiled) == 8
    assert len({id(binary) for _, _, binary in compiled}) == 2


def test_every_operator_with_kernels_has_launches() -> None:
    for operator in OPERATORS.values():
        assert bool(operator.launches) == ("triton" in operator.implementations), operator.name


def test_products_follow_fp32_precision() -> None:
    """Also where a program sets it, after which PyTorch's older flag may not be read."""
    pytest.importorskip("triton")
    from vitarium.ops.kernels.launch import widths

    query = torch.empty(1, 4, 1, 32)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            matmul.fp32_precision = precision
            assert widths(query, query)["PRECISION"] == precision
    finally:
        matmul.fp32_precision = before
