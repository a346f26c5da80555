"""Aggregated attention, forward: one program computes one tile of queries of one head.

The pooled keys are taken in tiles, as matrix products. The window is too small for these: its
places follow one after the other, as elementwise products of the tile with the map shifted, which
the first-level cache holds. One online softmax in base 2 runs over both.

Also what forward and backward share: the tile, its window and the pooled keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.common import (
    LOG2E,
    channel_offsets,
    dot,
    exists,
    load_rows,
    positions,
    softmax_step,
    split,
    store_rows,
    token_offsets,
)


@triton.jit
def map_offsets(
    strides, batch, head, position, BLOCK: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr
):
    """Offsets of the vectors of tokens, (tokens, BLOCK), in a map without dilation.

    ALIGN divides all strides but the channels', which the compiler would have to know to load
    several channels at once.
    """
    base, offset = token_offsets(batch, head, position, (0, 0, 0), (1, 1, 1), strides, LARGE)
    base = tl.multiple_of(base, ALIGN)
    offset = tl.multiple_of(offset, ALIGN)
    return base, offset[:, None] + channel_offsets(strides, BLOCK, LARGE)


@triton.jit
def load_map(
    tensor, strides, batch, head, position, present,
    D: tl.constexpr, BLOCK: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The vectors of tokens, (tokens, BLOCK); zero where `present` is false and beyond D."""
    base, offsets = map_offsets(strides, batch, head, position, BLOCK, LARGE, ALIGN)
    mask = present[:, None] & (tl.arange(0, BLOCK) < D)[None, :]
    return tl.load(tensor + base + offsets, mask=mask, other=0.0)


