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

import torch
from torch import Tensor

from vitarium.ops.tiles import Workspace

# Training keeps weights of short sequences, by scores of one head, and of small batches.
WEIGHTS_KEPT = 1 << 16
WEIGHTS_KEPT_BYTES = 1 << 24
# Scores of a chunk, in half precision and in float32: these should stay near the second-level
# cache, while every product in half precision first rearranges its operands. Devices want few
# large launches.
CPU_SCORES = (1 << 20, 5 << 16)
DEVICE_SCORES = 1 << 26
ROWS = 32  # queries of a chunk, at least: thinner products are slow
GATHERING_PAYS = 1 << 14  # scores of one head from which it pays to gather active queries

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


def gathering_pays(query: Tensor, key: Tensor) -> bool:
    """Whether leaving out queries is faster than computing them all."""
    return tokens(query) * tokens(key) > GATHERING_PAYS


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
    if (
        query.dtype == torch.float32
        and query.shape[-1] == value.shape[-1]
        and query.device.type == "cpu"
        and not (is_causal and (bias is not None or active is not None))
    ):
        return "flash"
    total = query.shape[0] * query.shape[-2] * scores * query.element_size()
    if training and active is None and (scores <= WEIGHTS_KEPT or total <= WEIGHTS_KEPT_BYTES):
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
) -> tuple[int, ...]:
    """Shape of what `forward` returns for the backward, a float32 tensor."""
    chosen = way(query, key, value, bias, active, is_causal, training)
    if chosen == "flash":  # natural log-sum-exp
        return query.shape[0], tokens(query), query.shape[-2]
    return (_kept_size(query, key) if chosen == "kept" else 0,)


