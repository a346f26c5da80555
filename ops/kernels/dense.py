"""Launches the kernels of dense and mixture-of-head attention.

Maps are rows of tokens. The kernels take a positive scale; a negative or zero one is moved into the
query. Arguments are those that `vitarium.ops.mixture_of_head_attention` has checked.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from vitarium.ops.kernels import dense_backward, dense_forward
from vitarium.ops.kernels.launch import (
    large,
    launch,
    map_strides,
    positive_scale,
    row_strides,
    widths,
)

# The bias gradient is split among this many programs, as far as its partial sums stay this small.
# Constants, so that the result does not depend on a device.
BIAS_PROGRAMS = 1024
BIAS_BYTES = 64 << 20

# (kernel, element size) -> by padded width: queries, keys, num_warps, num_stages and, where the
# assembler would else spill a few registers, max_registers. Read off ahead-of-time compilation.
_SIZES: dict[tuple[str, int], dict[int, tuple[int, ...]]] = {
    ("forward", 2): {
        32: (64, 64, 4, 3),
        64: (64, 64, 4, 3),
        128: (64, 64, 8, 2, 255),
        256: (64, 32, 8, 2),
    },
    ("forward", 4): {
        32: (32, 32, 4, 1, 255),
        64: (32, 32, 4, 1, 255),
        128: (32, 32, 8, 2, 255),
        256: (32, 16, 8, 1, 255),
    },
    ("query", 2): {
        32: (64, 64, 4, 2),
        64: (64, 64, 8, 2),
        128: (64, 32, 8, 2),
        256: (32, 32, 8, 2),
    },
    ("query", 4): {
        32: (32, 32, 4, 2, 255),
        64: (32, 32, 8, 2, 255),
        128: (16, 32, 8, 2, 255),
        256: (16, 16, 8, 2, 255),
    },
    ("key_value", 2): {
        32: (32, 64, 4, 2),
        64: (32, 64, 4, 2),
        128: (32, 64, 8, 2),
        256: (32, 32, 8, 1),
    },
    ("key_value", 4): {
        32: (32, 32, 4, 1, 255),
        64: (32, 32, 8, 1, 255),
        128: (16, 16, 8, 1, 255),
        256: (16, 16, 8, 1, 255),
    },
    ("bias", 2): {
        32: (64, 64, 8, 2, 255),
        64: (64, 64, 8, 2, 255),
        128: (32, 64, 8, 2),
        256: (32, 32, 8, 2),
    },
    ("bias", 4): {
        32: (32, 32, 4, 2, 255),
        64: (32, 32, 8, 2, 255),
        128: (32, 16, 8, 1, 255),
        256: (16, 16, 8, 1, 255),
    },
}
# What calls with both a bias and lists of active queries have otherwise: no spills.
_LISTED_SIZES: dict[tuple[str, int], dict[int, tuple[int, ...]]] = {
    ("forward", 2): {64: (64, 64, 8, 2)},
}
WIDTHS = (32, 64, 128, 256)  # padded: the rows of the table


def _config(
    kernel: str,
    query: Tensor,
    value: Tensor,
    bias: Tensor | None,
    active: Tensor | None = None,
) -> dict[str, int | None]:
    sizes = _SIZES[kernel, query.element_size()]
    if bias is not None and active is not None:
        sizes = {**sizes, **_LISTED_SIZES.get((kernel, query.element_size()), {})}
    width = max(query.shape[-1], value.shape[-1])
    queries, keys, warps, stages, *registers = sizes[min(w for w in WIDTHS if w >= width)]
    if bias is not None and kernel != "bias":
        keys = max(16, keys // 2)  # a tile of bias takes as many registers as its scores
    return {
        "BLOCK_M": queries,
        "BLOCK_N": keys,
        "num_warps": warps,
        "num_stages": stages,
        "max_registers": registers[0] if registers else None,
    }


def _lists(active: Tensor | None) -> dict[str, Any]:
    """The active tokens of every image and head in ascending order, and how many they are."""
    if active is None:
        return {"index": None, "counts": None}
    by_head = active.transpose(1, 2)
    tokens = by_head.shape[-1]
    place = by_head.cumsum(-1)
    # Tokens that are not active go to a place of their own, which nobody reads.
    place = torch.where(by_head, place - 1, tokens)
    token = torch.arange(tokens, dtype=torch.int32, device=active.device)
    index = active.new_zeros((*by_head.shape[:2], tokens + 1), dtype=torch.int32)
    index.scatter_(-1, place, token.expand(by_head.shape))
    return {
        "index": index[..., :tokens].contiguous(),
        "counts": by_head.sum(-1, dtype=torch.int32).contiguous(),
    }


def _bias_arguments(bias: Tensor | None) -> dict[str, Any]:
    if bias is None:
        return {"bias": None, "bias_strides": (0, 0, 0, 0)}
    bias = bias if bias.dim() == 4 else bias[None]
    if bias.stride(-1) != 1:  # neighbours are read together, by all images
        bias = bias.contiguous()
    batch, head, token, key = bias.stride()
    shared = (0 if bias.shape[0] == 1 else batch, 0 if bias.shape[1] == 1 else head)
    return {"bias": bias, "bias_strides": (*shared, token, key)}


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    is_causal: bool,
    scale: float,
) -> dict[str, Any]:
    """Arguments that do not depend on the tiles, and the same for all kernels."""
    found: dict[str, Any] = {
        "gate": gate,
        "gate_strides": (0,) * 5 if gate is None else row_strides(gate),
        "queries": query.shape[1],
        "keys": key.shape[1],
        "scale": scale,
        "GROUP": query.shape[2] // key.shape[2],
        "CAUSAL": is_causal,
        **widths(query, value),
        **_bias_arguments(bias),
    }
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        found[name] = tensor
        found[f"{name}_strides"] = map_strides(tensor)
    return found


def _large(bias: Tensor | None, *tensors: Tensor) -> bool:
    tables = [] if bias is None else [bias[0] if bias.dim() == 4 else bias]
    return large(*tensors, *tables)


def _flat(*tensors: Tensor | None) -> list[Tensor | None]:
    """`(B, *spatial, ...)` as `(B, tokens, ...)`; the first three have heads and channels."""
    return [None if t is None else t.flatten(1, -3 if i < 3 else -2) for i, t in enumerate(tensors)]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    active: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Dense attention, with a gate and active queries if they are given.

    Returns:
        The output `(B, *spatial, num_heads, value_dim)`, contiguous, and the base-2 log-sum-exp of
        the scores, `(B, *spatial, num_heads)`, float32.
    """
    shape = query.shape
    query, key, value, gate, active = _flat(query, key, value, gate, active)
    sign, scale = positive_scale(scale)
    if sign != 1:
        query = query * sign
    lists = _lists(active)
    empty = query.new_empty if active is None and key.shape[1] else query.new_zeros
    output = empty((*query.shape[:-1], value.shape[-1]))
    logsumexp = query.new_full(query.shape[:-1], float("inf"), dtype=torch.float32)
    if output.numel() and key.shape[1]:
        config = _config("forward", query, value, bias, active)
        tiles = triton.cdiv(query.shape[1], config["BLOCK_M"])
        launch(
            dense_forward.forward_kernel,
            query.shape[0] * query.shape[2] * tiles,
            query.device,
            output=output,
            logsumexp=logsumexp,
            output_strides=map_strides(output),
            logsumexp_strides=row_strides(logsumexp),
            tiles=tiles,
            heads=query.shape[2],
            LARGE=_large(bias, query, key, value, output),
            **_arguments(query, key, value, bias, gate, is_causal, scale),
            **lists,
            **config,
        )
    return output.view(*shape[:-1], value.shape[-1]), logsumexp.view(shape[:-1])


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    active: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, bias and gate, contiguous; None where there is nothing.

    Args:
        grad_output: `(B, *spatial, num_heads, value_dim)`, any strides.
        output, logsumexp: what `forward` returned; the other arguments are what it got.
    """
    shapes = query.shape, key.shape, value.shape
    query, key, value, gate, active, logsumexp = _flat(query, key, value, gate, active, logsumexp)
    output, grad_output = (tensor.flatten(1, -3) for tensor in (output, grad_output))
    sign, scale = positive_scale(scale)
    if sign != 1:
        query = query * sign
    lists = _lists(active)
    empty = query.new_empty if active is None else query.new_zeros
    grad_query = empty(query.shape)
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    grad_gate = None if gate is None else empty(logsumexp.shape, dtype=torch.float32)
    grad_bias = torch.zeros_like(bias) if bias_needs_grad else None
    results = (grad_query, grad_key, grad_value)
    if not (output.numel() and key.shape[1]):
        for tensor in (*results, *([] if grad_gate is None else [grad_gate])):
            tensor.zero_()
    else:
        # Of a query that is not active nobody writes this, and its weights of 0 multiply it.
        delta = (torch.empty_like if active is None else torch.zeros_like)(logsumexp)
        common = {
            **_arguments(query, key, value, bias, gate, is_causal, scale),
            "logsumexp": logsumexp,
            "logsumexp_strides": row_strides(logsumexp),
            "delta": delta,
            "grad_output": grad_output,
            "grad_output_strides": map_strides(grad_output),
            "LARGE": _large(bias, query, key, value, output, grad_output),
        }
        config = _config("query", query, value, bias)
        tiles = triton.cdiv(query.shape[1], config["BLOCK_M"])
        launch(
            dense_backward.query_kernel,
            query.shape[0] * query.shape[2] * tiles,
            query.device,
            output=output,
            output_strides=map_strides(output),
            grad_query=grad_query,
            grad_query_strides=map_strides(grad_query),
            grad_gate=grad_gate,
            tiles=tiles,
            heads=query.shape[2],
            **common,
            **lists,
            **config,
        )
        config = _config("key_value", query, value, bias)
        tiles = triton.cdiv(key.shape[1], config["BLOCK_N"])
        launch(
            dense_backward.key_value_kernel,
            key.shape[0] * key.shape[2] * tiles,
            query.device,
            grad_key=grad_key,
            grad_key_strides=map_strides(grad_key),
            grad_value=grad_value,
            grad_value_strides=map_strides(grad_value),
            tiles=tiles,
            heads=key.shape[2],
            **common,
            **lists,
            **config,
        )
        if bias_needs_grad:
            config = _config("bias", query, value, bias)
            grad_bias = _grad_bias(query, value, bias, common, config)
    if sign != 1:
        grad_query = grad_query * sign
    if grad_gate is not None:
        grad_gate = grad_gate.to(query.dtype).view(shapes[0][:-1])
    found = (tensor.view(shape) for tensor, shape in zip((grad_query, *results[1:]), shapes))
    return *found, grad_bias, grad_gate


def _grad_bias(
    query: Tensor,
    value: Tensor,
    bias: Tensor,
    common: dict[str, Any],
    config: dict[str, int | None],
) -> Tensor:
    """Gradient of the bias: sums over parts of the images and heads that share it, added up."""
    images, heads = (1, *bias.shape[:-2])[-2:]
    shared = query.shape[2] // heads
    steps = query.shape[0] // images * shared
    tiles = triton.cdiv(bias.shape[-2], config["BLOCK_M"])
    key_tiles = triton.cdiv(bias.shape[-1], config["BLOCK_N"])
    programs = images * heads * tiles * key_tiles
    parts = max(1, min(steps, BIAS_PROGRAMS // programs, BIAS_BYTES // (4 * bias.numel())))
    sums = query.new_empty((parts, *bias.shape), dtype=torch.float32)
    launch(
        dense_backward.bias_kernel,
        parts * programs,
        query.device,
        sums=sums,
        tiles=tiles,
        key_tiles=key_tiles,
        heads=heads,
        images=images,
        shared=shared,
        steps=steps,
        parts=parts,
        **common,
        **config,
    )
    return (sums[0] if parts == 1 else sums.sum(0)).to(bias.dtype)


def bias_gradient(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    logsumexp: Tensor,
    delta: Tensor,
    scale: float,
) -> Tensor:
    """The gradient of the bias of attention whose others are known.

    Args:
        grad_output: gradient of the output.
        query, key, value, bias, scale: as `forward` takes them.
        logsumexp, delta: `(B, *spatial, num_heads)`, float32: base-2 log-sum-exp of the scores, and
            the sum of `grad_output` times output over channels.
    """
    query, key, value, logsumexp, delta = _flat(query, key, value, logsumexp, delta)
    grad_output = grad_output.flatten(1, -3)
    common = {
        **_arguments(query, key, value, bias, None, False, scale),
        "logsumexp": logsumexp,
        "logsumexp_strides": row_strides(logsumexp),
        "delta": delta,
        "grad_output": grad_output,
        "grad_output_strides": map_strides(grad_output),
        "LARGE": _large(bias, query, key, value, grad_output),
    }
    config = _config("bias", query, value, bias)
    config["BLOCK_N"] = max(16, (config["BLOCK_N"] or 0) // 2)  # rows of few keys are not aligned
    return _grad_bias(query, value, bias, common, config)