@triton.jit
def store_map(
    tensor, strides, batch, head, position, present, tokens,
    D: tl.constexpr, BLOCK: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Writes what `load_map` reads, in the tensor's dtype."""
    base, offsets = map_offsets(strides, batch, head, position, BLOCK, LARGE, ALIGN)
    mask = present[:, None] & (tl.arange(0, BLOCK) < D)[None, :]
    tl.store(tensor + base + offsets, tokens.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def load_numbers(tensor, strides, batch, head, position, present, other, LARGE: tl.constexpr):
    """`common.load_rows` of a map without dilation."""
    return load_rows(
        tensor, strides, batch, head, position, present, (0, 0, 0), (1, 1, 1), other, LARGE
    )


@triton.jit
def store_numbers(tensor, strides, batch, head, position, present, rows, LARGE: tl.constexpr):
    """`common.store_rows` of a map without dilation."""
    store_rows(tensor, strides, batch, head, position, present, (0, 0, 0), (1, 1, 1), rows, LARGE)


@triton.jit
def tile_of_program(tiles, heads, lengths, TILE: tl.constexpr):
    """Batch, head, number and positions of the tile of this program, and which of them exist.

    Heads of a token lie next to each other in memory, so they are computed at the same time.
    """
    program = tl.program_id(0)
    head = program % heads
    z, y, x, batch = split(program // heads, tiles)
    origin = (z * TILE[0], y * TILE[1], x * TILE[2])
    at = positions(origin, tl.arange(0, TILE[0] * TILE[1] * TILE[2]), TILE)
    return batch, head, at, exists(at, lengths)


@triton.jit
def shifted(at, present, place, lengths, K: tl.constexpr, SIGN: tl.constexpr):
    """Tokens at one place of the windows of others (SIGN 1), or those that see them there (-1)."""
    y = at[1] + SIGN * (place // K - K // 2)
    x = at[2] + SIGN * (place % K - K // 2)
    on_map = (y >= 0) & (y < lengths[1]) & (x >= 0) & (x < lengths[2])
    return (at[0], y, x), present & on_map


@triton.jit
def pooled_at(start, pooled, BLOCK: tl.constexpr):
    """Positions of a tile of pooled tokens, as of a map, and which of them exist."""
    index = start + tl.arange(0, BLOCK)
    return (index * 0, index * 0, index), index < pooled


@triton.jit
def window_scores(q, k, bias, head, place, bias_strides, scale):
    """Base-2 scores of tokens and one token of each one's window; q and k in float32."""
    scores = tl.sum(q * k, 1) * (scale * LOG2E)
    if bias is not None:
        entry = tl.load(bias + head * bias_strides[0] + place * bias_strides[1])
        scores += entry.to(tl.float32) * LOG2E
    return scores


@triton.jit
def load_pooled_bias(pooled_bias, strides, head, token, key, present, LARGE: tl.constexpr):
    """Base-2 entries for token and pooled key, zero where not present."""
    if LARGE:
        token = token.to(tl.int64)
    offset = head.to(tl.int64) * strides[0] + (token * strides[1] + key * strides[2])
    return tl.load(pooled_bias + offset, mask=present, other=0.0).to(tl.float32) * LOG2E


@triton.jit(do_not_specialize_on_alignment=["lengths", "tiles", "heads", "pooled"])
def forward_kernel(
    query, key, value, pooled_key, pooled_value,
    bias, pooled_bias, window_weights,  # each may be None
    output, logsumexp,  # results
    query_strides, key_strides, value_strides,  # (batch, z, y, x, head, channel)
    pooled_key_strides, pooled_value_strides,  # the same, tokens along x
    bias_strides,  # (head, place)
    pooled_bias_strides,  # (head, token, key)
    window_weights_strides,  # (batch, z, y, x, head, place)
    output_strides, logsumexp_strides,
    lengths,  # of the map, per axis
    tiles,  # per axis
    heads,
    pooled,  # number of pooled keys
    scale,
    GROUP: tl.constexpr,  # query heads per key head
    K: tl.constexpr,  # side of the window
    TILE: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
    STAGES: tl.constexpr,  # of the walk over the window
):  # fmt: skip
    BLOCK_M: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    batch, head, at, present = tile_of_program(tiles, heads, lengths, TILE)
    q = load_map(query, query_strides, batch, head, at, present, D, BLOCK_D, LARGE, ALIGN)
    maximum = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: no inf - inf
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_VALUE_D], tl.float32)
    token = at[1] * lengths[2] + at[2]
    for start in range(0, pooled, BLOCK_N):
        k_at, k_exists = pooled_at(start, pooled, BLOCK_N)
        k = load_map(
            pooled_key, pooled_key_strides, batch, head // GROUP, k_at, k_exists,
            D, BLOCK_D, LARGE, ALIGN,
        )  # fmt: skip
        v = load_map(
            pooled_value, pooled_value_strides, batch, head // GROUP, k_at, k_exists,
            VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        scores = dot(q, tl.trans(k), None, PRECISION, UPCAST) * (scale * LOG2E)
        if pooled_bias is not None:
            scores += load_pooled_bias(
                pooled_bias, pooled_bias_strides, head, token[:, None], k_at[2][None, :],
                present[:, None] & k_exists[None, :], LARGE,
            )  # fmt: skip
        scores = tl.where(k_exists[None, :], scores, float("-inf"))
        maximum, total, accumulator = softmax_step(
            scores, v, maximum, total, accumulator, 1.0, PRECISION, UPCAST
        )
    q_wide = q.to(tl.float32)
    further = tl.zeros([BLOCK_M, BLOCK_VALUE_D], tl.float32)
    for place in tl.range(0, K * K, num_stages=STAGES):
        k_at, seen = shifted(at, present, place, lengths, K, 1)
        k = load_map(key, key_strides, batch, head // GROUP, k_at, seen, D, BLOCK_D, LARGE, ALIGN)
        v = load_map(
            value,
            value_strides,
            batch,
            head // GROUP,
            k_at,
            seen,
            VALUE_D,
            BLOCK_VALUE_D,
            LARGE,
            ALIGN,
        ).to(tl.float32)
        scores = window_scores(q_wide, k.to(tl.float32), bias, head, place, bias_strides, scale)
        scores = tl.where(seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, scores)
        weights = tl.exp2(scores - new_maximum)
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + weights
        accumulator = accumulator * decay[:, None] + weights[:, None] * v
        maximum = new_maximum
        if window_weights is not None:
            extra = load_numbers(
                window_weights + place * window_weights_strides[5], window_weights_strides,
                batch, head, at, seen, 0.0, LARGE,
            )  # fmt: skip
            further += extra.to(tl.float32)[:, None] * v
    result = accumulator / total[:, None] + further
    store_map(
        output,
        output_strides,
        batch,
        head,
        at,
        present,
        result,
        VALUE_D,
        BLOCK_VALUE_D,
        LARGE,
        ALIGN,
    )
    store_numbers(
        logsumexp, logsumexp_strides, batch, head, at, present, maximum + tl.log2(total), LARGE
    )
