"""Channel attention: channels attend to channels, by how alike they are over all positions.

Ding et al., "DaViT: Dual Attention Vision Transformers" (arXiv 2204.03645, section 3.2). For the
tokens n of an image and the channels i, j of a head,

    W = softmax over j of scale * sum over n of query[n, i] key[n, j]
    output[n, i] = sum over j of W[i, j] value[n, j]

Cost: 2 N head_dim multiply-adds a channel for N tokens: linear in the size of the map.

Both products are matrix products of the library, which read every operand once from where a joint
projection left it; scores are few. There are no bytes to save for a Triton kernel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.differentiable import Differentiable
from vitarium.ops.dispatch import Case, Implementation, Operator
from vitarium.ops.mixer import Mixer, qkv_heads
from vitarium.ops.packed import joint
from vitarium.ops.projection import Linear

NAME = "channel_attention"


def channel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every channel of a head to all channels of the head.

    Args:
        query: `(B, *spatial, num_heads, head_dim)`, spatial of any rank from 1; any strides.
        key, value: of the same shape.
        scale: factor on the scores; `head_dim ** -0.5` if None.
        backend: "reference", "torch", or None to choose.

    Returns:
        `(B, *spatial, num_heads, head_dim)`, contiguous, in the dtype of query.

    Raises:
        ValueError: shapes or devices do not fit, or the named backend does not exist.
        TypeError: an argument is of the wrong type, or dtypes differ.
    """
    scale = _check(query, key, value, scale)
    args = (*dispatch.autocast(query, key, value), scale)
    return dispatch.choose(NAME, backend, _IMPLEMENTATIONS, query.device, *args)(*args)


@dispatch.remembered
def _check(query: Tensor, key: Tensor, value: Tensor, scale: Any) -> float:
    """The scale; raises what `channel_attention` says it raises."""
    dispatch.check_tensors(NAME, query=query, key=key, value=value)
    if query.dim() < 4 or min(query.shape[-2:]) < 1:
        raise ValueError(
            f"{NAME}: query has shape {tuple(query.shape)}; allowed are 4 dimensions or more, "
            "(B, *spatial, num_heads, head_dim), with a head and a channel"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise ValueError(
                f"{NAME}: {name} has shape {tuple(tensor.shape)}, query {tuple(query.shape)}; they "
                "must agree"
            )
    return dispatch.check_scale(NAME, scale, query)


def _reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The definition, on `(B, heads, tokens, channels)`."""
    q, k, v = _by_head(query), _by_head(key), _by_head(value)
    weights = (scale * q.mT @ k).softmax(-1)
    return (v @ weights.mT).transpose(1, 2).reshape(value.shape).contiguous()


def _by_head(x: Tensor) -> Tensor:
    """`(B, heads, tokens, channels)`, a view where strides allow it."""
    return x.flatten(1, -3).transpose(1, 2)


# --- the portable path ---------------------------------------------------------------------------


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors `(B, *spatial, heads, channels)` as batches of matrices that are not copied.

    On a CPU these are the heads of one image or the images of one head, which have one stride, in
    as few parts as that takes; else all at once, for which the library may copy.
    """
    matrices = [_by_head(tensor) for tensor in tensors]
    if tensors[0].device.type != "cpu":
        return iter([tuple(matrices)])
    images, heads = matrices[0].shape[:2]
    return zip(*(matrix.unbind(int(images > heads)) for matrix in matrices))


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """In float32 at least: they are few."""
    scores = torch.matmul(query.mT, key)
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scale).softmax(-1)


def _saved_shape(query: Tensor, *_: Any) -> tuple[int, ...]:
    """The weights are kept for the backward where float32 holds them."""
    if query.dtype == torch.float64:
        return (0,)
    return (query.shape[0], query.shape[-2], query.shape[-1], query.shape[-1])


def _forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, fused: bool
) -> tuple[Tensor, Tensor]:
    output = value.new_empty(value.shape)
    saved = value.new_empty(_saved_shape(query), dtype=torch.float32)
    kept = _kept(saved)
    for (q, k, v, target), keep in zip(_parts(query, key, value, output), kept):
        weights = _weights(q, k, scale)
        if keep is not None:
            keep.copy_(weights)
        target.copy_(torch.matmul(v, weights.to(v.dtype).mT))
    return output, saved


def _kept(saved: Tensor) -> Iterable[Tensor | None]:
    """The weights of each part, where they are kept."""
    if not saved.numel():
        return itertools.repeat(None)
    return (part for (part,) in _parts(saved.transpose(1, 2)))


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    saved: Tensor,
    scale: float,
    fused: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    grads = _gradients(query, key, value)
    parts = zip(_parts(query, key, value, grad, *grads), _kept(saved))
    for (q, k, v, g, grad_q, grad_k, grad_v), weights in parts:
        if weights is None:
            weights = _weights(q, k, scale)
        products = torch.matmul(g.mT, v).to(weights.dtype).mul_(weights)
        inner = products.sub_(weights * products.sum(-1, keepdim=True)).mul_(scale).to(q.dtype)
        grad_q.copy_(torch.matmul(k, inner.mT))
        grad_k.copy_(torch.matmul(q, inner))
        grad_v.copy_(torch.matmul(g, weights.to(q.dtype)))
    return grads


