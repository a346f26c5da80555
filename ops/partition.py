"""Maps cut into windows that are computed apart, as images of their own.

This is for mixers whose official code masks nothing at borders, and whose work in a window is more
than attention of tokens to tokens. Others leave the map where it is, see `vitarium.ops.window`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitarium.ops import dispatch
from vitarium.ops.mixer import Mixer, pad_map

Pair = tuple[int, int]


class Partition(NamedTuple):
    """Windows of one size on a map, which is padded with zeros at the bottom and right.

    Attributes:
        map_size: height and width of the map.
        window_size: height and width of a window, at most those of the map.
        shift: rows and columns that the map is rolled back by.
    """

    map_size: Pair
    window_size: Pair
    shift: Pair = (0, 0)

    @classmethod
    def of(cls, map_size: Pair, window_size: Pair, shift: Pair = (0, 0)) -> Partition:
        """Windows clipped to the map; a map of one window along an axis is not shifted there."""
        (height, width), (tall, wide) = map_size, window_size
        shift = (shift[0] if height > tall else 0, shift[1] if width > wide else 0)
        return cls((height, width), (min(tall, height), min(wide, width)), shift)

    @classmethod
    def stripes(cls, map_size: Pair, idx: int, split_size: int) -> Partition:
        """Stripes as high as the map (`idx` 0), as wide as the map (1), or the map itself (-1)."""
        height = split_size if idx == 1 else map_size[0]
        width = split_size if idx == 0 else map_size[1]
        return cls.of(map_size, (height, width))

    @property
    def grid(self) -> Pair:
        """Windows along each axis."""
        (height, width), (tall, wide) = self.map_size, self.window_size
        return -(-height // tall), -(-width // wide)

    def split(self, x: Tensor) -> Tensor:
        """`(B * windows, height, width, C)` of a map `(B, H, W, C)`."""
        lack = [-length % window for length, window in zip(self.map_size, self.window_size)]
        x = pad_map(x, lack)
        if any(self.shift):
            x = torch.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
        (rows, columns), (tall, wide) = self.grid, self.window_size
        if rows == columns == 1:
            return x
        x = x.unflatten(2, (columns, wide)).unflatten(1, (rows, tall))
        return x.transpose(2, 3).flatten(0, 2)

    def join(self, x: Tensor) -> Tensor:
        """The map again."""
        rows, columns = self.grid
        if rows > 1 or columns > 1:
            x = x.unflatten(0, (-1, rows, columns)).transpose(2, 3)
            x = x.flatten(3, 4).flatten(1, 2)
        if any(self.shift):
            x = torch.roll(x, self.shift, (1, 2))
        return x[:, : self.map_size[0], : self.map_size[1]]

    def weights(self, mixer: Mixer, call: dispatch.Call, wanted: Tensor) -> Tensor:
        """`Mixer._weights` of a call that saw windows, on the map."""
        windows = self.split(wanted.movedim(1, -1)).movedim(-1, 1)
        found = Mixer._weights(mixer, call, windows)
        return self.join(found.movedim(1, -1)).movedim(-1, 1)


def window_and_shift(
    owner: str, window_size: int | Pair, shift_size: int | Pair
) -> tuple[Pair, Pair]:
    """Both as pairs.

    Raises:
        ValueError, TypeError: they are no sizes, or the shift is not below the window.
    """
    window = dispatch.per_dimension(owner, "window_size", window_size, 2)
    shift = dispatch.per_dimension(owner, "shift_size", shift_size, 2, least=0)
    if any(s >= w for s, w in zip(shift, window)):
        raise ValueError(
            f"{owner}: shift_size={shift_size!r} must be less than window_size={window_size!r}"
        )
    return window, shift


class InWindows:
    """Put before a mixer's class: what it does to a map is done in windows, plain or shifted."""

    window_size: Pair
    shift_size: Pair

    def partition(self, size: Pair) -> Partition:
        """The windows of a map of this size."""
        return Partition.of(size, self.window_size, self.shift_size)

    def mix(self, x: Tensor) -> Tensor:
        partition = self.partition((x.shape[1], x.shape[2]))
        return partition.join(super().mix(partition.split(x)))  # type: ignore[misc]

    def _weights(self, call: dispatch.Call, wanted: Tensor) -> Tensor:
        partition = self.partition((wanted.shape[-2], wanted.shape[-1]))
        return partition.weights(self, call, wanted)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """What the mixer says, and the windows."""
        text = f"window_size={self.window_size}, shift_size={self.shift_size}"
        return f"{super().extra_repr()}, {text}"  # type: ignore[misc]
