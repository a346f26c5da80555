"""Local attention, forward: one program computes one tile of queries of one head.

The program walks over the tiles of keys that cover the union of its queries' windows, with an
online softmax in base 2 (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., 2205.14135). How
many tiles that takes depends on the border and on the residue class, so it is counted at run time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.common import (
    LOG2E,
    class_lengths,
    dot,
    exists,
    expand,
    load_tokens,
    positions,
    softmax_step,
    split,
    store_rows,
    store_tokens,
)
from vitarium.ops.kernels.patterns import (
    clip,
    key_range,
    mask_scores,
    relative_bias,
    seen,
    tile_span,
    within,
)

UNALIGNED = ["lengths", "dilation", "rules", "layout", "tiles", "heads"]


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def forward_kernel(
    query, key, value, bias,  # bias None: there is none
    output, logsumexp,  # results
    query_strides, key_strides, value_strides,  # (batch, z, y, x, head, channel)
    bias_strides,  # (head, z, y, x)
    output_strides, logsumexp_strides,
    lengths, dilation,  # of the map, per axis
    rules,  # the pattern, per axis
    layout,  # of query tiles, per axis
    tiles,  # query tiles per axis in the largest residue class
    heads, scale,  # scale is positive
    GROUP: tl.constexpr,  # query heads per key head
    ALIKE: tl.constexpr,  # all queries of a tile see the same keys
    QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    BLOCK_N: tl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    z, y, x, rest = split(tl.program_id(0), tiles)
    tile = (z, y, x)
    z, y, x, rest = split(rest, dilation)
    residue = (z, y, x)
    n = class_lengths(lengths, residue, dilation)
    origin, q_first, q_stop = tile_span(tile, n, layout, QUERY_TILE)
    if exists(q_first, q_stop):
        head = rest % heads
        batch = rest // heads
        q_at = positions(origin, tl.arange(0, BLOCK_M), QUERY_TILE)
        q_exists = within(q_at, q_first, q_stop)
        q_at = clip(q_at, q_first, q_stop)
        start, stop = seen(q_at, q_first, n, rules, 1, ALIKE)
        q_column = expand(q_at, 1)
        q = load_tokens(
            query, query_strides, batch, head, q_at, q_exists, residue, dilation,
            D, BLOCK_D, LARGE,
        )  # fmt: skip
        # With a bias the scores are scaled before it is added; without one the scaling waits for
        # the exponential, where it is one fused multiply-add per score.
        before = scale * LOG2E
        after = before
        if bias is not None:
            bias += head * bias_strides[0]
            after = 1.0
        maximum = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: no inf - inf in an empty tile
        total = tl.zeros([BLOCK_M], tl.float32)
        accumulator = tl.zeros([BLOCK_M, BLOCK_VALUE_D], tl.float32)
        first, k_stop, counts = key_range(q_first, q_stop, n, rules, KEY_TILE)
        for step in range(counts[0] * counts[1] * counts[2]):
            z, y, x, _ = split(step, counts)
            k_origin = (
                first[0] + z * KEY_TILE[0],
                first[1] + y * KEY_TILE[1],
                first[2] + x * KEY_TILE[2],
            )
            k_at = positions(k_origin, tl.arange(0, BLOCK_N), KEY_TILE)
            k_exists = exists(k_at, k_stop)
            k_row = expand(k_at, 0)
            k = load_tokens(
                key, key_strides, batch, head // GROUP, k_at, k_exists, residue, dilation,
                D, BLOCK_D, LARGE,
            )  # fmt: skip
            v = load_tokens(
                value, value_strides, batch, head // GROUP, k_at, k_exists, residue, dilation,
                VALUE_D, BLOCK_VALUE_D, LARGE,
            )  # fmt: skip
            scores = dot(q, tl.trans(k), None, PRECISION, UPCAST)
            if bias is not None:
                entries = relative_bias(bias, bias_strides, q_column, k_row, start, stop, rules)
                scores = scores * before + entries * LOG2E
            else:
                scores = mask_scores(scores, k_row, start, stop, ALIKE)
            maximum, total, accumulator = softmax_step(
                scores, v, maximum, total, accumulator, after, PRECISION, UPCAST
            )
        store_tokens(
            output, output_strides, batch, head, q_at, q_exists, residue, dilation,
            accumulator / total[:, None], VALUE_D, BLOCK_VALUE_D, LARGE,
        )  # fmt: skip
        store_rows(
            logsumexp, logsumexp_strides, batch, head, q_at, q_exists, residue, dilation,
            maximum + tl.log2(total), LARGE,
        )  # fmt: skip
