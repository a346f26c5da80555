"""What causal linear attention is measured on, and against.

The settings are maps of 14x14 to 56x56 tokens with the decays of Lightning attention's first layer,
with RetNet's and its values of twice the width, and without decay. The peer is the parallel form,
whose matrix of decays is made beforehand; on a GPU flash-linear-attention (MIT, of fla-org), too.
Dense causal attention is another function, for scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.benchmarks.floors import byte_floor
from vitarium.benchmarks.suite import Peer, Suite
from vitarium.ops import Case, lightning_slopes


def cases(batch_size: int) -> list[Case]:
    """Maps of a pyramid's stages."""
    retention = [1 - 2.0 ** (-5 - head) for head in range(4)]
    return [
        _case(batch_size, 14, 6, (32, 32), _lightning(6)),
        _case(batch_size, 14, 3, (64, 64), None),
        _case(batch_size, 28, 4, (32, 64), retention),
        _case(batch_size, 56, 2, (32, 32), _lightning(2)),
    ]


def _lightning(heads: int) -> list[float]:
    return [math.exp(-slope) for slope in lightning_slopes(heads)]


def _case(
    batch_size: int,
    side: int,
    heads: int,
    widths: tuple[int, int],
    decay: Sequence[float] | None,
) -> Case:
    """Side of the map, heads, and widths of (query, value)."""
    shapes = {
        "query": (batch_size, side, side, heads, widths[0]),
        "key": (batch_size, side, side, heads, widths[0]),
        "value": (batch_size, side, side, heads, widths[1]),
    }
    kwargs: dict[str, Any] = {} if decay is None else {"decay": tuple(decay)}
    note = f"{side}x{side} heads {heads} width {widths[0]}"
    if widths[0] != widths[1]:
        note += f" and {widths[1]}"
    return Case(f"{note} {'no decay' if decay is None else 'decay'}", shapes, kwargs)


# --- peers ---------------------------------------------------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _peer(
    make: Callable[[Case, torch.device], Attend],
) -> Callable[[Case, torch.device], Callable[..., Tensor]]:
    """From attention of `(B, heads, N, channels)`, merged for the projection that follows."""

    def build(case: Case, device: torch.device) -> Callable[..., Tensor]:
        attend = make(case, device)

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            operands = (tensor.flatten(1, -3).transpose(1, 2) for tensor in (query, key, value))
            output = attend(*operands).transpose(1, 2).contiguous()
            return output.unflatten(1, query.shape[1:-2])

        return run

    return build


def _parallel(case: Case, device: torch.device) -> Attend:
    _, *spatial, heads, _ = case.shapes["query"]
    place = torch.arange(math.prod(spatial), device=device, dtype=torch.float64)
    decay = place.new_tensor(case.kwargs.get("decay", (1.0,) * heads))[:, None, None]
    mask = (decay ** (place[:, None] - place).clamp(min=0)).tril()
    masks: dict[torch.dtype, Tensor] = {}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.dtype not in masks:
            masks[query.dtype] = mask.to(query.dtype)
        return query @ key.mT * masks[query.dtype] @ value

    return attend


def _sdpa(case: Case, device: torch.device) -> Attend:
    return lambda query, key, value: F.scaled_dot_product_attention(
        query, key, value, is_causal=True
    )


def _fla(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """flash-linear-attention's kernels for a constant decay of every head, if it is installed."""
    from fla.ops.simple_gla import chunk_simple_gla

    decay = case.kwargs.get("decay")
    rates = None if decay is None else torch.tensor(decay, dtype=torch.float64).log().float()
    rates = None if rates is None else rates.to(device)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        operands = (tensor.flatten(1, -3) for tensor in (query, key, value))
        output, _ = chunk_simple_gla(*operands, g_gamma=rates, scale=1.0)
        return output.unflatten(1, query.shape[1:-2])

    return run


def floor(case: Case, mode: str, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The products of the recurrent form on the CPU, the bytes that must move on CUDA."""
    sizes = {name: math.prod(shape) for name, shape in case.shapes.items()}
    if device.type == "cuda":
        return byte_floor(sum(sizes.values()), sizes["value"], mode, dtype, device)
    batch, *spatial, heads, head_dim = case.shapes["query"]
    value_dim, tokens = case.shapes["value"][-1], math.prod(spatial)
    q = torch.randn(batch * heads, tokens, head_dim, dtype=dtype)
    v = torch.randn(batch * heads, tokens, value_dim, dtype=dtype)
    state, output = q.mT @ v, torch.empty_like(v)
    # State and reading: once in the forward, three times in the backward.
    times = {"forward": 1, "backward": 3, "training": 4}[mode]

    def run() -> None:
        for _ in range(times):
            torch.bmm(q.mT, v, out=state)
            torch.bmm(q, state, out=output)

    return run


PEERS: Mapping[str, Peer] = {
    "parallel": Peer(_peer(_parallel), devices=("cpu", "cuda")),
    "fla": Peer(_fla, devices=("cuda",)),
    "sdpa": Peer(_peer(_sdpa), devices=("cpu", "cuda"), same_function=False),
}

SUITE = Suite(cases, PEERS, floor)
