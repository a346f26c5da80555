"""Bi-level routing attention, forward: one program computes a tile of one region's queries.

All queries of a region attend to the same keys: those of the regions in its row of the routing
table, which the program walks over. A tile of keys lies within one region, so that one entry of
the table places the whole tile; where regions are smaller than a tile, it takes several of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.common import LOG2E, dot, softmax_step
from vitarium.ops.kernels.rows import load_pair, load_vectors, store_numbers, store_vectors

# What varies with the map: values for which nothing is compiled anew.
SIZES = ["height", "width", "key_height", "key_width", "topk", "heads", "tiles"]


@triton.jit
def locate(program, tiles, regions, heads):
    """Tile, region, head and image of a program; regions of one head follow each other."""
    tile = program % tiles
    program = program // tiles
    region = program % regions
    program = program // regions
    return tile, region, program % heads, program // heads


@triton.jit
def walk(step, count, height, width, TILE: tl.constexpr, SLOTS: tl.constexpr, WHOLE: tl.constexpr):
    """A step of the walk over `count` listed regions of height x width tokens.

    Returns places in the list, tiles of these regions, and tokens of the tiles. A step takes SLOTS
    regions, all of them if WHOLE, or else, SLOTS being 1, one tile of one region.
    """
    index = tl.arange(0, SLOTS * TILE[0] * TILE[1])
    if SLOTS > 1:
        size: tl.constexpr = TILE[0] * TILE[1]
        return step * SLOTS + index // size, 0, index % size
    elif WHOLE:
        return step, 0, index
    else:
        tiles = tl.cdiv(height, TILE[0]) * tl.cdiv(width, TILE[1])
        return step // tiles, step % tiles, index


@triton.jit
def steps_of(count, height, width, TILE: tl.constexpr, SLOTS: tl.constexpr, WHOLE: tl.constexpr):
    """Number of steps of `walk`."""
    if WHOLE:
        return tl.cdiv(count, SLOTS)
    else:
        return count * tl.cdiv(height, TILE[0]) * tl.cdiv(width, TILE[1])


@triton.jit
def tokens_of(region, tile, index, height, width, GRID: tl.constexpr, TILE: tl.constexpr):
    """Numbers on the map of tokens of a region's tile, and which of them exist."""
    across = tl.cdiv(width, TILE[1])
    y = tile // across * TILE[0] + index // TILE[1]
    x = tile % across * TILE[1] + index % TILE[1]
    origin = (region // GRID[1] * height * GRID[1] + region % GRID[1]) * width
    return origin + (y * (width * GRID[1]) + x), (y < height) & (x < width)


@triton.jit
def keys_of_step(
    routing, row, step, topk, height, width, GRID: tl.constexpr, TILE: tl.constexpr,
    SLOTS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Tokens of the regions in a row of the table, which exist, their entries and their slots.

    An entry out of range counts as the nearest region, so that nothing outside of the map is read.
    """
    slot, tile, index = walk(step, topk, height, width, TILE, SLOTS, WHOLE)
    entry = row.to(tl.int64) * topk + tl.minimum(slot, topk - 1)
    region = tl.load(routing + entry)
    region = tl.minimum(tl.maximum(region, 0), GRID[0] * GRID[1] - 1).to(tl.int32)
    token, present = tokens_of(region, tile, index, height, width, GRID, TILE)
    if SLOTS > 1:
        present = present & (slot < topk)
    return token, present, entry, slot


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query, key, value,  # views
    routing, weights,  # (B * regions, topk), contiguous; weights None: there are none
    output, logsumexp,  # results: a view, and a contiguous tensor
    height, width, key_height, key_width,  # of a region of queries and of keys, in tokens
    topk, heads,
    tiles,  # of a region's queries
    scale,  # positive
    GRID: tl.constexpr,  # regions (down, across)
    GROUP: tl.constexpr,  # query heads per key head
    TILE: tl.constexpr, FULL: tl.constexpr,  # of queries; FULL: all tokens of all tiles exist
    KEY_TILE: tl.constexpr, KEY_FULL: tl.constexpr, SLOTS: tl.constexpr, WHOLE: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = TILE[0] * TILE[1]
    REGIONS: tl.constexpr = GRID[0] * GRID[1]
    tile, region, head, batch = locate(tl.program_id(0), tiles, REGIONS, heads)
    token, exists = tokens_of(region, tile, tl.arange(0, BLOCK), height, width, GRID, TILE)
    if FULL:
        exists = None
    first = batch.to(tl.int64) * (height * width * REGIONS)
    key_first = batch.to(tl.int64) * (key_height * key_width * REGIONS)
    q = load_vectors(query, first, head, token, exists, D, BLOCK_D, LARGE, ALIGN)
    maximum = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    accumulator = tl.zeros([BLOCK, BLOCK_VALUE_D], tl.float32)
    row = batch * REGIONS + region
    for step in range(steps_of(topk, key_height, key_width, KEY_TILE, SLOTS, WHOLE)):
        k_token, k_exists, entry, _ = keys_of_step(
            routing, row, step, topk, key_height, key_width, GRID, KEY_TILE, SLOTS, WHOLE
        )
        if KEY_FULL:
            k_exists = None
        k, v = load_pair(
            key, value, key_first, head // GROUP, k_token, k_exists,
            D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        scores = dot(q, tl.trans(k), None, PRECISION, UPCAST)
        if weights is not None:
            soft = tl.load(weights + entry).to(tl.float32)
            if SLOTS == 1:
                scores *= soft
                v = (v.to(tl.float32) * soft).to(v.dtype)
            else:
                scores *= soft[None, :]
                v = (v.to(tl.float32) * soft[:, None]).to(v.dtype)
        if not KEY_FULL:
            scores = tl.where(k_exists[None, :], scores, float("-inf"))
        maximum, total, accumulator = softmax_step(
            scores, v, maximum, total, accumulator, scale * LOG2E, PRECISION, UPCAST
        )
    store_vectors(
        output, first, head, token, exists, accumulator * (1.0 / total)[:, None],
        VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN,
    )  # fmt: skip
    store_numbers(logsumexp, first, heads, head, token, exists, maximum + tl.log2(total), LARGE)
