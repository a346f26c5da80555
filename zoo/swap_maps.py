"""Outlook and channel attention, focal modulation and cascaded groups of timm's models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import channel_attention, outlook_attention
from vitarium.zoo.swap import adapt
from vitarium.zoo.swap_parts import activated, conv_norm, pointwise, single_head, split_heads

DAVIT = "timm.models.davit"

# --- VOLO ----------------------------------------------------------------------------------------


@adapt(
    "timm.models.volo.OutlookAttention",
    mixer="outlook",
    dropout="attn_drop",
    needs=(
        *("v", "attn", "proj", "proj_drop", "pool"),
        *("num_heads", "kernel_size", "padding", "stride", "scale"),
    ),
)
def outlook(attn: Any, x: Tensor) -> Tensor:
    """VOLO's outlook attention, on a channels-last map."""
    cells = attn.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if attn.stride > 1 else x
    places = attn.kernel_size**2
    output = outlook_attention(
        pointwise(attn.attn, cells).unflatten(-1, (attn.num_heads, places, places)),
        pointwise(attn.v, x).unflatten(-1, (attn.num_heads, -1)),
        attn.kernel_size,
        stride=attn.stride,
        padding=attn.padding,
        scale=attn.scale,
    )
    return attn.proj_drop(pointwise(attn.proj, output.flatten(-2)))


# --- DaViT ---------------------------------------------------------------------------------------


@adapt(f"{DAVIT}.ChannelAttention", mixer="channel", needs=("qkv", "proj", "num_heads", "scale"))
def channel(attn: Any, x: Tensor) -> Tensor:
    """DaViT's channel attention of tokens `(B, N, C)`."""
    value, query, key = split_heads(attn.qkv, x, attn.num_heads)
    output = channel_attention(query, key, value, scale=attn.scale)
    return pointwise(attn.proj, output.flatten(-2))


@adapt(
    f"{DAVIT}.ChannelAttentionV2",
    mixer="channel_v2",
    needs=("qkv", "proj", "groups", "head_dim", "dynamic_scale"),
)
def channel_v2(attn: Any, x: Tensor) -> Tensor:
    """Channel attention of DaViT's second code, of tokens `(B, N, C)`."""
    scale = (x.shape[1] if attn.dynamic_scale else attn.head_dim) ** -0.5
    output = channel_attention(*split_heads(attn.qkv, x, attn.groups), scale=scale)
    return pointwise(attn.proj, output.flatten(-2))


# --- FocalNet ------------------------------------------------------------------------------------


@adapt(
    "timm.models.focalnet.FocalModulation",
    mixer="focal",
    needs=(
        *("f", "h", "act", "proj", "proj_drop", "norm", "focal_layers"),
        *("input_split", "focal_level", "normalize_modulator"),
    ),
    unfit=lambda attn: None if attn.focal_level else "no levels, which timm cannot compute",
)
def focal(attn: Any, x: Tensor) -> Tensor:
    """Focal modulation, on a channels-first map."""
    query, context, gates = attn.f(x).split(attn.input_split, 1)
    modulator: Any = 0
    for level, layer in enumerate(attn.focal_layers):
        context = layer(context)
        gate = gates[:, level : level + 1]
        modulator = torch.addcmul(modulator, context, gate) if level else context * gate
    whole = attn.act(context.mean((2, 3), keepdim=True))
    modulator = torch.addcmul(modulator, whole, gates[:, attn.focal_level :])
    if attn.normalize_modulator:
        modulator = modulator / (attn.focal_level + 1)
    return attn.proj_drop(attn.proj(attn.norm(query * attn.h(modulator))))


# --- EfficientViT --------------------------------------------------------------------------------


@adapt(
    "timm.models.efficientvit_msra.LocalWindowAttention",
    mixer="cascaded_group",
    needs=tuple(
        f"attn.{part}"
        for part in ("qkvs", "dws", "proj", "resolution", "key_dim", "val_dim", "scale",
                     "attention_biases", "attention_bias_idxs")
    ),
)  # fmt: skip
def cascaded_group(block: Any, x: Tensor) -> Tensor:
    """EfficientViT's cascaded groups in windows, on a channels-first map."""
    attn, side = block.attn, block.attn.resolution
    height, width = x.shape[2:]
    below, right = -height % side, -width % side
    if below or right:
        x = F.pad(x, (0, right, 0, below))
    rows, columns = (height + below) // side, (width + right) // side
    if rows * columns > 1:
        x = x.unflatten(3, (columns, side)).unflatten(2, (rows, side))
        # In windows, convolutions are the fastest with channels last.
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(0, 2).permute(0, 3, 1, 2)
    index = attn.attention_bias_idxs
    bias = attn.attention_biases.index_select(1, index.flatten()).unflatten(1, index.shape)
    outputs: list[Tensor] = []
    for head, (part, qkv, dw) in enumerate(zip(x.chunk(len(attn.qkvs), 1), attn.qkvs, attn.dws)):
        part = part + outputs[-1] if outputs else part
        query, key, value = conv_norm(qkv, part).split(
            [attn.key_dim, attn.key_dim, attn.val_dim], 1
        )
        tokens = (tensor.flatten(2) for tensor in (conv_norm(dw, query), key, value))
        output = single_head(*tokens, attn.scale, bias[head])
        outputs.append(output.unflatten(2, (side, side)))
    act, last = attn.proj
    x = conv_norm(last, activated(act, torch.cat(outputs, 1)))
    if rows * columns > 1:
        x = x.unflatten(0, (-1, rows, columns)).permute(0, 3, 1, 4, 2, 5)
        x = x.flatten(4, 5).flatten(2, 3)
    return x[:, :, :height, :width]
