"""Indexed attention: every query attends to the keys that a table names for it.

With the K keys I(i) of query i, for each head,

    output_i = sum over j in I(i) of softmax(scale q_i k_j)_j v_j

as in sparse attention with a predicted pattern (Wei et al., "Sparsifiner", arXiv 2303.13755). Cost:
2 N K head_dim multiply-adds for N tokens instead of 2 N^2 head_dim.

Of few keys (a 64th of all) the portable path gathers keys, a chunk at a time. Otherwise it computes
all scores of a chunk, which as a matrix product takes less time than to gather vectors, and gathers
scores. What is not named meets neither the softmax nor the values. There is no Triton kernel yet.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import dispatch
from vitarium.ops.differentiable import Differentiable
from vitarium.ops.dispatch import Case, Operator

NAME = "indexed_attention"


def indexed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query to the keys that `index` names, counted in raster order.

    Args:
        query: `(B, *spatial, num_heads, head_dim)`, N tokens; any strides.
        key: `(B, *spatial_kv, num_heads_kv, head_dim)`, M tokens; num_heads_kv divides num_heads,
            and query head h reads key and value head `h // (num_heads // num_heads_kv)`.
        value: `(B, *spatial_kv, num_heads_kv, value_dim)`.
        index: integers `(B, num_heads, N, K)`, 0 ... M - 1, K >= 1. A key that is named twice
            counts twice.
        scale: factor on the scores; `head_dim ** -0.5` if None.
        backend: "reference", "torch", or None to choose.

    Returns:
        `(B, *spatial, num_heads, value_dim)`, contiguous, in the dtype of query.

    Raises:
        ValueError: shapes or devices do not fit, or the named backend does not exist.
        TypeError: an argument is of the wrong type, or dtypes differ.
    """
    dispatch.check_tensors(NAME, query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 4 or tensor.shape[0] != query.shape[0] or tensor.shape[-1] < 1:
            raise ValueError(
                f"{NAME}: {name} has shape {tuple(tensor.shape)}; allowed is ({query.shape[0]}, "
                "*spatial, num_heads, head_dim)"
            )
    if value.shape[:-1] != key.shape[:-1] or key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"{NAME}: key has shape {tuple(key.shape)}, value {tuple(value.shape)}, query "
            f"{tuple(query.shape)}; tokens and heads of key and value must agree, and head_dim of "
            "key and query"
        )
    heads = query.shape[-2]
    if key.shape[-2] < 1 or heads % key.shape[-2]:
        raise ValueError(
            f"{NAME}: key has {key.shape[-2]} heads, which do not divide the query's {heads}"
        )
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        found = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{NAME}: index must be a tensor of int32 or int64, got {found}")
    rows = (query.shape[0], heads, math.prod(query.shape[1:-2]))
    if index.dim() != 4 or tuple(index.shape[:3]) != rows or index.shape[3] < 1:
        raise ValueError(
            f"{NAME}: index has shape {tuple(index.shape)}; allowed is ({rows[0]}, {rows[1]}, "
            f"{rows[2]}, K), K at least 1"
        )
    if index.device != query.device:
        raise ValueError(f"{NAME}: index is on {index.device}, query on {query.device}")
    scale = dispatch.check_scale(NAME, scale, query)
    query, key, value = dispatch.autocast(query, key, value)
    args = (query, key, value, index.long(), scale)
    return dispatch.choose(NAME, backend, _IMPLEMENTATIONS, query.device, *args)(*args)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """`(B, heads, tokens, channels)`; heads of keys repeated."""
    x = x.flatten(1, -3).transpose(1, 2)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


# --- the definition ------------------------------------------------------------------------------


def _reference(query: Tensor, key: Tensor, value: Tensor, index: Tensor, scale: float) -> Tensor:
    heads = query.shape[-2]
    shape = (*query.shape[:-1], value.shape[-1])
    query, key, value = (_by_head(x, heads) for x in (query, key, value))
    scores = (query @ key.mT * scale).gather(-1, index)
    weights = torch.zeros_like(query[..., :1]).expand(-1, -1, -1, key.shape[2])
    weights = weights.scatter_add(-1, index, scores.softmax(-1))
    return (weights @ value).transpose(1, 2).reshape(shape)


