"""Maps cut into windows that are computed apart: what mixers of linear attention share.

Linear attention has no use for a mask, and reads windows as images of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import dispatch
from vitarium.ops.mixer import Mixer

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
    def of(cls, map_size: Pair, window_size: Pair, shift: int = 0) -> Partition:
        """Windows clipped to the map; a map of one window along an axis is not shifted there."""
        sizes = [min(window, length) for window, length in zip(window_size, map_size)]
        shifts = [shift if length > window else 0 for length, window in zip(map_size, window_size)]
        return cls((map_size[0], map_size[1]), (sizes[0], sizes[1]), (shifts[0], shifts[1]))

    @property
    def grid(self) -> Pair:
        """Windows along each axis."""
        (height, width), (tall, wide) = self.map_size, self.window_size
        return -(-height // tall), -(-width // wide)

    def split(self, x: Tensor) -> Tensor:
        """`(B * windows, height, width, C)` of a map `(B, H, W, C)`."""
        lack = [-length % window for length, window in zip(self.map_size, self.window_size)]
        if any(lack):
            x = F.pad(x, (0, 0, 0, lack[1], 0, lack[0]))
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
