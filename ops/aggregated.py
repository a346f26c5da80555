"""Aggregated attention: every token attends to the tokens around it and to a pooled map, at once.

Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers" (arXiv 2311.17132,
section 3.1, equations 1 to 7). With the keys K_n of the window around token n, K_p of the pooled
map, one softmax over both and further weights T_n of the window's values,

    A_n = softmax([scale q_n K_n^T + bias, scale q_n K_p^T + pooled_bias_n])
    o_n = (A_n[window] + T_n) V_n + A_n[pooled] V_p.

Cost: N (window_size^2 + M) (head_dim + value_dim) multiply-adds a head for N tokens and M pooled
ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import aggregated_portable as portable
from vitarium.ops import dispatch
from vitarium.ops.differentiable import Differentiable
from vitarium.ops.dispatch import Case, Operator

NAME = "aggregated_attention"


def aggregated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    window_size: int,
    *,
    bias: Tensor | None = None,
    pooled_bias: Tensor | None = None,
    window_weights: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every token to the window around it and to all pooled tokens, in one softmax.

    The window is centred on its token; what lies outside of the map is not attended to. Tokens
    count in raster order, N = H * W of them, and so do the places of a window.

    Args:
        query: `(B, H, W, num_heads, head_dim)`; any strides.
        key: `(B, H, W, num_heads_kv, head_dim)`; num_heads_kv divides num_heads, and query head h
            reads key and value head `h // (num_heads // num_heads_kv)`.
        value: `(B, H, W, num_heads_kv, value_dim)`.
        pooled_key: `(B, M, num_heads_kv, head_dim)`, M >= 1.
        pooled_value: `(B, M, num_heads_kv, value_dim)`.
        window_size: side of the square window in tokens, odd.
        bias: `(num_heads, window_size^2)`, added to the scaled scores of the window.
        pooled_bias: `(num_heads, N, M)`, added to the scaled scores of the pooled keys.
        window_weights: `(B, H, W, num_heads, window_size^2)`, added to the weights of the window
            after the softmax; of no effect outside of the map.
        scale: factor on the scores; `head_dim ** -0.5` if None.
        backend: "reference", "torch", "triton", or None to choose.

    Returns:
        `(B, H, W, num_heads, value_dim)`, contiguous, in the dtype of query.

    Raises:
        ValueError: shapes, sizes or devices do not fit, or the named backend cannot run this.
        TypeError: an argument is of the wrong type, or dtypes differ.
    """
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "pooled_key": pooled_key,
        "pooled_value": pooled_value,
    }
    if window_weights is not None:
        tensors["window_weights"] = window_weights
    dispatch.check_tensors(NAME, **tensors)
    _check_window(window_size)
    _check_shapes(tensors, window_size)
    for name, table, expected in (
        ("bias", bias, (query.shape[-2], window_size**2)),
        (
            "pooled_bias",
            pooled_bias,
            (query.shape[-2], query.shape[1] * query.shape[2], pooled_key.shape[1]),
        ),
    ):
        if table is not None:
            _check_bias(name, table, expected, query.device)
    scale = dispatch.check_scale(NAME, scale, query)
    *qkv, weights = (*dispatch.autocast(*tensors.values()), None)[:6]
    args = (*qkv, bias, pooled_bias, weights, window_size, scale)
    return dispatch.choose(NAME, backend, _IMPLEMENTATIONS, query.device, *args)(*args)


def _check_window(window_size: Any) -> None:
    if isinstance(window_size, bool) or not isinstance(window_size, int):
        raise TypeError(f"{NAME}: window_size must be int, got {type(window_size).__name__}")
    if window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"{NAME}: window_size={window_size} is not allowed; odd sizes are")


def _check_shapes(tensors: dict[str, Tensor], window_size: int) -> None:
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    if query.dim() != 5:
        raise ValueError(
            f"{NAME}: query has shape {tuple(query.shape)}; allowed are 5 dimensions, "
            "(B, H, W, num_heads, head_dim)"
        )
    batch, height, width, num_heads, head_dim = query.shape
    num_heads_kv = key.shape[-2] if key.dim() == 5 else num_heads
    if num_heads_kv < 1 or num_heads % num_heads_kv:
        raise ValueError(
            f"{NAME}: key has {num_heads_kv} heads, which do not divide the query's {num_heads}"
        )
    pooled = tensors["pooled_key"].shape[1] if tensors["pooled_key"].dim() == 4 else 1
    expected: dict[str, tuple[int, ...]] = {
        "key": (batch, height, width, num_heads_kv, head_dim),
        "value": (batch, height, width, num_heads_kv, value.shape[-1] if value.dim() else 1),
        "pooled_key": (batch, pooled, num_heads_kv, head_dim),
        "pooled_value": (batch, pooled, num_heads_kv, value.shape[-1] if value.dim() else 1),
        "window_weights": (batch, height, width, num_heads, window_size**2),
    }
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{NAME}: {name} has shape {tuple(tensors[name].shape)}; with query "
                f"{tuple(query.shape)} and window_size={window_size} allowed is {shape}"
            )
    for name, size in (
        ("query has head_dim", head_dim),
        ("value has value_dim", value.shape[-1]),
        ("query has height", height),
        ("query has width", width),
        ("pooled_key has number of tokens", pooled),
    ):
        if size < 1:
            raise ValueError(f"{NAME}: {name} {size}; allowed is at least 1")


