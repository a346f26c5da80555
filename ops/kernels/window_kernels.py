"""Window attention whose windows fit one tile: their tokens are queries and keys of one product.

A program takes one window of a head, or a patch of several tiny ones, and walks over the images
and, where they look alike, over the windows above each other. What depends on the place in the
window only, the relative position bias and the mask, stays in registers meanwhile; the softmax is
done in one step. No kernel has atomics, so runs are bit-equal.

Along an axis, window number t holds the positions t * size - lead ... of a residue class modulo
the dilation. Before the axis there are none: as by the cyclic shift of Swin (Liu et al., arXiv
2103.14030) window 0 holds the last ones in their place, if they fit, which `wrap` positions on are.
The tokens of either end do not see each other.

A patch of tiny windows is a window to all but the mask: `size` is the patch's, and its tokens are
in as many parts as it has windows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.common import (
    LOG2E,
    channel_offsets,
    dot,
)
from vitarium.ops.kernels.patterns import inside

# Numbers that come with the map: none of them makes Triton compile again.
VARYING = [
    "images", "heads", "height", "width", "size_y", "size_x", "window_y", "window_x",
    "lead_y", "lead_x", "wrap_y", "wrap_x", "tiles_x", "first_row", "rows", "steps",
]  # fmt: skip
DILATIONS = ["dilation_y", "dilation_x"]  # 1 is worth a kernel of its own


@triton.jit
def axis_tokens(tile, index, residue, axis, SHIFTED: tl.constexpr, PATCH: tl.constexpr):
    """Tokens number `index` of a window, whether they exist, and their part of the window.

    Parts are the windows of a patch; from each other differ those at the far end of the axis.
    """
    length, size, dilation, lead, wrap, window = axis
    position = tile * size - lead + index
    part = index * 0
    if SHIFTED:
        part = (position < 0).to(tl.int32)
        position += part * wrap
    if PATCH:
        part += index // window * 2
    token = position * dilation + residue
    return token, inside(token, 0, length) & (index < size), part


@triton.jit
def place(
    program, images, heads, y_axis, x_axis, tiles_x, first_row, rows, steps,
    SHIFTED: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What a program computes: which windows it walks over, and what holds for all of them.

    The windows number first_row ... first_row + rows - 1 from above look alike: a walk goes down
    over them in one image. For every other one a walk goes over images.

    Returns:
        head; the walk as (first image, windows above the first, number of steps, whether they go
        down); tokens along y and along x of the uppermost window, and which exist; their part of
        the window, the tokens that see each other: there are up to four if it is wrapped.
    """
    head = program % heads
    program = program // heads
    x_tile = program % tiles_x
    program = program // tiles_x
    x_residue = program % x_axis[2]
    program = program // x_axis[2]
    y_residue = program % y_axis[2]
    walk = program // y_axis[2]
    each = tl.cdiv(rows, steps)
    down = walk < images * each
    each = tl.where(down, each, tl.cdiv(images, steps))
    walk = tl.where(down, walk, walk - images * tl.cdiv(rows, steps))
    first = walk % each * steps
    walk = walk // each
    image = tl.where(down, walk, first)
    y_tile = tl.where(down, first_row, walk + tl.where(walk < first_row, 0, rows))
    count = tl.minimum(tl.where(down, rows, images) - first, steps)
    index = tl.arange(0, BLOCK)
    y, y_exists, y_part = axis_tokens(y_tile, index // COLUMNS, y_residue, y_axis, SHIFTED, PATCH)
    x, x_exists, x_part = axis_tokens(x_tile, index % COLUMNS, x_residue, x_axis, SHIFTED, PATCH)
    row = tl.where(down, first, 0)
    return head, (image, row, count, down), y, x, y_exists & x_exists, y_part * 256 + x_part


@triton.jit
def begin(strides, head, walk, y_axis):
    """Offset of a head where a walk begins, and how far the next step is."""
    image, row, _, down = walk
    down_step = (y_axis[1] * y_axis[2]).to(tl.int64) * strides[2]
    offset = image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[4] + row * down_step
    return offset, tl.where(down, down_step, strides[0])


@triton.jit
def offsets(y, x, strides, BLOCK: tl.constexpr, LARGE: tl.constexpr):
    """Offsets of the channels of tokens from where the head of an image begins, (tokens, BLOCK)."""
    if LARGE:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    return (y * strides[2] + x * strides[3])[:, None] + channel_offsets(strides, BLOCK, LARGE)


@triton.jit
def bias_tile(
    bias, strides, head, part, present, window_y, window_x, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """What is added to base-2 scores, (queries, keys): -inf where they do not see each other."""
    seen = part[:, None] == tl.where(present, part, -1)[None, :]
    if bias is not None:
        index = tl.arange(0, BLOCK)
        key = index // COLUMNS * strides[1] + index % COLUMNS * strides[2]
        query = key - (window_y - 1) * strides[1] - (window_x - 1) * strides[2]
        query = tl.where(present, query, 0)  # no entries before the table
        entries = bias + (head.to(tl.int64) * strides[0] + (key[None, :] - query[:, None]))
        tile = tl.load(entries, mask=seen, other=float("-inf")).to(tl.float32) * LOG2E
    else:
        tile = tl.where(seen, 0.0, float("-inf"))
    return tile


@triton.jit
def row_strides(height, width, heads, LARGE: tl.constexpr):
    """Strides of a contiguous tensor (batch, 0, y, x, head, 1); those of maps are multiples."""
    if LARGE:
        width = width.to(tl.int64)
    return height.to(tl.int64) * width * heads, 0, width * heads, heads, 1, 0


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=DILATIONS)
def forward_kernel(
    query, key, value, bias,  # bias None: there is none
    output, logsumexp,  # results, contiguous
    query_strides, key_strides, value_strides,  # (batch, z, y, x, head, channel)
    bias_strides,  # (head, y, x)
    images, heads, height, width,
    size_y, size_x, window_y, window_x,  # tokens of a window, or of a patch and of its windows
    dilation_y, dilation_x, lead_y, lead_x, wrap_y, wrap_x,
    tiles_x,  # windows in a row of the largest residue class
    first_row, rows,  # windows that look alike from above
    steps,  # of a walk, at most
    scale,
    GROUP: tl.constexpr,  # query heads per key head
    SHIFTED: tl.constexpr,  # windows begin before the axis
    PATCH: tl.constexpr,  # of tiny windows
    BLOCK: tl.constexpr,  # tokens of a tile
    COLUMNS: tl.constexpr,  # tokens of its rows, at least size_x
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    y_axis = (height, size_y, dilation_y, lead_y, wrap_y, window_y)
    x_axis = (width, size_x, dilation_x, lead_x, wrap_x, window_x)
    head, walk, y, x, present, part = place(
        tl.program_id(0), images, heads, y_axis, x_axis, tiles_x, first_row, rows, steps,
        SHIFTED, PATCH, BLOCK, COLUMNS,
    )  # fmt: skip
    added = bias_tile(bias, bias_strides, head, part, present, window_y, window_x, BLOCK, COLUMNS)
    strides = row_strides(height, width, heads, LARGE)
    row, row_step = begin(strides, head, walk, y_axis)
    query_at, query_step = begin(query_strides, head, walk, y_axis)
    key_at, key_step = begin(key_strides, head // GROUP, walk, y_axis)
    value_at, value_step = begin(value_strides, head // GROUP, walk, y_axis)
    rows = offsets(y, x, strides, 1, LARGE)
    query_offsets = offsets(y, x, query_strides, BLOCK_D, LARGE)
    key_offsets = offsets(y, x, key_strides, BLOCK_D, LARGE)
    value_offsets = offsets(y, x, value_strides, BLOCK_VALUE_D, LARGE)
    output_offsets = rows * VALUE_D + tl.arange(0, BLOCK_VALUE_D)[None, :]
    mask = present[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    value_mask = present[:, None] & (tl.arange(0, BLOCK_VALUE_D) < VALUE_D)[None, :]
    for _ in range(walk[2]):
        q = tl.load(query + query_at + query_offsets, mask=mask, other=0.0)
        k = tl.load(key + key_at + key_offsets, mask=mask, other=0.0)
        v = tl.load(value + value_at + value_offsets, mask=value_mask, other=0.0)
        scores = dot(q, tl.trans(k), None, PRECISION, UPCAST) * (scale * LOG2E) + added
        # Finite where there is no query, whose row is -inf.
        maximum = tl.maximum(tl.max(scores, 1), -1e30)
        weights = tl.exp2(scores - maximum[:, None])
        total = tl.where(present, tl.sum(weights, 1), 1.0)
        tokens = dot(weights.to(v.dtype), v, None, PRECISION, UPCAST) * (1 / total)[:, None]
        tl.store(
            output + row * VALUE_D + output_offsets,
            tokens.to(output.dtype.element_ty), mask=value_mask,
        )  # fmt: skip
        tl.store(logsumexp + row + rows, (maximum + tl.log2(total))[:, None], mask=present[:, None])
        row += row_step
        query_at += query_step
        key_at += key_step
        value_at += value_step


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=DILATIONS)
def backward_kernel(
    query, key, value, bias, logsumexp, grad_output,
    grad_query, grad_key, grad_value,  # results, contiguous
    partial_sums,  # of the gradient of the bias: (programs, tile, tile); None: it needs none
    query_strides, key_strides, value_strides, grad_output_strides, bias_strides,
    images, heads, height, width,  # arguments as those of forward_kernel
    size_y, size_x, window_y, window_x,  # tokens of a window, or of a patch and of its windows
    dilation_y, dilation_x, lead_y, lead_x, wrap_y, wrap_x,
    tiles_x, first_row, rows, steps,
    scale,
    SHIFTED: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    y_axis = (height, size_y, dilation_y, lead_y, wrap_y, window_y)
    x_axis = (width, size_x, dilation_x, lead_x, wrap_x, window_x)
    head, walk, y, x, present, part = place(
        program, images, heads, y_axis, x_axis, tiles_x, first_row, rows, steps,
        SHIFTED, PATCH, BLOCK, COLUMNS,
    )  # fmt: skip
    added = bias_tile(bias, bias_strides, head, part, present, window_y, window_x, BLOCK, COLUMNS)
    strides = row_strides(height, width, heads, LARGE)
    row, row_step = begin(strides, head, walk, y_axis)
    query_at, query_step = begin(query_strides, head, walk, y_axis)
    key_at, key_step = begin(key_strides, head, walk, y_axis)
    value_at, value_step = begin(value_strides, head, walk, y_axis)
    output_at, output_step = begin(grad_output_strides, head, walk, y_axis)
    rows = offsets(y, x, strides, 1, LARGE)
    query_offsets = offsets(y, x, query_strides, BLOCK_D, LARGE)
    key_offsets = offsets(y, x, key_strides, BLOCK_D, LARGE)
    value_offsets = offsets(y, x, value_strides, BLOCK_VALUE_D, LARGE)
    output_offsets = offsets(y, x, grad_output_strides, BLOCK_VALUE_D, LARGE)
    grad_offsets = rows * D + tl.arange(0, BLOCK_D)[None, :]
    grad_value_offsets = rows * VALUE_D + tl.arange(0, BLOCK_VALUE_D)[None, :]
    mask = present[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    value_mask = present[:, None] & (tl.arange(0, BLOCK_VALUE_D) < VALUE_D)[None, :]
    if partial_sums is not None:
        sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for _ in range(walk[2]):
        q = tl.load(query + query_at + query_offsets, mask=mask, other=0.0)
        k = tl.load(key + key_at + key_offsets, mask=mask, other=0.0)
        row_logsumexp = tl.load(logsumexp + row + rows, mask=present[:, None], other=float("inf"))
        scores = dot(q, tl.trans(k), None, PRECISION, UPCAST) * (scale * LOG2E) + added
        weights = tl.exp2(scores - row_logsumexp)
        # Loaded where they are needed: held longer, they would cost the registers of the product.
        grad = tl.load(grad_output + output_at + output_offsets, mask=value_mask, other=0.0)
        tokens = dot(tl.trans(weights.to(grad.dtype)), grad, None, PRECISION, UPCAST)
        tl.store(
            grad_value + row * VALUE_D + grad_value_offsets,
            tokens.to(grad_value.dtype.element_ty),
            mask=value_mask,
        )
        v = tl.load(value + value_at + value_offsets, mask=value_mask, other=0.0)
        # The sum of grad_output * output over channels is that of the products over keys.
        products = weights * dot(grad, tl.trans(v), None, PRECISION, UPCAST)
        grad_scores = products - weights * tl.sum(products, 1)[:, None]
        if partial_sums is not None:
            sums += grad_scores
        grad_scores = grad_scores.to(q.dtype)
        tokens = dot(grad_scores, k, None, PRECISION, UPCAST) * scale
        tl.store(
            grad_query + row * D + grad_offsets, tokens.to(grad_query.dtype.element_ty), mask=mask
        )
        tokens = dot(tl.trans(grad_scores), q, None, PRECISION, UPCAST) * scale
        tl.store(grad_key + row * D + grad_offsets, tokens.to(grad_key.dtype.element_ty), mask=mask)
        row += row_step
        query_at += query_step
        key_at += key_step
        value_at += value_step
        output_at += output_step
    if partial_sums is not None:
        index = tl.arange(0, BLOCK)
        target = partial_sums + program.to(tl.int64) * (BLOCK * BLOCK)
        tl.store(target + index[:, None] * BLOCK + index[None, :], sums)
