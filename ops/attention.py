"""Dense attention: every query attends to every key.

Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762); heads that share keys and values:
Ainslie et al. (2305.13245). For the scores S = scale Q K^T + bias the output is softmax(S) V.
Cost: N M (head_dim + value_dim) multiply-adds a head for N queries and M keys.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import dense, dispatch
from vitarium.ops.dense_chunks import has_infinities
from vitarium.ops.dense_operation import dense_operation
from vitarium.ops.dispatch import Case, Implementation, Operator

NAME = "attention"


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query token to every key token.

    Tokens are counted in raster order: N of the query, M of key and value. A query that sees no
    key (M = 0, or a row of bias that is all -inf) has output 0 and sends no gradient.

    Args:
        query: `(B, *spatial, num_heads, head_dim)`, spatial of any rank from 1; any strides.
        key: `(B, *spatial_kv, num_heads_kv, head_dim)`, of any rank from 1 and any number of
            tokens; num_heads_kv divides num_heads, and query head h reads key and value head
            `h // (num_heads // num_heads_kv)`.
        value: `(B, *spatial_kv, num_heads_kv, value_dim)`.
        bias: `(num_heads or 1, N, M)` or `(B or 1, num_heads or 1, N, M)`, added to the scaled
            scores; floating-point, -inf hides a key; it may require a gradient.
        is_causal: token i sees keys 0 ... i only, also where N and M differ.
        scale: factor on the scores; `head_dim ** -0.5` if None.
        backend: "reference", "torch", "triton", or None to choose.

    Returns:
        `(B, *spatial, num_heads, value_dim)`, contiguous, in the dtype of query.

    Raises:
        ValueError: shapes or devices do not fit, or the named backend cannot run this.
        TypeError: an argument is of the wrong type, or dtypes differ.
    """
    scale = check(NAME, query, key, value, bias, is_causal, scale)
    query, key, value = dispatch.autocast(query, key, value)
    args = (query, key, value, bias, is_causal, scale, training(query, key, value, bias))
    return dispatch.choose(NAME, backend, _IMPLEMENTATIONS, query.device, *args)(*args)


@dispatch.remembered
def check(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: Any,
    scale: Any,
) -> float:
    """The scale; raises what `attention` says it raises, in the name of operator `name`."""
    dispatch.check_tensors(name, query=query, key=key, value=value)
    q, k, v = query.shape, key.shape, value.shape
    fits = (
        (len(q) >= 4 and len(k) >= 4)
        and (q[0] == k[0] and k[:-1] == v[:-1] and q[-1] == k[-1])
        and (k[-1] >= 1 and v[-1] >= 1 and k[-2] >= 1 and q[-2] % k[-2] == 0)
    )
    if not fits:
        _complain(name, query, key, value)
    if bias is not None:
        check_bias(name, bias, query, key)
    if not isinstance(is_causal, bool):
        raise TypeError(f"{name}: is_causal must be True or False, got {is_causal!r}")
    return dispatch.check_scale(name, scale, query)


def _complain(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises what is wrong with these shapes."""
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 4:
            raise ValueError(
                f"{name}: {argument} has shape {tuple(tensor.shape)}; allowed are 4 dimensions or "
                "more, (B, *spatial, num_heads, head_dim)"
            )
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name}: {argument} has batch size {tensor.shape[0]}, query {query.shape[0]}; "
                "they must agree"
            )
        if tensor.shape[-1] < 1:
            raise ValueError(
                f"{name}: {argument} has head_dim {tensor.shape[-1]}; allowed is at least 1"
            )
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"{name}: value has shape {tuple(value.shape)}, key {tuple(key.shape)}; all dimensions "
            "but the last must agree"
        )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"{name}: key has head_dim {key.shape[-1]}, query {query.shape[-1]}; they must agree"
        )
    num_heads, num_heads_kv = query.shape[-2], key.shape[-2]
    if num_heads_kv < 1 or num_heads % num_heads_kv:
        raise ValueError(
            f"{name}: key has {num_heads_kv} heads, which do not divide the query's {num_heads}"
        )


def check_bias(
    name: str,
    bias: Any,
    query: Tensor,
    key: Tensor,
    argument: str = "bias",
    *,
    batched: bool = True,
) -> None:
    """Raises unless the bias is one for the scores of query and key; `batched`: maybe of images."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor or None, got {type(bias).__name__}")
    if not bias.is_floating_point():
        raise TypeError(f"{name}: {argument} must be floating-point, got {bias.dtype}")
    if bias.device != query.device:
        raise ValueError(f"{name}: {argument} is on {bias.device}, query on {query.device}")
    tokens = (math.prod(query.shape[1:-2]), math.prod(key.shape[1:-2]))
    batch, heads = query.shape[0], query.shape[-2]
    shape = tuple(bias.shape)
    if not batched:
        if shape != (heads, *tokens):
            raise ValueError(
                f"{name}: {argument} has shape {shape}; allowed is {(heads, *tokens)}, "
                "(num_heads, queries, keys) of its stage"
            )
        return
    fits = len(shape) in (3, 4) and shape[-2:] == tokens and shape[-3] in (1, heads)
    if not fits or (len(shape) == 4 and shape[0] not in (1, batch)):
        last = f"{heads} or 1, {tokens[0]}, {tokens[1]}"
        raise ValueError(
            f"{name}: {argument} has shape {shape}; allowed are ({last}) and ({batch} or 1, "
            f"{last}), (batch, num_heads, queries, keys)"
        )


