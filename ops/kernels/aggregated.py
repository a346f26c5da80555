"""Launches the kernels of aggregated attention, on arguments that the operator has checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from vitarium.ops.kernels import aggregated_backward, aggregated_forward
from vitarium.ops.kernels.launch import large, launch, map_strides, row_strides, widths

# Sums over queries and over images are split among this many programs, as far as their partial sums
# stay this small. Constants, so that the result does not depend on a device.
PROGRAMS = 1024
PARTIAL_BYTES = 64 << 20

# Sides of a tile of the map by its number of tokens.
_TILES = {16: (1, 4, 4), 32: (1, 4, 8), 64: (1, 8, 8)}

# (kernel, element size) -> by padded head_dim: queries, pooled keys, num_warps, num_stages. Read
# off ahead-of-time compilation (`sheet.py`) for compute capability 8.0, 9.0 and 10.0: the largest
# tiles without register spills.
_SIZES: dict[tuple[str, int], dict[int, tuple[int, int, int, int]]] = {
    ("forward", 2): {
        32: (64, 32, 4, 2),
        64: (64, 32, 4, 2),
        128: (32, 32, 4, 2),
        256: (32, 32, 8, 1),
    },
    ("forward", 4): {
        32: (32, 32, 4, 1),
        64: (32, 32, 4, 1),
        128: (32, 32, 8, 1),
        256: (16, 16, 8, 1),
    },
    ("query", 2): {
        32: (64, 32, 4, 2),
        64: (32, 32, 4, 2),
        128: (32, 32, 8, 2),
        256: (16, 16, 8, 1),
    },
    ("query", 4): {
        32: (32, 32, 4, 1),
        64: (32, 32, 8, 1),
        128: (16, 16, 8, 1),
        256: (16, 16, 8, 1),
    },
    ("key_value", 2): {
        32: (64, 16, 4, 2),
        64: (64, 16, 8, 2),
        128: (32, 16, 8, 1),
        256: (16, 16, 8, 1),
    },
    ("key_value", 4): {
        32: (32, 16, 4, 1),
        64: (32, 16, 4, 1),
        128: (32, 16, 8, 1),
        256: (16, 16, 8, 1),
    },
    ("pooled", 2): {
        32: (32, 64, 4, 2),
        64: (32, 64, 4, 2),
        128: (32, 64, 8, 2),
        256: (32, 32, 8, 1),
    },
    ("pooled", 4): {
        32: (16, 32, 4, 1),
        64: (32, 32, 8, 1),
        128: (16, 32, 8, 1),
        256: (16, 16, 4, 1),
    },
    ("pooled_bias", 2): {
        32: (32, 32, 4, 2),
        64: (64, 64, 4, 2),
        128: (64, 32, 8, 2),
        256: (16, 16, 4, 1),
    },
    ("pooled_bias", 4): {
        32: (32, 32, 4, 1),
        64: (32, 32, 4, 1),
        128: (32, 32, 8, 1),
        256: (16, 16, 4, 1),
    },
}


def _config(kernel: str, query: Tensor, value: Tensor) -> tuple[int, int, dict[str, int]]:
    """Queries and pooled keys of a tile, and launch options."""
    rows = _SIZES[kernel, query.element_size()]
    head_dim = max(query.shape[-1], value.shape[-1])
    queries, keys, warps, stages = rows[min(d for d in rows if d >= head_dim)]
    options = {"num_warps": warps, "num_stages": stages}
    if head_dim > 32 or query.element_size() == 4:
        # The assembler would else spill a few for one more block per multiprocessor.
        options["max_registers"] = 255
    return queries, keys, options


def _counts(query: Tensor, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tiles of the map, per axis."""
    return 1, triton.cdiv(query.shape[1], tile[1]), triton.cdiv(query.shape[2], tile[2])