def _kept_size(query: Tensor, key: Tensor) -> int:
    """Elements of float32 that hold the weights bit for bit, in the dtype of query."""
    count = query.shape[0] * query.shape[-2] * tokens(query) * tokens(key)
    return -(-count * query.element_size() // 4)


# --- chunks --------------------------------------------------------------------------------------

Band = slice | Tensor  # some queries: consecutive ones, or indices
EVERY = slice(None)


class Chunk:
    """Some heads of some images, and bands of their queries (indices: of one head of one image)."""

    __slots__ = ("bands", "count", "heads", "images", "pair", "whole")

    def __init__(self, images: slice, heads: slice, bands: Sequence[Band], whole: bool) -> None:
        self.images = images
        self.heads = heads
        self.bands = bands
        self.whole = whole  # all heads of all images: indexing costs microseconds
        self.pair = images.stop - images.start, heads.stop - heads.start
        self.count = self.pair[0] * self.pair[1]

    def of(self, x: Tensor, group: int = 1) -> Tensor:
        """View `(images, heads, tokens, channels)` of `(B, num_heads, tokens, channels)`.

        With `group` query heads to a head of `x`, heads repeat (and are copied).
        """
        if group == 1:
            return x if self.whole else x[self.images, self.heads]
        return x[self.images, [head // group for head in range(self.heads.start, self.heads.stop)]]

    def broadcast(self, x: Tensor) -> Tensor:
        """The same of `(B or 1, num_heads or 1, tokens, channels)`."""
        images = self.images if x.shape[0] > 1 else slice(None)
        return x[images, self.heads if x.shape[1] > 1 else slice(None)]

    def batch(self, work: Workspace, name: str, x: Tensor, band: Band = EVERY) -> Tensor:
        """A band of `of(x)` as a batch `(images and heads, tokens, channels)`, contiguous."""
        x = rows(x, band)
        if not x.is_contiguous():
            x = work.take(name, x.shape, x.dtype).copy_(x)
        return x.flatten(0, 1)

    def put(self, target: Tensor, band: Band, values: Tensor) -> None:
        """Write to a band of `of(target)` what `batch` reads."""
        values = values.view(*self.pair, *values.shape[1:])
        if isinstance(band, slice):
            rows(target, band).copy_(values)
        else:
            target.index_copy_(2, band, values)


def rows(x: Tensor, band: Band) -> Tensor:
    """The band's tokens of `(images, heads, tokens, channels)`."""
    if band is EVERY:
        return x
    return x[:, :, band] if isinstance(band, slice) else x.index_select(2, band)


def _chunks(
    query: Tensor, key: Tensor, active: Tensor | None, *, fused: bool = False
) -> Iterator[Chunk]:
    """Chunks of `(B, heads, tokens, channels)`; `fused`: nothing is stored, so one band will do."""
    batch, heads, count, _ = query.shape
    keys = key.shape[2]
    if query.device.type != "cpu":
        limit = DEVICE_SCORES
    else:
        limit = CPU_SCORES[query.element_size() > 2]
    bands = 1 if fused else max(1, min(-(-count * keys // limit), count // ROWS))
    band = -(-count // bands)
    if active is not None:
        for image, head in ((i, h) for i in range(batch) for h in range(heads)):
            index = active[image, head].nonzero().flatten()
            if len(index):
                one = slice(image, image + 1), slice(head, head + 1)
                yield Chunk(*one, index.split(band), batch * heads == 1)
        return
    if band == count:
        slices = [EVERY]
    else:
        slices = [slice(first, min(first + band, count)) for first in range(0, count, band)]
    some = min(heads, max(1, limit // (count * keys)))
    images = max(1, limit // (count * keys * heads)) if some == heads else 1
    for image in range(0, batch, images):
        for head in range(0, heads, some):
            yield Chunk(
                slice(image, min(image + images, batch)),
                slice(head, min(head + some, heads)),
                slices,
                images >= batch and some == heads,
            )


# --- weights -------------------------------------------------------------------------------------


def has_infinities(bias: Tensor) -> bool:
    """Whether a bias may hide keys; on devices that would have to wait for the answer, it may."""
    return bias.device.type != "cpu" or not math.isfinite(bias.detach().sum())


def hidden_queries(bias: Tensor, is_causal: bool) -> Tensor:
    """The queries that see no key, `(..., N, 1)`: the softmax of their scores would be NaN."""
    if is_causal:
        later = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
        bias = bias.masked_fill(later, -math.inf)
    return bias.amax(-1, keepdim=True) == -math.inf


class Scores:
    """Scores of a call and what is added to them: bias and causal mask."""

    def __init__(self, bias: Tensor | None, is_causal: bool, scale: float, like: Tensor) -> None:
        self.is_causal = is_causal
        self.scale = scale
        self.bias = self.hidden = None
        if bias is None:
            return
        self.bias = bias.to(like.dtype) if bias.dim() == 4 else bias.to(like.dtype)[None]
        if has_infinities(bias):
            self.hidden = hidden_queries(self.bias, is_causal)

    def weights(self, chunk: Chunk, band: Band, q: Tensor, k: Tensor, out: Tensor) -> Tensor:
        """Softmax of a band's scores into `out`, `(images and heads, queries, keys)`."""
        split = (*chunk.pair, *out.shape[1:])
        if self.bias is None:
            torch.baddbmm(out, q, k.mT, beta=0, alpha=self.scale, out=out)
        else:
            out.view(split).copy_(rows(chunk.broadcast(self.bias), band))
            torch.baddbmm(out, q, k.mT, alpha=self.scale, out=out)
        if self.is_causal:
            key = torch.arange(out.shape[-1], device=out.device)
            query = band
            if isinstance(band, slice):
                start = band.start or 0
                query = torch.arange(start, start + out.shape[1], device=out.device)
            out.masked_fill_(key > query[:, None], -math.inf)
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
    chosen = way(query, key, value, bias, active, is_causal, training)
    shape = (*query.shape[:-1], value.shape[-1])
    if chosen == "nothing":
        return query.new_zeros(shape), query.new_empty(0, dtype=torch.float32)
    active = _by_head(active)
    operands = flat(query), flat(key), flat(value)
    if chosen == "flash":
        output, saved = _forward_flash(operands, bias, active, is_causal, scale)
        return output.view(shape), saved
    output = query.new_empty(shape) if active is None else query.new_zeros(shape)
    saved = query.new_empty(_kept_size(query, key) if chosen == "kept" else 0, dtype=torch.float32)
    kept = _kept_weights(saved, *operands[:2]) if chosen == "kept" else None
    scores = Scores(bias, is_causal, scale, query)
    _forward_products(scores, operands, active, flat(output), kept)
    return output, saved


def _by_head(active: Tensor | None) -> Tensor | None:
    """`(B, *spatial, heads)` as `(B, heads, tokens)`."""
    return None if active is None else active.flatten(1, -2).transpose(1, 2)


Operands = tuple[Tensor, Tensor, Tensor]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _flash_operands(
    operands: Operands, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The fused attention takes any strides for all dimensions but the last, and a 4-D bias."""
    query, key, value = map(_unit_stride, operands)
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    if bias is not None:
        bias = _unit_stride(bias.to(query.dtype))
        bias = bias if bias.dim() == 4 else bias[None]
    return query, key, value, bias


def _forward_flash(
    operands: Operands, bias: Tensor | None, active: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `(B, tokens, heads, channels)` and log-sum-exp `(B, tokens, heads)`."""
    query, key, value, bias = _flash_operands(operands, bias)
    if active is None:
        found = _flash(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)
        output, logsumexp = (tensor.transpose(1, 2).contiguous() for tensor in found)
        return output, logsumexp
    batch, heads, count, channels = query.shape
    output = query.new_zeros((batch, count, heads, channels))
    saved = query.new_zeros((batch, count, heads))
    result, logsumexp = output.transpose(1, 2), saved.transpose(1, 2)[..., None]
    for chunk in _chunks(query, key, active, fused=True):
        (band,) = chunk.bands
        mask = None if bias is None else rows(chunk.broadcast(bias), band)
        found, total = _flash(
            rows(chunk.of(query), band), chunk.of(key), chunk.of(value), attn_mask=mask, scale=scale
        )
        chunk.put(chunk.of(result), band, found[0])
        chunk.put(chunk.of(logsumexp), band, total[0][..., None])
    return output, saved


def _forward_products(
    scores: Scores,
    operands: Operands,
    active: Tensor | None,
    result: Tensor,
    kept: Tensor | None,
) -> None:
    query, key, value = operands
    work, dtype = Workspace(query), query.dtype
    group = query.shape[1] // key.shape[1]
    for chunk in _chunks(query, key, active):
        part, target = chunk.of(query), chunk.of(result)
        k = chunk.batch(work, "key", chunk.of(key, group))
        v = chunk.batch(work, "value", chunk.of(value, group))
        for band in chunk.bands:
            q = chunk.batch(work, "query", part, band)
            shape = (*q.shape[:2], k.shape[1])
            if kept is None:
                out = work.take("scores", shape, dtype)
            else:
                out = rows(chunk.of(kept), band).view(shape)
            weights = scores.weights(chunk, band, q, k, out)
            shape = (*q.shape[:2], v.shape[2])
            if len(chunk.bands) == 1 and active is None and target.is_contiguous():
                torch.bmm(weights, v, out=target.view(shape))
            else:
                out = work.take("output", shape, dtype)
                chunk.put(target, band, torch.bmm(weights, v, out=out))
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
    skips = chosen == "nothing" or active is not None  # nobody writes to all of the gradients
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
        active = _by_head(active)
        operands, results = tuple(map(flat, (query, key, value))), tuple(map(flat, grads))
        if chosen == "flash" and not bias_needs_grad:
            _backward_flash(
                flat(grad), operands, bias, active, flat(output), saved, results, is_causal, scale
            )
        else:
            scores = Scores(bias, is_causal, scale, query)
            kept = _kept_weights(saved, *operands[:2]) if chosen == "kept" else None
            _backward_products(scores, flat(grad), operands, active, kept, results, grad_bias)
    if group > 1:
        grad_key = grad_key.unflatten(-2, (-1, group)).sum(-2)
        grad_value = grad_value.unflatten(-2, (-1, group)).sum(-2)
    if bias_needs_grad:
        grad_bias = grad_bias.view(bias.shape).to(bias.dtype)
    return grad_query, grad_key, grad_value, grad_bias


def _backward_flash(
    grad: Tensor,
    operands: Operands,
    bias: Tensor | None,
    active: Tensor | None,
    output: Tensor,
    saved: Tensor,
    results: Operands,
    is_causal: bool,
    scale: float,
) -> None:
    query, key, value, bias = _flash_operands(operands, bias)
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
            *(rows(chunk.of(tensor), band) for tensor in (output, logsumexp)),
            0.0,
            False,
            attn_mask=None if bias is None else rows(chunk.broadcast(bias), band),
            scale=scale,
        )
        chunk.put(chunk.of(results[0]), band, found[0][0])
        for target, part in zip(results[1:], found[1:]):
            chunk.of(target).copy_(part)


def _backward_products(
    scores: Scores,
    grad: Tensor,
    operands: Operands,
    active: Tensor | None,
    kept: Tensor | None,
    results: Operands,
    grad_bias: Tensor | None,
) -> None:
    """Sums over several bands are kept in float32 at least."""
    query, key, value = operands
    work, dtype = Workspace(query), query.dtype
    group = query.shape[1] // key.shape[1]

    def accumulate(
        name: str, a: Tensor, b: Tensor, alpha: float, first: bool, wide: torch.dtype
    ) -> Tensor:
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
        k = chunk.batch(work, "key", chunk.of(key, group))
        v = chunk.batch(work, "value", chunk.of(value, group))
        query_part, grad_part = chunk.of(query), chunk.of(grad)
        wide = torch.promote_types(dtype, torch.float32) if len(chunk.bands) > 1 else dtype
        for band in chunk.bands:
            q = chunk.batch(work, "query", query_part, band)
            g = chunk.batch(work, "grad", grad_part, band)
            shape = (*q.shape[:2], k.shape[1])
            if kept is None:
                out = work.take("scores", shape, dtype)
                weights = scores.weights(chunk, band, q, k, out)
            else:
                weights = rows(chunk.of(kept), band).view(shape)
            first = band is chunk.bands[0]
            value_total = accumulate("value total", weights.mT, g, 1.0, first, wide)
            out = work.take("grad weights", shape, dtype)
            grad_scores = torch._softmax_backward_data(
                torch.bmm(g, v.mT, out=out), weights, -1, dtype, grad_input=out
            )
            if grad_bias is not None:
                _add_bias(chunk, chunk.broadcast(grad_bias), band, grad_scores)
            key_total = accumulate("key total", grad_scores.mT, q, scores.scale, first, wide)
            out = work.take("output", q.shape, dtype)
            torch.baddbmm(out, grad_scores, k, beta=0, alpha=scores.scale, out=out)
            chunk.put(chunk.of(results[0]), band, out)
        for target, total in ((results[1], key_total), (results[2], value_total)):
            chunk.put(chunk.of(target), EVERY, total)
    work.close()


def _add_bias(chunk: Chunk, total: Tensor, band: Band, grad: Tensor) -> None:
    """Add the gradient of scores to that of the bias, summed where the bias is broadcast."""
    grad = grad.view(*chunk.pair, *grad.shape[1:])
    if total.shape[1] < grad.shape[1]:
        grad = grad.sum(1, keepdim=True, dtype=total.dtype)
    if isinstance(band, slice):
        target = rows(total, band)
        for images in [grad] if target.shape[0] > 1 else grad.split(1):
            target.add_(images)  # faster than a sum of half precision
    else:
        total.index_add_(2, band, grad.to(total.dtype))
