"""The windows of neighborhood attention: which keys a query sees.

Per axis of length L, with kernel size k, stride s and dilation d, token i is position p = i // d
of residue class g = i % d, a row of n = ceil((L - g) / d) tokens of its own, and attends, in its
class only, to

    leader = min((p // s) s + s // 2, n - 1),  start = clamp(leader - k // 2, 0, n - k)
    start ... start + k - 1                                                    (not causal)
    leader = min((p // s) s + s - 1, n - 1),  max(leader - k + 1, 0) ... p     (causal)

and axes combine by AND (NATTEN's rule; Generalized Neighborhood Attention, arXiv 2504.16922).
A query is always among its keys' window, so offsets between the two stay below k.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from vitarium.ops.strips import split
from vitarium.ops.tiles import Axis, PlainAxis, cut


class Window(NamedTuple):
    """The pattern along one axis: kernel size, stride, dilation, causal or not."""

    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool

    def check(self, operator: str, length: int, axis: str = "", map_size: object = None) -> None:
        """Raise ValueError if the window does not fit an axis of `length` tokens."""
        along = f" along {axis}" if axis else ""
        if self.stride > self.kernel_size:
            raise ValueError(
                f"{operator}: stride={self.stride}{along} exceeds kernel_size={self.kernel_size}; "
                "allowed is at most the kernel size"
            )
        if self.kernel_size * self.dilation > length:
            raise ValueError(
                f"{operator}: kernel_size={self.kernel_size} exceeds the feature map "
                f"{map_size or length}{along} at dilation {self.dilation}; allowed is "
                "kernel_size * dilation <= length"
            )


def axis_pattern(length: int, window: Window, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which keys each query of an axis sees, and their offsets: two `(length, length)` tensors."""
    k, s, d, causal = window
    index = torch.arange(length, device=device)
    group, position = index % d, index // d
    n = (length - group + d - 1) // d
    key = position[None, :]
    if causal:
        leader = torch.minimum(position // s * s + s - 1, n - 1)[:, None]
        inside = (key <= position[:, None]) & (leader - key < k)
    else:
        leader = torch.minimum(position // s * s + s // 2, n - 1)
        start = torch.minimum((leader - k // 2).clamp(min=0), n - k)[:, None]
        inside = (key >= start) & (key < start + k)
    inside = inside & (group[:, None] == group[None, :])
    return inside, key - position[:, None]


def keys_seen(position: int, n: int, window: Window) -> range:
    """The keys that a query sees, in positions of a class of n tokens."""
    k, s, _, causal = window
    if causal:
        leader = min(position // s * s + s - 1, n - 1)
        return range(max(leader - k + 1, 0), position + 1)
    leader = min(position // s * s + s // 2, n - 1)
    start = min(max(leader - k // 2, 0), n - k)
    return range(start, start + k)


@functools.lru_cache(maxsize=256)
def axis_tiles(length: int, window: Window, tile: int) -> Axis:
    """The tiles of one axis."""
    d = window.dilation
    ranges = []
    for group in range(d):
        n = -(-(length - group) // d)
        ranges.append([keys_seen(position, n, window) for position in range(n)])
    return cut(length, d, tile, ranges)


@functools.lru_cache(maxsize=256)
def tiles_for(
    spatial: tuple[int, ...], windows: tuple[Window, ...], path: str = "tiles"
) -> tuple[Axis, ...]:
    """The cheapest tiles for this map: few halo positions, and scores that are mostly wanted.

    `path` is the one of `vitarium.ops.tiled.path` that they are for.
    """
    choices = []
    for length, window in zip(spatial, windows):
        size = -(-length // window.dilation)
        tiles = {min(size, tile) for tile in (*range(2, 17), 32, 64)}
        choices.append([axis_tiles(length, window, tile) for tile in sorted(tiles)])
    cost = {"tiles": _tiles_cost, "dense": _dense_cost, "strips": _strips_cost}[path]
    return min(itertools.product(*choices), key=cost)


# Costs are times on a CPU at head_dim 32, relative to each other, fitted to measurements.


def _tiles_cost(axes: tuple[Axis, ...]) -> float:
    """Scores, cheaper in large tiles; halos to copy; positions to copy where a map is no grid."""
    queries = math.prod(axis.tile for axis in axes)
    tiles = math.prod(axis.classes * axis.tiles for axis in axes)
    halos = tiles * math.prod(axis.halo for axis in axes)
    time = halos * queries * (2.6 if queries >= 28 else 3.0)
    if tiles > 1:
        time += halos * 16
    return time + _copies(axes)


def _dense_cost(axes: tuple[Axis, ...]) -> float:
    """As above, but a single tile needs no copies at all."""
    if all(axis.classes == axis.tiles == 1 for axis in axes):
        return 2 * math.prod(axis.tile * axis.halo for axis in axes)
    return _tiles_cost(axes)


def _strips_cost(axes: tuple[Axis, ...]) -> float:
    """As above, but halos are copied once per strip; 16 keys at a time are fastest."""
    first = max((part for _, part in split(axes[0])[1]), key=lambda part: part.length)
    queries = first.tile * math.prod(axis.tile for axis in axes[1:])
    keys = first.halo * math.prod(axis.halo for axis in axes[1:])
    tiles = axes[0].classes * axes[0].length / first.tile
    tiles *= math.prod(axis.classes * axis.tiles for axis in axes[1:])
    time = tiles * queries * keys * (2 + 12 / queries + (0.5 if keys % 16 else 0))
    strips = math.prod(axis.classes * axis.tiles * axis.halo for axis in axes[1:])
    return time + strips * axes[0].classes * axes[0].length * 48 + _copies(axes[1:])


def _copies(axes: tuple[Axis, ...]) -> float:
    if all(axis.classes == 1 and axis.queries == axis.length for axis in axes):
        return 0
    return 8 * math.prod(axis.classes * axis.queries for axis in axes)


def walk(length: int, window: Window, queries: int, keys: int) -> int:
    """Key tiles that the query tiles of an axis visit, each from its first key seen to its last."""
    visited = 0
    for group in range(window.dilation):
        n = -(-(length - group) // window.dilation)
        for first in range(0, n, queries):
            start = keys_seen(first, n, window).start
            stop = keys_seen(min(first + queries, n) - 1, n, window).stop
            visited += -(-(stop - start) // keys)
    return visited


def pairs_seen(spatial: tuple[int, ...], windows: tuple[Window, ...]) -> int:
    """Number of (query, key) pairs of one head of one image."""
    pairs = 1
    for length, window in zip(spatial, windows):
        d = window.dilation
        sizes = (-(-(length - group) // d) for group in range(d))
        pairs *= sum(len(keys_seen(position, n, window)) for n in sizes for position in range(n))
    return pairs


def plain_axis(length: int, window: Window, device: torch.device) -> PlainAxis:
    """An axis for `attend_plain`: window bounds by arithmetic on a length that may be symbolic.

    Where the border falls in a tile is unknown, so halos are wide enough for any place.
    """
    k, s, d, causal = window
    tile = s * -(-max(4, k // 2 + 1) // s)
    size = (length + d - 1) // d
    tiles = (size + tile - 1) // tile
    group = torch.arange(d, device=device)[:, None]
    n = (length - group + d - 1) // d
    position = torch.arange(tiles * tile, device=device)
    if causal:
        leader = torch.minimum(position // s * s + s - 1, n - 1)
        start, stop = (leader - k + 1).clamp(min=0), (position + 1).expand(d, -1)
    else:
        leader = torch.minimum(position // s * s + s // 2, n - 1)
        start = torch.minimum((leader - k // 2).clamp(min=0), n - k)
        stop = start + k
    return PlainAxis(
        length,
        d,
        tile,
        tiles,
        before=k - 1,
        halo=k - 1 + max(k, tile + k - k // 2),
        start=start.unflatten(-1, (tiles, tile)),
        stop=stop.unflatten(-1, (tiles, tile)),
    )
