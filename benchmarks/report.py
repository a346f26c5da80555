"""Records as tables in the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from vitarium.benchmarks import record
from vitarium.benchmarks.breakdown import PARTS
from vitarium.benchmarks.mixers import OURS
from vitarium.benchmarks.record import Record
from vitarium.benchmarks.scaling import exponents


def print_table(records: Sequence[Record], console: Console | None = None) -> None:
    """Print records, models in one table and operators in another, with what all rows share."""
    console = console or Console()
    models = [r for r in records if r.kind == "model"]
    operators = [r for r in records if r.kind == "operator"]
    mixers = [r for r in records if r.kind == "mixer"]
    profiled = [r for r in models if r.parts]
    for chosen, table in (
        (models, model_table),
        (profiled, parts_table),
        (operators, operator_table),
        (mixers, compared_table),
    ):
        if chosen:
            console.print(table(chosen))


def where(records: Iterable[Record]) -> str:
    """One line that says on what, by which clock and with which versions records were made."""
    lines = dict.fromkeys(
        f"{place(r)}, torch {r.versions.get('torch', '?')}, "
        f"timm {r.versions.get('timm', '?')}, {r.date[:10]}"
        for r in records
    )
    return "\n".join(lines)


def place(r: Record) -> str:
    """The processor, the number of threads and the clock of a record."""
    threads = plural(r.machine.threads, "thread")
    return f"{r.machine.processor}, {threads}, {record.CLOCKS[r.clock]}"


def plural(number: int, noun: str) -> str:
    """A number of things, such as "1 thread"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def model_table(records: Sequence[Record]) -> Table:
    """Models side by side, one row per record."""
    inputs = list(dict.fromkeys(_input(r) for r in records))
    shared = inputs[0] if len(inputs) == 1 else ""
    table = Table(
        title=f"Forward pass in inference mode {shared}".rstrip(),
        caption=f"{where(records)}\nGFLOPs: 1 multiply-add counts as 1, as in papers",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("model", overflow="fold")
    if not shared:
        table.add_column("input", no_wrap=True)
    columns = "params\nM|GFLOPs\n|activ.\nM|latency\nms|p10-p90\nms|images/s\n|memory\nMiB"
    for heading in columns.split("|"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in records:
        table.add_row(
            r.name,
            *([] if shared else [_input(r)]),
            _number(r.params, 1e6),
            _number(r.macs, 1e9),
            _number(r.activations, 1e6),
            _number(r.median, 1e-3),
            f"{_number(r.p10, 1e-3)}-{_number(r.p90, 1e-3)}",
            _number(r.throughput, 1),
            _number(r.peak_memory, 1 << 20),
        )
    return table


def parts_table(records: Sequence[Record]) -> Table:
    """Where the forward time goes: per cent by part of the model, one row per record."""
    table = Table(
        title="Share of forward time, %",
        caption=where(records),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("model", overflow="fold")
    for part in PARTS:
        table.add_column(part.replace(" ", "\n"), justify="right")
    for r in records:
        table.add_row(r.name, *(f"{100 * r.parts[part]:.0f}" for part in PARTS))
    return table


def _input(r: Record) -> str:
    notes = ["x".join(map(str, r.shapes["input"])), r.dtype]
    notes += [] if r.implementation == "eager" else [r.implementation]
    notes += ["channels-last"] if r.arguments.get("channels_last") else []
    return " ".join(notes)


def _number(value: float | None, unit: float) -> str:
    """A value in units of `unit`, to three significant digits; empty if there is none."""
    if value is None:
        return ""
    value /= unit
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def operator_table(records: Sequence[Record]) -> Table:
    """Operators: a row per setting, a column per implementation: ms, and times the floor."""
    settings: defaultdict[tuple[str, ...], dict[str, Record]] = defaultdict(dict)
    for r in records:
        settings[r.setting][r.implementation] = r
    columns = dict.fromkeys(r.implementation for r in records)
    table = Table(
        title="Operators: median ms, and how many times the floor",
        caption=where(records),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_lines=True,
    )
    table.add_column("setting", overflow="fold")
    for implementation in columns:
        table.add_column(implementation, justify="right", no_wrap=True)
    operator = ""
    for row in settings.values():
        first = next(iter(row.values()))
        if first.name != operator:
            operator = first.name
            table.add_row(f"[bold]{operator}[/bold]")
        floor = row.get("floor")
        cells = (_times_floor(row.get(implementation), floor) for implementation in columns)
        table.add_row(describe(first), *cells)
    return table


def compared_table(records: Sequence[Record]) -> Table:
    """A row per setting, a column per module: ms, and ours as a multiple of a peer's."""
    settings: defaultdict[tuple[str, ...], dict[str, Record]] = defaultdict(dict)
    for r in records:
        settings[r.setting][r.implementation] = r
    columns = dict.fromkeys(r.implementation for r in records)
    table = Table(
        title="Median ms, and our time over the peer's",
        caption=where(records),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("setting", overflow="fold")
    for implementation in columns:
        table.add_column(implementation, justify="right", no_wrap=True)
    for row in settings.values():
        ours = next((r for name, r in row.items() if name == OURS), None)
        first = next(iter(row.values()))
        cells = []
        for r in (row.get(implementation) for implementation in columns):
            text = "" if r is None else f"{r.median * 1e3:.3g}"
            compared = r is not None and r is not ours and ours is not None
            cells.append(f"{text} [bold]x{ours.median / r.median:.2f}[/bold]" if compared else text)
        table.add_row(f"{first.name} {first.case} {first.dtype} {first.mode}", *cells)
    return table


def scaling_table(records: Sequence[Record]) -> Table:
    """Mixers on maps of several sizes: a row per mixer, a column per size, ms, and the exponent."""
    settings = {(r.dtype, r.mode) for r in records}
    shared = " ".join(next(iter(settings))) if len(settings) == 1 else ""
    table = Table(
        title="Median ms by size of the map, and the power of tokens that time grows with\n"
        + shared,
        caption=where(records),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    cases = dict.fromkeys(str(r.case) for r in records)
    for heading in ("mixer", *cases, "power"):
        table.add_column(heading, justify="left" if heading == "mixer" else "right", no_wrap=True)
    for setting, power in exponents(records).items():
        medians = {r.case: r.median for r in records if (r.name, r.dtype, r.mode) == setting}
        cells = (f"{medians[case] * 1e3:.3g}" if case in medians else "" for case in cases)
        name = setting[0] if shared else " ".join(setting)
        table.add_row(name, *cells, f"{power:.2f}")
    return table


def _times_floor(r: Record | None, floor: Record | None) -> str:
    if r is None:
        return ""
    time = f"{r.median * 1e3:.3g}"
    if floor is None or r is floor:
        return time
    return f"{time}\n[bold]x{r.median / floor.median:.1f}[/bold]"


def describe(r: Record) -> str:
    """An operator's setting in two short lines."""
    shape = "x".join(map(str, next(iter(r.shapes.values()))))
    arguments = ", ".join(f"{key} {value}" for key, value in r.arguments.items())
    return f"{shape} {r.dtype} {r.mode}\n{arguments}"
