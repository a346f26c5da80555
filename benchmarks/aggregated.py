"""What aggregated attention is measured on, and against.

The settings are those of TransNeXt-Tiny's first three stages at 224 x 224 pixels, with all that its
module passes. Peers compute the same function and are checked for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.benchmarks.floors import byte_floor, product_floor
from vitarium.benchmarks.suite import Peer, Suite
from vitarium.ops import Case

WINDOW_SIZE = 3
HEAD_DIM = 24
POOLED = 49  # of 7 x 7
DENSE_TOKENS = 1000  # of a map, up to which scores of all pairs of tokens are affordable


def cases(batch_size: int) -> list[Case]:
    """The stages with aggregated attention."""
    return [_case(batch_size, side, heads) for side, heads in ((56, 3), (28, 6), (14, 12))]


def _case(batch_size: int, side: int, heads: int) -> Case:
    base, window = (batch_size, side, side, heads), WINDOW_SIZE**2
    pooled = (batch_size, POOLED, heads, HEAD_DIM)
    shapes = {
        **dict.fromkeys(("query", "key", "value"), (*base, HEAD_DIM)),
        **dict.fromkeys(("pooled_key", "pooled_value"), pooled),
        "bias": (heads, window),
        "pooled_bias": (heads, side * side, POOLED),
        "window_weights": (*base, window),
    }
    return Case(f"{side}x{side} heads {heads}", shapes, {"window_size": WINDOW_SIZE})


# --- peers ---------------------------------------------------------------------------------------


def _flat(x: Tensor) -> Tensor:
    """`(B, ..., heads, channels)` as `(B, heads, tokens, channels)`."""
    return x.flatten(1, -3).transpose(1, 2)


def _unfolded(x: Tensor) -> Tensor:
    """The tokens of every window, `(B, heads, N, window^2, channels)`."""
    batch, *_, heads, channels = x.shape
    x = F.unfold(x.flatten(-2).permute(0, 3, 1, 2), WINDOW_SIZE, padding=WINDOW_SIZE // 2)
    return x.view(batch, heads, channels, WINDOW_SIZE**2, -1).permute(0, 1, 4, 3, 2)


def _unfold(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """A copy of keys and values for every place of the window."""
    _, height, width, *_ = case.shapes["query"]
    outside = _unfolded(torch.ones(1, height, width, 1, 1, device=device))[0, 0, :, :, 0] == 0

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pooled_key: Tensor,
        pooled_value: Tensor,
        bias: Tensor,
        pooled_bias: Tensor,
        window_weights: Tensor,
    ) -> Tensor:
        q = _flat(query) * HEAD_DIM**-0.5
        near = (q[..., None, :] @ _unfolded(key).mT).squeeze(-2) + bias[:, None]
        far = q @ _flat(pooled_key).mT + pooled_bias
        scores = torch.cat([near.masked_fill(outside, -math.inf), far], -1)
        near, far = scores.softmax(-1).split([WINDOW_SIZE**2, POOLED], -1)
        near = near + _flat(window_weights)
        output = (near[..., None, :] @ _unfolded(value)).squeeze(-2) + far @ _flat(pooled_value)
        return output.transpose(1, 2).reshape(value.shape)

    return run


def _window_sum(value: Tensor, window_weights: Tensor) -> Tensor:
    """The window's values times the further weights, by shifting the map."""
    _, height, width, *_ = value.shape
    padded = F.pad(value, (0, 0, 0, 0, *[WINDOW_SIZE // 2] * 4))
    total = torch.zeros_like(value)
    for place in range(WINDOW_SIZE**2):
        down, right = divmod(place, WINDOW_SIZE)
        seen = padded[:, down : down + height, right : right + width]
        total = total + window_weights[..., place : place + 1] * seen
    return total


def _offsets(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """For pairs of tokens whether the second is in the first's window, and at which place."""
    _, height, width, *_ = case.shapes["query"]
    row = torch.arange(height, device=device).repeat_interleave(width)
    column = torch.arange(width, device=device).repeat(height)
    down, right = row - row[:, None], column - column[:, None]
    reach = WINDOW_SIZE // 2
    inside = (down.abs() <= reach) & (right.abs() <= reach)
    place = (down + reach) * WINDOW_SIZE + right + reach
    return inside, place.masked_fill(~inside, 0)


def _sdpa(case: Case, device: torch.device) -> Callable[..., Tensor] | None:
    """Every pair of tokens and every pooled key, masked; the further weights apart."""
    _, height, width, *_ = case.shapes["query"]
    if height * width > DENSE_TOKENS:
        return None
    inside, place = _offsets(case, device)

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pooled_key: Tensor,
        pooled_value: Tensor,
        bias: Tensor,
        pooled_bias: Tensor,
        window_weights: Tensor,
    ) -> Tensor:
        near = bias[:, place].masked_fill(~inside, -math.inf)
        output = F.scaled_dot_product_attention(
            _flat(query),
            torch.cat([_flat(key), _flat(pooled_key)], 2),
            torch.cat([_flat(value), _flat(pooled_value)], 2),
            torch.cat([near, pooled_bias], -1)[None],
        )
        output = output.transpose(1, 2).reshape(value.shape)
        return output + _window_sum(value, window_weights)

    return run


def _flex(case: Case, device: torch.device) -> Callable[..., Tensor]:
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _, height, width, *_ = case.shapes["query"]
    tokens, reach = height * width, WINDOW_SIZE // 2

    def shift(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return key // width - query // width, key % width - query % width

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down, right = shift(query, key)
        near = (down.abs() <= reach) & (right.abs() <= reach)
        return (key >= tokens) | near

    blocks = create_block_mask(mask, None, None, tokens, tokens + POOLED, device=device)
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pooled_key: Tensor,
        pooled_value: Tensor,
        bias: Tensor,
        pooled_bias: Tensor,
        window_weights: Tensor,
    ) -> Tensor:
        def added(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            down, right = (s.clamp(-reach, reach) + reach for s in shift(query, key))
            far = pooled_bias[head, query, (key - tokens).clamp(min=0)]
            return score + torch.where(key < tokens, bias[head, down * WINDOW_SIZE + right], far)

        # A backward that is timed alone runs many times on one graph, which must keep its buffers.
        with config.patch(donated_buffer=False):
            output = compiled(
                _flat(query),
                torch.cat([_flat(key), _flat(pooled_key)], 2),
                torch.cat([_flat(value), _flat(pooled_value)], 2),
                score_mod=added,
                block_mask=blocks,
            )
        output = output.transpose(1, 2).reshape(value.shape)
        return output + _window_sum(value, window_weights)

    return run


def floor(case: Case, mode: str, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The products with the pooled keys alone on the CPU, the bytes that must move on CUDA."""
    batch, height, width, heads, dim = case.shapes["query"]
    if device.type == "cuda":
        inputs = sum(math.prod(shape) for shape in case.shapes.values())
        output = math.prod(case.shapes["query"])
        return byte_floor(inputs, output, mode, dtype, device)
    return product_floor(batch * heads, height * width, POOLED, dim, dim, mode, dtype, device)


PEERS: Mapping[str, Peer] = {
    "unfold": Peer(_unfold, devices=("cpu", "cuda")),
    "sdpa_masked": Peer(_sdpa, devices=("cpu", "cuda")),
    "flex": Peer(_flex, devices=("cuda",)),
}

SUITE = Suite(cases, PEERS, floor, shared=("bias", "pooled_bias"))
