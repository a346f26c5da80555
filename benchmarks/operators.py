"""Operators side by side: our implementations, peers, and the floor, in turns.

Nothing is timed before its result is compared with the float64 reference. On the CPU everything
runs on one thread and process CPU time is reported; on CUDA, time between events with the
second-level cache overwritten before every run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vitarium.benchmarks import candidates as candidates_of
from vitarium.benchmarks import memory, record, timer
from vitarium.benchmarks.arguments import DTYPES, device_named, known
from vitarium.benchmarks.candidates import SUITES, Candidate, build_candidates
from vitarium.benchmarks.record import Record
from vitarium.benchmarks.suite import MODES, Setting
from vitarium.ops import OPERATORS

BATCH_SIZE = {"cpu": 4, "cuda": 128}
DTYPES_MEASURED = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}


@dataclass(frozen=True)
class Outcome:
    """What `bench_operators` did.

    Attributes:
        records: of all settings asked for, those found in the output file included.
        refused: what was not timed and why, "setting: candidate: reason".
        remaining: number of settings that the time did not suffice for.
    """

    records: list[Record]
    refused: list[str]
    remaining: int


def bench_operators(
    names: Sequence[str] = (),
    *,
    device: str | None = None,
    batch_size: int | None = None,
    dtypes: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    match: str = "",
    peers: Sequence[str] | None = None,
    threads: int = 1,
    min_rounds: int = 7,
    seconds: float = 5.0,
    cuda_graphs: bool = False,
    output: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    minutes: float | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Measure operators over their standard settings.

    Args:
        names: operators in `vitarium.ops.OPERATORS`; all if empty.
        device: "cpu" or "cuda"; CUDA if there is any, if None.
        batch_size: images per call; 4 on the CPU and 128 on CUDA if None.
        dtypes: float32 and bfloat16 on the CPU and bfloat16 on CUDA if None.
        modes: of "forward", "backward", "training" (both in one); forward and training on the
            CPU, forward and backward on CUDA if None.
        match: only cases whose note contains this, such as "56x56".
        peers: names of peers; those meant for the device if None.
        threads: threads that torch uses on the CPU.
        min_rounds: samples per candidate at least.
        seconds: time given to each setting.
        cuda_graphs: replay captured graphs: kernel time without the time to launch; for forward
            and training.
        output: JSON Lines file. Every setting is appended when it is finished, and settings that
            the file holds already, of this machine, versions and commit, are not repeated.
        fresh: repeat them.
        minutes: begin no further setting after so many minutes; the same call goes on later.
        progress: called with a line about each setting.

    Raises:
        ValueError: an argument is unknown or out of range.
    """
    began = time.perf_counter()
    target = device_named(device)
    modes = known("mode", modes or _default_modes(target, cuda_graphs), MODES)
    if cuda_graphs and (target.type != "cuda" or "backward" in modes):
        raise ValueError(
            "cuda_graphs=True needs a CUDA device and modes forward and training, got "
            f"device={target.type!r} and modes {', '.join(modes)}"
        )
    settings = _settings(
        known("operator", names or tuple(OPERATORS), OPERATORS),
        BATCH_SIZE[target.type] if batch_size is None else batch_size,
        known("dtype", dtypes or DTYPES_MEASURED[target.type], DTYPES),
        modes,
        match,
        cuda_graphs,
    )
    if peers is not None:
        known("peer", peers, dict.fromkeys(name for s in SUITES.values() for name in s.peers))
    done = [] if fresh or output is None or not Path(output).exists() else record.read(output)
    records: list[Record] = []
    refused: list[str] = []
    remaining = 0
    with timer.torch_threads(threads):
        machine = record.this_machine(target)
        for setting in settings:
            found = [r for r in done if _same(r, setting, machine)]
            if found:
                progress(f"{setting}: recorded before")
                records += found
            elif minutes is not None and time.perf_counter() - began > 60 * minutes:
                remaining += 1
            else:
                progress(str(setting))
                candidates, reasons = build_candidates(setting, target, peers)
                refused += [f"{setting}: {name}: {why}" for name, why in reasons.items()]
                samples = timer.interleave(
                    {name: candidate.run for name, candidate in candidates.items()},
                    device=target,
                    min_rounds=min_rounds,
                    max_rounds=max(min_rounds, 200),
                    seconds=seconds,
                    flush_cache=True,
                    cuda_graphs=cuda_graphs,
                )
                measured = _records(setting, candidates, samples, machine, target)
                if output is not None:
                    record.append(output, measured)
                records += measured
    return Outcome(records, refused, remaining)


def _default_modes(device: torch.device, cuda_graphs: bool) -> Sequence[str]:
    if device.type == "cuda" and not cuda_graphs:
        return ("forward", "backward")
    return ("forward", "training")


def _settings(
    names: Sequence[str],
    batch_size: int,
    dtypes: Sequence[str],
    modes: Sequence[str],
    match: str,
    cuda_graphs: bool,
) -> list[Setting]:
    """Every operator's cases, its standard ones if it has a suite, its test cases if not."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    settings = []
    for name in names:
        cases = SUITES[name].cases(batch_size) if name in SUITES else OPERATORS[name].cases
        settings += [
            Setting(name, case, dtype, mode, cuda_graphs)
            for case in cases
            if match in case.note and next(iter(case.shapes.values()))[0]  # not: no images
            for dtype in dtypes
            for mode in modes
        ]
    if not settings:
        raise ValueError(f"match={match!r} is in the note of no case of {', '.join(names)}")
    return settings


def _same(r: Record, setting: Setting, machine: record.Machine) -> bool:
    """Whether a record is of this setting, on this machine, with these versions and commit."""
    described = _described(setting)
    return (
        all(getattr(r, name) == value for name, value in described.items())
        and r.machine == machine
        and r.versions == record.versions()
        and r.commit == record.commit()
    )


def _described(setting: Setting) -> dict[str, Any]:
    """The fields of a record that say what was measured."""
    arguments = dict(setting.case.kwargs)
    if setting.cuda_graphs:
        arguments["cuda_graphs"] = True
    return {
        "kind": "operator",
        "name": setting.operator,
        "mode": setting.mode,
        "dtype": setting.dtype,
        "shapes": {name: list(shape) for name, shape in setting.case.shapes.items()},
        "arguments": json.loads(json.dumps(arguments)),
        "case": setting.case.note,
    }


def _records(
    setting: Setting,
    candidates: Mapping[str, Candidate],
    samples: Mapping[str, timer.Samples],
    machine: record.Machine,
    device: torch.device,
) -> list[Record]:
    images = next(iter(setting.case.shapes.values()))[0]
    series = record.new_series()
    return [
        record.measured(
            samples=samples[name],
            clock="cuda" if device.type == "cuda" else "cpu",
            machine=machine,
            images=images,
            series=series,
            implementation=name,
            peak_memory=memory.peak_growth(candidate.run, device),
            macs=_macs(setting) // images,
            error=candidate.error,
            error_of=candidate.error_of,
            **_described(setting),
        )
        for name, candidate in candidates.items()
    ]


def _macs(setting: Setting) -> int:
    """Multiply-adds of the operator's forward, by its own formula."""
    tensors = candidates_of.draw(setting, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        OPERATORS[setting.operator].function(
            **{name: tensor.to("meta") for name, tensor in tensors.items()}, **setting.case.kwargs
        )
    return counter.get_total_flops() // 2
