"""Dense attention on ordinary tensor operations: the portable path, forward and backward.

Two ways, chosen by `way`. PyTorch's fused attention for CPUs is the fastest in float32 with equal
widths; it has no gradient of the bias and is slow in half precision. All else is batched matrix
products on chunks of images, heads and queries, whose scores stay in cache. No more than one chunk
of scores exists at a time, except for short sequences and small batches in training, whose weights
are kept.

With `active`, the queries that a head skips are left out: the others of every image and head are
packed one after another, and all products are as much smaller.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitarium.ops.dense_chunks import (
    Chunk,
    Packing,
    Scores,
    chunks,
    contiguous,
    four_dimensions,
    kept_weights,
)
from vitarium.ops.workspace import Workspace

# Training keeps weights of short sequences, by scores of one head, and of small batches.
WEIGHTS_KEPT = 1 << 16
WEIGHTS_KEPT_BYTES = 1 << 25
# Leaving out queries is faster from so many scores of one head, and up to such a share of queries
# that are left; the rows of a bias must be gathered, too.
PACKING_PAYS = 1 << 17
PACKED_SHARE = 0.85
PACKED_SHARE_WITH_BIAS = 0.75

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def tokens(x: Tensor) -> int:
    """Number of tokens of `(B, *spatial, heads, channels)`."""
    return math.prod(x.shape[1:-2])


def flat(x: Tensor) -> Tensor:
    """`(B, *spatial, heads, channels)` as `(B, heads, tokens, channels)`."""
    return (x if x.dim() == 4 else x.flatten(1, -3)).transpose(1, 2)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """`(B, heads_kv, ...)` with every head as often as it takes for `heads`."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def packing_pays(query: Tensor, key: Tensor) -> bool:
    """Whether leaving out queries is faster than computing them all."""
    return tokens(query) * tokens(key) > PACKING_PAYS


def flash_serves(
    query: Tensor, value: Tensor, bias: Tensor | None, active: Tensor | None, is_causal: bool
) -> bool:
    """Whether PyTorch's fused attention for CPUs computes this, and is the fastest to do so."""
    return (
        query.dtype == torch.float32
        and query.shape[-1] == value.shape[-1]
        and query.device.type == "cpu"
        and not (is_causal and (bias is not None or active is not None))
    )


def way(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    active: Tensor | None,
    is_causal: bool,
    training: bool,
) -> str:
    """How the forward computes this call: "nothing", "flash", "products" or "kept".

    "kept" is "products" that returns the weights for the backward.
    """
    scores = tokens(query) * tokens(key)
    if query.shape[0] * scores == 0:
        return "nothing"
    if flash_serves(query, value, bias, active, is_causal):
        return "flash"
    size = query.shape[0] * query.shape[-2] * scores * query.element_size()
    if training and (scores <= WEIGHTS_KEPT or size <= WEIGHTS_KEPT_BYTES):
        return "kept"
    return "products"


def saved_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    active: Tensor | None,
    is_causal: bool,
    training: bool,
    room: int = 0,
) -> tuple[int, ...]:
    """Shape of what `forward` returns for the backward, a float32 tensor."""
    chosen = way(query, key, value, bias, active, is_causal, training)
    return (room + _saved_size(chosen, query, key),)


