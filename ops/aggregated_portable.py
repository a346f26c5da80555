"""Aggregated attention on ordinary tensor operations: the portable path, forward and backward.

A window of nine keys is too small for matrix products: gathering the keys costs more than what is
computed with them. So one place of the window after the other is taken for all tokens at once, by
elementwise products of the map with itself, shifted: views, nothing is copied or padded. Scores lie
with keys first, `(images, heads, window^2 + M, tokens)`, where rows of tokens are long vectors.
Everything is computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vitarium.ops.workspace import Workspace, negative

# Scores of one chunk. On a CPU they should stay near the cache; elsewhere few launches are better.
CPU_CHUNK = 1 << 20
DEVICE_CHUNK = 1 << 26


@dataclass(frozen=True)
class Place:
    """One place of the window: the queries of a band that have a key there, and these keys.

    Attributes:
        index: number of the place in the window, in raster order.
        queries: index of the queries into `(images, rows of the band, W)`.
        keys: index of their keys into `(images, H, W)`.
        everywhere: whether all queries of the band have a key there.
    """

    index: int
    queries: tuple[slice, slice, slice]
    keys: tuple[slice, slice, slice]
    everywhere: bool


@dataclass(frozen=True)
class Band:
    """Consecutive rows of the map: `first ... last - 1`."""

    first: int
    last: int
    places: tuple[Place, ...]

    @property
    def rows(self) -> tuple[slice, slice]:
        return slice(None), slice(self.first, self.last)


def _places(first: int, last: int, height: int, width: int, window_size: int) -> Iterator[Place]:
    """The places of the window where any query of a band has a key."""
    all_images, reach = slice(None), window_size // 2
    for index in range(window_size**2):
        down, right = index // window_size - reach, index % window_size - reach
        top, bottom = max(first, -down), min(last, height - down)
        left, stop = max(0, -right), min(width, width - right)
        if top < bottom and left < stop:
            yield Place(
                index,
                (all_images, slice(top - first, bottom - first), slice(left, stop)),
                (all_images, slice(top + down, bottom + down), slice(left + right, stop + right)),
                bottom - top == last - first and stop - left == width,
            )


class Plan:
    """How a call is cut: into chunks of images, or of one image into bands of rows.

    Attributes:
        images: slices of the batch.
        bands: the bands of every image.
        wide: dtype that sums are computed in.
        work: buffers that all chunks reuse.
    """

    def __init__(self, query: Tensor, keys: int, window_size: int) -> None:
        batch, height, width, heads, _ = query.shape
        chunk = CPU_CHUNK if query.device.type == "cpu" else DEVICE_CHUNK
        row = heads * keys * width
        count = min(height, -(-height * row // chunk))
        rows = -(-height // count)
        images = max(1, chunk // (height * row))
        self.images = [slice(i, min(i + images, batch)) for i in range(0, batch, images)]
        self.bands = [
            Band(first, last, tuple(_places(first, last, height, width, window_size)))
            for first in range(0, height, rows)
            for last in [min(first + rows, height)]
        ]
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.work = Workspace(query)

    def take(self, name: str, *shape: int) -> Tensor:
        return self.work.take(name, shape, self.wide)

    def load(self, name: str, x: Tensor, scale: float = 1.0) -> Tensor:
        """The tensor, wide, contiguous and scaled: a copy, unless it is; nobody may write to it."""
        if scale == 1 and x.dtype == self.wide and x.is_contiguous():
            return x
        loaded = self.take(name, *x.shape)
        return loaded.copy_(x) if scale == 1 else torch.mul(x, scale, out=loaded)

    def target(self, name: str, x: Tensor) -> Tensor:
        """Where to compute the contiguous tensor `x`: in place unless it is narrow."""
        return x if x.dtype == self.wide else self.take(name, *x.shape)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    bias: Tensor | None,
    pooled_bias: Tensor | None,
    window_weights: Tensor | None,
    window_size: int,
    scale: float,
) -> Tensor:
    """The output of `vitarium.ops.aggregated_attention`, `(B, H, W, num_heads, value_dim)`."""
    key, value, pooled_key, pooled_value = _for_heads(query, key, value, pooled_key, pooled_value)
    window = window_size**2
    plan = Plan(query, window + pooled_key.shape[1], window_size)
    biases = _Biases(plan, bias, pooled_bias)
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    for images in plan.images:
        q = plan.load("query", query[images], scale)
        k, v = plan.load("key", key[images]), plan.load("value", value[images])
        out = plan.target("output", output[images])
        pooled_k, pooled_v = (
            tensor[images].to(plan.wide).transpose(1, 2) for tensor in (pooled_key, pooled_value)
        )
        for band in plan.bands:
            result = out[band.rows]
            weights = _weights(plan, q[band.rows], k, pooled_k, biases, band, window)
            for image in range(len(weights)):
                torch.bmm(
                    weights[image, :, window:].mT, pooled_v[image], out=_tokens(result[image])
                )
            extra = None if window_weights is None else window_weights[images][band.rows]
            near = _window_weights(plan, weights, extra, band, window)
            for place in band.places:
                result[place.queries].addcmul_(near[place.index][place.queries], v[place.keys])
        if out.dtype != output.dtype:
            output[images].copy_(out)
    plan.work.close()
    return output


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    bias: Tensor | None,
    pooled_bias: Tensor | None,
    window_weights: Tensor | None,
    window_size: int,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of `attend`, one for each tensor; None for what is None.

    The weights are computed again, so that nothing larger than a chunk is ever stored.
    """
    group = query.shape[-2] // key.shape[-2]
    key, value, pooled_key, pooled_value = _for_heads(query, key, value, pooled_key, pooled_value)
    window, pooled = window_size**2, pooled_key.shape[1]
    plan = Plan(query, window + pooled, window_size)
    biases = _Biases(plan, bias, pooled_bias)
    wide = plan.wide
    grads = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
    grad_pooled = [
        tensor.new_zeros(tensor.shape, dtype=wide) for tensor in (pooled_key, pooled_value)
    ]
    grad_window = None if window_weights is None else window_weights.new_empty(window_weights.shape)
    heads, tokens = query.shape[-2], query.shape[1] * query.shape[2]
    grad_bias = query.new_zeros(heads, window, dtype=wide)
    grad_pooled_bias = query.new_zeros(heads, pooled, tokens, dtype=wide)
    for images in plan.images:
        q, g = plan.load("query", query[images], scale), plan.load("grad", grad[images])
        k, v = plan.load("key", key[images]), plan.load("value", value[images])
        totals = [
            plan.target(name, tensor[images])
            for name, tensor in zip(("grad query", "grad key", "grad value"), grads)
        ]
        grad_q, grad_k, grad_v = totals
        grad_k.zero_()
        grad_v.zero_()
        pooled_k, pooled_v = (
            tensor[images].to(wide).transpose(1, 2) for tensor in (pooled_key, pooled_value)
        )
        grad_pooled_k, grad_pooled_v = (tensor[images].transpose(1, 2) for tensor in grad_pooled)
        for band in plan.bands:
            q_band, g_band, result = q[band.rows], g[band.rows], grad_q[band.rows]
            weights = _weights(plan, q_band, k, pooled_k, biases, band, window)
            extra = None if window_weights is None else window_weights[images][band.rows]
            near = _window_weights(plan, weights, extra, band, window)
            for place in band.places:
                grad_v[place.keys].addcmul_(near[place.index][place.queries], g_band[place.queries])
            grad_scores, near = _grad_scores(plan, weights, g_band, v, pooled_v, band, window)
            if grad_window is not None:
                grad_window[images][band.rows].copy_(near.movedim(0, -1))
            first, last = (row * query.shape[2] for row in (band.first, band.last))
            grad_bias += grad_scores[:, :, :window].sum((0, 3))
            grad_pooled_bias[:, :, first:last] += grad_scores[:, :, window:].sum(0)
            for image in range(len(weights)):
                scores, tokens_q = grad_scores[image, :, window:], _tokens(q_band[image])
                out = _tokens(result[image])
                torch.bmm(scores.mT, pooled_k[image], out=out)
                grad_pooled_k[image].baddbmm_(scores, tokens_q)
                grad_pooled_v[image].baddbmm_(weights[image, :, window:], _tokens(g_band[image]))
            near = near.copy_(_window_view(grad_scores, near)).unsqueeze(-1)
            for place in band.places:
                here = near[place.index][place.queries]
                result[place.queries].addcmul_(here, k[place.keys])
                grad_k[place.keys].addcmul_(here, q_band[place.queries])
        if scale != 1:
            grad_q.mul_(scale)
        for total, target in zip(totals, grads):
            if total.dtype != target.dtype:
                target[images].copy_(total)
    plan.work.close()
    results = [grads[0]]
    for found, like in zip((*grads[1:], *grad_pooled), (key, value, pooled_key, pooled_value)):
        if group > 1:
            found = found.unflatten(-2, (-1, group)).sum(-2)
        results.append(found.to(like.dtype))
    return (
        *results,
        None if bias is None else grad_bias.to(bias.dtype),
        None if pooled_bias is None else grad_pooled_bias.mT.to(pooled_bias.dtype),
        grad_window,
    )


