"""BiFormer's mixers: bi-level routing attention, and dense attention, with local enhancement.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention" (arXiv 2303.08810). The
local enhancement (LePE) is a depthwise convolution beside attention (Ren et al., "Shunted
Self-Attention", 2111.15193).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.attention import attention
from vitarium.ops.bilevel_routing import NAME, bilevel_routing_attention, route
from vitarium.ops.mixer import Mixer, pad_map, qkv_heads
from vitarium.ops.projection import Linear

PAPER = "BiFormer (arXiv 2303.08810)"


def _check_heads(owner: str, num_heads: int, **dims: int) -> None:
    for name, dim in dims.items():
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{owner}: num_heads={num_heads} must divide {name}={dim}")


def _depthwise(owner: str, dim: int, side_dwconv: int, factory: dict[str, Any]) -> nn.Conv2d | None:
    """The convolution of the local enhancement; None for size 0."""
    if side_dwconv == 0:
        return None
    if side_dwconv < 0 or side_dwconv % 2 == 0:
        raise ValueError(f"{owner}: side_dwconv={side_dwconv} must be odd, or 0 for none")
    return nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim, **factory)


def _convolve(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution of a channels-last map."""
    return convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class BiLevelRoutingAttention(Mixer, name="bilevel_routing"):
    """Bi-level routing attention with its projections and local enhancement, as in BiFormer.

    output = proj(attention(q, k, v over the routed regions) + LePE(v)), with the routing of
    `vitarium.ops.bilevel_routing.route`. A map that the grid of regions does not divide is padded
    with zeros at the bottom and right, before the projection, and cropped after: padded tokens are
    routed and attended to, as in the official code with `auto_pad`. Cost for N tokens: projections
    N C (2 qk_dim + 2 C) and attention N topk (N / n_win^2) (qk_dim + C) multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim` and `qk_dim`.
        n_win: regions along a side, an int or one per dimension (H, W).
        qk_dim: channels of queries and of keys; `dim` if None.
        qk_scale: factor on the scores and affinities; `qk_dim ** -0.5` if None.
        topk: regions that each region attends to.
        side_dwconv: kernel size of the local enhancement, odd; 0: none.
        kv_downsample_mode: how keys and values are pooled within a region: "identity" (not at
            all), "avgpool" or "maxpool" by `kv_downsample_ratio`, "ada_avgpool" or "ada_maxpool"
            to `kv_per_win` x `kv_per_win` tokens.
        kv_per_win, kv_downsample_ratio: see `kv_downsample_mode`.
        kv_downsample_kernel: taken for the official code's sake, which uses it for nothing.
        param_attention: "qkvo", or "qkv" for no projection of the output.
        soft_routing: multiply keys and values by the softmax of their region's affinity.
        diff_routing: let gradients through the affinities; needs `soft_routing`.
        param_routing: a learned projection of the region means; needs `diff_routing`.
        auto_pad: taken for the official code's sake; without it that refuses maps which this pads.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: the arguments do not fit, or no official code defines their combination.
    """

    paper = PAPER
    operator = NAME
    routed = True
    official_names: ClassVar[Mapping[str, str | None]] = {
        r"qkv\.qkv\.(weight|bias)": r"qkv.\1",
        r"wo\.(weight|bias)": r"proj.\1",
        r"router\.emb\.(weight|bias)": r"route_embed.\1",
    }
    cost = "4*N*C**2 + 2*N*C*min(topk, n_win**2)*N/n_win**2 + side_dwconv**2*N*C"
    examples = (
        {"dim": 32, "num_heads": 2, "n_win": 2, "topk": 4, "side_dwconv": 5},
        {"dim": 32, "num_heads": 4, "n_win": 2, "topk": 4, "qk_dim": 16, "soft_routing": True},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        n_win: int | tuple[int, int] = 7,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        topk: int = 4,
        side_dwconv: int = 3,
        kv_downsample_mode: str = "identity",
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        kv_downsample_kernel: int | None = None,
        param_attention: str = "qkvo",
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        auto_pad: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner, factory = type(self).__name__, {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qk_dim = qk_dim or dim
        _check_heads(owner, num_heads, dim=dim, qk_dim=self.qk_dim)
        self.n_win = dispatch.per_dimension(owner, "n_win", n_win, 2)
        regions = self.n_win[0] * self.n_win[1]
        if not 1 <= topk <= regions:
            raise ValueError(f"{owner}: topk={topk} must be between 1 and the {regions} regions")
        self.topk = topk
        self.scale = qk_scale or self.qk_dim**-0.5
        if diff_routing and not soft_routing:
            raise ValueError(f"{owner}: diff_routing=True needs soft_routing=True")
        if param_routing and not diff_routing:
            raise ValueError(f"{owner}: param_routing=True needs diff_routing=True")
        if param_attention not in ("qkvo", "qkv"):
            raise ValueError(
                f"{owner}: param_attention={param_attention!r} is unknown; allowed are 'qkvo', "
                "'qkv'"
            )
        self.soft_routing, self.diff_routing = soft_routing, diff_routing
        self.kv_downsample_mode = kv_downsample_mode
        self.pool = _pool(owner, kv_downsample_mode, kv_per_win, kv_downsample_ratio)
        self.lepe = _depthwise(owner, dim, side_dwconv, factory)
        self.qkv = Linear(dim, 2 * self.qk_dim + dim, **factory)
        self.proj = Linear(dim, dim, **factory) if param_attention == "qkvo" else None
        self.proj_drop = nn.Dropout(proj_drop)
        self.route_embed = Linear(self.qk_dim, self.qk_dim, **factory) if param_routing else None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Regions along (H, W) of a map of this size."""
        return self.n_win

    def routing(self, x: Tensor) -> Tensor:
        """The routing table of a map, `(B, n_y * n_x, topk)`, best first; n_y, n_x as `grid` says.

        Entries are regions in raster order.
        """
        self._check_map("x", x)
        query, key, _ = self._project(x)
        return self._route(query, key, x.shape[1:3])[0]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value maps that the grid divides, `(B, H, W, num_heads, channels)`."""
        lack = [-length % n for length, n in zip(x.shape[1:3], self.n_win)]
        x = pad_map(x, lack)
        parts = self.qkv(x).split([self.qk_dim, self.qk_dim, self.dim], -1)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)) for part in parts)
        return query, key, value

    def _route(
        self, query: Tensor, key: Tensor, size: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        if not self.diff_routing:
            query, key = query.detach(), key.detach()
        table, weights = route(
            query, key, self.n_win, self.topk, scale=self.scale, embed=self.route_embed
        )
        return table, weights if self.soft_routing else None

    def _pooled(self, x: Tensor) -> Tensor:
        """A map of keys or values, pooled within every region."""
        if self.pool is None:
            return x
        (n_y, n_x), heads = self.n_win, x.shape[-2]
        x = x.flatten(3).unflatten(2, (n_x, -1)).unflatten(1, (n_y, -1))
        x = self.pool(x.permute(0, 1, 3, 5, 2, 4).flatten(0, 2))  # (B * regions, C, height, width)
        x = x.unflatten(0, (-1, n_y, n_x)).permute(0, 1, 4, 2, 5, 3)
        return x.flatten(3, 4).flatten(1, 2).unflatten(-1, (heads, -1))

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        height, width = x.shape[1:3]
        query, key, value = self._project(x)
        table, weights = self._route(query, key, (height, width))
        output = bilevel_routing_attention(
            query,
            self._pooled(key),
            self._pooled(value),
            table,
            self.grid(height, width),
            weights=weights,
            scale=self.scale,
        ).flatten(3)
        output = output[:, :height, :width]
        if self.lepe is not None:
            output = output + self._enhance(self.lepe, value.flatten(3), height, width)
        return self.proj_drop(output if self.proj is None else self.proj(output))

    def _enhance(self, lepe: nn.Conv2d, value: Tensor, height: int, width: int) -> Tensor:
        """The local enhancement, which sees the padding."""
        return _convolve(lepe, value)[:, :height, :width]

    def attention_map(self, x: Tensor, query: tuple[int, int]) -> Tensor:
        if self.pool is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: with kv_downsample_mode={self.kv_downsample_mode!r} keys "
                "are no positions of the map"
            )
        return super().attention_map(x, query)

    def extra_repr(self) -> str:
        """The number of heads, the grid, and how many regions are chosen."""
        return f"num_heads={self.num_heads}, n_win={self.n_win}, topk={self.topk}"


