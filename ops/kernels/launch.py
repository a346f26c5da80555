"""What all launchers share: the launch itself, and arguments that follow from the tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
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


def widths(query: Tensor, value: Tensor) -> dict[str, Any]:
    """Compile-time arguments for heads of query's and value's width and their products."""
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    return {
        "D": head_dim,
        "VALUE_D": value_dim,
        # Matrix products of less than 16 do not exist.
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_VALUE_D": max(16, triton.next_power_of_2(value_dim)),
        # Not `allow_tf32`: reading that raises once a program has set `fp32_precision`.
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "UPCAST": TRITON_INTERPRET and query.dtype == torch.bfloat16,
    }


def large(*tensors: Tensor) -> bool:
    """Whether an offset within one image of any of the tensors exceeds 32 bits."""
    return any(
        sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:])) >= 1 << 31
        for t in tensors
    )


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
