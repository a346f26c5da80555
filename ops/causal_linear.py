"""Causal linear attention with decay: tokens attend to earlier ones, without a softmax.

Katharopoulos et al., "Transformers are RNNs" (arXiv 2006.16236); with a decay for every head Sun et
al., "Retentive Network" (2307.08621), and Qin et al., "TransNormerLLM" and "Lightning Attention-2"
(2307.14995, 2401.04658). With the decay r of a head, 0 to 1, token i has the output

    out_i = scale sum_{j <= i} r^(i - j) (q_i . k_j) v_j

It has three forms. *Parallel*: all products q_i . k_j at once, N^2 of them. *Recurrent*:
`causal_linear_step` updates a state S_i = r S_(i-1) + k_i v_i^T and reads out_i = scale q_i S_i.
*Chunkwise*: tokens of one chunk meet each other as in the parallel form and all earlier ones
through the state, so that cost and memory grow with N: 2 N head_dim value_dim multiply-adds a head
for state and reading, and as many as a chunk has tokens times N (head_dim + value_dim).
No form divides by a power of the decay, which would overflow in long sequences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitarium.ops import causal_chunks, dispatch
from vitarium.ops.differentiable import Differentiable
from vitarium.ops.dispatch import Case, Implementation, Operator

NAME = "causal_linear_attention"


def causal_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    decay: float | Sequence[float] | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Linear attention of every token to itself and the tokens before it, in raster order.

    Args:
        query: `(B, *spatial, num_heads, head_dim)`, spatial of any rank from 1; any strides.
        key: `(B, *spatial_kv, num_heads_kv, head_dim)`, of as many tokens; num_heads_kv divides
            num_heads, and query head h reads key and value head
            `h // (num_heads // num_heads_kv)`, of which each query head makes a copy.
        value: `(B, *spatial_kv, num_heads_kv, value_dim)`.
        decay: what a weight is multiplied by for every token of distance, 0 to 1: a number, or one
            for each head of the query; no decay if None. Decays are constants, without gradient.
        scale: factor on the output.
        backend: "reference" (the parallel form), "torch" (chunkwise), "triton" (chunkwise), or
            None to choose.

    Returns:
        `(B, *spatial, num_heads, value_dim)`, contiguous, in the dtype of query. States and sums
        are float32 at least.

    Raises:
        ValueError: shapes or devices do not fit, a decay is out of range, or the named backend
            cannot run this.
        TypeError: an argument is of the wrong type, or dtypes differ.
    """
    decays, scale = _check(query, key, value, decay, scale)
    spatial, heads = query.shape[1:-2], query.shape[-2]
    query, key, value = dispatch.autocast(query, key, value)
    query, key, value = (tensor.flatten(1, -3) for tensor in (query, key, value))
    if key.shape[-2] != heads:
        group = heads // key.shape[-2]
        key, value = (tensor.repeat_interleave(group, -2) for tensor in (key, value))
    args = (query, key, value, decays, scale)
    output = dispatch.choose(NAME, backend, _IMPLEMENTATIONS, query.device, *args)(*args)
    return output.view(output.shape[0], *spatial, *output.shape[2:])


