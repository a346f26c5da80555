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
def channel_offsets(strides, BLOCK: tl.constexpr, LARGE: tl.constexpr):
    """Offsets of the channels of a head, a row; in maps with channels first they too are large."""
    channel = tl.arange(0, BLOCK)
    if LARGE:
        channel = channel.to(tl.int64)
    return channel[None, :] * strides[5]


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
    mask = present[:, None] & (tl.arange(0, BLOCK) < D)[None, :]
    source = tensor + base + (offset[:, None] + channel_offsets(strides, BLOCK, LARGE))
    return tl.load(source, mask=mask, other=0.0)


@triton.jit
def store_tokens(
    tensor, strides, batch, head, position, present, residue, dilation, tokens,
    D: tl.constexpr, BLOCK: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Writes what `load_tokens` reads, in the tensor's dtype."""
    base, offset = token_offsets(batch, head, position, residue, dilation, strides, LARGE)
    mask = present[:, None] & (tl.arange(0, BLOCK) < D)[None, :]
    target = tensor + base + (offset[:, None] + channel_offsets(strides, BLOCK, LARGE))
    tl.store(target, tokens.to(tensor.dtype.element_ty), mask=mask)
