"""Records as tables in the terminal."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from vitarium.benchmarks import compare, record
from vitarium.benchmarks.breakdown import PARTS
from vitarium.benchmarks.compare import Comparison
from vitarium.benchmarks.mixers import OURS
from vitarium.benchmarks.model_scaling import RESOLUTION, growth
from vitarium.benchmarks.record import Record
from vitarium.benchmarks.scaling import exponents


def print_table(records: Sequence[Record], console: Console | None = None) -> None:
    """Print records, models of each mode in one table and operators in another.

    Why models failed is said below their table.
    """
    console = console or Console()
    models = [r for r in records if r.kind == "model"]
    operators = [r for r in records if r.kind == "operator"]
    mixers = [r for r in records if r.kind == "mixer"]
    profiled = [r for r in models if r.parts]
    for mode in dict.fromkeys(r.mode for r in models):
        chosen = [r for r in models if r.mode == mode]
        console.print(model_table(chosen))
        bounded = [r for r in chosen if r.roofline]
        if bounded:
            console.print(roofline_table(bounded))
        for r in chosen:
            if r.failure is not None:
                line = f"{r.name} failed: {r.failure}"
                console.print(line, style="red", markup=False, highlight=False)
    for chosen, table in (
        (profiled, parts_table),
        (operators, operator_table),
        (mixers, compared_table),
    ):
        if chosen:
            console.print(table(chosen))


def where(records: Iterable[Record]) -> str:
    """One line that says on what, by which clock and with which versions records were made."""
    lines = dict.fromkeys(
        f"{r.machine.processor}, {_plural(r.machine.threads, 'thread')}, {record.CLOCKS[r.clock]}, "
        f"torch {r.versions.get('torch', '?')}, timm {r.versions.get('timm', '?')}, {r.date[:10]}"
        for r in records
    )
    return "\n".join(lines)


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


_MODES = {
    "forward": "Forward pass in inference mode",
    "training": "Forward and backward",
    "step": "Forward, backward and a step of AdamW",
}
_NOTES = """GFLOPs: 1 multiply-add counts as 1, as in papers
outliers: samples above p90 by more than 3 interquartile ranges; they are kept"""


def model_table(records: Sequence[Record]) -> Table:
    """Models of one mode side by side, one row per record."""
    inputs = list(dict.fromkeys(_input(r) for r in records))
    shared = inputs[0] if len(inputs) == 1 else ""
    table = Table(
        title=f"{_MODES.get(records[0].mode, records[0].mode)} {shared}".rstrip(),
        caption=f"{where(records)}\n{_NOTES}",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("model", overflow="fold")
    if not shared:
        table.add_column("input", overflow="fold")
    columns = (
        "params\nM|GFLOPs\n|activ.\nM|latency\nms|p10-p90\nms|out-\nliers|images/s\n|memory\nMiB"
    )
    for heading in columns.split("|"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in records:
        first = (r.name, *([] if shared else [_input(r)]))
        if r.median is None:
            table.add_row(*first, "", "", "", "failed")
            continue
        table.add_row(
            *first,
            _number(r.params, 1e6),
            _number(r.macs, 1e9),
            _number(r.activations, 1e6),
            _number(r.median, 1e-3),
            f"{_number(r.p10, 1e-3)}-{_number(r.p90, 1e-3)}",
            str(compare.outliers(r.samples[r.clock])),
            _number(r.throughput, 1),
            _number(r.peak_memory, 1 << 20),
        )
    return table


def roofline_table(records: Sequence[Record]) -> Table:
    """Models beside what the machine can do, one row per record."""
    table = Table(
        title="Operations (2 per multiply-add) per second, and the share of what is possible",
        caption="possible: by a matrix product and a copy that took turns with the models, at\n"
        "this intensity, operations per byte moved (parameters, input, and what products write)",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("model", overflow="fold")
    for heading in ("intensity\nper byte", "done\nG/s", "possible\nG/s", "share\n%"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in records:
        assert r.intensity and r.peak_flops and r.peak_bandwidth and r.roofline
        possible = min(r.peak_flops, r.intensity * r.peak_bandwidth)
        values = (r.intensity, possible * r.roofline / 1e9, possible / 1e9, 100 * r.roofline)
        table.add_row(r.name, *(_number(value, 1) for value in values))
    return table


def parts_table(records: Sequence[Record]) -> Table:
    """Where the forward time goes: per cent by part, a row per record and one per stage of it."""
    table = Table(
        title="Share of forward time, %",
        caption=where(records),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("model", overflow="fold")
    for part in (*PARTS, "all"):
        table.add_column(part.replace(" ", "\n"), justify="right")
    for r in records:
        table.add_row(r.name, *_shares(r.parts), style="bold" if r.stages else "")
        for stage, shares in r.stages.items():
            table.add_row(f"  {stage or 'outside'}", *_shares(shares))
    return table


def _shares(parts: Mapping[str, float]) -> list[str]:
    """Per cent by part and of all; records older than a part do not have it."""
    shares = [parts.get(part) for part in PARTS]
    texts = ["" if share is None else f"{100 * share:.0f}" for share in shares]
    return [*texts, f"{100 * sum(parts.values()):.0f}"]


def _input(r: Record) -> str:
    notes = ["x".join(map(str, r.shapes.get("input", ()))), r.dtype]
    notes += [] if r.implementation == "eager" else [r.implementation]
    notes += ["channels-last"] if r.arguments.get("channels_last") else []
    return " ".join(notes)


def _number(value: float | None, unit: float) -> str:
    """A value in units of `unit`, to three significant digits; empty if there is none."""
    if value is None:
        return ""
    value /= unit
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


_NO_RATIO = f"~: no difference shown, the {compare.LEVEL:.0%} interval of the ratio has 1 in it"


def operator_table(records: Sequence[Record]) -> Table:
    """Operators: a row per setting, a column per implementation: ms, and times the floor."""
    settings: defaultdict[tuple[str, ...], dict[str, Record]] = defaultdict(dict)
    for r in records:
        settings[r.setting][r.implementation] = r
    columns = dict.fromkeys(r.implementation for r in records)
    table = Table(
        title="Operators: median ms, and how many times the floor",
        caption=f"{where(records)}\n{_NO_RATIO}",
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
        caption=f"{where(records)}\n{_NO_RATIO}",
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
            text = "" if r is None else _number(r.median, 1e-3)
            compared = r is not None and r is not ours and ours is not None
            cells.append(f"{text} [bold]{compare.ratio_text(r, ours)}[/bold]" if compared else text)
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
        table.add_row(name, *cells, str(power))
    return table


def print_growth(records: Sequence[Record], console: Console) -> None:
    """Print sweeps of models, each in a table, and below it what was not measured and why."""
    for sweep in dict.fromkeys(str(r.case) for r in records):
        console.print(growth_table(records, sweep))
        for r in records:
            if r.case == sweep and r.failure is not None:
                line = f"{r.name} {r.dtype} {r.mode} {_shape(r)}: {r.failure}"
                console.print(line, style="red", markup=False, highlight=False)


def growth_table(records: Sequence[Record], sweep: str) -> Table:
    """Models on one sweep: a row per model, a column per size, ms, and the exponent."""
    chosen = [r for r in records if r.case == sweep]
    axis = -1 if sweep == RESOLUTION else 0
    sizes = sorted({r.shapes["input"][axis] for r in chosen})
    table = Table(
        title=f"Median ms by {sweep}, and the power of the pixels of a call that time grows with",
        caption=f"{where(chosen)}\n±: 95 % interval of the fitted line; -: not measured, see below",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("model", overflow="fold")
    for heading in (*map(str, sizes), "power"):
        table.add_column(heading, justify="right", no_wrap=True)
    powers = growth(chosen)
    for name, dtype, mode in dict.fromkeys((r.name, r.dtype, r.mode) for r in chosen):
        row = [r for r in chosen if (r.name, r.dtype, r.mode) == (name, dtype, mode)]
        times = {r.shapes["input"][axis]: _number(r.median, 1e-3) for r in row}
        cells = (times.get(size) or "-" for size in sizes)
        table.add_row(
            f"{name} {dtype} {mode}", *cells, str(powers.get((name, dtype, mode, sweep), ""))
        )
    return table


def comparison_table(found: Comparison) -> Table:
    """A row per pair: both medians, the ratio with its interval, the verdict."""
    table = Table(
        title="B over A: the ratio of times",
        caption=_about(found),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("setting", overflow="fold")
    for heading in ("A\nms", "B\nms", f"ratio\n({compare.LEVEL:.0%} interval)", "B is"):
        table.add_column(heading, justify="right", no_wrap=heading != "B is")
    for pair in found.pairs:
        clock = compare.clock_of(pair.a, pair.b)
        medians = [
            _number(statistics.median(r.samples[clock]), 1e-3) if r.samples else "failed"
            for r in (pair.a, pair.b)
        ]
        name = pair.a.name if pair.a.name == pair.b.name else f"{pair.b.name} over {pair.a.name}"
        setting = " ".join((name, pair.a.implementation, pair.a.mode, _shape(pair.a), pair.a.dtype))
        if pair.ratio is None:
            table.add_row(setting, *medians, "", "")
            continue
        colour = {"faster": "green", "slower": "red"}.get(pair.ratio.verdict, "dim")
        verdict = f"[{colour}]{pair.ratio.verdict}[/{colour}]"
        table.add_row(setting, *medians, str(pair.ratio), verdict)
    return table


def _about(found: Comparison) -> str:
    """Whose records these are, and what the verdicts mean."""
    lines = [
        f"{name}: {where(records)}"
        for name, records in (
            ("A", [pair.a for pair in found.pairs]),
            ("B", [pair.b for pair in found.pairs]),
        )
    ]
    for name, only in (("A", found.only_a), ("B", found.only_b)):
        if only:
            lines.append(f"only in {name}: {', '.join(only)}")
    lines.append(
        "process CPU time is compared where both ran on one thread;\n"
        "a verdict stands only where the interval, which allows for noise between runs, leaves\n"
        "out 1; by chance alone up to one in twenty does"
    )
    return "\n".join(lines)


def _shape(r: Record) -> str:
    return "x".join(map(str, next(iter(r.shapes.values()), ())))


def _times_floor(r: Record | None, floor: Record | None) -> str:
    if r is None:
        return ""
    time = _number(r.median, 1e-3)
    if floor is None or r is floor:
        return time
    return f"{time}\n[bold]{compare.ratio_text(floor, r)}[/bold]"


def describe(r: Record) -> str:
    """An operator's setting in two short lines."""
    shape = "x".join(map(str, next(iter(r.shapes.values()))))
    arguments = ", ".join(f"{key} {value}" for key, value in r.arguments.items())
    return f"{shape} {r.dtype} {r.mode}\n{arguments}"
