"""Device functions for the patterns of local attention: rules in `vitarium.ops.windows`.

A rule describes one axis. That of neighborhood attention is (kernel size, stride, is causal), all
known when compiling; that of window attention (window size, lead, halo, border). Queries are
counted in positions of their residue class; so are keys, but from the beginning of the border, if
there is one. `n` is the number of queries of the class.

Tiles of tokens are laid in cells: a cell holds tiles from its beginning on, the last one cut off at
its end. A layout is (length of a cell, positions of the first cell that lie before the axis).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.common import expand

# --- one axis ------------------------------------------------------------------------------------


@triton.jit
def axis_window(p, n, rule):
    """First key and one past the last key that the query at p sees; both never decrease in p."""
    if len(rule) == 3:
        if rule[2]:
            leader = tl.minimum(p // rule[1] * rule[1] + (rule[1] - 1), n - 1)
            start = tl.maximum(leader - (rule[0] - 1), 0)
            stop = p + 1
        else:
            leader = tl.minimum(p // rule[1] * rule[1] + rule[1] // 2, n - 1)
            start = tl.minimum(tl.maximum(leader - rule[0] // 2, 0), n - rule[0])
            stop = start + rule[0]
    else:
        first = (p + rule[1]) // rule[0] * rule[0] - rule[1] + rule[3]
        start = tl.maximum(first - rule[2], 0)
        stop = tl.minimum(first + rule[0] + rule[2], n + 2 * rule[3])
    return start, stop


@triton.jit
def axis_union(first, stop, n, rule):
    """First key and one past the last key that any query of [first, stop) sees."""
    start, _ = axis_window(first, n, rule)
    _, end = axis_window(stop - 1, n, rule)
    return start, end


@triton.jit
def axis_inverse(first, stop, n, rule):
    """First query and one past the last query that sees any key of [first, stop).

    Windows move forward only, so the queries whose window starts early enough are a prefix of the
    axis and those whose window stops late enough are a suffix; the answer is where they overlap.
    """
    last = stop - 1
    if len(rule) == 3:
        if rule[2]:
            start = first
            end = (last + rule[0] - rule[1]) // rule[1] * rule[1] + rule[1]
        else:
            # A key among the first is in the window that the border pushed inside: from query 0.
            start = tl.maximum(first - rule[0] + rule[0] // 2 + 1 - rule[1] // 2, 0)
            start = tl.where(first < rule[0], 0, (start + rule[1] - 1) // rule[1] * rule[1])
            end = (last + rule[0] // 2 - rule[1] // 2) // rule[1] * rule[1] + rule[1]
        end = tl.where(last + rule[0] >= n, n, end)
    else:
        # The windows of the outermost positions from which a halo reaches the keys.
        start = tl.maximum(first - rule[3] - rule[2], 0)
        start = tl.maximum((start + rule[1]) // rule[0] * rule[0] - rule[1], 0)
        end = tl.minimum(last - rule[3] + rule[2], n - 1)
        end = (end + rule[1]) // rule[0] * rule[0] - rule[1] + rule[0]
    return start, tl.minimum(end, n)


@triton.jit
def axis_reach(rule):
    """The index in the bias table of a key as far along its axis as the query."""
    if len(rule) == 3:
        return rule[0] - 1
    else:
        return rule[0] - 1 + rule[2] - rule[3]


@triton.jit
def axis_keys(n, rule):
    """Number of keys of a class of n queries."""
    if len(rule) == 3:
        return n
    else:
        return n + 2 * rule[3]


@triton.jit
def axis_tile(index, n, layout, TILE: tl.constexpr):
    """Where a tile begins, maybe before the axis, and one past its last token."""
    each = tl.cdiv(layout[0], TILE)
    cell = index // each * layout[0] - layout[1]
    origin = cell + index % each * TILE
    return origin, tl.minimum(tl.minimum(origin + TILE, cell + layout[0]), n)


@triton.jit
def inside(key, start, stop):
    """start <= key < stop by one unsigned comparison."""
    return (key - start).to(tl.uint32) < (stop - start).to(tl.uint32)


# --- three axes ----------------------------------------------------------------------------------


@triton.jit
def tile_span(index, n, layout, TILE: tl.constexpr):
    """Per axis: where a tile begins, its first token, one past its last."""
    z, z1 = axis_tile(index[0], n[0], layout[0], TILE[0])
    y, y1 = axis_tile(index[1], n[1], layout[1], TILE[1])
    x, x1 = axis_tile(index[2], n[2], layout[2], TILE[2])
    first = (tl.maximum(z, 0), tl.maximum(y, 0), tl.maximum(x, 0))
    return (z, y, x), first, (z1, y1, x1)


@triton.jit
def within(position, first, stop):
    """Whether the token lies in a span along every axis."""
    return (
        inside(position[0], first[0], stop[0])
        & inside(position[1], first[1], stop[1])
        & inside(position[2], first[2], stop[2])
    )


@triton.jit
def clip(position, first, stop):
    """Positions moved into a span, so that their windows are those of tokens."""
    return (
        tl.minimum(tl.maximum(position[0], first[0]), stop[0] - 1),
        tl.minimum(tl.maximum(position[1], first[1]), stop[1] - 1),
        tl.minimum(tl.maximum(position[2], first[2]), stop[2] - 1),
    )


@triton.jit
def windows(position, n, rules):
    """`axis_window` of every axis: the three starts and the three stops."""
    z0, z1 = axis_window(position[0], n[0], rules[0])
    y0, y1 = axis_window(position[1], n[1], rules[1])
    x0, x1 = axis_window(position[2], n[2], rules[2])
    return (z0, y0, x0), (z1, y1, x1)


@triton.jit
def seen(position, first, n, rules, AXIS: tl.constexpr, ALIKE: tl.constexpr):
    """`windows` of queries as columns (AXIS 1) or rows (AXIS 0).

    ALIKE: all of them see what the one at `first` sees, and a number stands for all.
    """
    if ALIKE:
        start, stop = windows(first, n, rules)
    else:
        start, stop = windows(position, n, rules)
        start = expand(start, AXIS)
        stop = expand(stop, AXIS)
    return start, stop


@triton.jit
def key_lengths(n, rules):
    """`axis_keys` of every axis."""
    return axis_keys(n[0], rules[0]), axis_keys(n[1], rules[1]), axis_keys(n[2], rules[2])


@triton.jit
def key_range(first, stop, n, rules, KEY_TILE: tl.constexpr):
    """The walk over the keys of a span of queries: where it starts and stops, tiles per axis."""
    z0, z1 = axis_union(first[0], stop[0], n[0], rules[0])
    y0, y1 = axis_union(first[1], stop[1], n[1], rules[1])
    x0, x1 = axis_union(first[2], stop[2], n[2], rules[2])
    return (z0, y0, x0), (z1, y1, x1), (
        tl.cdiv(z1 - z0, KEY_TILE[0]),
        tl.cdiv(y1 - y0, KEY_TILE[1]),
        tl.cdiv(x1 - x0, KEY_TILE[2]),
    )  # fmt: skip


@triton.jit
def query_range(first, stop, n, rules, QUERY_TILE: tl.constexpr):
    """The walk over the queries that see a span of keys, like `key_range`."""
    z0, z1 = axis_inverse(first[0], stop[0], n[0], rules[0])
    y0, y1 = axis_inverse(first[1], stop[1], n[1], rules[1])
    x0, x1 = axis_inverse(first[2], stop[2], n[2], rules[2])
    return (z0, y0, x0), (z1, y1, x1), (
        tl.cdiv(tl.maximum(z1 - z0, 0), QUERY_TILE[0]),
        tl.cdiv(tl.maximum(y1 - y0, 0), QUERY_TILE[1]),
        tl.cdiv(tl.maximum(x1 - x0, 0), QUERY_TILE[2]),
    )  # fmt: skip


@triton.jit
def mask_scores(scores, key, start, stop, ALIKE: tl.constexpr):
    """Scores, -inf outside the window; a select per axis lets the compiler share comparisons."""
    if ALIKE:
        return tl.where(within(key, start, stop), scores, float("-inf"))
    scores = tl.where(inside(key[2], start[2], stop[2]), scores, float("-inf"))
    scores = tl.where(inside(key[1], start[1], stop[1]), scores, float("-inf"))
    return tl.where(inside(key[0], start[0], stop[0]), scores, float("-inf"))


@triton.jit
def relative_bias(bias, strides, query, key, start, stop, rules):
    """Entries of one head's relative position bias table for pairs of query and key, in float32.

    Outside the window they are -inf, so that scores to which they are added need no other mask.
    """
    # One difference for each pair: all else is done for each key or each query.
    key_offset = key[0] * strides[1] + key[1] * strides[2] + key[2] * strides[3]
    query_offset = (
        (query[0] - axis_reach(rules[0])) * strides[1]
        + (query[1] - axis_reach(rules[1])) * strides[2]
        + (query[2] - axis_reach(rules[2])) * strides[3]
    )
    entries = bias + (key_offset - query_offset)
    return tl.load(entries, mask=within(key, start, stop), other=float("-inf")).to(tl.float32)
