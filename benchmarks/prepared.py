"""A model made ready for the clock: built, checked, and called in a mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vitarium.benchmarks import flops, guard, memory
from vitarium.benchmarks.arguments import DTYPES

MODES = ("forward", "training", "step")
# Largest difference, in standard deviations of the output, between two runs of the same model,
# and between a float32 model as measured (compiled, channels-last) and as built.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Setting:
    """How models are measured, all alike.

    `image_size` None leaves each model its own; `limit` is seconds of wall time of a call.
    """

    batch_size: int
    image_size: int | None
    dtype: str
    device: torch.device
    channels_last: bool
    compile: bool
    limit: float | None

    def input_shape(self, name: str) -> list[int] | None:
        """Shape of the images by the model's configuration; None if it says nothing of it."""
        config = timm.get_pretrained_cfg(name)
        size = (self.image_size, self.image_size) if self.image_size else ()
        if config is None or config.input_size is None:
            return [self.batch_size, 3, *size] if size else None
        return [self.batch_size, config.input_size[0], *(size or config.input_size[1:])]


@dataclass(frozen=True)
class Prepared:
    """A model that passed the check of its forward.

    Attributes:
        built: with weights as they are measured.
        model: the same, or compiled.
        x: its input.
        error: largest difference between its output and that of the model as built, in standard
            deviations of the output.
        resident: see `Record.resident_memory`.
    """

    built: nn.Module
    model: Callable[[Tensor], Any]
    x: Tensor
    error: float
    resident: int | None


def prepare(name: str, setting: Setting) -> Prepared:
    """Build a model and check its output.

    Raises:
        FloatingPointError: the output is not finite, not repeatable, or another one than that of
            the model as built.
        TooSlow: a forward takes longer than the limit.
        Exception: whatever the model raises.
    """
    before = memory.resident(reset_peak=True)
    built = flops.build(name, setting.image_size).to(setting.device)
    x = torch.randn(flops.input_shape(built, setting.image_size, setting.batch_size))
    x = x.to(setting.device)
    with torch.inference_mode(), guard.time_limit(setting.limit):
        expected = built(x)
    dtype = DTYPES[setting.dtype]
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    built = built.to(dtype).to(memory_format=layout)
    x = x.to(dtype=dtype, memory_format=layout)
    model = torch.compile(built) if setting.compile else built
    with torch.inference_mode():
        # The first call of a compiled model compiles it, which is no part of a forward.
        with guard.time_limit(None if setting.compile else setting.limit):
            first = model(x)
        with guard.time_limit(setting.limit):
            second = model(x)
    _check_outputs(name, expected, first, second, dtype)
    after = memory.resident()
    grown = None if before is None or after is None else max(0, after[1] - before[0])
    return Prepared(built, model, x, _deviations(first, expected, expected), grown)


def _check_outputs(
    name: str, expected: Tensor, first: Tensor, second: Tensor, dtype: torch.dtype
) -> None:
    if not first.isfinite().all():
        raise FloatingPointError(
            f"model {name!r} gives values that are not finite; it is not timed"
        )
    repeated = _deviations(first, second, expected)
    if repeated > TOLERANCE:
        raise FloatingPointError(
            f"model {name!r} gives different outputs for the same input "
            f"({repeated:.2g} standard deviations apart); it is not timed"
        )
    error = _deviations(first, expected, expected)
    if dtype == torch.float32 and error > TOLERANCE:
        raise FloatingPointError(
            f"model {name!r} gives another output than as built "
            f"({error:.2g} standard deviations apart); it is not timed"
        )


def _deviations(a: Tensor, b: Tensor, expected: Tensor) -> float:
    """Largest difference in standard deviations of the expected output."""
    return (a - b).abs().max().item() / (expected.std().item() or 1.0)


@dataclass(frozen=True)
class Call:
    """What is timed, and the bytes that stay allocated between two calls."""

    run: Callable[[], object]
    held: int


def call_of(name: str, prepared: Prepared, mode: str, limit: float | None = None) -> Call:
    """A call of a model in a mode of `MODES`, which has been run once.

    Training is forward and backward of the mean of the outputs, with batch norm, dropout and
    stochastic depth as in training; a step is AdamW's after it, at a learning rate of zero, so
    that weights stay what they are however often it is called.

    Raises:
        FloatingPointError: a gradient is not finite, or there is none.
        TooSlow, Exception: as in `prepare`.
    """
    held = memory.state_size(prepared.built) + prepared.x.nbytes
    prepared.built.train(mode != "forward")
    if mode == "forward":

        @torch.inference_mode()
        def forward() -> Any:
            return prepared.model(prepared.x)

        return Call(forward, held)
    parameters = [p for p in prepared.built.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def backward() -> None:
        outputs = [out for out in tree_leaves(prepared.model(prepared.x)) if out.requires_grad]
        torch.stack([out.float().mean() for out in outputs]).sum().backward()

    with guard.time_limit(limit if prepared.model is prepared.built else None):
        backward()
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients or not all(gradient.isfinite().all() for gradient in gradients):
        raise FloatingPointError(
            f"model {name!r} gives gradients that are not finite, or none; it is not timed"
        )
    if mode == "step":
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    def run() -> None:
        backward()
        if mode == "step":
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    states = (value for state in optimizer.state.values() for value in state.values())
    return Call(run, held + sum(value.nbytes for value in states if isinstance(value, Tensor)))
