"""Device functions that several kernels share: tiles of a map, windows on it, matrix products.

Maps have three axes here, (z, y, x); a map of lower rank has leading axes of length 1. Triples are
passed as tuples; an integer that is 1 is a compile-time constant for Triton, so the arithmetic of
an axis of length 1 disappears. A dilated pattern falls apart into residue classes: the tokens with
equal remainder modulo the dilation form a dense map of their own, and positions are counted in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Matrix product in float32. UPCAST: the interpreter multiplies raw bits of bfloat16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def softmax_step(
    scores, v, maximum, total, accumulator, factor, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):
    """One tile of keys of the online softmax (Milakov and Gimelshein, arXiv 1805.02867).

    `scores * factor` are base-2 logarithms; hidden ones are -inf. `maximum` begins as -1e30, which
    is finite so that an empty tile does not compute inf - inf; `total` and `accumulator` as 0. The
    output is accumulator / total, the base-2 log-sum-exp maximum + log2(total).
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - new_maximum[:, None])
    decay = tl.exp2(maximum - new_maximum)
    total = total * decay + tl.sum(weights, 1)
    accumulator = accumulator * decay[:, None]
    accumulator = dot(weights.to(v.dtype), v, accumulator, PRECISION, UPCAST)
    return new_maximum, total, accumulator


@triton.jit
def split(index, counts):
    """The digits of `index` in the mixed radix `counts`, last axis fastest, and the rest."""
    x = index % counts[2]
    index = index // counts[2]
    y = index % counts[1]
    index = index // counts[1]
    return index % counts[0], y, x, index // counts[0]


@triton.jit
def class_lengths(lengths, residue, dilation):
    """Number of tokens of a residue class along each axis."""
    return (
        (lengths[0] - residue[0] + dilation[0] - 1) // dilation[0],
        (lengths[1] - residue[1] + dilation[1] - 1) // dilation[1],
        (lengths[2] - residue[2] + dilation[2] - 1) // dilation[2],
    )


@triton.jit
def positions(origin, index, TILE: tl.constexpr):
    """Position along each axis of the tokens number `index` of the tile that starts at `origin`."""
    return (
        origin[0] + index // (TILE[2] * TILE[1]) % TILE[0],
        origin[1] + index // TILE[2] % TILE[1],
        origin[2] + index % TILE[2],
    )


@triton.jit
def expand(triple, AXIS: tl.constexpr):
    """Three vectors as columns (AXIS 1) or rows (AXIS 0)."""
    return (
        tl.expand_dims(triple[0], AXIS),
        tl.expand_dims(triple[1], AXIS),
        tl.expand_dims(triple[2], AXIS),
    )


@triton.jit
def exists(position, length):
    """Whether the token lies in its residue class, not past the end of a partial tile."""
    return (position[0] < length[0]) & (position[1] < length[1]) & (position[2] < length[2])


@triton.jit
def clip(position, length):
    """Positions past the end moved to the last token, so that their windows are those of tokens."""
    return (
        tl.minimum(position[0], length[0] - 1),
        tl.minimum(position[1], length[1] - 1),
        tl.minimum(position[2], length[2] - 1),
    )


@triton.jit
def token_offsets(batch, head, position, residue, dilation, strides, LARGE: tl.constexpr):
    """Offset of one head of tokens, in elements, in a tensor (batch, z, y, x, head, channel).

    LARGE: 32 bits do not hold an offset within one image.
    """
    z = position[0] * dilation[0] + residue[0]
    y = position[1] * dilation[1] + residue[1]
    x = position[2] * dilation[2] + residue[2]
    if LARGE:
        z = z.to(tl.int64)
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    base = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[4]
    return base, z * strides[1] + y * strides[2] + x * strides[3]


@triton.jit
def load_rows(
    tensor, strides, batch, head, position, present, residue, dilation, other, LARGE: tl.constexpr
):
    """One number per token, `other` where `present` is false."""
    base, offset = token_offsets(batch, head, position, residue, dilation, strides, LARGE)
    return tl.load(tensor + base + offset, mask=present, other=other)


@triton.jit
def store_rows(
    tensor, strides, batch, head, position, present, residue, dilation, rows, LARGE: tl.constexpr
):
    """Writes what `load_rows` reads."""
    base, offset = token_offsets(batch, head, position, residue, dilation, strides, LARGE)
    tl.store(tensor + base + offset, rows, mask=present)


