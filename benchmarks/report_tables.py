"""Views of records as tables of texts, for the page and for Markdown."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitarium.benchmarks import growth, pareto, record
from vitarium.benchmarks.atlas import SIDE, Entry, formula
from vitarium.benchmarks.comparisons import Comparison
from vitarium.benchmarks.record import Record


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        label: heading, with the unit.
        numeric: whether cells are numbers, or empty.
        filtered: whether choosing rows by one of its values is of use.
    """

    label: str
    numeric: bool = False
    filtered: bool = False


@dataclass(frozen=True)
class Table:
    """Columns and rows of texts."""

    columns: list[Column]
    rows: list[list[str]]


def three_digits(value: float | None) -> str:
    """A number to three significant digits, or in whole ones; empty if there is none."""
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _scaled(value: float | None, unit: float) -> str:
    return "" if value is None else three_digits(value / unit)


def described(r: Record) -> str:
    """What was measured, in one line, but for the columns that tables have for it."""
    shape = "x".join(map(str, next(iter(r.shapes.values()), [])))
    notes = [shape if r.kind in ("model", "run") or r.case is None else r.case]
    notes += [key.replace("_", " ") for key, value in r.arguments.items() if value is True]
    notes += [] if r.seed is None else [f"seed {r.seed}"]
    return ", ".join(notes)


_RECORD_COLUMNS = [
    Column("kind", filtered=True),
    Column("name", filtered=True),
    Column("implementation", filtered=True),
    Column("mode", filtered=True),
    Column("dtype", filtered=True),
    Column("setting"),
    Column("median, ms", numeric=True),
    Column("p10, ms", numeric=True),
    Column("p90, ms", numeric=True),
    Column("samples", numeric=True),
    Column("images/s", numeric=True),
    Column("memory, MiB", numeric=True),
    Column("resident memory, MiB", numeric=True),
    Column("params, M", numeric=True),
    Column("GFLOPs", numeric=True),
    Column("activations, M", numeric=True),
    Column("operations per byte", numeric=True),
    Column("of the roofline, %", numeric=True),
    Column("accuracy, %", numeric=True),
    Column("failure"),
    Column("processor", filtered=True),
    Column("date"),
    Column("file", filtered=True),
]


def record_table(records: Mapping[str, Sequence[Record]]) -> Table:
    """Every record, without the columns that are empty in all of them."""
    rows = [
        [
            r.kind,
            r.name,
            r.implementation,
            r.mode,
            r.dtype,
            described(r),
            _scaled(r.median, 1e-3),
            _scaled(r.p10, 1e-3),
            _scaled(r.p90, 1e-3),
            str(len(r.samples.get(r.clock, ()))),
            three_digits(r.throughput),
            _scaled(r.peak_memory, 2**20),
            _scaled(r.resident_memory, 2**20),
            _scaled(r.params, 1e6),
            _scaled(r.macs, 1e9),
            _scaled(r.activations, 1e6),
            three_digits(r.intensity),
            _scaled(r.roofline, 1e-2),
            "" if r.accuracy is None else f"{100 * r.accuracy:.2f}",
            r.failure or "",
            r.machine.processor,
            r.date[:10],
            file,
        ]
        for file, found in records.items()
        for r in found
    ]
    return _without_empty(_RECORD_COLUMNS, rows)


