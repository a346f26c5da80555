"""Local attention, backward: three kernels, none with atomics, so runs are bit-equal.

- `query_kernel`: one program per tile of queries, the forward's walk over keys.
- `key_value_kernel`: one program per tile of keys; it walks over the queries that see the tile,
  which `axis_inverse` finds, and over the query heads that share the key head.
- `bias_kernel`: the gradient of the relative position bias sums the gradient of the scores over all
  pairs of query and key with equal offset. One program takes the pairs of a tile of queries with
  one tile of keys at a fixed place relative to it, for a part of all images and tiles: pair (m, n)
  then has the same offset in every step, and the program adds up whole tiles. Adding its
  sums along diagonals, in a fixed order, is left to the launcher.

Weights are recomputed from the log-sum-exp of the forward (Dao et al., arXiv 2205.14135).
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
    load_rows,
    load_tokens,
    positions,
    split,
    store_rows,
    store_tokens,
)
from vitarium.ops.kernels.patterns import (
    axis_tile,
    axis_union,
    clip,
    key_lengths,
    key_range,
    mask_scores,
    query_range,
    relative_bias,
    seen,
    tile_span,
    within,
)

UNALIGNED = ["lengths", "dilation", "rules", "layout", "tiles", "heads", "images", "parts"]


@triton.jit
def attention_weights(
    a, b, bias, bias_strides, logsumexp, query, key, start, stop, rules, scale,
    ALIKE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Softmax weights of a tile; its scores are the product of `a` and `b`, queries and keys."""
    scores = dot(a, b, None, PRECISION, UPCAST) * (scale * LOG2E)
    if bias is not None:
        scores += relative_bias(bias, bias_strides, query, key, start, stop, rules) * LOG2E
    else:
        scores = mask_scores(scores, key, start, stop, ALIKE)
    return tl.exp2(scores - logsumexp)