def _gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Room for gradients, side by side where the tensors lie side by side."""
    order = sorted(range(len(tensors)), key=lambda i: tensors[i].storage_offset())
    if joint(*(tensors[i] for i in order)) is None:
        return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)
    *leading, heads, channels = tensors[0].shape
    room = tensors[0].new_empty(*leading, len(tensors), heads, channels).unbind(-3)
    return tuple(room[order.index(i)] for i in range(len(tensors)))


def _portable(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """What is fastest; of one image, whose matrices are not copied, ordinary operations are."""
    if dispatch.plain_aten():
        return _reference(query, key, value, scale)
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if recorded or not query.is_cpu or query.shape[0] > 1:
        return _OPERATION(query, key, value, scale, fused=False)
    q, k, v = _by_head(query), _by_head(key), _by_head(value)
    mixed = v @ _weights(q, k, scale).to(v.dtype).mT
    return mixed.transpose(1, 2).reshape(value.shape)


# --- the custom operator -------------------------------------------------------------------------


def _flops(query: Sequence[int], *_: Any) -> int:
    return 4 * math.prod(query) * query[-1]


_OPERATION = Differentiable(
    NAME,
    tensors="Tensor query, Tensor key, Tensor value",
    arguments="float scale",
    forward=_forward,
    backward=_backward,
    output_shape=lambda query, key, value, *_: value.shape,
    saved_shape=_saved_shape,
    flops=_flops,
    backward_flops=lambda query, *_: 2 * _flops(query),
)
_IMPLEMENTATIONS = {
    "reference": Implementation(_reference),
    "torch": Implementation(_portable),
}


# --- the mixers ----------------------------------------------------------------------------------


class ChannelAttentionV2(Mixer, name="channel_v2"):
    """Channel attention of DaViT's second code, Florence-2's vision tower.

        q, k, v = qkv(x);  out = proj(channel_attention(q, k, v))

    Parameters are named as in timm and the official code. Cost for N tokens: 4 N C^2 for the
    projections and 2 N C^2 / num_heads of the attention, in multiply-adds.

    `attention_map` is 1 at the position itself: with the weights of channels held fixed, an output
    has its own position's values only. Positions meet in those weights.

    Args:
        dim: number of channels C.
        num_heads: number of groups of channels; divides `dim`.
        qkv_bias: bias of the query, key and value projection.
        dynamic_scale: scores are multiplied by `N ** -0.5`, not by `head_dim ** -0.5`.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    paper = "DaViT: Dual Attention Vision Transformers (arXiv 2204.03645)"
    linear = True
    operator = NAME
    cost = "4*N*C**2 + 2*N*C**2/num_heads"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 32, "num_heads": 2},
        {"dim": 24, "num_heads": 3, "qkv_bias": False, "dynamic_scale": False},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = True,
        dynamic_scale: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{type(self).__name__}: {num_heads=} must divide dim={dim}")
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.dynamic_scale = dynamic_scale
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor) -> Tensor:
        query, key, value = self._roles(*qkv_heads(self.qkv, x, self.num_heads))
        tokens = x.shape[1] * x.shape[2]
        if torch.jit.is_tracing():  # which makes sizes tensors
            tokens = int(tokens)
        scale = tokens**-0.5 if self.dynamic_scale else None
        output = channel_attention(query, key, value, scale=scale)
        return self.proj_drop(self.proj(output.flatten(-2)))

    def _roles(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Which outputs of `qkv` are query, key and value."""
        return parts

    def _weights(self, call: dispatch.Call, wanted: Tensor) -> Tensor:
        return wanted.expand(-1, self.num_heads, -1, -1)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class ChannelAttention(ChannelAttentionV2, name="channel"):
    """Channel attention of DaViT's channel blocks.

        v, q, k = qkv(x);  out = proj(channel_attention(q, k, v))

    The first of the three outputs, which the official code calls the query, is the one that is
    mixed. Cost for N tokens: 4 N C^2 for the projections and 2 N C^2 / num_heads of the attention,
    in multiply-adds.

    Args:
        dim, num_heads, proj_drop: as in `ChannelAttentionV2`.
        qkv_bias: bias of the query, key and value projection.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    cost = "4*N*C**2 + 2*N*C**2/num_heads"
    examples = ({"dim": 32, "num_heads": 2}, {"dim": 24, "num_heads": 3, "qkv_bias": True})

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            dynamic_scale=False,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )

    def _roles(self, *parts: Tensor) -> tuple[Tensor, ...]:
        return parts[1], parts[2], parts[0]


# --- test cases ----------------------------------------------------------------------------------


def _case(note: str, *shape: int, **kwargs: Any) -> Case:
    return Case(note, dict.fromkeys(("query", "key", "value"), shape), kwargs)


CASES = (
    _case("map", 2, 5, 4, 2, 8),
    _case("sequence, width that is no power of two", 2, 19, 1, 6, scale=-0.3),
    _case("one token", 2, 1, 1, 2, 8, scale=1.0),
    _case("no images", 0, 3, 3, 1, 8),
)

OPERATOR = Operator(
    NAME, channel_attention, _IMPLEMENTATIONS, CASES, _OPERATION, context="same size"
)
