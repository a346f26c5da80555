"""A measurement as a record: what, where, with which versions, every sample.

Records are appended to JSON Lines files, one object per line; tables and plots are views of them.
Times are seconds, memory is bytes, dates are UTC.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import statistics
import types
import typing
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from vitarium.train.environment import commit, processor, versions

SCHEMA = 4
CLOCKS = {
    "wall": "wall time",
    "cpu": "process CPU time",
    "cuda": "CUDA events",
}


@dataclass(frozen=True)
class Machine:
    """Where a measurement was made.

    Attributes:
        device: "cpu" or "cuda".
        processor: name of the processor that did the work.
        cores: logical processor cores of the machine.
        threads: threads that torch used.
        system: operating system and machine type.
    """

    device: str
    processor: str
    cores: int
    threads: int
    system: str

    @property
    def slug(self) -> str:
        """The processor's name as a folder's name, such as `nvidia-h200`."""
        return re.sub(r"[^a-z0-9]+", "-", self.processor.lower()).strip("-")


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        kind: "operator", "mixer", "model", "run" of a training, or "loader" of images.
        name: the operator's, the mixer's or the model's name; of testbeds, the mixer's.
        implementation: backend, peer or "floor" of an operator; "vitarium" or a peer of a mixer;
            "eager" or "compiled" model, or "vitarium" and "official" where both were compared;
            "trained" of a run, whose one sample is the whole of it.
        mode: "forward", "backward", "training" (forward and backward), "step" (of an optimizer
            too), or "loading".
        dtype: data type of the tensors, such as "bfloat16".
        shapes: shape of every input tensor.
        arguments: everything else that the call was given.
        case: an operator's setting in words; it also tells settings apart that differ in what is
            in their tensors. None in records older than the field.
        clock: which clock `median`, `p10` and `p90` are of; a key of `CLOCKS`.
        samples: seconds per call by clock, every sample, in the order taken; none if it failed.
        median, p10, p90: of `samples[clock]`; None if it failed.
        throughput: images per second at the median.
        peak_memory: bytes; what is counted is said by `vitarium.benchmarks.memory`.
        params: number of parameters.
        macs: multiply-adds of one image's forward; papers print them as FLOPs.
        activations: elements that matrix products and convolutions write for one image.
        error: error of the checked result, see `error_of`.
        error_of: what was compared with what before the clock was started.
        parts: share of the forward time by kind of module, see `vitarium.benchmarks.breakdown`.
        stages: the same shares, each divided among the stages of the model.
        series: the same text in records whose samples were taken in turns: the n-th samples of all
            belong to the n-th round. None in records older than the field.
        pace: seconds by clock and round of a matrix product that took turns with the rest; tells
            how fast the machine was.
        resident_memory: bytes that the process's resident memory grew by at most, from before a
            model was built until after its first calls; None where the system doesn't tell.
        intensity: floating-point operations (two per multiply-add) per byte moved, see
            `vitarium.benchmarks.roofline`.
        peak_flops: operations per second of a matrix product, measured in the same run.
        peak_bandwidth: bytes per second, read and written, of a copy, measured in the same run.
        roofline: operations per second, as a share of what these two allow at this intensity.
        seed: of a run.
        accuracy: top-1 on held-out images after a run, 0 to 1; None if it failed...
        failure: ... and why; also why a model has no samples.
        machine: where.
        versions: of Python and of every library that matters.
        commit: of this repository, with "+dirty" if tracked files were changed; None outside one.
        date: when, ISO 8601 in UTC.
        schema: version of this schema. A later one may add fields with defaults; none is removed
            and none changes its meaning, so that old records stay readable.
    """

    kind: Literal["operator", "mixer", "model", "run", "loader"]
    name: str
    implementation: str
    mode: Literal["forward", "backward", "training", "step", "loading"]
    dtype: str
    shapes: dict[str, list[int]]
    arguments: dict[str, Any]
    clock: Literal["wall", "cpu", "cuda"]
    samples: dict[str, list[float]]
    median: float | None
    p10: float | None
    p90: float | None
    machine: Machine
    versions: dict[str, str]
    date: str
    throughput: float | None = None
    peak_memory: int | None = None
    params: int | None = None
    macs: int | None = None
    activations: int | None = None
    error: float | None = None
    error_of: str | None = None
    parts: dict[str, float] = field(default_factory=dict)
    commit: str | None = None
    case: str | None = None
    seed: int | None = None
    accuracy: float | None = None
    failure: str | None = None
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    series: str | None = None
    pace: dict[str, list[float]] = field(default_factory=dict)
    resident_memory: int | None = None
    intensity: float | None = None
    peak_flops: float | None = None
    peak_bandwidth: float | None = None
    roofline: float | None = None
    schema: int = SCHEMA

    @property
    def setting(self) -> tuple[str, ...]:
        """What was measured, but not by which implementation: equal settings are comparable."""
        what = (self.shapes, self.arguments, self.case)
        return (self.kind, self.name, self.mode, self.dtype, json.dumps(what, sort_keys=True))


