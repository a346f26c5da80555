"""Bi-level routing attention on ordinary tensor operations: forward and backward.

Some heads of some images at a time are copied region by region into buffers that stay in cache.
Chunks of their regions then take the rows of keys and values that they attend to, and batched
matrix products do the rest; the backward takes the same rows again, and computes the weights again
unless they were few enough to keep. So no more than a chunk of taken keys, values and scores
exists at a time, whatever the size of the map.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vitarium.ops.tiles import Workspace

# Bytes of the query of a unit and of a chunk of scores. On a CPU they should stay in cache;
# elsewhere few large launches are better.
UNIT = 1 << 20
SCORES = 1 << 21
DEVICE_SCORES = 1 << 28
KEYS_KEPT = 64  # keys of a query up to which training keeps the weights: as large as the query


def check_range(routing: Tensor, regions: int) -> None:
    """Raises ValueError where an entry of the table names no region; looks on a CPU only."""
    if routing.device.type != "cpu" or not routing.numel():
        return
    low, high = (int(bound) for bound in routing.aminmax())
    if low < 0 or high >= regions:
        raise ValueError(
            f"bilevel_routing_attention: routing has entries from {low} to {high}; allowed are 0 "
            f"to {regions - 1}"
        )


def keys_of_a_query(key: Tensor, routing: Tensor, grid: list[int]) -> int:
    """How many keys each query attends to."""
    return routing.shape[-1] * (key.shape[1] // grid[0]) * (key.shape[2] // grid[1])


def saved_shape(
    query: Tensor, key: Tensor, routing: Tensor, grid: list[int], training: bool
) -> tuple[int, ...]:
    """Shape of what `forward` returns for the backward: the weights, bit for bit, or nothing."""
    keys = keys_of_a_query(key, routing, grid)
    if not training or keys > KEYS_KEPT:
        return (0,)
    return (-(-query[..., 0].numel() * keys * query.element_size() // 4),)


def _by_region(x: Tensor, grid: list[int], heads: int) -> Tensor:
    """View `(B, n_y, n_x, heads, group, height, width, channels)` of a map with heads x group."""
    x = x.unflatten(3, (heads, -1)).unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))
    return x.permute(0, 1, 3, 5, 6, 2, 4, 7)


@dataclass(frozen=True)
class Unit:
    """Some key heads of some images, and the chunks of their regions.

    Rows are counted by image, region and head; a row is the tokens of a region of one head.

    Attributes:
        table: `(rows, topk)`, the rows of keys that each row of queries attends to.
        chunks: slices of the rows.
    """

    images: slice
    heads: slice
    table: Tensor
    chunks: tuple[slice, ...]

    def of(self, x: Tensor) -> Tensor:
        """The unit's part of a view by region."""
        return x[self.images, :, :, self.heads]

    def per_row(self, x: Tensor) -> Tensor:
        """`(rows, n)` of `(B, regions, n)`: heads of a region share it."""
        x = x[self.images, :, None]
        return x.expand(-1, -1, self.heads.stop - self.heads.start, -1).flatten(0, 2)


