"""Dense attention of timm's models: VOLO, PVT v2, SHViT, CoAtNet, BEiT, relative position ViT."""

from __future__ import annotations

import functools
from typing import Any

import torch
from timm.layers.pos_embed_rel import gen_relative_log_coords, resize_rel_pos_bias_table
from torch import Tensor

from vitarium.ops import attention
from vitarium.ops.window_mixers import Pair
from vitarium.zoo.swap import adapt
from vitarium.zoo.swap_parts import (
    activated,
    conv_norm,
    pointwise,
    single_head,
    split_biased,
    split_heads,
)
from vitarium.zoo.swap_windows import (
    attend,
    maxvit_heads,
    position_bias,
    unknown_positions,
    window_layout,
)

_JOINT = ("qkv", "proj", "proj_drop", "num_heads", "scale")


@adapt("timm.models.volo.Attention", mixer="attention", dropout="attn_drop", needs=_JOINT)
def volo(attn: Any, x: Tensor) -> Tensor:
    """Multi-head attention of VOLO, on a channels-last map."""
    output = attention(*split_heads(attn.qkv, x, attn.num_heads), scale=attn.scale)
    return attn.proj_drop(pointwise(attn.proj, output.flatten(-2)))


@adapt(
    "timm.models.pvt_v2.Attention",
    mixer="attention",
    dropout="attn_drop",
    needs=("q", "kv", "pool", "sr", "norm", "act", "num_heads", "scale", "proj", "proj_drop"),
)
def pvt(attn: Any, x: Tensor, feat_size: Any) -> Tensor:
    """Attention of PVT v2 to a smaller map, of tokens `(B, N, C)`."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return type(attn).timm_class.forward(attn, x, feat_size)  # PyTorch's kernel, as fast as any
    query = pointwise(attn.q, x).unflatten(-1, (attn.num_heads, -1))
    if attn.sr is not None:
        x = x.mT.unflatten(2, (feat_size[0], feat_size[1]))
        x = attn.norm(attn.sr(x if attn.pool is None else attn.pool(x)).flatten(2).mT)
        x = x if attn.pool is None else attn.act(x)
    key, value = pointwise(attn.kv, x).unflatten(-1, (2, attn.num_heads, -1)).unbind(-3)
    output = attention(query, key, value, scale=attn.scale)
    return attn.proj_drop(pointwise(attn.proj, output.flatten(-2)))


@adapt(
    "timm.models.shvit.SHSA",
    mixer="single_head",
    needs=("pre_norm", "qkv", "proj", "pdim", "qk_dim", "dim", "scale"),
)
def shvit(attn: Any, x: Tensor) -> Tensor:
    """Single-head attention on a part of the channels, on a channels-first map."""
    part, rest = x.split([attn.pdim, attn.dim - attn.pdim], 1)
    parts = conv_norm(attn.qkv, attn.pre_norm(part)).flatten(2)
    query, key, value = parts.split([attn.qk_dim, attn.qk_dim, attn.pdim], 1)
    output = single_head(query, key, value, attn.scale).reshape(part.shape)
    act, last = attn.proj
    return conv_norm(last, activated(act, torch.cat([output, rest], 1)))


# --- relative positions of the whole map ---------------------------------------------------------


@adapt(
    "timm.models.maxxvit.Attention2d",
    mixer="attention",
    dropout="attn_drop",
    needs=(*_JOINT, "head_first", "rel_pos"),
    unfit=unknown_positions(""),
)
def coatnet(attn: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    """CoAtNet's relative attention, on a channels-first map."""
    size = (x.shape[2], x.shape[3])
    parts = maxvit_heads(attn, x.permute(0, 2, 3, 1))
    if attn.rel_pos is None:
        output = attention(*parts, bias=shared_rel_pos, scale=attn.scale).flatten(-2)
    else:  # the map is one window
        bias = sized_bias(attn.rel_pos, size)
        output = attend(window_layout(size, size), *parts, bias=bias, scale=attn.scale)
    return attn.proj_drop(pointwise(attn.proj, output).permute(0, 3, 1, 2))


def sized_bias(rel_pos: Any, size: Pair) -> Tensor | None:
    """The operator's bias for a map of any size: that of `set_window_size`, of the weights now."""
    window = tuple(rel_pos.window_size)
    if size == window:
        return position_bias(rel_pos)
    if hasattr(rel_pos, "mlp"):
        offsets = gen_relative_log_coords(size, rel_pos.pretrained_window_size, rel_pos.mode)
        return position_bias(rel_pos, offsets.to(rel_pos.rel_coords_log))
    table = position_bias(rel_pos)
    rows, columns = (_resizing(length, wanted).to(table) for length, wanted in zip(window, size))
    return rows @ table @ columns.mT


@functools.lru_cache(maxsize=64)
def _resizing(length: int, wanted: int) -> Tensor:
    """`(2 * wanted - 1, 2 * length - 1)`: timm's interpolation of a table along one axis."""
    source, target = 2 * length - 1, 2 * wanted - 1
    # timm interpolates the axes one by one, and both where one changes: unit tables show how.
    unit = torch.eye(source)[:, :, None].expand(-1, -1, 3)
    found = resize_rel_pos_bias_table(unit, (wanted, 3), (source, target, 5))
    return found[:, :, 2].T.double()


@adapt(
    "timm.models.beit.Attention",
    mixer="attention",
    dropout="attn_drop",
    needs=(
        *(*_JOINT, "q_bias", "k_bias", "v_bias", "qkv_bias_separate"),
        *("relative_position_bias_table", "relative_position_index"),
    ),
    fixed_size=True,
)
def beit(attn: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    """Attention of BEiT, of tokens `(B, N, C)`."""
    bias = shared_rel_pos_bias
    if attn.relative_position_bias_table is not None:
        found = _looked_up(attn.relative_position_bias_table, attn.relative_position_index)
        bias = found if bias is None else found + bias
    output = attention(*split_biased(attn, x), bias=bias, scale=attn.scale)
    return attn.proj_drop(pointwise(attn.proj, output.flatten(-2)))


@adapt(
    "timm.models.vision_transformer_relpos.RelPosAttention",
    mixer="attention",
    dropout="attn_drop",
    needs=(*_JOINT, "q_norm", "k_norm", "rel_pos"),
    fixed_size=True,
)
def relative_vit(attn: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    """Attention of timm's ViT with relative positions, of tokens `(B, N, C)`."""
    query, key, value = split_heads(attn.qkv, x, attn.num_heads)
    bias = shared_rel_pos if attn.rel_pos is None else attn.rel_pos.get_bias()
    output = attention(attn.q_norm(query), attn.k_norm(key), value, bias=bias, scale=attn.scale)
    return attn.proj_drop(pointwise(attn.proj, output.flatten(-2)))


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """The bias `(1, num_heads, N, N)` of a table `(offsets, num_heads)`."""
    return table.index_select(0, index.flatten()).view(*index.shape, -1).permute(2, 0, 1)[None]
