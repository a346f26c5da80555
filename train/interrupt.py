"""Stopping a run from outside: Ctrl-C, or the signal of a cluster that takes a machine back.

That is SIGTERM, or SIGUSR1 where SLURM is asked for it (`--signal=B:USR1@120`).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path


class Interrupted(Exception):
    """A run was stopped by a signal, after a checkpoint was written.

    Attributes:
        signum: the signal.
        folder: the run's folder, from which it can be resumed.
    """

    def __init__(self, signum: int, folder: Path, step: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"interrupted by {name} at step {step}; go on with --resume {folder}")
        self.signum = signum
        self.folder = folder


class StopRequest:
    """The signal that asked to stop, or None."""

    signum: int | None = None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block, SIGINT, SIGTERM and SIGUSR1 are noted instead of ending the process.

    A second SIGINT raises KeyboardInterrupt at once; others change nothing more. Outside the main
    thread, where Python allows no handlers, nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(signum: int, frame: object) -> None:
        if request.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        request.signum = signum

    names = ("SIGINT", "SIGTERM", "SIGUSR1")  # the last is not on Windows
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
