"""Agent attention: a few agents gather from all keys, and every query reads from the agents.

Han et al., "Agent Attention" (arXiv 2312.08874). For queries Q, keys K, values V and agents A, with
biases B_A of agents and keys and B_Q of queries and agents, the output is

    softmax(scale Q A^T + B_Q) softmax(scale A K^T + B_A) V.

Cost: n (N + M) (head_dim + value_dim) multiply-adds a head for N queries, M keys and n agents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitarium.ops import agent_portable as portable
from vitarium.ops import dispatch
from vitarium.ops.attention import attend, check, check_bias, training
from vitarium.ops.differentiable import Differentiable
from vitarium.ops.dispatch import Case, Implementation, Operator

NAME = "agent_attention"
# Scores of a call up to which ordinary operations are as fast as any, of few agents and of many: in
# inference in float32 (by PyTorch's fused attention) and in others, in training likewise.
FEW = 16
SMALL = ((1 << 14, 1 << 20), (1 << 15, 1 << 18))
SMALL_TRAINING = ((1 << 15, 1 << 20), (1 << 22, 1 << 22))

Shape = Sequence[int]


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    *,
    agent_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query to every key by way of a few agents.

    Tokens are counted in raster order: N of the query, M of key and value. Without keys (M = 0) the
    output is 0.

    Args:
        query: `(B, *spatial, num_heads, head_dim)`, spatial of any rank from 1; any strides.
        key: `(B, *spatial_kv, num_heads, head_dim)`, of any rank from 1 and any number of tokens.
        value: `(B, *spatial_kv, num_heads, value_dim)`.
        agent: `(B, agents, num_heads, head_dim)`, such as pooled queries; at least one.
        agent_bias: `(num_heads, agents, M)`, added to the scores of agents and keys;
            floating-point, -inf hides a key, but never all of an agent.
        query_bias: `(num_heads, N, agents)`, added to the scores of queries and agents; likewise.
        scale: factor on the scores of both stages; `head_dim ** -0.5` if None.
        backend: "reference", "torch", "triton", or None to choose.

    Returns:
        `(B, *spatial, num_heads, value_dim)`, contiguous, in the dtype of query.

    Raises:
        ValueError: shapes or devices do not fit, or the named backend cannot run this.
        TypeError: an argument is of the wrong type, or dtypes differ.
    """
    scale = _check(query, key, value, agent, agent_bias, query_bias, scale)
    query, key, value, agent = dispatch.autocast(query, key, value, agent)
    tensors = (query, key, value, agent, agent_bias, query_bias)
    args = (*tensors, scale, training(*tensors))
    return dispatch.choose(NAME, backend, _IMPLEMENTATIONS, query.device, *args)(*args)


@dispatch.remembered
def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: Any,
) -> float:
    """The scale; raises what `agent_attention` says it raises."""
    scale = check(NAME, query, key, value, None, False, scale)
    dispatch.check_tensors(NAME, query=query, agent=agent)
    _check_shapes(query, key, agent)
    for name, bias, rows, columns in (
        ("agent_bias", agent_bias, agent, key),
        ("query_bias", query_bias, query, agent),
    ):
        if bias is not None:
            check_bias(NAME, bias, rows, columns, name, batched=False)
    return scale


def _check_shapes(query: Tensor, key: Tensor, agent: Tensor) -> None:
    """Raises ValueError unless there are agents, of the query's heads, and keys for every head."""
    (batch, *_, heads, head_dim), shape = query.shape, tuple(agent.shape)
    fits = len(shape) == 4 and shape[0] == batch and shape[2:] == (heads, head_dim)
    if not fits or shape[1] < 1:
        raise ValueError(
            f"{NAME}: agent has shape {shape}; allowed is ({batch}, agents, {heads}, {head_dim}) "
            "with at least one agent"
        )
    if key.shape[-2] != heads:
        raise ValueError(
            f"{NAME}: key has {key.shape[-2]} heads, query {heads}; grouped heads are not defined"
        )


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
    training: bool,
) -> Tensor:
    """The definition: dense attention of agents to keys, then of queries to agents."""
    gathered = attend(agent, key, value, agent_bias, False, scale, False)
    return attend(query, agent, gathered, query_bias, False, scale, False)


