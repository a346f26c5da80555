"""The windows of local attention: which keys a query sees.

Along an axis of length L with dilation d, token i is position p = i // d of residue class
g = i % d, a row of n = ceil((L - g) / d) tokens of its own, and attends in its class only. The keys
that it sees are consecutive and never move back as p grows; axes combine by AND.

Neighborhood attention, with kernel size k and stride s (`Window`; NATTEN's rule; Generalized
Neighborhood Attention, arXiv 2504.16922):

    leader = min((p // s) s + s // 2, n - 1),  start = clamp(leader - k // 2, 0, n - k)
    start ... start + k - 1                                                    (not causal)
    leader = min((p // s) s + s - 1, n - 1),  max(leader - k + 1, 0) ... p     (causal)

Window attention, with window size w, shift s and halo h (`Block`): the window of p begins at
a, the largest number up to p that is congruent to s modulo w, and the query attends to

    a - h ... a + w + h - 1,

as far as these exist: 0 ... n - 1, or -h ... n + h - 1 where keys have a border of h positions.
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
from vitarium.ops.whole_windows import fill


class Window(NamedTuple):
    """The pattern of neighborhood attention along one axis."""

    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool

    border = 0  # keys lie where queries lie
    lead = 0  # tiles begin with the axis

    @property
    def reach(self) -> int:
        """The largest distance between a query and a key that it sees, in positions."""
        return self.kernel_size - 1

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

    def keys_seen(self, position: int, n: int) -> range:
        """The keys that a query sees, in positions of a class of n tokens."""
        k, s, _, causal = self
        if causal:
            leader = min(position // s * s + s - 1, n - 1)
            return range(max(leader - k + 1, 0), position + 1)
        leader = min(position // s * s + s // 2, n - 1)
        start = min(max(leader - k // 2, 0), n - k)
        return range(start, start + k)

    def bounds(self, position: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """The first key and one past the last key that queries see; sizes may be symbolic."""
        k, s, _, causal = self
        if causal:
            leader = torch.minimum(position // s * s + s - 1, n - 1)
            return (leader - k + 1).clamp(min=0), (position + 1).expand(leader.shape)
        leader = torch.minimum(position // s * s + s // 2, n - 1)
        start = torch.minimum((leader - k // 2).clamp(min=0), n - k)
        return start, start + k

    def tile_sizes(self, n: int) -> set[int]:
        """Tiles of a class of n tokens that may pay."""
        return {min(n, tile) for tile in (*range(2, 17), 32, 64)}

    def plain_tile(self) -> tuple[int, int, int]:
        """A tile for any place and length: queries, keys before the first query, keys."""
        k, s = self.kernel_size, self.stride
        tile = s * -(-max(4, k // 2 + 1) // s)
        return tile, k - 1, k - 1 + max(k, tile + k - k // 2)


class Block(NamedTuple):
    """The pattern of window attention along one axis.

    Attributes:
        window_size: length w of the windows, in positions.
        dilation: number of residue classes.
        shift: windows begin at positions congruent to it modulo w.
        halo: positions seen on either side of the window.
        border: positions that keys have beyond either end of the queries; 0 or `halo`.
    """

    window_size: int
    dilation: int
    shift: int
    halo: int
    border: int

    @property
    def lead(self) -> int:
        """Positions of the first window that lie before the axis."""
        return -self.shift % self.window_size

    @property
    def reach(self) -> int:
        """The largest distance between a query and a key that it sees, in positions."""
        return self.window_size - 1 + self.halo

    def check(self, operator: str, axis: str = "") -> None:
        """Raise ValueError if there is no such pattern; every pattern fits every length."""
        if self.shift >= self.window_size:
            along = f" along {axis}" if axis else ""
            raise ValueError(
                f"{operator}: shift={self.shift}{along} must be below "
                f"window_size={self.window_size}"
            )

    def keys_seen(self, position: int, n: int) -> range:
        """The keys that a query sees, in positions of a class of n tokens."""
        w, halo, border = self.window_size, self.halo, self.border
        start = (position + self.lead) // w * w - self.lead
        return range(max(start - halo, -border), min(start + w + halo, n + border))

    def bounds(self, position: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """The first key and one past the last key that queries see; sizes may be symbolic."""
        w, halo, border = self.window_size, self.halo, self.border
        start = (position + self.lead) // w * w - self.lead
        stop = torch.minimum(start + w + halo, n + border)
        return (start - halo).clamp(min=-border).expand(stop.shape), stop

    def tile_sizes(self, n: int) -> set[int]:
        """Tiles of a class of n tokens that may pay: whole windows."""
        w = self.window_size
        if w - self.lead >= n:  # all in the first window
            return {n}
        return {min(n, w * count) for count in range(1, max(2, 17 // w))}

    def plain_tile(self) -> tuple[int, int, int]:
        """A tile for any place and length: queries, keys before the first query, keys."""
        tile = self.window_size * -(-4 // self.window_size)
        return tile, self.halo, tile + 2 * self.halo


Pattern = Window | Block


def axis_pattern(length: int, window: Pattern, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which keys each query of an axis sees, and their offsets: two `(length, keys)` tensors."""
    d, border = window.dilation, window.border
    index = torch.arange(length, device=device)
    group, position = index % d, index // d
    n = (length - group + d - 1) // d
    start, stop = window.bounds(position, n)
    index = torch.arange(length + 2 * border * d, device=device)
    key = index // d - border
    inside = (key >= start[:, None]) & (key < stop[:, None]) & (index % d == group[:, None])
    return inside, key - position[:, None]


