"""Bi-level routing attention, backward: two kernels, none with atomics, so runs are bit-equal.

- `query_kernel`: one program per tile of a region's queries, the forward's walk over keys. It also
  sums the gradients of the soft weights of its row of the table, over its tile and its head; adding
  those of other tiles and heads, in a fixed order, is left to the launcher.
- `key_value_kernel`: one program per tile of a region's keys. Who attends to the region is read off
  the inverted table: the entries that name it, in order, which a sort has brought together. Their
  queries are walked over as one list, and the query heads that share the key head with them.

Weights are recomputed from the log-sum-exp of the forward (Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.bilevel_routing_forward import (
    UNALIGNED,
    listed_keys,
    load_weights,
    locate,
    region_tokens,
)
from vitarium.ops.kernels.common import (
    LOG2E,
    dot,
    load_rows,
    load_tokens,
    store_rows,
    store_tokens,
)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def query_kernel(
    query, key, value, routing, weights, output, logsumexp, grad_output,
    grad_query, delta,  # results; delta is the sum of grad_output * output over channels
    weight_sums,  # result: (programs, TOPK), contiguous; None: not wanted
    query_strides, key_strides, value_strides, output_strides, logsumexp_strides,
    grad_output_strides, grad_query_strides,
    lengths, key_lengths, region_grid, topk, heads, tiles, scale,  # as those of forward_kernel
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TOPK: tl.constexpr,  # a power of two, at least topk
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    regions = region_grid[0] * region_grid[1]
    tile, region, head, batch = locate(tl.program_id(0), tiles, regions, heads)
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_exists = token < lengths[0] * lengths[1]
    q_at = region_tokens(region, token, region_grid, lengths)
    o = load_tokens(
        output, output_strides, batch, head, q_at, q_exists, (0, 0, 0), (1, 1, 1),
        VALUE_D, BLOCK_VALUE_D, LARGE,
    )  # fmt: skip
    grad = load_tokens(
        grad_output, grad_output_strides, batch, head, q_at, q_exists, (0, 0, 0), (1, 1, 1),
        VALUE_D, BLOCK_VALUE_D, LARGE,
    )  # fmt: skip
    row_delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1)
    store_rows(
        delta, logsumexp_strides, batch, head, q_at, q_exists, (0, 0, 0), (1, 1, 1),
        row_delta, LARGE,
    )  # fmt: skip
    q = load_tokens(
        query, query_strides, batch, head, q_at, q_exists, (0, 0, 0), (1, 1, 1),
        D, BLOCK_D, LARGE,
    )  # fmt: skip
    row_logsumexp = load_rows(
        logsumexp, logsumexp_strides, batch, head, q_at, q_exists, (0, 0, 0), (1, 1, 1),
        float("inf"), LARGE,
    )  # fmt: skip
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums = tl.zeros([TOPK], tl.float32)
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
        products = dot(q, tl.trans(k), None, PRECISION, UPCAST) * scale
        grad_weights = dot(grad, tl.trans(v), None, PRECISION, UPCAST)
        scores = products
        grad_attention = grad_weights
        if weights is not None:
            soft = load_weights(weights, entry, k_exists)[None, :]
            scores *= soft
            grad_attention *= soft
        attention = tl.exp2(scores * LOG2E - row_logsumexp[:, None])
        attention = tl.where(k_exists[None, :], attention, 0.0)
        grad_scores = attention * (grad_attention - row_delta[:, None])
        if weight_sums is not None:
            of_key = tl.sum(grad_scores * products + attention * grad_weights, 0)
            of_key = tl.where(k_exists, of_key, 0.0)
            slot = index // (key_lengths[0] * key_lengths[1])
            chosen = tl.arange(0, TOPK)[:, None] == slot[None, :]
            sums += tl.sum(tl.where(chosen, of_key[None, :], 0.0), 1)
        if weights is not None:
            grad_scores *= soft
        accumulator = dot(grad_scores.to(k.dtype), k, accumulator, PRECISION, UPCAST)
    store_tokens(
        grad_query, grad_query_strides, batch, head, q_at, q_exists, (0, 0, 0), (1, 1, 1),
        accumulator * scale, D, BLOCK_D, LARGE,
    )  # fmt: skip
    if weight_sums is not None:
        weight_sums += tl.program_id(0).to(tl.int64) * TOPK
        tl.store(weight_sums + tl.arange(0, TOPK), sums)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def key_value_kernel(
    query, key, value, weights, logsumexp, delta, grad_output,
    entries,  # (B, regions * topk): entries of an image's table, sorted by the region they name
    starts,  # (B, regions + 1): where those that name a region begin
    grad_key, grad_value,  # results
    query_strides, key_strides, value_strides, logsumexp_strides,
    grad_output_strides, grad_key_strides, grad_value_strides,
    lengths, key_lengths, region_grid, topk,
    heads, tiles,  # of keys
    scale,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    regions = region_grid[0] * region_grid[1]
    tile, region, key_head, batch = locate(tl.program_id(0), tiles, regions, heads)
    token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k_exists = token < key_lengths[0] * key_lengths[1]
    k_at = region_tokens(region, token, region_grid, key_lengths)
    k = load_tokens(
        key, key_strides, batch, key_head, k_at, k_exists, (0, 0, 0), (1, 1, 1),
        D, BLOCK_D, LARGE,
    )  # fmt: skip
    v = load_tokens(
        value, value_strides, batch, key_head, k_at, k_exists, (0, 0, 0), (1, 1, 1),
        VALUE_D, BLOCK_VALUE_D, LARGE,
    )  # fmt: skip
    k_accumulator = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_accumulator = tl.zeros([BLOCK_N, BLOCK_VALUE_D], tl.float32)
    starts += batch.to(tl.int64) * (regions + 1) + region
    begin = tl.load(starts)
    tokens = lengths[0] * lengths[1]
    queries = (tl.load(starts + 1) - begin) * tokens
    table = batch.to(tl.int64) * regions * topk
    steps = tl.cdiv(queries, BLOCK_M)
    for step in range(GROUP * steps):
        head = key_head * GROUP + step // steps
        index = step % steps * BLOCK_M + tl.arange(0, BLOCK_M)
        q_exists = index < queries
        entry = tl.load(entries + table + begin + index // tokens, mask=q_exists, other=0)
        q_at = region_tokens(entry // topk, index % tokens, region_grid, lengths)
        q = load_tokens(
            query, query_strides, batch, head, q_at, q_exists, (0, 0, 0), (1, 1, 1),
            D, BLOCK_D, LARGE,
        )  # fmt: skip
        grad = load_tokens(
            grad_output, grad_output_strides, batch, head, q_at, q_exists, (0, 0, 0), (1, 1, 1),
            VALUE_D, BLOCK_VALUE_D, LARGE,
        )  # fmt: skip
        row_logsumexp = load_rows(
            logsumexp, logsumexp_strides, batch, head, q_at, q_exists, (0, 0, 0), (1, 1, 1),
            float("inf"), LARGE,
        )  # fmt: skip
        row_delta = load_rows(
            delta, logsumexp_strides, batch, head, q_at, q_exists, (0, 0, 0), (1, 1, 1),
            0.0, LARGE,
        )  # fmt: skip
        # Transposed, keys are rows, so that the last two products take the weights as they are.
        scores = dot(k, tl.trans(q), None, PRECISION, UPCAST) * (scale * LOG2E)
        grad_attention = dot(v, tl.trans(grad), None, PRECISION, UPCAST)
        if weights is not None:
            soft = load_weights(weights, table + entry, q_exists)[None, :]
            scores *= soft
            grad_attention *= soft
        attention = tl.exp2(scores - row_logsumexp[None, :])
        grad_scores = attention * (grad_attention - row_delta[None, :])
        if weights is not None:
            attention *= soft
            grad_scores *= soft
        v_accumulator = dot(attention.to(grad.dtype), grad, v_accumulator, PRECISION, UPCAST)
        k_accumulator = dot(grad_scores.to(q.dtype), q, k_accumulator, PRECISION, UPCAST)
    store_tokens(
        grad_key, grad_key_strides, batch, key_head, k_at, k_exists, (0, 0, 0), (1, 1, 1),
        k_accumulator * scale, D, BLOCK_D, LARGE,
    )  # fmt: skip
    store_tokens(
        grad_value, grad_value_strides, batch, key_head, k_at, k_exists, (0, 0, 0), (1, 1, 1),
        v_accumulator, VALUE_D, BLOCK_VALUE_D, LARGE,
    )  # fmt: skip