@triton.jit
def load_tokens(
    tensor, strides, batch, head, position, present, residue, dilation,
    D: tl.constexpr, BLOCK: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """The vectors of tokens, (tokens, BLOCK); zero where `present` is false and beyond D."""
    base, offset = token_offsets(batch, head, position, residue, dilation, strides, LARGE)
    channel = tl.arange(0, BLOCK)
    mask = present[:, None] & (channel < D)[None, :]
    source = tensor + base + (offset[:, None] + channel[None, :] * strides[5])
    return tl.load(source, mask=mask, other=0.0)


@triton.jit
def store_tokens(
    tensor, strides, batch, head, position, present, residue, dilation, tokens,
    D: tl.constexpr, BLOCK: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Writes what `load_tokens` reads, in the tensor's dtype."""
    base, offset = token_offsets(batch, head, position, residue, dilation, strides, LARGE)
    channel = tl.arange(0, BLOCK)
    mask = present[:, None] & (channel < D)[None, :]
    target = tensor + base + (offset[:, None] + channel[None, :] * strides[5])
    tl.store(target, tokens.to(tensor.dtype.element_ty), mask=mask)


# --- the window of neighborhood attention, one axis: rule in ops/neighborhood.py -----------------


@triton.jit
def axis_window(p, n, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr):
    """First key and one past the last key that the query at p sees; both never decrease in p."""
    if CAUSAL:
        leader = tl.minimum(p // S * S + (S - 1), n - 1)
        return tl.maximum(leader - (K - 1), 0), p + 1
    leader = tl.minimum(p // S * S + S // 2, n - 1)
    start = tl.minimum(tl.maximum(leader - K // 2, 0), n - K)
    return start, start + K


@triton.jit
def axis_union(first, count, n, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr):
    """First key and one past the last key that any query of [first, first + count) sees."""
    start, _ = axis_window(first, n, K, S, CAUSAL)
    _, stop = axis_window(tl.minimum(first + count, n) - 1, n, K, S, CAUSAL)
    return start, stop


@triton.jit
def axis_inverse(first, count, n, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr):
    """First query and one past the last query that sees any key of [first, first + count).

    Windows move forward only, so the queries whose window starts early enough are a prefix of the
    axis and those whose window stops late enough are a suffix; the answer is where they overlap.
    """
    last = tl.minimum(first + count, n) - 1
    if CAUSAL:
        start = first
        stop = (last + K - S) // S * S + S
        stop = tl.where(last + K >= n, n, stop)
    else:
        # A key among the first K is in the window that the border pushed inside: so from query 0.
        start = tl.maximum(first - K + K // 2 + 1 - S // 2, 0)
        start = tl.where(first < K, 0, (start + S - 1) // S * S)
        stop = (last + K // 2 - S // 2) // S * S + S
        stop = tl.where(last + K >= n, n, stop)
    return start, tl.minimum(stop, n)


# --- the same for three axes ---------------------------------------------------------------------


@triton.jit
def windows(position, n, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr):
    """`axis_window` of every axis: the three starts and the three stops."""
    z0, z1 = axis_window(position[0], n[0], K[0], S[0], CAUSAL[0])
    y0, y1 = axis_window(position[1], n[1], K[1], S[1], CAUSAL[1])
    x0, x1 = axis_window(position[2], n[2], K[2], S[2], CAUSAL[2])
    return (z0, y0, x0), (z1, y1, x1)


@triton.jit
def key_range(
    origin,
    n,
    K: tl.constexpr,
    S: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
):
    """Where the walk over the keys of a query tile starts, and its number of tiles per axis."""
    z0, z1 = axis_union(origin[0], QUERY_TILE[0], n[0], K[0], S[0], CAUSAL[0])
    y0, y1 = axis_union(origin[1], QUERY_TILE[1], n[1], K[1], S[1], CAUSAL[1])
    x0, x1 = axis_union(origin[2], QUERY_TILE[2], n[2], K[2], S[2], CAUSAL[2])
    return (z0, y0, x0), (
        tl.cdiv(z1 - z0, KEY_TILE[0]),
        tl.cdiv(y1 - y0, KEY_TILE[1]),
        tl.cdiv(x1 - x0, KEY_TILE[2]),
    )


@triton.jit
def query_range(
    origin,
    n,
    K: tl.constexpr,
    S: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
):
    """Where the walk over the queries of a key tile starts, and its number of tiles per axis."""
    z0, z1 = axis_inverse(origin[0], KEY_TILE[0], n[0], K[0], S[0], CAUSAL[0])
    y0, y1 = axis_inverse(origin[1], KEY_TILE[1], n[1], K[1], S[1], CAUSAL[1])
    x0, x1 = axis_inverse(origin[2], KEY_TILE[2], n[2], K[2], S[2], CAUSAL[2])
    return (z0, y0, x0), (
        tl.cdiv(tl.maximum(z1 - z0, 0), QUERY_TILE[0]),
        tl.cdiv(tl.maximum(y1 - y0, 0), QUERY_TILE[1]),
        tl.cdiv(tl.maximum(x1 - x0, 0), QUERY_TILE[2]),
    )


@triton.jit
def inside(key, start, stop):
    """start <= key < stop by one unsigned comparison."""
    return (key - start).to(tl.uint32) < (stop - start).to(tl.uint32)


@triton.jit
def mask_scores(scores, key, start, stop):
    """Scores, -inf outside the window; a select per axis lets the compiler share comparisons."""
    scores = tl.where(inside(key[2], start[2], stop[2]), scores, float("-inf"))
    scores = tl.where(inside(key[1], start[1], stop[1]), scores, float("-inf"))
    return tl.where(inside(key[0], start[0], stop[0]), scores, float("-inf"))


@triton.jit
def relative_bias(bias, strides, query, key, start, stop, K: tl.constexpr):
    """Entries of one head's relative position bias table for pairs of query and key, in float32."""
    offset = (
        (key[0] - query[0] + (K[0] - 1)) * strides[1]
        + (key[1] - query[1] + (K[1] - 1)) * strides[2]
        + (key[2] - query[2] + (K[2] - 1)) * strides[3]
    )
    mask = (
        inside(key[0], start[0], stop[0])
        & inside(key[1], start[1], stop[1])
        & inside(key[2], start[2], stop[2])
    )
    return tl.load(bias + offset, mask=mask, other=0.0).to(tl.float32)
