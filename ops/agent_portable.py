"""Agent attention on ordinary tensor operations: the portable path, forward and backward.

Both stages are done image by image, or for a few small images at once, so that what passes between
them stays in cache; the queries of a large map come in bands. Training keeps the weights of both
stages up to some size and beyond it computes them again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops.packed import packed
from vitarium.ops.softmax import Softmax
from vitarium.ops.workspace import Workspace

# Scores of a piece of work, in half precision and in float32: these should stay in cache, while
# products in half precision gain from more matrices at once.
CPU_SCORES = (1 << 21, 5 << 16)
DEVICE_SCORES = 1 << 26
KEPT_BYTES = 1 << 28  # of weights that training keeps; they grow with tokens, as the map does

Shape = Sequence[int]


def flat(x: Tensor) -> Tensor:
    """`(B, *spatial, heads, channels)` as `(B, tokens, heads, channels)`."""
    return x if x.dim() == 4 else x.flatten(1, -3)


def _count(x: Tensor) -> int:
    return math.prod(x.shape[1:-2])


def _elements(count: int, like: Tensor) -> int:
    """Float32 elements that hold `count` numbers bit for bit, and keep what follows aligned."""
    return -(-count * like.element_size() // 64) * 16


def values_room(value: Tensor, agent: Tensor) -> int:
    """The elements that hold agent values."""
    return _elements(math.prod(agent.shape[:-1]) * value.shape[-1], value)


def _room(query: Tensor, key: Tensor, value: Tensor, agent: Tensor) -> tuple[int, int, int]:
    """Those that hold agent values and, if they are kept, the weights of both stages."""
    rows = math.prod(agent.shape[:-1])
    first, second = (_elements(rows * _count(x), x) for x in (key, query))
    if 4 * (first + second) > KEPT_BYTES:
        first = second = 0
    return values_room(value, agent), first, second


def saved_size(query: Tensor, key: Tensor, value: Tensor, agent: Tensor, training: bool) -> int:
    """Elements of what `forward` returns for the backward."""
    return sum(_room(query, key, value, agent)) if training else 0


class _Saved:
    """Views of what the forward saves: agent values, and weights of both stages if kept."""

    def __init__(
        self, saved: Tensor, query: Tensor, key: Tensor, value: Tensor, agent: Tensor
    ) -> None:
        batch, agents, heads, _ = agent.shape
        parts = saved.split(_room(query, key, value, agent))
        shapes = (
            (batch, heads, agents, value.shape[-1]),
            (batch, heads, agents, _count(key)),
            (batch, heads, _count(query), agents),
        )
        wholes = [part.view(query.dtype) for part in parts]
        sizes = [math.prod(s) if part.numel() else 0 for s, part in zip(shapes, parts)]
        self.rests = [whole[size:] for whole, size in zip(wholes, sizes)]  # never written to
        values, gathering, reading = (whole[:n] for whole, n in zip(wholes, sizes))
        self.values = values.view(shapes[0])
        self.gathering = gathering.view(shapes[1]) if sizes[1] else None
        self.reading = reading.view(shapes[2]) if sizes[2] else None


class _Images:
    """Some images: their tensors as stacks of matrices, one for every image and head.

    Those of a single image are views in float32; products in half precision rearrange operands.
    """

    def __init__(self, start: int, stop: int, heads: int, work: Workspace) -> None:
        self.images = slice(start, stop)
        self.pairs = stop - start, heads
        self.work = work

    def operand(self, x: Tensor, name: str) -> Tensor:
        """`(images and heads, tokens, channels)` of `(B, tokens, heads, channels)`."""
        part = x[self.images].transpose(1, 2)
        if len(part) == 1 and part.stride(-1) == 1 and x.element_size() > 2:
            return part[0]
        return self.work.take(name, part.shape, x.dtype).copy_(part).flatten(0, 1)

    def target(self, x: Tensor, name: str) -> Tensor:
        """Room for results of that shape, to be `written` to x: products into it are faster."""
        shape = x[self.images].transpose(1, 2).shape
        return self.work.take(name, shape, x.dtype).flatten(0, 1)

    def written(self, result: Tensor, x: Tensor) -> None:
        x[self.images].transpose(1, 2).copy_(result.unflatten(0, self.pairs))

    def stack(self, x: Tensor) -> Tensor:
        """`(images and heads, tokens, channels)` of `(B, heads, tokens, channels)`."""
        return x[self.images].flatten(0, 1)

    def kept(self, x: Tensor | None) -> Tensor | None:
        """`stack` of weights, if they are kept."""
        return None if x is None else self.stack(x)


def _pieces(
    query: Tensor, key: Tensor, agent: Tensor, work: Workspace
) -> Iterator[tuple[_Images, list[slice]]]:
    """Images that are computed together, and bands of their queries."""
    batch, count, heads, _ = query.shape
    limit = CPU_SCORES[query.element_size() > 2] if query.is_cpu else DEVICE_SCORES
    row = heads * agent.shape[1]
    images = max(1, limit // (max(count, key.shape[1]) * row))
    band = max(64, limit // row)
    bands = [slice(first, min(first + band, count)) for first in range(0, count, band)]
    for start in range(0, batch, images):
        yield _Images(start, min(start + images, batch), heads, work), bands


def _table(bias: Tensor | None, softmax: Softmax) -> Tensor | None:
    """The bias `(heads, 1, rows, keys)` in the dtype that it is added in."""
    return None if bias is None else bias.to(softmax.wide)[:, None]


def small(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
    training: bool,
) -> Tensor:
    """The output in few steps of ordinary operations, which autograd knows."""
    q, k, v, a = (flat(x).transpose(1, 2) for x in (query, key, value, agent))
    if query.dtype == torch.float32 and not training and query.shape[-1] == value.shape[-1]:
        attend = functools.partial(_fused, scale=scale)
    else:
        one = len(query) == 1 and agent_bias is not None and query_bias is not None
        attend, a = _of_one if one else _attended, a * scale
    output = attend(q, a, attend(a, k, v, agent_bias), query_bias).transpose(1, 2)
    return output.contiguous().view(*query.shape[:-1], value.shape[-1])


def _fused(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, scale: float
) -> Tensor:
    mask = None if bias is None else bias.to(query.dtype)[None]
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)


def _of_one(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Of one image, whose matrices are no batches of batches: the product adds to the bias."""
    q, k, v = (x.squeeze(0) for x in (query, key, value))
    return (torch.baddbmm(bias.to(q.dtype), q, k.mT).softmax(-1) @ v).unsqueeze(0)


