"""A model before and after it was made smaller: parameters, multiply-adds, bytes, latency."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitarium.benchmarks.timer import interleave, torch_threads


@dataclass(frozen=True)
class Latency:
    """Of one forward pass on the CPU.

    Attributes:
        milliseconds: median of the wall time.
        relative: median, over the rounds, of the process CPU time over that of the first model.
    """

    milliseconds: float
    relative: float


def latencies(
    models: Mapping[str, Callable[[Tensor], Tensor]],
    images: Tensor,
    *,
    threads: int | None = None,
    seconds: float = 3.0,
) -> dict[str, Latency]:
    """Time models in turn on the same images; the first is what the others are compared with.

    Args:
        models: by name, on the CPU and in evaluation mode.
        images: `(B, in_chans, H, W)`, normalised.
        threads: of torch; None leaves their number alone.
        seconds: of wall time, at least 7 rounds.
    """

    def run(model: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        @torch.no_grad()
        def call() -> Tensor:
            return model(images)

        return call

    with torch_threads(threads):
        candidates = {name: run(model) for name, model in models.items()}
        samples = interleave(candidates, seconds=seconds)
    first = samples[next(iter(models))]["cpu"]
    return {
        name: Latency(
            1e3 * statistics.median(times["wall"]),
            statistics.median(cpu / base for cpu, base in zip(times["cpu"], first)),
        )
        for name, times in samples.items()
    }


def comparison_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows (figure, before, after, change) of a table, of the figures that both have."""
    rows = []
    for name, (show, change) in _FIGURES.items():
        if before.get(name) is not None and after.get(name) is not None:
            old, new = before[name], after[name]
            text = f"{100 * (new - old):+.2f} points" if change == "points" else _share(old, new)
            rows.append((name, show(old), show(new), text))
    return rows


def _share(old: float, new: float) -> str:
    return f"{100 * (new / old - 1):+.1f}%" if old else ""


_FIGURES: dict[str, tuple[Callable[[Any], str], str]] = {
    "accuracy": (lambda value: f"{value:.2%}", "points"),
    "loss": (lambda value: f"{value:.4f}", "share"),
    "parameters": (lambda value: f"{value:,}", "share"),
    "multiply-adds": (lambda value: f"{value / 1e6:,.1f} M", "share"),
    "bytes": (lambda value: f"{value:,}", "share"),
    "latency_ms": (lambda value: f"{value:.2f} ms", "share"),
    "cpu_time": (lambda value: f"{value:.2f}", "share"),
}
