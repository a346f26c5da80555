"""Windows and grids of timm's models: Swin, Swin V2, MaxViT and its kin, DaViT."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import window_attention
from vitarium.ops.mixer import qkv_heads
from vitarium.ops.window_mixers import Layout, Pair, pair
from vitarium.zoo.swap import adapt

SWIN = "timm.models.swin_transformer.SwinTransformerBlock"
SWIN_V2 = "timm.models.swin_transformer_v2.SwinTransformerV2Block"
MAXXVIT = "timm.models.maxxvit"


def window_layout(size: Any, window_size: Pair, shift: Pair = (0, 0)) -> Layout:
    """Windows of a map `(H, W)` that is rolled, then padded to whole windows, as timm does it."""
    after = pair(-length % window for length, window in zip(size, window_size))
    roll = pair(s if a else 0 for s, a in zip(shift, after))
    return Layout(window_size, shift=shift, after=after, roll=roll)


def grid_layout(size: Any, grid_size: Pair) -> Layout:
    """The dilated grid of a map that is padded to a multiple of the grid."""
    after = pair(-length % grid for length, grid in zip(size, grid_size))
    dilation = pair((length + a) // g for length, a, g in zip(size, after, grid_size))
    return Layout(grid_size, dilation=dilation, after=after)


def attend(layout: Layout, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    """Attention in the windows of the padded map, cropped: `(B, H, W, channels of all heads)`."""
    output = window_attention(
        query,
        key,
        value,
        layout.window_size,
        dilation=layout.dilation,
        shift=layout.shift,
        **kwargs,
    )
    return layout.crop(output).flatten(-2)


# --- Swin ----------------------------------------------------------------------------------------


def table_bias(table: Tensor, window_size: Pair) -> Tensor:
    """The operator's bias from a table over query minus key, `(offsets, num_heads)`."""
    return table.T.unflatten(1, [2 * size - 1 for size in window_size]).flip(1, 2)


@adapt(
    SWIN,
    method="_attn",
    mixer="window",
    dropout="attn.attn_drop",
    needs=(
        "window_size",
        "shift_size",
        *(f"attn.{part}" for part in ("qkv", "proj", "proj_drop", "num_heads", "scale")),
        "attn.relative_position_bias_table",
    ),
)
def swin(block: Any, x: Tensor) -> Tensor:
    """Windows of Swin's block, on a channels-last map."""
    attn = block.attn
    layout = window_layout(x.shape[1:3], block.window_size, block.shift_size)
    output = attend(
        layout,
        *qkv_heads(attn.qkv, layout.pad(x), attn.num_heads),
        bias=table_bias(attn.relative_position_bias_table, block.window_size),
        scale=attn.scale,
    )
    return attn.proj_drop(attn.proj(output))
