"""Launches the kernels of agent attention.

Agents gather by the kernels of dense attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitarium.ops.agent_portable import values_room
from vitarium.ops.kernels import dense


def _parts(saved: Tensor, query: Tensor, value: Tensor, agent: Tensor) -> tuple[Tensor, ...]:
    """Agent values, and base-2 log-sum-exps of agents and of queries: views of what is saved."""
    rows, all_rows = math.prod(agent.shape[:-1]), math.prod(query.shape[:-1])
    values, *lengths = saved.split([values_room(value, agent), rows, all_rows])
    shape = (*agent.shape[:-1], value.shape[-1])
    values = values.view(query.dtype)[: math.prod(shape)].view(shape)
    return values, *(part.view(x.shape[:-1]) for part, x in zip(lengths, (agent, query)))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Output `(B, *spatial, heads, value_dim)`, contiguous, and what the backward wants."""
    count = values_room(value, agent) + math.prod(agent.shape[:-1]) + math.prod(query.shape[:-1])
    saved = query.new_zeros(count, dtype=torch.float32)
    values, gathered, read = _parts(saved, query, value, agent)
    found, lengths = dense.forward(agent, key, value, agent_bias, None, None, False, scale)
    values.copy_(found)
    gathered.copy_(lengths)
    output, lengths = dense.forward(query, agent, values, query_bias, None, None, False, scale)
    read.copy_(lengths)
    return output, saved


def backward(
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
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, agent and the biases, None where they need none."""
    values, gathered, read = _parts(saved, query, value, agent)
    grad_query, grad_agent, grad_values, grad_query_bias, _ = dense.backward(
        grad, query, agent, values, query_bias, None, None, output, read, False, scale, needs[5]
    )
    again, grad_key, grad_value, grad_agent_bias, _ = dense.backward(
        grad_values, agent, key, value, agent_bias, None, None, values, gathered, False, scale,
        needs[4],
    )  # fmt: skip
    grad_agent = grad_agent + again
    return grad_query, grad_key, grad_value, grad_agent, grad_agent_bias, grad_query_bias