class Plan:
    """How one call is cut up, and the buffers that its parts reuse."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weights: Tensor | None,
        routing: Tensor,
        grid: list[int],
    ) -> None:
        self.batch, self.heads, self.topk = query.shape[0], key.shape[-2], routing.shape[-1]
        self.group = query.shape[-2] // self.heads
        self.grid, self.regions = grid, grid[0] * grid[1]
        self.routing, self.weights = routing, weights
        self.queries = query.shape[1] * query.shape[2] // self.regions * self.group
        self.keys = keys_of_a_query(key, routing, grid)
        self.dtype, self.work = query.dtype, Workspace(query)
        size, cpu = query.element_size(), query.device.type == "cpu"
        one = self.regions * self.queries * query.shape[-1] * size
        unit, scores = (UNIT, SCORES) if cpu else (DEVICE_SCORES, DEVICE_SCORES)
        self.unit = max(1, unit // one)  # heads of images
        # Taken keys and values count as much as scores.
        width = max(query.shape[-1], value.shape[-1])
        self.chunk = max(1, scores // (self.keys * max(self.queries, width) * size))
        self.band = min(self.queries, max(32, scores // (self.keys * size)))

    def view(self, x: Tensor) -> Tensor:
        return _by_region(x, self.grid, self.heads)

    def units(self) -> Iterator[Unit]:
        heads = min(self.heads, self.unit)
        images = max(1, self.unit // self.heads)
        for image, head in itertools.product(
            range(0, self.batch, images), range(0, self.heads, heads)
        ):
            chosen = slice(image, min(image + images, self.batch))
            some = slice(head, min(head + heads, self.heads))
            count = some.stop - some.start
            device = self.routing.device
            first = torch.arange(chosen.stop - image, device=device)[:, None, None] * self.regions
            table = ((first + self.routing[chosen]) * count)[:, :, None]
            table = table + torch.arange(count, device=device)[:, None]
            table = table.flatten(0, 2)
            chunks = tuple(
                slice(row, min(row + self.chunk, len(table)))
                for row in range(0, len(table), self.chunk)
            )
            yield Unit(chosen, some, table, chunks)

    def rows(self, name: str, unit: Unit, view: Tensor) -> Tensor:
        """The unit's rows of a view by region, copied: `(rows, tokens, channels)`."""
        part = unit.of(view)
        buffer = self.work.take(name, part.shape, part.dtype).copy_(part)
        return buffer.view(-1, math.prod(part.shape[4:7]), part.shape[-1])

    def put(self, rows: Tensor, unit: Unit, view: Tensor) -> None:
        """Write rows to a view by region."""
        target = unit.of(view)
        target.copy_(rows.view(target.shape))

    def take(self, name: str, rows: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
        """`(rows of queries, keys, channels)`: the rows of keys that `(rows, topk)` names."""
        shape = (index.numel(), rows.shape[1] * rows.shape[2])
        taken = torch.index_select(
            rows.view(-1, shape[1]), 0, index.flatten(), out=self.work.take(name, shape, self.dtype)
        )
        if weights is not None:
            taken.mul_(weights.reshape(-1, 1))
        return taken.view(len(index), self.keys, rows.shape[2])

    def bands(self) -> list[slice]:
        """Slices of the queries of a row."""
        return [
            slice(first, min(first + self.band, self.queries))
            for first in range(0, self.queries, self.band)
        ]

    def softmax(self, query: Tensor, key: Tensor, scale: float, out: Tensor | None) -> Tensor:
        """Weights `(rows, queries, keys)`, in `out` or in a buffer."""
        shape = (*query.shape[:2], self.keys)
        out = self.work.take("weights", shape, self.dtype) if out is None else out
        torch.baddbmm(out, query, key.mT, beta=0, alpha=scale, out=out)
        return torch._softmax(out, -1, False, out=out)

    def kept(self, saved: Tensor, unit: Unit) -> Tensor | None:
        """Where the unit's weights are kept, `(rows, queries, keys)`: a part of `saved`."""
        if not saved.numel():
            return None
        row = self.queries * self.keys
        images, heads = unit.images, unit.heads
        first = images.start * self.heads + heads.start * (images.stop - images.start)
        flat = saved.view(self.dtype).narrow(0, first * self.regions * row, len(unit.table) * row)
        return flat.view(-1, self.queries, self.keys)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    routing: Tensor,
    grid: list[int],
    scale: float,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Output `(B, H, W, num_heads, value_dim)` and what the backward wants, see `saved_shape`.

    Arguments as `vitarium.ops.bilevel_routing_attention` takes them; `training`: whether a
    backward may follow.
    """
    plan = Plan(query, key, value, weights, routing, grid)
    check_range(routing, plan.regions)
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    saved = query.new_empty(saved_shape(query, key, routing, grid, training), dtype=torch.float32)
    views = [plan.view(x) for x in (query, key, value)]
    result = plan.view(output)
    for unit in plan.units():
        q_rows, k_rows, v_rows = (
            plan.rows(name, unit, view) for name, view in zip(("query", "key", "value"), views)
        )
        out = plan.work.take("output", (*q_rows.shape[:2], v_rows.shape[2]), plan.dtype)
        soft = None if weights is None else unit.per_row(weights).to(plan.dtype)
        kept = plan.kept(saved, unit)
        for chunk in unit.chunks:
            index, factor = unit.table[chunk], None if soft is None else soft[chunk]
            k = plan.take("taken key", k_rows, index, factor)
            v = plan.take("taken value", v_rows, index, factor)
            for band in plan.bands():
                target = None if kept is None else kept[chunk, band]
                p = plan.softmax(q_rows[chunk, band], k, scale, target)
                torch.bmm(p, v, out=out[chunk, band])
        plan.put(out, unit, result)
    plan.work.close()
    return output, saved


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    routing: Tensor,
    output: Tensor,
    saved: Tensor,
    grid: list[int],
    scale: float,
    weights_need_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, weights (None where not needed) and None.

    Sums over regions that attend to the same keys are kept in float32 at least.
    """
    plan = Plan(query, key, value, weights, routing, grid)
    work, dtype = plan.work, plan.dtype
    wide = torch.promote_types(dtype, torch.float32)
    grads = [x.new_empty(x.shape) for x in (query, key, value)]
    views = [plan.view(x) for x in (query, key, value, grad, *grads)]
    grad_soft = None
    if weights_need_grad:
        grad_soft = weights.new_zeros(weights.shape, dtype=wide)
    for unit in plan.units():
        q_rows, k_rows, v_rows, g_rows = (
            plan.rows(name, unit, view)
            for name, view in zip(("query", "key", "value", "grad"), views)
        )
        q_total = work.take("grad query", q_rows.shape, dtype)
        k_total = work.take("key total", k_rows.shape, wide).zero_()
        v_total = work.take("value total", v_rows.shape, wide).zero_()
        soft = None if weights is None else unit.per_row(weights).to(dtype)
        kept = plan.kept(saved, unit)
        sums = None
        if grad_soft is not None:
            sums = work.take("grad weights", unit.table.shape, wide).zero_()
        for chunk in unit.chunks:
            index, factor = unit.table[chunk], None if soft is None else soft[chunk]
            k = plan.take("taken key", k_rows, index, factor)
            v = plan.take("taken value", v_rows, index, factor)
            grad_k = work.take("grad key", k.shape, dtype)
            grad_v = work.take("grad value", v.shape, dtype)
            for band in plan.bands():
                q, g = q_rows[chunk, band], g_rows[chunk, band]
                beta = 0 if band.start == 0 else 1
                p = plan.softmax(q, k, scale, None) if kept is None else kept[chunk, band]
                torch.baddbmm(grad_v, p.mT, g, beta=beta, out=grad_v)
                s = torch.bmm(g, v.mT, out=work.take("scores", p.shape, dtype))
                s = torch._softmax_backward_data(s, p, -1, dtype, grad_input=s)
                torch.baddbmm(grad_k, s.mT, q, beta=beta, alpha=scale, out=grad_k)
                target = q_total[chunk, band]
                torch.baddbmm(target, s, k, beta=0, alpha=scale, out=target)
            for rows, total, part in ((k_rows, k_total, grad_k), (v_rows, v_total, grad_v)):
                part = part.view(index.numel(), -1)
                if sums is not None:
                    unweighted = plan.take("taken key", rows, index, None).view(part.shape)
                    products = unweighted.mul_(part).sum(-1, dtype=wide)
                    sums[chunk] += products.view(index.shape)
                if factor is not None:
                    part.mul_(factor.reshape(-1, 1))
                if dtype != wide:
                    part = work.take("wide", part.shape, wide).copy_(part)
                total.view(-1, part.shape[1]).index_add_(0, index.flatten(), part)
        for total, view in zip((q_total, k_total, v_total), views[4:]):
            plan.put(total, unit, view)
        if grad_soft is not None:
            per_head = sums.view(-1, plan.regions, unit.heads.stop - unit.heads.start, plan.topk)
            grad_soft[unit.images] += per_head.sum(2)
    work.close()
    if grad_soft is not None:
        grad_soft = grad_soft.to(weights.dtype)
    return *grads, grad_soft, None
