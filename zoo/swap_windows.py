"""Windows and grids of timm's models: Swin, Swin V2, MaxViT and its kin, DaViT, HaloNet."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import window_attention
from vitarium.ops.halo import halo_attention
from vitarium.ops.mixer import qkv_heads
from vitarium.ops.projection import linear, plain
from vitarium.ops.window_mixers import Layout, Pair, pair
from vitarium.zoo.swap import adapt
from vitarium.zoo.swap_parts import pointwise, split_biased, split_heads

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
        *split_heads(attn.qkv, layout.pad(x), attn.num_heads),
        bias=table_bias(attn.relative_position_bias_table, block.window_size),
        scale=attn.scale,
    )
    return attn.proj_drop(pointwise(attn.proj, output))


@adapt(
    SWIN_V2,
    method="_attn",
    mixer="window",
    dropout="attn.attn_drop",
    needs=(
        "window_size",
        "shift_size",
        *(f"attn.{part}" for part in ("qkv", "q_bias", "k_bias", "v_bias", "qkv_bias_separate")),
        *(f"attn.{part}" for part in ("proj", "proj_drop", "num_heads", "logit_scale", "cpb_mlp")),
        "attn.relative_coords_table",
    ),
)
def swin_v2(block: Any, x: Tensor) -> Tensor:
    """Windows of Swin V2's block, of cosine attention, on a channels-last map."""
    attn = block.attn
    layout = window_layout(x.shape[1:3], block.window_size, block.shift_size)
    query, key, value = split_biased(attn, layout.pad(x))
    temperature = attn.logit_scale.clamp(max=math.log(100)).exp()
    offsets = attn.cpb_mlp(attn.relative_coords_table)[0].permute(2, 0, 1).flip(1, 2)
    output = attend(
        layout,
        F.normalize(query, dim=-1) * temperature[:, 0],
        F.normalize(key, dim=-1),
        value,
        bias=16 * offsets.sigmoid(),
        scale=1.0,
    )
    return attn.proj_drop(pointwise(attn.proj, output))


# --- MaxViT --------------------------------------------------------------------------------------

POSITIONS = {
    "timm.layers.pos_embed_rel.RelPosBias",
    "timm.layers.pos_embed_rel.RelPosBiasTf",
    "timm.layers.pos_embed_rel.RelPosMlp",
}


def unknown_positions(*names: str) -> Any:
    """Why positions of parts of a module (or of itself, "") cannot be read, or None."""

    def unfit(module: Any) -> str | None:
        for name in names:
            rel_pos = getattr(module.get_submodule(name), "rel_pos", None)
            kind = type(rel_pos)
            if rel_pos is not None and f"{kind.__module__}.{kind.__name__}" not in POSITIONS:
                return f"{kind.__name__}: positions unknown"
        return None

    return unfit


def position_bias(rel_pos: Any, offsets: Tensor | None = None) -> Tensor | None:
    """The operator's bias `(num_heads, 2 * h - 1, 2 * w - 1)` of timm's relative positions.

    Args:
        rel_pos: timm's module of them, or None.
        offsets: what its network takes, if it is one and the window is not the module's.
    """
    if rel_pos is None:
        return None
    if hasattr(rel_pos, "mlp"):
        offsets = rel_pos.rel_coords_log if offsets is None else offsets
        bias = rel_pos.bias_act(rel_pos.mlp(offsets).permute(2, 0, 1).flip(1, 2))
        return bias if rel_pos.bias_gain is None else rel_pos.bias_gain * bias
    table = rel_pos.relative_position_bias_table
    return table if table.dim() == 3 else table_bias(table, rel_pos.window_size)


def maxvit_heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `(..., num_heads, head_dim)` of MaxViT's attention."""
    layer, heads = attn.qkv, attn.num_heads
    if not attn.head_first:
        return split_heads(layer, x, heads)
    if not plain(layer, nn.Linear, nn.Conv2d) or x.numel() < 2 * x.shape[-1] ** 2:
        query, key, value = pointwise(layer, x).unflatten(-1, (heads, 3, -1)).unbind(-2)
        return query, key, value
    # Windows are taken faster of all queries, then all keys: few rows of the weight move for it.
    weight, bias = (
        t if t is None else t.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        for t in (layer.weight.flatten(1), layer.bias)
    )
    return qkv_heads(lambda x: linear(x, weight, bias), x, heads)


def _partitioned(attn: Any, x: Tensor, layout: Layout) -> Tensor:
    output = attend(
        layout,
        *maxvit_heads(attn, layout.pad(x)),
        bias=position_bias(attn.rel_pos),
        scale=attn.scale,
    )
    return attn.proj_drop(pointwise(attn.proj, output))


_PARTS = ("qkv", "proj", "proj_drop", "num_heads", "head_first", "scale", "rel_pos")


