"""Attention on tiles: forward and backward of the portable path of local attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitarium.ops.additive import Additive
from vitarium.ops.fused_windows import attend_tile
from vitarium.ops.plan import Plan
from vitarium.ops.softmax import Softmax
from vitarium.ops.strips import attend_strips
from vitarium.ops.tiles import Axis, PlainAxis
from vitarium.ops.transfer import Reader
from vitarium.ops.windows import Pattern, Window
from vitarium.ops.workspace import negative

STRIPS_PAY = 1500  # tokens of a map from which strips are faster


def path(query: Tensor, value: Tensor, windows: Sequence[Pattern]) -> str:
    """How `attend` goes about this call.

    PyTorch's fused attention for CPUs is slow in half precision. Where it is fast, large maps go
    through it in "strips", and small ones as they are if one tile is cheapest ("dense"). All else,
    window attention and every backward, is batched matrix products on "tiles".
    """
    serves = (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and value.shape[-1] == query.shape[-1]
        and query.shape[0] > 0
    )
    if not serves:
        return "tiles"
    large = math.prod(query.shape[1:-2]) >= STRIPS_PAY
    return "strips" if large and isinstance(windows[0], Window) else "dense"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    axes: Sequence[Axis],
    scale: float,
    way: str,
) -> Tensor:
    """Attention of every token to the keys that the axes' patterns show it.

    Args:
        query: `(B, *spatial, num_heads, head_dim)`.
        key: `(B, *spatial, num_heads_kv, head_dim)`, with the axes' borders.
        value: `(B, *spatial, num_heads_kv, value_dim)`, likewise.
        bias: `(num_heads, 2 * reach + 1, ...)` per axis, added at `key - query + reach`.
        axes: the tiles of every spatial axis, chosen for the way.
        scale: factor on the scores.
        way: what `path` says.

    Returns:
        `(B, *spatial, num_heads, value_dim)`.
    """
    if way == "strips":
        return attend_strips(query, key, value, bias, axes, scale)
    plan = Plan(query, axes)
    if way == "dense" and plan.single:
        output = _attend_dense(plan, query, key, value, bias, scale)
    else:
        output = _attend_tiles(plan, query, key, value, bias, scale)
    plan.work.close()
    return output


def _attend_dense(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """One tile: the CPU's fused attention on the tensors as they are."""
    additive = Additive(plan.axes, bias, query.dtype, plan.work)
    table = additive.band(plan.bands[0]) if additive.needed else None
    return attend_tile(query, key, value, table, scale)


