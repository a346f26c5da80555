"""What is added to the scores of tiles: masks and relative position bias."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitarium.ops.tiles import Axis
from vitarium.ops.workspace import Workspace

FEW = 16  # patterns


class Patterns:
    """The distinct patterns of all axes together, as tensors."""

    def __init__(self, axes: Sequence[Axis], device: torch.device) -> None:
        rank = len(axes)
        self.axes = axes
        self.device = device
        inside = torch.ones((), dtype=torch.bool, device=device)
        self.offsets: list[Tensor] = []  # per axis: key minus query
        for i, axis in enumerate(axes):
            seen = torch.tensor(axis.patterns, device=device)
            key = torch.arange(axis.halo, device=device)
            query = torch.arange(axis.tile, device=device)[:, None]
            shape = [1] * (3 * rank)
            shape[i::rank] = len(axis.patterns), axis.tile, axis.halo
            inside = inside & ((key >= seen[..., :1]) & (key < seen[..., 1:])).view(shape)
            shape[i] = 1
            self.offsets.append((key - axis.before - query).view(shape))
        self.outside = ~inside.reshape(  # (patterns, queries, keys)
            *(math.prod(inside.shape[i * rank : (i + 1) * rank]) for i in range(3))
        )
        self.all_inside = not bool(self.outside.any())
        self.mask = functools.cache(self._mask)
        self.which = functools.cache(self._which)
        self.bias_index = functools.cache(self._bias_index)

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to scores where there is no bias, `(1, patterns, queries, keys)`."""
        with torch.inference_mode(False):  # it will serve other calls
            mask = self.outside.new_zeros((1, *self.outside.shape), dtype=dtype)
            return mask.masked_fill_(self.outside, -math.inf)

    def _which(self, band: tuple[int, int], strips: bool = False) -> Tensor:
        """The pattern of every (class, tile) of a band, flattened.

        With `strips`, tiles of the first axis come last.
        """
        rank = len(self.axes)
        index = torch.zeros((), dtype=torch.long, device=self.device)
        for i, axis in enumerate(self.axes):
            first, last = band if i == 0 else (0, axis.tiles)
            rows = torch.tensor([row[first:last] for row in axis.which], device=self.device)
            shape = [1] * (2 * rank)
            shape[i::rank] = rows.shape
            index = index * len(axis.patterns) + rows.view(shape)
        return (index.movedim(rank, -1) if strips else index).flatten()

    def members(self, band: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """`(patterns, tiles)`: 1 where a tile has the pattern, else 0."""
        patterns = torch.arange(len(self.outside), device=self.device)
        return (patterns[:, None] == self.which(band)).to(dtype)

    def _bias_index(self, sizes: tuple[int, ...]) -> Tensor:
        """Index into a flattened bias table of these sizes, for every query and key of a tile."""
        index = torch.zeros((), dtype=torch.long, device=self.device)
        for offset, size in zip(self.offsets, sizes):
            index = index * size + (offset + size // 2).clamp(0, size - 1)
        return index.flatten()


_patterns = functools.lru_cache(maxsize=128)(Patterns)


class Additive:
    """The mask, and the bias where there is one, that is added to the scores of a band of tiles.

    Tiles that look alike share a pattern, so both are made once per pattern and then copied.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        bias: Tensor | None,
        dtype: torch.dtype,
        work: Workspace,
        name: str = "additive",
    ) -> None:
        self.work = work
        self.name = name
        self.patterns = _patterns(tuple(axes), work.device)
        self.needed = bias is not None or not self.patterns.all_inside
        self.alike = len(self.patterns.outside) == 1
        self._bias, self._dtype = bias, dtype
        self._bands: dict[tuple[Any, ...], Tensor] = {}

    @functools.cached_property
    def table(self) -> Tensor:
        """Mask and bias of every pattern, `(num_heads or 1, patterns, queries, keys)`."""
        outside, bias, dtype = self.patterns.outside, self._bias, self._dtype
        if bias is None:
            return self.patterns.mask(dtype)
        table = bias.to(dtype).flatten(1).index_select(1, self.patterns.bias_index(bias.shape[1:]))
        table = table.view(-1, 1, *outside.shape[1:])
        if not self.patterns.all_inside:
            # Every query sees a key. PyTorch's fused attention is slower with large numbers.
            table = table.masked_fill(outside, -math.inf)
        return table

    def band(self, band: tuple[int, int], strips: bool = False) -> Tensor:
        """`(num_heads or 1, classes and tiles, queries, keys)` of a band, or 1 tile for all."""
        if self.alike:
            return self.table
        alike = tuple(row[slice(*band)] for row in self.patterns.axes[0].which)
        if alike not in self._bands:
            which = self.patterns.which(band, strips)
            shape = (self.table.shape[0], *which.shape, *self.table.shape[2:])
            name = f"{self.name} {len(self._bands)}"
            self._bands[alike] = torch.index_select(
                self.table, 1, which, out=self.work.take(name, shape, self.table.dtype)
            )
        return self._bands[alike]

    def of(self, heads: slice, band: tuple[int, int]) -> Tensor | None:
        """The same of some heads, or None if there is nothing to add."""
        if not self.needed:
            return None
        table = self.band(band)
        return table[heads] if table.shape[0] > 1 else table

    def add_grad(self, total: Tensor, grad: Tensor, band: tuple[int, int]) -> None:
        """Add up gradients of scores `(images, heads, tiles, queries, keys)` of a band.

        `total` is the gradient of the table of these heads.
        """
        count = total.shape[1]
        if grad.dtype != total.dtype:
            grad = self.work.take("wide grad", grad.shape, total.dtype).copy_(grad)
        if count == 1:  # one sum over both would be slow, and so is one over a single tile
            grad = grad[:, :, 0] if grad.shape[2] == 1 else grad.sum(2)
            total[:, 0] += grad.sum(0)
            return
        grad = grad[0] if len(grad) == 1 else grad.sum(0)  # a sum over one is no view, and slow
        if count > FEW:
            total.index_add_(1, self.patterns.which(band), grad)
            return
        members = self.patterns.members(band, grad.dtype).expand(len(total), -1, -1)
        total += torch.bmm(members, grad.flatten(-2)).view(total.shape)

    def no_grad(self, num_heads: int, dtype: torch.dtype) -> Tensor:
        """Zeros that `add_grad` adds to: of all heads, as `table` is of one."""
        return self.patterns.outside.new_zeros(
            (num_heads, *self.patterns.outside.shape), dtype=dtype
        )

    def grad_bias(self, grad: Tensor, bias: Tensor) -> Tensor:
        """The gradient of the bias from that of `table`, `(num_heads, patterns, queries, keys)`."""
        if not self.patterns.all_inside:
            grad = grad.masked_fill(self.patterns.outside, 0)
        grad = grad.sum(1).flatten(1)
        index = self.patterns.bias_index(bias.shape[1:])
        total = grad.new_zeros(bias.shape).flatten(1)
        if grad.device.type == "cpu":
            total.scatter_add_(1, index.expand(len(grad), -1), grad)
        else:  # where only this adds up in a fixed order
            heads = torch.arange(len(grad), device=grad.device)[:, None]
            total.index_put_((heads, index), grad, accumulate=True)
        return total.view(bias.shape)
