"""Window attention whose windows fit one tile: their tokens are queries and keys of one product.

A program takes one window of a head and walks over the images and, where they look alike, over the
windows above each other. What depends on the place in the window only, the relative position bias
and the mask, stays in registers meanwhile; the softmax is done in one step. No kernel has atomics,
so runs are bit-equal.

Along an axis, window number t holds the positions t * size - lead ... of a residue class modulo
the dilation. Before the axis there are none: as by the cyclic shift of Swin (Liu et al., arXiv
2103.14030) window 0 holds the last ones in their place, if they fit, which `wrap` positions on are.
The tokens of either end do not see each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.common import (
    LOG2E,
    dot,
    load_rows,
    load_tokens,
    store_rows,
    store_tokens,
)
from vitarium.ops.kernels.patterns import inside

# Numbers that come with the map: none of them makes Triton compile again.
VARYING = [
    "images", "heads", "height", "width", "size_y", "size_x", "dilation_y", "dilation_x",
    "lead_y", "lead_x", "wrap_y", "wrap_x", "tiles_y", "tiles_x", "first_row", "rows", "steps",
]  # fmt: skip


@triton.jit
def axis_tokens(tile, index, residue, axis):
    """Tokens number `index` of a window, whether they exist, and 1 if they lie at the far end."""
    length, size, dilation, lead, wrap = axis
    position = tile * size - lead + index
    wrapped = position < 0
    token = tl.where(wrapped, position + wrap, position) * dilation + residue
    return token, inside(token, 0, length) & (index < size), wrapped.to(tl.int32)


@triton.jit
def place(
    program, images, heads, y_axis, x_axis, tiles_y, tiles_x, first_row, rows, steps,
    TILE: tl.constexpr,
):  # fmt: skip
    """What a program computes.

    Windows number first_row ... first_row + rows - 1 from above look alike; the walk goes over all
    of them in an image, then over images. The one above and the one below have walks of their own.

    Returns:
        head; tokens along y and along x of the first window, and which exist; their part of the
        map, of which there are up to four in a window that is wrapped; first and one past the last
        step of the walk, windows per image.
    """
    head = program % heads
    program = program // heads
    x_tile = program % tiles_x
    program = program // tiles_x
    x_residue = program % x_axis[2]
    program = program // x_axis[2]
    y_residue = program % y_axis[2]
    chunk = program // y_axis[2]
    inner = tl.cdiv(images * rows, steps)
    each = tl.cdiv(images, steps)
    edge = (chunk - inner) // each
    is_inner = chunk < inner
    y_tile = tl.where(is_inner, first_row, tl.where(edge < first_row, 0, tiles_y - 1))
    first = tl.where(is_inner, chunk, (chunk - inner) % each) * steps
    rows = tl.where(is_inner, rows, 1)
    index = tl.arange(0, TILE[0] * TILE[1])
    y, y_exists, y_part = axis_tokens(y_tile, index // TILE[1], y_residue, y_axis)
    x, x_exists, x_part = axis_tokens(x_tile, index % TILE[1], x_residue, x_axis)
    stop = tl.minimum(first + steps, images * rows)
    return head, y, x, y_exists & x_exists, y_part * 2 + x_part, first, stop, rows


@triton.jit
def bias_tile(bias, strides, head, part, present, size_y, size_x, TILE: tl.constexpr):
    """What is added to base-2 scores, (queries, keys): -inf where they do not see each other."""
    seen = part[:, None] == tl.where(present, part, -1)[None, :]
    if bias is not None:
        index = tl.arange(0, TILE[0] * TILE[1])
        key = index // TILE[1] * strides[1] + index % TILE[1] * strides[2]
        query = key - (size_y - 1) * strides[1] - (size_x - 1) * strides[2]
        query = tl.where(present, query, 0)  # no entries before the table
        entries = bias + (head.to(tl.int64) * strides[0] + (key[None, :] - query[:, None]))
        tile = tl.load(entries, mask=seen, other=float("-inf")).to(tl.float32) * LOG2E
    else:
        tile = tl.where(seen, 0.0, float("-inf"))
    return tile


@triton.jit
def contiguous(height, width, heads, D: tl.constexpr, LARGE: tl.constexpr):
    """Strides of a contiguous map as (batch, z, y, x, head, channel)."""
    if LARGE:
        width = width.to(tl.int64)
    row = width * heads * D
    return height.to(tl.int64) * row, 0, row, heads * D, D, 1


@triton.jit
def load_window(
    tensor, strides, image, row, head, y, x, present,
    D: tl.constexpr, BLOCK: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """`common.load_tokens` of a window `row` tokens below the first."""
    tensor += row.to(tl.int64) * strides[2]
    return load_tokens(
        tensor, strides, image, head, (y * 0, y, x), present, (0, 0, 0), (1, 1, 1),
        D, BLOCK, LARGE,
    )  # fmt: skip


@triton.jit
def store_window(
    tensor, strides, image, row, head, y, x, present, tokens,
    D: tl.constexpr, BLOCK: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Writes what `load_window` reads."""
    tensor += row.to(tl.int64) * strides[2]
    store_tokens(
        tensor, strides, image, head, (y * 0, y, x), present, (0, 0, 0), (1, 1, 1), tokens,
        D, BLOCK, LARGE,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    query, key, value, bias,  # bias None: there is none
    output, logsumexp,  # results, contiguous
    query_strides, key_strides, value_strides,  # (batch, z, y, x, head, channel)
    bias_strides,  # (head, y, x)
    images, heads, height, width,
    size_y, size_x, dilation_y, dilation_x, lead_y, lead_x, wrap_y, wrap_x,
    tiles_y, tiles_x,  # windows of the largest residue class
    first_row, rows,  # windows that look alike from above
    steps,  # of a walk
    scale,
    GROUP: tl.constexpr,  # query heads per key head
    TILE: tl.constexpr,  # powers of two that hold a window
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    head, y, x, present, part, first, stop, rows = place(
        tl.program_id(0), images, heads,
        (height, size_y, dilation_y, lead_y, wrap_y), (width, size_x, dilation_x, lead_x, wrap_x),
        tiles_y, tiles_x, first_row, rows, steps, TILE,
    )  # fmt: skip
    added = bias_tile(bias, bias_strides, head, part, present, size_y, size_x, TILE)
    output_strides = contiguous(height, width, heads, VALUE_D, LARGE)
    row_strides = contiguous(height, width, heads, 1, LARGE)
    for step in range(first, stop):
        image = step // rows
        row = (step - image * rows) * (size_y * dilation_y)
        q = load_window(query, query_strides, image, row, head, y, x, present, D, BLOCK_D, LARGE)
        k = load_window(
            key, key_strides, image, row, head // GROUP, y, x, present, D, BLOCK_D, LARGE
        )
        v = load_window(
            value, value_strides, image, row, head // GROUP, y, x, present,
            VALUE_D, BLOCK_VALUE_D, LARGE,
        )  # fmt: skip
        scores = dot(q, tl.trans(k), None, PRECISION, UPCAST) * (scale * LOG2E) + added
        # Finite where there is no query, whose row is -inf.
        maximum = tl.maximum(tl.max(scores, 1), -1e30)
        weights = tl.exp2(scores - maximum[:, None])
        total = tl.where(present, tl.sum(weights, 1), 1.0)
        tokens = dot(weights.to(v.dtype), v, None, PRECISION, UPCAST) * (1 / total)[:, None]
        store_window(
            output, output_strides, image, row, head, y, x, present, tokens,
            VALUE_D, BLOCK_VALUE_D, LARGE,
        )  # fmt: skip
        store_rows(
            logsumexp, row_strides, image, head, (y * 0, y + row, x), present,
            (0, 0, 0), (1, 1, 1), maximum + tl.log2(total), LARGE,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    query, key, value, bias, logsumexp, grad_output,
    grad_query, grad_key, grad_value,  # results, contiguous
    partial_sums,  # of the gradient of the bias: (programs, tile, tile); None: it needs none
    query_strides, key_strides, value_strides, grad_output_strides, bias_strides,
    images, heads, height, width,  # arguments as those of forward_kernel
    size_y, size_x, dilation_y, dilation_x, lead_y, lead_x, wrap_y, wrap_x,
    tiles_y, tiles_x, first_row, rows, steps,
    scale,
    TILE: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = TILE[0] * TILE[1]
    program = tl.program_id(0)
    head, y, x, present, part, first, stop, rows = place(
        program, images, heads,
        (height, size_y, dilation_y, lead_y, wrap_y), (width, size_x, dilation_x, lead_x, wrap_x),
        tiles_y, tiles_x, first_row, rows, steps, TILE,
    )  # fmt: skip
    added = bias_tile(bias, bias_strides, head, part, present, size_y, size_x, TILE)
    strides = contiguous(height, width, heads, D, LARGE)
    value_grad_strides = contiguous(height, width, heads, VALUE_D, LARGE)
    row_strides = contiguous(height, width, heads, 1, LARGE)
    if partial_sums is not None:
        sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(first, stop):
        image = step // rows
        row = (step - image * rows) * (size_y * dilation_y)
        q = load_window(query, query_strides, image, row, head, y, x, present, D, BLOCK_D, LARGE)
        k = load_window(key, key_strides, image, row, head, y, x, present, D, BLOCK_D, LARGE)
        v = load_window(
            value, value_strides, image, row, head, y, x, present, VALUE_D, BLOCK_VALUE_D, LARGE
        )
        grad = load_window(
            grad_output, grad_output_strides, image, row, head, y, x, present,
            VALUE_D, BLOCK_VALUE_D, LARGE,
        )  # fmt: skip
        row_logsumexp = load_rows(
            logsumexp, row_strides, image, head, (y * 0, y + row, x), present,
            (0, 0, 0), (1, 1, 1), float("inf"), LARGE,
        )  # fmt: skip
        scores = dot(q, tl.trans(k), None, PRECISION, UPCAST) * (scale * LOG2E) + added
        weights = tl.exp2(scores - row_logsumexp[:, None])
        grad_value_tokens = dot(tl.trans(weights.to(grad.dtype)), grad, None, PRECISION, UPCAST)
        store_window(
            grad_value, value_grad_strides, image, row, head, y, x, present, grad_value_tokens,
            VALUE_D, BLOCK_VALUE_D, LARGE,
        )  # fmt: skip
        # The sum of grad_output * output over channels is that of the products over keys.
        products = weights * dot(grad, tl.trans(v), None, PRECISION, UPCAST)
        grad_scores = products - weights * tl.sum(products, 1)[:, None]
        if partial_sums is not None:
            sums += grad_scores
        grad_scores = grad_scores.to(q.dtype)
        tokens = dot(grad_scores, k, None, PRECISION, UPCAST) * scale
        store_window(
            grad_query, strides, image, row, head, y, x, present, tokens, D, BLOCK_D, LARGE
        )
        tokens = dot(tl.trans(grad_scores), q, None, PRECISION, UPCAST) * scale
        store_window(grad_key, strides, image, row, head, y, x, present, tokens, D, BLOCK_D, LARGE)
    if partial_sums is not None:
        index = tl.arange(0, BLOCK)
        target = partial_sums + program.to(tl.int64) * (BLOCK * BLOCK)
        tl.store(target + index[:, None] * BLOCK + index[None, :], sums)
