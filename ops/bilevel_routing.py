"""Bi-level routing attention: regions choose regions, then tokens attend to the chosen tokens.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention" (arXiv 2303.08810),
equations 3 to 8. A map is cut into n_y x n_x regions. `route` averages queries and keys over
regions and keeps, for every region, the topk regions whose keys fit its queries best; every token
then attends to all tokens of the regions that its own region chose. Cost: N topk (N / regions)
(head_dim + value_dim) multiply-adds a head for N tokens, instead of N^2.

The paper's code gathers the chosen keys and values, topk copies of both. Here they are read in
place, forward and backward, so memory grows with the number of tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import bilevel_portable as portable
from vitarium.ops import dispatch
from vitarium.ops.differentiable import Differentiable
from vitarium.ops.dispatch import Case, Operator

NAME = "bilevel_routing_attention"


def bilevel_routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routing: Tensor,
    n_win: int | tuple[int, int],
    *,
    weights: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every token to all tokens of the regions that a table names for its region.

    Maps are cut into `n_win` regions along (H, W), numbered in raster order. An entry that a row
    of the table repeats counts as often as it is there: its keys are as many further keys.

    Args:
        query: `(B, H, W, num_heads, head_dim)`; the grid of regions divides H and W; any strides.
        key: `(B, H_kv, W_kv, num_heads_kv, head_dim)`; the grid divides H_kv and W_kv, which may
            be another size; num_heads_kv divides num_heads, and query head h reads key and value
            head `h // (num_heads // num_heads_kv)`.
        value: `(B, H_kv, W_kv, num_heads_kv, value_dim)`.
        routing: integers `(B, n_y * n_x, topk)`: for every region of queries the regions of keys
            that it attends to, 0 ... n_y * n_x - 1. `route` makes such tables.
        n_win: regions along H and W, an int or `(n_y, n_x)`.
        weights: soft routing, `(B, n_y * n_x, topk)`, floating-point: keys and values of an entry
            are multiplied by its weight; it may require a gradient.
        scale: factor on the scores; `head_dim ** -0.5` if None.
        backend: "reference", "torch", "triton", or None to choose.

    Returns:
        `(B, H, W, num_heads, value_dim)`, contiguous, in the dtype of query.

    Raises:
        ValueError: shapes, sizes or devices do not fit, the named backend cannot run this, or, on
            a CPU, an entry of the table is out of range. The Triton kernels, which cannot look
            without waiting for the device, take the nearest region instead.
        TypeError: an argument is of the wrong type, or dtypes differ.
    """
    grid = _check(query, key, value, routing, n_win, weights)
    scale = dispatch.check_scale(NAME, scale, query)
    training = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (query, key, value, weights)
    )
    query, key, value = dispatch.autocast(query, key, value)
    args = (query, key, value, weights, routing, list(grid), float(scale), training)
    return dispatch.choose(NAME, backend, _IMPLEMENTATIONS, query.device, *args)(*args)


@dispatch.remembered
def _check(
    query: Tensor, key: Tensor, value: Tensor, routing: Any, n_win: Any, weights: Any
) -> tuple[int, int]:
    """The grid of regions; raises what `bilevel_routing_attention` says it raises."""
    dispatch.check_tensors(NAME, query=query, key=key, value=value)
    grid = dispatch.per_dimension(NAME, "n_win", n_win, 2)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        shape = tuple(tensor.shape)
        if len(shape) != 5:
            raise ValueError(
                f"{NAME}: {name} has shape {shape}; allowed is (B, H, W, num_heads, head_dim)"
            )
        if shape[0] != query.shape[0]:
            raise ValueError(
                f"{NAME}: {name} has batch size {shape[0]}, query {query.shape[0]}; they must agree"
            )
        for axis, length, regions in zip("HW", shape[1:3], grid):
            if length < 1 or length % regions:
                raise ValueError(
                    f"{NAME}: n_win={grid} does not divide the map {shape[1:3]} of {name} "
                    f"along {axis}"
                )
        if shape[-1] < 1:
            raise ValueError(f"{NAME}: {name} has head_dim {shape[-1]}; allowed is at least 1")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"{NAME}: key has head_dim {key.shape[-1]}, query {query.shape[-1]}; they must agree"
        )
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"{NAME}: value has shape {tuple(value.shape)}, key {tuple(key.shape)}; all dimensions "
            "but the last must agree"
        )
    if key.shape[-2] < 1 or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"{NAME}: key has {key.shape[-2]} heads, which do not divide the query's "
            f"{query.shape[-2]}"
        )
    _check_table(query, routing, grid, weights)
    return grid