def _check_bias(name: str, bias: Any, expected: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(f"{NAME}: {name} must be a tensor or None, got {type(bias).__name__}")
    if not bias.is_floating_point():
        raise TypeError(f"{NAME}: {name} must be floating-point, got {bias.dtype}")
    if bias.device != device:
        raise ValueError(f"{NAME}: {name} is on {bias.device}, query on {device}")
    if tuple(bias.shape) != expected:
        raise ValueError(f"{NAME}: {name} has shape {tuple(bias.shape)}; allowed is {expected}")


# --- the definition ------------------------------------------------------------------------------


def _reference(
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
) -> Tensor:
    shape, device = query.shape, query.device
    _, height, width, num_heads, _ = shape
    group, reach = num_heads // key.shape[-2], window_size // 2
    key, value, pooled_key, pooled_value = (
        tensor.repeat_interleave(group, -2) if group > 1 else tensor
        for tensor in (key, value, pooled_key, pooled_value)
    )
    query, key, value, pooled_key, pooled_value = (
        tensor.flatten(1, -3).transpose(1, 2)
        for tensor in (query, key, value, pooled_key, pooled_value)
    )
    row = torch.arange(height, device=device).repeat_interleave(width)
    column = torch.arange(width, device=device).repeat(height)
    down, right = row - row[:, None], column - column[:, None]  # key minus query
    inside = (down.abs() <= reach) & (right.abs() <= reach)
    place = (down.clamp(-reach, reach) + reach) * window_size + right.clamp(-reach, reach) + reach
    scores = query @ key.mT * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype)[:, place]
    scores = scores.masked_fill(~inside, -math.inf)
    pooled_scores = query @ pooled_key.mT * scale
    if pooled_bias is not None:
        pooled_scores = pooled_scores + pooled_bias.to(scores.dtype)
    weights = torch.cat([scores, pooled_scores], -1).softmax(-1)
    weights, pooled_weights = weights.split([inside.shape[-1], pooled_key.shape[2]], -1)
    if window_weights is not None:
        further = window_weights.flatten(1, 2).transpose(1, 2)
        further = further.gather(-1, place.expand(*further.shape[:2], -1, -1))
        weights = weights + further.masked_fill(~inside, 0)
    output = weights @ value + pooled_weights @ pooled_value
    return output.transpose(1, 2).reshape(*shape[:-1], value.shape[-1])


def _plain(
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
) -> Tensor:
    """The map shifted once for every place of the window; sizes of the map may be symbolic."""
    _, height, width, num_heads, _ = query.shape
    group, reach, device = num_heads // key.shape[-2], window_size // 2, query.device
    key, value, pooled_key, pooled_value = (
        tensor.repeat_interleave(group, -2) if group > 1 else tensor
        for tensor in (key, value, pooled_key, pooled_value)
    )
    shifts = [(down, right) for down in range(window_size) for right in range(window_size)]
    key, value = (F.pad(tensor, (0, 0, 0, 0, *[reach] * 4)) for tensor in (key, value))
    query = query * scale
    row = torch.arange(height, device=device)[:, None]
    column = torch.arange(width, device=device)
    scores, outside = [], []
    for down, right in shifts:
        scores.append((query * key[:, down : down + height, right : right + width]).sum(-1))
        y, x = row + (down - reach), column + (right - reach)
        outside.append((y < 0) | (y >= height) | (x < 0) | (x >= width))
    near = torch.stack(scores, -1)
    if bias is not None:
        near = near + bias.to(near.dtype)
    near = near.masked_fill(torch.stack(outside, -1)[:, :, None], -math.inf)
    far = torch.einsum("byxhd,bmhd->bhyxm", query, pooled_key)
    if pooled_bias is not None:
        far = far + pooled_bias.to(far.dtype).reshape(-1, height, width, far.shape[-1])
    weights = torch.cat([near, far.movedim(1, 3)], -1).softmax(-1)
    near, far = weights[..., : window_size**2], weights[..., window_size**2 :]
    if window_weights is not None:
        near = near + window_weights
    output = torch.einsum("byxhm,bmhd->byxhd", far, pooled_value)
    for place, (down, right) in enumerate(shifts):
        seen = value[:, down : down + height, right : right + width]
        output = output + near[..., place : place + 1] * seen
    return output


