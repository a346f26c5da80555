"""What dense attention is measured on, and against.

The settings are those of ViT at 224 pixels, of a pyramid's stages with all tokens or pooled keys,
with and without a learned bias, and of SHViT's single heads, whose queries are narrower than their
values. Peers compute the same function.
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
    """ViT, stages of pyramids, and SHViT."""
    return [
        _case(batch_size, 14, 14, 3, (64, 64)),
        _case(batch_size, 14, 14, 12, (64, 64)),
        _case(batch_size, 14, 14, 6, (32, 32), bias=True),
        _case(batch_size, 14, 14, 12, (64, 64), bias=True),
        _case(batch_size, 28, 28, 4, (32, 32)),
        _case(batch_size, 28, 28, 4, (32, 32), bias=True),
        _case(batch_size, 56, 28, 2, (32, 32)),
        _case(batch_size, 14, 14, 1, (16, 48)),
        _case(batch_size, 14, 14, 1, (16, 64)),
        _case(batch_size, 28, 28, 1, (16, 48)),
    ]


def _case(
    batch_size: int,
    side: int,
    side_kv: int,
    heads: int,
    widths: tuple[int, int],
    bias: bool = False,
) -> Case:
    """Maps of queries and keys, heads, and widths of (query, value); the bias is of every head."""
    shapes: dict[str, tuple[int, ...]] = {
        "query": (batch_size, side, side, heads, widths[0]),
        "key": (batch_size, side_kv, side_kv, heads, widths[0]),
        "value": (batch_size, side_kv, side_kv, heads, widths[1]),
    }
    note = f"{side}x{side} to {side_kv}x{side_kv} heads {heads} width {widths[0]}"
    if widths[0] != widths[1]:
        note += f" and {widths[1]}"
    if bias:
        shapes["bias"] = (heads, side**2, side_kv**2)
        note += " bias"
    return Case(note, shapes)


# --- peers ---------------------------------------------------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def eager(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Two products and a softmax, on `(B, heads, tokens, channels)`."""
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's fused attention; the bias with four dimensions, as its fast kernels want it."""
    return F.scaled_dot_product_attention(query, key, value, None if bias is None else bias[None])


def _flex() -> Attend:
    from torch._functorch import config
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return score + bias[h, q, kv]

        # A backward that is timed alone runs many times on one graph, which must keep its buffers.
        with config.patch(donated_buffer=False):
            return compiled(query, key, value, None if bias is None else score_mod)

    return attend


def _peer(make: Callable[[], Attend]) -> Callable[[Case, torch.device], Callable[..., Tensor]]:
    def build(case: Case, device: torch.device) -> Callable[..., Tensor]:
        attend = make()

        def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
            operands = (tensor.flatten(1, -3).transpose(1, 2) for tensor in (query, key, value))
            output = attend(*operands, bias).transpose(1, 2)
            return output.unflatten(1, query.shape[1:-2])

        return run

    return build


def floor(case: Case, mode: str, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The bare matrix products on the CPU, the bytes that must move on CUDA."""
    shapes = case.shapes
    batch, *spatial, heads, head_dim = shapes["query"]
    keys = math.prod(shapes["key"][1:-2])
    moved = [math.prod(shapes[name]) for name in ("query", "key", "value")]
    return attention_floor(
        batch * heads, math.prod(spatial), keys, head_dim, shapes["value"][-1],
        mode, dtype, device, elements=moved,
    )  # fmt: skip


PEERS: Mapping[str, Peer] = {
    "eager": Peer(_peer(lambda: eager), devices=("cpu", "cuda")),
    "sdpa": Peer(_peer(lambda: sdpa), devices=("cpu", "cuda")),
    "flex": Peer(_peer(_flex), devices=("cuda",)),
}

SUITE = Suite(cases, PEERS, floor)
