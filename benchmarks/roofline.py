"""What the machine can do, measured: a matrix product and a copy, beside the models in one run.

A program that does `intensity` operations per byte moved can do at most
min(`flops`, `intensity` x `bandwidth`) operations per second (Williams et al., "Roofline",
Communications of the ACM 52(4), 2009).

What is moved is what must be if each matrix product and convolution reads and writes memory and
everything else happens on the way: parameters, buffers and input are read once, each result of a
product is written once and read once. Results that stay in a cache, or in an operator's own
registers, are not left out, and what other operations read and write again is not added: it is a
model of the traffic, not a measurement of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitarium.benchmarks import memory, timer

PRODUCT, COPY = "matrix product", "memory copy"
# The product takes at least so long on the CPU: the smallest power of two that does is its size.
PRODUCT_SECONDS = 5e-3
PRODUCT_SIZES = {"cpu": (256, 4096), "cuda": (8192, 8192)}
COPIED_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # more than the last cache holds
# A training pass computes and moves three times of a forward: gradients need two products for
# each of its own. What an optimizer does is not counted.
PASSES = {"forward": 1, "training": 3, "step": 3}


@dataclass(frozen=True)
class Roofline:
    """Operations per second of a product; bytes per second, read and written, of a copy."""

    flops: float
    bandwidth: float

    def share(self, operations: float, intensity: float, seconds: float) -> float:
        """The part that `operations` in `seconds` are of what is possible; 1 is all of it."""
        return operations / seconds / min(self.flops, intensity * self.bandwidth)


class Probes:
    """A matrix product and a copy as candidates of `timer.interleave`.

    Args:
        dtype: of the product.
        device: where.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        smallest, largest = PRODUCT_SIZES[device.type]
        size = smallest
        while size < largest and _seconds(_product(size, dtype, device)) < PRODUCT_SECONDS:
            size *= 2
        self.operations = 2 * size**3
        source = torch.zeros(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
        target = torch.ones_like(source)
        self.bytes = 2 * source.nbytes
        self.candidates: dict[str, Callable[[], object]] = {
            PRODUCT: _product(size, dtype, device),
            COPY: lambda: target.copy_(source),
        }

    def roofline(self, samples: Mapping[str, timer.Samples], clock: str) -> Roofline:
        """What their samples say."""
        product, copy = (statistics.median(samples[name][clock]) for name in (PRODUCT, COPY))
        return Roofline(self.operations / product, self.bytes / copy)

    def pace(self, samples: Mapping[str, timer.Samples]) -> dict[str, list[float]]:
        """See `Record.pace`."""
        return {
            clock: [float(f"{value:.6g}") for value in values]
            for clock, values in samples[PRODUCT].items()
        }


def _product(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def _seconds(run: Callable[[], object]) -> float:
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def intensity(model: nn.Module, x: Tensor, macs: int, activations: int) -> float:
    """Operations per byte moved of a forward, two operations per multiply-add.

    Args:
        model: with parameters and buffers of the measured type.
        x: its input.
        macs: multiply-adds of one image.
        activations: elements that products write for one image.
    """
    written = activations * len(x) * x.element_size()
    return 2 * macs * len(x) / (memory.state_size(model) + x.nbytes + 2 * written)
