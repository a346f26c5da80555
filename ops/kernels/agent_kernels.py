"""Agent attention with all agents of a head in one tile, which a program keeps on the chip.

- `gather_kernel`: agents attend to a stretch of the keys, in one walk with the online softmax.
- `read_kernel`: joins what the stretches gave, once per program, and lets a stretch of the queries
  read from it; a softmax is done in one step.
- `read_backward_kernel` and `gather_backward_kernel` do either stage backwards in one walk: what is
  of a token is written, what is of agents is summed on the chip, and the launcher adds the sums of
  the stretches. No kernel has atomics, so runs are bit-equal.

Scores are base-2 logarithms, and rows of a tile are tokens in the last three kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitarium.ops.kernels.common import LOG2E, dot, softmax_step
from vitarium.ops.kernels.rows import load_numbers, load_vectors, store_numbers, store_vectors

SIZES = ["tokens", "agents", "heads", "parts", "steps", "stretches"]  # that come with the map


@triton.jit
def place(program, heads, parts):
    """Head, number of the stretch, and image of a program; heads share lines of memory."""
    head = program % heads
    program = program // heads
    return head, program % parts, (program // parts).to(tl.int64)


@triton.jit
def add_bias(scores, bias, strides, head, row, column, exists):
    """Scores with their bias, -inf where the pair of row and column does not exist."""
    if bias is not None:
        entries = bias + head.to(tl.int64) * strides[0] + (row * strides[1] + column * strides[2])
        return scores + tl.load(entries, mask=exists, other=float("-inf")).to(tl.float32) * LOG2E
    else:
        return tl.where(exists, scores, float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def gather_kernel(
    key, value, agent,  # views
    bias, bias_strides,  # (heads, agents, tokens) or None
    sums, lengths,  # results of the stretch: attention, and the log-sum-exp of its scores
    tokens, agents, heads,
    parts, steps,  # stretches of an image, and tiles of a stretch
    scale,
    BLOCK: tl.constexpr, AGENTS: tl.constexpr,  # tokens and agents of a tile
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    head, part, image = place(tl.program_id(0), heads, parts)
    index = tl.arange(0, AGENTS)
    is_agent = index < agents
    a = load_vectors(agent, image * agents, head, index, is_agent, D, BLOCK_D, LARGE, ALIGN)
    maximum = tl.full([AGENTS], -1e30, tl.float32)
    total = tl.zeros([AGENTS], tl.float32)
    accumulator = tl.zeros([AGENTS, BLOCK_VALUE_D], tl.float32)
    for step in range(steps):
        token = (part * steps + step) * BLOCK + tl.arange(0, BLOCK)
        exists = token < tokens
        k = load_vectors(key, image * tokens, head, token, exists, D, BLOCK_D, LARGE, ALIGN)
        v = load_vectors(
            value, image * tokens, head, token, exists, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN
        )
        scores = dot(a, tl.trans(k), None, PRECISION, UPCAST) * (scale * LOG2E)
        scores = add_bias(
            scores, bias, bias_strides, head, index[:, None], token[None, :],
            is_agent[:, None] & exists[None, :],
        )  # fmt: skip
        maximum, total, accumulator = softmax_step(
            scores, v, maximum, total, accumulator, 1.0, PRECISION, UPCAST
        )
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    first = (image * parts + part) * agents
    store_vectors(
        sums, first, head, index, is_agent, accumulator * (1 / total)[:, None],
        VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN,
    )  # fmt: skip
    lengths_row = tl.where(sees, maximum + tl.log2(total), -1e30)
    store_numbers(lengths, first, heads, head, index, is_agent, lengths_row, LARGE)


@triton.jit
def join(
    sums, lengths, image, head, heads, agents, index, is_agent, stretches,
    AGENTS: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Attention over all stretches, and the log-sum-exp of its scores."""
    maximum = tl.full([AGENTS], -1e30, tl.float32)
    total = tl.zeros([AGENTS], tl.float32)
    accumulator = tl.zeros([AGENTS, BLOCK_VALUE_D], tl.float32)
    for stretch in range(stretches):
        first = (image * stretches + stretch) * agents
        length = load_numbers(lengths, first, heads, head, index, is_agent, 0.0, LARGE)
        part = load_vectors(
            sums, first, head, index, is_agent, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN
        )
        new_maximum = tl.maximum(maximum, length)
        decay = tl.exp2(maximum - new_maximum)
        weight = tl.exp2(length - new_maximum)
        total = total * decay + weight
        accumulator = accumulator * decay[:, None] + part * weight[:, None]
        maximum = new_maximum
    return accumulator * (1 / total)[:, None], maximum + tl.log2(total)


