"""What adapters of timm's modules share: projections, on channels-last maps or tokens."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.ops.mixer import qkv_heads
from vitarium.ops.projection import linear


def pointwise(layer: Any, x: Tensor) -> Tensor:
    """A linear layer or a 1x1 convolution, of what has channels last.

    A layer that is neither (of low-rank adaptation, quantised, with hooks) is called as it is.
    """
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    if type(layer) is nn.Linear and not hooked:
        return linear(x, layer.weight, layer.bias)
    if type(layer) is nn.Conv2d and not hooked:
        return linear(x, layer.weight.flatten(1), layer.bias)
    if getattr(layer, "weight", x).dim() == 4:
        return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return layer(x)


def split_heads(layer: Any, x: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `(..., num_heads, head_dim)` of a joint projection."""
    return qkv_heads(functools.partial(pointwise, layer), x, num_heads)


def split_biased(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of Swin V2 and BEiT, whose keys have no bias of their own."""
    if attn.q_bias is None:
        return split_heads(attn.qkv, x, attn.num_heads)
    bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    if attn.qkv_bias_separate:
        return qkv_heads(lambda x: pointwise(attn.qkv, x) + bias, x, attn.num_heads)
    return qkv_heads(lambda x: linear(x, attn.qkv.weight, bias), x, attn.num_heads)


def conv_norm(layer: Any, x: Tensor) -> Tensor:
    """A 1x1 convolution with batch normalisation, the two parts of `layer`.

    In evaluation the two are one linear layer.
    """
    conv, norm = layer
    if norm.training or norm.running_mean is None:
        return norm(pointwise(conv, x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * factor
    return linear(x, conv.weight.flatten(1) * factor[:, None], bias)
