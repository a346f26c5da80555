"""Aggregated attention, backward: four kernels, none with atomics, so runs are bit-equal.

- `query_kernel`: one program per tile of queries, the forward's walk. It also gives the gradient of
  the window weights.
- `key_value_kernel`: one program per tile of the map's keys: the tokens that see a key lie around
  it as its own window does, mirrored. Of the window's bias it gives a sum for each program.
- `pooled_kernel`: one program per tile of pooled keys and part of the queries, which all see them.
- `pooled_bias_kernel`: one program per tile of queries, tile of pooled keys and part of the images.

Weights are recomputed from the log-sum-exp of the forward (Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.aggregated_forward import (
    load_map,
    load_numbers,
    load_pooled_bias,
    pooled_at,
    shifted,
    store_map,
    store_numbers,
    tile_of_program,
    window_scores,
)
from vitarium.ops.kernels.common import LOG2E, dot

UNALIGNED = ["lengths", "tiles", "heads", "pooled", "images", "parts"]


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def query_kernel(
    query, key, value, pooled_key, pooled_value, bias, pooled_bias, logsumexp, grad_output,
    grad_query, delta,  # results; delta sums softmax weights times their gradients
    grad_window_weights,  # result; None if not wanted
    query_strides, key_strides, value_strides, pooled_key_strides, pooled_value_strides,
    bias_strides, pooled_bias_strides, logsumexp_strides, grad_output_strides, grad_query_strides,
    grad_window_weights_strides,
    lengths, tiles, heads, pooled, scale,  # arguments as those of forward_kernel
    GROUP: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # With weights w and their gradients g, delta = sum w g, and the gradient of the query is
    # sum w (g - delta) k = sum w g k - delta sum w k: one walk gives all three sums. (That delta is
    # also the product of output and its gradient does not help: the output has the window weights
    # in it, and may be rounded.)
    BLOCK_M: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    batch, head, at, present = tile_of_program(tiles, heads, lengths, TILE)
    grad = load_map(
        grad_output,
        grad_output_strides,
        batch,
        head,
        at,
        present,
        VALUE_D,
        BLOCK_VALUE_D,
        LARGE,
        ALIGN,
    )
    q = load_map(query, query_strides, batch, head, at, present, D, BLOCK_D, LARGE, ALIGN)
    row_logsumexp = load_numbers(
        logsumexp, logsumexp_strides, batch, head, at, present, float("inf"), LARGE
    )
    row_delta = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mean_key = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    token = at[1] * lengths[2] + at[2]
    for start in range(0, pooled, BLOCK_N):
        k_at, k_exists = pooled_at(start, pooled, BLOCK_N)
        k = load_map(
            pooled_key, pooled_key_strides, batch, head // GROUP, k_at, k_exists,
            D, BLOCK_D, LARGE, ALIGN,
        )  # fmt: skip
        v = load_map(
            pooled_value, pooled_value_strides, batch, head // GROUP, k_at, k_exists,
            VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        scores = dot(q, tl.trans(k), None, PRECISION, UPCAST) * (scale * LOG2E)
        if pooled_bias is not None:
            scores += load_pooled_bias(
                pooled_bias, pooled_bias_strides, head, token[:, None], k_at[2][None, :],
                present[:, None] & k_exists[None, :], LARGE,
            )  # fmt: skip
        scores = tl.where(k_exists[None, :], scores, float("-inf"))
        weights = tl.exp2(scores - row_logsumexp[:, None])
        products = weights * dot(grad, tl.trans(v), None, PRECISION, UPCAST)
        row_delta += tl.sum(products, 1)
        accumulator = dot(products.to(k.dtype), k, accumulator, PRECISION, UPCAST)
        mean_key = dot(weights.to(k.dtype), k, mean_key, PRECISION, UPCAST)
    q_wide = q.to(tl.float32)
    grad_wide = grad.to(tl.float32)
    for place in tl.range(0, K * K, num_stages=STAGES):
        k_at, seen = shifted(at, present, place, lengths, K, 1)
        k = load_map(
            key, key_strides, batch, head // GROUP, k_at, seen, D, BLOCK_D, LARGE, ALIGN
        ).to(tl.float32)
        v = load_map(
            value,
            value_strides,
            batch,
            head // GROUP,
            k_at,
            seen,
            VALUE_D,
            BLOCK_VALUE_D,
            LARGE,
            ALIGN,
        )
        scores = window_scores(q_wide, k, bias, head, place, bias_strides, scale)
        weights = tl.exp2(tl.where(seen, scores, float("-inf")) - row_logsumexp)
        grad_weights = tl.sum(grad_wide * v.to(tl.float32), 1)
        if grad_window_weights is not None:
            store_numbers(
                grad_window_weights + place * grad_window_weights_strides[5],
                grad_window_weights_strides, batch, head, at, present,
                grad_weights.to(grad_window_weights.dtype.element_ty), LARGE,
            )  # fmt: skip
        products = weights * grad_weights
        row_delta += products
        accumulator += products[:, None] * k
        mean_key += weights[:, None] * k
    store_numbers(delta, logsumexp_strides, batch, head, at, present, row_delta, LARGE)
    result = (accumulator - row_delta[:, None] * mean_key) * scale
    store_map(
        grad_query, grad_query_strides, batch, head, at, present, result, D, BLOCK_D, LARGE, ALIGN
    )


@triton.jit
def load_queries(
    query, grad_output, logsumexp, delta,
    query_strides, grad_output_strides, logsumexp_strides, batch, head, at, present,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """What the gradient of the scores needs of queries; weights are 0 where absent."""
    q = load_map(query, query_strides, batch, head, at, present, D, BLOCK_D, LARGE, ALIGN)
    grad = load_map(
        grad_output,
        grad_output_strides,
        batch,
        head,
        at,
        present,
        VALUE_D,
        BLOCK_VALUE_D,
        LARGE,
        ALIGN,
    )
    row_logsumexp = load_numbers(
        logsumexp, logsumexp_strides, batch, head, at, present, float("inf"), LARGE
    )
    row_delta = load_numbers(delta, logsumexp_strides, batch, head, at, present, 0.0, LARGE)
    return q, grad, row_logsumexp, row_delta


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def key_value_kernel(
    query, key, value, bias, window_weights, logsumexp, delta, grad_output,
    grad_key, grad_value,  # results
    bias_sums,  # result: (programs, GROUP, K * K), contiguous; None if not wanted
    query_strides, key_strides, value_strides, bias_strides, window_weights_strides,
    logsumexp_strides, grad_output_strides, grad_key_strides, grad_value_strides,
    lengths, tiles,
    heads,  # of keys; the rest as in forward_kernel
    scale,
    GROUP: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    LARGE: tl.constexpr, ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    batch, key_head, at, present = tile_of_program(tiles, heads, lengths, TILE)
    k = load_map(key, key_strides, batch, key_head, at, present, D, BLOCK_D, LARGE, ALIGN)
    v = load_map(
        value, value_strides, batch, key_head, at, present, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN
    )
    k = k.to(tl.float32)
    v = v.to(tl.float32)
    k_accumulator = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    v_accumulator = tl.zeros([BLOCK, BLOCK_VALUE_D], tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        for place in tl.range(0, K * K, num_stages=STAGES):
            q_at, seen = shifted(at, present, place, lengths, K, -1)
            q, grad, row_logsumexp, row_delta = load_queries(
                query, grad_output, logsumexp, delta,
                query_strides, grad_output_strides, logsumexp_strides, batch, head, q_at, seen,
                D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
            )  # fmt: skip
            q = q.to(tl.float32)
            grad = grad.to(tl.float32)
            scores = window_scores(q, k, bias, head, place, bias_strides, scale)
            weights = tl.exp2(scores - row_logsumexp)
            grad_scores = weights * (tl.sum(grad * v, 1) - row_delta)
            k_accumulator += grad_scores[:, None] * q
            if bias_sums is not None:
                row = tl.program_id(0).to(tl.int64) * GROUP + member
                tl.store(bias_sums + row * (K * K) + place, tl.sum(grad_scores, 0))
            if window_weights is not None:
                weights += load_numbers(
                    window_weights + place * window_weights_strides[5], window_weights_strides,
                    batch, head, q_at, seen, 0.0, LARGE,
                ).to(tl.float32)  # fmt: skip
            v_accumulator += weights[:, None] * grad
    store_map(
        grad_key, grad_key_strides, batch, key_head, at, present, k_accumulator * scale,
        D, BLOCK_D, LARGE, ALIGN,
    )  # fmt: skip
    store_map(
        grad_value, grad_value_strides, batch, key_head, at, present, v_accumulator,
        VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN,
    )  # fmt: skip


@triton.jit
def row_of_tokens(start, lengths, BLOCK: tl.constexpr):
    """Consecutive tokens in raster order: their numbers, positions and which of them exist."""
    token = start + tl.arange(0, BLOCK)
    return (
        token,
        (token * 0, token // lengths[2], token % lengths[2]),
        (token < lengths[1] * lengths[2]),
    )


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def pooled_kernel(
    query, pooled_key, pooled_value, pooled_bias, logsumexp, delta, grad_output,
    grad_pooled_key, grad_pooled_value,  # results: (parts, B, M, heads, channels), contiguous
    query_strides, pooled_key_strides, pooled_value_strides, pooled_bias_strides,
    logsumexp_strides, grad_output_strides, grad_pooled_key_strides, grad_pooled_value_strides,
    lengths, heads, pooled, scale,
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
    k_at, k_exists = pooled_at(program // images * BLOCK_N, pooled, BLOCK_N)
    k = load_map(
        pooled_key, pooled_key_strides, batch, key_head, k_at, k_exists, D, BLOCK_D, LARGE, ALIGN
    )
    v = load_map(
        pooled_value, pooled_value_strides, batch, key_head, k_at, k_exists,
        VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN,
    )  # fmt: skip
    k_accumulator = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_accumulator = tl.zeros([BLOCK_N, BLOCK_VALUE_D], tl.float32)
    blocks = tl.cdiv(lengths[1] * lengths[2], BLOCK_M)
    share = tl.cdiv(GROUP * blocks, parts)
    for step in range(part * share, tl.minimum((part + 1) * share, GROUP * blocks)):
        head = key_head * GROUP + step // blocks
        token, at, present = row_of_tokens(step % blocks * BLOCK_M, lengths, BLOCK_M)
        q, grad, row_logsumexp, row_delta = load_queries(
            query, grad_output, logsumexp, delta,
            query_strides, grad_output_strides, logsumexp_strides, batch, head, at, present,
            D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        # Transposed, keys are rows, so that both products below take the weights as they are.
        scores = dot(k, tl.trans(q), None, PRECISION, UPCAST) * (scale * LOG2E)
        if pooled_bias is not None:
            scores += load_pooled_bias(
                pooled_bias, pooled_bias_strides, head, token[None, :], k_at[2][:, None],
                present[None, :] & k_exists[:, None], LARGE,
            )  # fmt: skip
        weights = tl.exp2(scores - row_logsumexp[None, :])
        v_accumulator = dot(weights.to(grad.dtype), grad, v_accumulator, PRECISION, UPCAST)
        grad_weights = dot(v, tl.trans(grad), None, PRECISION, UPCAST)
        grad_scores = weights * (grad_weights - row_delta[None, :])
        k_accumulator = dot(grad_scores.to(q.dtype), q, k_accumulator, PRECISION, UPCAST)
    whole = part * images + batch
    store_map(
        grad_pooled_key, grad_pooled_key_strides, whole, key_head, k_at, k_exists,
        k_accumulator * scale, D, BLOCK_D, LARGE, ALIGN,
    )  # fmt: skip
    store_map(
        grad_pooled_value, grad_pooled_value_strides, whole, key_head, k_at, k_exists,
        v_accumulator, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def pooled_bias_kernel(
    query, pooled_key, pooled_value, pooled_bias, logsumexp, delta, grad_output,
    sums,  # result: (parts, heads, N, M), contiguous
    query_strides, pooled_key_strides, pooled_value_strides, pooled_bias_strides,
    logsumexp_strides, grad_output_strides,
    lengths, heads, pooled, scale,
    images, parts,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program % heads
    program = program // heads
    tokens = lengths[1] * lengths[2]
    blocks = tl.cdiv(tokens, BLOCK_M)
    token, at, present = row_of_tokens(program % blocks * BLOCK_M, lengths, BLOCK_M)
    program = program // blocks
    part = program % parts
    k_at, k_exists = pooled_at(program // parts * BLOCK_N, pooled, BLOCK_N)
    both = present[:, None] & k_exists[None, :]
    entries = load_pooled_bias(
        pooled_bias, pooled_bias_strides, head, token[:, None], k_at[2][None, :], both, LARGE
    )
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    share = tl.cdiv(images, parts)
    for step in range(tl.minimum(share, images - part * share)):
        batch = part * share + step
        q, grad, row_logsumexp, row_delta = load_queries(
            query, grad_output, logsumexp, delta,
            query_strides, grad_output_strides, logsumexp_strides, batch, head, at, present,
            D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        k = load_map(
            pooled_key, pooled_key_strides, batch, head // GROUP, k_at, k_exists,
            D, BLOCK_D, LARGE, ALIGN,
        )  # fmt: skip
        v = load_map(
            pooled_value, pooled_value_strides, batch, head // GROUP, k_at, k_exists,
            VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        scores = dot(q, tl.trans(k), None, PRECISION, UPCAST) * (scale * LOG2E) + entries
        weights = tl.exp2(scores - row_logsumexp[:, None])
        grad_weights = dot(grad, tl.trans(v), None, PRECISION, UPCAST)
        accumulator += weights * (grad_weights - row_delta[:, None])
    row = (part * heads + head).to(tl.int64) * tokens + token
    tl.store(sums + row[:, None] * pooled + k_at[2][None, :], accumulator, mask=both)
