"""Aggregated attention, forward: one program computes a share of a map's tiles for one head.

The windows of a tile's queries lie in one rectangle of keys: the tile and a margin. Scores with all
of these are matrix products, most of them outside of the windows; on tensor cores they cost less
than the products inside would elsewhere. One online softmax in base 2 runs over them and over the
pooled keys. Biases are where a matrix product begins to sum, so that adding them is free; they come
divided by the scale, and those of the window as -inf outside of it.

Also what forward and backward share: tiles, rectangles around them, and pooled keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.common import LOG2E, dot, softmax_step
from vitarium.ops.kernels.rows import load_pair, load_vectors, store_numbers, store_vectors

# What varies with the map: values for which nothing is compiled anew.
SIZES = ["height", "width", "heads", "pooled", "padded", "shares", "walk"]
SIZES += ["weights_token", "weights_head", "weights_place", "images", "parts"]


@triton.jit
def share_of_program(shares, heads):
    """Image, head, and which share of the map's tiles is this program's.

    Heads of a token lie next to each other in memory, so they are computed at the same time.
    """
    program = tl.program_id(0)
    return program // heads // shares, program % heads, program // heads % shares


@triton.jit
def tile_origin(tile, height, TILE: tl.constexpr):
    """Where a tile begins, (y, x); tiles follow each other downwards, so that rows are in cache."""
    down = tl.cdiv(height, TILE[0])
    return tile % down * TILE[0], tile // down * TILE[1]


@triton.jit
def next_tile(y, x, height, TILE: tl.constexpr):
    """`tile_origin` of the tile after that at (y, x)."""
    y += TILE[0]
    return tl.where(y < height, y, 0), tl.where(y < height, x, x + TILE[1])


@triton.jit
def tile_tokens(y, x, height, width, TILE: tl.constexpr):
    """Tokens of the tile that begins at (y, x), and which of them exist."""
    index = tl.arange(0, TILE[0] * TILE[1])
    y += index // TILE[1]
    x += index % TILE[1]
    return y * width + x, (y < height) & (x < width)


@triton.jit
def around(y, x, step, height, width, K: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of a step through the rectangle around a tile, and which of them exist."""
    across: tl.constexpr = TILE[1] + K - 1
    index = step * BLOCK + tl.arange(0, BLOCK)
    down = index // across
    y += down - K // 2
    x += index % across - K // 2
    exists = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (down < TILE[0] + K - 1)
    return y * width + x, exists