def output_room(query: Tensor, value: Tensor) -> int:
    """Elements of float32 that hold the output bit for bit, and keep what follows aligned."""
    count = math.prod(query.shape[:-1]) * value.shape[-1] * query.element_size()
    return -(-count // 64) * 16


def kept_output(saved: Tensor, output: Tensor) -> Tensor:
    """Where `saved` has room for the output, a view."""
    return saved.view(output.dtype)[: output.numel()].view(output.shape)


def _saved_size(chosen: str, query: Tensor, key: Tensor) -> int:
    """Elements of float32 that the backward wants, where the forward goes the way `chosen`."""
    if chosen not in ("flash", "kept"):
        return 0
    rows = query.shape[0] * tokens(query) * query.shape[-2]
    if chosen == "flash":  # natural log-sum-exp `(B, tokens, heads)`
        return rows
    return -(-rows * tokens(key) * query.element_size() // 4)  # weights, bit for bit


# --- forward -------------------------------------------------------------------------------------


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    active: Tensor | None,
    is_causal: bool,
    scale: float,
    training: bool,
    room: int = 0,
) -> tuple[Tensor, Tensor]:
    """Output `(B, *spatial, num_heads, value_dim)` and what the backward wants, see `saved_shape`.

    Args:
        query, key, value, bias, is_causal, scale: as `vitarium.ops.attention` takes them.
        active: None or bool `(B, *spatial, num_heads)`; where false, the output is 0.
        training: whether a backward may follow.
        room: leading elements of what is saved that are the caller's.
    """
    chosen = way(query, key, value, bias, active, is_causal, training)
    shape = (*query.shape[:-1], value.shape[-1])
    saved = query.new_empty(room + _saved_size(chosen, query, key), dtype=torch.float32)
    if chosen == "nothing":
        return query.new_zeros(shape), saved
    work = Workspace(query)
    packing = _packing(active, bias, work)
    query, key, value = flat(query), flat(key), flat(value)
    if chosen == "flash":
        logsumexp = saved[room:].view(query.shape[0], query.shape[2], query.shape[1])
        output = _forward_flash(query, key, value, bias, packing, is_causal, scale, logsumexp, work)
    else:
        kept = kept_weights(saved[room:], query, key, packing) if chosen == "kept" else None
        scores = Scores(bias, is_causal, scale, query, work)
        output = _forward_products(scores, query, key, value, packing, kept, work)
    work.close()
    output = output.view(shape)
    if active is not None and packing is None:
        output.masked_fill_(~active[..., None], 0)
    return output, saved


def _packing(active: Tensor | None, bias: Tensor | None, work: Workspace) -> Packing | None:
    """The packing of active queries; None where all are computed, as nearly all are active."""
    if active is None:
        return None
    share = PACKED_SHARE if bias is None else PACKED_SHARE_WITH_BIAS
    return Packing(active, work) if active.sum() <= share * active.numel() else None


def _queries(x: Tensor, packing: Packing | None, work: Workspace, name: str) -> Tensor:
    """`(B, heads, tokens, channels)` contiguous, or packed."""
    return contiguous(x, work, name) if packing is None else packing.pack(x, name)


def _result(like: Tensor, channels: int, work: Workspace, name: str) -> Tensor:
    """Room for results per query, to be given to `_tokens`."""
    shape = (*like.shape[:-1], channels)
    if like.dim() == 4 and like.shape[1] == 1:  # in the order of tokens already: not to be copied
        return like.new_empty(shape)
    return work.take(name, shape, like.dtype)


def _tokens(x: Tensor, packing: Packing | None) -> Tensor:
    """The reverse of `_queries`: `(B, tokens, heads, channels)`, a view if nothing is packed."""
    return x.transpose(1, 2) if packing is None else packing.unpack(x)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_of_bias(bias: Tensor | None, chunk: Chunk, keys: int, work: Workspace) -> Tensor | None:
    """The bias of a chunk's packed queries."""
    if bias is None:
        return None
    count = chunk.packed.stop - chunk.packed.start
    out = work.take("bias", (1, 1, count, keys), bias.dtype)
    return chunk.rows(bias, slice(None), out)


def _forward_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    packing: Packing | None,
    is_causal: bool,
    scale: float,
    logsumexp: Tensor,
    work: Workspace,
) -> Tensor:
    """Output `(B, tokens, heads, channels)`; fills `logsumexp`, `(B, tokens, heads)`."""
    # The fused attention takes any strides for all dimensions but the last.
    heads, key, value = query.shape[1], _unit_stride(key), _unit_stride(value)
    bias = four_dimensions(bias, query.dtype)
    if packing is None:
        query, key, value = (
            _unit_stride(query),
            repeat_heads(key, heads),
            repeat_heads(value, heads),
        )
        mask = None if bias is None else _unit_stride(bias)
        output, found = _flash(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
        logsumexp.copy_(found.transpose(1, 2))
        return output.transpose(1, 2).contiguous()
    packed, group = packing.pack(query, "query"), heads // key.shape[1]
    key, value = contiguous(key, work, "key"), contiguous(value, work, "value")
    found = [
        _flash(
            chunk.queries(packed)[None],
            *(chunk.keys(tensor, group)[None] for tensor in (key, value)),
            attn_mask=_rows_of_bias(bias, chunk, key.shape[2], work),
            scale=scale,
        )
        for chunk, _ in chunks(query, key, packing)
    ]
    if not found:
        logsumexp.zero_()
        return _tokens(packed, packing)
    output, lengths = (torch.cat(parts, 2) for parts in zip(*found))
    logsumexp.copy_(_tokens(lengths.view(-1, 1), packing)[..., 0])
    return _tokens(output[0, 0], packing)


def _forward_products(
    scores: Scores,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing | None,
    kept: Tensor | None,
    work: Workspace,
) -> Tensor:
    """Output `(B, tokens, heads, channels)`; the weights go into `kept`, if there is one."""
    group = query.shape[1] // key.shape[1]
    key, value = contiguous(key, work, "key"), contiguous(value, work, "value")
    packed = _queries(query, packing, work, "query")
    output = _result(packed, value.shape[-1], work, "output")
    for chunk, bands in chunks(query, key, packing):
        q, k, v = chunk.queries(packed), chunk.keys(key, group), chunk.keys(value, group)
        target = chunk.queries(output)
        for band in bands:
            if kept is None:
                out = work.take("scores", (q.shape[0], band.stop - band.start, k.shape[1]), q.dtype)
            else:
                out = chunk.band(chunk.queries(kept), band)
            weights = scores.weights(chunk, band, chunk.band(q, band), k, out)
            torch.bmm(weights, v, out=chunk.band(target, band))
    return _tokens(output, packing).contiguous()


# --- backward ------------------------------------------------------------------------------------


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    active: Tensor | None,
    output: Tensor,
    saved: Tensor,
    is_causal: bool,
    scale: float,
    training: bool,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and bias (None where it needs none).

    Args:
        grad: gradient of the output.
        output, saved: what `forward` returned, without the caller's elements; the other arguments
            are what it got.
    """
    chosen = way(query, key, value, bias, active, is_causal, training)
    learned = bias if bias_needs_grad else None
    if chosen == "nothing":
        zeros = torch.zeros_like
        grad_bias = None if learned is None else zeros(learned)
        return zeros(query), zeros(key), zeros(value), grad_bias
    work = Workspace(query)
    packing = _packing(active, bias, work)
    if active is not None and packing is None:
        grad = grad.masked_fill(~active[..., None], 0)
    operands = flat(query), flat(key), flat(value)
    grad_bias = None
    if chosen == "flash" and learned is None:
        logsumexp = saved.view(query.shape[0], tokens(query), query.shape[-2])
        found = _backward_flash(
            flat(grad), operands, bias, packing, flat(output), logsumexp, is_causal, scale, work
        )
    else:
        scores = Scores(bias, is_causal, scale, query, work)
        if learned is not None:
            wide = torch.promote_types(learned.dtype, torch.float32)
            shape = learned.shape if learned.dim() == 4 else (1, *learned.shape)
            grad_bias = learned.new_zeros(shape, dtype=wide)
        kept = kept_weights(saved, *operands[:2], packing) if chosen == "kept" else None
        found = _backward_products(scores, flat(grad), operands, packing, kept, grad_bias, work)
        if learned is not None and grad_bias is not None:
            grad_bias = grad_bias.view(learned.shape).to(learned.dtype)
    work.close()
    grad_query, grad_key, grad_value = found
    group = query.shape[-2] // key.shape[-2]
    if group > 1:
        grad_key = grad_key.unflatten(2, (-1, group)).sum(3)
        grad_value = grad_value.unflatten(2, (-1, group)).sum(3)
    grads = grad_query.view(query.shape), grad_key.view(key.shape), grad_value.view(value.shape)
    return *grads, grad_bias


Three = tuple[Tensor, Tensor, Tensor]


def _backward_flash(
    grad: Tensor,
    operands: Three,
    bias: Tensor | None,
    packing: Packing | None,
    output: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float,
    work: Workspace,
) -> Three:
    """Gradients `(B, tokens, heads, channels)` of query and, by query head, of key and value."""
    query, key, value = operands
    heads, key, value = query.shape[1], _unit_stride(key), _unit_stride(value)
    bias = four_dimensions(bias, query.dtype)
    if packing is None:
        query, grad = _unit_stride(query), _unit_stride(grad)
        found = _flash_backward(
            *(grad, query, repeat_heads(key, heads), repeat_heads(value, heads)),
            *(output, logsumexp.transpose(1, 2), 0.0, is_causal),
            attn_mask=None if bias is None else _unit_stride(bias),
            scale=scale,
        )
        grad_query, grad_key, grad_value = (part.transpose(1, 2) for part in found)
        return grad_query, grad_key, grad_value
    group = heads // key.shape[1]
    key, value = contiguous(key, work, "key"), contiguous(value, work, "value")
    packed, grad = packing.pack(query, "query"), packing.pack(grad, "grad")
    output = packing.pack(output, "output")
    logsumexp = packing.pack(logsumexp.transpose(1, 2)[..., None], "logsumexp")[:, 0]
    grad_query = work.take("grad query", packed.shape, packed.dtype)
    grad_key, grad_value = (
        tensor.new_zeros((tensor.shape[0], heads, *tensor.shape[2:])) for tensor in (key, value)
    )
    for chunk, _ in chunks(query, key, packing):
        found = _flash_backward(
            *(chunk.queries(tensor)[None] for tensor in (grad, packed)),
            *(chunk.keys(tensor, group)[None] for tensor in (key, value)),
            *(chunk.queries(tensor)[None] for tensor in (output, logsumexp)),
            0.0,
            False,
            attn_mask=_rows_of_bias(bias, chunk, key.shape[2], work),
            scale=scale,
        )
        grad_query[chunk.packed] = found[0][0, 0]
        for target, part in zip((grad_key, grad_value), found[1:]):
            chunk.keys(target).copy_(part[0])
    grad_key, grad_value = (_tokens(part, None) for part in (grad_key, grad_value))
    return _tokens(grad_query, packing), grad_key, grad_value


def _backward_products(
    scores: Scores,
    grad: Tensor,
    operands: Three,
    packing: Packing | None,
    kept: Tensor | None,
    grad_bias: Tensor | None,
    work: Workspace,
) -> Three:
    """The same; that of the bias is added to `grad_bias`. Sums over bands are float32 at least."""
    query, key, value = operands
    dtype, group = query.dtype, query.shape[1] // key.shape[1]
    key, value = contiguous(key, work, "key"), contiguous(value, work, "value")
    packed = _queries(query, packing, work, "query")
    grad = _queries(grad, packing, work, "grad")
    if packing is None:
        grad_query = query.new_empty(query.shape)
    else:
        grad_query = work.take("grad query", packed.shape, dtype)
    grad_key, grad_value = (
        (tensor.new_empty if packing is None else tensor.new_zeros)(
            (tensor.shape[0], query.shape[1], *tensor.shape[2:])
        )
        for tensor in (key, value)
    )

    def add(total: Tensor, a: Tensor, b: Tensor, alpha: float, first: bool) -> None:
        if total.dtype == dtype:
            torch.baddbmm(total, a, b, beta=0 if first else 1, alpha=alpha, out=total)
            return
        part = work.take("part", total.shape, dtype)
        torch.baddbmm(part, a, b, beta=0, alpha=alpha, out=part)
        total.copy_(part) if first else total.add_(part)

    for chunk, bands in chunks(query, key, packing):
        q, g, target = (chunk.queries(tensor) for tensor in (packed, grad, grad_query))
        k, v = chunk.keys(key, group), chunk.keys(value, group)
        results = totals = chunk.keys(grad_key), chunk.keys(grad_value)
        wide = torch.promote_types(dtype, torch.float32)
        if len(bands) > 1 and wide != dtype:
            names = ("key total", "value total")
            totals = tuple(work.take(n, r.shape, wide) for n, r in zip(names, results))
        for band in bands:
            shape = (q.shape[0], band.stop - band.start, k.shape[1])
            q_band, g_band = chunk.band(q, band), chunk.band(g, band)
            if kept is None:
                out = work.take("scores", shape, dtype)
                weights = scores.weights(chunk, band, q_band, k, out)
            else:
                weights = chunk.band(chunk.queries(kept), band)
            first = band is bands[0]
            add(totals[1], weights.mT, g_band, 1.0, first)
            out = work.take("grad scores", shape, dtype)
            torch.bmm(g_band, v.mT, out=out)
            torch._softmax_backward_data(out, weights, -1, dtype, grad_input=out)
            if grad_bias is not None:
                _add_bias(grad_bias, chunk, band, out)
            add(totals[0], out.mT, q_band, scores.scale, first)
            part = chunk.band(target, band)
            torch.baddbmm(part, out, k, beta=0, alpha=scores.scale, out=part)
        if totals is not results:
            for result, total in zip(results, totals):
                result.copy_(total)
    grad_key, grad_value = (_tokens(part, None) for part in (grad_key, grad_value))
    return _tokens(grad_query, packing), grad_key, grad_value


def _add_bias(total: Tensor, chunk: Chunk, band: slice, grad: Tensor) -> None:
    """Add the gradient of scores to that of the bias, summed where the bias is broadcast."""
    total = chunk.broadcast(total)
    grad = grad.view(*chunk.pair, *grad.shape[1:])
    if total.shape[1] < grad.shape[1]:
        grad = grad.sum(1, keepdim=True, dtype=total.dtype)
    if chunk.token is not None:
        total.index_add_(2, chunk.token[band], grad.to(total.dtype))
        return
    for images in [grad] if total.shape[0] > 1 else grad.split(1):
        total[:, :, band].add_(images)  # faster than a sum of half precision