def _optional(
    bias: Tensor | None, pooled_bias: Tensor | None, window_weights: Tensor | None
) -> dict[str, Any]:
    return {
        "bias": bias,
        "bias_strides": (0, 0) if bias is None else bias.stride(),
        "pooled_bias": pooled_bias,
        "pooled_bias_strides": (0,) * 3 if pooled_bias is None else pooled_bias.stride(),
        "window_weights": window_weights,
        "window_weights_strides": (0,) * 6
        if window_weights is None
        else map_strides(window_weights),
    }


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    window_size: int,
    scale: float,
) -> dict[str, Any]:
    """Arguments that are the same for all kernels that take them."""
    found: dict[str, Any] = {
        "lengths": (1, *query.shape[1:3]),
        "pooled": pooled_key.shape[1],
        "scale": scale,
        "K": window_size,
        # Half precision leaves shared memory to load places of the window ahead.
        "STAGES": 3 if query.element_size() == 2 else 1,
        "GROUP": query.shape[-2] // key.shape[-2],
        **widths(query, value),
    }
    for name, tensor in (
        ("query", query),
        ("key", key),
        ("value", value),
        ("pooled_key", pooled_key),
        ("pooled_value", pooled_value),
    ):
        found[name] = tensor
        found[f"{name}_strides"] = map_strides(tensor)
    return found


