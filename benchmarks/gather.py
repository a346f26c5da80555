"""Neighborhood attention by gathering every query's keys: the formulation that papers begin with.

A baseline, not an implementation: memory grows by the number of keys per window.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


@functools.lru_cache(maxsize=32)
def neighbors(
    spatial: tuple[int, ...],
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """Flat index of every token's neighbors, `(N, prod(kernel_size))`."""
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for length, k, d in zip(spatial, kernel_size, dilation):
        token = torch.arange(length, device=device)
        group, position = token % d, token // d
        tokens_of_group = (length - group + d - 1) // d
        start = torch.minimum((position - k // 2).clamp(min=0), tokens_of_group - k)
        axis = (start[:, None] + torch.arange(k, device=device)) * d + group[:, None]  # (length, k)
        rows, columns = index.shape
        index = index[:, None, :, None] * length + axis[None, :, None, :]
        index = index.reshape(rows * length, columns * k)
    return index


def gather_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int, dilation: int = 1
) -> Tensor:
    """Neighborhood attention of `(B, *spatial, heads, head_dim)` tensors, not causal, stride 1."""
    spatial = tuple(query.shape[1:-2])
    rank = len(spatial)
    index = neighbors(spatial, (kernel_size,) * rank, (dilation,) * rank, query.device)
    q = query.flatten(1, -3).transpose(1, 2).unsqueeze(-2)  # (B, heads, N, 1, head_dim)
    k = key.flatten(1, -3).transpose(1, 2)[:, :, index]  # (B, heads, N, window, head_dim)
    v = value.flatten(1, -3).transpose(1, 2)[:, :, index]
    scores = q @ k.transpose(-1, -2) / math.sqrt(query.shape[-1])
    output = (scores.softmax(-1) @ v).squeeze(-2)
    return output.transpose(1, 2).unflatten(1, spatial)