def _for_heads(query: Tensor, *tensors: Tensor) -> Iterator[Tensor]:
    """Keys and values repeated for the query heads that share them."""
    for tensor in tensors:
        group = query.shape[-2] // tensor.shape[-2]
        yield tensor if group == 1 else tensor.repeat_interleave(group, -2)


def _tokens(x: Tensor) -> Tensor:
    """View `(heads, tokens, channels)` of `(rows, W, heads, channels)`."""
    return x.flatten(0, 1).transpose(0, 1)


def _window_view(scores: Tensor, like: Tensor) -> Tensor:
    """The window's part of `(images, heads, window^2 + M, tokens)`, in the dimensions of `like`."""
    window, _, rows, width, _ = like.shape
    return scores[:, :, :window].unflatten(-1, (rows, width)).permute(2, 0, 3, 4, 1)


class _Biases:
    """The biases as the scores lie, in the dtype that they are computed in."""

    def __init__(self, plan: Plan, bias: Tensor | None, pooled_bias: Tensor | None) -> None:
        self.window = None if bias is None else bias.to(plan.wide).mT[:, None, None, None]
        self.pooled = None
        if pooled_bias is not None:
            by_key = pooled_bias.mT
            self.pooled = plan.take("pooled bias", *by_key.shape).copy_(by_key)