# --- the portable path ---------------------------------------------------------------------------

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}  # numbers of the largest tensor of a chunk
SPARSE = 64  # a key in so many: from here on gathering them takes less time than all scores


class _Chunks:
    """The heads of all images, a chunk of them and of their queries at a time, in float32 at least.

    Tensors are `(heads of all images, tokens, channels)`.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, index: Tensor) -> None:
        heads = query.shape[-2]
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.tensors = [self.flat(x, heads) for x in (query, key, value)]
        self.index = index.flatten(0, 1)
        self.keys, count = self.tensors[1].shape[1], index.shape[-1]
        self.sparse = query.is_cpu and count * SPARSE <= self.keys
        row = count * max(query.shape[-1], value.shape[-1]) if self.sparse else self.keys
        limit = CHUNK["cpu" if query.is_cpu else "cuda"]
        rows = self.index.shape[1]
        self.rows = max(1, min(rows, limit // max(row, 1)))
        self.heads = max(1, limit // max(row * rows, 1))

    def flat(self, x: Tensor, heads: int) -> Tensor:
        return _by_head(x, heads).to(self.wide).flatten(0, 1).contiguous()

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for head in range(0, self.index.shape[0], self.heads):
            for row in range(0, self.index.shape[1], self.rows):
                yield slice(head, head + self.heads), slice(row, row + self.rows)

    def dots(self, x: Tensor, other: Tensor, index: Tensor, places: Tensor) -> Tensor:
        """Products `(heads, rows, K)` of x `(heads, rows, channels)` with the tokens named."""
        if not self.sparse:
            return torch.bmm(x, other.mT).gather(-1, index)
        gathered = other.flatten(0, 1).index_select(0, places.flatten()).view(*index.shape, -1)
        return (gathered @ x[..., None])[..., 0]

    def mixed(self, weights: Tensor, other: Tensor, places: Tensor) -> Tensor:
        """Sums `(heads, rows, channels)` of the tokens named."""
        return F.embedding_bag(
            places.flatten(0, 1),
            other.flatten(0, 1),
            per_sample_weights=weights.flatten(0, 1),
            mode="sum",
        ).view(*weights.shape[:2], -1)

    def places(self, index: Tensor) -> Tensor:
        """Rows of the tokens named among those of all heads of the chunk."""
        if len(index) == 1:
            return index
        return index + torch.arange(len(index), device=index.device)[:, None, None] * self.keys

    def weights(
        self, heads: slice, rows: slice, index: Tensor, places: Tensor, scale: float
    ) -> Tensor:
        """Weights `(heads, rows, K)`."""
        query, key, _ = self.tensors
        return self.dots(query[heads, rows] * scale, key[heads], index, places).softmax(-1)


def _saved_shape(query: Tensor, key: Tensor, value: Tensor, index: Tensor, *_: Any) -> Any:
    """Of the weights, which take half the memory of the index; float64 would lose digits."""
    return (0,) if query.dtype == torch.float64 else index.shape


def _in_wide(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: autocast has had its say, and narrows nothing within."""

    @functools.wraps(function)
    def run(first: Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return run


@_in_wide
def _forward(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, scale: float, fused: bool
) -> tuple[Tensor, Tensor]:
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    shape = _saved_shape(query, key, value, index)
    saved = query.new_empty(shape, dtype=torch.float32)
    if not output.numel():
        return output, saved
    chunks = _Chunks(query, key, value, index)
    total = output.new_empty((*chunks.index.shape[:2], value.shape[-1]))
    kept = saved.flatten(0, 1) if len(shape) > 1 else None
    for heads, rows in chunks:
        chosen = chunks.index[heads, rows]
        places = chunks.places(chosen)
        weights = chunks.weights(heads, rows, chosen, places, scale)
        if kept is not None:
            kept[heads, rows] = weights
        total[heads, rows] = chunks.mixed(weights, chunks.tensors[2][heads], places)
    shape = query.shape
    output.view(shape[0], -1, *output.shape[-2:]).copy_(
        total.unflatten(0, (shape[0], -1)).transpose(1, 2)
    )
    return output, saved


@_in_wide
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    output: Tensor,
    saved: Tensor,
    scale: float,
    fused: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    if not grad.numel() or not key.numel():
        return tuple(torch.zeros_like(x) for x in (query, key, value)) + (None,)
    chunks = _Chunks(query, key, value, index)
    q, k, v = chunks.tensors
    g = chunks.flat(grad, query.shape[-2])
    grads = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    kept = saved.flatten(0, 1) if saved.numel() else None
    for heads, rows in chunks:
        chosen = chunks.index[heads, rows]
        places = chunks.places(chosen)
        if kept is None:
            weights = chunks.weights(heads, rows, chosen, places, scale)
        else:
            weights = kept[heads, rows]
        inner = chunks.dots(g[heads, rows], v[heads], chosen, places)
        inner = weights * (inner - (weights * inner).sum(-1, keepdim=True)) * scale
        grads[0][heads, rows] = chunks.mixed(inner, k[heads], places)
        dense = weights.new_zeros((*weights.shape[:2], chunks.keys))
        dense.scatter_add_(-1, chosen, weights)
        grads[2][heads].baddbmm_(dense.mT, g[heads, rows])
        dense.zero_().scatter_add_(-1, chosen, inner)
        grads[1][heads].baddbmm_(dense.mT, q[heads, rows])
    return *(_as(found, x) for found, x in zip(grads, (query, key, value))), None


def _as(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `(heads of all images, tokens, channels)` as that of x."""
    grad = grad.unflatten(0, (x.shape[0], x.shape[-2], -1))
    grad = grad.sum(2) if grad.shape[2] > 1 else grad[:, :, 0]
    return grad.transpose(1, 2).reshape(x.shape).to(x.dtype)


def _flops(query: Any, key: Any, value: Any, index: Any, *_: Any) -> int:
    return 2 * math.prod(index) * (query[-1] + value[-1])


def _backward_flops(query: Any, key: Any, value: Any, index: Any, *_: Any) -> int:
    """Two products over head_dim (query, key) and two over value_dim."""
    return 4 * math.prod(index) * (query[-1] + value[-1])


_OPERATION = Differentiable(
    NAME,
    tensors="Tensor query, Tensor key, Tensor value, Tensor index",
    arguments="float scale",
    forward=_forward,
    backward=_backward,
    output_shape=lambda query, key, value, *_: (*query.shape[:-1], value.shape[-1]),
    saved_shape=_saved_shape,
    flops=_flops,
    backward_flops=_backward_flops,
)
_IMPLEMENTATIONS = {
    name: implementation
    for name, implementation in _OPERATION.implementations(
        reference=_reference, plain=_reference, refuses=lambda *_: None
    ).items()
    if name != "triton"
}


# --- test cases ----------------------------------------------------------------------------------


def _case(
    note: str,
    tokens: tuple[int, ...],
    count: int,
    tokens_kv: tuple[int, ...] | None = None,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (1, 1),
    dims: tuple[int, int] = (16, 16),
    **kwargs: Any,
) -> Case:
    """A call with (query, key) heads and (query, value) widths, and `count` keys of a query."""
    tokens_kv = tokens if tokens_kv is None else tokens_kv
    keys = math.prod(tokens_kv)

    def distinct(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        return torch.rand((*shape[:-1], keys), generator=generator).topk(count).indices

    shapes = {
        "query": (batch, *tokens, heads[0], dims[0]),
        "key": (batch, *tokens_kv, heads[1], dims[0]),
        "value": (batch, *tokens_kv, heads[1], dims[1]),
        "index": (batch, heads[0], math.prod(tokens), count),
    }
    return Case(note, shapes, kwargs, {"index": distinct})


CASES = (
    _case("a third of the keys", (5, 7), 12, batch=2, heads=(2, 2)),
    _case("few keys are gathered, grouped heads", (9,), 2, (10, 13), heads=(4, 2), dims=(12, 20)),
    _case("all keys", (4, 3), 12, batch=2, scale=-0.4),
    _case("one token", (1, 1), 1),
    _case("no images", (4, 4), 3, batch=0),
)

OPERATOR = Operator(
    NAME, indexed_attention, _IMPLEMENTATIONS, CASES, operation=_OPERATION, context="any size"
)
