"""What mixture-of-head attention is measured on, and against.

Settings of 196 tokens and more, with half, three quarters, nine tenths and all of the heads of
every token active. Peers compute all heads at all tokens and multiply by a gate that is zero where
a head is not active, as the official code does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vitarium.benchmarks.attention import eager, sdpa
from vitarium.benchmarks.floors import attention_floor
from vitarium.benchmarks.suite import Peer, Suite
from vitarium.ops import Case, mixture_of_head_attention

SHARES = (1.0, 0.9, 0.75, 0.5)


def cases(batch_size: int) -> list[Case]:
    """Maps, heads and shares of active heads."""
    return [
        _case(batch_size, side, heads, width, share)
        for side, heads, width in ((14, 12, 32), (28, 10, 32), (40, 4, 64))
        for share in SHARES
    ]


def _case(batch_size: int, side: int, heads: int, width: int, share: float) -> Case:
    shape = (batch_size, side, side, heads)
    shapes = dict.fromkeys(("query", "key", "value"), (*shape, width))
    values = {}
    shapes["gate"] = shape
    if share < 1:
        shapes["active"] = shape
        values["active"] = _active(share)
    note = f"{side}x{side} heads {heads} width {width} active {share:.0%}"
    return Case(note, shapes, {}, values)


def _active(share: float) -> Callable[[torch.Generator, Sequence[int]], Tensor]:
    """Draws heads at random, of every token as near to `share` of them as on average it takes."""

    def draw(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
        order = torch.rand(*shape, generator=generator).argsort(-1).argsort(-1)
        return order < share * shape[-1] - 1 + torch.rand(*shape[:-1], 1, generator=generator)

    return draw


# --- peers ---------------------------------------------------------------------------------------


def _all_heads(
    attend: Callable[..., Tensor],
) -> Callable[[Case, torch.device], Callable[..., Tensor]]:
    def build(case: Case, device: torch.device) -> Callable[..., Tensor]:
        def run(
            query: Tensor, key: Tensor, value: Tensor, gate: Tensor, active: Tensor | None = None
        ) -> Tensor:
            operands = (tensor.flatten(1, -3).transpose(1, 2) for tensor in (query, key, value))
            output = attend(*operands, None).transpose(1, 2).unflatten(1, query.shape[1:-2])
            gate = gate if active is None else gate * active
            return output * gate[..., None]

        return run

    return build


def floor(case: Case, mode: str, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The products of the active queries alone, or the bytes that must move."""
    batch, *spatial, heads, width = case.shapes["query"]
    tokens = math.prod(spatial)
    active = tokens
    if "active" in case.shapes:
        drawn = case.draw(torch.Generator().manual_seed(0))["active"]
        active = round(drawn.double().mean().item() * tokens)
    moved = [math.prod(case.shapes[name]) for name in ("query", "key", "value")]
    return attention_floor(
        batch * heads, active, tokens, width, width, mode, dtype, device, elements=moved
    )


def _all_active(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """The same operator with all heads active: what skipping saves."""

    def run(
        query: Tensor, key: Tensor, value: Tensor, gate: Tensor, active: Tensor | None = None
    ) -> Tensor:
        return mixture_of_head_attention(query, key, value, gate)

    return run


PEERS: Mapping[str, Peer] = {
    "eager": Peer(_all_heads(eager), devices=("cpu", "cuda")),
    "sdpa": Peer(_all_heads(sdpa), devices=("cpu", "cuda")),
    "all_active": Peer(_all_active, devices=("cpu", "cuda"), same_function=False),
}

SUITE = Suite(cases, PEERS, floor)
