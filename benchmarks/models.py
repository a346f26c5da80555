"""Models side by side: size, operations, latency, throughput, peak memory.

Any model that timm knows, ours or not. All run in one process and take turns at the clock.
Weights are random: the time does not depend on them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vitarium.zoo  # noqa: F401  (registers our models with timm)
from vitarium.benchmarks import breakdown, flops, memory, record, timer
from vitarium.benchmarks.arguments import DTYPES, device_named, known
from vitarium.benchmarks.record import Record

# Largest difference, in standard deviations of the output, between two runs of the same model,
# and between a float32 model as measured (compiled, channels-last) and as built.
TOLERANCE = 1e-2


def bench_models(
    names: Sequence[str],
    *,
    batch_size: int = 1,
    image_size: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    threads: int | None = None,
    channels_last: bool = False,
    compile: bool = False,
    profile: bool = False,
    min_rounds: int = 10,
    seconds: float = 5.0,
    output: str | os.PathLike[str] | None = None,
) -> list[Record]:
    """Measure the forward pass of models, in inference mode, in turns.

    Reported is wall time on the CPU (process CPU time is recorded too) and time between events on
    CUDA. Peak memory is that of parameters, buffers and input and of the largest growth of the
    allocator during one forward (`vitarium.benchmarks.memory`). Parameters, multiply-adds and
    activations are counted on `meta` (`vitarium.benchmarks.flops`).

    Before the clock starts, every model must give a finite output, the same twice, and in
    float32 the one that it gives uncompiled and contiguous.

    Args:
        names: models registered with timm.
        batch_size: images per forward.
        image_size: side of the images; each model's own if None.
        dtype: "float32", "bfloat16" or "float16", of weights and input.
        device: such as "cpu" or "cuda"; CUDA if there is any, if None.
        threads: threads that torch uses on the CPU; as they are if None.
        channels_last: use torch.channels_last for weights and input.
        compile: measure `torch.compile(model)`.
        profile: also record the share of the forward time by part of the model
            (`vitarium.benchmarks.breakdown`); not with `compile`.
        min_rounds: samples per model at least.
        seconds: time given to each model; rounds end when it is used up for all.
        output: JSON Lines file that the records are appended to.

    Returns:
        A record per name, in order.

    Raises:
        ValueError: an unknown name, or an argument out of range.
        FloatingPointError: a model's output failed the check; nothing was timed.
    """
    _check(names, dtype, compile, profile)
    target = device_named(device)
    for name in names:
        flops.check_name(name)
    with timer.torch_threads(threads), torch.random.fork_rng():
        torch.manual_seed(0)
        prepared = {}
        for name in dict.fromkeys(names):
            prepared[name] = _prepare(
                name, batch_size, image_size, DTYPES[dtype], target, channels_last, compile
            )
        samples = timer.interleave(
            {name: model.run for name, model in prepared.items()},
            device=target,
            min_rounds=min_rounds,
            max_rounds=max(min_rounds, 200),
            seconds=seconds * len(prepared),
        )
        records = []
        for name in names:
            model = prepared[name]
            clock = "cuda" if target.type == "cuda" else "wall"
            counts = flops.count(model.built, image_size)
            parts = breakdown.forward_parts(model.built, model.x) if profile else {}
            record_ = record.measured(
                samples=samples[name],
                clock=clock,
                machine=record.this_machine(target),
                kind="model",
                name=name,
                implementation="compiled" if compile else "eager",
                mode="forward",
                dtype=dtype,
                shapes={"input": list(model.x.shape)},
                arguments={"channels_last": channels_last},
                images=batch_size,
                peak_memory=model.peak_memory,
                params=counts.params,
                macs=counts.macs,
                activations=counts.activations,
                error=model.error,
                error_of="output against the eager float32 model, in its standard deviations",
                parts=parts,
            )
            records.append(record_)
    if output is not None:
        record.append(output, records)
    return records


@dataclass(frozen=True)
class _Prepared:
    """A model that passed the check: what is timed, what is counted, and its input."""

    run: Callable[[], Tensor]
    built: nn.Module
    x: Tensor
    peak_memory: int
    error: float


def _check(names: Sequence[str], dtype: str, compile: bool, profile: bool) -> None:
    if isinstance(names, str) or not names:
        raise ValueError(f"names={names!r} must be a sequence of at least one model name")
    known("dtype", [dtype], DTYPES)
    if compile and profile:
        raise ValueError("profile=True needs compile=False: parts are told apart by hooks")


def _prepare(
    name: str,
    batch_size: int,
    image_size: int | None,
    dtype: torch.dtype,
    device: torch.device,
    channels_last: bool,
    compile: bool,
) -> _Prepared:
    """Build a model and check its output.

    Raises:
        FloatingPointError: the output is not finite, not repeatable, or another one than that of
            the model as built.
    """
    built = flops.build(name, image_size).to(device)
    x = torch.randn(flops.input_shape(built, image_size, batch_size)).to(device)
    with torch.inference_mode():
        expected = built(x)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    built = built.to(dtype).to(memory_format=layout)
    x = x.to(dtype=dtype, memory_format=layout)
    model = torch.compile(built) if compile else built

    @torch.inference_mode()
    def run() -> Tensor:
        return model(x)

    first, second = run(), run()
    if not first.isfinite().all():
        raise FloatingPointError(
            f"model {name!r} gives values that are not finite; it is not timed"
        )
    deviation = expected.std().item() or 1.0
    repeated = (first - second).abs().max().item() / deviation
    error = (first - expected).abs().max().item() / deviation
    if repeated > TOLERANCE:
        raise FloatingPointError(
            f"model {name!r} gives different outputs for the same input "
            f"({repeated:.2g} standard deviations apart); it is not timed"
        )
    if dtype == torch.float32 and error > TOLERANCE:
        raise FloatingPointError(
            f"model {name!r} gives another output than as built "
            f"({error:.2g} standard deviations apart); it is not timed"
        )
    peak = memory.state_size(built) + x.nbytes + memory.peak_growth(run, device)
    return _Prepared(run, built, x, peak, error)
