"""Windows that see a border around them: HaloNet's attention and HAT's overlapping cross attention.

Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones" (HaloNet,
arXiv 2103.12731); Chen et al., "Activating More Pixels in Image Super-Resolution Transformer" (HAT,
2205.04437). The map is cut into blocks; the queries of a block attend to the block and to `halo`
tokens around it. Both papers' code surrounds keys and values with zeros that are attended to, so
they are given to `window_attention` with their border.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.mixer import Mixer, qkv_heads
from vitarium.ops.projection import Linear
from vitarium.ops.window import NAME, window_attention
from vitarium.ops.window_mixers import check_context


class HaloAttention(Mixer, name="halo"):
    """HaloNet's attention: blocks with a halo, and 2-D relative position logits.

    For a query q and a key k, r rows and c columns away from it:

        score = scale * (q . k) + q . height_rel[r] + q . width_rel[c]

    A map that blocks do not divide goes on with zeros, like its border. There is no projection
    after the attention, as in HaloNet.

    The logits are a part of the product: a query carries its logits for the rows and for the
    columns of its window, a key the one-hot vectors of its row and column. Cost of the attention
    for N tokens, blocks of b and w = b + 2 halo: N w^2 (2 C + 2 w num_heads) multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`.
        block_size: side of a block of queries.
        halo_size: tokens around a block that its queries see.
        dim_head: width of a query's and a key's head; from `qk_ratio` if None.
        qk_ratio: widths of all query heads over `dim`, rounded to a multiple of 8.
        qkv_bias: bias of the projections.
        scale_pos_embed: `scale` multiplies the relative logits, too.
        proj_drop: dropout rate of the output.

    Raises:
        ValueError: a width or size is impossible; the message says which.
    """

    paper = "HaloNet (arXiv 2103.12731)"
    linear = True
    operator = NAME
    cross = True
    cost = (
        "3*N*C**2 + 2*N*(block_size + 2*halo_size)*C + 2*N*(block_size + 2*halo_size)**2*(C "
        "+ (block_size + 2*halo_size)*num_heads)"
    )
    examples = (
        {"dim": 32, "num_heads": 2, "block_size": 4, "halo_size": 2},
        {"dim": 24, "num_heads": 3, "block_size": 3, "halo_size": 1, "dim_head": 4},
        {"dim": 32, "num_heads": 2, "block_size": 2, "halo_size": 3, "qk_ratio": 0.5,
         "qkv_bias": True, "scale_pos_embed": True},
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        block_size: int = 8,
        halo_size: int = 3,
        dim_head: int | None = None,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        scale_pos_embed: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"HaloAttention: num_heads={num_heads} must divide dim={dim}")
        (self.block_size,) = dispatch.per_dimension("HaloAttention", "block_size", block_size, 1)
        (self.halo_size,) = dispatch.per_dimension(
            "HaloAttention", "halo_size", halo_size, 1, least=0
        )
        if dim_head is None:
            dim_head = _multiple_of_8(dim * qk_ratio) // num_heads
        if dim_head < 1:
            raise ValueError(
                f"HaloAttention: dim_head={dim_head} must be at least 1 (qk_ratio={qk_ratio})"
            )
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.dim_head = dim_head
        self.scale = dim_head**-0.5
        self.scale_pos_embed = scale_pos_embed
        self.q = Linear(dim, num_heads * dim_head, bias=qkv_bias, **factory)
        self.kv = Linear(dim, num_heads * dim_head + dim, bias=qkv_bias, **factory)
        self.pos_embed = RelativePositionEmbedding(self.window_size, dim_head, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def window_size(self) -> int:
        """Side of what a query sees."""
        return self.block_size + 2 * self.halo_size

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_context(self, x, context)
        output = halo_attention(
            self.q(x).unflatten(-1, (self.num_heads, -1)),
            self.kv(x if context is None else context).unflatten(-1, (self.num_heads, -1)),
            self.pos_embed.height_rel,
            self.pos_embed.width_rel,
            block_size=self.block_size,
            halo_size=self.halo_size,
            scale=self.scale,
            scale_pos_embed=self.scale_pos_embed,
        )
        return self.proj_drop(output.flatten(-2))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, block_size={self.block_size}, halo_size={self.halo_size}"
        )


class RelativePositionEmbedding(nn.Module):
    """Embeddings of how many rows and columns a key lies after a query, one for each distance.

    Args:
        window_size: side w of what a query sees.
        dim_head: width of a query's head.
    """

    def __init__(
        self,
        window_size: int,
        dim_head: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        shape = (2 * window_size - 1, dim_head)
        self.height_rel = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.width_rel = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the embeddings anew."""
        for embedding in self.parameters():
            nn.init.trunc_normal_(embedding, std=embedding.shape[1] ** -0.5)


def halo_attention(
    query: Tensor,
    key_value: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    *,
    block_size: int,
    halo_size: int,
    scale: float,
    scale_pos_embed: bool,
) -> Tensor:
    """Attention of blocks to a halo around them, of any map; beyond it are zeros.

    Args:
        query: `(B, H, W, num_heads, dim_head)`.
        key_value: `(B, H, W, num_heads, dim_head + value_dim)`.
        height_rel, width_rel: embeddings `(2 * w - 1, dim_head)` of distances in rows and columns,
            w = block_size + 2 halo_size; see `RelativePositionEmbedding`.
        block_size, halo_size, scale_pos_embed: as in `HaloAttention`.
        scale: factor on the scores.

    Returns:
        `(B, H, W, num_heads, value_dim)`.
    """
    height, width = query.shape[1:3]
    dim_head, window = query.shape[-1], block_size + 2 * halo_size
    after = [-length % block_size for length in (height, width)]
    query = _surround(query, 0, after)
    content = query if scale_pos_embed else query * scale
    logits = _relative_logits(query, height_rel, width_rel, block_size)
    query = torch.cat([content, *logits], dim=-1)
    key_value = _surround(key_value, halo_size, after)
    key, value = key_value.split([dim_head, key_value.shape[-1] - dim_head], dim=-1)
    row, column = (
        F.one_hot(torch.arange(length, device=key.device) % window, window).to(key.dtype)
        for length in key.shape[1:3]
    )
    shape = (*key.shape[:-1], window)
    key = torch.cat([key, row[:, None, None].expand(shape), column[:, None].expand(shape)], dim=-1)
    output = window_attention(
        query, key, value, block_size, halo=halo_size, scale=scale if scale_pos_embed else 1.0
    )
    return output[:, :height, :width]


def _relative_logits(
    query: Tensor, height_rel: Tensor, width_rel: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Logits of queries `(B, H, W, num_heads, dim_head)` for rows, and for columns.

    Returns:
        Twice `(B, H, W, num_heads, w)`; entry m is of the row (column) of a query's window whose
        place on the bordered map is m modulo w.
    """
    rows, columns = (
        embedding[_distances(length, block_size, (len(embedding) + 1) // 2, query.device)]
        for embedding, length in zip((height_rel, width_rel), query.shape[1:3])
    )
    return (
        torch.einsum("byxhd,ymd->byxhm", query, rows.to(query.dtype)),
        torch.einsum("byxhd,xmd->byxhm", query, columns.to(query.dtype)),
    )


def _distances(length: int, block_size: int, window: int, device: torch.device) -> Tensor:
    """Index of the embedding `(length, window)` for a query and a place modulo `window`.

    Embeddings are counted by place of the key in the window minus place of the query in its block,
    as in timm; the least that occurs has index `window - block_size`.
    """
    query = torch.arange(length, device=device)[:, None]
    start = query // block_size * block_size  # of the window, on the bordered map
    place = torch.arange(window, device=device)
    key = (place - start) % window
    return key - (query - start) + window - 1


class OverlappingCrossAttention(Mixer, name="overlapping_cross"):
    """HAT's overlapping cross attention: windows whose keys come from larger, overlapping ones.

        q, k, v = qkv(x);  out = proj(softmax(scale q k^T + bias) v),

    q in windows of w x w and k, v in windows of o x o = w + int(overlap_ratio w) around them. The
    border of the map is zeros after the projection, attended to with their position bias. A map
    that windows do not divide goes on with the same zeros. Cost for N tokens: 4 N C^2 + 2 N o^2 C
    multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`.
        window_size: side w of a window of queries.
        overlap_ratio: how much longer the window of keys is, over `window_size`; its side is
            `window_size + int(window_size * overlap_ratio)`, the difference even.
        qkv_bias: bias of the query, key and value projection.
        qk_scale: factor on the scores; `head_dim ** -0.5` if None.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: a width or size is impossible; the message says which.
    """

    paper = "HAT (arXiv 2205.04437)"
    linear = True
    operator = NAME
    cross = True
    no_weight_decay = ("relative_position_bias_table",)
    official_names: ClassVar[dict[str, str | None]] = {r"relative_position_index(_OCA)?": None}
    cost = "4*N*C**2 + 2*N*(window_size*(1 + overlap_ratio))**2*C"
    examples = (
        {"dim": 32, "num_heads": 2, "window_size": 4, "overlap_ratio": 0.5},
        {"dim": 24, "num_heads": 3, "window_size": 3, "overlap_ratio": 2.0, "qkv_bias": False},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        window_size: int = 16,
        overlap_ratio: float = 0.5,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{owner}: num_heads={num_heads} must divide dim={dim}")
        (self.window_size,) = dispatch.per_dimension(owner, "window_size", window_size, 1)
        overlap = int(window_size * overlap_ratio)
        if overlap < 0 or overlap % 2:
            raise ValueError(
                f"{owner}: overlap_ratio={overlap_ratio} makes the window of keys {overlap} tokens "
                f"longer than window_size={window_size}; allowed are even numbers from 0"
            )
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.halo_size = overlap // 2
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        side = 2 * self.window_size + overlap - 1
        self.relative_position_bias_table = nn.Parameter(
            torch.empty(side * side, num_heads, **factory)
        )
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias table anew; the projections have their own `reset_parameters`."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def position_bias(self) -> Tensor:
        """The bias `(num_heads, side, side)` of every key minus query.

        The paper's code begins to count offsets `overlap_window - 2` rows and columns too early
        and wraps around, so that its table is this one rolled.
        """
        overlap_window = self.window_size + 2 * self.halo_size
        side = self.window_size + overlap_window - 1
        table = self.relative_position_bias_table.roll((overlap_window - 2) * (side + 1), 0)
        return table.T.unflatten(1, (side, side))

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_context(self, x, context)
        height, width = x.shape[1:3]
        after = [-length % self.window_size for length in (height, width)]
        query, key, value = qkv_heads(self.qkv, x, self.num_heads, context)
        output = window_attention(
            _surround(query, 0, after),
            _surround(key, self.halo_size, after),
            _surround(value, self.halo_size, after),
            self.window_size,
            halo=self.halo_size,
            bias=self.position_bias(),
            scale=self.scale,
        )
        output = output[:, :height, :width].flatten(-2)
        return self.proj_drop(self.proj(output))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, window_size={self.window_size}, "
            f"halo_size={self.halo_size}"
        )


def _surround(x: Tensor, border: int, after: list[int]) -> Tensor:
    """Zeros around a map of heads `(B, H, W, num_heads, head_dim)`, more of them `after` it."""
    padding = (border, border + after[1], border, border + after[0])
    return F.pad(x, (0, 0, 0, 0, *padding)) if any(padding) else x


def _multiple_of_8(value: float) -> int:
    """The nearest multiple of 8 that is at least 8 and not a tenth less than `value`."""
    nearest = max(8, int(value + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * value else nearest
