"""What agent attention is measured on, and against.

The settings are stages of Agent-PVT and Agent-DeiT, with the biases of either stage, and large maps
for the growth with tokens. The peer computes both stages with two products and a softmax each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vitarium.benchmarks.attention import eager, sdpa
from vitarium.benchmarks.floors import byte_floor, product_floor
from vitarium.benchmarks.suite import Peer, Suite
from vitarium.ops import Case


def cases(batch_size: int) -> list[Case]:
    """Maps of 49 agents, one of 9 agents, and one without biases."""
    return [
        _case(batch_size, 56, 2, 32, 9),
        _case(batch_size, 56, 2, 32, 49),
        _case(batch_size, 28, 4, 32, 49),
        _case(batch_size, 14, 8, 32, 49),
        _case(batch_size, 14, 6, 64, 49),
        _case(batch_size, 112, 2, 32, 49, bias=False),
    ]


def _case(
    batch_size: int, side: int, heads: int, width: int, agents: int, bias: bool = True
) -> Case:
    shape = (batch_size, side, side, heads, width)
    shapes: dict[str, tuple[int, ...]] = {"query": shape, "key": shape, "value": shape}
    shapes["agent"] = (batch_size, agents, heads, width)
    note = f"{side}x{side} heads {heads} width {width} agents {agents}"
    if bias:
        shapes["agent_bias"] = (heads, agents, side**2)
        shapes["query_bias"] = (heads, side**2, agents)
        note += " bias"
    return Case(note, shapes)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _peer(attend: Attend) -> Peer:
    """Both stages by a function of `(B, heads, tokens, channels)`."""

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        agent: Tensor,
        agent_bias: Tensor | None = None,
        query_bias: Tensor | None = None,
    ) -> Tensor:
        q, k, v, a = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value, agent))
        output = attend(q, a, attend(a, k, v, agent_bias), query_bias).transpose(1, 2)
        # As the operator gives it: the projection that follows would copy it.
        return output.unflatten(1, query.shape[1:-2]).contiguous()

    return Peer(lambda case, device: run, devices=("cpu", "cuda"))


def floor(case: Case, mode: str, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The bare matrix products on the CPU, the bytes that must move on CUDA."""
    batch, *spatial, heads, width = case.shapes["query"]
    if device.type == "cuda":
        moved = math.prod(case.shapes["query"])
        return byte_floor(3 * moved, moved, mode, dtype, device)
    agents, tokens = case.shapes["agent"][1], math.prod(spatial)
    arguments = (width, width, mode, dtype, device)
    gather = product_floor(batch * heads, agents, tokens, *arguments)
    read = product_floor(batch * heads, tokens, agents, *arguments)

    def both() -> None:
        gather()
        read()

    return both


PEERS: Mapping[str, Peer] = {"eager": _peer(eager), "sdpa": _peer(sdpa)}

SUITE = Suite(cases, PEERS, floor, shared=("agent_bias", "query_bias"))