def _portable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
    training: bool,
) -> Tensor:
    """What is fastest where the kernels do not run."""
    args = (query, key, value, agent, agent_bias, query_bias, scale, training)
    if dispatch.plain_aten():
        return _reference(*args)
    scores = _products(query.shape, key.shape, agent.shape)
    half = query.element_size() == 2
    small = (SMALL_TRAINING if training else SMALL)[half][agent.shape[1] >= FEW]
    if 0 < scores <= small and query.is_cpu and not torch.compiler.is_compiling():
        return portable.small(*args)
    return _OPERATION(*args, fused=False)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, agent: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    *rest, fused = arguments
    if fused:
        from vitarium.ops.kernels import agent as kernels

        return kernels.forward(query, key, value, agent, *rest)
    return portable.forward(query, key, value, agent, *rest)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    output: Tensor,
    saved: Tensor,
    scale: float,
    training: bool,
    fused: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    tensors = (query, key, value, agent, agent_bias, query_bias)
    if fused:
        from vitarium.ops.kernels import agent as kernels

        return kernels.backward(grad, *tensors, output, saved, scale, needs)
    return portable.backward(grad, *tensors, saved, scale, needs)


def _saved_shape(
    query: Tensor, key: Tensor, value: Tensor, agent: Tensor, *arguments: Any
) -> tuple[int, ...]:
    *_, training, fused = arguments
    if fused:  # log-sum-exps of queries and agents, agent values
        rows = math.prod(query.shape[:-1]) + math.prod(agent.shape[:-1])
        return (rows + portable.values_room(value, agent),)
    return (portable.saved_size(query, key, value, agent, training),)


def _products(query: Shape, key: Shape, agent: Shape) -> int:
    """Scores of both stages."""
    tokens = math.prod(query[1:-2]) + math.prod(key[1:-2])
    return query[0] * query[-2] * agent[1] * tokens


def _flops(query: Shape, key: Shape, value: Shape, agent: Shape, *_: Any) -> int:
    return 2 * _products(query, key, agent) * (query[-1] + value[-1])


def _backward_flops(query: Shape, key: Shape, value: Shape, agent: Shape, *_: Any) -> int:
    """Three products over head_dim (scores again, and both their operands), two over value_dim."""
    return 2 * _products(query, key, agent) * (3 * query[-1] + 2 * value[-1])


_OPERATION = Differentiable(
    NAME,
    tensors="Tensor query, Tensor key, Tensor value, Tensor agent, Tensor? agent_bias, "
    "Tensor? query_bias",
    arguments="float scale, bool training",
    forward=_forward,
    backward=_backward,
    output_shape=lambda query, key, value, *_: (*query.shape[:-1], value.shape[-1]),
    saved_shape=_saved_shape,
    flops=_flops,
    backward_flops=_backward_flops,
)
_IMPLEMENTATIONS = {
    **_OPERATION.implementations(
        reference=_reference, plain=_reference, refuses=dispatch.triton_refuses
    ),
    "torch": Implementation(_portable),
}


def _case(
    note: str,
    spatial: tuple[int, ...],
    agents: int,
    spatial_kv: tuple[int, ...] | None = None,
    *,
    batch: int = 2,
    heads: int = 2,
    dims: tuple[int, int] = (16, 16),
    biases: str = "aq",
    **kwargs: Any,
) -> Case:
    """A call with (query, value) widths; `biases`: of agents, of queries."""
    spatial_kv = spatial if spatial_kv is None else spatial_kv
    shapes: dict[str, tuple[int, ...]] = {
        "query": (batch, *spatial, heads, dims[0]),
        "key": (batch, *spatial_kv, heads, dims[0]),
        "value": (batch, *spatial_kv, heads, dims[1]),
        "agent": (batch, agents, heads, dims[0]),
    }
    if "a" in biases:
        shapes["agent_bias"] = (heads, agents, math.prod(spatial_kv))
    if "q" in biases:
        shapes["query_bias"] = (heads, math.prod(spatial), agents)
    return Case(note, shapes, kwargs)


CASES = (
    _case("both biases", (7, 6), 9),
    _case("other keys, no biases", (9,), 4, (3, 5), biases="", scale=0.5),
    _case("unequal widths, bias of queries", (6, 11), 16, heads=1, dims=(24, 40), biases="q"),
    _case("more agents than tokens, bias of agents", (1, 3), 25, batch=1, biases="a", scale=-0.3),
    _case("no images", (4, 4), 4, batch=0),
)

LAUNCHES = (
    _case("49 agents, width 32", (14, 14), 49, dims=(32, 32)),
    _case("49 agents, width 64", (14, 14), 49, dims=(64, 64)),
)

OPERATOR = Operator(
    NAME,
    agent_attention,
    _IMPLEMENTATIONS,
    CASES,
    operation=_OPERATION,
    launches=LAUNCHES,
    context="any size",
)