@adapt(
    f"{MAXXVIT}.PartitionAttentionCl",
    method="_partition_attn",
    mixer="multi_axis",
    dropout="attn.attn_drop",
    needs=("partition_block", "partition_size", *(f"attn.{part}" for part in _PARTS)),
    unfit=unknown_positions("attn"),
)
def maxvit(block: Any, x: Tensor) -> Tensor:
    """Windows or the grid of MaxViT, on a channels-last map."""
    layout = window_layout if block.partition_block else grid_layout
    return _partitioned(block.attn, x, layout(x.shape[1:3], block.partition_size))


@adapt(
    f"{MAXXVIT}.ParallelPartitionAttention",
    method="_partition_attn",
    mixer="multi_axis",
    dropout="attn_block.attn_drop",
    needs=(
        "partition_size",
        "attn_grid.attn_drop",
        *(f"attn_{kind}.{part}" for kind in ("block", "grid") for part in _PARTS),
    ),
    unfit=unknown_positions("attn_block", "attn_grid"),
)
def maxvit_parallel(block: Any, x: Tensor) -> Tensor:
    """Windows and the grid of MaxViT side by side, on a channels-last map."""
    size = x.shape[1:3]
    return torch.cat(
        [
            _partitioned(block.attn_block, x, window_layout(size, block.partition_size)),
            _partitioned(block.attn_grid, x, grid_layout(size, block.partition_size)),
        ],
        dim=-1,
    )


@adapt(
    f"{MAXXVIT}.PartitionAttention2d",
    method="_partition_attn",
    mixer="multi_axis",
    dropout="attn.attn_drop",
    needs=("partition_block", "partition_size", *(f"attn.{part}" for part in _PARTS)),
    unfit=unknown_positions("attn"),
)
def maxvit_channels_first(block: Any, x: Tensor) -> Tensor:
    """Windows or the grid of MaxViT, on a channels-first map."""
    layout = window_layout if block.partition_block else grid_layout
    output = _partitioned(
        block.attn, x.permute(0, 2, 3, 1), layout(x.shape[2:], block.partition_size)
    )
    return output.permute(0, 3, 1, 2)


# --- DaViT ---------------------------------------------------------------------------------------


@adapt(
    "timm.models.davit.SpatialBlock",
    mixer="window",
    needs=(
        *("cpe1", "cpe2", "norm1", "mlp", "norm2", "drop_path1", "window_size"),
        *(f"attn.{part}" for part in ("qkv", "proj", "num_heads", "scale")),
    ),
)
def davit(block: Any, x: Tensor) -> Tensor:
    """DaViT's block of windows, of a channels-first map."""
    size, attn = x.shape[2:], block.attn
    tokens = block.cpe1(x).flatten(2).mT
    layout = window_layout(size, block.window_size)
    padded = layout.pad(block.norm1(tokens).unflatten(1, size))
    output = attend(layout, *split_heads(attn.qkv, padded, attn.num_heads), scale=attn.scale)
    tokens = tokens + block.drop_path1(pointwise(attn.proj, output.flatten(1, 2)))
    x = block.cpe2(tokens.mT.unflatten(2, size))
    if block.mlp is None:
        return x
    tokens = x.flatten(2).mT
    tokens = tokens + block.drop_path2(block.mlp(block.norm2(tokens)))
    return tokens.mT.unflatten(2, size)


# --- HaloNet -------------------------------------------------------------------------------------


@adapt(
    "timm.layers.halo_attn.HaloAttn",
    mixer="halo",
    needs=(
        *("q", "kv", "pool", "num_heads", "block_size", "block_stride", "halo_size", "scale"),
        *("scale_pos_embed", "pos_embed.height_rel", "pos_embed.width_rel"),
    ),
)
def halo(attn: Any, x: Tensor) -> Tensor:
    """HaloNet's attention, on a channels-first map."""
    height, width = x.shape[2:]
    if attn.block_stride > 1 or not isinstance(attn.pool, nn.Identity):
        # Fewer queries than keys, in one block of a stage: timm's way, of a map of whole blocks.
        below, right = (-length % attn.block_size for length in (height, width))
        output = type(attn).timm_class.forward(attn, F.pad(x, (0, right, 0, below)))
        return output[:, :, : (height + 1) // 2, : (width + 1) // 2]
    x = x.permute(0, 2, 3, 1)
    output = halo_attention(
        pointwise(attn.q, x).unflatten(-1, (attn.num_heads, -1)),
        pointwise(attn.kv, x).unflatten(-1, (attn.num_heads, -1)),
        attn.pos_embed.height_rel,
        attn.pos_embed.width_rel,
        block_size=attn.block_size,
        halo_size=attn.halo_size,
        scale=attn.scale,
        scale_pos_embed=attn.scale_pos_embed,
    )
    return output.flatten(-2).permute(0, 3, 1, 2).contiguous()  # as convolutions want it