def _attend_tiles(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Batched products of copied halos."""
    softmax = Softmax(query, plan.work)
    additive = Additive(plan.axes, bias, softmax.wide, plan.work)
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    for chunk in plan.chunks:
        reader = Reader(plan, chunk, query, key, value)
        result = plan.results_of("output grid", chunk.of(output))
        for band in plan.bands:
            reader.load(band)
            q, k = reader.tiles(0, "query"), reader.tiles(1, "halos")
            table = additive.of(chunk.heads, band)
            weights, sums = softmax.weights(q, k, scale, table, chunk.pairs)
            v = reader.tiles(2, "halos")  # over the keys, which have served
            tiles = torch.bmm(weights, v, out=plan.results("output", result, band))
            plan.put_queries(tiles, result, band, sums)
        plan.finish(result, output, chunk)
    return output


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    axes: Sequence[Axis],
    scale: float,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (empty where it needs none) of `attend`.

    The weights are computed again, so that nothing larger than a chunk is ever stored. Sums over
    tiles are kept in float32 at least.
    """
    plan = Plan(query, axes)
    softmax = Softmax(query, plan.work)
    additive = Additive(axes, bias, softmax.wide, plan.work)
    work, dtype = plan.work, query.dtype
    group = query.shape[-2] // key.shape[-2]
    heads = query.shape[-2:-1]
    grad_query = query.new_empty(query.shape)
    grad_key = key.new_empty(*key.shape[:-2], *heads, key.shape[-1])
    grad_value = value.new_empty(*value.shape[:-2], *heads, value.shape[-1])
    grad_table = None
    if bias_needs_grad:
        grad_table = additive.no_grad(query.shape[-2], plan.wide)
    for chunk in plan.chunks:
        reader = Reader(plan, chunk, query, key, value)
        # Zero beyond the map, so that queries that do not exist send no gradient.
        grad_grid = plan.queries_of("grad grid", chunk.of(grad))
        query_total = plan.results_of("query total", chunk.of(grad_query))
        key_total = plan.sums_of("key total", chunk.of(grad_key))
        value_total = plan.sums_of("value total", chunk.of(grad_value))
        for band in plan.bands:
            # Two buffers hold all halos in turn, so that they stay in cache.
            reader.load(band)
            q, k = reader.tiles(0, "query"), reader.tiles(1, "key")
            g = plan.queries("grad", grad_grid, band)
            table = additive.of(chunk.heads, band)
            weights, sums = softmax.weights(q, k, scale, table, chunk.pairs)
            weights = weights if sums is None else weights.div_(sums)
            halo = work.take("value", (*k.shape[:2], value.shape[-1]), dtype)
            plan.add_keys(torch.bmm(weights.mT, g, out=halo), value_total, band)
            v = reader.tiles(2, "value")
            grad_scores = torch._softmax_backward_data(
                torch.bmm(g, v.mT, out=work.take("grad weights", weights.shape, dtype)),
                weights,
                -1,
                dtype,
                grad_input=work.take("grad scores", weights.shape, dtype),
            )
            if grad_table is not None:
                pairs = grad_scores.view(*chunk.pairs, -1, *weights.shape[1:])
                additive.add_grad(grad_table[chunk.heads], pairs, band)
            halo = work.take("value", k.shape, dtype)
            torch.baddbmm(halo, grad_scores.mT, q, beta=0, alpha=scale, out=halo)
            plan.add_keys(halo, key_total, band)
            tiles = plan.results("output", query_total, band)
            torch.baddbmm(tiles, grad_scores, k, beta=0, alpha=scale, out=tiles)
            plan.put_queries(tiles, query_total, band)
        plan.finish(query_total, grad_query, chunk)
        for total, target in ((key_total, grad_key), (value_total, grad_value)):
            plan.finish(total, target, chunk, keys=True)
    work.close()
    if group > 1:
        grad_key = grad_key.unflatten(-2, (-1, group)).sum(-2)
        grad_value = grad_value.unflatten(-2, (-1, group)).sum(-2)
    if bias is not None and grad_table is not None:
        grad_bias = additive.grad_bias(grad_table, bias).to(bias.dtype)
    else:
        grad_bias = query.new_empty(0)
    return grad_query, grad_key, grad_value, grad_bias


def attend_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    axes: Sequence[PlainAxis],
    scale: float,
) -> Tensor:
    """What `attend` computes, as plain ATen without a loop, for exporters and transforms.

    Sizes may be symbolic, so borders are arithmetic on index tensors.
    """
    device = query.device
    rank, group = len(axes), query.shape[-2] // key.shape[-2]
    if group > 1:
        key, value = (tensor.repeat_interleave(group, -2) for tensor in (key, value))
    inside = torch.ones((), dtype=torch.bool, device=device)
    offsets = []
    for i, axis in enumerate(axes):
        at = 1 + 3 * i  # this axis becomes (tiles, tile or halo, classes)
        first = torch.arange(axis.tiles, device=device)[:, None] * axis.tile - axis.lead
        index = first - axis.before + torch.arange(axis.halo, device=device)
        taken = index + axis.border
        length = axis.length + 2 * axis.border * axis.classes
        key, value = (_take(tensor, at, taken, axis.classes, length) for tensor in (key, value))
        taken = first + torch.arange(axis.tile, device=device)
        query = _take(query, at, taken, axis.classes, axis.length)
        index = index[:, None]
        seen = (index >= axis.start[..., None]) & (index < axis.stop[..., None])
        # (tiles and classes of every axis, tile of every axis, halo of every axis)
        shape = [1] * (4 * rank)
        shape[2 * i : 2 * i + 2] = axis.tiles, axis.classes
        shape[2 * rank + i], shape[3 * rank + i] = axis.tile, axis.halo
        inside = inside & seen.permute(1, 0, 2, 3).reshape(shape)
        if bias is not None:
            offset = torch.arange(axis.halo, device=device) - axis.before
            offset = offset - torch.arange(axis.tile, device=device)[:, None]
            last = bias.shape[1 + i] - 1
            shape = [1] * (2 * rank)
            shape[i::rank] = axis.tile, axis.halo
            offsets.append((offset + last // 2).clamp(0, last).view(shape))
    blocks = [dim for i in range(rank) for dim in (1 + 3 * i, 3 + 3 * i)]  # tiles and classes
    order = (0, 3 * rank + 1, *blocks, *(2 + 3 * i for i in range(rank)), 3 * rank + 2)
    shape = query.permute(order).shape[:-1]
    query, key, value = (
        tensor.permute(order).flatten(2 + 2 * rank, -2).flatten(2, 1 + 2 * rank)
        for tensor in (query, key, value)
    )  # (B, num_heads, blocks, queries or keys, channels)
    inside = inside.flatten(3 * rank).flatten(2 * rank, 3 * rank - 1).flatten(0, 2 * rank - 1)
    scores = query @ key.transpose(-1, -2) * scale
    if bias is not None:
        table = bias[(slice(None), *offsets)].flatten(1 + rank).flatten(1, rank)
        scores = scores + table.to(scores.dtype).unsqueeze(1)
    weights = scores.masked_fill(~inside, negative(scores.dtype)).softmax(-1)
    output = (weights @ value).reshape(*shape, value.shape[-1])
    output = output.permute(sorted(range(len(order)), key=order.__getitem__))
    for i, axis in enumerate(axes):
        whole = output.flatten(1 + i, 3 + i)
        taken = torch.arange(axis.length, device=device) + axis.lead * axis.classes
        output = whole.index_select(1 + i, taken)
    return output


def _take(x: Tensor, axis: int, position: Tensor, classes: int, length: int) -> Tensor:
    """The tokens of an axis at positions of all classes, `(*position.shape, classes)` of them.

    Beyond either end, the first or the last one.
    """
    index = position.clamp(min=0)[..., None] * classes
    index = index + torch.arange(classes, device=x.device)
    index = torch.minimum(index, torch.full_like(index, length - 1))
    return x.index_select(axis, index.flatten()).unflatten(axis, index.shape)