# --- the definition ------------------------------------------------------------------------------


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    training: bool,
) -> Tensor:
    """The definition, see `attend`."""
    return attend(query, key, value, bias, is_causal, scale, bias is not None)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    hides: bool,
) -> Tensor:
    """softmax(scale Q K^T + bias) V; `hides`: the bias may hide all keys of a query."""
    shape = query.shape
    heads = query.shape[-2]
    query, key, value = dense.flat(query), dense.flat(key), dense.flat(value)
    key, value = dense.repeat_heads(key, heads), dense.repeat_heads(value, heads)
    scores = query * scale @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if hides:  # softmax of nothing but -inf would be NaN
        hidden = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(hidden, 0).softmax(-1).masked_fill(hidden, 0)
    else:
        weights = scores.softmax(-1)
    output = (weights @ value).transpose(1, 2).contiguous()
    return output.view(*shape[:-1], value.shape[-1])


# --- the portable path ---------------------------------------------------------------------------

# Scores of a call up to which ordinary operations are as fast as any: in training in half
# precision and not, and in inference.
SMALL = (1 << 22, 1 << 20)
SMALL_INFERENCE = 1 << 18


def portable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    training: bool,
) -> Tensor:
    """What is fastest where the kernels do not run."""
    args = (query, key, value, bias, is_causal, scale, training)
    if dispatch.plain_aten():
        return reference(*args)
    scores = query.shape[0] * query.shape[-2] * dense.tokens(query) * dense.tokens(key)
    if query.is_cuda:
        serves = _cuda_serves(query, value, bias, training)
    else:
        learns_bias = training and bias is not None and bias.requires_grad
        serves = not learns_bias and dense.flash_serves(query, value, bias, None, is_causal)
    if serves and scores:
        if bias is not None:  # only with four dimensions it does not take its slow path
            bias = bias.to(query.dtype) if bias.dim() == 4 else bias.to(query.dtype)[None]
        output = F.scaled_dot_product_attention(
            dense.flat(query),
            *(dense.repeat_heads(dense.flat(t), query.shape[-2]) for t in (key, value)),
            bias,
            is_causal=is_causal,
            scale=scale,
        )
        return output.transpose(1, 2).contiguous().view(*query.shape[:-1], value.shape[-1])
    small = SMALL[int(query.element_size() > 2)] if training else SMALL_INFERENCE
    if scores <= small and query.is_cpu and not torch.compiler.is_compiling():
        hides = bias is not None and has_infinities(bias)
        if is_causal or hides:
            return attend(query, key, value, bias, is_causal, scale, hides)
        return _attend_by_head(query, key, value, bias, scale)
    return _OPERATION(*args, fused=False)


