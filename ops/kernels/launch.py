"""What all launchers share: the launch itself, and arguments that follow from the tensors."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vitarium.ops.dispatch import TRITON_INTERPRET

AXES = 3
SMALLEST_SCALE = 1e-37  # a smaller one is no normal float32 number: it counts as zero

# Called in place of a launch with (kernel, arguments, options), for ahead-of-time compilation.
recorder: Callable[[Any, dict[str, Any], dict[str, Any]], None] | None = None


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    *,
    num_warps: int,
    num_stages: int,
    max_registers: int | None = None,
    **arguments: Any,
) -> None:
    """Launch a one-dimensional grid of a kernel on the device of its tensors."""
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": True,
        "maxnreg": max_registers,
    }
    if recorder is not None:
        recorder(kernel, arguments, options)
        return
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[(programs,)](**arguments, **options)


def capability() -> int:
    """Compute capability that kernels are compiled for, 90 for 9.0; that too in the interpreter."""
    if TRITON_INTERPRET:
        return 90
    arch = triton.runtime.driver.active.get_current_target().arch
    return arch if isinstance(arch, int) else 80  # not of NVIDIA


def widths(query: Tensor, value: Tensor) -> dict[str, Any]:
    """Compile-time arguments for heads of query's and value's width and their products."""
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    return {
        "D": head_dim,
        "VALUE_D": value_dim,
        # The next powers of two; matrix products of less than 16 do not exist. (Triton's function
        # for this takes a good part of a launch.)
        "BLOCK_D": max(16, 1 << (head_dim - 1).bit_length()),
        "BLOCK_VALUE_D": max(16, 1 << (value_dim - 1).bit_length()),
        # Not `allow_tf32`: reading that raises once a program has set `fp32_precision`.
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "UPCAST": TRITON_INTERPRET and query.dtype == torch.bfloat16,
    }


def large(*tensors: Tensor) -> bool:
    """Whether an offset within one image of any of the tensors exceeds 32 bits."""
    return any(_reach(t.shape, t.stride()) >= 1 << 31 for t in tensors)


@functools.lru_cache(maxsize=1024)
def _reach(shape: Sequence[int], stride: Sequence[int]) -> int:
    return sum((size - 1) * step for size, step in zip(shape[1:], stride[1:]))


def positive_scale(scale: float) -> tuple[float, float]:
    """The factor that moves into the query, and the positive scale that kernels take."""
    if abs(scale) < SMALLEST_SCALE:
        return 0.0, 1.0
    return math.copysign(1.0, scale), abs(scale)


def three(values: tuple[Any, ...], fill: Any) -> tuple[Any, ...]:
    """`values` with leading entries added for the axes that a map of lower rank lacks."""
    return (fill,) * (AXES - len(values)) + tuple(values)


def map_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of `(B, *spatial, heads, channels)` as (batch, z, y, x, head, channel)."""
    batch, *spatial, head, channel = tensor.stride()
    return (batch, *three(tuple(spatial), 0), head, channel)


def row_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of `(B, *spatial, heads)` as (batch, z, y, x, head)."""
    return map_strides(tensor[..., None])[:-1]


def diagonal_sums(sums: Tensor, first: Sequence[int], reach: Sequence[int]) -> Tensor:
    """Sums of pairs of query and key over all pairs at equal distance.

    Args:
        sums: `(heads, queries, keys, queries, keys, ...)`, two dimensions for every axis.
        first: of every axis, the place of the first key, counted from the first query.
        reach: of every axis, the largest distance; other pairs must hold zero.

    Returns:
        `(heads, 2 * reach + 1, ...)`.
    """
    queries, keys = sums.shape[1::2], sums.shape[2::2]
    # There are keys in reach of a query that no pair is of: they are added as zeros.
    missing: list[int] = []
    for axis, begin in enumerate(first):
        end = queries[axis] + reach[axis]
        missing = [max(0, reach[axis] + begin), max(0, end - begin - keys[axis]), 0, 0, *missing]
    sums = F.pad(sums, missing) if any(missing) else sums
    # Entry t of an axis is a diagonal, key - query = t - reach: one step along both dimensions.
    shape, stride, start = [sums.shape[0]], [sums.stride(0)], 0
    for axis, begin in enumerate(first):
        key_stride = sums.stride(2 + 2 * axis)
        shape += [queries[axis], 2 * reach[axis] + 1]
        stride += [sums.stride(1 + 2 * axis) + key_stride, key_stride]
        start += max(0, -begin - reach[axis]) * key_stride
    return sums.as_strided(shape, stride, start).sum([1 + 2 * axis for axis in range(len(first))])
