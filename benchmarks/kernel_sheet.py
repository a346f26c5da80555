"""The kernel sheet: a file of what the compiler made of every launch configuration, and its views.

The file holds what was read from compiled kernels; occupancy and rooflines follow from that and are
worked out when it is read. Tests compare kernels as they are with those of the file.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from vitarium.benchmarks.arguments import known
from vitarium.benchmarks.kernel_compiler import TENSOR_CORE, Row, compile_case
from vitarium.benchmarks.kernel_limits import CHIPS, occupancy, per_pass, roofline
from vitarium.benchmarks.record import _build
from vitarium.ops import OPERATORS

SCHEMA = 1
TARGETS = {f"cuda:{capability}": capability for capability in CHIPS}
DTYPES = (torch.bfloat16, torch.float32)
REGISTER_TOLERANCE = 8  # a thread gets registers by eights

Call = tuple[str, str, str, str]  # what is compiled together: operator, case, dtype, target


def bench_kernels(
    names: Sequence[str] = (),
    *,
    targets: Sequence[str] = tuple(TARGETS),
    output: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    minutes: float | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], int]:
    """Compile the kernels of operators for every launch configuration, and read their code.

    Args:
        names: operators that have kernels; all if empty.
        targets: of `TARGETS`.
        output: the sheet. It is written after every configuration, and those that it holds
            already, compiled by the same version of Triton, are not compiled again; rows of
            launches that there are no longer are dropped.
        fresh: compile them again, as after a change of a kernel.
        minutes: begin nothing after so many minutes; the same call goes on later.
        progress: called with a line about each configuration.

    Returns:
        The rows of what was asked for, and the number of configurations that the time did not
        suffice for.

    Raises:
        ValueError: a name is unknown or has no kernels, or the file is no sheet.
        NotImplementedError: Triton is absent, or interprets.
    """
    began = time.perf_counter()
    operators = {name: operator for name, operator in OPERATORS.items() if operator.launches}
    names = known("operator with kernels", names or tuple(operators), operators)
    known("target", targets, TARGETS)
    version = _triton_version()
    held: dict[Call, list[Row]] = {}
    if output is not None and Path(output).exists():
        there_is = set(calls())
        for row in rows(output):
            if row.key[:4] in there_is:
                held.setdefault(row.key[:4], []).append(row)
    found: list[Row] = []
    remaining = 0
    for name in names:
        for case, dtype, target in itertools.product(operators[name].launches, DTYPES, targets):
            call = (name, case.note, _name(dtype), target)
            if fresh or not held.get(call) or any(row.triton != version for row in held[call]):
                if minutes is not None and time.perf_counter() - began > 60 * minutes:
                    remaining += 1
                    continue
                progress(", ".join(call))
                held[call] = compile_case(operators[name], case, dtype, TARGETS[target])
                if output is not None:
                    write(output, itertools.chain.from_iterable(held.values()))
            found += held[call]
    return found, remaining


def calls() -> list[Call]:
    """All that a whole sheet is of."""
    return [
        (operator.name, case.note, _name(dtype), target)
        for operator in OPERATORS.values()
        for case, dtype, target in itertools.product(operator.launches, DTYPES, TARGETS)
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _triton_version() -> str:
    from vitarium.ops.dispatch import TRITON_INSTALLED, TRITON_INTERPRET

    if not TRITON_INSTALLED or TRITON_INTERPRET:
        why = "TRITON_INTERPRET is set" if TRITON_INSTALLED else "it is not installed"
        raise NotImplementedError(f"the kernel sheet needs Triton's compiler, but {why}")
    import triton

    return triton.__version__


# --- the file ------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write a sheet, a line per row, launches of a call in their order; never half of it."""
    columns = [field.name for field in dataclasses.fields(Row)]
    lines = [
        json.dumps([getattr(row, column) for column in columns]) for row in sorted(rows, key=_place)
    ]
    head = f'{{"schema": {SCHEMA},\n"columns": {json.dumps(columns)},\n"rows": [\n'
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(head + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
    partial.replace(path)


def _place(row: Row) -> tuple[Any, ...]:
    return row.operator, row.case, row.dtype, row.capability, row.launch


def rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a sheet.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no kernel sheet, or one of another version.
    """
    try:
        sheet = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(sheet, dict) or not {"schema", "columns", "rows"} <= sheet.keys():
            raise ValueError("it lacks schema, columns or rows")
        if sheet["schema"] != SCHEMA:
            raise ValueError(f"schema={sheet['schema']!r}; this version of vitarium reads {SCHEMA}")
        return [
            _build(Row, dict(zip(sheet["columns"], entry, strict=True)), f"row {number}")
            for number, entry in enumerate(sheet["rows"], 1)
        ]
    except ValueError as error:
        raise ValueError(f"{path} is no kernel sheet: {error}") from error


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """A sheet as a table: what `rows` raises, and dictionaries of what `describe` says."""
    return [describe(row) for row in rows(path)]


def describe(row: Row) -> dict[str, Any]:
    """A row, and what follows from it, as text and numbers by plain keys.

    `bytes`, `operations` (of matrix products, 2 per multiply-add) and `exponentials` are those of a
    pass through the loops; of all of a kernel without loops. `warps_per_multiprocessor` is an
    estimate, see `kernel_limits.occupancy`; the bounds are explained at `kernel_limits.roofline`.
    """
    chip, held, bound = CHIPS[row.capability], occupancy(row), roofline(row)
    moved, operations, exponentials = per_pass(row)
    return {
        "operator": row.operator,
        "case": row.case,
        "dtype": row.dtype,
        "kernel": row.kernel,
        "launch": row.launch,
        "target": row.target,
        "gpu": chip.gpu,
        "tiles": " ".join(f"{name}={_times(value)}" for name, value in row.tiles.items()),
        "num_warps": row.num_warps,
        "num_stages": row.num_stages,
        "registers": row.registers,
        "spilled_bytes": row.spilled,
        "shared_memory_bytes": row.shared_memory,
        "tensor_memory_columns": row.tensor_memory,
        "tensor_core": " ".join(f"{name} {count}" for name, count in row.tensor_core.items()),
        "warps_per_multiprocessor": held.warps,
        "occupancy": held.warps / chip.warps,
        "occupancy_limited_by": held.limited_by,
        "bytes": moved,
        "operations": sum(operations.values()),
        "exponentials": exponentials,
        "operations_per_byte": bound.intensity,
        "bound_tflops": bound.tflops,
        "bound_by": bound.limited_by,
        "cached_bound_tflops": bound.cached_tflops,
        "cached_bound_by": bound.cached_limited_by,
        "triton": row.triton,
    }


def for_readers(entry: dict[str, Any]) -> dict[str, Any]:
    """What a reader compares of an entry of `read`, under headings with units."""
    return {
        "operator": entry["operator"],
        "case": entry["case"],
        "data type": entry["dtype"],
        "GPU": f"{entry['gpu']} ({entry['target'].removeprefix('cuda:')})",
        "kernel": entry["kernel"],
        "launch": entry["launch"],
        "warps": entry["num_warps"],
        "stages": entry["num_stages"],
        "registers per thread": entry["registers"],
        "spilled, bytes per thread": entry["spilled_bytes"],
        "shared memory, KiB": entry["shared_memory_bytes"] / 1024,
        "occupancy, %": 100 * entry["occupancy"],
        "occupancy limited by": entry["occupancy_limited_by"],
        "FLOP per byte": entry["operations_per_byte"],
        "bound, TFLOP/s": entry["bound_tflops"],
        "bound by": entry["bound_by"],
        "tensor-core instructions": entry["tensor_core"],
        "tiles": entry["tiles"],
    }


def _times(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def table(rows: Sequence[Row]) -> Table:
    """Rows in the terminal, under the calls that they belong to."""
    chips = dict.fromkeys(f"{row.target} is {CHIPS[row.capability].gpu}" for row in rows)
    versions = ", ".join(dict.fromkeys(row.triton for row in rows))
    found = Table(
        title="Kernels: what the compiler made of them, and what GPUs would allow",
        caption=f"Triton {versions}; {', '.join(chips)}; per pass through a kernel's loops; bound: "
        "TFLOPS of matrix products if all bytes came from memory (from a cache)",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    found.add_column("kernel", overflow="fold")
    columns = "target|registers|spilled\nbytes|shared\nKiB|warps per\nmultiproc.|tensor cores|"
    columns += "KiB|MFLOP|FLOP\nper byte|bound\nTFLOPS|by"
    for heading in columns.split("|"):
        found.add_column(heading, justify="right", no_wrap=True)
    for (operator, case, dtype), group in itertools.groupby(rows, key=lambda row: row.key[:3]):
        found.add_row(f"[bold]{operator}[/bold] {case}, {dtype}")
        for entry in map(describe, group):
            bounds = (entry["bound_tflops"], entry["cached_bound_tflops"])
            limits = (entry["bound_by"], entry["cached_bound_by"])
            found.add_row(
                f"{entry['kernel']} {entry['tiles']} warps={entry['num_warps']}",
                entry["target"],
                str(entry["registers"]),
                str(entry["spilled_bytes"]),
                _short(entry["shared_memory_bytes"] / 1024),
                f"{entry['warps_per_multiprocessor']} ({entry['occupancy_limited_by']})",
                entry["tensor_core"],
                _short(entry["bytes"] / 1024),
                _short(entry["operations"] / 1e6),
                _short(entry["operations_per_byte"]),
                " ".join([_short(bounds[0]), f"({_short(bounds[1])})" if bounds[1] else ""]),
                " ".join([limits[0] or "", f"({limits[1]})" if limits[1] else ""]),
            )
    return found


def _short(value: float | None) -> str:
    """A number to three significant digits; empty if there is none."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# --- comparison ----------------------------------------------------------------------------------


def faults(row: Row) -> list[str]:
    """What is wrong with a configuration, whatever it was before; empty if nothing is."""
    found = []
    if row.spilled:
        found.append(f"{row.spilled} bytes of registers are spilled")
    limit = CHIPS[row.capability].shared_block
    if row.shared_memory > limit:
        found.append(f"{row.shared_memory} bytes of shared memory exceed {limit}")
    if row.dtype != "float32" and row.products and not row.tensor_core:
        found.append("no tensor-core instructions")
    return found


def compare(compiled: Iterable[Row], sheet: Iterable[Row]) -> list[str]:
    """What got worse: a line for every value, with kernel, configuration, target, old and new.

    Always compared are spilled registers, the limit of shared memory, and the kind of tensor-core
    instructions. Registers (more than `REGISTER_TOLERANCE` more of them) and the estimated
    occupancy are compared if both were compiled by the same version of Triton: others distribute
    registers differently. A sheet that lacks a kernel, has one that is not launched any more, or
    has other launch parameters, is out of date, which is a line too.

    Args:
        compiled: all rows of some calls, as `compile_case` returns.
        sheet: the rows to compare with; those of other calls are not looked at.
    """
    now: defaultdict[Call, dict[tuple[Any, ...], Row]] = defaultdict(dict)
    for row in compiled:
        now[row.key[:4]][row.key] = row
    before = {row.key: row for row in sheet if row.key[:4] in now}
    found = []
    for key, row in ((key, row) for rows_ in now.values() for key, row in rows_.items()):
        if key in before:
            found += [f"{row}: {line}" for line in worse(row, before[key])]
        else:
            found.append(f"{row}: the sheet lacks it; {_command(row)}")
    for key, row in before.items():
        if key not in now[row.key[:4]]:
            found.append(f"{row}: it is in the sheet and not launched any more; {_command(row)}")
    return found


def worse(now: Row, before: Row) -> list[str]:
    """How a kernel is worse than it was, "what: old -> new" each; see `compare`."""
    found = []
    parameters = ("tiles", "num_warps", "num_stages")
    if any(getattr(now, name) != getattr(before, name) for name in parameters):
        old, new = (
            ", ".join(f"{name}={getattr(row, name)}" for name in parameters)
            for row in (before, now)
        )
        found.append(f"launch parameters of the sheet: {old} -> {new}; {_command(now)}")
    if now.spilled > before.spilled:
        found.append(f"spilled bytes: {before.spilled} -> {now.spilled}")
    limit = CHIPS[now.capability].shared_block
    if now.shared_memory > max(limit, before.shared_memory):
        change = f"{before.shared_memory} -> {now.shared_memory}"
        found.append(f"bytes of shared memory: {change}, with a limit of {limit}")
    if _kind(now) < _kind(before):
        old, new = (", ".join(row.tensor_core) or "none" for row in (before, now))
        found.append(f"tensor-core instructions: {old} -> {new}")
    if now.triton == before.triton:
        if now.registers > before.registers + REGISTER_TOLERANCE:
            found.append(f"registers: {before.registers} -> {now.registers}")
        old_warps, new_warps = occupancy(before).warps, occupancy(now).warps
        if new_warps < old_warps:
            found.append(f"warps per multiprocessor: {old_warps} -> {new_warps}")
    return found


def _kind(row: Row) -> int:
    """The rank of the best kind of tensor-core instructions, -1 without any."""
    kinds = list(TENSOR_CORE)
    return max((kinds.index(name) for name in row.tensor_core), default=-1)


def _command(row: Row) -> str:
    return f"if it is meant, run `vitarium bench kernels {row.operator} --fresh`"