def _attended(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    scores = query @ key.mT
    if bias is not None:  # in place in what is no view: autograd copies nothing
        scores.add_(bias.to(query.dtype))
    return scores.softmax(-1) @ value


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Output `(B, *spatial, heads, value_dim)` and what the backward wants, see `saved_size`."""
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    size = saved_size(query, key, value, agent, training)
    saved = query.new_empty(size, dtype=torch.float32)
    if not output.numel() or not _count(key):
        return output.zero_(), saved.zero_()
    kept = _Saved(saved, query, key, value, agent) if training else None
    for rest in () if kept is None else kept.rests:
        rest.zero_()
    query, key, value, target = flat(query), flat(key), flat(value), flat(output)
    work = Workspace(query)
    softmax = Softmax(query, work)
    tables = _table(agent_bias, softmax), _table(query_bias, softmax)
    for piece, bands in _pieces(query, key, agent, work):
        a, q = piece.operand(agent, "agent"), piece.operand(query, "query")
        k, v = piece.operand(key, "key"), piece.operand(value, "value")
        if kept is None:
            gathering = reading = None
            values = work.take("agent values", (*a.shape[:2], v.shape[2]), v.dtype)
        else:
            gathering, reading = piece.kept(kept.gathering), piece.kept(kept.reading)
            values = piece.stack(kept.values)
        _attend(softmax, a, k, v, scale, tables[0], piece.pairs, gathering, values)
        out = piece.target(target, "output")
        for band in bands:
            rows = None if reading is None else reading[:, band]
            table = None if tables[1] is None else tables[1][:, :, band]
            part = q[:, band], a, values, scale, table, piece.pairs, rows, out[:, band]
            _attend(softmax, *part)
        piece.written(out, target)
    work.close()
    return output, saved


def _attend(
    softmax: Softmax,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    table: Tensor | None,
    pairs: tuple[int, int],
    kept: Tensor | None,
    out: Tensor,
) -> None:
    """Attention of matrices into `out`; the weights into `kept`, if that is given."""
    weights, sums = softmax.weights(query, key, scale, table, pairs, kept)
    torch.bmm(weights, value, out=out)
    if sums is not None:
        out.mul_(sums.reciprocal())


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    saved: Tensor,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors; those of biases are None unless `needs` says otherwise."""
    tensors = (query, key, value, agent, agent_bias, query_bias)
    if not grad.numel() or not _count(key):
        return tuple(None if x is None else torch.zeros_like(x) for x in tensors)
    grads = _room_for_grads(query, key, value)
    grad_agent = agent.new_empty(agent.shape)
    kept = _Saved(saved, query, key, value, agent)
    targets = [flat(x) for x in grads]
    query, key, value, grad = flat(query), flat(key), flat(value), flat(grad)
    work = Workspace(query)
    softmax = Softmax(query, work)
    tables = _table(agent_bias, softmax), _table(query_bias, softmax)
    totals = [
        torch.zeros_like(bias, dtype=softmax.wide) if bias is not None and need else None
        for bias, need in zip((agent_bias, query_bias), needs[4:])
    ]
    for piece, bands in _pieces(query, key, agent, work):
        a, q = piece.operand(agent, "agent"), piece.operand(query, "query")
        k, v = piece.operand(key, "key"), piece.operand(value, "value")
        g = piece.operand(grad, "grad")
        gathering, reading = piece.kept(kept.gathering), piece.kept(kept.reading)
        values = piece.stack(kept.values)
        grad_a = _Sum(a, "grad agent", softmax)
        grad_values = _Sum(values, "grad agent values", softmax)
        rooms = [piece.target(x, f"grad {i}") for i, x in enumerate(targets)]
        for band in bands:
            table = None if tables[1] is None else tables[1][:, :, band]
            rows = None if reading is None else reading[:, band]
            weights = _weights(softmax, q[:, band], a, scale, table, piece.pairs, rows)
            scores = _grad_scores(weights, g[:, band], values, work)
            grad_values.add(weights.mT, g[:, band])
            grad_a.add(scores.mT, q[:, band], scale)
            torch.baddbmm(rooms[0][:, band], scores, a, beta=0, alpha=scale, out=rooms[0][:, band])
            if totals[1] is not None:
                _add_images(totals[1][:, band], scores, piece.pairs)
        gathered = grad_values.result()
        weights = _weights(softmax, a, k, scale, tables[0], piece.pairs, gathering)
        scores = _grad_scores(weights, gathered, v, work)
        torch.bmm(weights.mT, gathered, out=rooms[2])
        torch.baddbmm(rooms[1], scores.mT, a, beta=0, alpha=scale, out=rooms[1])
        grad_a.add(scores, k, scale)
        if totals[0] is not None:
            _add_images(totals[0], scores, piece.pairs)
        for room, x in zip(rooms, targets):
            piece.written(room, x)
        grad_agent[piece.images].transpose(1, 2).copy_(grad_a.result().unflatten(0, piece.pairs))
    work.close()
    biases = (
        None if bias is None or total is None else total.to(bias.dtype)
        for bias, total in zip((agent_bias, query_bias), totals)
    )
    return *grads, grad_agent, *biases


def _room_for_grads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Room for their gradients: side by side where they are, not to be put together again."""
    if packed(query, key, value) is None:
        return tuple(x.new_empty(x.shape) for x in (query, key, value))
    return query.new_empty(*query.shape[:-2], 3, *query.shape[-2:]).unbind(-3)


def _weights(
    softmax: Softmax,
    query: Tensor,
    key: Tensor,
    scale: float,
    table: Tensor | None,
    pairs: tuple[int, int],
    kept: Tensor | None,
) -> Tensor:
    """The weights of a stage: kept, or computed again."""
    if kept is not None:
        return kept
    out = softmax.work.take("again", (*query.shape[:2], key.shape[1]), query.dtype)
    return softmax.weights(query, key, scale, table, pairs, out)[0]


def _grad_scores(weights: Tensor, grad: Tensor, value: Tensor, work: Workspace) -> Tensor:
    out = work.take("grad scores", weights.shape, weights.dtype)
    torch.bmm(grad, value.mT, out=out)
    return torch._softmax_backward_data(out, weights, -1, weights.dtype, grad_input=out)


def _add_images(total: Tensor, grad: Tensor, pairs: tuple[int, int]) -> None:
    for image in grad.unflatten(0, pairs):
        total.add_(image)


class _Sum:
    """A sum of matrix products, in float32 at least."""

    def __init__(self, like: Tensor, name: str, softmax: Softmax) -> None:
        self.like, self.work = like, softmax.work
        self.total = self.work.take(name, like.shape, softmax.wide)
        self.begun = False

    def add(self, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
        if self.total.dtype == self.like.dtype:
            beta = 1 if self.begun else 0
            torch.baddbmm(self.total, a, b, beta=beta, alpha=alpha, out=self.total)
        else:
            part = self.work.take("part", self.like.shape, self.like.dtype)
            torch.baddbmm(part, a, b, beta=0, alpha=alpha, out=part)
            self.total.add_(part) if self.begun else self.total.copy_(part)
        self.begun = True

    def result(self) -> Tensor:
        return self.total.to(self.like.dtype)
