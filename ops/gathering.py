"""Tokens at places that an index names, read as whole rows: faster than `torch.gather` by far."""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `(B, M, ...)` of x `(B, N, ...)` at index `(B, M)`."""
    images = torch.arange(x.shape[0], device=x.device)[:, None]
    rows = x.flatten(0, 1).index_select(0, (index + images * x.shape[1]).flatten())
    return rows.view(*index.shape, *x.shape[2:])


def take_by_head(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `(B, heads, ..., channels)` of x `(B, N, heads, channels)` at `(B, heads, ...)`."""
    batch, tokens, heads, _ = x.shape
    first = torch.arange(batch, device=x.device)[:, None] * (tokens * heads)
    first = first + torch.arange(heads, device=x.device)
    places = index.flatten(2) * heads + first[..., None]
    return x.flatten(0, 2).index_select(0, places.flatten()).view(*index.shape, x.shape[-1])
