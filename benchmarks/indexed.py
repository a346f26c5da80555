"""What indexed attention is measured on, and against.

Maps whose queries keep a quarter of the keys, as in Sparsifiner, or few. The peers compute all
scores and hide those that are not kept: "masked" as Sparsifiner's code writes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.benchmarks.floors import attention_floor
from vitarium.benchmarks.suite import Peer, Suite
from vitarium.ops import Case


def cases(batch_size: int) -> list[Case]:
    """Maps, heads and numbers of keys."""
    return [
        _case(batch_size, side, heads, width, count)
        for side, heads, width, counts in (
            (14, 6, 64, (49,)),
            (28, 4, 32, (196, 49)),
            (56, 2, 32, (196, 49)),
        )
        for count in counts
    ]


def _case(batch_size: int, side: int, heads: int, width: int, count: int) -> Case:
    tokens = side * side

    def distinct(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        return torch.rand((*shape[:-1], tokens), generator=generator).topk(count).indices

    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("query", "key", "value"), (batch_size, side, side, heads, width)
    )
    shapes["index"] = (batch_size, heads, tokens, count)
    note = f"{side}x{side} heads {heads} width {width} keys {count}"
    return Case(note, shapes, {}, {"index": distinct})


# --- peers ---------------------------------------------------------------------------------------


def masked_attention(query: Tensor, key: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """As the official code: a mask of numbers, of rank (B, heads, queries, keys)."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    mask = torch.zeros_like(scores).scatter_(-1, index, 1.0)
    weights = scores.masked_fill(~mask.bool(), float("-inf")).softmax(dim=-1)
    return torch.nan_to_num(weights) @ value


def _sdpa(query: Tensor, key: Tensor, value: Tensor, index: Tensor) -> Tensor:
    mask = index.new_zeros((*query.shape[:3], key.shape[2]), dtype=torch.bool)
    return F.scaled_dot_product_attention(query, key, value, mask.scatter_(-1, index, True))


def _peer(
    attend: Callable[..., Tensor],
) -> Callable[[Case, torch.device], Callable[..., Tensor]]:
    def build(case: Case, device: torch.device) -> Callable[..., Tensor]:
        def run(query: Tensor, key: Tensor, value: Tensor, index: Tensor) -> Tensor:
            heads = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
            return attend(*heads, index).transpose(1, 2).reshape(query.shape)

        return run

    return build


def floor(case: Case, mode: str, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The products of queries with as many keys as they keep, as if these lay together."""
    batch, height, width, heads, dim = case.shapes["query"]
    tokens, count = height * width, case.shapes["index"][-1]
    moved = [math.prod(case.shapes[name]) for name in ("query", "key", "value")]
    return attention_floor(
        batch * heads, tokens, count, dim, dim, mode, dtype, device, elements=moved
    )


PEERS: Mapping[str, Peer] = {
    "masked": Peer(_peer(masked_attention), devices=("cpu", "cuda")),
    "sdpa": Peer(_peer(_sdpa), devices=("cpu", "cuda")),
}

SUITE = Suite(cases, PEERS, floor, shared=())