@triton.jit(do_not_specialize=SIZES)
def read_kernel(
    query, agent, bias, bias_strides,  # the bias is (heads, tokens, agents)
    sums, lengths,  # what gather_kernel gave for all stretches
    values, gathered,  # results: agent values, and the log-sum-exp of their scores
    output, logsumexp,  # results
    tokens, agents, heads, parts, steps,
    stretches,  # of keys
    scale,
    BLOCK: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    head, part, image = place(tl.program_id(0), heads, parts)
    index = tl.arange(0, AGENTS)
    is_agent = index < agents
    a = load_vectors(agent, image * agents, head, index, is_agent, D, BLOCK_D, LARGE, ALIGN)
    joined, lengths_row = join(
        sums, lengths, image, head, heads, agents, index, is_agent, stretches,
        AGENTS, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN,
    )  # fmt: skip
    v = joined.to(a.dtype)
    if part == 0:
        store_vectors(
            values, image * agents, head, index, is_agent, v, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN
        )
        store_numbers(gathered, image * agents, heads, head, index, is_agent, lengths_row, LARGE)
    for step in range(steps):
        token = (part * steps + step) * BLOCK + tl.arange(0, BLOCK)
        exists = token < tokens
        q = load_vectors(query, image * tokens, head, token, exists, D, BLOCK_D, LARGE, ALIGN)
        scores = dot(q, tl.trans(a), None, PRECISION, UPCAST) * (scale * LOG2E)
        scores = add_bias(
            scores, bias, bias_strides, head, token[:, None], index[None, :],
            exists[:, None] & is_agent[None, :],
        )  # fmt: skip
        maximum = tl.maximum(tl.max(scores, 1), -1e30)
        weights = tl.exp2(scores - maximum[:, None])
        total = tl.where(exists, tl.sum(weights, 1), 1.0)
        rows = dot(weights.to(v.dtype), v, None, PRECISION, UPCAST) * (1 / total)[:, None]
        store_vectors(
            output, image * tokens, head, token, exists, rows, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN
        )
        store_numbers(
            logsumexp, image * tokens, heads, head, token, exists, maximum + tl.log2(total), LARGE
        )


@triton.jit(do_not_specialize=SIZES)
def read_backward_kernel(
    query, agent, values, grad_output, bias, bias_strides, logsumexp,
    grad_query, delta,  # results; delta is the sum of weights times their gradients
    agent_sums, value_sums,  # results of the stretch: gradients of agents and their values
    tokens, agents, heads, parts, steps, scale,
    BLOCK: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    head, part, image = place(tl.program_id(0), heads, parts)
    index = tl.arange(0, AGENTS)
    is_agent = index < agents
    a = load_vectors(agent, image * agents, head, index, is_agent, D, BLOCK_D, LARGE, ALIGN)
    v = load_vectors(
        values, image * agents, head, index, is_agent, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN
    )
    agent_total = tl.zeros([AGENTS, BLOCK_D], tl.float32)
    value_total = tl.zeros([AGENTS, BLOCK_VALUE_D], tl.float32)
    for step in range(steps):
        token = (part * steps + step) * BLOCK + tl.arange(0, BLOCK)
        exists = token < tokens
        q = load_vectors(query, image * tokens, head, token, exists, D, BLOCK_D, LARGE, ALIGN)
        grad = load_vectors(
            grad_output, image * tokens, head, token, exists, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN
        )
        row = load_numbers(
            logsumexp, image * tokens, heads, head, token, exists, float("inf"), LARGE
        )
        scores = dot(q, tl.trans(a), None, PRECISION, UPCAST) * (scale * LOG2E)
        scores = add_bias(
            scores, bias, bias_strides, head, token[:, None], index[None, :],
            exists[:, None] & is_agent[None, :],
        )  # fmt: skip
        weights = tl.exp2(scores - row[:, None])
        value_total = dot(tl.trans(weights.to(grad.dtype)), grad, value_total, PRECISION, UPCAST)
        products = weights * dot(grad, tl.trans(v), None, PRECISION, UPCAST)
        sums = tl.sum(products, 1)
        store_numbers(delta, image * tokens, heads, head, token, exists, sums, LARGE)
        grad_scores = (products - weights * sums[:, None]).to(q.dtype)
        rows = dot(grad_scores, a, None, PRECISION, UPCAST) * scale
        store_vectors(
            grad_query, image * tokens, head, token, exists, rows, D, BLOCK_D, LARGE, ALIGN
        )
        agent_total = dot(tl.trans(grad_scores), q, agent_total, PRECISION, UPCAST)
    first = (image * parts + part) * agents
    store_vectors(
        agent_sums, first, head, index, is_agent, agent_total * scale, D, BLOCK_D, LARGE, ALIGN
    )
    store_vectors(
        value_sums, first, head, index, is_agent, value_total,
        VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def gather_backward_kernel(
    key, value, agent, grad_values,  # the last are gradients of agent values
    bias, bias_strides,  # (heads, agents, tokens)
    gathered, delta,  # of agents
    grad_key, grad_value,  # results
    agent_sums,  # result of the stretch: gradients of agents
    tokens, agents, heads, parts, steps, scale,
    BLOCK: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    head, part, image = place(tl.program_id(0), heads, parts)
    index = tl.arange(0, AGENTS)
    is_agent = index < agents
    a = load_vectors(agent, image * agents, head, index, is_agent, D, BLOCK_D, LARGE, ALIGN)
    grad = load_vectors(
        grad_values, image * agents, head, index, is_agent, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN
    )
    length = load_numbers(
        gathered, image * agents, heads, head, index, is_agent, float("inf"), LARGE
    )
    sums = load_numbers(delta, image * agents, heads, head, index, is_agent, 0.0, LARGE)
    agent_total = tl.zeros([AGENTS, BLOCK_D], tl.float32)
    for step in range(steps):
        token = (part * steps + step) * BLOCK + tl.arange(0, BLOCK)
        exists = token < tokens
        k = load_vectors(key, image * tokens, head, token, exists, D, BLOCK_D, LARGE, ALIGN)
        v = load_vectors(
            value, image * tokens, head, token, exists, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN
        )
        scores = dot(k, tl.trans(a), None, PRECISION, UPCAST) * (scale * LOG2E)
        scores = add_bias(
            scores, bias, bias_strides, head, index[None, :], token[:, None],
            exists[:, None] & is_agent[None, :],
        )  # fmt: skip
        weights = tl.exp2(scores - length[None, :])
        grad_weights = dot(v, tl.trans(grad), None, PRECISION, UPCAST)
        grad_scores = (weights * (grad_weights - sums[None, :])).to(k.dtype)
        rows = dot(weights.to(grad.dtype), grad, None, PRECISION, UPCAST)
        store_vectors(
            grad_value, image * tokens, head, token, exists, rows,
            VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN,
        )  # fmt: skip
        rows = dot(grad_scores, a, None, PRECISION, UPCAST) * scale
        store_vectors(grad_key, image * tokens, head, token, exists, rows, D, BLOCK_D, LARGE, ALIGN)
        agent_total = dot(tl.trans(grad_scores), k, agent_total, PRECISION, UPCAST)
    store_vectors(
        agent_sums, (image * parts + part) * agents, head, index, is_agent, agent_total * scale,
        D, BLOCK_D, LARGE, ALIGN,
    )  # fmt: skip
