"""Aggregated attention, backward: four kernels, none with atomics, so runs are bit-equal.

- `query_kernel`: one program per share of a map's tiles, the forward's walk. It also gives the
  gradient of the window weights.
- `key_value_kernel`: one program per share of a map's tiles of keys: the tokens that see a key
  lie around it as its own window does, mirrored. Of the gradient of the window's bias it gives the
  terms of every key.
- `pooled_kernel`: one program per block of pooled keys and part of the queries, which all see them.
- `pooled_bias_kernel`: one program per block of queries, of pooled keys and part of the images.

Weights are recomputed from the log-sum-exp of the forward (Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.aggregated_forward import (
    SIZES,
    around,
    at_places,
    next_tile,
    places,
    pooled_bias_rows,
    share_of_program,
    tile_origin,
    tile_tokens,
    window_bias,
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
    query, key, value, pooled_key, pooled_value, bias, pooled_bias, logsumexp, grad_output,
    grad_query, delta,  # results; delta sums softmax weights times their gradients
    grad_window_weights,  # result, contiguous; None if not wanted
    height, width, heads, pooled, padded, shares, walk, scale,  # as those of forward_kernel
    GROUP: tl.constexpr, K: tl.constexpr,
    TILE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, ONE: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    # With weights w and their gradients g, delta = sum w g, and the gradient of the query is
    # sum w (g - delta) k = sum w g k - delta sum w k: one walk gives all three sums. (That delta is
    # also the product of output and its gradient does not help: the output has the window weights
    # in it, and may be rounded.)
    BLOCK: tl.constexpr = TILE[0] * TILE[1]
    STEPS: tl.constexpr = ((TILE[0] + K - 1) * (TILE[1] + K - 1) + BLOCK_W - 1) // BLOCK_W
    batch, head, share = share_of_program(shares, heads)
    first = batch.to(tl.int64) * (height * width)
    pooled_first = batch.to(tl.int64) * pooled
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
        grad = load_vectors(
            grad_output, first, head, token, exists, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN
        )
        row_logsumexp = load_numbers(
            logsumexp, first, heads, head, token, exists, float("inf"), LARGE
        )
        row_delta = tl.zeros([BLOCK], tl.float32)
        accumulator = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        mean_key = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for step in tl.range(0, STEPS):
            if STEPS > 1:
                near_bias = window_bias(bias, head, step, scale, K, TILE, BLOCK_W, False)
            near, seen = around(y, x, step, height, width, K, TILE, BLOCK_W)
            near_k, near_v = load_pair(
                key, value, first, head // GROUP, near, seen,
                D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
            )  # fmt: skip
            scores = dot(q, tl.trans(near_k), near_bias, PRECISION, UPCAST)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            near_weights = tl.exp2(scores * (scale * LOG2E) - row_logsumexp[:, None])
            near_grad = dot(grad, tl.trans(near_v), None, PRECISION, UPCAST)
            if grad_window_weights is not None:
                own, other, inside = places(step, K, TILE, BLOCK_W)
                target = at_places(
                    grad_window_weights, (heads * (K * K), K * K, 1), first, head,
                    token[:, None], -own, other, LARGE,
                )  # fmt: skip
                near_terms = near_grad.to(grad_window_weights.dtype.element_ty)
                tl.store(target, near_terms, mask=inside & exists[:, None])
            near_grad *= near_weights
            row_delta += tl.sum(near_grad, 1)
            accumulator = dot(near_grad.to(q.dtype), near_k, accumulator, PRECISION, UPCAST)
            mean_key = dot(near_weights.to(q.dtype), near_k, mean_key, PRECISION, UPCAST)
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
            far_weights = tl.exp2(far_scores * (scale * LOG2E) - row_logsumexp[:, None])
            far_grad = far_weights * dot(grad, tl.trans(far_v), None, PRECISION, UPCAST)
            row_delta += tl.sum(far_grad, 1)
            accumulator = dot(far_grad.to(q.dtype), far_k, accumulator, PRECISION, UPCAST)
            mean_key = dot(far_weights.to(q.dtype), far_k, mean_key, PRECISION, UPCAST)
        store_numbers(delta, first, heads, head, token, exists, row_delta, LARGE)
        store_vectors(
            grad_query, first, head, token, exists,
            (accumulator - row_delta[:, None] * mean_key) * scale, D, BLOCK_D, LARGE, ALIGN,
        )  # fmt: skip
        y, x = next_tile(y, x, height, TILE)


@triton.jit
def store_by_place(
    sums, line, terms, step, K: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """Terms for keys of a tile and queries around them, by key and by place in the window."""
    own, other, inside = places(step, K, TILE, BLOCK)
    key = tl.arange(0, TILE[0] * TILE[1])[:, None]
    place = K * K - 1 - (other - own)
    tl.store(
        sums + line * (TILE[0] * TILE[1] * K * K) + (key * (K * K) + place), terms, mask=inside
    )


@triton.jit(do_not_specialize=SIZES)
def key_value_kernel(
    query, key, value, bias,
    window_weights, weights_token, weights_head, weights_place,
    logsumexp, delta, grad_output,
    grad_key, grad_value,  # results
    bias_sums,  # result: (programs, tiles, GROUP, tokens of a tile, K * K); None: not wanted
    height, width,
    heads, shares, walk,  # of keys; the rest as in forward_kernel
    scale,
    GROUP: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, BLOCK_W: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = TILE[0] * TILE[1]
    STEPS: tl.constexpr = ((TILE[0] + K - 1) * (TILE[1] + K - 1) + BLOCK_W - 1) // BLOCK_W
    batch, key_head, share = share_of_program(shares, heads)
    first = batch.to(tl.int64) * (height * width)
    line = tl.program_id(0).to(tl.int64)
    near_bias = window_bias(bias, key_head * GROUP, 0, scale, K, TILE, BLOCK_W, True)
    y, x = tile_origin(share * walk, height, TILE)
    for index in range(walk):
        token, exists = tile_tokens(y, x, height, width, TILE)
        k, v = load_pair(
            key, value, first, key_head, token, exists,
            D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        k_accumulator = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        v_accumulator = tl.zeros([BLOCK, BLOCK_VALUE_D], tl.float32)
        for turn in tl.range(0, GROUP * STEPS):
            head = key_head * GROUP + turn // STEPS
            step = turn % STEPS
            if GROUP * STEPS > 1:
                near_bias = window_bias(bias, head, step, scale, K, TILE, BLOCK_W, True)
            near, seen = around(y, x, step, height, width, K, TILE, BLOCK_W)
            q, grad, row_logsumexp, row_delta = load_queries(
                query, grad_output, logsumexp, delta, first, heads * GROUP, head, near, seen,
                D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
            )  # fmt: skip
            if window_weights is not None:
                own, other, inside = places(step, K, TILE, BLOCK_W)
                extra = at_places(
                    window_weights, (weights_token, weights_head, weights_place), first, head,
                    near[None, :], K * K - 1 - other, own, LARGE,
                )  # fmt: skip
                extra = tl.load(extra, mask=inside & seen[None, :], other=0.0)
                v_accumulator = dot(extra, grad, v_accumulator, PRECISION, UPCAST)
            scores = dot(k, tl.trans(q), near_bias, PRECISION, UPCAST)
            weights = tl.exp2(scores * (scale * LOG2E) - row_logsumexp[None, :])
            v_accumulator = dot(weights.to(grad.dtype), grad, v_accumulator, PRECISION, UPCAST)
            grad_weights = dot(v, tl.trans(grad), None, PRECISION, UPCAST)
            grad_scores = weights * (grad_weights - row_delta[None, :])
            k_accumulator = dot(grad_scores.to(q.dtype), q, k_accumulator, PRECISION, UPCAST)
            if bias_sums is not None:
                terms = tl.where(exists[:, None], grad_scores, 0.0)
                part = (line * walk + index) * GROUP + turn // STEPS
                store_by_place(bias_sums, part, terms, step, K, TILE, BLOCK_W)
        store_vectors(
            grad_key, first, key_head, token, exists, k_accumulator * scale,
            D, BLOCK_D, LARGE, ALIGN,
        )  # fmt: skip
        store_vectors(
            grad_value, first, key_head, token, exists, v_accumulator,
            VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        y, x = next_tile(y, x, height, TILE)


@triton.jit(do_not_specialize=SIZES)
def pooled_kernel(
    query, pooled_key, pooled_value, pooled_bias, logsumexp, delta, grad_output,
    grad_pooled_key, grad_pooled_value,  # results: views of (parts * B, M, heads, channels)
    height, width,
    heads,  # of keys
    pooled, padded, scale,
    images, parts,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    key_head = program % heads
    program = program // heads
    part = program % parts
    program = program // parts
    batch = program % images
    start = program // images * BLOCK_N
    far = start + tl.arange(0, BLOCK_N)
    k, v = load_pair(
        pooled_key, pooled_value, batch.to(tl.int64) * pooled, key_head, far, far < pooled,
        D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
    )  # fmt: skip
    k_accumulator = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_accumulator = tl.zeros([BLOCK_N, BLOCK_VALUE_D], tl.float32)
    tokens = height * width
    first = batch.to(tl.int64) * tokens
    blocks = tl.cdiv(tokens, BLOCK_M)
    share = tl.cdiv(GROUP * blocks, parts)
    for step in range(part * share, tl.minimum((part + 1) * share, GROUP * blocks)):
        head = key_head * GROUP + step // blocks
        token = step % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        q, grad, row_logsumexp, row_delta = load_queries(
            query, grad_output, logsumexp, delta, first, heads * GROUP, head, token, token < tokens,
            D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        # Transposed, keys are rows, so that both products below take the weights as they are.
        if pooled_bias is None:
            scores = dot(k, tl.trans(q), None, PRECISION, UPCAST)
        else:
            entries = pooled_bias_rows(
                pooled_bias, head, tokens, token, start, padded, BLOCK_N, LARGE
            )
            scores = dot(k, tl.trans(q), tl.trans(entries), PRECISION, UPCAST)
        weights = tl.exp2(scores * (scale * LOG2E) - row_logsumexp[None, :])
        v_accumulator = dot(weights.to(grad.dtype), grad, v_accumulator, PRECISION, UPCAST)
        grad_weights = dot(v, tl.trans(grad), None, PRECISION, UPCAST)
        grad_scores = weights * (grad_weights - row_delta[None, :])
        k_accumulator = dot(grad_scores.to(q.dtype), q, k_accumulator, PRECISION, UPCAST)
    target = (part * images + batch).to(tl.int64) * pooled
    store_vectors(
        grad_pooled_key, target, key_head, far, far < pooled, k_accumulator * scale,
        D, BLOCK_D, LARGE, ALIGN,
    )  # fmt: skip
    store_vectors(
        grad_pooled_value, target, key_head, far, far < pooled, v_accumulator,
        VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def pooled_bias_kernel(
    query, pooled_key, pooled_value, pooled_bias, logsumexp, delta, grad_output,
    sums,  # result: (parts, heads, N, M), contiguous
    height, width, heads, pooled, padded, scale,
    images, parts,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program % heads
    program = program // heads
    tokens = height * width
    blocks = tl.cdiv(tokens, BLOCK_M)
    token = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = token < tokens
    program = program // blocks
    part = program % parts
    start = program // parts * BLOCK_N
    far = start + tl.arange(0, BLOCK_N)
    entries = pooled_bias_rows(pooled_bias, head, tokens, token, start, padded, BLOCK_N, LARGE)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    share = tl.cdiv(images, parts)
    for step in range(tl.minimum(share, images - part * share)):
        batch = (part * share + step).to(tl.int64)
        q, grad, row_logsumexp, row_delta = load_queries(
            query, grad_output, logsumexp, delta, batch * tokens, heads, head, token, exists,
            D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        k, v = load_pair(
            pooled_key, pooled_value, batch * pooled, head // GROUP, far, far < pooled,
            D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        scores = dot(q, tl.trans(k), entries, PRECISION, UPCAST)
        weights = tl.exp2(scores * (scale * LOG2E) - row_logsumexp[:, None])
        grad_weights = dot(grad, tl.trans(v), None, PRECISION, UPCAST)
        accumulator += weights * (grad_weights - row_delta[:, None])
    row = (part * heads + head).to(tl.int64) * tokens + token
    mask = exists[:, None] & (far < pooled)[None, :]
    tl.store(sums + row[:, None] * pooled + far[None, :], accumulator, mask=mask)
