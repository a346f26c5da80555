"""Bi-level routing attention, forward: one program computes a tile of one region's queries.

All queries of a region attend to the same keys: those of the regions in its row of the routing
table. They are walked over as one list of topk x (tokens of a region) keys, whose addresses are
computed through the table, so that a tile of keys is full however small the regions are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.common import (
    LOG2E,
    dot,
    load_tokens,
    softmax_step,
    store_rows,
    store_tokens,
)

UNALIGNED = ["lengths", "key_lengths", "region_grid", "topk", "heads", "tiles"]


@triton.jit
def region_tokens(region, token, region_grid, lengths):
    """Position (z, y, x) of tokens, counted within regions of `lengths` tokens, on the map."""
    y = region // region_grid[1] * lengths[0] + token // lengths[1]
    x = region % region_grid[1] * lengths[1] + token % lengths[1]
    return y * 0, y, x


@triton.jit
def locate(program, tiles, regions, heads):
    """Tile, region, head and image of a program; regions of one head follow each other."""
    tile = program % tiles
    program = program // tiles
    region = program % regions
    program = program // regions
    return tile, region, program % heads, program // heads


@triton.jit
def listed_keys(routing, row, index, topk, region_grid, lengths):
    """Keys number `index` of the list that a row of the table stands for.

    Returns their position, whether they are in the list, and their entry in the table. An entry
    out of range counts as the nearest region, so that nothing outside of the map is read.
    """
    tokens = lengths[0] * lengths[1]
    present = index < topk * tokens
    entry = row.to(tl.int64) * topk + tl.minimum(index // tokens, topk - 1)
    region = tl.load(routing + entry, mask=present, other=0)
    region = tl.minimum(tl.maximum(region, 0), region_grid[0] * region_grid[1] - 1).to(tl.int32)
    return region_tokens(region, index % tokens, region_grid, lengths), present, entry


@triton.jit
def load_weights(weights, entry, present):
    """Soft routing weights of entries, 0 where there is none."""
    return tl.load(weights + entry, mask=present, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def forward_kernel(
    query, key, value,
    routing, weights,  # (B * regions, topk), contiguous; weights None: there are none
    output, logsumexp,  # results
    query_strides, key_strides, value_strides,  # (batch, z, y, x, head, channel)
    output_strides, logsumexp_strides,
    lengths, key_lengths,  # of a region of queries and of keys, (y, x)
    region_grid, topk, heads,
    tiles,  # of a region's queries
    scale,  # positive
    GROUP: tl.constexpr,  # query heads per key head
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,  # tokens of a tile of queries, of keys
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    regions = region_grid[0] * region_grid[1]
    tile, region, head, batch = locate(tl.program_id(0), tiles, regions, heads)
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_exists = token < lengths[0] * lengths[1]
    q_at = region_tokens(region, token, region_grid, lengths)
    q = load_tokens(
        query, query_strides, batch, head, q_at, q_exists, (0, 0, 0), (1, 1, 1),
        D, BLOCK_D, LARGE,
    )  # fmt: skip
    maximum = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_VALUE_D], tl.float32)
    row = batch * regions + region
    for first in range(0, topk * key_lengths[0] * key_lengths[1], BLOCK_N):
        index = first + tl.arange(0, BLOCK_N)
        k_at, k_exists, entry = listed_keys(routing, row, index, topk, region_grid, key_lengths)
        k = load_tokens(
            key, key_strides, batch, head // GROUP, k_at, k_exists, (0, 0, 0), (1, 1, 1),
            D, BLOCK_D, LARGE,
        )  # fmt: skip
        v = load_tokens(
            value, value_strides, batch, head // GROUP, k_at, k_exists, (0, 0, 0), (1, 1, 1),
            VALUE_D, BLOCK_VALUE_D, LARGE,
        )  # fmt: skip
        scores = dot(q, tl.trans(k), None, PRECISION, UPCAST)
        if weights is not None:
            soft = load_weights(weights, entry, k_exists)
            scores *= soft[None, :]
            v = (v.to(tl.float32) * soft[:, None]).to(v.dtype)
        scores = tl.where(k_exists[None, :], scores, float("-inf"))
        maximum, total, accumulator = softmax_step(
            scores, v, maximum, total, accumulator, scale * LOG2E, PRECISION, UPCAST
        )
    store_tokens(
        output, output_strides, batch, head, q_at, q_exists, (0, 0, 0), (1, 1, 1),
        accumulator / total[:, None], VALUE_D, BLOCK_VALUE_D, LARGE,
    )  # fmt: skip
    store_rows(
        logsumexp, logsumexp_strides, batch, head, q_at, q_exists, (0, 0, 0), (1, 1, 1),
        maximum + tl.log2(total), LARGE,
    )  # fmt: skip