@functools.lru_cache(maxsize=256)
def axis_tiles(length: int, window: Pattern, tile: int) -> Axis:
    """The tiles of one axis."""
    d = window.dilation
    ranges = []
    for group in range(d):
        n = -(-(length - group) // d)
        ranges.append([window.keys_seen(position, n) for position in range(n)])
    return cut(length, d, tile, ranges, _lead(window, len(ranges[0]), tile), window.border)


def _lead(window: Pattern, n: int, tile: int) -> int:
    """`Axis.lead` for a largest class of n tokens: tiles begin where windows do.

    Where the first window is cut off by the border and fits behind what the last one holds, the
    two share a tile, as by Swin's cyclic shift.
    """
    if isinstance(window, Window) or tile >= n or not window.lead:
        return 0
    first = -window.lead % tile  # positions before the second tile
    if not window.halo and 0 < (n - first) % tile <= tile - first:
        return -first
    return window.lead


@functools.lru_cache(maxsize=256)
def tiles_for(
    spatial: tuple[int, ...], windows: tuple[Pattern, ...], path: str = "tiles"
) -> tuple[Axis, ...]:
    """The cheapest tiles for this map: few halo positions, and scores that are mostly wanted.

    `path` is the one of `vitarium.ops.tiled.path` that they are for, or "whole" for
    `vitarium.ops.whole_windows` where it serves.
    """
    choices = []
    for length, window in zip(spatial, windows):
        size = -(-length // window.dilation)
        tiles = sorted(window.tile_sizes(size))
        choices.append([axis_tiles(length, window, tile) for tile in tiles])
    costs = {
        "tiles": _tiles_cost,
        "whole": _whole_cost,
        "dense": _dense_cost,
        "strips": _strips_cost,
    }
    cost = costs[path]
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


def _whole_cost(axes: tuple[Axis, ...]) -> float:
    """As above, but weights of small tiles that fill the map are kept for the backward."""
    if fill(axes):
        tiles = math.prod(axis.classes * axis.tiles for axis in axes)
        return 1.15 * tiles * math.prod(axis.tile * axis.halo for axis in axes)
    return _tiles_cost(axes)


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
    if all(axis.is_grid(keys=False) for axis in axes):
        return 0
    return 8 * math.prod(axis.classes * axis.queries for axis in axes)


def walk(length: int, window: Window, queries: int, keys: int) -> int:
    """Key tiles that the query tiles of an axis visit, each from its first key seen to its last."""
    visited = 0
    for group in range(window.dilation):
        n = -(-(length - group) // window.dilation)
        for first in range(0, n, queries):
            start = window.keys_seen(first, n).start
            stop = window.keys_seen(min(first + queries, n) - 1, n).stop
            visited += -(-(stop - start) // keys)
    return visited


def pairs_seen(spatial: tuple[int, ...], windows: tuple[Pattern, ...]) -> int:
    """Number of (query, key) pairs of one head of one image."""
    pairs = 1
    for length, window in zip(spatial, windows):
        d = window.dilation
        sizes = (-(-(length - group) // d) for group in range(d))
        pairs *= sum(len(window.keys_seen(p, n)) for n in sizes for p in range(n))
    return pairs


def plain_axis(length: int, window: Pattern, device: torch.device) -> PlainAxis:
    """An axis for `attend_plain`: window bounds by arithmetic on a length that may be symbolic.

    Where the border falls in a tile is unknown, so halos are wide enough for any place.
    """
    d, lead = window.dilation, window.lead
    tile, before, halo = window.plain_tile()
    tiles = ((length + d - 1) // d + lead + tile - 1) // tile
    group = torch.arange(d, device=device)[:, None]
    n = (length - group + d - 1) // d
    position = torch.arange(tiles * tile, device=device) - lead
    start, stop = (bound.unflatten(-1, (tiles, tile)) for bound in window.bounds(position, n))
    return PlainAxis(length, d, tile, tiles, before, halo, lead, window.border, start, stop)
