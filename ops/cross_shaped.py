"""Attention in a cross of stripes, with positions told apart by a convolution of the values (LePE).

Dong et al., "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows"
(arXiv 2107.00652). Parameters are named as in the official code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.mixer import Mixer, qkv_heads
from vitarium.ops.partition import Pair, Partition
from vitarium.ops.projection import Linear
from vitarium.ops.window import NAME, window_attention


class LePEStripes(nn.Module):
    """Attention within stripes of a map plus LePE: one branch of CSWin, without projections.

    Args:
        dim: number of channels.
        idx: 0 for stripes as high as the map, 1 for stripes as wide, -1 for the map itself.
        split_size: tokens across a stripe.
        scale: factor on the scores.
    """

    def __init__(
        self, dim: int, *, idx: int, split_size: int, scale: float, **factory: Any
    ) -> None:
        super().__init__()
        self.idx, self.split_size, self.scale = idx, split_size, scale
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)

    def padding(self, size: Pair) -> tuple[Pair, Pair]:
        """Rows and columns of zeros before and after a map, to whole stripes: half on each side."""
        lack = [0, 0]
        if self.idx >= 0:
            axis = 1 - self.idx
            lack[axis] = -size[axis] % self.split_size
        return (lack[0] // 2, lack[1] // 2), (lack[0] - lack[0] // 2, lack[1] - lack[1] // 2)

    def partition(self, size: Pair) -> Partition:
        """The stripes of a padded map."""
        return Partition.stripes(size, self.idx, self.split_size)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`(B, H, W, C)` of queries, keys and values `(B, H, W, num_heads, head_dim)`."""
        height, width = query.shape[1:3]
        (top, left), (bottom, right) = self.padding((height, width))
        if top or left or bottom or right:
            sides = (0, 0, 0, 0, left, right, top, bottom)
            query, key, value = (F.pad(x, sides) for x in (query, key, value))
        partition = self.partition((query.shape[1], query.shape[2]))
        attended = window_attention(query, key, value, partition.window_size, scale=self.scale)
        values = partition.split(value.flatten(-2))
        enhanced = self.get_v(values.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        output = attended.flatten(-2) + partition.join(enhanced)
        return output[:, top : top + height, left : left + width]


class CrossShapedAttention(Mixer, name="cross_shaped"):
    """Attention within a cross of stripes of the map, the mixer of CSWin.

        q, k, v = qkv(x);  out = proj([stripes_0(q, k, v), stripes_1(q, k, v)])
        stripes(q, k, v) = softmax(scale q k^T) v + get_v(v)  within each stripe,

    where half of the heads attends within stripes as high as the map, the other within stripes as
    wide, and get_v is a depthwise 3 x 3 convolution that ends at the stripe's border; in the last
    stage all attend to the map. Where stripes do not fill the map, queries, keys and values are
    padded with zeros, half on either side, which are attended to, as in the official code for
    segmentation. Cost for N tokens of a map of H x W and stripes of s: 4 N C^2 for the projections,
    N (H + W) s C of the attention and 9 N C, in multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`, even unless there is one branch.
        split_size: tokens across a stripe.
        resolution: side of the map that the mixer is for; any map will do.
        last_stage: whether there is one branch on the whole map; so too if the stripes are as wide
            as `resolution`.
        qkv_bias: bias of the query, key and value projection.
        qk_scale: factor on the scores; `head_dim ** -0.5` if None.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: numbers do not fit.
    """

    paper = "CSWin Transformer (arXiv 2107.00652)"
    operator = NAME
    cost = "4*N*C**2 + N*(H + W)*split_size*C + 9*N*C"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 32, "num_heads": 4, "split_size": 3},
        {"dim": 24, "num_heads": 3, "last_stage": True, "qkv_bias": True},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        split_size: int = 7,
        resolution: int | None = None,
        last_stage: bool = False,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner, factory = type(self).__name__, {"device": device, "dtype": dtype}
        branches = (-1,) if last_stage or resolution == split_size else (0, 1)
        count = len(branches)
        if num_heads < 1 or num_heads % count or dim % num_heads:
            raise ValueError(
                f"{owner}: num_heads={num_heads} must divide dim={dim}, and the branches, {count}, "
                "must divide num_heads"
            )
        if split_size < 1:
            raise ValueError(f"{owner}: split_size={split_size} must be at least 1")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.attns = nn.ModuleList(
            LePEStripes(dim // count, idx=idx, split_size=split_size, scale=scale, **factory)
            for idx in branches
        )

    def mix(self, x: Tensor) -> Tensor:
        count = len(self.attns)
        parts = (part.chunk(count, -2) for part in qkv_heads(self.qkv, x, self.num_heads))
        found = [branch(*three) for branch, three in zip(self.attns, zip(*parts))]
        return self.proj_drop(self.proj(found[0] if count == 1 else torch.cat(found, -1)))

    def _followed(self, calls: Sequence[dispatch.Call], wanted: Tensor) -> Tensor:
        found = []
        height, width = wanted.shape[-2:]
        for branch, call in zip(self.attns, calls):
            (top, left), (bottom, right) = branch.padding((height, width))
            padded = F.pad(wanted, (left, right, top, bottom))
            weights = self._weights(call, padded)
            found.append(weights[..., top : top + height, left : left + width])
        return torch.cat(found, 1)

    def extra_repr(self) -> str:
        """The number of heads."""
        return f"num_heads={self.num_heads}"
