"""Spherical k-means of tokens, which mixers route by: centres on the unit sphere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """Index of the centre with the largest dot product, the first of several.

    Args:
        x: `(..., N, C)`.
        centres: `(..., T, C)`.

    Returns:
        `(..., N)`, int64.
    """
    return (x @ centres.mT).argmax(-1)


def step(x: Tensor, centres: Tensor) -> Tensor:
    """One step: every centre becomes the normalised sum of what is nearest to it.

    A centre that is nearest to nothing stays. Sums are matrix products, the same in every run.

    Args:
        x: unit vectors `(..., N, C)`.
        centres: `(..., T, C)`.
    """
    members = F.one_hot(nearest(x, centres), centres.shape[-2]).to(x.dtype)
    empty = members.sum(-2) == 0
    return torch.where(empty[..., None], centres, F.normalize(members.mT @ x, dim=-1))


def initial(x: Tensor, count: int, steps: int) -> Tensor:
    """Centres `(..., count, C)` after `steps` from evenly spaced ones of x `(..., N, C)`."""
    place = torch.arange(count, device=x.device) * x.shape[-2] // count
    centres = x.index_select(-2, place)
    for _ in range(steps):
        centres = step(x, centres)
    return centres
