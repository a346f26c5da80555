"""Neighborhood attention: every token attends to the window of tokens nearest to it.

Hassani et al., "Neighborhood Attention Transformer" (arXiv 2204.07143); dilation: "Dilated
Neighborhood Attention Transformer" (2209.15001); stride and causal masking: "Generalized
Neighborhood Attention" (2504.16922). The window
rule is written out in `vitarium.ops.windows`. Cost: 2 N prod(k) head_dim multiply-adds for N
tokens, instead of 2 N^2 head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.differentiable import Differentiable
from vitarium.ops.dispatch import Case, Implementation, Operator
from vitarium.ops.mixer import Mixer, qkv_heads
from vitarium.ops.tiled import attend, attend_backward, attend_plain, path
from vitarium.ops.windows import Window, axis_pattern, pairs_seen, plain_axis, tiles_for

NAME = "neighborhood_attention"

Ints = list[int]


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every token to its neighborhood, on 1-, 2- or 3-dimensional maps.

    The window rule is NATTEN's, written out in `vitarium.ops.windows`.

    Args:
        query: `(B, *spatial, num_heads, head_dim)`, spatial of rank 1, 2 or 3; any strides.
        key: `(B, *spatial, num_heads_kv, head_dim)`; num_heads_kv divides num_heads, and query
            head h reads key and value head `h // (num_heads // num_heads_kv)`.
        value: `(B, *spatial, num_heads_kv, value_dim)`.
        kernel_size: window length in tokens, one int or one per spatial dimension;
            `kernel_size * dilation` may not exceed the map.
        stride: queries in groups of `stride` share one window; at most kernel_size.
        dilation: step between the neighbors of a window, in tokens.
        is_causal: whether a token sees nothing after itself along that dimension.
        bias: relative position bias `(num_heads, 2 * kernel_size - 1, ...)`, added to the scaled
            scores at `key - query + kernel_size - 1` per dimension, in steps of dilation.
        scale: factor on the scores; `head_dim ** -0.5` if None.
        backend: "reference", "torch", "triton", "natten", or None to choose.

    Returns:
        `(B, *spatial, num_heads, value_dim)`, contiguous, in the dtype of query.

    Raises:
        ValueError: shapes, sizes or devices do not fit, or the named backend cannot run this.
        TypeError: an argument is of the wrong type, or dtypes differ.
    """
    windows = _check(query, key, value, kernel_size, stride, dilation, is_causal, bias)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"{NAME}: scale must be a number or None, got {type(scale).__name__}")
    elif not -math.inf < scale < math.inf:
        raise ValueError(f"{NAME}: scale={scale} must be finite")
    query, key, value = dispatch.autocast(query, key, value)
    args = (query, key, value, bias, *map(list, zip(*windows)), float(scale))
    return dispatch.choose(NAME, backend, _IMPLEMENTATIONS, query.device, *args)(*args)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    bias: Tensor | None,
) -> tuple[Window, ...]:
    """The window of every axis; raises what `neighborhood_attention` says it raises."""
    dispatch.check_tensors(NAME, query=query, key=key, value=value)
    rank = query.dim() - 3
    if rank not in (1, 2, 3):
        raise ValueError(
            f"{NAME}: query has shape {tuple(query.shape)}; allowed are 4 to 6 dimensions, "
            "(B, *spatial, num_heads, head_dim) with 1 to 3 spatial dimensions"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != query.dim() or tensor.shape[:-2] != query.shape[:-2]:
            raise ValueError(
                f"{NAME}: {name} has shape {tuple(tensor.shape)}, query {tuple(query.shape)}; "
                "batch and spatial dimensions must agree"
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"{NAME}: key has head_dim {key.shape[-1]}, query {query.shape[-1]}; they must agree"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"{NAME}: value has {value.shape[-2]} heads, key {key.shape[-2]}; they must agree"
        )
    num_heads, num_heads_kv = query.shape[-2], key.shape[-2]
    if num_heads_kv < 1 or num_heads % num_heads_kv:
        raise ValueError(
            f"{NAME}: key has {num_heads_kv} heads, which do not divide the query's {num_heads}"
        )
    for name, size in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if size < 1:
            raise ValueError(f"{NAME}: {name} has head_dim {size}; allowed is at least 1")
    windows = tuple(
        Window(*entries)
        for entries in zip(
            dispatch.per_dimension(NAME, "kernel_size", kernel_size, rank),
            dispatch.per_dimension(NAME, "stride", stride, rank),
            dispatch.per_dimension(NAME, "dilation", dilation, rank),
            dispatch.per_dimension(NAME, "is_causal", is_causal, rank, bool),
        )
    )
    spatial = query.shape[1:-2]
    for axis, length, window in zip("DHW"[-rank:], spatial, windows):
        window.check(NAME, length, axis, tuple(spatial))
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"{NAME}: bias must be a tensor or None, got {type(bias).__name__}")
        if not bias.is_floating_point():
            raise TypeError(f"{NAME}: bias must be floating-point, got {bias.dtype}")
        if bias.device != query.device:
            raise ValueError(f"{NAME}: bias is on {bias.device}, query on {query.device}")
        expected = (num_heads, *(2 * w.kernel_size - 1 for w in windows))
        if tuple(bias.shape) != expected:
            raise ValueError(
                f"{NAME}: bias has shape {tuple(bias.shape)}; allowed is {expected}, "
                "(num_heads, 2 * kernel_size - 1, ...)"
            )
    return windows


