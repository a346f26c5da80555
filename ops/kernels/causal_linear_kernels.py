"""Causal linear attention in chunks: one program walks over the chunks of one head.

The state, float32, stays in registers. Tokens of a chunk meet each other through a matrix of
weights, as in attention, and all earlier ones through the state. Where images and heads are few,
tokens are cut into segments with programs of their own: a first kernel computes the state that
each segment would leave alone, and the second one puts those before its segment together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.common import dot
from vitarium.ops.kernels.rows import load_pair, load_vectors, store_vectors

# What varies with the map: values for which nothing is compiled anew.
SIZES = ["tokens", "heads", "segments", "chunks"]


@triton.jit
def tokens_of(chunk, place, tokens, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """Numbers of the tokens of a chunk, and which exist; REVERSE: the last one comes first."""
    index = chunk * BLOCK + place
    token = index
    if REVERSE:
        token = tokens - 1 - index
    return token, index < tokens


@triton.jit
def absorb(
    state, k, v, rate, place, BLOCK: tl.constexpr, FORGETS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The state after a chunk. `rate`: base-2 logarithm of the decay; not FORGETS: it is 0."""
    if FORGETS:
        k = (k.to(tl.float32) * tl.exp2(rate * (BLOCK - 1 - place))[:, None]).to(k.dtype)
        state = state * tl.exp2(rate * BLOCK)
    return dot(tl.trans(k), v, state, PRECISION, UPCAST)


@triton.jit
def state_pointers(states, number, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr):
    """Of state `number` of a contiguous tensor `(..., BLOCK_D, BLOCK_VALUE_D)`."""
    row, column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_VALUE_D)
    base = states + number.to(tl.int64) * (BLOCK_D * BLOCK_VALUE_D)
    return base + (row[:, None] * BLOCK_VALUE_D + column[None, :])


@triton.jit(do_not_specialize=SIZES)
def state_kernel(
    key, value,  # views
    rates,  # (heads,) or None
    states,  # result, (B, heads, segments, BLOCK_D, BLOCK_VALUE_D), float32
    tokens, heads,
    segments, chunks,  # chunks of a segment
    REVERSE: tl.constexpr, FORGETS: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The state that each segment leaves if nothing came before."""
    number = tl.program_id(0)
    segment, head, batch = (
        number % segments,
        number // segments % heads,
        number // segments // heads,
    )
    first = batch.to(tl.int64) * tokens
    place = tl.arange(0, BLOCK)
    rate = 0.0
    if FORGETS:
        rate = tl.load(rates + head)
    state = tl.zeros([BLOCK_D, BLOCK_VALUE_D], tl.float32)
    for chunk in range(segment * chunks, (segment + 1) * chunks):
        token, present = tokens_of(chunk, place, tokens, BLOCK, REVERSE)
        k, v = load_pair(
            key, value, first, head, token, present,
            D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        state = absorb(state, k, v, rate, place, BLOCK, FORGETS, PRECISION, UPCAST)
    tl.store(state_pointers(states, number, BLOCK_D, BLOCK_VALUE_D), state)


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(
    query, key, value,  # views
    rates,  # (heads,), base-2 logarithms of the decays, finite; None if all decays are 1
    states,  # of `state_kernel`, for all segments but the last; None if there is one segment
    output,  # result, a view
    tokens, heads,
    segments, chunks,  # chunks of a segment
    scale,
    REVERSE: tl.constexpr,  # tokens attend to themselves and later ones
    ADDS: tl.constexpr,  # to what the output holds
    FORGETS: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    segment, sequence = program % segments, program // segments
    head, batch = sequence % heads, sequence // heads
    first = batch.to(tl.int64) * tokens
    place = tl.arange(0, BLOCK)
    earlier = place[:, None] - place[None, :]
    rate = 0.0
    if FORGETS:
        rate = tl.load(rates + head)
        # Exponents are never above 0; rows and columns are products of chunks of all segments.
        weights = tl.where(earlier >= 0, tl.exp2(rate * tl.maximum(earlier, 0)), 0.0)
        fade = tl.exp2(rate * (place + 1))[:, None]
    state = tl.zeros([BLOCK_D, BLOCK_VALUE_D], tl.float32)
    if states is not None:
        for before in range(segment):
            number = sequence * (segments - 1) + before
            left = tl.load(state_pointers(states, number, BLOCK_D, BLOCK_VALUE_D))
            state = state * tl.exp2(rate * (chunks * BLOCK)) + left
    last = tl.minimum((segment + 1) * chunks, tl.cdiv(tokens, BLOCK))
    for chunk in range(segment * chunks, last):
        token, present = tokens_of(chunk, place, tokens, BLOCK, REVERSE)
        q = load_vectors(query, first, head, token, present, D, BLOCK_D, LARGE, ALIGN)
        k, v = load_pair(
            key, value, first, head, token, present,
            D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        scores = dot(q, tl.trans(k), None, PRECISION, UPCAST)
        past = dot(q, state.to(q.dtype), None, PRECISION, UPCAST)
        if FORGETS:
            scores = scores * weights
            past = past * fade
        else:
            scores = tl.where(earlier >= 0, scores, 0.0)
        out = dot(scores.to(v.dtype), v, past, PRECISION, UPCAST)
        out *= scale
        if ADDS:
            out += load_vectors(
                output, first, head, token, present, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN
            ).to(tl.float32)
        store_vectors(
            output, first, head, token, present, out, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN
        )
        state = absorb(state, k, v, rate, place, BLOCK, FORGETS, PRECISION, UPCAST)