def _check_table(query: Tensor, routing: Any, grid: tuple[int, int], weights: Any) -> None:
    if not isinstance(routing, Tensor):
        raise TypeError(f"{NAME}: routing must be a tensor, got {type(routing).__name__}")
    if routing.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{NAME}: routing must be int32 or int64, got {routing.dtype}")
    shape, rows = tuple(routing.shape), (query.shape[0], grid[0] * grid[1])
    if len(shape) != 3 or shape[:2] != rows or shape[2] < 1:
        raise ValueError(
            f"{NAME}: routing has shape {shape}; allowed is ({rows[0]}, {rows[1]}, topk), topk at "
            "least 1"
        )
    if routing.device != query.device:
        raise ValueError(f"{NAME}: routing is on {routing.device}, query on {query.device}")
    if weights is None:
        return
    if not isinstance(weights, Tensor):
        raise TypeError(f"{NAME}: weights must be a tensor or None, got {type(weights).__name__}")
    if not weights.is_floating_point():
        raise TypeError(f"{NAME}: weights must be floating-point, got {weights.dtype}")
    if tuple(weights.shape) != shape:
        raise ValueError(
            f"{NAME}: weights has shape {tuple(weights.shape)}, routing {shape}; they must agree"
        )
    if weights.device != query.device:
        raise ValueError(f"{NAME}: weights is on {weights.device}, query on {query.device}")