@triton.jit
def load_queries(
    query, grad_output, logsumexp, delta,
    query_strides, grad_output_strides, logsumexp_strides,
    batch, head, position, present, residue, dilation,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    """What the gradient of the scores needs of a tile of queries; weights are 0 where absent."""
    q = load_tokens(
        query, query_strides, batch, head, position, present, residue, dilation,
        D, BLOCK_D, LARGE,
    )  # fmt: skip
    grad = load_tokens(
        grad_output, grad_output_strides, batch, head, position, present, residue, dilation,
        VALUE_D, BLOCK_VALUE_D, LARGE,
    )  # fmt: skip
    row_logsumexp = load_rows(
        logsumexp, logsumexp_strides, batch, head, position, present, residue, dilation,
        float("inf"), LARGE,
    )  # fmt: skip
    row_delta = load_rows(
        delta, logsumexp_strides, batch, head, position, present, residue, dilation, 0.0, LARGE
    )
    return q, grad, row_logsumexp, row_delta


@triton.jit
def load_keys(
    key, value, key_strides, value_strides, batch, head, position, present, residue, dilation,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    """The keys and values of a tile."""
    k = load_tokens(
        key, key_strides, batch, head, position, present, residue, dilation, D, BLOCK_D, LARGE
    )
    v = load_tokens(
        value, value_strides, batch, head, position, present, residue, dilation,
        VALUE_D, BLOCK_VALUE_D, LARGE,
    )  # fmt: skip
    return k, v


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def query_kernel(
    query, key, value, bias, output, logsumexp, grad_output,
    grad_query, delta,  # results; delta is the sum of grad_output * output over channels
    query_strides, key_strides, value_strides, bias_strides, output_strides, logsumexp_strides,
    grad_output_strides, grad_query_strides,
    lengths, dilation, rules, layout, tiles, heads, scale,  # arguments as those of forward_kernel
    GROUP: tl.constexpr, ALIKE: tl.constexpr,
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
        o = load_tokens(
            output, output_strides, batch, head, q_at, q_exists, residue, dilation,
            VALUE_D, BLOCK_VALUE_D, LARGE,
        )  # fmt: skip
        grad = load_tokens(
            grad_output, grad_output_strides, batch, head, q_at, q_exists, residue, dilation,
            VALUE_D, BLOCK_VALUE_D, LARGE,
        )  # fmt: skip
        row_delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1)
        store_rows(
            delta, logsumexp_strides, batch, head, q_at, q_exists, residue, dilation,
            row_delta, LARGE,
        )  # fmt: skip
        q = load_tokens(
            query, query_strides, batch, head, q_at, q_exists, residue, dilation,
            D, BLOCK_D, LARGE,
        )  # fmt: skip
        row_logsumexp = load_rows(
            logsumexp, logsumexp_strides, batch, head, q_at, q_exists, residue, dilation,
            float("inf"), LARGE,
        )  # fmt: skip
        if bias is not None:
            bias += head * bias_strides[0]
        accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        first, k_stop, counts = key_range(q_first, q_stop, n, rules, KEY_TILE)
        for step in range(counts[0] * counts[1] * counts[2]):
            z, y, x, _ = split(step, counts)
            k_origin = (
                first[0] + z * KEY_TILE[0],
                first[1] + y * KEY_TILE[1],
                first[2] + x * KEY_TILE[2],
            )
            k_at = positions(k_origin, tl.arange(0, BLOCK_N), KEY_TILE)
            k, v = load_keys(
                key, value, key_strides, value_strides, batch, head // GROUP,
                k_at, exists(k_at, k_stop), residue, dilation,
                D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE,
            )  # fmt: skip
            weights = attention_weights(
                q, tl.trans(k), bias, bias_strides, row_logsumexp[:, None],
                expand(q_at, 1), expand(k_at, 0), start, stop, rules,
                scale, ALIKE, PRECISION, UPCAST,
            )  # fmt: skip
            grad_weights = dot(grad, tl.trans(v), None, PRECISION, UPCAST)
            grad_scores = weights * (grad_weights - row_delta[:, None])
            accumulator = dot(grad_scores.to(k.dtype), k, accumulator, PRECISION, UPCAST)
        store_tokens(
            grad_query, grad_query_strides, batch, head, q_at, q_exists, residue, dilation,
            accumulator * scale, D, BLOCK_D, LARGE,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def key_value_kernel(
    query, key, value, bias, logsumexp, delta, grad_output,
    grad_key, grad_value,  # results
    query_strides, key_strides, value_strides, bias_strides, logsumexp_strides,
    grad_output_strides, grad_key_strides, grad_value_strides,
    lengths, dilation, rules,
    layout, tiles, heads,  # of key tiles, and key heads; the rest as in forward_kernel
    scale,
    GROUP: tl.constexpr, ALIKE: tl.constexpr,
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
    origin, k_first, k_stop = tile_span(tile, key_lengths(n, rules), layout, KEY_TILE)
    if exists(k_first, k_stop):
        key_head = rest % heads
        batch = rest // heads
        k_at = positions(origin, tl.arange(0, BLOCK_N), KEY_TILE)
        k_exists = within(k_at, k_first, k_stop)
        k, v = load_keys(
            key, value, key_strides, value_strides, batch, key_head,
            k_at, k_exists, residue, dilation,
            D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE,
        )  # fmt: skip
        k_accumulator = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        v_accumulator = tl.zeros([BLOCK_N, BLOCK_VALUE_D], tl.float32)
        first, q_stop, counts = query_range(k_first, k_stop, n, rules, QUERY_TILE)
        for step in range(GROUP * counts[0] * counts[1] * counts[2]):
            z, y, x, member = split(step, counts)
            head = key_head * GROUP + member
            q_origin = (
                first[0] + z * QUERY_TILE[0],
                first[1] + y * QUERY_TILE[1],
                first[2] + x * QUERY_TILE[2],
            )
            q_at = positions(q_origin, tl.arange(0, BLOCK_M), QUERY_TILE)
            q_exists = exists(q_at, q_stop)
            q_at = clip(q_at, first, q_stop)
            start, stop = seen(q_at, first, n, rules, 0, ALIKE)
            q, grad, row_logsumexp, row_delta = load_queries(
                query, grad_output, logsumexp, delta,
                query_strides, grad_output_strides, logsumexp_strides,
                batch, head, q_at, q_exists, residue, dilation,
                D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE,
            )  # fmt: skip
            table = bias
            if bias is not None:
                table = bias + head * bias_strides[0]
            # Transposed, keys are rows, so that both products below take the weights as they are.
            weights = attention_weights(
                k, tl.trans(q), table, bias_strides, row_logsumexp[None, :],
                expand(q_at, 0), expand(k_at, 1), start, stop, rules,
                scale, ALIKE, PRECISION, UPCAST,
            )  # fmt: skip
            v_accumulator = dot(weights.to(grad.dtype), grad, v_accumulator, PRECISION, UPCAST)
            grad_weights = dot(v, tl.trans(grad), None, PRECISION, UPCAST)
            grad_scores = weights * (grad_weights - row_delta[None, :])
            k_accumulator = dot(grad_scores.to(q.dtype), q, k_accumulator, PRECISION, UPCAST)
        store_tokens(
            grad_key, grad_key_strides, batch, key_head, k_at, k_exists, residue, dilation,
            k_accumulator * scale, D, BLOCK_D, LARGE,
        )  # fmt: skip
        store_tokens(
            grad_value, grad_value_strides, batch, key_head, k_at, k_exists, residue, dilation,
            v_accumulator, VALUE_D, BLOCK_VALUE_D, LARGE,
        )  # fmt: skip


@triton.jit
def tiles_in_reach(
    shift, n, rule, layout, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr
):  # fmt: skip
    """First and number of the query tiles that see any of the KEY_TILE keys `shift` after them.

    The answer is irregular, so it is looked for; tiles between may see none.
    """
    tiles = tl.cdiv(n + layout[1], layout[0]) * tl.cdiv(layout[0], QUERY_TILE)
    low = tiles
    high = tiles * 0
    for tile in range(tiles):
        origin, stop = axis_tile(tile, n, layout, QUERY_TILE)
        first = tl.maximum(origin, 0)
        start, end = axis_union(first, stop, n, rule)
        reached = (first < stop) & (start < origin + shift + KEY_TILE) & (end > origin + shift)
        low = tl.where(reached, tl.minimum(low, tile), low)
        high = tl.where(reached, tile + 1, high)
    return low, tl.maximum(high - low, 0)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def bias_kernel(
    query, key, value, bias, logsumexp, delta, grad_output,
    partial_sums,  # result: (parts, heads, *KEY_TILES, *QUERY_TILE, *KEY_TILE), contiguous
    query_strides, key_strides, value_strides, bias_strides, logsumexp_strides,
    grad_output_strides,
    lengths, dilation, rules, layout, heads, scale,  # arguments as those of forward_kernel
    images, parts,
    FIRST: tl.constexpr,  # first key of the first key tile minus first query, per axis
    KEY_TILES: tl.constexpr,  # per axis
    GROUP: tl.constexpr, ALIKE: tl.constexpr,
    QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    BLOCK_N: tl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    program = tl.program_id(0)
    z, y, x, rest = split(program, KEY_TILES)
    shift = (
        FIRST[0] + z * KEY_TILE[0],
        FIRST[1] + y * KEY_TILE[1],
        FIRST[2] + x * KEY_TILE[2],
    )
    head = rest % heads
    part = rest // heads
    bias += head * bias_strides[0]
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for residue_class in range(dilation[0] * dilation[1] * dilation[2]):
        z, y, x, _ = split(residue_class, dilation)
        residue = (z, y, x)
        n = class_lengths(lengths, residue, dilation)
        keys = key_lengths(n, rules)
        z0, nz = tiles_in_reach(shift[0], n[0], rules[0], layout[0], QUERY_TILE[0], KEY_TILE[0])
        y0, ny = tiles_in_reach(shift[1], n[1], rules[1], layout[1], QUERY_TILE[1], KEY_TILE[1])
        x0, nx = tiles_in_reach(shift[2], n[2], rules[2], layout[2], QUERY_TILE[2], KEY_TILE[2])
        steps = images * nz * ny * nx
        share = tl.cdiv(steps, parts)
        for step in range(part * share, tl.minimum((part + 1) * share, steps)):
            z, y, x, batch = split(step, (nz, ny, nx))
            tile = (z0 + z, y0 + y, x0 + x)
            q_origin, q_first, q_stop = tile_span(tile, n, layout, QUERY_TILE)
            k_origin = (q_origin[0] + shift[0], q_origin[1] + shift[1], q_origin[2] + shift[2])
            q_at = positions(q_origin, tl.arange(0, BLOCK_M), QUERY_TILE)
            q_exists = within(q_at, q_first, q_stop)
            q_at = clip(q_at, q_first, q_stop)
            k_at = positions(k_origin, tl.arange(0, BLOCK_N), KEY_TILE)
            k_exists = within(k_at, (0, 0, 0), keys)
            start, stop = seen(q_at, q_first, n, rules, 1, ALIKE)
            q, grad, row_logsumexp, row_delta = load_queries(
                query, grad_output, logsumexp, delta,
                query_strides, grad_output_strides, logsumexp_strides,
                batch, head, q_at, q_exists, residue, dilation,
                D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE,
            )  # fmt: skip
            k, v = load_keys(
                key, value, key_strides, value_strides, batch, head // GROUP,
                k_at, k_exists, residue, dilation,
                D, VALUE_D, BLOCK_D, BLOCK_VALUE_D, LARGE,
            )  # fmt: skip
            weights = attention_weights(
                q, tl.trans(k), bias, bias_strides, row_logsumexp[:, None],
                expand(q_at, 1), expand(k_at, 0), start, stop, rules,
                scale, ALIKE, PRECISION, UPCAST,
            )  # fmt: skip
            grad_weights = dot(grad, tl.trans(v), None, PRECISION, UPCAST)
            accumulator += weights * (grad_weights - row_delta[:, None])
    m = tl.arange(0, BLOCK_M)[:, None]
    n_row = tl.arange(0, BLOCK_N)[None, :]
    partial_sums += program.to(tl.int64) * (BLOCK_M * BLOCK_N)
    tl.store(partial_sums + m * BLOCK_N + n_row, accumulator)