# --- the definition ------------------------------------------------------------------------------


def _windows(*pattern: Ints) -> tuple[Window, ...]:
    """The window of every axis, from lists of kernel sizes, strides, dilations and causality."""
    return tuple(map(Window, *pattern))


def _dense_pattern(
    spatial: tuple[int, ...], windows: tuple[Window, ...], bias: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Mask `(N, N)` over flattened tokens, and the bias `(num_heads, N, N)` that belongs to it."""
    rank, tokens = len(spatial), math.prod(spatial)
    inside = torch.ones((), dtype=torch.bool, device=device)
    table_index = []
    for axis, (length, window) in enumerate(zip(spatial, windows)):
        seen, offset = axis_pattern(length, window, device)
        shape = [1] * (2 * rank)
        shape[axis] = shape[rank + axis] = length
        inside = inside & seen.view(shape)
        k = window.kernel_size
        table_index.append((offset + k - 1).clamp(0, 2 * k - 2).view(shape))
    inside = inside.reshape(tokens, tokens)
    if bias is None:
        return inside, None
    return inside, bias[(slice(None), *table_index)].reshape(-1, tokens, tokens)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *arguments: Any,
) -> Tensor:
    *pattern, scale = arguments
    shape = query.shape
    inside, dense_bias = _dense_pattern(tuple(shape[1:-2]), _windows(*pattern), bias, query.device)
    query, key, value = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if dense_bias is not None:
        scores = scores + dense_bias.to(scores.dtype)
    weights = scores.masked_fill(~inside, -math.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).reshape(*shape[:-1], value.shape[-1])


# --- the portable path and the custom operator ---------------------------------------------------


def _plain(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *arguments: Any
) -> Tensor:
    *pattern, scale = arguments
    axes = [
        plain_axis(length, window, query.device)
        for length, window in zip(query.shape[1:-2], _windows(*pattern))
    ]
    return attend_plain(query, key, value, bias, axes, scale)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """The output, and from the kernel the base-2 log-sum-exp `(B, *spatial, num_heads)`."""
    *pattern, scale, fused = arguments
    windows = _windows(*pattern)
    if fused:
        from vitarium.ops.kernels import neighborhood as kernels

        return kernels.forward(query, key, value, bias, windows, scale)
    axes = tiles_for(tuple(query.shape[1:-2]), windows, path(query, value))
    return attend(query, key, value, bias, axes, scale), query.new_empty(0, dtype=torch.float32)


def _backward(
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
    windows = _windows(*pattern)
    if fused:
        from vitarium.ops.kernels import neighborhood as kernels

        return kernels.backward(
            grad, query, key, value, bias, output, logsumexp, windows, scale, needs[3]
        )
    axes = tiles_for(tuple(query.shape[1:-2]), windows)
    return attend_backward(grad, query, key, value, bias, axes, scale, needs[3])


def _flops(query: Any, key: Any, value: Any, bias: Any, *arguments: Any) -> int:
    batch, *spatial, num_heads, head_dim = query
    pairs = pairs_seen(tuple(spatial), _windows(*arguments[:4]))
    return 2 * batch * num_heads * pairs * (head_dim + value[-1])


def _backward_flops(query: Any, key: Any, value: Any, bias: Any, *arguments: Any) -> int:
    """Three products over head_dim (scores again, query, key) and two over value_dim."""
    batch, *spatial, num_heads, head_dim = query
    pairs = pairs_seen(tuple(spatial), _windows(*arguments[:4]))
    return 2 * batch * num_heads * pairs * (3 * head_dim + 2 * value[-1])


_operation = Differentiable(
    NAME,
    tensors="Tensor query, Tensor key, Tensor value, Tensor? bias",
    # Lists of integers even for is_causal: torch.jit.trace cannot trace a list of bool.
    arguments="int[] kernel_size, int[] stride, int[] dilation, int[] is_causal, float scale",
    forward=_forward,
    backward=_backward,
    output_shape=lambda query, key, value, *_: (*query.shape[:-1], value.shape[-1]),
    saved_shape=lambda query, *arguments: query.shape[:-1] if arguments[-1] else (0,),
    flops=_flops,
    backward_flops=_backward_flops,
)


# --- the other implementations -------------------------------------------------------------------


def _triton_refuses(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> str | None:
    return dispatch.triton_refuses(query, head_dim=query.shape[-1], value_dim=value.shape[-1])


def _natten(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    kernel_size: Ints,
    stride: Ints,
    dilation: Ints,
    is_causal: Ints,
    scale: float,
) -> Tensor:
    import natten

    function = (natten.na1d, natten.na2d, natten.na3d)[len(kernel_size) - 1]
    return function(
        query,
        key,
        value,
        kernel_size=tuple(kernel_size),
        stride=tuple(stride),
        dilation=tuple(dilation),
        is_causal=tuple(map(bool, is_causal)),
        scale=scale,
    )


def _natten_refuses(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, kernel_size: Ints, *_: Any
) -> str | None:
    if not dispatch.NATTEN_INSTALLED:
        return "natten is not installed (pip install natten)"
    if bias is not None:
        return "NATTEN has no relative position bias"
    if min(kernel_size) < 2:
        return f"NATTEN needs kernel_size >= 2, got {kernel_size}"
    return None


_IMPLEMENTATIONS = {
    **_operation.implementations(reference=_reference, plain=_plain, refuses=_triton_refuses),
    "natten": Implementation(_natten, _natten_refuses),
}


# --- the module ----------------------------------------------------------------------------------


class NeighborhoodAttention(Mixer, name="neighborhood"):
    """Neighborhood attention with its projections, as in NAT and DiNAT.

    A map smaller than `kernel_size * dilation` is padded with zeros at the bottom and right,
    before the projection, and cropped after: padded tokens are attended to, as in the official
    code.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`.
        kernel_size, stride, dilation, is_causal: the window, an entry or one per dimension (H, W).
        rel_pos_bias: learn the relative position bias `rpb`, `(num_heads, 2 * k - 1, 2 * k - 1)`.
        qkv_bias: bias of the query, key and value projection.
        qk_scale: factor on the scores; `head_dim ** -0.5` if None.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or the window is impossible.
    """

    paper = "Neighborhood Attention Transformer (arXiv 2204.07143), dilated (2209.15001)"
    operator = NAME
    cross = True
    no_weight_decay = ("rpb",)
    examples = (
        {"dim": 32, "num_heads": 2, "kernel_size": 7},
        {"dim": 32, "num_heads": 4, "kernel_size": 3, "dilation": 2, "rel_pos_bias": False},
        {"dim": 48, "num_heads": 3, "kernel_size": (4, 5), "stride": (2, 1), "dilation": (1, 2)},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        kernel_size: int | tuple[int, int] = 7,
        stride: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        is_causal: bool | tuple[bool, bool] = False,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"NeighborhoodAttention: num_heads={num_heads} must divide dim={dim}")
        factory = {"device": device, "dtype": dtype}
        owner = type(self).__name__
        self.num_heads = num_heads
        self.kernel_size = dispatch.per_dimension(owner, "kernel_size", kernel_size, 2)
        self.stride = dispatch.per_dimension(owner, "stride", stride, 2)
        self.dilation = dispatch.per_dimension(owner, "dilation", dilation, 2)
        self.is_causal = dispatch.per_dimension(owner, "is_causal", is_causal, 2, bool)
        for k, s in zip(self.kernel_size, self.stride):
            if s > k:
                raise ValueError(f"{owner}: stride={s} exceeds kernel_size={k}")
        self.scale = qk_scale if qk_scale is not None else (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        if rel_pos_bias:
            table = [2 * k - 1 for k in self.kernel_size]
            self.rpb = nn.Parameter(torch.empty(num_heads, *table, **factory))
        else:
            self.register_parameter("rpb", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias table anew; the projections have their own `reset_parameters`."""
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def _pattern(self, height: int, width: int) -> dict[str, Any]:
        """The window and bias of a map of this size, as `neighborhood_attention` takes them."""
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.is_causal,
            "bias": self.rpb,
        }

    def _pad(self, x: Tensor) -> Tensor:
        """The map with zeros at the bottom and right, where it is smaller than the window."""
        lack = [
            max(0, k * d - length)
            for k, d, length in zip(self.kernel_size, self.dilation, x.shape[1:3])
        ]
        return F.pad(x, (0, 0, 0, lack[1], 0, lack[0])) if any(lack) else x

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """A context must be a map of the same size."""
        height, width = x.shape[1:3]
        x = self._pad(x)
        context = None if context is None else self._pad(context)
        output = neighborhood_attention(
            *qkv_heads(self.qkv, x, self.num_heads, context),
            **self._pattern(*x.shape[1:3]),
            scale=self.scale,
        )
        output = output[:, :height, :width].flatten(-2)
        return self.proj_drop(self.proj(output))

    def extra_repr(self) -> str:
        """The number of heads, the kernel size, and of the rest what is not the default."""
        parts = [f"num_heads={self.num_heads}"]
        for name, usual in (("kernel_size", None), ("stride", 1), ("dilation", 1),
                            ("is_causal", False)):  # fmt: skip
            entries = getattr(self, name)
            value = entries[0] if len(set(entries)) == 1 else entries
            if value != usual:
                parts.append(f"{name}={value}")
        return ", ".join(parts)


class GlobalAttention(NeighborhoodAttention, name="global"):
    """Neighborhood attention whose window is the whole map: dense attention with relative bias.

    The mixer of the ViT-rpb baselines of the DiNAT paper (2209.15001, section 4). The bias table
    is learned for maps of `map_size`; smaller maps use its middle, larger ones an interpolation.

    Args:
        dim, num_heads, qkv_bias, qk_scale, proj_drop: as in `NeighborhoodAttention`.
        map_size: map that the bias table is made for, an int or (H, W).
    """

    paper = "Dilated Neighborhood Attention Transformer (arXiv 2209.15001), ViT-rpb baseline"
    examples = ({"dim": 32, "num_heads": 2, "map_size": 7},)

    def __init__(
        self, dim: int, *, num_heads: int, map_size: int | tuple[int, int], **kwargs: Any
    ) -> None:
        super().__init__(dim, num_heads=num_heads, kernel_size=map_size, **kwargs)

    def _pad(self, x: Tensor) -> Tensor:
        return x

    def _pattern(self, height: int, width: int) -> dict[str, Any]:
        bias = self.rpb
        if bias is not None:
            table = (2 * height - 1, 2 * width - 1)
            larger = [max(new, old) for new, old in zip(table, bias.shape[1:])]
            if larger != list(bias.shape[1:]):
                bias = F.interpolate(bias[None], larger, mode="bicubic", align_corners=True)[0]
            top, left = ((have - want) // 2 for have, want in zip(bias.shape[1:], table))
            bias = bias[:, top : top + table[0], left : left + table[1]]
        return {
            "kernel_size": (height, width),
            "stride": (1, 1),
            "dilation": (1, 1),
            "is_causal": (False, False),
            "bias": bias,
        }


def _case(
    note: str,
    spatial: tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    *,
    batch: int = 1,
    heads: tuple[int, int] = (1, 1),
    dims: tuple[int, int] = (16, 16),
    bias: bool = False,
    **kwargs: Any,
) -> Case:
    """A call with (query, key) heads and (query, value) widths; drawn tensors need shapes only."""
    base = (batch, *spatial)
    shapes: dict[str, tuple[int, ...]] = {
        "query": (*base, heads[0], dims[0]),
        "key": (*base, heads[1], dims[0]),
        "value": (*base, heads[1], dims[1]),
    }
    if bias:
        sizes = dispatch.per_dimension(NAME, "kernel_size", kernel_size, len(spatial))
        shapes["bias"] = (heads[0], *(2 * k - 1 for k in sizes))
    return Case(note, shapes, {"kernel_size": kernel_size, **kwargs})


CASES = (
    _case("ragged tiles both ways", (9, 11), 7, bias=True),
    _case("map as large as the window", (7, 7), 7, batch=3, heads=(2, 2), bias=True),
    _case("dilation that divides neither side", (11, 13), 3, dilation=3, bias=True),
    _case("even kernel, strides", (8, 10), (4, 5), stride=(2, 3), bias=True),
    _case("strides that divide nothing, dilated", (13, 9), (5, 4), stride=(5, 3), dilation=(2, 1)),
    _case("grouped heads", (5, 8), 5, heads=(4, 2), bias=True),
    _case("widths that are no powers of two", (8, 8), 3, dims=(24, 40), bias=True),
    _case("one dimension, causal", (37,), 9, dilation=2, is_causal=True, bias=True),
    _case("one dimension, causal, strided", (33,), 8, stride=3, is_causal=True),
    _case("three dimensions", (4, 5, 6), (2, 3, 3), dilation=(1, 1, 2), bias=True),
    _case("three dimensions, causal in time", (5, 4, 4), (3, 2, 4), is_causal=(True, False, False)),
    _case("one token", (1, 1), 1, bias=True),
    _case("one row", (1, 30), (1, 5), scale=0.3),
    _case("negative scale", (7, 8), 3, scale=-0.5),
    _case("no images", (7, 7), 3, batch=0, bias=True),
)

OPERATOR = Operator(NAME, neighborhood_attention, _IMPLEMENTATIONS, CASES)