def _products(plan: Plan, a: Tensor, b: Tensor, band: Band, window: int, outside: float) -> Tensor:
    """Dot products of a band's tokens with their windows, `(window^2, images, rows, W, heads)`.

    Args:
        plan: gives the buffers.
        a: `(images, rows, W, heads, channels)`, the band's tokens.
        b: `(images, H, W, heads, channels)`, the whole map.
        band: rows of the map.
        window: number of places in the window.
        outside: what stands where the window leaves the map.
    """
    results = plan.take("window", window, *a.shape[:-1])
    products = plan.take("products", *a.shape)
    if len(band.places) < window:
        results.fill_(outside)
    for place in band.places:
        result, product = results[place.index], products[place.queries]
        if not place.everywhere:
            result.fill_(outside)
        torch.mul(a[place.queries], b[place.keys], out=product)
        torch.sum(product, -1, out=result[place.queries])
    return results


def _weights(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    pooled_key: Tensor,
    biases: _Biases,
    band: Band,
    window: int,
) -> Tensor:
    """Softmax over window and pooled keys, `(images, heads, window^2 + M, tokens)`."""
    images, rows, width, heads, _ = query.shape
    near = _products(plan, query, key, band, window, negative(plan.wide))
    scores = plan.take("scores", images, heads, window + pooled_key.shape[2], rows * width)
    view = _window_view(scores, near)
    if biases.window is None:
        view.copy_(near)
    else:
        torch.add(near, biases.window, out=view)
    far = scores[:, :, window:]
    if biases.pooled is not None:
        far.copy_(biases.pooled[:, :, band.first * width : band.last * width])
    beta = 0 if biases.pooled is None else 1
    for image in range(images):
        far[image].baddbmm_(pooled_key[image], _tokens(query[image]).mT, beta=beta)
    return torch.softmax(scores, 2, out=plan.take("weights", *scores.shape))


def _grad_scores(
    plan: Plan,
    weights: Tensor,
    grad: Tensor,
    value: Tensor,
    pooled_value: Tensor,
    band: Band,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of a band's scores, as they lie, and of the window's weights, as of `_products`."""
    near = _products(plan, grad, value, band, window, 0.0)
    grad_weights = plan.take("grad weights", *weights.shape)
    _window_view(grad_weights, near).copy_(near)
    for image in range(len(weights)):
        out = grad_weights[image, :, window:]
        torch.bmm(pooled_value[image], _tokens(grad[image]).mT, out=out)
    # The scores have served: their buffer takes their gradient.
    scores = plan.take("scores", *weights.shape)
    torch._softmax_backward_data(grad_weights, weights, 2, plan.wide, grad_input=scores)
    return scores, near


def _window_weights(
    plan: Plan, weights: Tensor, extra: Tensor | None, band: Band, window: int
) -> Tensor:
    """What the window's values are multiplied with, `(window^2, images, rows, W, heads, 1)`."""
    images, heads, _, tokens = weights.shape
    rows = band.last - band.first
    near = plan.take("window", window, images, rows, tokens // rows, heads)
    view = _window_view(weights, near)
    if extra is None:
        near.copy_(view)
    else:
        torch.add(view, extra.movedim(-1, 0), out=near)
    return near.unsqueeze(-1)
