"""What window attention is measured on, and against.

The settings are those of Swin at 224 x 224 pixels with its shifted windows, of MaxViT's grid and of
HaloNet's overlapping blocks. Peers cut the map into windows, attend inside them, and put the map
together again; all are checked to compute the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.benchmarks.floors import attention_floor
from vitarium.benchmarks.suite import Peer, Suite
from vitarium.ops import Case

HEAD_DIM = 32


def cases(batch_size: int) -> list[Case]:
    """Windows, shifted windows, grid and overlapping blocks, all with a relative position bias."""
    return [
        _case(batch_size, 56, 2, "windows", window_size=7),
        _case(batch_size, 28, 4, "windows", window_size=7),
        _case(batch_size, 14, 8, "windows", window_size=7),
        _case(batch_size, 7, 16, "windows", window_size=7),
        _case(batch_size, 56, 2, "shifted", window_size=7, shift=3),
        _case(batch_size, 14, 8, "shifted", window_size=7, shift=3),
        _case(batch_size, 56, 2, "grid", window_size=7, dilation=8),
        _case(batch_size, 14, 8, "grid", window_size=7, dilation=2),
        _case(batch_size, 32, 4, "halo 3", window_size=8, halo=3),
    ]


def _case(batch_size: int, side: int, heads: int, kind: str, **kwargs: int) -> Case:
    border = kwargs.get("halo", 0)
    query = (batch_size, side, side, heads, HEAD_DIM)
    key = (batch_size, side + 2 * border, side + 2 * border, heads, HEAD_DIM)
    table = (2 * kwargs["window_size"] - 1 + 2 * border,) * 2
    shapes = {"query": query, "key": key, "value": key, "bias": (heads, *table)}
    return Case(f"{side}x{side} heads {heads} {kind}", shapes, kwargs)


# --- peers ---------------------------------------------------------------------------------------


def _cut(x: Tensor, size: int, dilation: int) -> Tensor:
    """`(B, H, W, heads, d)` in windows, `(B * windows, heads, size * size, d)`."""
    batch, height, width, heads, dim = x.shape
    if dilation > 1:  # the dilated grid: one window per residue class
        x = x.view(batch, size, dilation, size, dilation, heads, dim).permute(0, 2, 4, 5, 1, 3, 6)
    else:
        x = x.view(batch, height // size, size, width // size, size, heads, dim)
        x = x.permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(-1, heads, size * size, dim)


def _joined(x: Tensor, shape: torch.Size, size: int, dilation: int) -> Tensor:
    """The map again."""
    batch, height, width, heads, dim = shape
    if dilation > 1:
        x = x.view(batch, dilation, dilation, heads, size, size, dim).permute(0, 4, 1, 5, 2, 3, 6)
    else:
        x = x.view(batch, height // size, width // size, heads, size, size, dim)
        x = x.permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(batch, height, width, heads, dim)


def _overlapping(x: Tensor, size: int, halo: int) -> Tensor:
    """Overlapping windows of a map with a border, `(B * windows, heads, (size + 2 halo)^2, d)`."""
    batch, *_, heads, dim = x.shape
    whole = size + 2 * halo
    x = F.unfold(x.flatten(-2).permute(0, 3, 1, 2), whole, stride=size)
    x = x.view(batch, heads, dim, whole * whole, -1).permute(0, 4, 1, 3, 2)
    return x.reshape(-1, heads, whole * whole, dim)


def _bias_index(case: Case, device: torch.device) -> Tensor:
    """Where each pair of query and key of a window finds its entry in the flattened table."""
    size, halo = case.kwargs["window_size"], case.kwargs.get("halo", 0)
    query = torch.arange(size, device=device)
    key = torch.arange(-halo, size + halo, device=device)
    offset = key[None, :] - query[:, None] + size - 1 + halo
    length = 2 * size - 1 + 2 * halo
    index = offset[:, None, :, None] * length + offset[None, :, None, :]
    return index.reshape(size * size, -1)


def _shift_mask(case: Case, device: torch.device) -> Tensor | None:
    """Which pairs of a rolled window lie on different sides of the seam, `(windows, N, N)`."""
    size, shift = case.kwargs["window_size"], case.kwargs.get("shift", 0)
    if not shift:
        return None
    _, height, width, *_ = case.shapes["query"]
    part = torch.zeros(height, width, 1, 1, device=device)
    part[-shift:] += 1
    part[:, -shift:] += 2
    part = _cut(part[None], size, 1)[:, 0, :, 0]
    return torch.where(part[:, :, None] == part[:, None, :], 0.0, -1e4)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _partitioned(attend: Attend) -> Callable[[Case, torch.device], Callable[..., Tensor]]:
    def build(case: Case, device: torch.device) -> Callable[..., Tensor]:
        size, dilation = case.kwargs["window_size"], case.kwargs.get("dilation", 1)
        halo, shift = case.kwargs.get("halo", 0), case.kwargs.get("shift", 0)
        index, mask = _bias_index(case, device), _shift_mask(case, device)

        def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
            added = bias.flatten(1)[:, index]
            if shift:
                query, key, value = (t.roll((-shift, -shift), (1, 2)) for t in (query, key, value))
                added = (added + mask[:, None].to(added.dtype)).repeat(len(query), 1, 1, 1)
            else:
                added = added[None]
            if halo:
                keys, values = (_overlapping(t, size, halo) for t in (key, value))
            else:
                keys, values = (_cut(t, size, dilation) for t in (key, value))
            output = attend(_cut(query, size, dilation), keys, values, added)
            output = _joined(output, query.shape, size, dilation)
            return output.roll((shift, shift), (1, 2)) if shift else output

        return run

    return build


def _eager(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2) + bias
    return scores.softmax(-1) @ value


def _sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, bias)


def floor(case: Case, mode: str, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The bare matrix products of the windows on the CPU, the bytes that must move on CUDA."""
    batch, height, width, heads, _ = case.shapes["query"]
    size = case.kwargs["window_size"]
    keys = (size + 2 * case.kwargs.get("halo", 0)) ** 2
    windows = batch * heads * height * width // size**2
    moved = [math.prod(case.shapes[name]) for name in ("query", "key", "value")]
    return attention_floor(
        windows, size**2, keys, HEAD_DIM, HEAD_DIM, mode, dtype, device, elements=moved
    )


PEERS: Mapping[str, Peer] = {
    "partition": Peer(_partitioned(_eager), devices=("cpu", "cuda")),
    "sdpa_partition": Peer(_partitioned(_sdpa), devices=("cpu", "cuda")),
}

SUITE = Suite(cases, PEERS, floor)