# --- the custom operator -------------------------------------------------------------------------


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *args, fused = arguments
    if fused:
        from vitarium.ops.kernels import aggregated as kernels

        return kernels.forward(*args)
    return portable.attend(*args), args[0].new_empty(0, dtype=torch.float32)


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    *tensors, output, saved, window_size, scale, fused, needs = arguments
    if fused:
        from vitarium.ops.kernels import aggregated as kernels

        return kernels.backward(grad, *tensors, output, saved, window_size, scale, needs)
    return portable.attend_backward(grad, *tensors, window_size, scale)


def _pairs(query: tuple[int, ...], pooled_key: tuple[int, ...], window_size: int) -> int:
    """Pairs of query and key of all heads and images of which a score is needed."""
    batch, height, width, num_heads, _ = query
    reach = window_size // 2
    down, right = (
        sum(max(0, length - abs(shift)) for shift in range(-reach, reach + 1))
        for length in (height, width)
    )
    return batch * num_heads * (down * right + height * width * pooled_key[1])


def _flops(query, key, value, pooled_key, *rest) -> int:
    return 2 * _pairs(query, pooled_key, rest[-2]) * (query[-1] + value[-1])


def _backward_flops(query, key, value, pooled_key, *rest) -> int:
    """Three products over head_dim (scores again, query, key) and two over value_dim."""
    return 2 * _pairs(query, pooled_key, rest[-2]) * (3 * query[-1] + 2 * value[-1])


_OPERATION = Differentiable(
    NAME,
    tensors="Tensor query, Tensor key, Tensor value, Tensor pooled_key, Tensor pooled_value, "
    "Tensor? bias, Tensor? pooled_bias, Tensor? window_weights",
    arguments="int window_size, float scale",
    forward=_forward,
    backward=_backward,
    output_shape=lambda query, key, value, *_: (*query.shape[:-1], value.shape[-1]),
    saved_shape=lambda query, *rest: query.shape[:-1] if rest[-1] else (0,),
    flops=_flops,
    backward_flops=_backward_flops,
)


_IMPLEMENTATIONS = _OPERATION.implementations(
    reference=_reference, plain=_plain, refuses=dispatch.triton_refuses
)


# --- test cases ----------------------------------------------------------------------------------


def _case(
    note: str,
    size: tuple[int, int],
    pooled: int,
    window_size: int = 3,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (1, 1),
    dims: tuple[int, int] = (16, 16),
    optional: tuple[str, ...] = ("bias", "pooled_bias", "window_weights"),
    **kwargs: Any,
) -> Case:
    """A call with (query, key) heads and (query, value) widths."""
    base = (batch, *size)
    shapes: dict[str, tuple[int, ...]] = {
        "query": (*base, heads[0], dims[0]),
        "key": (*base, heads[1], dims[0]),
        "value": (*base, heads[1], dims[1]),
        "pooled_key": (batch, pooled, heads[1], dims[0]),
        "pooled_value": (batch, pooled, heads[1], dims[1]),
    }
    further = {
        "bias": (heads[0], window_size**2),
        "pooled_bias": (heads[0], size[0] * size[1], pooled),
        "window_weights": (*base, heads[0], window_size**2),
    }
    shapes.update({name: further[name] for name in optional})
    return Case(note, shapes, {"window_size": window_size, **kwargs})


CASES = (
    _case("everything, ragged tiles", (3, 9), 6, batch=2, heads=(2, 2)),
    _case("no bias, no further weights", (5, 6), 4, optional=()),
    _case("window of five", (6, 5), 3, 5, optional=("bias", "window_weights")),
    _case("window beyond the map", (2, 3), 1, 7),
    _case("window of one", (3, 4), 5, 1, optional=("pooled_bias",)),
    _case("grouped heads", (9, 3), 4, heads=(4, 2)),
    _case("unequal widths, no powers of two", (4, 4), 4, dims=(24, 40), scale=0.25),
    _case("more pooled keys than a tile", (3, 5), 37, dims=(8, 8), scale=-0.3),
    _case("one token", (1, 1), 1),
    _case("one row", (1, 12), 3, optional=("window_weights",)),
    _case("no images", (4, 4), 4, batch=0),
)


def _launches() -> list[Case]:
    """Every width, and the narrowest without the tensors that may be absent."""
    found = [
        _case(f"head_dim {dim}", (16, 16), 49, batch=2, heads=(2, 2), dims=(dim, dim))
        for dim in (32, 64, 128, 256)
    ]
    return [
        *found,
        _case("TransNeXt", (16, 16), 49, batch=2, heads=(3, 3), dims=(24, 24)),
        _case("window of seven alone", (16, 16), 49, 7, dims=(32, 32), optional=()),
    ]


OPERATOR = Operator(NAME, aggregated_attention, _IMPLEMENTATIONS, CASES, _OPERATION, _launches())
