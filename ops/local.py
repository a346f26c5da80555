"""Local attention: what the operators share whose queries see a stretch of keys along every axis.

`LocalAttention` makes a custom operator, its reference, its portable path and its counts of
operations out of a pattern, one of those in `vitarium.ops.windows`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitarium.ops import dispatch, fused_windows, whole_windows
from vitarium.ops.differentiable import Differentiable
from vitarium.ops.tiled import attend, attend_backward, attend_plain, path
from vitarium.ops.windows import (
    Block,
    Pattern,
    Window,
    axis_pattern,
    pairs_seen,
    plain_axis,
    tiles_for,
)


def check_tensors(name: str, query: Tensor, key: Tensor, value: Tensor) -> int:
    """The number of spatial dimensions; those of key and value must agree with each other only.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: an argument is of the wrong type, or dtypes differ.
    """
    dispatch.check_tensors(name, query=query, key=key, value=value)
    rank = query.dim() - 3
    if rank not in (1, 2, 3):
        raise ValueError(
            f"{name}: query has shape {tuple(query.shape)}; allowed are 4 to 6 dimensions, "
            "(B, *spatial, num_heads, head_dim) with 1 to 3 spatial dimensions"
        )
    if key.dim() != query.dim() or key.shape[0] != query.shape[0]:
        raise ValueError(
            f"{name}: key has shape {tuple(key.shape)}, query {tuple(query.shape)}; "
            "batch and spatial dimensions must agree"
        )
    if value.shape[:-2] != key.shape[:-2]:
        raise ValueError(
            f"{name}: value has shape {tuple(value.shape)}, key {tuple(key.shape)}; "
            "batch and spatial dimensions must agree"
        )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"{name}: key has head_dim {key.shape[-1]}, query {query.shape[-1]}; they must agree"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"{name}: value has {value.shape[-2]} heads, key {key.shape[-2]}; they must agree"
        )
    num_heads, num_heads_kv = query.shape[-2], key.shape[-2]
    if num_heads_kv < 1 or num_heads % num_heads_kv:
        raise ValueError(
            f"{name}: key has {num_heads_kv} heads, which do not divide the query's {num_heads}"
        )
    for argument, size in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if size < 1:
            raise ValueError(f"{name}: {argument} has head_dim {size}; allowed is at least 1")
    return rank


def check_bias(
    name: str, bias: Any, query: Tensor, windows: Sequence[Pattern], formula: str
) -> None:
    """The bias has an entry for every offset of a key; `formula` says how many.

    Raises:
        ValueError: its shape or device does not fit.
        TypeError: it is no floating-point tensor.
    """
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{name}: bias must be a tensor or None, got {type(bias).__name__}")
    if not bias.is_floating_point():
        raise TypeError(f"{name}: bias must be floating-point, got {bias.dtype}")
    if bias.device != query.device:
        raise ValueError(f"{name}: bias is on {bias.device}, query on {query.device}")
    expected = (query.shape[-2], *(2 * window.reach + 1 for window in windows))
    if tuple(bias.shape) != expected:
        raise ValueError(
            f"{name}: bias has shape {tuple(bias.shape)}; allowed is {expected}, "
            f"(num_heads, {formula}, ...)"
        )


def _dense_pattern(
    spatial: tuple[int, ...],
    windows: Sequence[Pattern],
    bias: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """Mask `(N, M)` over flattened tokens, and the bias `(num_heads, N, M)` that belongs to it."""
    rank = len(spatial)
    inside = torch.ones((), dtype=torch.bool, device=device)
    table_index = []
    for axis, (length, window) in enumerate(zip(spatial, windows)):
        seen, offset = axis_pattern(length, window, device)
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = seen.shape
        inside = inside & seen.view(shape)
        table_index.append((offset + window.reach).clamp(0, 2 * window.reach).view(shape))
    shape = (math.prod(inside.shape[:rank]), math.prod(inside.shape[rank:]))
    inside = inside.reshape(shape)
    if bias is None:
        return inside, None
    return inside, bias[(slice(None), *table_index)].reshape(-1, *shape)


class LocalAttention(Differentiable):
    """A local attention operator.

    It and its implementations take query, key, value, the bias or None, one list of integers per
    field of the pattern with an entry per axis, and the scale.

    Args:
        name: of the operator.
        pattern: of an axis.
    """

    def __init__(self, name: str, pattern: type[Window] | type[Block]) -> None:
        self._pattern = pattern
        # Lists of integers even for truth: torch.jit.trace cannot trace a list of bool.
        fields = ", ".join(f"int[] {field}" for field in pattern._fields)
        super().__init__(
            name,
            tensors="Tensor query, Tensor key, Tensor value, Tensor? bias",
            arguments=f"{fields}, float scale",
            forward=self._attend,
            backward=self._attend_backward,
            output_shape=lambda query, key, value, *_: (*query.shape[:-1], value.shape[-1]),
            saved_shape=lambda query, *arguments: query.shape[:-1] if arguments[-1] else (0,),
            flops=self._flops,
            backward_flops=self._backward_flops,
        )
        self.backends = self.implementations(
            reference=self._reference, plain=self._plain, refuses=dispatch.triton_refuses
        )

    def __call__(self, *args: Any, fused: bool) -> Tensor:
        """The output; a call that can be taken directly may be one for `whole_windows`."""
        if not fused and self.direct(args):
            query, key, value, bias, *pattern, scale = args
            axes = tiles_for(tuple(query.shape[1:-2]), self._windows(pattern), "whole")
            if whole_windows.serves(query, key, axes):
                way = whole_windows.attention
                if fused_windows.serves(query, value) and not self.differentiated(args):
                    way = fused_windows.attend
                return way(query, key, value, bias, axes, scale)
        return super().__call__(*args, fused=fused)

    def _windows(self, pattern: Sequence[Sequence[int]]) -> tuple[Pattern, ...]:
        return tuple(map(self._pattern, *pattern))

    def _reference(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *arguments: Any
    ) -> Tensor:
        *pattern, scale = arguments
        shape = query.shape
        inside, dense_bias = _dense_pattern(
            tuple(shape[1:-2]), self._windows(pattern), bias, query.device
        )
        query, key, value = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
        group = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
        scores = query @ key.transpose(-1, -2) * scale
        if dense_bias is not None:
            scores = scores + dense_bias.to(scores.dtype)
        weights = scores.masked_fill(~inside, -math.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).reshape(*shape[:-1], value.shape[-1])

    def _plain(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *arguments: Any
    ) -> Tensor:
        *pattern, scale = arguments
        axes = [
            plain_axis(length, window, query.device)
            for length, window in zip(query.shape[1:-2], self._windows(pattern))
        ]
        return attend_plain(query, key, value, bias, axes, scale)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *arguments: Any
    ) -> tuple[Tensor, Tensor]:
        """The output, and from the kernel the base-2 log-sum-exp `(B, *spatial, num_heads)`."""
        *pattern, scale, fused = arguments
        windows = self._windows(pattern)
        if fused:
            from vitarium.ops.kernels import local as kernels

            return kernels.forward(query, key, value, bias, windows, scale)
        way = path(query, value, windows)
        axes = tiles_for(tuple(query.shape[1:-2]), windows, way)
        output = attend(query, key, value, bias, axes, scale, way)
        return output, query.new_empty(0, dtype=torch.float32)

    def _attend_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        output: Tensor,
        logsumexp: Tensor,
        *arguments: Any,
    ) -> tuple[Tensor, ...]:
        *pattern, scale, fused, needs = arguments
        windows = self._windows(pattern)
        if fused:
            from vitarium.ops.kernels import local as kernels

            return kernels.backward(
                grad, query, key, value, bias, output, logsumexp, windows, scale, needs[3]
            )
        axes = tiles_for(tuple(query.shape[1:-2]), windows)
        return attend_backward(grad, query, key, value, bias, axes, scale, needs[3])

    def _pairs(self, query: Any, pattern: Sequence[Sequence[int]]) -> int:
        batch, *spatial, num_heads, _ = query
        return batch * num_heads * pairs_seen(tuple(spatial), self._windows(pattern))

    def _flops(self, query: Any, key: Any, value: Any, bias: Any, *arguments: Any) -> int:
        return 2 * self._pairs(query, arguments[:-1]) * (query[-1] + value[-1])

    def _backward_flops(self, query: Any, key: Any, value: Any, bias: Any, *arguments: Any) -> int:
        """Three products over head_dim (scores again, query, key) and two over value_dim.

        The portable path spares the first where it keeps the weights of small windows.
        """
        return 2 * self._pairs(query, arguments[:-1]) * (3 * query[-1] + 2 * value[-1])