def _pool(owner: str, mode: str, kv_per_win: int, ratio: int) -> nn.Module | None:
    sizes = {"kv_per_win": kv_per_win, "kv_downsample_ratio": ratio}
    if mode == "identity":
        return None
    modes: dict[str, tuple[type[nn.Module], str]] = {
        "ada_avgpool": (nn.AdaptiveAvgPool2d, "kv_per_win"),
        "ada_maxpool": (nn.AdaptiveMaxPool2d, "kv_per_win"),
        "avgpool": (nn.AvgPool2d, "kv_downsample_ratio"),
        "maxpool": (nn.MaxPool2d, "kv_downsample_ratio"),
    }
    if mode not in modes:
        raise ValueError(
            f"{owner}: kv_downsample_mode={mode!r} is unknown; allowed are 'identity', "
            + ", ".join(map(repr, modes))
        )
    kind, argument = modes[mode]
    if sizes[argument] < 1:
        raise ValueError(f"{owner}: {argument}={sizes[argument]} must be at least 1")
    return kind(sizes[argument])


class BiLevelRoutingAttentionNCHW(BiLevelRoutingAttention, name="bilevel_routing_nchw"):
    """Bi-level routing attention as in BiFormer's refactored code, which takes NCHW maps.

    Maps are channels-last here. It differs from `BiLevelRoutingAttention` where the grid does not
    divide the map: regions are `H // n_win` tokens high (at least 1), and as many as cover the
    map; queries, keys and values are padded with zeros, after the projection. Padded keys are
    attended to; the region means and the local enhancement leave them out. A map with fewer than
    `topk` regions attends to all of them. Cost as there: out = proj(attention(q, k, v over the
    routed regions) + LePE(v)).

    Args:
        dim, num_heads, n_win, qk_scale, topk, side_dwconv, auto_pad, proj_drop: as in
            `BiLevelRoutingAttention`.

    Raises:
        ValueError: as in `BiLevelRoutingAttention`.
    """

    official_names: ClassVar[Mapping[str, str | None]] = {
        r"qkv_linear\.(weight|bias)": r"qkv.\1",
        r"output_linear\.(weight|bias)": r"proj.\1",
    }
    cost = "4*N*C**2 + 2*N*C*min(topk, n_win**2)*N/n_win**2 + side_dwconv**2*N*C"
    examples = ({"dim": 32, "num_heads": 2, "n_win": 2, "topk": 9, "side_dwconv": 5},)

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        n_win: int | tuple[int, int] = 7,
        qk_scale: float | None = None,
        topk: int = 4,
        side_dwconv: int = 3,
        auto_pad: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads=num_heads,
            n_win=n_win,
            qk_scale=qk_scale,
            side_dwconv=side_dwconv,
            topk=1,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )
        if topk < 1:
            raise ValueError(f"{type(self).__name__}: topk={topk} must be at least 1")
        self.topk = topk  # of as many regions as there are on the map at hand

    def _region(self, height: int, width: int) -> tuple[int, int]:
        """Tokens of a region along (H, W)."""
        return max(1, height // self.n_win[0]), max(1, width // self.n_win[1])

    def grid(self, height: int, width: int) -> tuple[int, int]:
        tall, wide = self._region(height, width)
        return -(-height // tall), -(-width // wide)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lack = [-length % size for length, size in zip(x.shape[1:3], self._region(*x.shape[1:3]))]
        qkv = pad_map(self.qkv(x), lack)
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return query, key, value

    def _route(
        self, query: Tensor, key: Tensor, size: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        grid, extent = self.grid(*size), (size[0], size[1])
        topk = min(self.topk, grid[0] * grid[1])
        return route(query.detach(), key.detach(), grid, topk, extent=extent)[0], None

    def _enhance(self, lepe: nn.Conv2d, value: Tensor, height: int, width: int) -> Tensor:
        return _convolve(lepe, value[:, :height, :width])


class AttentionLePE(Mixer, name="attention_lepe"):
    """Dense attention with local enhancement, as in the last stage of BiFormer.

    output = proj(attention(q, k, v) + LePE(x)), or LePE(v) with `lepe_on="value"`. Cost for N
    tokens: 4 N C^2 + 2 N^2 C + N side_dwconv^2 C multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`.
        qkv_bias: bias of the query, key and value projection.
        qk_scale: factor on the scores; `head_dim ** -0.5` if None.
        attn_drop: dropout rate of the attention weights: 0, as in all published models.
        proj_drop: dropout rate after the output projection.
        side_dwconv: kernel size of the local enhancement, odd; 0: none.
        lepe_on: what is enhanced: "input", or "value" as in the official NCHW code.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or an argument is out of range.
    """

    paper = PAPER
    operator = "attention"
    cost = "4*N*C**2 + 2*N**2*C + side_dwconv**2*N*C"
    examples = (
        {"dim": 32, "num_heads": 2},
        {"dim": 32, "num_heads": 4, "qkv_bias": True, "lepe_on": "value", "side_dwconv": 3},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        side_dwconv: int = 5,
        lepe_on: str = "input",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner, factory = type(self).__name__, {"device": device, "dtype": dtype}
        _check_heads(owner, num_heads, dim=dim)
        if attn_drop != 0:
            raise ValueError(f"{owner}: attn_drop={attn_drop} is not supported; allowed is 0")
        if lepe_on not in ("input", "value"):
            raise ValueError(f"{owner}: lepe_on={lepe_on!r} is unknown; allowed: 'input', 'value'")
        self.num_heads, self.lepe_on = num_heads, lepe_on
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.lepe = _depthwise(owner, dim, side_dwconv, factory)

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        query, key, value = qkv_heads(self.qkv, x, self.num_heads)
        output = attention(query, key, value, scale=self.scale).flatten(-2)
        if self.lepe is not None:
            source = x if self.lepe_on == "input" else value.flatten(-2)
            output = output + _convolve(self.lepe, source)
        return self.proj_drop(self.proj(output))

    def extra_repr(self) -> str:
        """The number of heads, and what is enhanced."""
        return f"num_heads={self.num_heads}, lepe_on={self.lepe_on!r}"
