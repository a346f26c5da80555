"""Long short distance attention: CrossFormer's groups of near or of evenly spaced tokens.

Wang et al., "CrossFormer" (arXiv 2108.00154) and "CrossFormer++" (2303.06908). A short-distance
group is a window of G x G tokens; a long-distance group takes every I-th token of a window that is
I times as large. Scores get a bias that a small network gives for the offset of query and key.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.window_mixers import Layout, Pair, WindowAttention, pair, query_minus_key

HIDDEN = -4096.0  # score of a key that is not to be seen; divided by the scale it fits float16


class DynamicPositionBias(nn.Module):
    """A bias for every head from a relative offset, by a small network (CrossFormer, section 3.3).

    Args:
        dim: four times the width of the network; CrossFormer gives a quarter of the channels.
        num_heads: number of outputs.
        residual: add the input of both hidden layers to their output.

    Raises:
        ValueError: `dim` is below 4.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        residual: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 4:
            raise ValueError(f"DynamicPositionBias: dim={dim} must be at least 4")
        factory = {"device": device, "dtype": dtype}
        width = dim // 4
        self.residual = residual
        self.pos_proj = nn.Linear(2, width, **factory)
        self.pos1 = self._layer(width, width, factory)
        self.pos2 = self._layer(width, width, factory)
        self.pos3 = self._layer(width, num_heads, factory)

    @staticmethod
    def _layer(width: int, out_features: int, factory: dict[str, Any]) -> nn.Sequential:
        return nn.Sequential(
            nn.LayerNorm(width, **factory), nn.ReLU(), nn.Linear(width, out_features, **factory)
        )

    def forward(self, biases: Tensor) -> Tensor:
        """The biases `(..., num_heads)` of offsets of query minus key, `(..., 2)`."""
        x = self.pos_proj(biases)
        for layer in (self.pos1, self.pos2):
            x = x + layer(x) if self.residual else layer(x)
        return self.pos3(x)


