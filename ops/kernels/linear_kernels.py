"""Kernels of linear attention, forward and backward: sums over tokens, and tokens that read them.

A state is a row of D * VALUE_D + D + VALUE_D float32 numbers for an image and a head: S = sum
phi(k) v^T, z = sum phi(k), u = sum v. Heads wider than STEP channels fall apart into blocks of S,
one for every program. Sums over tokens are split into parts that are added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.common import LOG2E, dot
from vitarium.ops.kernels.rows import load_numbers, store_numbers

# What varies with the map: values for which nothing is compiled anew.
SIZES = ["tokens", "length", "parts", "heads", "state_heads", "count"]

# What a map of features is called here.
IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
ELU = tl.constexpr(3)

# What is read from a state; PLUS is the backward's: the product and a row that is added.
NONE = tl.constexpr(0)
SUM = tl.constexpr(1)
INJECTIVE = tl.constexpr(2)
PLUS = tl.constexpr(3)


@triton.jit
def features(x, MAP: tl.constexpr):
    """phi(x), in float32."""
    x = x.to(tl.float32)
    if MAP == RELU:
        x = tl.maximum(x, 0.0)
    elif MAP == LEAKY_RELU:
        x = tl.where(x > 0, x, 0.01 * x)
    elif MAP == ELU:
        x = tl.where(x > 0, x + 1, tl.exp2(tl.minimum(x, 0.0) * LOG2E))
    return x


@triton.jit
def slopes(x, MAP: tl.constexpr):
    """The derivative of phi at x."""
    x = x.to(tl.float32)
    if MAP == RELU:
        return tl.where(x > 0, 1.0, 0.0)
    elif MAP == LEAKY_RELU:
        return tl.where(x > 0, 1.0, 0.01)
    else:
        return tl.exp2(tl.minimum(x, 0.0) * LOG2E)


@triton.jit
def pointers(view, first, head, token, start, STEP: tl.constexpr, LARGE: tl.constexpr,
             ALIGN: tl.constexpr):  # fmt: skip
    """Pointers (tokens, STEP) to the channels of one head from `start` on; see `rows.vectors`."""
    if LARGE:
        token = token.to(tl.int64)
    base = tl.multiple_of(first.to(tl.int64) * view[1] + head * view[2] + start, ALIGN)
    offset = tl.multiple_of(token * view[1], ALIGN)
    return view[0] + base + (offset[:, None] + tl.arange(0, STEP)[None, :])


@triton.jit
def block_mask(present, start, D: tl.constexpr, STEP: tl.constexpr):
    """Which elements of `pointers` exist."""
    if D % STEP == 0:
        return present[:, None]
    else:
        return present[:, None] & (start + tl.arange(0, STEP) < D)[None, :]


@triton.jit
def load_block(view, first, head, token, present, start, D: tl.constexpr, STEP: tl.constexpr,
               LARGE: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Channels of tokens, zero where there are none."""
    source = pointers(view, first, head, token, start, STEP, LARGE, ALIGN)
    return tl.load(source, mask=block_mask(present, start, D, STEP), other=0.0)


