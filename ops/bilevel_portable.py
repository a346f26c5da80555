"""Bi-level routing attention on ordinary tensor operations: forward and backward.

Some images at a time are copied region by region into buffers that stay in cache.
Chunks of their regions then take the rows of keys and values that they attend to, and batched
matrix products do the rest; the backward takes the same rows again, and computes the weights again
unless they were few enough to keep. So no more than a chunk of taken keys, values and scores
exists at a time, whatever the size of the map. Only on the smallest maps, if most regions are
taken, masked dense attention is faster.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitarium.ops import dense
from vitarium.ops.softmax import softmax_of_exponents
from vitarium.ops.workspace import LOG2E, Workspace

# Bytes of the queries of a unit of images, and of a chunk of scores. On a CPU they should stay in
# cache; elsewhere few large launches are better.
UNIT = 1 << 20
SCORES = 1 << 21
DEVICE_SCORES = 1 << 28
DENSE_TOKENS = 256  # of a map that may be attended to as a whole, if a quarter of it is asked for
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


def pays_dense(
    query: Tensor, key: Tensor, weights: Tensor | None, routing: Tensor, grid: list[int]
) -> bool:
    """Whether masked attention of all tokens to all is the fastest way."""
    return (
        weights is None
        and query.device.type == "cpu"
        and query.dtype == torch.float32
        and max(dense.tokens(query), dense.tokens(key)) <= DENSE_TOKENS
        and 4 * routing.shape[-1] >= grid[0] * grid[1]
    )


def _mask(query: Tensor, key: Tensor, routing: Tensor, grid: list[int]) -> Tensor:
    """`(B, 1, queries, keys)`: how often a query's region names a key's, as a logarithm."""
    regions = grid[0] * grid[1]
    count = query.new_zeros(len(query), regions, regions)
    count.scatter_add_(2, routing.long(), count.new_ones(1, 1, 1).expand(routing.shape))
    of_query, of_key = (_region_of(tuple(x.shape[1:3]), tuple(grid)) for x in (query, key))
    return count.log_().index_select(1, of_query).index_select(2, of_key)[:, None]


@functools.lru_cache(maxsize=128)
def _region_of(size: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """The region of every token of a map."""
    y, x = (torch.arange(length) // (length // parts) for length, parts in zip(size, grid))
    return (y[:, None] * grid[1] + x).flatten()


def saved_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    routing: Tensor,
    grid: list[int],
    training: bool,
) -> tuple[int, ...]:
    """Shape of what `forward` returns for the backward: see `Plan.saved`, bit for bit."""
    if pays_dense(query, key, weights, routing, grid):
        return dense.saved_shape(query, key, value, None, None, False, training)
    if not training:
        return (0,)
    keys, queries = keys_of_a_query(key, routing, grid), query[..., 0].numel()
    if keeps_weights(keys):
        return (-(-queries * keys * query.element_size() // 4),)
    return (queries * (2 if query.dtype == torch.float64 else 1),)


def keeps_weights(keys: int) -> bool:
    """Whether training keeps the weights of a query that attends to so many keys."""
    return keys <= KEYS_KEPT


def _by_region(x: Tensor, grid: Sequence[int], heads: int) -> Tensor:
    """View `(B, n_y, n_x, heads, group, height, width)` of `(B, H, W, heads x group)`."""
    x = x.unflatten(3, (heads, -1)).unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))
    return x.permute(0, 1, 3, 5, 6, 2, 4)


@functools.lru_cache(maxsize=128)
def _order(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    grid: tuple[int, int],
    heads: int,
    device: torch.device,
) -> Tensor:
    """Where the heads of tokens `(B, H, W, num_heads)` lie, region by region.

    Copying vectors one by one from these places is much faster than a strided copy.
    """
    place = torch.zeros((), dtype=torch.int32, device=device)
    for size, stride in zip(shape, strides):
        place = place[..., None] + torch.arange(size, dtype=torch.int32, device=device) * stride
    return _by_region(place, grid, heads).flatten()


@functools.lru_cache(maxsize=128)
def _inverse_order(
    shape: tuple[int, ...], grid: tuple[int, int], heads: int, device: torch.device
) -> Tensor:
    """For every head of every token of a contiguous map, where it lies region by region."""
    strides = [math.prod(shape[i:]) for i in range(1, 5)]
    order = _order(shape, tuple(strides), grid, heads, device)
    index = torch.arange(len(order), dtype=torch.int32, device=device)
    return torch.empty_like(order).index_copy_(0, order.long(), index)


@functools.lru_cache(maxsize=128)
def _first_rows(images: int, regions: int, heads: int, device: torch.device) -> Tensor:
    """`(images, 1, heads, 1)`: the first row of every image and head."""
    first = torch.arange(images, device=device)[:, None] * (regions * heads)
    return (first + torch.arange(heads, device=device))[:, None, :, None]


class Plan:
    """How one call is cut up, and the buffers that its parts reuse.

    Rows are counted by image, region and head; a row is the tokens of a region of one head.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        routing: Tensor,
        grid: list[int],
        weighted: bool = False,
    ) -> None:
        self.batch, self.heads, self.topk = query.shape[0], key.shape[-2], routing.shape[-1]
        self.grid = (grid[0], grid[1])
        self.regions = grid[0] * grid[1]
        self.routing = routing
        self.direct = self.topk == 1 and not weighted  # rows are copied as they are taken
        group = query.shape[-2] // self.heads
        self.queries = query.shape[1] * query.shape[2] // self.regions * group
        self.keys = keys_of_a_query(key, routing, grid)
        self.dtype, self.work = query.dtype, Workspace(query)
        self.wide = torch.promote_types(query.dtype, torch.float32)
        size, cpu = query.element_size(), query.device.type == "cpu"
        self.powers_serve = cpu and query.dtype != torch.float64  # else looking would wait
        unit, scores = (UNIT, SCORES) if cpu else (DEVICE_SCORES, DEVICE_SCORES)
        one = self.heads * self.regions * self.queries * query.shape[-1] * size
        images = max(1, unit // one)
        self.units = [
            slice(image, min(image + images, self.batch)) for image in range(0, self.batch, images)
        ]
        # Taken keys and values count as much as scores.
        width = max(query.shape[-1], value.shape[-1])
        self.chunk = max(1, scores // (self.keys * max(self.queries, width) * size))
        band = min(self.queries, max(32, scores // (self.keys * size)))
        self.bands = [
            slice(first, min(first + band, self.queries)) for first in range(0, self.queries, band)
        ]

    def table(self, unit: slice) -> Tensor:
        """`(rows, topk)`: the unit's rows of keys that each of its rows of queries attends to."""
        images = unit.stop - unit.start
        first = _first_rows(images, self.regions, self.heads, self.routing.device)
        return torch.add(first, self.routing[unit, :, None], alpha=self.heads).flatten(0, 2)

    def chunks(self, table: Tensor) -> list[slice]:
        """Slices of a unit's rows, about equally long."""
        count = len(table)
        size = -(-count // max(1, -(-count // self.chunk)))
        return [slice(row, min(row + size, count)) for row in range(0, count, size)]

    def per_row(self, weights: Tensor | None, unit: slice) -> Tensor | None:
        """`(rows, topk)` of `(B, regions, topk)`: heads of a region share it."""
        if weights is None:
            return None
        shared = weights[unit, :, None].expand(-1, -1, self.heads, -1)
        return shared.flatten(0, 2).to(self.dtype)

    def rows(self, name: str, unit: slice, x: Tensor, table: Tensor | None = None) -> Tensor:
        """The rows `(rows, tokens, channels)` of a unit's maps `(B, H, W, num_heads, channels)`.

        Given the table that keys and values are taken by, in its order if it is `direct`.
        """
        x, width = x[unit], x.shape[-1]
        if x.stride(-1) != 1 or any(stride % width for stride in x.stride()[:-1]):
            x = x.contiguous()
        places = tuple(stride // width for stride in x.stride()[:-1])
        order = _order(tuple(x.shape[:-1]), places, self.grid, self.heads, x.device)
        if table is not None and self.direct:
            order = order.view(-1, len(order) // len(table)).index_select(0, table[:, 0]).flatten()
        extent = 1 + sum((size - 1) * place for size, place in zip(x.shape, places))
        vectors = x.as_strided((extent, width), (width, 1), x.storage_offset())
        buffer = self.work.take(name, (len(order), width), x.dtype)
        torch.index_select(vectors, 0, order, out=buffer)
        return buffer.view(len(x) * self.regions * self.heads, -1, width)

    def put(self, rows: Tensor, unit: slice, x: Tensor) -> None:
        """Write rows to a unit's maps, which are contiguous."""
        x, width = x[unit], x.shape[-1]
        if rows.dtype != x.dtype:
            rows = self.work.take("rounded", rows.shape, x.dtype).copy_(rows)
        order = _inverse_order(tuple(x.shape[:-1]), self.grid, self.heads, x.device)
        torch.index_select(rows.view(-1, width), 0, order, out=x.view(-1, width))

    def take(
        self, name: str, rows: Tensor, chunk: slice, index: Tensor, weights: Tensor | None
    ) -> Tensor:
        """`(rows of queries, keys, channels)`: the rows of keys that `(rows, topk)` names."""
        if self.direct:
            return rows[chunk]
        shape = (index.numel(), rows.shape[1] * rows.shape[2])
        taken = torch.index_select(
            rows.view(-1, shape[1]), 0, index.flatten(), out=self.work.take(name, shape, self.dtype)
        )
        if weights is not None:
            taken.mul_(weights.reshape(-1, 1))
        return taken.view(len(index), self.keys, rows.shape[2])

    def add(
        self,
        total: Tensor,
        chunk: slice,
        index: Tensor,
        factor: Tensor | None,
        grad: Tensor,
        rows: Tensor,
        sums: Tensor | None,
    ) -> None:
        """Add gradients of taken rows to those of the rows they were taken from.

        Args:
            total: `(rows, tokens, channels)`.
            chunk, index, factor: what `take` was given.
            grad: as `take` returns; it is written to.
            rows: what was taken, for the gradients of the weights, which are added to `sums`.
        """
        grad = grad.view(index.numel(), -1)
        if sums is not None:
            products = self.take("unweighted", rows, chunk, index, None).view(grad.shape).mul_(grad)
            sums += products.sum(-1, dtype=sums.dtype).view(index.shape)
        if factor is not None:
            grad.mul_(factor.reshape(-1, 1))
        if grad.dtype != total.dtype:
            grad = self.work.take("wide", grad.shape, total.dtype).copy_(grad)
        total.view(-1, grad.shape[1]).index_add_(0, index.flatten(), grad)

    def softmax(
        self, query: Tensor, key: Tensor, scale: float, out: Tensor | None, shift: Tensor | None
    ) -> Tensor:
        """Weights `(rows, queries, keys)`, in `out` or in a buffer.

        `shift`, if given, gets what makes them again: minus the base-2 log-sum-exp of the scores.
        """
        out = self.scores(query, key) if out is None else out
        powers = self._exponents(query, key, scale, out)
        largest = None
        if self.powers_serve:
            sums = softmax_of_exponents(powers)
            if sums is None:
                self.powers_serve = False
                return self.softmax(query, key, scale, out, shift)
        else:
            largest = powers.amax(-1, keepdim=True)
            sums = powers.sub_(largest).exp2_().sum(-1, keepdim=True)
            powers.mul_(sums.reciprocal())
        if shift is not None:
            torch.log2(sums, out=shift).neg_()
            if largest is not None:
                shift.sub_(largest)
        return powers if powers is out else out.copy_(powers)

    def softmax_again(self, query: Tensor, key: Tensor, scale: float, shift: Tensor) -> Tensor:
        """The same weights, from what `softmax` left in `shift`."""
        out = self.scores(query, key)
        powers = self._exponents(query, key, scale, out, shift).exp2_()
        return powers if powers is out else out.copy_(powers)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """A buffer for scores."""
        return self.work.take("weights", (len(query), query.shape[1], key.shape[1]), self.dtype)

    def _exponents(
        self, query: Tensor, key: Tensor, scale: float, out: Tensor, shift: Tensor | None = None
    ) -> Tensor:
        """Scores as exponents of 2, plus `shift`, in float32 at least: in `out` or in a buffer."""
        if self.dtype == self.wide:
            if shift is not None:
                out.copy_(shift.expand_as(out))
            beta = 0 if shift is None else 1
            return torch.baddbmm(out, query, key.mT, beta=beta, alpha=scale * LOG2E, out=out)
        # In half precision scores are rounded as they are, and exponents are float32.
        torch.baddbmm(out, query, key.mT, beta=0, alpha=scale, out=out)
        powers = self.work.take("powers", out.shape, self.wide).copy_(out).mul_(LOG2E)
        return powers if shift is None else powers.add_(shift)

    def saved(self, saved: Tensor, unit: slice) -> tuple[Tensor | None, Tensor | None]:
        """Of a unit, parts of `saved`, and the other None: weights that are kept, or shifts.

        They are `(rows, queries, keys)` and `(rows, queries, 1)`.
        """
        if not saved.numel():
            return None, None
        keeps = keeps_weights(self.keys)
        last = self.keys if keeps else 1
        image = self.regions * self.heads * self.queries * last
        part = saved.view(self.dtype if keeps else self.wide)
        part = part[unit.start * image : unit.stop * image].view(-1, self.queries, last)
        return (part, None) if keeps else (None, part)


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
    check_range(routing, grid[0] * grid[1])
    if pays_dense(query, key, weights, routing, grid):
        mask = _mask(query, key, routing, grid)
        return dense.forward(query, key, value, mask, None, False, scale, training)
    plan = Plan(query, key, value, routing, grid, weights is not None)
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    saved = query.new_empty(
        saved_shape(query, key, value, weights, routing, grid, training), dtype=torch.float32
    )
    # With a single band the keys have served when the values come: one buffer stays in cache.
    value_buffer = "taken key" if len(plan.bands) == 1 else "taken value"
    for unit in plan.units:
        q_rows = plan.rows("query", unit, query)
        table, soft = plan.table(unit), plan.per_row(weights, unit)
        k_rows = plan.rows("key", unit, key, table)
        v_rows = plan.rows("value", unit, value, table)
        out = plan.work.take("output", (*q_rows.shape[:2], v_rows.shape[2]), plan.dtype)
        kept, shifts = plan.saved(saved, unit)
        for chunk in plan.chunks(table):
            index, factor = table[chunk], None if soft is None else soft[chunk]
            k = plan.take("taken key", k_rows, chunk, index, factor)
            for band in plan.bands:
                target, shift = (None if x is None else x[chunk, band] for x in (kept, shifts))
                p = plan.softmax(q_rows[chunk, band], k, scale, target, shift)
                if band.start == 0:
                    v = plan.take(value_buffer, v_rows, chunk, index, factor)
                torch.bmm(p, v, out=out[chunk, band])
        plan.put(out, unit, output)
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
    training: bool,
    weights_need_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, weights (None where not needed) and None.

    Sums over regions that attend to the same keys are kept in float32 at least.
    """
    if pays_dense(query, key, weights, routing, grid):
        mask = _mask(query, key, routing, grid)
        return *dense.backward(
            grad, query, key, value, mask, None, output, saved, False, scale, training, False
        ), None
    plan = Plan(query, key, value, routing, grid, weights is not None)
    work, dtype, wide = plan.work, plan.dtype, plan.wide
    grads = [x.new_empty(x.shape) for x in (query, key, value)]
    grad_weights = None
    if weights is not None and weights_need_grad:
        grad_weights = weights.new_empty(weights.shape, dtype=wide)
    # With a single band each of these has served when the next comes: one buffer stays in cache.
    single = len(plan.bands) == 1
    v_name, grad_k_name, grad_v_name = (
        "taken" if single else name for name in ("taken value", "grad key", "grad value")
    )
    for unit in plan.units:
        q_rows = plan.rows("query", unit, query)
        table, soft = plan.table(unit), plan.per_row(weights, unit)
        k_rows = plan.rows("key", unit, key, table)
        v_rows = plan.rows("value", unit, value, table)
        g_rows = plan.rows("grad", unit, grad)
        q_total = work.take("grad query", q_rows.shape, dtype)
        k_total = work.take("key total", k_rows.shape, wide).zero_()
        v_total = work.take("value total", v_rows.shape, wide).zero_()
        kept, shifts = plan.saved(saved, unit)
        sums = None
        if grad_weights is not None:
            sums = work.take("grad weights", table.shape, wide).zero_()
        for chunk in plan.chunks(table):
            index, factor = table[chunk], None if soft is None else soft[chunk]
            chunk_sums = None if sums is None else sums[chunk]
            k = plan.take("taken key", k_rows, chunk, index, factor)
            for band in plan.bands:
                q, g = q_rows[chunk, band], g_rows[chunk, band]
                beta, last = int(band.start > 0), band.stop == plan.queries
                if shifts is None:
                    p = kept[chunk, band]
                else:
                    p = plan.softmax_again(q, k, scale, shifts[chunk, band])
                grad_v = work.take(grad_v_name, (len(q), plan.keys, v_rows.shape[2]), dtype)
                torch.baddbmm(grad_v, p.mT, g, beta=beta, out=grad_v)
                if last:
                    plan.add(v_total, chunk, index, factor, grad_v, v_rows, chunk_sums)
                if band.start == 0:
                    v = plan.take(v_name, v_rows, chunk, index, factor)
                s = torch.bmm(g, v.mT, out=work.take("scores", p.shape, dtype))
                s = torch._softmax_backward_data(s, p, -1, dtype, grad_input=s)
                grad_k = work.take(grad_k_name, k.shape, dtype)
                torch.baddbmm(grad_k, s.mT, q, beta=beta, alpha=scale, out=grad_k)
                if last:
                    plan.add(k_total, chunk, index, factor, grad_k, k_rows, chunk_sums)
                target = q_total[chunk, band]
                torch.baddbmm(target, s, k, beta=0, alpha=scale, out=target)
        for total, x in zip((q_total, k_total, v_total), grads):
            plan.put(total, unit, x)
        if grad_weights is not None and sums is not None:
            grad_weights[unit] = sums.view(-1, plan.regions, plan.heads, plan.topk).sum(2)
    work.close()
    if weights is not None and grad_weights is not None:
        grad_weights = grad_weights.to(weights.dtype)
    return *grads, grad_weights, None
