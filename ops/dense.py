"""Dense attention on ordinary tensor operations: the portable path, forward and backward.

Two ways, chosen by `way`. PyTorch's fused attention for CPUs is the fastest in float32 with equal
widths; it has no gradient of the bias and is slow in half precision. All else is batched matrix
products on chunks of images, heads and queries, whose scores stay in cache. No more than one chunk
of scores exists at a time, except for short sequences in training: their weights are kept, since
they are hardly larger than queries and keys.

With `active`, the queries that a head skips are left out: the others of every image and head are
gathered, and all products are as much smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitarium.ops.tiles import CPU_CHUNK, DEVICE_CHUNK, Workspace

WEIGHTS_KEPT = 1 << 16  # scores of one head up to which training keeps the weights
ROWS = 32  # queries of a chunk, at least: thinner products are slow
GATHERING_PAYS = 1 << 14  # scores of one head from which it pays to gather active queries

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def tokens(x: Tensor) -> int:
    """Number of tokens of `(B, *spatial, heads, channels)`."""
    return math.prod(x.shape[1:-2])


def flat(x: Tensor) -> Tensor:
    """`(B, *spatial, heads, channels)` as `(B, heads, tokens, channels)`."""
    return x.flatten(1, -3).transpose(1, 2)


def _gathers(query: Tensor, key: Tensor, active: Tensor | None) -> bool:
    return active is not None and tokens(query) * tokens(key) > GATHERING_PAYS


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
    if query.numel() * value.shape[-1] * tokens(key) == 0:
        return "nothing"
    gathers = _gathers(query, key, active)
    if training and not gathers and tokens(query) * tokens(key) <= WEIGHTS_KEPT:
        return "kept"
    serves = (
        query.device.type == "cpu"
        and query.dtype == torch.float32
        and query.shape[-1] == value.shape[-1]
        and not (is_causal and (bias is not None or gathers))
    )
    return "flash" if serves else "products"


def saved_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    active: Tensor | None,
    is_causal: bool,
    training: bool,
) -> tuple[int, ...]:
    """Shape of what `forward` returns for the backward, a float32 tensor."""
    chosen = way(query, key, value, bias, active, is_causal, training)
    if chosen == "flash":  # natural log-sum-exp
        return query.shape[0], tokens(query), query.shape[-2]
    if chosen == "kept":  # weights, bit for bit in the dtype of query
        count = query.shape[0] * query.shape[-2] * tokens(query) * tokens(key)
        return (-(-count * query.element_size() // 4),)
    return (0,)


# --- chunks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Some heads of some images, and bands of their queries: slices, or indices of one head."""

    images: slice
    heads: slice
    bands: Sequence[slice | Tensor]

    def of(self, x: Tensor, group: int = 1) -> Tensor:
        """View `(images, heads, tokens, channels)` of `(B, num_heads, tokens, channels)`.

        With `group` query heads to a head of `x`, heads repeat (and are copied).
        """
        if group == 1:
            return x[self.images, self.heads]
        return x[self.images, [head // group for head in range(self.heads.start, self.heads.stop)]]

    def broadcast(self, x: Tensor) -> Tensor:
        """The same of `(B or 1, num_heads or 1, tokens, channels)`."""
        whole = slice(None)
        images = self.images if x.shape[0] > 1 else whole
        return x[images, self.heads if x.shape[1] > 1 else whole]


def rows(x: Tensor, band: slice | Tensor) -> Tensor:
    """The band's tokens of `(images, heads, tokens, channels)`."""
    return x[:, :, band] if isinstance(band, slice) else x.index_select(2, band)


def put_rows(target: Tensor, band: slice | Tensor, values: Tensor) -> None:
    """Write what `rows` reads; `values` is `(images and heads, tokens, channels)`."""
    values = values.view(*target.shape[:2], *values.shape[1:])
    if isinstance(band, slice):
        target[:, :, band] = values
    else:
        target.index_copy_(2, band, values)


def _chunks(
    query: Tensor, key: Tensor, active: Tensor | None, *, fused: bool = False
) -> Iterator[Chunk]:
    """Chunks of `(B, heads, tokens, channels)`; `fused`: nothing is stored, so one band will do."""
    batch, heads, count = query.shape[:3]
    limit = CPU_CHUNK if query.device.type == "cpu" else DEVICE_CHUNK
    limit = limit // 4 * (4 // query.element_size() or 1)  # scores of a chunk
    band = count if fused else min(count, max(ROWS, limit // key.shape[2]))
    if active is not None:
        for image, head in ((i, h) for i in range(batch) for h in range(heads)):
            index = active[image, head].nonzero().flatten()
            if len(index):
                chosen = slice(image, image + 1), slice(head, head + 1)
                yield Chunk(*chosen, index.split(band))
        return
    bands = [slice(first, min(first + band, count)) for first in range(0, count, band)]
    some = min(heads, max(1, limit // (count * key.shape[2])))
    images = max(1, limit // (count * key.shape[2] * heads)) if some == heads else 1
    for image in range(0, batch, images):
        for head in range(0, heads, some):
            chosen = slice(image, min(image + images, batch)), slice(head, min(head + some, heads))
            yield Chunk(*chosen, bands)


# --- weights -------------------------------------------------------------------------------------


class Scores:
    """Scores of a call and what is added to them: bias and causal mask."""

    def __init__(self, bias: Tensor | None, is_causal: bool, scale: float, like: Tensor) -> None:
        self.is_causal = is_causal
        self.scale = scale
        self.bias = self.hidden = None
        if bias is None:
            return
        self.bias = bias.to(like.dtype) if bias.dim() == 4 else bias.to(like.dtype)[None]
        seen = self.bias
        if is_causal:
            later = torch.ones(seen.shape[-2:], dtype=torch.bool, device=seen.device).triu(1)
            seen = seen.masked_fill(later, -math.inf)
        hidden = seen.amax(-1, keepdim=True) == -math.inf
        if like.device.type != "cpu" or bool(hidden.any()):
            self.hidden = hidden  # queries that see no key

    def weights(
        self, chunk: Chunk, band: slice | Tensor, q: Tensor, k: Tensor, out: Tensor
    ) -> Tensor:
        """Softmax of a band's scores into `out`, `(images and heads, queries, keys)`."""
        split = (chunk.images.stop - chunk.images.start, -1, *out.shape[1:])
        if self.bias is None:
            torch.baddbmm(out, q, k.mT, beta=0, alpha=self.scale, out=out)
        else:
            out.view(split).copy_(rows(chunk.broadcast(self.bias), band))
            torch.baddbmm(out, q, k.mT, alpha=self.scale, out=out)
        if self.is_causal:
            device, last = out.device, out.shape[-1]
            key = torch.arange(last, device=device)
            if isinstance(band, slice):
                band = torch.arange(band.start, band.stop, device=device)
            out.masked_fill_(key > band[:, None], -math.inf)
        torch._softmax(out, -1, False, out=out)
        if self.hidden is not None:
            out.view(split).masked_fill_(rows(chunk.broadcast(self.hidden), band), 0)
        return out


def _kept_weights(saved: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The kept weights `(B, heads, queries, keys)`, a view of `saved`."""
    shape = (*query.shape[:3], key.shape[2])
    return saved.view(query.dtype)[: math.prod(shape)].view(shape)


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
) -> tuple[Tensor, Tensor]:
    """Output `(B, *spatial, num_heads, value_dim)` and what the backward wants, see `saved_shape`.

    Args:
        query, key, value, bias, is_causal, scale: as `vitarium.ops.attention` takes them.
        active: None or bool `(B, *spatial, num_heads)`; where false, the output is 0.
        training: whether a backward may follow.
    """
    call = (query, key, value, bias, active, is_causal, training)
    chosen = way(*call)
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    saved = query.new_empty(saved_shape(*call), dtype=torch.float32)
    if chosen == "nothing":
        return output.zero_(), saved
    hide = active
    if _gathers(query, key, active):
        active = active.flatten(1, -2).transpose(1, 2)
        output.zero_()
        hide = None
    else:
        active = None
    query, key, value, result = (flat(tensor) for tensor in (query, key, value, output))
    if chosen == "flash":
        _forward_flash(query, key, value, bias, active, result, saved, is_causal, scale)
    else:
        scores = Scores(bias, is_causal, scale, query)
        kept = _kept_weights(saved, query, key) if chosen == "kept" else None
        _forward_products(scores, query, key, value, active, result, kept)
    if hide is not None:
        output.masked_fill_(~hide[..., None], 0)
    return output, saved


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _flash_operands(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The fused attention takes any strides for all dimensions but the last, and a 4-D bias."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    if bias is not None:
        bias = _unit_stride(bias.to(query.dtype))
        bias = bias if bias.dim() == 4 else bias[None]
    return _unit_stride(query), _unit_stride(key), _unit_stride(value), bias


def _forward_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    active: Tensor | None,
    result: Tensor,
    saved: Tensor,
    is_causal: bool,
    scale: float,
) -> None:
    query, key, value, bias = _flash_operands(query, key, value, bias)
    logsumexp = saved.transpose(1, 2)[..., None]
    if active is None:
        found, total = _flash(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)
        result.copy_(found)
        logsumexp.copy_(total[..., None])
        return
    saved.zero_()
    for chunk in _chunks(query, key, active, fused=True):
        (band,) = chunk.bands
        mask = None if bias is None else rows(chunk.broadcast(bias), band)
        found, total = _flash(
            rows(chunk.of(query), band), chunk.of(key), chunk.of(value), attn_mask=mask, scale=scale
        )
        put_rows(chunk.of(result), band, found[0])
        put_rows(chunk.of(logsumexp), band, total[0][..., None])


def _forward_products(
    scores: Scores,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    active: Tensor | None,
    result: Tensor,
    kept: Tensor | None,
) -> None:
    work = Workspace(query)
    group = query.shape[1] // key.shape[1]
    for chunk in _chunks(query, key, active):
        part, target = chunk.of(query), chunk.of(result)
        k, v = (chunk.of(tensor, group).flatten(0, 1) for tensor in (key, value))
        for band in chunk.bands:
            q = rows(part, band).flatten(0, 1)
            shape = (*q.shape[:2], k.shape[1])
            out = (
                work.take("scores", shape, q.dtype) if kept is None else chunk.of(kept).view(shape)
            )
            weights = scores.weights(chunk, band, q, k, out)
            out = work.take("output", (*q.shape[:2], v.shape[-1]), q.dtype)
            put_rows(target, band, torch.bmm(weights, v, out=out))
    work.close()


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
        output, saved: what `forward` returned; the other arguments are what it got.
    """
    chosen = way(query, key, value, bias, active, is_causal, training)
    heads, group = query.shape[-2], query.shape[-2] // key.shape[-2]
    gathers = _gathers(query, key, active)
    skips = chosen == "nothing" or gathers  # then nobody writes to all of the gradients
    grad_query, grad_key, grad_value = grads = [
        (tensor.new_zeros if skips else tensor.new_empty)(
            (*tensor.shape[:-2], heads, tensor.shape[-1])
        )
        for tensor in (query, key, value)
    ]
    grad_bias = None
    if bias_needs_grad:
        shape = bias.shape if bias.dim() == 4 else (1, *bias.shape)
        grad_bias = bias.new_zeros(shape, dtype=torch.promote_types(bias.dtype, torch.float32))
    if chosen != "nothing":
        if gathers:
            active = active.flatten(1, -2).transpose(1, 2)
        elif active is not None:
            grad, active = grad.masked_fill(~active[..., None], 0), None
        operands = tuple(map(flat, (query, key, value, grad)))
        results = tuple(map(flat, grads))
        if chosen == "flash" and not bias_needs_grad:
            _backward_flash(operands, bias, active, flat(output), saved, results, is_causal, scale)
        else:
            scores = Scores(bias, is_causal, scale, query)
            kept = _kept_weights(saved, *operands[:2]) if chosen == "kept" else None
            _backward_products(scores, operands, active, kept, results, grad_bias)
    if group > 1:
        grad_key = grad_key.unflatten(-2, (-1, group)).sum(-2)
        grad_value = grad_value.unflatten(-2, (-1, group)).sum(-2)
    if bias_needs_grad:
        grad_bias = grad_bias.view(bias.shape).to(bias.dtype)
    return grad_query, grad_key, grad_value, grad_bias


Four = tuple[Tensor, Tensor, Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


def _backward_flash(
    operands: Four,
    bias: Tensor | None,
    active: Tensor | None,
    output: Tensor,
    saved: Tensor,
    results: Three,
    is_causal: bool,
    scale: float,
) -> None:
    query, key, value, grad = operands
    query, key, value, bias = _flash_operands(query, key, value, bias)
    grad = _unit_stride(grad)
    logsumexp = saved.transpose(1, 2)
    if active is None:
        found = _flash_backward(
            grad, query, key, value, output, logsumexp, 0.0, is_causal, attn_mask=bias, scale=scale
        )
        for target, part in zip(results, found):
            target.copy_(part)
        return
    for chunk in _chunks(query, key, active, fused=True):
        (band,) = chunk.bands
        found = _flash_backward(
            *(rows(chunk.of(tensor), band) for tensor in (grad, query)),
            *(chunk.of(tensor) for tensor in (key, value)),
            rows(chunk.of(output), band),
            rows(chunk.of(logsumexp), band),
            0.0,
            False,
            attn_mask=None if bias is None else rows(chunk.broadcast(bias), band),
            scale=scale,
        )
        put_rows(chunk.of(results[0]), band, found[0][0])
        for target, part in zip(results[1:], found[1:]):
            chunk.of(target).copy_(part)


def _backward_products(
    scores: Scores,
    operands: Four,
    active: Tensor | None,
    kept: Tensor | None,
    results: Three,
    grad_bias: Tensor | None,
) -> None:
    """Sums over queries are kept in float32 at least."""
    query, key, value, grad = operands
    work, dtype = Workspace(query), query.dtype
    group = query.shape[1] // key.shape[1]
    wide = dtype

    def accumulate(name: str, a: Tensor, b: Tensor, alpha: float, first: bool) -> Tensor:
        """Add the product to the chunk's sum of that name."""
        shape = (a.shape[0], a.shape[1], b.shape[2])
        total = work.take(name, shape, wide)
        if dtype == wide:
            beta = 0 if first else 1
            return torch.baddbmm(total, a, b, beta=beta, alpha=alpha, out=total)
        part = work.take("part", shape, dtype)
        torch.baddbmm(part, a, b, beta=0, alpha=alpha, out=part)
        return total.copy_(part) if first else total.add_(part)

    for chunk in _chunks(query, key, active):
        k, v = (chunk.of(tensor, group).flatten(0, 1) for tensor in (key, value))
        if len(chunk.bands) > 1:
            wide = torch.promote_types(dtype, torch.float32)
        for band in chunk.bands:
            q, g = (rows(chunk.of(tensor), band).flatten(0, 1) for tensor in (query, grad))
            shape = (*q.shape[:2], k.shape[1])
            if kept is None:
                out = work.take("scores", shape, dtype)
                weights = scores.weights(chunk, band, q, k, out)
            else:
                weights = chunk.of(kept).view(shape)
            first = band is chunk.bands[0]
            value_total = accumulate("value", weights.mT, g, 1.0, first)
            grad_scores = torch._softmax_backward_data(
                torch.bmm(g, v.mT, out=work.take("grad weights", shape, dtype)),
                weights,
                -1,
                dtype,
                grad_input=work.take("grad scores", shape, dtype),
            )
            if grad_bias is not None:
                _add_bias(chunk.broadcast(grad_bias), band, grad_scores, chunk)
            key_total = accumulate("key", grad_scores.mT, q, scores.scale, first)
            out = work.take("query", q.shape, dtype)
            torch.baddbmm(out, grad_scores, k, beta=0, alpha=scores.scale, out=out)
            put_rows(chunk.of(results[0]), band, out)
        for target, total in ((results[1], key_total), (results[2], value_total)):
            put_rows(chunk.of(target), slice(None), total)
    work.close()


def _add_bias(total: Tensor, band: slice | Tensor, grad: Tensor, chunk: Chunk) -> None:
    """Add the gradient of scores to that of the bias, summed where the bias is broadcast."""
    grad = grad.view(chunk.images.stop - chunk.images.start, -1, *grad.shape[1:])
    for dim in (0, 1):
        if total.shape[dim] < grad.shape[dim]:
            grad = grad.sum(dim, keepdim=True, dtype=total.dtype)
    if isinstance(band, slice):
        total[:, :, band].add_(grad)
    else:
        total.index_add_(2, band, grad.to(total.dtype))