def measured(
    *,
    samples: Mapping[str, Sequence[float]],
    clock: str,
    machine: Machine,
    images: int | None = None,
    **fields: Any,
) -> Record:
    """A record of `samples`, with its statistics, versions, commit and date filled in.

    Samples are kept to six significant digits.

    Args:
        samples: seconds per call, by clock.
        clock: the clock that is reported.
        machine: where; see `this_machine`.
        images: number of images that a call works through; gives the throughput.
        fields: the other fields of `Record`.

    Raises:
        ValueError: `clock` has no samples.
    """
    if not samples.get(clock):
        raise ValueError(f"clock={clock!r} has no samples; sampled were {', '.join(samples)}")
    samples = {name: [float(f"{s:.6g}") for s in values] for name, values in samples.items()}
    median = statistics.median(samples[clock])
    return Record(
        samples=samples,
        clock=typing.cast(Any, clock),
        median=median,
        p10=percentile(samples[clock], 10),
        p90=percentile(samples[clock], 90),
        throughput=None if images is None else images / median,
        machine=machine,
        **_made(),
        **fields,
    )


def failed(*, failure: str, clock: str, machine: Machine, **fields: Any) -> Record:
    """A record of what could not be measured, and why; without samples.

    Args:
        failure: why, on one line.
        clock: the clock that would have been reported.
        machine: where; see `this_machine`.
        fields: the other fields of `Record`.
    """
    return Record(
        samples={},
        clock=typing.cast(Any, clock),
        median=None,
        p10=None,
        p90=None,
        failure=failure,
        machine=machine,
        **_made(),
        **fields,
    )


def new_series() -> str:
    """A text of its own for the field `series`."""
    return uuid.uuid4().hex[:12]


def _made() -> dict[str, Any]:
    """With what, and when."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"versions": versions(), "commit": commit(), "date": date}


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which `percent` per cent of the samples lie, linearly interpolated."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


# --- where ---------------------------------------------------------------------------------------


def this_machine(device: torch.device | str) -> Machine:
    """This machine, as it runs work on `device` with the present number of threads."""
    device = torch.device(device)
    return Machine(
        device=device.type,
        processor=processor(device),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.machine()}",
    )


# --- files ---------------------------------------------------------------------------------------


def append(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Append records to a JSON Lines file, created with its folders if absent.

    All lines go out in one write in append mode, so neither an interruption nor another process
    that appends to the same file leaves half a line behind.
    """
    text = "".join(
        json.dumps(dataclasses.asdict(record), allow_nan=False) + "\n" for record in records
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write(text.encode())


def read(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a JSON Lines file, in order; empty lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no record; the message begins with `file:line`.
    """
    records = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            records.append(_record(json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return records


def _record(entry: Any) -> Record:
    """The record that a line holds.

    Raises:
        ValueError: it is of a later schema, or a field is missing, unknown or of the wrong type.
    """
    schema = entry.get("schema") if isinstance(entry, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise ValueError(
            f"schema={schema} was written by a later version of vitarium; "
            f"this one reads up to {SCHEMA}"
        )
    return _build(Record, entry, "record")


def _build(cls: type[Any], entry: Any, owner: str) -> Any:
    """A dataclass from JSON, every field checked against its annotation."""
    if not isinstance(entry, dict):
        raise ValueError(f"{owner} must be an object, got {type(entry).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(entry.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{owner} has unknown fields: {', '.join(unknown)}")
    values = dict(entry)
    for item in dataclasses.fields(cls):
        if item.name in entry:
            hint = hints[item.name]
            if dataclasses.is_dataclass(hint):
                values[item.name] = _build(typing.cast(type, hint), entry[item.name], item.name)
            elif not _fits(entry[item.name], hint):
                raise ValueError(
                    f"{owner} field {item.name}={entry[item.name]!r} is no {_name(hint)}"
                )
        elif item.default is item.default_factory is dataclasses.MISSING:
            raise ValueError(f"{owner} lacks the field {item.name!r}")
    return cls(**values)


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type."""
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, arguments[1]) for v in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
