"""Models side by side: size, operations, latency, throughput, memory, share of the roofline.

Any model that timm knows, ours or not. All run in one process and take turns at the clock, with a
matrix product and a copy among them. Weights are random: the time does not depend on them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

import vitarium.zoo  # noqa: F401  (registers our models with timm)
from vitarium.benchmarks import breakdown, flops, guard, memory, record, roofline, timer
from vitarium.benchmarks.arguments import DTYPES, device_named, known
from vitarium.benchmarks.prepared import MODES, Call, Prepared, Setting, call_of, prepare
from vitarium.benchmarks.record import Record


def bench_models(
    names: Sequence[str],
    *,
    modes: Sequence[str] = ("forward",),
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
    limit: float | None = 60.0,
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Record]:
    """Measure models in turns.

    Reported is wall time on the CPU (process CPU time is recorded too) and time between events on
    CUDA. Peak memory is that of parameters, buffers, input and the optimizer's state and of the
    largest growth of the allocator during one call (`vitarium.benchmarks.memory`). Parameters,
    multiply-adds and activations are counted on `meta` (`vitarium.benchmarks.flops`).

    Before the clock starts, every model must give a finite output, the same twice, and in
    float32 the one that it gives uncompiled and contiguous; gradients must be finite.

    A model that does not, or raises, or needs more memory than there is, or takes longer than
    `limit`, gets a record without samples whose `failure` says so; the others are measured.

    Args:
        names: models registered with timm.
        modes: of "forward" (in inference mode), "training" (forward and backward) and "step"
            (of AdamW too).
        batch_size: images per call.
        image_size: side of the images; each model's own if None.
        dtype: "float32", "bfloat16" or "float16", of weights and input.
        device: such as "cpu" or "cuda"; CUDA if there is any, if None.
        threads: threads that torch uses on the CPU; as they are if None.
        channels_last: use torch.channels_last for weights and input.
        compile: measure `torch.compile(model)`.
        profile: also record the share of the forward time by stage and part of the model
            (`vitarium.benchmarks.breakdown`); not with `compile`.
        min_rounds: samples per model at least.
        seconds: time given to each model in each mode; rounds end when it is used up for all.
        limit: seconds that a call may take; as long as it likes if None.
        output: JSON Lines file that the records of each mode are appended to.
        progress: called with a line about each model and mode.

    Returns:
        A record per mode and name, in order.

    Raises:
        ValueError: an unknown name, or an argument out of range.
    """
    _check(names, modes, batch_size, image_size, dtype, compile, profile, limit)
    target = device_named(device)
    setting = Setting(batch_size, image_size, dtype, target, channels_last, compile, limit)
    records: list[Record] = []
    with timer.torch_threads(threads), torch.random.fork_rng(), guard.memory_limit(target):
        torch.manual_seed(0)
        machine = record.this_machine(target)
        failures: dict[str, str] = {}
        ready: dict[str, Prepared] = {}
        for name in dict.fromkeys(names):
            progress(f"{name}: build and check")
            try:
                ready[name] = prepare(name, setting)
            except Exception as error:  # whatever a model may do: the others are measured
                failures[name] = guard.reason(error)
        probes = roofline.Probes(DTYPES[dtype], target)
        for mode in dict.fromkeys(modes):
            progress(f"{mode}: {len(ready)} models in turns")
            found = _measured(ready, mode, setting, probes, min_rounds, seconds, profile, failures)
            for name in dict.fromkeys(names):
                if name not in found:
                    shape = setting.input_shape(name)
                    found[name] = record.failed(
                        failure=failures[name],
                        clock=_clock(target),
                        machine=machine,
                        **_described(name, mode, setting, shape),
                    )
            if output is not None:
                record.append(output, [found[name] for name in names])
            records += [found[name] for name in names]
    return records


def _check(
    names: Sequence[str],
    modes: Sequence[str],
    batch_size: int,
    image_size: int | None,
    dtype: str,
    compile: bool,
    profile: bool,
    limit: float | None,
) -> None:
    if isinstance(names, str) or not names:
        raise ValueError(f"names={names!r} must be a sequence of at least one model name")
    if isinstance(modes, str) or not modes:
        raise ValueError(f"modes={modes!r} must be a sequence of at least one mode")
    known("mode", modes, MODES)
    known("dtype", [dtype], DTYPES)
    for argument, value in (("batch_size", batch_size), ("image_size", image_size)):
        if value is not None and value < 1:
            raise ValueError(f"{argument}={value} must be at least 1")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit={limit} must be above 0")
    if compile and profile:
        raise ValueError("profile=True needs compile=False: parts are told apart by hooks")
    for name in names:
        flops.check_name(name)


def _measured(
    ready: Mapping[str, Prepared],
    mode: str,
    setting: Setting,
    probes: roofline.Probes,
    min_rounds: int,
    seconds: float,
    profile: bool,
    failures: dict[str, str],
) -> dict[str, Record]:
    """Records by name of all that can be measured; why the others cannot goes to `failures`."""
    calls: dict[str, _Guarded] = {}
    for name, prepared in ready.items():
        try:
            calls[name] = _Guarded(call_of(name, prepared, mode, setting.limit), setting.limit)
        except Exception as error:
            failures[name] = guard.reason(error)
    if not calls:
        return {}
    samples = timer.interleave(
        {**calls, **probes.candidates},
        device=setting.device,
        min_rounds=min_rounds,
        max_rounds=max(min_rounds, 200),
        seconds=seconds * len(calls),
    )
    measured = probes.roofline(samples, _clock(setting.device))
    series, pace = record.new_series(), probes.pace(samples)
    found = {}
    for name, call in calls.items():
        prepared = ready[name]
        try:
            if call.failure is not None:
                raise call.failure
            fields = {
                **_described(name, mode, setting, prepared.x.shape),
                "peak_memory": call.held + memory.peak_growth(call.run, setting.device),
            }
            if profile and mode == "forward":
                fields["stages"] = breakdown.forward_stages(prepared.built, prepared.x)
                fields["parts"] = breakdown.parts_of(fields["stages"])
        except Exception as error:
            failures[name] = guard.reason(error)
            continue
        made = record.measured(
            samples=samples[name],
            clock=_clock(setting.device),
            machine=record.this_machine(setting.device),
            images=setting.batch_size,
            error=prepared.error,
            error_of="output against the eager float32 model, in its standard deviations",
            resident_memory=prepared.resident,
            series=series,
            pace=pace,
            peak_flops=measured.flops,
            peak_bandwidth=measured.bandwidth,
            **fields,
        )
        found[name] = _counted(made, prepared, mode, setting.image_size, measured)
    return found


class _Guarded:
    """A call that raises nothing: after the first failure, which is kept, it does nothing."""

    def __init__(self, call: Call, limit: float | None) -> None:
        self.run, self.held, self.limit = call.run, call.held, limit
        self.failure: Exception | None = None

    def __call__(self) -> None:
        if self.failure is None:
            try:
                with guard.time_limit(self.limit):
                    self.run()
            except Exception as error:
                self.failure = error


def _clock(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "wall"


def _described(
    name: str, mode: str, setting: Setting, shape: Sequence[int] | None
) -> dict[str, Any]:
    """The fields of a record that say what was measured."""
    return {
        "kind": "model",
        "name": name,
        "implementation": "compiled" if setting.compile else "eager",
        "mode": mode,
        "dtype": setting.dtype,
        "shapes": {} if shape is None else {"input": list(shape)},
        "arguments": {"channels_last": setting.channels_last},
    }


def _counted(
    made: Record, prepared: Prepared, mode: str, image_size: int | None, peaks: roofline.Roofline
) -> Record:
    """The record with what is counted on `meta`, and what follows from it."""
    params = sum(p.numel() for p in prepared.built.parameters())
    try:
        counts = flops.count(prepared.built, image_size)
    except Exception:  # a model that decides by values has no count: it can be timed all the same
        return replace(made, params=params)
    intensity = roofline.intensity(prepared.built, prepared.x, counts.macs, counts.activations)
    operations = 2 * counts.macs * len(prepared.x) * roofline.PASSES[mode]
    assert made.median is not None
    return replace(
        made,
        params=params,
        macs=counts.macs,
        activations=counts.activations,
        intensity=intensity,
        roofline=peaks.share(operations, intensity, made.median) if counts.macs else None,
    )
