"""What adapters of timm's modules share: projections, and attention of one head."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import attention
from vitarium.ops.mixer import qkv_heads
from vitarium.ops.projection import linear, plain

_MANY = 512  # tokens from which on scores of all pairs are too many to be written


def pointwise(layer: Any, x: Tensor) -> Tensor:
    """A linear layer or a 1x1 convolution, of what has channels last.

    A layer that is neither (of low-rank adaptation, quantised, with hooks) is called as it is.
    """
    if plain(layer, nn.Linear, nn.Conv2d):
        return linear(x, layer.weight.flatten(1), layer.bias)
    if getattr(layer, "weight", x).dim() == 4:
        return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return layer(x)


def activated(act: Any, x: Tensor) -> Tensor:
    """`act(x)`, written over x, which nothing else reads, where that is the same."""
    return x.relu_() if plain(act, nn.ReLU) else act(x)


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
    """A convolution and batch normalisation, the two parts of `layer`, of a channels-first map.

    In evaluation the two are one convolution.
    """
    conv, norm = layer
    if norm.training or norm.running_mean is None or not plain(conv, nn.Conv2d):
        return norm(conv(x))
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = torch.addcmul(norm.bias, norm.running_mean, factor, value=-1)
    weight = conv.weight * factor[:, None, None, None]
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def single_head(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Attention of one head, of tokens `(B, width, N)`, which small maps on a CPU stay in.

    Args:
        query, key, value: `(B, width, N)`.
        scale: factor on the scores.
        bias: of all pairs of tokens, `(N, N)`.
    """
    if query.device.type != "cpu" or query.shape[-1] > _MANY:
        parts = (tensor.mT.unsqueeze(-2) for tensor in (query, key, value))
        output = attention(*parts, bias=None if bias is None else bias[None], scale=scale)
        return output.squeeze(-2).mT
    start = query.new_zeros(()) if bias is None else bias.to(query.dtype)
    weights = torch.baddbmm(start, query.mT, key, alpha=scale).softmax(-1)
    return torch.bmm(value, weights.mT)
