"""How fast a run goes, what it waits for, and how much memory it takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Measures the steps of an epoch.

    Args:
        device: where the steps run.
        processes: number of processes, which are taken to go at the same pace.
    """

    def __init__(self, device: torch.device, processes: int) -> None:
        self.device, self.processes = device, processes
        self._start()

    def _start(self) -> None:
        self.images, self.waiting, self.seconds = 0, 0.0, 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def timed(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches; notes how long each is waited for and worked on."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            given = time.perf_counter()
            self.waiting += given - asked
            if batch is None:
                self.seconds += given - asked
                return
            try:
                yield batch
            finally:
                self.seconds += time.perf_counter() - asked
            self.images += len(batch[0])

    def epoch(self) -> dict[str, Any]:
        """Figures since the last call: of the steps alone, without evaluation.

        Returns:
            "images_per_second" over all processes; "data_wait", the share of the time in which
            this process waited for batches; "peak_memory_device", bytes of tensors on a CUDA
            device; "peak_memory_resident", bytes of this process since it started.
        """
        seconds = max(self.seconds, 1e-9)
        record = {
            "images_per_second": round(self.images * self.processes / seconds, 2),
            "data_wait": round(self.waiting / seconds, 4),
            "peak_memory_device": None,
            "peak_memory_resident": peak_resident_memory(),
        }
        if self.device.type == "cuda":
            record["peak_memory_device"] = torch.cuda.max_memory_allocated(self.device)
        self._start()
        return record


def peak_resident_memory() -> int | None:
    """Bytes of memory that this process had at most; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
