"""What keeps one candidate from ending a run: limits of time and memory, and its failure in words.

Limits turn what would hang or kill the process into exceptions of the call at fault. They hold
within this process: a crash of native code is not caught, and a single operation that never
returns is not interrupted.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

MEMORY_KEPT = 256 << 20  # bytes of the available memory that are left to others


class TooSlow(Exception):
    """A call took longer than it may."""


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `TooSlow` in the block when it has taken `seconds` of wall time.

    Between two operations of Python's, so a long one of torch ends first. Without effect outside
    of the main thread and on systems without alarms, and if `seconds` is None. Blocks don't nest.
    """
    if (
        seconds is None
        or not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(*_: object) -> None:
        raise TooSlow(f"takes longer than the limit of {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def memory_limit(device: torch.device) -> Iterator[None]:
    """In the block, this process may take no more memory than the machine has available now.

    An allocation beyond it raises, where otherwise the system would end some process. For work
    on the CPU under Linux; else without effect (CUDA's allocator raises by itself).
    """
    available, used = _available(), _data_size()
    if device.type != "cpu" or available is None or used is None:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + max(0, available - MEMORY_KEPT)
    if before[1] != resource.RLIM_INFINITY:
        limit = min(limit, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _available() -> int | None:
    """Bytes that can be allocated without swapping, of the machine or of this control group."""
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        group = int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # there is no such group, or its limit is "max"
        return free
    return group if free is None else min(free, group)


def _data_size() -> int | None:
    """Bytes of this process that the limit counts."""
    return _kilobytes("/proc/self/status", "VmData")


def _kilobytes(path: str, key: str) -> int | None:
    """A line such as `MemAvailable:  1234 kB` in bytes."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if name == key:
                return int(value.split()[0]) << 10
    return None


def reason(error: Exception) -> str:
    """Why a candidate failed, on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, TooSlow):
        return f"too slow: {text}"
    if _out_of_memory(error):
        return f"out of memory: {text}"
    if isinstance(error, FloatingPointError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _out_of_memory(error: Exception) -> bool:
    """Also torch's CPU allocator, which raises a bare RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
