"""Softmax over the keys of tiles, on ordinary tensor operations."""

from __future__ import annotations

import torch
from torch import Tensor

from vitarium.ops.workspace import LOG2E, Workspace

SUMS = 2.0**-80, 2.0**100  # a sum of weights between them has lost nothing, nor do its products


def softmax_of_exponents(exponents: Tensor) -> Tensor | None:
    """The softmax of powers of two over the last dimension, in place, without its maximum.

    Returns:
        The sums of the powers, or None where one of them is near the ends of the range of
        float32, or is no number: what is in place is no softmax then.
    """
    sums = exponents.exp2_().sum(-1, keepdim=True)
    least, largest = (float(sum) for sum in torch.aminmax(sums))
    if not (SUMS[0] < least and largest < SUMS[1]):
        return None
    exponents.mul_(sums.reciprocal())  # takes half the time of a division
    return sums


class Softmax:
    """The softmax of one call of an operator.

    Powers of two take a quarter of the time of `torch.softmax`. They are taken of the scores
    themselves, unless some sum comes near the ends of the range of float32; only then are scores
    taken relative to the largest of their query. In half precision products are rounded, and then
    weights, when they are divided; what is between is float32.

    Attributes:
        wide: the dtype of what is added to products: float32 at least.
    """

    def __init__(self, like: Tensor, work: Workspace) -> None:
        self.work = work
        self.dtype = like.dtype
        self.wide = torch.promote_types(like.dtype, torch.float32)
        # Scores are exponents of two, in half precision once they are converted: so they are
        # rounded like anybody's, and stay in its range.
        self.factor = LOG2E if self.wide == like.dtype else 1.0
        # Whether scores seem small enough. Knowing that takes a look at the sums, for which a
        # device would have to be waited for.
        self.bounded = like.device.type == "cpu"

    def weights(
        self,
        query: Tensor,
        key: Tensor,
        scale: float,
        table: Tensor | None,
        pairs: tuple[int, int],
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Weights of tiles, and what is still to be divided by: their sums over keys, or None.

        Args:
            query: `(tiles of all pairs, queries, channels)`.
            key: `(tiles of all pairs, keys, channels)`.
            scale: factor on the scores.
            table: what is added to scores: `(heads or 1, tiles or 1, queries, keys)`.
            pairs: number of images and of heads.
            out: where to write the weights; nothing is left to divide by then.
        """
        shape = (query.shape[0], query.shape[1], key.shape[1])
        scores = self.work.take("weights", shape, self.dtype) if out is None else out
        half = self.wide != self.dtype
        fill = table is not None and not half
        if fill:
            grouped = scores.view(*pairs, -1, *shape[1:])
            torch.mul(table.expand(grouped.shape), LOG2E, out=grouped)
        scores.baddbmm_(query, key.mT, beta=int(fill), alpha=scale * self.factor)
        powers = scores
        if half:
            powers = self.work.take("powers", shape, self.wide).copy_(scores).mul_(LOG2E)
            if table is not None:
                powers.view(*pairs, -1, *shape[1:]).add_(table, alpha=LOG2E)
        if not self.bounded:
            powers.sub_(powers.amax(-1, keepdim=True))
        powers.exp2_()
        sums = self.work.take("sums", (*shape[:2], 1), self.wide)
        torch.sum(powers, -1, keepdim=True, out=sums)
        if self.bounded:
            least, largest = (float(sum) for sum in torch.aminmax(sums))
            self.bounded = SUMS[0] < least and largest < SUMS[1]
            if not self.bounded:
                return self.weights(query, key, scale, table, pairs, out)
        if half:
            return scores.copy_(powers.div_(sums)), None
        return (powers, sums) if out is None else (powers.div_(sums), None)
