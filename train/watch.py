"""The loss of every step, looked at without making an accelerator wait for it.

Reading a number from an accelerator waits for all that is queued there. So a step's loss is copied
in the background and read one step later; on the CPU, where nothing is queued, it is read at once.
What all processes must agree on (to stop, to save) travels with it: they decide in the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noted:
    """A step whose loss has not been read.

    Args:
        step: its number, from 0.
        images, targets: the batch as loaded.
        values: on the CPU, once `event` has happened: this process's loss, and then, summed over
            all processes: loss, wish to stop, wish to save.
        event: when the values are there; None if they are.
    """

    step: int
    images: Tensor
    targets: Tensor
    values: Tensor
    event: torch.cuda.Event | None


class StepWatch:
    """Takes note of losses and of wishes.

    Args:
        processes: their number.
        refuse: called with the step and this process's loss where the loss of any process is not
            finite; must raise.

    Attributes:
        loss: mean over all processes, of the last step that was read.
        loss_sum: of that loss over the steps that were read since it was last set.
        stop, save: whether a process wished so in that step.
    """

    def __init__(self, processes: int, refuse: Callable[[Noted, float], None]) -> None:
        self.processes, self.refuse = processes, refuse
        self.loss, self.loss_sum = math.nan, 0.0
        self.stop = self.save = False
        self._pending: Noted | None = None

    def note(
        self, step: int, loss: Tensor, images: Tensor, targets: Tensor, stop: bool, save: bool
    ) -> None:
        """Take note of a step, in every process; reads it, or on an accelerator the one before."""
        loss = loss.detach().float()
        wishes = [loss.new_full((), float(wish)) for wish in (stop, save)]
        values = torch.stack([loss, loss, *wishes])
        if self.processes > 1:
            torch.distributed.all_reduce(values[1:])
        if values.device.type != "cuda":
            self._read(Noted(step, images, targets, values.cpu(), None))
            return
        host = torch.empty(len(values), pin_memory=True).copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.flush()
        self._pending = Noted(step, images, targets, host, event)

    def flush(self) -> None:
        """Read what was noted last; needed before anything is saved."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._read(pending)

    def _read(self, noted: Noted) -> None:
        if noted.event is not None:
            noted.event.synchronize()
        own, total, stop, save = noted.values.tolist()
        if not math.isfinite(total):
            self.refuse(noted, own)
        self.loss = total / self.processes
        self.loss_sum += self.loss
        self.stop, self.save = stop > 0, save > 0
