"""Stopping a run from outside: Ctrl-C, or the SIGTERM of a cluster that takes a machine back."""

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
    """Within the block, SIGINT and SIGTERM are noted instead of ending the process.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread, where Python allows
    no handlers, nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(signum: int, frame: object) -> None:
        if request.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        request.signum = signum

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