def _attend_by_head(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """`attend` to all keys, in fewer steps: products of `(B x heads, tokens, channels)`."""
    heads = query.shape[-2]
    shared = key.shape[-2] if bias is None else heads
    k, v = (dense.repeat_heads(dense.flat(t), shared).flatten(0, 1) for t in (key, value))
    # Without a bias the queries of all heads that share keys are rows of one product.
    tokens = dense.tokens(query)
    q = dense.flat(query).reshape(len(k), heads // shared * tokens, k.shape[-1])
    if bias is not None and heads == 1:
        scores = torch.baddbmm(bias.to(q.dtype).flatten(0, -3), q, k.mT, alpha=scale)
    else:
        scores = torch.bmm(q * scale, k.mT)
        if bias is not None:
            scores = scores.unflatten(0, (-1, heads)) + bias.to(scores.dtype)
            scores = scores.flatten(0, 1)
    output = torch.bmm(scores.softmax(-1), v).view(len(query), heads, tokens, v.shape[-1])
    output = output.transpose(1, 2)
    return output.contiguous().view(*query.shape[:-1], value.shape[-1])


# --- the custom operator -------------------------------------------------------------------------


def training(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


_OPERATION = dense_operation(NAME, gated=False)


def triton_preferred(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    training: bool,
) -> bool:
    """Whether the kernels are the automatic choice where they run."""
    return not (query.is_cuda and _cuda_serves(query, value, bias, training))


def _cuda_serves(query: Tensor, value: Tensor, bias: Tensor | None, training: bool) -> bool:
    """Whether PyTorch has a kernel that is made for this call on the GPU.

    Not in training: the gradients of its kernels differ between runs.
    """
    return (
        not training
        and bias is None
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % 8 == 0
    )


_FOUND = _OPERATION.implementations(
    reference=reference, plain=reference, refuses=dispatch.triton_refuses
)
_IMPLEMENTATIONS = {
    "reference": _FOUND["reference"],
    "torch": Implementation(portable),
    "triton": Implementation(_FOUND["triton"].run, dispatch.triton_refuses, triton_preferred),
}


# --- test cases ----------------------------------------------------------------------------------


def _case(
    note: str,
    spatial: tuple[int, ...],
    spatial_kv: tuple[int, ...] | None = None,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (1, 1),
    dims: tuple[int, int] = (16, 16),
    bias: tuple[int, ...] = (),
    **kwargs: Any,
) -> Case:
    """A call with (query, key) heads and (query, value) widths; `bias`: leading dimensions."""
    spatial_kv = spatial if spatial_kv is None else spatial_kv
    shapes: dict[str, tuple[int, ...]] = {
        "query": (batch, *spatial, heads[0], dims[0]),
        "key": (batch, *spatial_kv, heads[1], dims[0]),
        "value": (batch, *spatial_kv, heads[1], dims[1]),
    }
    if bias:
        shapes["bias"] = (*bias, math.prod(spatial), math.prod(spatial_kv))
    return Case(note, shapes, kwargs)


CASES = (
    _case("self, bias of every head", (5, 7), batch=2, heads=(2, 2), bias=(2,)),
    _case("cross, bias of every image", (3, 5), (21,), batch=2, heads=(2, 2), bias=(2, 2)),
    _case("one bias for all heads, grouped heads", (19,), batch=2, heads=(4, 2), bias=(1,)),
    _case("bias of images, not of heads", (3, 6), (5, 4), batch=2, heads=(2, 1), bias=(2, 1)),
    _case("causal", (37,), heads=(2, 2), is_causal=True),
    _case("causal cross, more queries than keys", (5, 5), (9,), bias=(1,), is_causal=True),
    _case("unequal widths", (7, 7), batch=2, dims=(16, 48)),
    _case("widths that are no powers of two", (4, 9), dims=(24, 40), bias=(1, 1), scale=-0.3),
    _case("three dimensions", (2, 3, 4), (2, 2, 2), heads=(2, 2)),
    _case("one token", (1, 1), bias=(1,)),
    _case("no keys", (4,), (0,), bias=(1,)),
    _case("no images", (4, 4), batch=0, bias=(1,)),
)

LAUNCHES = (
    _case("width 32, bias", (14, 14), heads=(4, 2), dims=(32, 32), bias=(4,)),
    _case("width 64, bias", (14, 14), heads=(2, 2), dims=(64, 64), bias=(2,)),
    _case("width 64, causal", (14, 14), heads=(2, 2), dims=(64, 64), is_causal=True),
    _case("queries of 16, values of 64", (14, 14), dims=(16, 64)),
    _case("width 128, bias", (14, 14), heads=(2, 2), dims=(128, 128), bias=(1,)),
    _case("width 256, bias", (14, 14), heads=(2, 2), dims=(256, 256), bias=(1, 2)),
)

OPERATOR = Operator(
    NAME,
    attention,
    _IMPLEMENTATIONS,
    CASES,
    operation=_OPERATION,
    launches=LAUNCHES,
    context="any size",
)