@triton.jit
def store_block(view, first, head, token, present, start, rows, D: tl.constexpr,
                STEP: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Writes what `load_block` reads, in the tensor's dtype."""
    target = pointers(view, first, head, token, start, STEP, LARGE, ALIGN)
    rows = rows.to(view[0].dtype.element_ty)
    tl.store(target, rows, mask=block_mask(present, start, D, STEP))


@triton.jit
def entries(start, D: tl.constexpr, STEP: tl.constexpr):
    """Channels of a block, and which of them exist."""
    channel = start + tl.arange(0, STEP)
    return channel, channel < D


@triton.jit
def load_row(state, start, D: tl.constexpr, STEP: tl.constexpr):
    """A block of z or u, where it begins at `state`."""
    channel, exists = entries(start, D, STEP)
    return tl.load(state + channel, mask=exists, other=0.0)


@triton.jit
def load_matrix(
    state, start, value_start, share, count, MODE: tl.constexpr, D: tl.constexpr,
    VALUE_D: tl.constexpr, STEP_D: tl.constexpr, STEP_VALUE: tl.constexpr,
):  # fmt: skip
    """A block (STEP_D, STEP_VALUE) of what features are multiplied by."""
    channel, exists = entries(start, D, STEP_D)
    value_channel, value_exists = entries(value_start, VALUE_D, STEP_VALUE)
    source = state + (channel[:, None] * VALUE_D + value_channel[None, :])
    block = tl.load(source, mask=exists[:, None] & value_exists[None, :], other=0.0)
    if MODE == INJECTIVE:
        z = load_row(state + D * VALUE_D, start, D, STEP_D)
        u = load_row(state + D * VALUE_D + D, value_start, VALUE_D, STEP_VALUE)
        block -= z[:, None] * (u / count)[None, :]
    return block * share


@triton.jit
def locate(program, blocks, parts, heads):
    """Block, part, head and image of a program; parts of one head follow each other."""
    block = program % blocks
    program = program // blocks
    part = program % parts
    program = program // parts
    return block, part, program % heads, program // heads


@triton.jit(do_not_specialize=SIZES)
def state_kernel(
    key, value,  # views
    inverse, inner,  # (B, N, heads) or None: factors on values, and on features in z
    state,  # (parts, B * heads, D * VALUE_D + D + VALUE_D), contiguous
    tokens, length, parts, heads,
    images,
    MAP: tl.constexpr, BLOCK: tl.constexpr, STEP_D: tl.constexpr, STEP_VALUE: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The state of a part of the tokens."""
    ACROSS: tl.constexpr = BLOCK_VALUE_D // STEP_VALUE
    block, part, head, batch = locate(
        tl.program_id(0), BLOCK_D // STEP_D * ACROSS, parts, heads
    )  # fmt: skip
    start, value_start = block // ACROSS * STEP_D, block % ACROSS * STEP_VALUE
    first = batch.to(tl.int64) * tokens
    product = tl.zeros([STEP_D, STEP_VALUE], tl.float32)
    z = tl.zeros([STEP_D], tl.float32)
    u = tl.zeros([STEP_VALUE], tl.float32)
    for origin in range(part * length, tl.minimum(tokens, part * length + length), BLOCK):
        token = origin + tl.arange(0, BLOCK)
        present = token < tokens
        x = load_block(key, first, head, token, present, start, D, STEP_D, LARGE, ALIGN)
        v = load_block(
            value, first, head, token, present, value_start, VALUE_D, STEP_VALUE, LARGE, ALIGN
        )
        phi = features(x, MAP)
        if MAP == ELU:
            phi = tl.where(present[:, None], phi, 0.0)
        if inner is not None:
            weight = load_numbers(inner, first, heads, head, token, present, 0.0, LARGE)
            z += tl.sum(phi * weight[:, None], 0)
        else:
            z += tl.sum(phi, 0)
        u += tl.sum(v.to(tl.float32), 0)
        if inverse is not None:
            factor = load_numbers(inverse, first, heads, head, token, present, 0.0, LARGE)
            v = (v.to(tl.float32) * factor[:, None]).to(v.dtype)
        product = dot(tl.trans(phi.to(x.dtype)), v, product, PRECISION, UPCAST)

    row = (part * images + batch).to(tl.int64) * heads + head
    state += row * (D * VALUE_D + D + VALUE_D)
    channel, exists = entries(start, D, STEP_D)
    value_channel, value_exists = entries(value_start, VALUE_D, STEP_VALUE)
    target = state + (channel[:, None] * VALUE_D + value_channel[None, :])
    tl.store(target, product, mask=exists[:, None] & value_exists[None, :])
    if value_start == 0:
        tl.store(state + D * VALUE_D + channel, z, mask=exists)
    if start == 0:
        tl.store(state + D * VALUE_D + D + value_channel, u, mask=value_exists)


@triton.jit(do_not_specialize=SIZES)
def read_kernel(
    query, output,  # views
    state,  # (B * state_heads, ...), contiguous
    tokens, length, parts, heads, state_heads,
    count,  # of keys
    share, eps,
    MODE: tl.constexpr, MAP: tl.constexpr, BLOCK: tl.constexpr,
    STEP_D: tl.constexpr, STEP_VALUE: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """What the features of a part of the tokens read from their state."""
    STEPS: tl.constexpr = BLOCK_D // STEP_D
    block, part, head, batch = locate(tl.program_id(0), BLOCK_VALUE_D // STEP_VALUE, parts, heads)
    value_start = block * STEP_VALUE
    first = batch.to(tl.int64) * tokens
    row = batch.to(tl.int64) * state_heads + head // (heads // state_heads)
    state += row * (D * VALUE_D + D + VALUE_D)
    dtype = query[0].dtype.element_ty
    if STEPS == 1:
        matrix = load_matrix(
            state, 0, value_start, share, count, MODE, D, VALUE_D, STEP_D, STEP_VALUE
        ).to(dtype)
        z = load_row(state + D * VALUE_D, 0, D, STEP_D) * share
    u = load_row(state + D * VALUE_D + D, value_start, VALUE_D, STEP_VALUE)
    if MODE == INJECTIVE:
        u = u / count
    for origin in range(part * length, tl.minimum(tokens, part * length + length), BLOCK):
        token = origin + tl.arange(0, BLOCK)
        present = token < tokens
        accumulator = tl.zeros([BLOCK, STEP_VALUE], tl.float32)
        weight = tl.full([BLOCK], 0.0, tl.float32) + eps
        for step in range(STEPS):
            if STEPS > 1:
                matrix = load_matrix(
                    state, step * STEP_D, value_start, share, count, MODE,
                    D, VALUE_D, STEP_D, STEP_VALUE,
                ).to(dtype)  # fmt: skip
                z = load_row(state + D * VALUE_D, step * STEP_D, D, STEP_D) * share
            x = load_block(
                query, first, head, token, present, step * STEP_D, D, STEP_D, LARGE, ALIGN
            )
            phi = features(x, MAP)
            accumulator = dot(phi.to(dtype), matrix, accumulator, PRECISION, UPCAST)
            if MODE == SUM:
                weight += tl.sum(phi * z[None, :], 1)
        if MODE == SUM:
            accumulator = accumulator / tl.where(present, weight, 1.0)[:, None]
        elif MODE != NONE:
            accumulator += u[None, :]
        store_block(
            output, first, head, token, present, value_start, accumulator,
            VALUE_D, STEP_VALUE, LARGE, ALIGN,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    query, rows, output, grad,  # views: features are of query, rows the gradient of the output
    inverse, inner,  # results (B, N, heads) in MODE SUM: see `backward` of the launcher
    state,  # (B * state_heads, ...), contiguous
    tokens, length, parts, heads, state_heads, count, share, eps,
    MODE: tl.constexpr, MAP: tl.constexpr, BLOCK: tl.constexpr,
    STEP_D: tl.constexpr, STEP_VALUE: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The gradient of a part of the tokens whose features read or made a state."""
    block, part, head, batch = locate(tl.program_id(0), BLOCK_D // STEP_D, parts, heads)
    own = block * STEP_D
    first = batch.to(tl.int64) * tokens
    row = batch.to(tl.int64) * state_heads + head // (heads // state_heads)
    state += row * (D * VALUE_D + D + VALUE_D)
    dtype = query[0].dtype.element_ty
    VALUE_STEPS: tl.constexpr = BLOCK_VALUE_D // STEP_VALUE
    if VALUE_STEPS == 1:
        matrix = load_matrix(
            state, own, 0, share, count, MODE, D, VALUE_D, STEP_D, STEP_VALUE
        ).to(dtype)  # fmt: skip
    z = load_row(state + D * VALUE_D, own, D, STEP_D) * share
    for origin in range(part * length, tl.minimum(tokens, part * length + length), BLOCK):
        token = origin + tl.arange(0, BLOCK)
        present = token < tokens
        accumulator = tl.zeros([BLOCK, STEP_D], tl.float32)
        product = tl.zeros([BLOCK], tl.float32)
        for step in range(VALUE_STEPS):
            if VALUE_STEPS > 1:
                matrix = load_matrix(
                    state, own, step * STEP_VALUE, share, count, MODE,
                    D, VALUE_D, STEP_D, STEP_VALUE,
                ).to(dtype)  # fmt: skip
            g = load_block(
                rows, first, head, token, present, step * STEP_VALUE, VALUE_D, STEP_VALUE, LARGE,
                ALIGN,
            )  # fmt: skip
            accumulator = dot(g, tl.trans(matrix), accumulator, PRECISION, UPCAST)
            if MODE == SUM:
                out = load_block(
                    output, first, head, token, present, step * STEP_VALUE, VALUE_D, STEP_VALUE,
                    LARGE, ALIGN,
                )  # fmt: skip
                product += tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
        x = load_block(query, first, head, token, present, own, D, STEP_D, LARGE, ALIGN)
        if MODE == SUM:
            if BLOCK_D == STEP_D:
                weight = tl.sum(features(x, MAP) * z[None, :], 1)
            else:
                weight = tl.zeros([BLOCK], tl.float32)
                for step in range(BLOCK_D // STEP_D):
                    other = load_block(
                        query, first, head, token, present, step * STEP_D, D, STEP_D, LARGE, ALIGN
                    )
                    z_other = load_row(state + D * VALUE_D, step * STEP_D, D, STEP_D) * share
                    weight += tl.sum(features(other, MAP) * z_other[None, :], 1)
            reciprocal = 1.0 / tl.where(present, weight + eps, 1.0)
            product = -product * reciprocal
            accumulator = accumulator * reciprocal[:, None] + product[:, None] * z[None, :]
            if own == 0:
                store_numbers(inverse, first, heads, head, token, present, reciprocal, LARGE)
                store_numbers(inner, first, heads, head, token, present, product, LARGE)
        elif MODE == PLUS:
            accumulator += z[None, :]
        if MAP != IDENTITY:
            accumulator *= slopes(x, MAP)
        store_block(
            grad, first, head, token, present, own, accumulator, D, STEP_D, LARGE, ALIGN
        )  # fmt: skip