class LongShortDistanceAttention(WindowAttention, name="long_short_distance"):
    """CrossFormer's attention within groups of near tokens, or of tokens `interval` apart.

        q, k, v = qkv(x);  out = proj(softmax(scale q k^T + bias) v)  within each group,

    where bias = DynamicPositionBias(query - key), a small network on the offset. Cost for N tokens
    in groups of G x G: 4 N C^2 + 2 N G^2 C multiply-adds; long distance groups have as many tokens
    as the map has over `interval^2`.

    Where the shorter side of the map is at most `group_size`, it becomes the group size and groups
    are of near tokens; in dense prediction, the whole map becomes one group. CrossFormer++ varies
    `group_size` and `interval` from block to block; its cooling layer is a part of the block, not
    of the attention.

    Args:
        dim, num_heads, qkv_bias, qk_scale, proj_drop: as in `WindowAttention`.
        group_size: side G of a group; a pair (H, W) is taken as it is on any map.
        interval: distance I between the tokens of a long-distance group.
        lsda_flag: 0 for short-distance, 1 for long-distance groups.
        position_bias: learn the dynamic position bias `pos`.
        residual: of its network, as in `DynamicPositionBias`.
        pad_type: where a map is padded to a multiple of the group: 0 at the bottom and right, 1 on
            all sides.
        no_mask: attend to the padding, zeros before the projection.
        adaptive_interval: I is the map's height over G, rounded up; in dense prediction, the
            longer side over G.
        dense_prediction: as the official code for detection and segmentation, which differs from
            that for classification on maps that are not square.

    Raises:
        ValueError: a size, flag or width is impossible; the message says which.
    """

    paper = "CrossFormer (arXiv 2108.00154), CrossFormer++ (2303.06908)"
    linear = False
    no_weight_decay = ()
    official_names: ClassVar[dict[str, str | None]] = {
        r"biases|relative_position_index|attn_mask": None
    }
    cost = "4*N*C**2 + 2*N*group_size**2*C"
    examples = (
        {"dim": 32, "num_heads": 2, "group_size": 4},
        {"dim": 32, "num_heads": 2, "group_size": 3, "interval": 2, "lsda_flag": 1},
        {"dim": 32, "num_heads": 4, "group_size": 3, "interval": 3, "lsda_flag": 1, "pad_type": 1},
        {"dim": 32, "num_heads": 2, "group_size": 4, "lsda_flag": 1, "adaptive_interval": True,
         "no_mask": True},
        {"dim": 32, "num_heads": 2, "group_size": 6, "dense_prediction": True},
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        group_size: int | Pair = 7,
        interval: int = 8,
        lsda_flag: int = 0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        position_bias: bool = True,
        residual: bool = False,
        pad_type: int = 0,
        no_mask: bool = False,
        adaptive_interval: bool = False,
        dense_prediction: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        owner = type(self).__name__
        for argument, flag in (("lsda_flag", lsda_flag), ("pad_type", pad_type)):
            if flag not in (0, 1):
                raise ValueError(f"{owner}: {argument}={flag!r}; allowed are 0 and 1")
        factory = {"device": device, "dtype": dtype}
        super().__init__(
            dim,
            num_heads=num_heads,
            window_size=dispatch.per_dimension(owner, "group_size", group_size, 2),
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            rel_pos_type=None,
            proj_drop=proj_drop,
            **factory,
        )
        if position_bias and dim < 16:
            raise ValueError(f"{owner}: position_bias needs dim >= 16, got dim={dim}")
        self.square = isinstance(group_size, int)
        (self.interval,) = dispatch.per_dimension(owner, "interval", interval, 1)
        self.lsda_flag = lsda_flag
        self.pad_type = pad_type
        self.no_mask = no_mask
        self.adaptive_interval = adaptive_interval
        self.dense_prediction = dense_prediction
        self.pos = (
            DynamicPositionBias(dim // 4, num_heads, residual, **factory) if position_bias else None
        )

    def layout(self, height: int, width: int) -> Layout:
        group, dilation = self.window_size, (1, 1)
        if self.square and min(height, width) <= group[0]:
            # The official code for dense prediction pads the map to a square and hides the rest.
            group = (height, width) if self.dense_prediction else (min(height, width),) * 2
        elif self.lsda_flag:
            interval = self.interval
            if self.adaptive_interval:
                side = max(height, width) if self.dense_prediction else height
                interval = (side + group[0] - 1) // group[0]
            dilation = (interval, interval)
        sizes = list(zip((height, width), group, dilation))
        lack = [-length % (size * step) for length, size, step in sizes]
        first = [amount // 2 if self.pad_type else 0 for amount in lack]
        if self.no_mask:
            last = [amount - start for amount, start in zip(lack, first)]
            return Layout(group, dilation, before=pair(first), after=pair(last))
        # What lies outside of the map is not seen, so windows that begin outside of it need no
        # padding but a shift, unless one token in `step` begins a window elsewhere than the rest.
        shift = pair(-(start // step) % size for start, (_, size, step) in zip(first, sizes))
        before = pair(start % step for start, (_, _, step) in zip(first, sizes))
        return Layout(group, dilation, shift, before=before)

    def position_bias(self, window_size: Pair) -> Tensor | None:
        if self.pos is None:
            return None
        return self.pos(query_minus_key(window_size, self.pos.pos_proj.weight)).permute(2, 0, 1)

    def _project(
        self, x: Tensor, context: Tensor | None, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super()._project(x, context, layout)
        if any(layout.before) and not self.no_mask:
            # One more channel, whose product is the score that hides rows and columns before
            # the map.
            row, column = (
                torch.arange(length, device=x.device) < start
                for length, start in zip(key.shape[1:3], layout.before)
            )
            hidden = (HIDDEN * (row[:, None] | column)).to(key.dtype)[..., None, None]
            key = torch.cat([key, hidden.expand(*key.shape[:-1], 1)], dim=-1)
            query = F.pad(query, (0, 1), value=1 / self.scale)
        return query, key, value
