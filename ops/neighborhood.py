"""Neighborhood attention: every token attends to the window of tokens nearest to it.

Hassani et al., "Neighborhood Attention Transformer" (arXiv 2204.07143); dilation: "Dilated
Neighborhood Attention Transformer" (2209.15001); stride and causal masking: "Generalized
Neighborhood Attention" (2504.16922). The window
rule is written out in `vitarium.ops.windows`. Cost: 2 N prod(k) head_dim multiply-adds for N
tokens, instead of 2 N^2 head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.dispatch import Case, Implementation, Operator
from vitarium.ops.local import LocalAttention, check_bias, check_tensors
from vitarium.ops.mixer import Mixer, qkv_heads
from vitarium.ops.projection import Linear
from vitarium.ops.windows import Window

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
    windows = _check(query, key, value, bias, kernel_size, stride, dilation, is_causal)
    scale = dispatch.check_scale(NAME, scale, query)
    query, key, value = dispatch.autocast(query, key, value)
    args = (query, key, value, bias, *map(list, zip(*windows)), scale)
    return dispatch.choose(NAME, backend, _IMPLEMENTATIONS, query.device, *args)(*args)


@dispatch.remembered
def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Any,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
) -> tuple[Window, ...]:
    """The window of every axis; raises what `neighborhood_attention` says it raises."""
    rank = check_tensors(NAME, query, key, value)
    if key.shape[:-2] != query.shape[:-2]:
        raise ValueError(
            f"{NAME}: key has shape {tuple(key.shape)}, query {tuple(query.shape)}; "
            "batch and spatial dimensions must agree"
        )
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
    check_bias(NAME, bias, query, windows, "2 * kernel_size - 1")
    return windows


# --- implementations ------------------------------------------------------------------------------


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


_ATTENTION = LocalAttention(NAME, Window)

_IMPLEMENTATIONS = {
    **_ATTENTION.backends,
    "natten": Implementation(_natten, _natten_refuses),
}


# --- the module ----------------------------------------------------------------------------------


class NeighborhoodAttention(Mixer, name="neighborhood"):
    """Neighborhood attention with its projections, as in NAT and DiNAT.

        q, k, v = qkv(x);  out = proj(softmax(scale q k^T + rpb) v)  over each token's neighborhood

    Cost for N tokens: 4 N C^2 + 2 N kernel_size^2 C multiply-adds.

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
    linear = True
    operator = NAME
    cross = True
    no_weight_decay = ("rpb",)
    cost = "4*N*C**2 + 2*N*kernel_size**2*C"
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
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
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
    is learned for maps of `map_size`; smaller maps use its middle, larger ones an interpolation:
    out = proj(softmax(scale q k^T + rpb) v) over all tokens. Cost for N tokens: 4 N C^2 + 2 N^2 C
    multiply-adds.

    Args:
        dim, num_heads, qkv_bias, qk_scale, proj_drop: as in `NeighborhoodAttention`.
        map_size: map that the bias table is made for, an int or (H, W).

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `map_size` is below 1.
    """

    paper = "Dilated Neighborhood Attention Transformer (arXiv 2209.15001), ViT-rpb baseline"
    linear = False
    cost = "4*N*C**2 + 2*N**2*C"
    examples = ({"dim": 32, "num_heads": 2, "map_size": 7},)

    def __init__(
        self, dim: int, *, num_heads: int, map_size: int | tuple[int, int], **kwargs: Any
    ) -> None:
        size = dispatch.per_dimension(type(self).__name__, "map_size", map_size, 2)
        super().__init__(dim, num_heads=num_heads, kernel_size=size, **kwargs)

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


def _launches() -> list[Case]:
    """Maps of every rank, a narrow one, and with a bias the call that needs most registers."""
    found = []
    for dim in (32, 64, 128, 256):
        heads, dims = (2, 2), (dim, dim)
        for note, spatial, kernel_size, extra in (
            ("map", (64, 64), 7, {}),
            ("volume", (64,) * 3, 3, {"bias": True, "stride": 2, "dilation": 2}),
            ("row", (64,), 7, {}),
            ("narrow", (8, 8), 7, {}),
        ):
            note = f"{note}, head_dim {dim}"
            found.append(
                _case(note, spatial, kernel_size, batch=2, heads=heads, dims=dims, **extra)
            )
    return found


OPERATOR = Operator(NAME, neighborhood_attention, _IMPLEMENTATIONS, CASES, _ATTENTION, _launches())