@triton.jit
def places(step, K: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Where tokens `around` a tile lie in the windows of its own, which are rows here.

    The place is the difference of two vectors, of the others and of the tile's own, that are
    returned with whether the window holds the token.
    """
    across: tl.constexpr = TILE[1] + K - 1
    own = tl.arange(0, TILE[0] * TILE[1])[:, None]
    other = (step * BLOCK + tl.arange(0, BLOCK))[None, :]
    down = other // across - own // TILE[1]
    right = other % across - own % TILE[1]
    inside = (down >= 0) & (down < K) & (right >= 0) & (right < K)
    return own // TILE[1] * K + own % TILE[1], other // across * K + other % across, inside


@triton.jit
def window_bias(
    bias, head, step, scale, K: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    MIRRORED: tl.constexpr,
):  # fmt: skip
    """What a product of a tile and a step around it begins with. MIRRORED: the tile is of keys."""
    own, other, inside = places(step, K, TILE, BLOCK)
    if bias is None:
        return tl.where(inside, 0.0, float("-inf"))
    else:
        place = other - own
        if MIRRORED:
            place = K * K - 1 - place
        entries = tl.load(bias + head * (K * K) + place, mask=inside, other=float("-inf"))
        return entries.to(tl.float32) * (1.0 / scale)


@triton.jit
def pooled_bias_rows(
    pooled_bias, head, tokens, token, start, padded,
    BLOCK: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """What products of tokens and a block of pooled keys begin with; -inf beyond the last key.

    Tokens beyond the last have the entries of that.
    """
    token = tl.minimum(token, tokens - 1)
    if LARGE:
        token = token.to(tl.int64)
    # Rows are padded to a multiple of 16, so that several entries are loaded at once.
    row = tl.multiple_of(token * padded, 16)
    base = tl.multiple_of((head * tokens).to(tl.int64) * padded, 16)
    source = pooled_bias + base + (row[:, None] + (start + tl.arange(0, BLOCK))[None, :])
    return tl.load(source).to(tl.float32)


@triton.jit
def at_places(window_weights, strides, first, head, token, with_token, other, LARGE: tl.constexpr):
    """Pointers to numbers of tokens at places `with_token + other` of their windows.

    `token` and `with_token` are columns and `other` a row, or the other way round. Strides are
    those of tokens, heads and places.
    """
    if LARGE:
        token = token.to(tl.int64)
        with_token = with_token.to(tl.int64)
        other = other.to(tl.int64)
    base = first * strides[0] + head.to(tl.int64) * strides[1]
    return (
        window_weights
        + base
        + ((token * strides[0] + with_token * strides[2]) + other * strides[2])
    )


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query, key, value, pooled_key, pooled_value,  # views
    bias, pooled_bias,  # contiguous, the second padded; each may be None, and so
    window_weights, weights_token, weights_head, weights_place,  # may these, with their strides
    output, logsumexp,  # results: a view, and a contiguous tensor
    height, width, heads,
    pooled, padded,  # pooled keys, without and with padding
    shares, walk,  # of the map's tiles; tiles of a share
    scale,  # positive
    GROUP: tl.constexpr,  # query heads per key head
    K: tl.constexpr,  # side of the window
    TILE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE: tl.constexpr,  # one block holds all pooled keys
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = TILE[0] * TILE[1]
    STEPS: tl.constexpr = ((TILE[0] + K - 1) * (TILE[1] + K - 1) + BLOCK_W - 1) // BLOCK_W
    batch, head, share = share_of_program(shares, heads)
    first = batch.to(tl.int64) * (height * width)
    pooled_first = batch.to(tl.int64) * pooled
    # What all tiles need stays in registers and in shared memory, if it fits.
    near_bias = window_bias(bias, head, 0, scale, K, TILE, BLOCK_W, False)
    first_far = tl.arange(0, BLOCK_N)
    held_k, held_v = load_pair(
        pooled_key, pooled_value, pooled_first, head // GROUP, first_far, first_far < pooled,
        D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
    )  # fmt: skip
    y, x = tile_origin(share * walk, height, TILE)
    for _ in range(walk):
        token, exists = tile_tokens(y, x, height, width, TILE)
        q = load_vectors(query, first, head, token, exists, D, BLOCK_D, LARGE, ALIGN)
        maximum = tl.full([BLOCK], -1e30, tl.float32)  # finite: no inf - inf
        total = tl.zeros([BLOCK], tl.float32)
        accumulator = tl.zeros([BLOCK, BLOCK_VALUE_D], tl.float32)
        further = tl.zeros([BLOCK, BLOCK_VALUE_D], tl.float32)
        for step in tl.range(0, STEPS):
            if STEPS > 1:
                near_bias = window_bias(bias, head, step, scale, K, TILE, BLOCK_W, False)
            near, seen = around(y, x, step, height, width, K, TILE, BLOCK_W)
            near_k, near_v = load_pair(
                key, value, first, head // GROUP, near, seen,
                D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
            )  # fmt: skip
            if window_weights is not None:  # first, as they need most registers
                own, other, inside = places(step, K, TILE, BLOCK_W)
                # Those of the last in place of tokens that do not exist.
                extra = at_places(
                    window_weights, (weights_token, weights_head, weights_place), first, head,
                    tl.minimum(token, height * width - 1)[:, None], -own, other, LARGE,
                )  # fmt: skip
                extra = tl.load(extra, mask=inside, other=0.0)
                further = dot(extra, near_v, further, PRECISION, UPCAST)
            near_scores = dot(q, tl.trans(near_k), near_bias, PRECISION, UPCAST)
            near_scores = tl.where(seen[None, :], near_scores, float("-inf"))
            maximum, total, accumulator = softmax_step(
                near_scores, near_v, maximum, total, accumulator, scale * LOG2E, PRECISION, UPCAST
            )
        for start in range(0, BLOCK_N if ONE else pooled, BLOCK_N):
            far = start + tl.arange(0, BLOCK_N)
            if ONE:
                far_k = held_k
                far_v = held_v
            else:
                far_k, far_v = load_pair(
                    pooled_key, pooled_value, pooled_first, head // GROUP, far, far < pooled,
                    D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
                )  # fmt: skip
            if pooled_bias is None:
                far_scores = dot(q, tl.trans(far_k), None, PRECISION, UPCAST)
                far_scores = tl.where((far < pooled)[None, :], far_scores, float("-inf"))
            else:
                far_bias = pooled_bias_rows(
                    pooled_bias, head, height * width, token, start, padded, BLOCK_N, LARGE
                )
                far_scores = dot(q, tl.trans(far_k), far_bias, PRECISION, UPCAST)
            maximum, total, accumulator = softmax_step(
                far_scores, far_v, maximum, total, accumulator, scale * LOG2E, PRECISION, UPCAST
            )
        store_vectors(
            output, first, head, token, exists, accumulator * (1.0 / total)[:, None] + further,
            VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        store_numbers(logsumexp, first, heads, head, token, exists, maximum + tl.log2(total), LARGE)
        y, x = next_tile(y, x, height, TILE)
