"""Dense attention, backward: three kernels, none with atomics, so runs are bit-equal.

- `query_kernel`: one program per tile of queries, the forward's walk over keys. It also sums what
  the others need of every query, and the gradient of the gate.
- `key_value_kernel`: one program per tile of keys; it walks over the queries, or the lists of
  active ones, of all query heads that share the key head.
- `bias_kernel`: one program per tile of the bias; it walks over the images and heads that share
  it, or over a part of them, whose sums the launcher adds up.

Weights are recomputed from the log-sum-exp of the forward (Dao et al., arXiv 2205.14135), which is
infinite for queries that are not active or see no key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.common import LOG2E, dot
from vitarium.ops.kernels.dense_forward import (
    UNALIGNED,
    hide,
    key_range,
    list_length,
    listed_tokens,
    load_bias,
    load_numbers,
    load_sequence,
    store_numbers,
    store_sequence,
)


@triton.jit
def attention_weights(
    a, b, bias, bias_strides, logsumexp, batch, head, token, key, present, keys, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    """Softmax weights of a tile; its scores are the product of `a` and `b`, queries and keys."""
    scores = dot(a, b, None, PRECISION, UPCAST) * (scale * LOG2E)
    if bias is not None:
        scores += load_bias(
            bias, bias_strides, batch, head, token, key, present & (key < keys), LARGE
        )
    return tl.exp2(hide(scores, token, key, keys, CAUSAL, MASKED) - logsumexp)


@triton.jit
def load_queries(
    query, grad_output, gate, logsumexp, delta,
    query_strides, grad_output_strides, gate_strides, logsumexp_strides,
    batch, head, token, present,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    """What the gradient of the scores needs of a tile of queries; weights are 0 where absent."""
    q = load_sequence(query, query_strides, batch, head, token, present, D, BLOCK_D, LARGE)
    grad = load_sequence(
        grad_output, grad_output_strides, batch, head, token, present,
        VALUE_D, BLOCK_VALUE_D, LARGE,
    )  # fmt: skip
    row_logsumexp = load_numbers(
        logsumexp, logsumexp_strides, batch, head, token, present, float("inf"), LARGE
    )
    row_delta = load_numbers(delta, logsumexp_strides, batch, head, token, present, 0.0, LARGE)
    row_gate = row_delta * 0 + 1
    if gate is not None:
        row_gate = load_numbers(gate, gate_strides, batch, head, token, present, 0.0, LARGE)
        row_gate = row_gate.to(tl.float32)
    return q, grad, row_logsumexp, row_delta, row_gate


@triton.jit
def query_step(
    start, q, grad, key, value, bias, gate, key_strides, value_strides, bias_strides,
    batch, head, token, present, keys, scale, row_logsumexp, row_delta, row_gate,
    accumulator, gate_accumulator,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries and of their gates, from one tile of keys."""
    k_token = start + tl.arange(0, BLOCK_N)
    k_exists = k_token < keys
    k = load_sequence(key, key_strides, batch, head // GROUP, k_token, k_exists, D, BLOCK_D, LARGE)
    v = load_sequence(
        value, value_strides, batch, head // GROUP, k_token, k_exists,
        VALUE_D, BLOCK_VALUE_D, LARGE,
    )  # fmt: skip
    weights = attention_weights(
        q, tl.trans(k), bias, bias_strides, row_logsumexp[:, None], batch, head,
        token[:, None], k_token[None, :], present[:, None], keys, scale,
        CAUSAL, MASKED, PRECISION, UPCAST, LARGE,
    )  # fmt: skip
    grad_weights = dot(grad, tl.trans(v), None, PRECISION, UPCAST)
    if gate is not None:
        gate_accumulator += tl.sum(weights * grad_weights, 1)
        grad_weights *= row_gate[:, None]
    grad_scores = weights * (grad_weights - row_delta[:, None])
    accumulator = dot(grad_scores.to(k.dtype), k, accumulator, PRECISION, UPCAST)
    return accumulator, gate_accumulator


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def query_kernel(
    query, key, value, bias, gate, index, counts, output, logsumexp, grad_output,
    grad_query, delta,  # results; delta is the sum of grad_output * output over channels
    grad_gate,  # None without a gate
    query_strides, key_strides, value_strides, bias_strides, gate_strides, output_strides,
    logsumexp_strides,  # of delta and grad_gate too
    grad_output_strides, grad_query_strides,
    queries, keys, tiles, heads, scale,  # arguments as those of forward_kernel
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = program % tiles * BLOCK_M
    head = program // tiles % heads
    batch = program // tiles // heads
    count = list_length(counts, batch, head, heads, queries)
    if first < count:
        row = first + tl.arange(0, BLOCK_M)
        present = row < count
        token = listed_tokens(index, batch, head, heads, row, present, queries)
        o = load_sequence(
            output, output_strides, batch, head, token, present, VALUE_D, BLOCK_VALUE_D, LARGE
        )
        grad = load_sequence(
            grad_output, grad_output_strides, batch, head, token, present,
            VALUE_D, BLOCK_VALUE_D, LARGE,
        )  # fmt: skip
        row_delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1)
        store_numbers(delta, logsumexp_strides, batch, head, token, present, row_delta, LARGE)
        q = load_sequence(query, query_strides, batch, head, token, present, D, BLOCK_D, LARGE)
        row_logsumexp = load_numbers(
            logsumexp, logsumexp_strides, batch, head, token, present, float("inf"), LARGE
        )
        row_gate = row_delta * 0 + 1
        if gate is not None:
            g = load_numbers(gate, gate_strides, batch, head, token, present, 0.0, LARGE)
            row_gate = g.to(tl.float32)
        accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        gate_accumulator = tl.zeros([BLOCK_M], tl.float32)
        whole, stop = key_range(token, present, keys, CAUSAL, BLOCK_N)
        for start in range(0, whole, BLOCK_N):
            accumulator, gate_accumulator = query_step(
                start, q, grad, key, value, bias, gate, key_strides, value_strides, bias_strides,
                batch, head, token, present, keys, scale, row_logsumexp, row_delta, row_gate,
                accumulator, gate_accumulator, GROUP, CAUSAL, False, BLOCK_N,
                D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, PRECISION, UPCAST, LARGE,
            )  # fmt: skip
        for start in range(whole, stop, BLOCK_N):
            accumulator, gate_accumulator = query_step(
                start, q, grad, key, value, bias, gate, key_strides, value_strides, bias_strides,
                batch, head, token, present, keys, scale, row_logsumexp, row_delta, row_gate,
                accumulator, gate_accumulator, GROUP, CAUSAL, True, BLOCK_N,
                D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, PRECISION, UPCAST, LARGE,
            )  # fmt: skip
        store_sequence(
            grad_query, grad_query_strides, batch, head, token, present, accumulator * scale,
            D, BLOCK_D, LARGE,
        )  # fmt: skip
        if gate is not None:
            store_numbers(
                grad_gate, logsumexp_strides, batch, head, token, present, gate_accumulator, LARGE
            )


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def key_value_kernel(
    query, key, value, bias, gate, index, counts, logsumexp, delta, grad_output,
    grad_key, grad_value,  # results
    query_strides, key_strides, value_strides, bias_strides, gate_strides, logsumexp_strides,
    grad_output_strides, grad_key_strides, grad_value_strides,
    queries, keys,
    tiles,  # of keys
    heads,  # of keys; the rest as in forward_kernel
    scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    k_first = program % tiles * BLOCK_N
    k_head = program // tiles % heads
    batch = program // tiles // heads
    k_token = k_first + tl.arange(0, BLOCK_N)
    k_exists = k_token < keys
    k = load_sequence(key, key_strides, batch, k_head, k_token, k_exists, D, BLOCK_D, LARGE)
    v = load_sequence(
        value, value_strides, batch, k_head, k_token, k_exists, VALUE_D, BLOCK_VALUE_D, LARGE
    )
    k_accumulator = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_accumulator = tl.zeros([BLOCK_N, BLOCK_VALUE_D], tl.float32)
    for member in range(GROUP):
        head = k_head * GROUP + member
        count = list_length(counts, batch, head, heads * GROUP, queries)
        begin = 0
        if CAUSAL and index is None:  # a list may hold any tokens
            begin = k_first // BLOCK_M * BLOCK_M
        for first in range(begin, count, BLOCK_M):
            row = first + tl.arange(0, BLOCK_M)
            present = row < count
            token = listed_tokens(index, batch, head, heads * GROUP, row, present, queries)
            q, grad, row_logsumexp, row_delta, row_gate = load_queries(
                query, grad_output, gate, logsumexp, delta,
                query_strides, grad_output_strides, gate_strides, logsumexp_strides,
                batch, head, token, present, D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE,
            )  # fmt: skip
            # Transposed, keys are rows, so that both products below take the weights as they are.
            # Rows of keys that do not exist hold anything, and are not stored.
            weights = attention_weights(
                k, tl.trans(q), bias, bias_strides, row_logsumexp[None, :], batch, head,
                token[None, :], k_token[:, None], present[None, :], keys, scale,
                CAUSAL, CAUSAL, PRECISION, UPCAST, LARGE,
            )  # fmt: skip
            grad_weights = dot(v, tl.trans(grad), None, PRECISION, UPCAST)
            given = weights
            if gate is not None:
                given = weights * row_gate[None, :]
                grad_weights *= row_gate[None, :]
            v_accumulator = dot(given.to(grad.dtype), grad, v_accumulator, PRECISION, UPCAST)
            grad_scores = weights * (grad_weights - row_delta[None, :])
            k_accumulator = dot(grad_scores.to(q.dtype), q, k_accumulator, PRECISION, UPCAST)
    store_sequence(
        grad_key, grad_key_strides, batch, k_head, k_token, k_exists, k_accumulator * scale,
        D, BLOCK_D, LARGE,
    )  # fmt: skip
    store_sequence(
        grad_value, grad_value_strides, batch, k_head, k_token, k_exists, v_accumulator,
        VALUE_D, BLOCK_VALUE_D, LARGE,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=[*UNALIGNED, "key_tiles", "images", "shared", "parts"])
def bias_kernel(
    query, key, value, bias, gate, logsumexp, delta, grad_output,
    sums,  # result: (parts, batch or 1, heads or 1, queries, keys), contiguous
    query_strides, key_strides, value_strides, bias_strides, gate_strides, logsumexp_strides,
    grad_output_strides,
    queries, keys,
    tiles, key_tiles,
    heads, images,  # of the bias: 1 where it is broadcast
    shared,  # heads that share the bias: 1, or all
    steps,  # images and heads that share an entry of the bias
    parts,  # that they are split into
    scale,  # arguments as those of forward_kernel
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    k_token = program % key_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    program = program // key_tiles
    token = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    table = program // tiles  # number of the part, the image and the head of the bias
    part = table // heads // images
    present = token < queries
    k_exists = k_token < keys
    share = tl.cdiv(steps, parts)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(part * share, tl.minimum((part + 1) * share, steps)):
        head = table % heads + step % shared
        batch = table // heads % images + step // shared
        q, grad, row_logsumexp, row_delta, row_gate = load_queries(
            query, grad_output, gate, logsumexp, delta,
            query_strides, grad_output_strides, gate_strides, logsumexp_strides,
            batch, head, token, present, D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE,
        )  # fmt: skip
        k = load_sequence(
            key, key_strides, batch, head // GROUP, k_token, k_exists, D, BLOCK_D, LARGE
        )
        v = load_sequence(
            value, value_strides, batch, head // GROUP, k_token, k_exists,
            VALUE_D, BLOCK_VALUE_D, LARGE,
        )  # fmt: skip
        weights = attention_weights(
            q, tl.trans(k), bias, bias_strides, row_logsumexp[:, None], batch, head,
            token[:, None], k_token[None, :], present[:, None], keys, scale,
            CAUSAL, CAUSAL, PRECISION, UPCAST, LARGE,
        )  # fmt: skip
        grad_weights = dot(grad, tl.trans(v), None, PRECISION, UPCAST)
        if gate is not None:
            grad_weights *= row_gate[:, None]
        accumulator += weights * (grad_weights - row_delta[:, None])
    sums += table.to(tl.int64) * queries * keys
    target = sums + token[:, None].to(tl.int64) * keys + k_token[None, :]
    tl.store(target, accumulator, mask=present[:, None] & k_exists[None, :])
