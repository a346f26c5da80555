"""What outlook attention is measured on, and against.

The settings are VOLO's first stage at 224 x 224 pixels, windows at every second token, and smaller
and larger maps. The peer is the paper's formulation: values are unfolded, mixed and folded.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.benchmarks.floors import byte_floor
from vitarium.benchmarks.suite import Peer, Suite
from vitarium.ops import Case

HEAD_DIM = 32


def cases(batch_size: int) -> list[Case]:
    """VOLO's windows of 3 x 3 at every second token, and at every token."""
    return [_case(batch_size, *rest) for rest in ((28, 2, 6), (56, 2, 6), (14, 1, 6))]


def _case(batch_size: int, side: int, stride: int, heads: int) -> Case:
    windows = (side + stride - 1) // stride
    shapes = {
        "scores": (batch_size, windows, windows, heads, 9, 9),
        "value": (batch_size, side, side, heads, HEAD_DIM),
    }
    kwargs = {"kernel_size": 3, "stride": stride, "padding": 1, "scale": HEAD_DIM**-0.5}
    return Case(f"{side}x{side} heads {heads} stride {stride}", shapes, kwargs)


def _unfold(case: Case, device: torch.device) -> Callable[..., Tensor]:
    stride, scale = case.kwargs["stride"], case.kwargs["scale"]
    batch, height, width, heads, dim = case.shapes["value"]
    windows = math.prod(case.shapes["scores"][1:3])

    def run(scores: Tensor, value: Tensor) -> Tensor:
        value = value.flatten(-2).permute(0, 3, 1, 2)
        unfolded = F.unfold(value, 3, padding=1, stride=stride)
        unfolded = unfolded.view(batch, heads, dim, 9, windows).permute(0, 1, 4, 3, 2)
        weights = scores.view(batch, windows, heads, 9, 9).transpose(1, 2) * scale
        mixed = (weights.softmax(-1) @ unfolded).permute(0, 1, 4, 3, 2)
        mixed = mixed.reshape(batch, heads * dim * 9, windows)
        output = F.fold(mixed, (height, width), 3, padding=1, stride=stride)
        return output.permute(0, 2, 3, 1).unflatten(-1, (heads, dim))

    return run


def floor(case: Case, mode: str, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The bare products of the windows on the CPU, the bytes that must move on CUDA."""
    scores, value = case.shapes["scores"], case.shapes["value"]
    if device.type == "cuda":
        inputs, outputs = math.prod(scores) + math.prod(value), math.prod(value)
        return byte_floor(inputs, outputs, mode, dtype, device)
    products = math.prod(scores[:4])
    weights = torch.randn(products, 9, 9, dtype=dtype)
    values, mixed = torch.randn(2, products, 9, HEAD_DIM, dtype=dtype)

    def forward() -> None:
        torch.bmm(weights, values, out=mixed)

    def backward() -> None:
        torch.bmm(weights.mT, mixed, out=values)
        torch.bmm(mixed, values.mT, out=weights)

    return {"forward": forward, "backward": backward, "training": lambda: (forward(), backward())}[
        mode
    ]


SUITE = Suite(cases, {"unfold": Peer(_unfold, devices=("cpu", "cuda"))}, floor, shared=())
