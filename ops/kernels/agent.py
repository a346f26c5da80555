"""Launches the kernels of agent attention.

Up to 64 agents have kernels of their own; more, or wider heads, are dense attention twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from vitarium.ops.agent_portable import values_room
from vitarium.ops.kernels import agent_kernels, dense
from vitarium.ops.kernels.launch import launch, widths
from vitarium.ops.kernels.rows import view, views

LARGEST = 64  # agents that a tile holds
# Tokens of an image and head are walked over by several programs, so that there are about as many.
# Constants, so that results do not depend on a device.
PROGRAMS = {"gather": 1024, "read": 1024, "read_backward": 1024, "gather_backward": 1024}
STRETCHES = 16  # of keys, at most: every program that reads joins them

# (kernel, element size) -> by padded width: tokens of a tile, num_warps, num_stages and, where the
# assembler would else spill, max_registers. Read off ahead-of-time compilation.
_SIZES: dict[tuple[str, int], dict[int, tuple[int, ...]]] = {
    ("gather", 2): {32: (64, 8, 2), 64: (64, 4, 3)},
    ("gather", 4): {32: (32, 8, 2), 64: (32, 8, 2)},
    ("read", 2): {32: (64, 8, 3), 64: (64, 4, 3)},
    ("read", 4): {32: (16, 4, 2), 64: (16, 8, 2)},
    ("read_backward", 2): {32: (64, 8, 1), 64: (32, 8, 1)},
    ("read_backward", 4): {32: (16, 8, 1, 255)},
    ("gather_backward", 2): {32: (64, 8, 2), 64: (64, 8, 1)},
    ("gather_backward", 4): {32: (32, 8, 1)},
}


def serves(kernel: str, value: Tensor, agent: Tensor) -> bool:
    """Whether all agents of a head fit into a tile of "read", or of "read_backward"."""
    widest = max(_SIZES[kernel, agent.element_size()])
    return agent.shape[1] <= LARGEST and max(agent.shape[-1], value.shape[-1]) <= widest


def _options(kernel: str, tokens: int, value: Tensor, agent: Tensor) -> dict[str, Any]:
    """Arguments about tiles and stretches, and options of the launch."""
    batch, agents, heads, width = agent.shape
    sizes = _SIZES[kernel, agent.element_size()]
    width = max(width, value.shape[-1])
    block, warps, stages, *registers = sizes[min(size for size in sizes if size >= width)]
    tiles = triton.cdiv(tokens, block)
    parts = max(1, min(tiles, PROGRAMS[kernel] // (batch * heads)))
    if kernel == "gather":
        parts = min(parts, STRETCHES)
    steps = triton.cdiv(tiles, parts)
    return {
        "tokens": tokens,
        "agents": agents,
        "heads": heads,
        "parts": triton.cdiv(tiles, steps),
        "steps": steps,
        "BLOCK": block,
        "AGENTS": max(16, triton.next_power_of_2(agents)),
        "num_warps": warps,
        "num_stages": stages,
        "max_registers": registers[0] if registers else None,
    }


def _count(x: Tensor) -> int:
    return math.prod(x.shape[1:-2])


def _bias(bias: Tensor | None) -> dict[str, Any]:
    return {"bias": bias, "bias_strides": (0, 0, 0) if bias is None else bias.stride()}


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
    room = values_room(value, agent)
    count = room + math.prod(agent.shape[:-1]) + math.prod(query.shape[:-1])
    saved = query.new_empty(count, dtype=torch.float32)
    values, gathered, logsumexp = _parts(saved, query, value, agent)
    rest = saved[:room].view(query.dtype)[values.numel() :]
    if rest.numel():  # that nobody writes to
        rest.zero_()
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    if not output.numel() or not _count(key):
        return output.zero_(), saved.zero_()
    if not serves("read", value, agent):
        found, lengths = dense.forward(agent, key, value, agent_bias, None, None, False, scale)
        values.copy_(found)
        gathered.copy_(lengths)
        output, lengths = dense.forward(query, agent, values, query_bias, None, None, False, scale)
        logsumexp.copy_(lengths)
        return output, saved
    common = views(widths(query, value), query=query, key=key, value=value, agent=agent)
    reading = {name: common.pop(name) for name in ("query",)}
    gathering = {name: common.pop(name) for name in ("key", "value")}
    options = _options("gather", _count(key), value, agent)
    stretches = options["parts"]
    shape = (query.shape[0], stretches, *agent.shape[1:-1])
    sums = query.new_empty((*shape, value.shape[-1]), dtype=torch.float32)
    lengths = query.new_empty(shape, dtype=torch.float32)
    programs = query.shape[0] * query.shape[-2]
    launch(
        agent_kernels.gather_kernel,
        programs * stretches,
        query.device,
        sums=view(sums),
        lengths=lengths,
        scale=scale,
        **_bias(agent_bias),
        **gathering,
        **common,
        **options,
    )
    options = _options("read", _count(query), value, agent)
    launch(
        agent_kernels.read_kernel,
        programs * options["parts"],
        query.device,
        sums=view(sums),
        lengths=lengths,
        values=view(values),
        gathered=gathered,
        output=view(output),
        logsumexp=logsumexp,
        stretches=stretches,
        scale=scale,
        **_bias(query_bias),
        **reading,
        **common,
        **options,
    )
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
    tensors = (query, key, value, agent, agent_bias, query_bias)
    if not output.numel() or not _count(key):
        return tuple(None if x is None else torch.zeros_like(x) for x in tensors)
    values, gathered, logsumexp = _parts(saved, query, value, agent)
    if not serves("read_backward", value, agent):
        return _dense_backward(grad, tensors, output, values, gathered, logsumexp, scale, needs[4:])
    grads = [x.new_empty(x.shape) for x in (query, key, value)]
    common = views(
        widths(query, value),
        query=query, key=key, value=value, agent=agent, grad_output=grad,
    )  # fmt: skip
    reading = {name: common.pop(name) for name in ("query", "grad_output")}
    gathering = {name: common.pop(name) for name in ("key", "value")}
    programs = query.shape[0] * query.shape[-2]

    options = _options("read_backward", _count(query), value, agent)
    shape = (query.shape[0], options["parts"], *agent.shape[1:])
    agent_sums = query.new_empty(shape, dtype=torch.float32)
    value_sums = query.new_empty((*shape[:-1], value.shape[-1]), dtype=torch.float32)
    delta = torch.empty_like(logsumexp)
    launch(
        agent_kernels.read_backward_kernel,
        programs * options["parts"],
        query.device,
        values=view(values),
        logsumexp=logsumexp,
        delta=delta,
        grad_query=view(grads[0]),
        agent_sums=view(agent_sums),
        value_sums=view(value_sums),
        scale=scale,
        **_bias(query_bias),
        **reading,
        **common,
        **options,
    )
    grad_agent, grad_values = agent_sums.sum(1), value_sums.sum(1)
    gathered_delta = (grad_values * values).sum(-1)
    grad_values = grad_values.to(query.dtype)

    options = _options("gather_backward", _count(key), value, agent)
    agent_sums = query.new_empty(
        (query.shape[0], options["parts"], *agent.shape[1:]), dtype=torch.float32
    )
    launch(
        agent_kernels.gather_backward_kernel,
        programs * options["parts"],
        query.device,
        grad_values=view(grad_values),
        gathered=gathered,
        delta=gathered_delta,
        grad_key=view(grads[1]),
        grad_value=view(grads[2]),
        agent_sums=view(agent_sums),
        scale=scale,
        **_bias(agent_bias),
        **gathering,
        **common,
        **options,
    )
    grad_agent = (grad_agent + agent_sums.sum(1)).to(agent.dtype)
    return *grads, grad_agent, *_bias_gradients(
        tensors, values, (grad_values, grad), (gathered, logsumexp), (gathered_delta, delta), scale,
        needs[4:],
    )  # fmt: skip


def _bias_gradients(
    tensors: tuple[Any, ...],
    values: Tensor,
    grads: Sequence[Tensor],
    lengths: Sequence[Tensor],
    deltas: Sequence[Tensor],
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of both biases, from what `dense.bias_gradient` takes of either stage."""
    query, key, value, agent, *biases = tensors
    found: list[Tensor | None] = []
    for i, (q, k, v) in enumerate(((agent, key, value), (query, agent, values))):
        if biases[i] is None or not needs[i]:
            found.append(None)
            continue
        rows = lengths[i], deltas[i]
        found.append(dense.bias_gradient(grads[i], q, k, v, biases[i], *rows, scale))
    return tuple(found)


def _dense_backward(
    grad: Tensor,
    tensors: tuple[Any, ...],
    output: Tensor,
    values: Tensor,
    gathered: Tensor,
    logsumexp: Tensor,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """`backward` of dense attention twice; `needs` those of the biases."""
    query, key, value, agent, agent_bias, query_bias = tensors
    grad_query, grad_agent, grad_values, *_ = dense.backward(
        grad, query, agent, values, query_bias, None, None, output, logsumexp, False, scale, False
    )
    again, grad_key, grad_value, *_ = dense.backward(
        grad_values, agent, key, value, agent_bias, None, None, values, gathered, False, scale,
        False,
    )  # fmt: skip
    deltas = [(g.float() * x).sum(-1) for g, x in ((grad_values, values), (grad, output))]
    return (
        grad_query,
        grad_key,
        grad_value,
        grad_agent + again,
        *_bias_gradients(
            tensors, values, (grad_values, grad), (gathered, logsumexp), deltas, scale, needs
        ),
    )
