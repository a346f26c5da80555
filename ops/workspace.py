"""What the portable paths share: buffers that stay in cache, and numbers that go with them."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

LOG2E = math.log2(math.e)


def negative(dtype: torch.dtype) -> float:
    """What hides a score: finite, so that no query turns into NaN, and far from overflow."""
    return max(-1e30, torch.finfo(dtype).min / 2)


class Workspace:
    """Buffers that every chunk reuses, so that they stay in cache.

    Small ones on a CPU are kept for the thread's next call: a fresh buffer costs a page fault for
    every 4 KiB, as much as what is done with it.
    """

    KEPT = 1 << 22  # bytes of the largest buffer that is kept
    VIEWS = 1 << 10  # views of buffers that are kept
    _kept = threading.local()

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self.device = like.device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}
        self._large: list[tuple[str, torch.dtype]] = []
        # Tensors of inference mode may not be written to outside of it.
        key = f"buffers{torch.is_inference_mode_enabled()}"
        if like.device.type == "cpu":
            kept = self._kept.__dict__.setdefault(key, ({}, {}, []))
            self._buffers, self._views, self._large = kept

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor that holds whatever was left in it."""
        key = name, dtype, tuple(shape)
        if key not in self._views:
            size = math.prod(shape)
            buffer = self._buffers.get((name, dtype))
            if buffer is None or buffer.numel() < size:
                buffer = self._buffers[name, dtype] = self._like.new_empty(size, dtype=dtype)
                self._views.clear()
                if buffer.nbytes > self.KEPT:
                    self._large.append((name, dtype))
            self._views[key] = buffer[:size].view(shape)
        return self._views[key]

    def close(self) -> None:
        """Let go of large buffers."""
        if self._large or len(self._views) > self.VIEWS:
            self._views.clear()
        for key in self._large:
            self._buffers.pop(key, None)
        self._large.clear()