def route(
    query: Tensor,
    key: Tensor,
    n_win: int | tuple[int, int],
    topk: int,
    *,
    scale: float = 1.0,
    extent: tuple[int, int] | None = None,
    embed: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The regions that every region attends to: those whose mean key fits its mean query best.

    Both maps are averaged over regions, all heads together; the affinity of two regions is the
    product of their means (equations 3 to 5). The table has no gradient; the weights have that of
    the affinities, so detach `query` and `key` for routing that does not learn, as BiFormer does.

    Args:
        query, key: `(B, H, W, num_heads, head_dim)` or `(B, H, W, C)`; `n_win` divides H and W.
        n_win: regions along H and W, an int or `(n_y, n_x)`.
        topk: how many regions each region chooses, at most all.
        scale: factor on the affinities.
        extent: height and width of the maps without padding of zeros at the bottom and right,
            which the means then leave out.
        embed: what to do with the means, `(B, regions, C)`, before they are multiplied.

    Returns:
        Table `(B, n_y * n_x, topk)`, int64, best first, and the softmax of the affinities of its
        entries, of the same shape.

    Raises:
        ValueError: `n_win` does not divide a map, or `topk` is out of range.
    """
    grid = dispatch.per_dimension("route", "n_win", n_win, 2)
    regions = grid[0] * grid[1]
    if not 1 <= topk <= regions:
        raise ValueError(f"route: topk={topk} must be between 1 and the {regions} regions")
    for name, x in (("query", query), ("key", key)):
        if x.dim() not in (4, 5) or x.shape[1] % grid[0] or x.shape[2] % grid[1]:
            raise ValueError(
                f"route: {name} has shape {tuple(x.shape)}; allowed is (B, H, W, ...) that "
                f"n_win={grid} divides"
            )
    means = [_region_means(x.flatten(3), grid, extent) for x in (query, key)]
    if embed is not None:
        means = [embed(mean) for mean in means]
    affinity = (means[0] * scale) @ means[1].transpose(-1, -2)
    best, routing = affinity.topk(topk, dim=-1)
    return routing, best.softmax(-1)


def _region_means(x: Tensor, grid: tuple[int, int], extent: tuple[int, int] | None) -> Tensor:
    """`(B, regions, C)` of `(B, H, W, C)`."""
    size = (x.shape[1] // grid[0], x.shape[2] // grid[1])
    if dispatch.plain_aten() or torch.compiler.is_compiling():  # sizes may be symbolic
        means = x.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1)).mean((2, 4))
    else:  # several times faster
        means = F.avg_pool2d(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    if extent is not None and tuple(extent) != tuple(x.shape[1:3]):
        inside = [
            (length - torch.arange(n, device=x.device) * tokens).clamp(0, tokens)
            for length, n, tokens in zip(extent, grid, size)
        ]
        count = (inside[0][:, None] * inside[1]).clamp(min=1)
        means = means * (math.prod(size) / count)[..., None].to(means.dtype)
    return means.flatten(1, 2)


# --- the definition ------------------------------------------------------------------------------


def _regions(x: Tensor, grid: list[int]) -> Tensor:
    """`(B, regions, tokens, num_heads, channels)` of `(B, H, W, num_heads, channels)`."""
    x = x.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    routing: Tensor,
    grid: list[int],
    scale: float,
    training: bool,
) -> Tensor:
    if not (dispatch.plain_aten() or torch.compiler.is_compiling()):
        portable.check_range(routing, grid[0] * grid[1])
    height, width = query.shape[1:3]
    group = query.shape[-2] // key.shape[-2]
    image = torch.arange(routing.shape[0], device=routing.device)[:, None, None]
    # (B, regions, topk, tokens, num_heads, channels)
    key, value = (_regions(x, grid)[image, routing.long()] for x in (key, value))
    if weights is not None:
        factor = weights.to(key.dtype)[..., None, None, None]
        key, value = key * factor, value * factor
    key, value = (x.flatten(2, 3).repeat_interleave(group, -2) for x in (key, value))
    query, key, value = (x.transpose(2, 3) for x in (_regions(query, grid), key, value))
    scores = query @ key.transpose(-1, -2) * scale
    output = (scores.softmax(-1) @ value).transpose(2, 3)  # (B, regions, tokens, heads, channels)
    output = output.unflatten(2, (height // grid[0], width // grid[1])).unflatten(1, tuple(grid))
    return output.transpose(2, 3).flatten(3, 4).flatten(1, 2).contiguous()


# --- the custom operator -------------------------------------------------------------------------


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *call, training, fused = args
    if fused:
        from vitarium.ops.kernels import bilevel_routing as kernels

        return kernels.forward(*call)
    return portable.forward(*call, training)


def _backward(grad: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    *call, training, fused, needs = args
    if fused:
        from vitarium.ops.kernels import bilevel_routing as kernels

        return kernels.backward(grad, *call, needs[3])
    return portable.backward(grad, *call, training, needs[3])


def _saved_shape(query, key, value, weights, routing, grid, scale, training, fused):
    if fused:  # base-2 log-sum-exp
        return tuple(query.shape[:-1])
    return portable.saved_shape(query, key, value, weights, routing, grid, training)


def _scores(query, key, routing, grid) -> int:
    """Pairs of query and key of which a score is needed."""
    keys = routing[-1] * (key[1] // grid[0]) * (key[2] // grid[1])
    return math.prod(query[:-1]) * keys


def _flops(query, key, value, weights, routing, grid, *_) -> int:
    return 2 * _scores(query, key, routing, grid) * (query[-1] + value[-1])


def _backward_flops(query, key, value, weights, routing, grid, *_) -> int:
    """Three products over head_dim (scores again, query, key) and two over value_dim."""
    return 2 * _scores(query, key, routing, grid) * (3 * query[-1] + 2 * value[-1])


_OPERATION = Differentiable(
    NAME,
    tensors="Tensor query, Tensor key, Tensor value, Tensor? weights, Tensor routing",
    arguments="int[] grid, float scale, bool training",
    forward=_forward,
    backward=_backward,
    output_shape=lambda query, key, value, *_: (*query.shape[:-1], value.shape[-1]),
    saved_shape=_saved_shape,
    flops=_flops,
    backward_flops=_backward_flops,
)


_IMPLEMENTATIONS = _OPERATION.implementations(
    reference=_reference, plain=_reference, refuses=dispatch.triton_refuses
)


# --- test cases ----------------------------------------------------------------------------------


def _case(
    note: str,
    size: tuple[int, int],
    n_win: int | tuple[int, int],
    topk: int,
    *,
    size_kv: tuple[int, int] | None = None,
    batch: int = 1,
    heads: tuple[int, int] = (1, 1),
    dims: tuple[int, int] = (16, 16),
    weights: bool = False,
    repeats: bool = False,
    **kwargs: Any,
) -> Case:
    """A call with (query, key) heads and (query, value) widths; `repeats`: within rows."""
    grid = (n_win, n_win) if isinstance(n_win, int) else n_win
    table = (batch, grid[0] * grid[1], topk)

    def draw(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        if repeats:
            return torch.randint(table[1], shape, generator=generator)
        chance = torch.rand(*shape[:2], table[1], generator=generator)
        return chance.topk(shape[2]).indices if batch else torch.zeros(shape, dtype=torch.int64)

    size_kv = size if size_kv is None else size_kv
    shapes: dict[str, tuple[int, ...]] = {
        "query": (batch, *size, heads[0], dims[0]),
        "key": (batch, *size_kv, heads[1], dims[0]),
        "value": (batch, *size_kv, heads[1], dims[1]),
        "routing": table,
    }
    values = {"routing": draw}
    if weights:
        shapes["weights"] = table
        values["weights"] = lambda generator, shape: torch.rand(shape, generator=generator)
    return Case(note, shapes, {"n_win": n_win, **kwargs}, values)


CASES = (
    _case("soft routing", (4, 9), (1, 3), 2, batch=2, weights=True),
    _case("regions of two by three tokens", (4, 6), 2, 3, heads=(2, 2)),
    _case("regions of one token", (3, 2), (3, 2), 4, batch=2),
    _case("one region", (5, 7), 1, 1, heads=(2, 2)),
    _case("all regions", (2, 8), (1, 4), 4, weights=True),
    _case("repeated regions", (4, 6), 2, 5, weights=True, repeats=True),
    _case("grouped heads", (4, 6), (2, 1), 1, batch=2, heads=(4, 2), weights=True),
    _case("pooled keys", (6, 8), (3, 2), 2, size_kv=(3, 4), weights=True),
    _case("unequal widths", (4, 8), 2, 2, dims=(24, 40), scale=-0.3),
    _case("several tiles in a region", (10, 9), (2, 1), 1),
    _case("one token", (1, 1), 1, 1, weights=True),
    _case("no images", (4, 4), 2, 2, batch=0, weights=True),
)


def _launches() -> list[Case]:
    """Soft routing, which takes most registers, and regions smaller than a tile."""
    found = [
        _case(f"head_dim {dim}", (64, 64), 4, 8, heads=(2, 2), dims=(dim, dim), weights=True)
        for dim in (32, 64, 128, 256)
    ]
    return [
        *found,
        _case("regions of 16 tokens", (16, 16), 4, 4, heads=(2, 2), dims=(32, 32)),
        _case("small regions", (8, 8), 4, 8, heads=(2, 2), dims=(32, 32)),
    ]


OPERATOR = Operator(
    NAME,
    bilevel_routing_attention,
    _IMPLEMENTATIONS,
    CASES,
    _OPERATION,
    _launches(),
    context="any size",
)
