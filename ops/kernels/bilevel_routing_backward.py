"""Bi-level routing attention, backward: two kernels, none with atomics, so runs are bit-equal.

- `query_kernel`: one program per tile of a region's queries, the forward's walk over keys. It also
  sums the gradients of the soft weights of its row of the table, over its tile and its head; adding
  those of other tiles and heads, in a fixed order, is left to the launcher.
- `key_value_kernel`: one program per tile of a region's keys. Who attends to the region is read off
  the inverted table: the entries that name it, in order, which a sort has brought together. It
  walks over the regions of these entries, and the query heads that share the key head.

Weights are recomputed from the log-sum-exp of the forward (Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.bilevel_routing_forward import (
    SIZES,
    keys_of_step,
    locate,
    steps_of,
    tokens_of,
    walk,
)
from vitarium.ops.kernels.common import LOG2E, dot
from vitarium.ops.kernels.rows import (
    load_numbers,
    load_pair,
    load_queries,
    load_vectors,
    store_numbers,
    store_vectors,
)


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    query, key, value, routing, weights, output, logsumexp, grad_output,
    grad_query, delta,  # results; delta is the sum of grad_output * output over channels
    weight_sums,  # result: (programs, TOPK), contiguous; None: not wanted
    height, width, key_height, key_width, topk, heads, tiles, scale,  # as those of forward_kernel
    GRID: tl.constexpr, GROUP: tl.constexpr,
    TOPK: tl.constexpr,  # a power of two, at least topk
    TILE: tl.constexpr, FULL: tl.constexpr,
    KEY_TILE: tl.constexpr, KEY_FULL: tl.constexpr, SLOTS: tl.constexpr, WHOLE: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = TILE[0] * TILE[1]
    REGIONS: tl.constexpr = GRID[0] * GRID[1]
    tile, region, head, batch = locate(tl.program_id(0), tiles, REGIONS, heads)
    index = tl.arange(0, BLOCK)
    token, exists = tokens_of(region, tile, index, height, width, GRID, TILE)
    if FULL:
        exists = None
    first = batch.to(tl.int64) * (height * width * REGIONS)
    key_first = batch.to(tl.int64) * (key_height * key_width * REGIONS)
    o = load_vectors(output, first, head, token, exists, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN)
    grad = load_vectors(
        grad_output, first, head, token, exists, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN
    )
    row_delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1)
    store_numbers(delta, first, heads, head, token, exists, row_delta, LARGE)
    q = load_vectors(query, first, head, token, exists, D, BLOCK_D, LARGE, ALIGN)
    row_logsumexp = load_numbers(logsumexp, first, heads, head, token, exists, float("inf"), LARGE)
    accumulator = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    sums = tl.zeros([TOPK], tl.float32)
    row = batch * REGIONS + region
    for step in range(steps_of(topk, key_height, key_width, KEY_TILE, SLOTS, WHOLE)):
        k_token, k_exists, entry, slot = keys_of_step(
            routing, row, step, topk, key_height, key_width, GRID, KEY_TILE, SLOTS, WHOLE
        )
        if KEY_FULL:
            k_exists = None
        k, v = load_pair(
            key, value, key_first, head // GROUP, k_token, k_exists,
            D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        products = dot(q, tl.trans(k), None, PRECISION, UPCAST)
        grad_weights = dot(grad, tl.trans(v), None, PRECISION, UPCAST)
        scores = products
        grad_attention = grad_weights
        if weights is not None:
            soft = tl.load(weights + entry).to(tl.float32)
            if SLOTS > 1:
                soft = soft[None, :]
            scores *= soft
            grad_attention *= soft
        attention = tl.exp2(scores * (scale * LOG2E) - row_logsumexp[:, None])
        if not KEY_FULL:
            attention = tl.where(k_exists[None, :], attention, 0.0)
        grad_scores = attention * (grad_attention - row_delta[:, None])
        if weight_sums is not None:  # absent keys and values are 0: these need no mask
            of_key = tl.sum(grad_scores * (products * scale) + attention * grad_weights, 0)
            if SLOTS == 1:
                sums += tl.where(tl.arange(0, TOPK) == slot, tl.sum(of_key, 0), 0.0)
            else:
                chosen = tl.arange(0, TOPK)[:, None] == slot[None, :]
                sums += tl.sum(tl.where(chosen, of_key[None, :], 0.0), 1)
        if weights is not None:
            grad_scores *= soft
        accumulator = dot(grad_scores.to(k.dtype), k, accumulator, PRECISION, UPCAST)
    store_vectors(
        grad_query, first, head, token, exists, accumulator * scale,
        D, BLOCK_D, LARGE, ALIGN,
    )  # fmt: skip
    if weight_sums is not None:
        weight_sums += tl.program_id(0).to(tl.int64) * TOPK
        tl.store(weight_sums + tl.arange(0, TOPK), sums)


@triton.jit(do_not_specialize=SIZES)
def key_value_kernel(
    query, key, value, weights, logsumexp, delta, grad_output,
    entries,  # (B, regions * topk): entries of an image's table, sorted by the region they name
    starts,  # (B, regions + 1): where those that name a region begin
    grad_key, grad_value,  # results
    height, width, key_height, key_width, topk,
    heads, tiles,  # of keys
    scale,
    GRID: tl.constexpr, GROUP: tl.constexpr,
    KEY_TILE: tl.constexpr, KEY_FULL: tl.constexpr,
    TILE: tl.constexpr, FULL: tl.constexpr, SLOTS: tl.constexpr, WHOLE: tl.constexpr,  # of queries
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = KEY_TILE[0] * KEY_TILE[1]
    REGIONS: tl.constexpr = GRID[0] * GRID[1]
    k_tile, region, key_head, batch = locate(tl.program_id(0), tiles, REGIONS, heads)
    k_index = tl.arange(0, BLOCK)
    k_token, k_exists = tokens_of(region, k_tile, k_index, key_height, key_width, GRID, KEY_TILE)
    if KEY_FULL:
        k_exists = None
    first = batch.to(tl.int64) * (height * width * REGIONS)
    key_first = batch.to(tl.int64) * (key_height * key_width * REGIONS)
    k, v = load_pair(
        key, value, key_first, key_head, k_token, k_exists,
        D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
    )  # fmt: skip
    k_accumulator = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    v_accumulator = tl.zeros([BLOCK, BLOCK_VALUE_D], tl.float32)
    starts += batch.to(tl.int64) * (REGIONS + 1) + region
    begin = tl.load(starts)
    count = tl.load(starts + 1) - begin
    table = batch.to(tl.int64) * REGIONS * topk
    steps = steps_of(count, height, width, TILE, SLOTS, WHOLE)
    for step in range(GROUP * steps):
        if GROUP == 1:
            head = key_head
            at = step
        else:
            head = key_head * GROUP + step // steps
            at = step % steps
        slot, tile, index = walk(at, count, height, width, TILE, SLOTS, WHOLE)
        entry = tl.load(entries + table + begin + tl.minimum(slot, count - 1))
        token, exists = tokens_of(entry // topk, tile, index, height, width, GRID, TILE)
        if SLOTS > 1:
            exists = exists & (slot < count)
        if FULL:
            exists = None
        q, grad, row_logsumexp, row_delta = load_queries(
            query, grad_output, logsumexp, delta, first, heads * GROUP, head, token, exists,
            D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        # Transposed, keys are rows, so that the last two products take the weights as they are.
        scores = dot(k, tl.trans(q), None, PRECISION, UPCAST)
        grad_attention = dot(v, tl.trans(grad), None, PRECISION, UPCAST)
        if weights is not None:
            soft = tl.load(weights + table + entry).to(tl.float32)
            if SLOTS > 1:
                soft = soft[None, :]
            scores *= soft
            grad_attention *= soft
        attention = tl.exp2(scores * (scale * LOG2E) - row_logsumexp[None, :])
        grad_scores = attention * (grad_attention - row_delta[None, :])
        if weights is not None:
            attention *= soft
            grad_scores *= soft
        v_accumulator = dot(attention.to(grad.dtype), grad, v_accumulator, PRECISION, UPCAST)
        k_accumulator = dot(grad_scores.to(q.dtype), q, k_accumulator, PRECISION, UPCAST)
    store_vectors(
        grad_key, key_first, key_head, k_token, k_exists, k_accumulator * scale,
        D, BLOCK_D, LARGE, ALIGN,
    )  # fmt: skip
    store_vectors(
        grad_value, key_first, key_head, k_token, k_exists,
        v_accumulator, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN,
    )  # fmt: skip
