"""What neighborhood attention is measured on, and against.

The settings are those of DiNAT's four stages at 224 x 224 pixels. Peers compute the same function
and are checked for it, but for `sdpa_global`: attention of every token to every token, which is
what a model would use instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.benchmarks.floors import attention_floor
from vitarium.benchmarks.gather import gather_attention, neighbors
from vitarium.benchmarks.suite import Peer, Suite
from vitarium.ops import Case

KERNEL_SIZE = 7
HEAD_DIM = 32


def cases(batch_size: int) -> list[Case]:
    """Every kind of layer of DiNAT: map, heads and dilation."""
    stages = ((56, 2, (1, 8)), (28, 4, (1, 4)), (14, 8, (1, 2)), (7, 16, (1,)))
    return [
        Case(
            f"{side}x{side} heads {heads} dilation {dilation}",
            dict.fromkeys(("query", "key", "value"), (batch_size, side, side, heads, HEAD_DIM)),
            {"kernel_size": KERNEL_SIZE, "dilation": dilation},
        )
        for side, heads, dilations in stages
        for dilation in dilations
    ]


# --- peers ---------------------------------------------------------------------------------------


def _flat(x: Tensor) -> Tensor:
    """`(B, *spatial, heads, head_dim)` as `(B, heads, N, head_dim)`, a view."""
    return x.flatten(1, -3).transpose(1, 2)


def _unflat(x: Tensor, spatial: tuple[int, ...]) -> Tensor:
    return x.transpose(1, 2).unflatten(1, spatial)


def _spatial(case: Case) -> tuple[int, ...]:
    return tuple(case.shapes["query"][1:-2])


def _gather(case: Case, device: torch.device) -> Callable[..., Tensor]:
    return lambda query, key, value: gather_attention(query, key, value, **case.kwargs)


def _sdpa_masked(case: Case, device: torch.device) -> Callable[..., Tensor]:
    spatial = _spatial(case)
    rank, tokens = len(spatial), math.prod(spatial)
    kernel_size, dilation = case.kwargs["kernel_size"], case.kwargs["dilation"]
    index = neighbors(spatial, (kernel_size,) * rank, (dilation,) * rank, device)
    mask = torch.zeros(tokens, tokens, dtype=torch.bool, device=device).scatter_(1, index, True)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = F.scaled_dot_product_attention(_flat(query), _flat(key), _flat(value), mask)
        return _unflat(output, spatial)

    return run


def _sdpa_global(case: Case, device: torch.device) -> Callable[..., Tensor]:
    spatial = _spatial(case)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = F.scaled_dot_product_attention(_flat(query), _flat(key), _flat(value))
        return _unflat(output, spatial)

    return run


def _flex(case: Case, device: torch.device) -> Callable[..., Tensor]:
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    spatial = _spatial(case)
    k, d = case.kwargs["kernel_size"], case.kwargs["dilation"]

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = query >= 0
        for length in reversed(spatial):
            q, kv = query % length, key % length
            query, key = query // length, key // length
            tokens_of_group = (length - q % d + d - 1) // d
            start = torch.minimum((q // d - k // 2).clamp(min=0), tokens_of_group - k)
            inside = inside & (q % d == kv % d) & (kv // d >= start) & (kv // d < start + k)
        return inside

    tokens = math.prod(spatial)
    blocks = create_block_mask(mask_mod, None, None, tokens, tokens, device=device)
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # A backward that is timed alone runs many times on one graph, which must keep its buffers.
        with config.patch(donated_buffer=False):
            output = compiled(_flat(query), _flat(key), _flat(value), block_mask=blocks)
        return _unflat(output, spatial)

    return run


# --- floors --------------------------------------------------------------------------------------


def floor(case: Case, mode: str, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """On the CPU the matrix products, as batches of one window's size; on CUDA the memory."""
    batch, *spatial, heads, head_dim = case.shapes["query"]
    window = case.kwargs["kernel_size"] ** len(spatial)
    products, rest = divmod(batch * heads * math.prod(spatial), window)
    if rest:
        raise ValueError(f"case {case.note!r}: windows of {window} do not divide its queries")
    moved = [math.prod(case.shapes[name]) for name in ("query", "key", "value")]
    return attention_floor(
        products, window, window, head_dim, head_dim, mode, dtype, device, elements=moved
    )


PEERS: Mapping[str, Peer] = {
    "gather": Peer(_gather, devices=("cpu",)),
    "sdpa_masked": Peer(_sdpa_masked, devices=("cpu", "cuda")),
    "sdpa_global": Peer(_sdpa_global, devices=("cuda",), same_function=False),
    "flex": Peer(_flex, devices=("cuda",)),
}

SUITE = Suite(cases, PEERS, floor)