def _launch(
    kernel: Any, programs: int, device: torch.device, arguments: dict[str, Any], **further: Any
) -> None:
    """Launch with those of the arguments that the kernel takes."""
    taken = {name: value for name, value in arguments.items() if name in kernel.arg_names}
    launch(kernel, programs, device, **taken, **further)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    bias: Tensor | None,
    pooled_bias: Tensor | None,
    window_weights: Tensor | None,
    window_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Aggregated attention.

    Returns:
        The output `(B, H, W, num_heads, value_dim)`, contiguous, and the base-2 log-sum-exp of the
        scores, `(B, H, W, num_heads)`, float32.
    """
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if output.numel() == 0:
        return output, logsumexp
    if pooled_bias is not None:
        pooled_bias = pooled_bias.contiguous()
    queries, keys, options = _config("forward", query, value)
    counts = _counts(query, _TILES[queries])
    _launch(
        aggregated_forward.forward_kernel,
        query.shape[0] * query.shape[-2] * math.prod(counts),
        query.device,
        {
            **_arguments(query, key, value, pooled_key, pooled_value, window_size, scale),
            **_optional(bias, pooled_bias, window_weights),
        },
        output=output,
        logsumexp=logsumexp,
        output_strides=map_strides(output),
        logsumexp_strides=row_strides(logsumexp),
        tiles=counts,
        heads=query.shape[-2],
        TILE=_TILES[queries],
        BLOCK_N=keys,
        LARGE=_large(query, key, value, output, pooled_bias, window_weights),
        ALIGN=_align(query, key, value, pooled_key, pooled_value, output),
        **options,
    )
    return output, logsumexp


def _large(*tensors: Tensor | None) -> bool:
    return large(*(tensor for tensor in tensors if tensor is not None))


def _align(*tensors: Tensor) -> int:
    """The power of two, up to 16, that divides all strides but the last of all tensors."""
    return math.gcd(16, *(stride for tensor in tensors for stride in tensor.stride()[:-1]))


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    bias: Tensor | None,
    pooled_bias: Tensor | None,
    window_weights: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    window_size: int,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the eight tensors; of the last three None where `needs` says so.

    Args:
        grad_output: `(B, H, W, num_heads, value_dim)`, any strides.
        output, logsumexp: what `forward` returned; the other arguments are what it got.
        needs: by tensor, whether its gradient is wanted.
    """
    grads = [t.new_empty(t.shape) for t in (query, key, value, pooled_key, pooled_value)]
    # Those of the optional ones whose gradient is wanted.
    for_bias, for_pooled_bias, for_weights = (
        tensor if need else None
        for tensor, need in zip((bias, pooled_bias, window_weights), needs[5:])
    )
    grad_weights = None if for_weights is None else for_weights.new_empty(for_weights.shape)
    if output.numel() == 0:
        rest = (
            None if tensor is None else torch.zeros_like(tensor)
            for tensor in (for_bias, for_pooled_bias, for_weights)
        )
        return *(grad.zero_() for grad in grads), *rest
    if pooled_bias is not None:
        pooled_bias = pooled_bias.contiguous()
    grad_query, grad_key, grad_value, *_ = grads
    device, heads, heads_kv = query.device, query.shape[-2], key.shape[-2]
    delta = torch.empty_like(logsumexp)
    arguments = {
        **_arguments(query, key, value, pooled_key, pooled_value, window_size, scale),
        **_optional(bias, pooled_bias, window_weights),
        "logsumexp": logsumexp,
        "logsumexp_strides": row_strides(logsumexp),
        "delta": delta,
        "grad_output": grad_output,
        "grad_output_strides": map_strides(grad_output),
        "LARGE": _large(query, key, value, output, grad_output, pooled_bias, window_weights),
        "ALIGN": _align(query, key, value, pooled_key, pooled_value, grad_output, *grads),
    }

    queries, keys, options = _config("query", query, value)
    counts = _counts(query, _TILES[queries])
    _launch(
        aggregated_backward.query_kernel,
        query.shape[0] * heads * math.prod(counts),
        device,
        arguments,
        grad_query=grad_query,
        grad_query_strides=map_strides(grad_query),
        grad_window_weights=grad_weights,
        grad_window_weights_strides=(0,) * 6 if grad_weights is None else map_strides(grad_weights),
        tiles=counts,
        heads=heads,
        TILE=_TILES[queries],
        BLOCK_N=keys,
        **options,
    )
    queries, _, options = _config("key_value", query, value)
    counts = _counts(query, _TILES[queries])
    programs = query.shape[0] * heads_kv * math.prod(counts)
    bias_sums = None
    if for_bias is not None:
        bias_sums = logsumexp.new_empty(programs, heads // heads_kv, window_size**2)
    _launch(
        aggregated_backward.key_value_kernel,
        programs,
        device,
        arguments,
        bias_sums=bias_sums,
        grad_key=grad_key,
        grad_key_strides=map_strides(grad_key),
        grad_value=grad_value,
        grad_value_strides=map_strides(grad_value),
        tiles=counts,
        heads=heads_kv,
        TILE=_TILES[queries],
        **options,
    )
    grads[3:] = _grad_pooled(query, pooled_key, pooled_value, arguments)
    grad_bias = grad_pooled_bias = None
    if for_bias is not None and bias_sums is not None:
        grad_bias = bias_sums.view(-1, heads, window_size**2).sum(0).to(for_bias.dtype)
    if for_pooled_bias is not None:
        grad_pooled_bias = _grad_pooled_bias(query, value, for_pooled_bias, arguments)
    return *grads, grad_bias, grad_pooled_bias, grad_weights


def _parts(programs: int, steps: int, bytes_of_part: int) -> int:
    """How many partial sums a sum of `steps` terms is split into, with `programs` for each."""
    return max(1, min(PROGRAMS // programs, steps, PARTIAL_BYTES // bytes_of_part))


def _grad_pooled(
    query: Tensor, pooled_key: Tensor, pooled_value: Tensor, arguments: dict[str, Any]
) -> list[Tensor]:
    """Gradients of pooled keys and values."""
    queries, keys, options = _config("pooled", query, pooled_value)
    images, pooled, heads, _ = pooled_key.shape
    group = query.shape[-2] // heads
    programs = images * heads * triton.cdiv(pooled, keys)
    steps = group * triton.cdiv(query.shape[1] * query.shape[2], queries)
    parts = _parts(programs, steps, 4 * max(pooled_key.numel(), pooled_value.numel()))
    dtype = torch.float32 if parts > 1 else query.dtype
    grads = [
        tensor.new_empty((parts * images, *tensor.shape[1:]), dtype=dtype)
        for tensor in (pooled_key, pooled_value)
    ]
    _launch(
        aggregated_backward.pooled_kernel,
        programs * parts,
        query.device,
        arguments,
        grad_pooled_key=grads[0],
        grad_pooled_key_strides=map_strides(grads[0]),
        grad_pooled_value=grads[1],
        grad_pooled_value_strides=map_strides(grads[1]),
        heads=heads,
        images=images,
        parts=parts,
        BLOCK_M=queries,
        BLOCK_N=keys,
        **options,
    )
    return [grad.unflatten(0, (parts, images)).sum(0).to(query.dtype) for grad in grads]


def _grad_pooled_bias(
    query: Tensor, value: Tensor, pooled_bias: Tensor, arguments: dict[str, Any]
) -> Tensor:
    queries, keys, options = _config("pooled_bias", query, value)
    heads, tokens, pooled = pooled_bias.shape
    programs = heads * triton.cdiv(tokens, queries) * triton.cdiv(pooled, keys)
    parts = _parts(programs, query.shape[0], 4 * pooled_bias.numel())
    sums = pooled_bias.new_empty((parts, *pooled_bias.shape), dtype=torch.float32)
    _launch(
        aggregated_backward.pooled_bias_kernel,
        programs * parts,
        query.device,
        arguments,
        sums=sums,
        heads=heads,
        images=query.shape[0],
        parts=parts,
        BLOCK_M=queries,
        BLOCK_N=keys,
        **options,
    )
    return sums.sum(0).to(pooled_bias.dtype)