def causal_linear_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor | None = None,
    *,
    decay: float | Sequence[float] | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The recurrent form: the output of one more token, from a state of constant size.

    Args:
        query, key: `(B, num_heads, head_dim)`.
        value: `(B, num_heads, value_dim)`.
        state: what the step before returned; None before the first token.
        decay, scale: as in `causal_linear_attention`.

    Returns:
        Output `(B, num_heads, value_dim)` in the dtype of query, and the new state
        `(B, num_heads, head_dim, value_dim)`, float32 or, for float64 inputs, float64.

    Raises:
        ValueError: shapes do not fit, or a decay is out of range.
        TypeError: an argument is of the wrong type, or dtypes differ.
    """
    name = "causal_linear_step"
    dispatch.check_tensors(name, query=query, key=key, value=value)
    if query.dim() != 3 or key.shape != query.shape or value.shape[:-1] != query.shape[:-1]:
        raise ValueError(
            f"{name}: query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)} "
            f"and {tuple(value.shape)}; allowed is (B, num_heads, head_dim), value's last "
            "dimension may differ"
        )
    shape = (*query.shape, value.shape[-1])
    if state is not None and tuple(state.shape) != shape:
        raise ValueError(f"{name}: state has shape {tuple(state.shape)}; allowed is {shape}")
    dtype = causal_chunks.working_dtype(query.dtype)
    factors = query.new_tensor(_decays(decay, query.shape[1]), dtype=dtype)
    outer = key.to(dtype)[..., None] * value.to(dtype)[..., None, :]
    state = outer if state is None else state * factors[:, None, None] + outer
    output = (query.to(dtype)[..., None, :] @ state).squeeze(-2) * scale
    return output.to(query.dtype), state


@dispatch.remembered
def _check(
    query: Tensor, key: Tensor, value: Tensor, decay: Any, scale: Any
) -> tuple[list[float], float]:
    """Decays and scale; raises what `causal_linear_attention` says it raises."""
    dispatch.check_tensors(NAME, query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        shape = tuple(tensor.shape)
        if len(shape) < 4:
            raise ValueError(
                f"{NAME}: {name} has shape {shape}; allowed are 4 dimensions or more, "
                "(B, *spatial, num_heads, head_dim)"
            )
        if shape[0] != query.shape[0]:
            raise ValueError(
                f"{NAME}: {name} has batch size {shape[0]}, query {query.shape[0]}; they must agree"
            )
        if shape[-1] < 1:
            raise ValueError(f"{NAME}: {name} has head_dim {shape[-1]}; allowed is at least 1")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"{NAME}: value has shape {tuple(value.shape)}, key {tuple(key.shape)}; all dimensions "
            "but the last must agree"
        )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"{NAME}: key has head_dim {key.shape[-1]}, query {query.shape[-1]}; they must agree"
        )
    tokens = [math.prod(tensor.shape[1:-2]) for tensor in (query, key)]
    if tokens[0] != tokens[1] or tokens[0] < 1:
        raise ValueError(
            f"{NAME}: key has {tokens[1]} tokens, query {tokens[0]}; they must agree and be at "
            "least 1"
        )
    if key.shape[-2] < 1 or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"{NAME}: key has {key.shape[-2]} heads, which do not divide the query's "
            f"{query.shape[-2]}"
        )
    scale = dispatch.check_scale(NAME, 1.0 if scale is None else scale, query)
    return _decays(decay, query.shape[-2]), scale


def _decays(decay: Any, heads: int) -> list[float]:
    """One decay for each head.

    Raises:
        ValueError: there are not as many as heads, or one is not between 0 and 1.
        TypeError: `decay` is neither None, a number, nor a sequence of numbers.
    """
    if decay is None:
        return [1.0] * heads
    several = isinstance(decay, Sequence) and not isinstance(decay, str)
    decays = list(decay) if several else [decay] * heads
    for entry in decays:
        if isinstance(entry, bool) or not isinstance(entry, (int, float, torch.SymFloat)):
            hint = "; pass decay.tolist()" if isinstance(decay, Tensor) else ""
            raise TypeError(
                f"{NAME}: decay={decay!r} must be a number, a sequence of numbers or None{hint}"
            )
        if not 0 <= entry <= 1:
            raise ValueError(f"{NAME}: decay={decay!r} must hold numbers between 0 and 1")
    if len(decays) != heads:
        raise ValueError(
            f"{NAME}: decay has {len(decays)} entries; allowed are one number or {heads}, one per "
            "head of query"
        )
    return [float(entry) for entry in decays]


# --- the definition ------------------------------------------------------------------------------


def _reference(
    query: Tensor, key: Tensor, value: Tensor, decays: list[float], scale: float
) -> Tensor:
    matrix = causal_chunks.decay_matrix(decays, query.shape[1], like=query)
    return _parallel(query, key, value, matrix, scale)


def _parallel(query: Tensor, key: Tensor, value: Tensor, matrix: Tensor, scale: float) -> Tensor:
    """The parallel form, with the powers of the decays `(heads, N, N)`."""
    query = query if scale == 1 else query * scale
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    weights = query @ key.transpose(-1, -2)
    weights *= matrix
    return (weights @ value).transpose(1, 2).contiguous()


# --- the portable path ---------------------------------------------------------------------------

SMALL = 256  # tokens up to which the parallel form may be as fast as any,
SMALL_WEIGHTS = 1 << 16  # with so many weights, or in bfloat16, which wants large products


def _portable(
    query: Tensor, key: Tensor, value: Tensor, decays: list[float], scale: float
) -> Tensor:
    args = (query, key, value, decays, scale)
    if dispatch.plain_aten():
        return causal_chunks.attend_plain(*args)
    if _OPERATION.direct(args) and _is_small(query):
        matrix = _matrix(
            tuple(decays), query.shape[1], query.dtype, query.device,
            torch.is_inference_mode_enabled(),
        )  # fmt: skip
        return _parallel(query, key, value, matrix, scale)
    return _OPERATION(*args, fused=False)


def _is_small(query: Tensor) -> bool:
    batch, tokens, heads, _ = query.shape
    few = batch * heads * tokens**2 <= SMALL_WEIGHTS
    return tokens <= SMALL and (few or query.dtype == torch.bfloat16)


@functools.lru_cache(maxsize=32)
def _matrix(
    decays: tuple[float, ...],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    inference: bool,  # tensors of which mode are of no use outside of it
) -> Tensor:
    like = torch.empty(0, dtype=dtype, device=device)
    return causal_chunks.decay_matrix(decays, tokens, like=like)


# --- the custom operator -------------------------------------------------------------------------


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *call, fused = args
    if fused:
        from vitarium.ops.kernels import causal_linear as kernels

        output = kernels.attend(*call)
    else:
        (output,) = causal_chunks.attend(*call)
    return output, output.new_empty(0, dtype=torch.float32)


def _backward(grad: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """Gradients are causal linear attention too.

    With the gradient g of the output, the query's is attention of g to the values, of which the
    keys are read; those of keys and values look ahead, at later queries and gradients.
    """
    query, key, value, _, _, *rest, fused, needs = args
    found: list[Tensor | None] = [None, None, None]
    if fused:
        from vitarium.ops.kernels import causal_linear as kernels

        if needs[0]:
            found[0] = kernels.attend(grad, value, key, *rest)
        if needs[1]:
            found[1] = kernels.attend(value, grad, query, *rest, reverse=True)
        if needs[2]:
            found[2] = kernels.attend(key, query, grad, *rest, reverse=True)
        return tuple(found)
    if needs[0]:
        (found[0],) = causal_chunks.attend(grad, value, key, *rest)
    if needs[1] or needs[2]:  # together, for they share a state
        found[2], found[1] = causal_chunks.attend(
            key, query, grad, *rest, reverse=True, swapped=value
        )
    return tuple(found)


def _flops(query, key, value, *_) -> int:
    """Updating and reading the state, as in the recurrent form."""
    return 2 * 2 * math.prod(query) * value[-1]


_OPERATION = Differentiable(
    NAME,
    tensors="Tensor query, Tensor key, Tensor value",
    arguments="float[] decays, float scale",
    forward=_forward,
    backward=_backward,
    output_shape=lambda query, key, value, *_: (*query.shape[:-1], value.shape[-1]),
    saved_shape=lambda *_: (0,),
    flops=_flops,
    backward_flops=lambda *shapes: 3 * _flops(*shapes),
)


_IMPLEMENTATIONS = {
    **_OPERATION.implementations(
        reference=_reference, plain=causal_chunks.attend_plain, refuses=dispatch.triton_refuses
    ),
    "torch": Implementation(_portable),
}


# --- test cases ----------------------------------------------------------------------------------


def _case(
    note: str,
    *spatial: int,
    batch: int = 1,
    heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (16, 16),
    **kwargs: Any,
) -> Case:
    """A call with (query, key) heads and (query, value) widths."""
    shapes = {
        "query": (batch, *spatial, heads[0], dims[0]),
        "key": (batch, *spatial, heads[1], dims[0]),
        "value": (batch, *spatial, heads[1], dims[1]),
    }
    return Case(note, shapes, kwargs)


CASES = (
    _case("several chunks", 7, 23, batch=2, decay=(0.9, 0.97)),
    _case("no decay, grouped heads", 70, heads=(4, 2), scale=-0.3),
    _case("widths that are no powers of two", 3, 5, 2, dims=(24, 40), decay=0.5),
    _case("no memory", 5, 3, decay=0),
    _case("one token", 1, 1, decay=0.5),
    _case("no images", 4, 4, batch=0),
)

# Every width, as that of queries and of values; few enough images and heads for several segments.
LAUNCHES = (
    _case("width 32", 1024, heads=(3, 3), dims=(32, 32), decay=(0.9, 0.99, 1.0)),
    _case("width 64", 1024, heads=(3, 3), dims=(64, 64), decay=(0.9, 0.99, 1.0)),
    _case("no decay, width 64", 196, dims=(64, 64)),
    _case("widths 16 and 128", 196, dims=(16, 128), decay=0.9),
    _case("widths 256 and 32", 1024, dims=(256, 32), decay=0.9),
)

OPERATOR = Operator(
    NAME,
    causal_linear_attention,
    _IMPLEMENTATIONS,
    CASES,
    _OPERATION,
    LAUNCHES,
    always_causal=True,
)
