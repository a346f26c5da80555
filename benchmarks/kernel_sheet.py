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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vitarium.benchmarks import kernel_limits
from vitarium.benchmarks.arguments import known
from vitarium.benchmarks.kernel_compiler import TENSOR_CORE, Row, compile_case
from vitarium.benchmarks.kernel_limits import CHIPS
from vitarium.benchmarks.record import _build
from vitarium.ops import OPERATORS

SCHEMA = 1
TARGETS = {f"cuda:{capability}": capability for capability in CHIPS}
DTYPES = (torch.bfloat16, torch.float32)
# A thread gets registers by eights; up to that many more are noise of the compiler.
REGISTER_TOLERANCE = 8


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
        RuntimeError: Triton is absent or only interprets.
    """
    operators = {name: operator for name, operator in OPERATORS.items() if operator.launches}
    names = list(known("operator with kernels", names or tuple(operators), operators))
    known("target", targets, TARGETS)
    version, began = _triton_version(), time.perf_counter()
    held: dict[tuple[str, ...], list[Row]] = {}
    if output is not None and Path(output).exists():
        for row in rows(output):
            held.setdefault(_case_key(row), []).append(row)
    there_is = {
        (name, case.note, _name(dtype), target)
        for name, operator in operators.items()
        for case, dtype, target in itertools.product(operator.launches, DTYPES, TARGETS)
    }
    held = {key: found for key, found in held.items() if key in there_is}
    found: list[Row] = []
    remaining = 0
    for name in names:
        for case, dtype, target in itertools.product(operators[name].launches, DTYPES, targets):
            key = (name, case.note, _name(dtype), target)
            if fresh or any(row.triton != version for row in held.get(key, [])) or key not in held:
                if minutes is not None and time.perf_counter() - began > 60 * minutes:
                    remaining += 1
                    continue
                progress(" ".join(key))
                held[key] = compile_case(operators[name], case, dtype, TARGETS[target])
                if output is not None:
                    write(output, itertools.chain.from_iterable(held.values()))
            found += held[key]
    return found, remaining


def _triton_version() -> str:
    try:
        import triton
    except ImportError as error:
        raise RuntimeError("the kernel sheet needs Triton, which is not installed") from error
    return triton.__version__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _case_key(row: Row) -> tuple[str, ...]:
    """What is compiled together: a call."""
    return row.operator, row.case, row.dtype, row.target


# --- the file ------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write a sheet in the order of its rows' keys, a row per line; never half of it."""
    lines = [json.dumps(dataclasses.asdict(row)) for row in sorted(rows, key=lambda row: row.key)]
    text = f'{{"schema": {SCHEMA}, "rows": [\n' + ",\n".join(lines) + "\n]}\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a sheet.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no kernel sheet, or one of a later version.
    """
    try:
        sheet = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(sheet, dict) or not isinstance(sheet.get("rows"), list):
            raise ValueError("it has no rows")
        if sheet.get("schema") != SCHEMA:
            raise ValueError(f"schema={sheet.get('schema')!r} is not {SCHEMA}")
        return [_build(Row, entry, "row") for entry in sheet["rows"]]
    except ValueError as error:
        raise ValueError(f"{path} is no kernel sheet: {error}") from error