def _without_empty(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Table:
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return Table([columns[i] for i in used], [[row[i] for i in used] for row in rows])


def set_table(points: pareto.PointSet) -> Table:
    """A row per point, with its value on every axis."""
    columns = [Column("name"), *(Column(key) for key in points.colours), Column("measured with")]
    columns += [Column(pareto.AXES[key].label, numeric=True) for key in points.axes]
    rows = [
        [
            p.name,
            *(p.groups.get(key, "") for key in points.colours),
            p.note,
            *(_value(p, key) for key in points.axes),
        ]
        for p in points.points
    ]
    return Table(columns, rows)


def _value(point: pareto.Point, axis: str) -> str:
    value = point.values.get(axis)
    if axis != "accuracy" or value is None:
        return three_digits(value)
    return f"{value:.2f}" + ("" if point.margin is None else f" ± {point.margin:.2f}")


def panel_table(panel: growth.Panel) -> Table:
    """A row per curve: the exponent, with half of its 95 % interval, and the time at every size."""
    sizes = sorted({x for curve in panel.curves for x, _ in curve.points})
    columns = [Column("name"), Column("of"), Column("exponent", numeric=True)]
    columns += [Column(f"{size:,.0f} {panel.size}, ms", numeric=True) for size in sizes]
    rows = []
    for curve in panel.curves:
        medians = dict(curve.points)
        times = [_scaled(medians.get(size), 1e-3) for size in sizes]
        rows.append([curve.name, curve.note or curve.group, str(curve.power), *times])
    return Table(columns, rows)


def comparison_table(found: Sequence[Comparison]) -> Table:
    """A row per setting; a ratio that is within the spread is not printed."""
    columns = [
        Column("kind", filtered=True),
        Column("name", filtered=True),
        Column("mode", filtered=True),
        Column("dtype", filtered=True),
        Column("setting"),
        Column("ours is", filtered=True),
        Column("ours / peer", numeric=True),
        Column("ours, ms", numeric=True),
        Column("peer, ms", numeric=True),
        Column("best peer", filtered=True),
        Column("ours / floor", numeric=True),
        Column("floor, ms", numeric=True),
        Column("processor", filtered=True),
    ]
    rows = []
    for c in found:
        r, within = c.ours, c.verdict == "within the spread"
        over_floor = "" if c.over_floor is None else f"{c.over_floor:.2f}"
        rows.append(
            [
                r.kind,
                r.name,
                r.mode,
                r.dtype,
                described(r),
                c.verdict or "",
                "" if c.over_peer is None or within else f"{c.over_peer:.2f}",
                _scaled(r.median, 1e-3),
                "" if c.peer is None else _scaled(c.peer.median, 1e-3),
                "" if c.peer is None else c.peer.implementation,
                "≈ 1" if c.at_floor else over_floor,
                "" if c.floor is None else _scaled(c.floor.median, 1e-3),
                r.machine.processor,
            ]
        )
    return _without_empty(columns, rows)


def atlas_table(entries: Sequence[Entry]) -> Table:
    """What the atlas shows: a row per mixer."""
    columns = [Column("name"), Column("attends to", filtered=True)]
    columns += [Column(f"{verb}, of {SIDE**2}", numeric=True) for verb in ("attends", "depends")]
    columns += [Column("exponent", numeric=True), Column("multiply-adds")]
    rows = [
        [
            entry.mixer,
            entry.kind,
            str(int((entry.reads > 0).sum())),
            str(int(entry.reached.sum())),
            three_digits(entry.exponent),
            formula(entry.mixer),
        ]
        for entry in entries
    ]
    return _without_empty(columns, rows)


def kernel_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Rows of any keys: a column per key, in the order in which they first appear."""
    rows = list(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = []
    for key in keys:
        values = [row[key] for row in rows if row.get(key) is not None]
        numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        few = len({str(v) for v in values}) <= 20
        label = str(key).replace("_", " ")
        columns.append(Column(label, numeric, filtered=not numeric and few and len(rows) > 8))
    return Table(columns, [[_cell(row.get(key)) for key in keys] for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return three_digits(value)
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def place_table(records: Iterable[Record]) -> Table:
    """On what, with what and when: a row per machine, clock and set of versions."""
    groups: defaultdict[tuple, list[Record]] = defaultdict(list)
    for r in records:
        groups[r.machine, r.clock, json.dumps(r.versions)].append(r)
    rows = []
    for (machine, clock, _), found in groups.items():
        commits = dict.fromkeys((r.commit or "unknown").partition("+") for r in found)
        dates = sorted(r.date[:10] for r in found)
        rows.append(
            [
                machine.processor,
                machine.device,
                f"{machine.threads} of {machine.cores} cores",
                machine.system,
                record.CLOCKS[clock],
                ", ".join(f"{name} {version}" for name, version in found[0].versions.items()),
                ", ".join(commit[:8] + plus + rest for commit, plus, rest in commits),
                dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
                str(len(found)),
            ]
        )
    labels = ("processor", "device", "threads", "system", "clock", "versions", "commits", "dates")
    return Table([*map(Column, labels), Column("records", numeric=True)], rows)
