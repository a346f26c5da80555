"""Dense attention, forward: one program computes one tile of queries of one head.

With a list of active queries (mixture-of-head attention), tiles are cut from the list, and the
programs beyond its end return at once: how long the list is stays on the device.

Also what forward and backward share: tiles of queries, bias and masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.common import (
    LOG2E,
    dot,
    load_rows,
    load_tokens,
    softmax_step,
    store_rows,
    store_tokens,
)

UNALIGNED = ["queries", "keys", "tiles", "heads"]


@triton.jit
def load_sequence(
    tensor, strides, batch, head, token, present,
    D: tl.constexpr, BLOCK: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """`common.load_tokens` of a row of tokens."""
    at = (token * 0, token * 0, token)
    return load_tokens(
        tensor, strides, batch, head, at, present, (0, 0, 0), (1, 1, 1), D, BLOCK, LARGE
    )


@triton.jit
def store_sequence(
    tensor, strides, batch, head, token, present, tokens,
    D: tl.constexpr, BLOCK: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """`common.store_tokens` of a row of tokens."""
    at = (token * 0, token * 0, token)
    store_tokens(
        tensor, strides, batch, head, at, present, (0, 0, 0), (1, 1, 1), tokens, D, BLOCK, LARGE
    )


@triton.jit
def load_numbers(tensor, strides, batch, head, token, present, other, LARGE: tl.constexpr):
    """`common.load_rows` of a row of tokens."""
    at = (token * 0, token * 0, token)
    return load_rows(tensor, strides, batch, head, at, present, (0, 0, 0), (1, 1, 1), other, LARGE)


@triton.jit
def store_numbers(tensor, strides, batch, head, token, present, rows, LARGE: tl.constexpr):
    """`common.store_rows` of a row of tokens."""
    at = (token * 0, token * 0, token)
    store_rows(tensor, strides, batch, head, at, present, (0, 0, 0), (1, 1, 1), rows, LARGE)


@triton.jit
def list_length(counts, batch, head, heads, queries):
    """Number of queries of a head: those of its list, if there is one."""
    if counts is not None:
        queries = tl.load(counts + (batch.to(tl.int64) * heads + head))
    return queries


@triton.jit
def listed_tokens(index, batch, head, heads, row, present, queries):
    """Tokens at places of a head's list; without lists the places themselves."""
    if index is not None:
        start = (batch.to(tl.int64) * heads + head) * queries
        row = tl.load(index + start + row, mask=present, other=0)
    return row


@triton.jit
def load_bias(bias, strides, batch, head, token, key, present, LARGE: tl.constexpr):
    """Base-2 entries for tokens and keys, one as a column and one as a row; 0 where absent."""
    if LARGE:
        token = token.to(tl.int64)
        key = key.to(tl.int64)
    offset = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    offset += token * strides[2] + key * strides[3]
    return tl.load(bias + offset, mask=present, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def hide(scores, token, key, keys, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
    """Scores, -inf for keys that do not exist or are not seen; MASKED false: there are none."""
    if MASKED:
        seen = key < keys
        if CAUSAL:
            seen = seen & (key <= token)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def key_range(token, present, keys, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """Up to where all of the queries see every key, in whole tiles, and up to where one does."""
    stop = keys
    whole = keys
    if CAUSAL:
        stop = tl.minimum(keys, tl.max(token, 0) + 1)
        whole = tl.minimum(keys, tl.min(tl.where(present, token, keys), 0) + 1)
    return whole // BLOCK_N * BLOCK_N, stop


@triton.jit
def forward_step(
    start, q, key, value, bias, key_strides, value_strides, bias_strides,
    batch, head, token, present, keys, before, after, maximum, total, accumulator,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """The online softmax over one tile of keys."""
    k_token = start + tl.arange(0, BLOCK_N)
    k_exists = k_token < keys
    k = load_sequence(key, key_strides, batch, head // GROUP, k_token, k_exists, D, BLOCK_D, LARGE)
    v = load_sequence(
        value, value_strides, batch, head // GROUP, k_token, k_exists,
        VALUE_D, BLOCK_VALUE_D, LARGE,
    )  # fmt: skip
    scores = dot(q, tl.trans(k), None, PRECISION, UPCAST)
    if bias is not None:
        mask = present[:, None] & k_exists[None, :]
        entries = load_bias(
            bias, bias_strides, batch, head, token[:, None], k_token[None, :], mask, LARGE
        )
        scores = scores * before + entries
    scores = hide(scores, token[:, None], k_token[None, :], keys, CAUSAL, MASKED)
    return softmax_step(scores, v, maximum, total, accumulator, after, PRECISION, UPCAST)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def forward_kernel(
    query, key, value,
    bias, gate, index, counts,  # each may be None, the last two together
    output, logsumexp,  # results
    query_strides, key_strides, value_strides,  # (batch, 0, 0, token, head, channel)
    bias_strides,  # (batch, head, token, key), 0 where it is broadcast
    gate_strides,  # (batch, 0, 0, token, head)
    output_strides, logsumexp_strides,
    queries, keys,  # numbers of tokens
    tiles,  # of all queries
    heads,
    scale,  # positive
    GROUP: tl.constexpr,  # query heads per key head
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,  # tokens of a tile of queries, of keys
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
        q = load_sequence(query, query_strides, batch, head, token, present, D, BLOCK_D, LARGE)
        # With a bias the scores are scaled before it is added; without one the scaling waits for
        # the exponential, where it is one fused multiply-add per score.
        before = scale * LOG2E
        after = before
        if bias is not None:
            after = 1.0
        maximum = tl.full([BLOCK_M], -1e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        accumulator = tl.zeros([BLOCK_M, BLOCK_VALUE_D], tl.float32)
        whole, stop = key_range(token, present, keys, CAUSAL, BLOCK_N)
        for start in range(0, whole, BLOCK_N):
            maximum, total, accumulator = forward_step(
                start, q, key, value, bias, key_strides, value_strides, bias_strides,
                batch, head, token, present, keys, before, after, maximum, total, accumulator,
                GROUP, CAUSAL, False, BLOCK_N, D, VALUE_D, BLOCK_D, BLOCK_VALUE_D,
                PRECISION, UPCAST, LARGE,
            )  # fmt: skip
        for start in range(whole, stop, BLOCK_N):
            maximum, total, accumulator = forward_step(
                start, q, key, value, bias, key_strides, value_strides, bias_strides,
                batch, head, token, present, keys, before, after, maximum, total, accumulator,
                GROUP, CAUSAL, True, BLOCK_N, D, VALUE_D, BLOCK_D, BLOCK_VALUE_D,
                PRECISION, UPCAST, LARGE,
            )  # fmt: skip
        # A query that sees no key has output 0, and weights 0 in the backward.
        sees = total > 0
        factor = tl.where(sees, 1 / tl.where(sees, total, 1.0), 0.0)
        if gate is not None:
            g = load_numbers(gate, gate_strides, batch, head, token, present, 0.0, LARGE)
            factor *= g.to(tl.float32)
        store_sequence(
            output, output_strides, batch, head, token, present, accumulator * factor[:, None],
            VALUE_D, BLOCK_VALUE_D, LARGE,
        )  # fmt: skip
        rows = tl.where(sees, maximum + tl.log2(tl.where(sees, total, 1.0)), float("inf"))
        store_numbers(logsumexp, logsumexp_strides, batch, head, token, present, rows, LARGE)
