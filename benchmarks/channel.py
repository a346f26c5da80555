"""What channel attention is measured on, and against.

The settings are DaViT's stages at 224 x 224 pixels. The peers are the official formulation, which
puts heads before tokens, and attention over channels as tokens by `scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.benchmarks.floors import attention_floor
from vitarium.benchmarks.suite import Peer, Suite
from vitarium.ops import Case

HEAD_DIM = 32


def cases(batch_size: int) -> list[Case]:
    """Three stages of DaViT-T."""
    return [_case(batch_size, *rest) for rest in ((56, 3), (28, 6), (14, 12))]


def _case(batch_size: int, side: int, heads: int) -> Case:
    shape = (batch_size, side, side, heads, HEAD_DIM)
    return Case(f"{side}x{side} heads {heads}", dict.fromkeys(("query", "key", "value"), shape))


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query * HEAD_DIM**-0.5 @ key.mT).softmax(-1) @ value


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=HEAD_DIM**-0.5)


def _transposed(attend: Attend) -> Callable[[Case, torch.device], Callable[..., Tensor]]:
    def build(case: Case, device: torch.device) -> Callable[..., Tensor]:
        def run(*tensors: Tensor) -> Tensor:
            channels = (tensor.flatten(1, 2).permute(0, 2, 3, 1) for tensor in tensors)
            return attend(*channels).permute(0, 3, 1, 2).reshape(tensors[0].shape)

        return run

    return build


def floor(case: Case, mode: str, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The bare matrix products on the CPU, the bytes that must move on CUDA."""
    shape = case.shapes["query"]
    products, tokens = shape[0] * shape[3], shape[1] * shape[2]
    moved = [math.prod(shape)] * 3
    return attention_floor(
        products, HEAD_DIM, HEAD_DIM, tokens, tokens, mode, dtype, device, elements=moved
    )


PEERS = {
    "transposed": Peer(_transposed(_eager), devices=("cpu", "cuda")),
    "sdpa_transposed": Peer(_transposed(_sdpa), devices=("cpu", "cuda")),
}

SUITE = Suite(cases, PEERS, floor, shared=())
