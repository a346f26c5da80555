"""Pictures of records: operators over their floor, models by accuracy and latency."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vitarium.benchmarks import record
from vitarium.benchmarks.candidates import FLOOR
from vitarium.benchmarks.names import Named, place_names
from vitarium.benchmarks.record import Record

INK, MUTED, GRID = "#1b1f24", "#57606a", "#d8dee4"
# Ours in one strong colour; peers in colours that stay apart for colour-blind readers and in grey.
COLOURS = {
    "torch": "#2477d4",
    "triton": "#0a3d91",
    "natten": "#8250a8",
    "flex": "#e08a00",
    "sdpa_masked": "#57a773",
    "sdpa_global": "#9bc7ab",
    "gather": "#b4bcc6",
}
OTHERS = ("#e08a00", "#57a773", "#b4bcc6", "#c2410c", "#8a6d00", "#57606a")  # suites' own peers
LABELS = {
    "torch": "vitarium (PyTorch operations)",
    "triton": "vitarium (Triton kernel)",
    "natten": "NATTEN",
    "flex": "FlexAttention, compiled",
    "sdpa_masked": "dense SDPA with a mask",
    "sdpa_global": "dense SDPA, global attention",
    "gather": "gathered windows",
}
FLOORS = {
    "cpu": "the matrix products that the definition needs, alone",
    "cuda": "a copy of as many bytes as must be read and written once",
}
TICK_INCHES, BAR_INCHES = 0.9, 0.26  # so that neither settings nor ratios are written over others
DEVICES = {"cpu": "one CPU thread", "cuda": "a GPU"}


def plot_operators(records: Sequence[Record], path: str | os.PathLike[str]) -> None:
    """Time over the floor by setting and implementation, log scale, a panel per dtype and mode.

    Args:
        records: of one operator on one machine, floors among them; of several records of one
            thing, the last counts.
        path: picture file; its suffix chooses the format.

    Raises:
        ValueError: there are none, or they are of several operators, machines or versions.
    """
    records = [r for r in records if r.kind == "operator"]
    if not records:
        raise ValueError("no records of operators to draw")
    for what in ("name", "machine", "versions"):
        if any(getattr(r, what) != getattr(records[0], what) for r in records):
            raise ValueError(f"records differ in {what}; a picture compares what is comparable")
    latest = {(r.setting, r.implementation): r for r in records}
    panels = list(dict.fromkeys((r.dtype, r.mode) for r in records))
    found = dict.fromkeys(name for _, name in latest if name != FLOOR)
    names = [*(n for n in COLOURS if n in found), *(n for n in found if n not in COLOURS)]
    settings = max(
        len({r.setting for r in records if (r.dtype, r.mode) == panel}) for panel in panels
    )
    width = max(6.2, 0.8 + settings * max(TICK_INCHES, BAR_INCHES * (len(found) + 1)))
    columns = 1 if width > 9 else min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(width * columns, 1.5 + 3.0 * rows), facecolor="white")
    axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for number, (dtype, mode) in enumerate(panels):
        ax = axes[number]
        chosen = [r for r in latest.values() if (r.dtype, r.mode) == (dtype, mode)]
        _operator_bars(ax, chosen, names)
        ax.set_title(f"{mode}, {dtype}", loc="left", fontsize=10.5, color=INK, weight="bold")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    highest = 2 * max(height for ax in axes for height in ax.dataLim.intervaly)
    axes[0].set_ylim(1, highest)
    if highest < 20:  # powers of ten would be few
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for ax in axes[::columns]:
        ax.set_ylabel("time / floor", fontsize=9, color=MUTED)
    _frame(figure, records, _operator_title(records[0]), names)
    _save(figure, path)


def _operator_title(r: Record) -> tuple[str, str]:
    title = r.name.replace("_", " ").capitalize()
    batch, *_, head_dim = next(iter(r.shapes.values()))
    parts = [f"{batch} image{'s' if batch != 1 else ''}", f"head_dim {head_dim}"]
    if "kernel_size" in r.arguments:
        parts.append(f"kernel size {r.arguments['kernel_size']}")
    return (
        f"{title} on {DEVICES[r.machine.device]}: time over the floor, lower is better",
        f"floor: {FLOORS[r.machine.device]}. {', '.join(parts)}",
    )


def _operator_bars(ax: Axes, records: Sequence[Record], names: Sequence[str]) -> None:
    floors = {r.setting: r.median for r in records if r.implementation == FLOOR}
    settings = list(dict.fromkeys(r.setting for r in records if r.setting in floors))
    width = 0.82 / max(1, len(names))
    for number, name in enumerate(names):
        bars = [
            (settings.index(r.setting), r)
            for r in records
            if r.implementation == name and r.setting in floors
        ]
        ratios = [r.median / floors[r.setting] for _, r in bars]
        places = [place + (number - (len(names) - 1) / 2) * width for place, _ in bars]
        ax.bar(
            places, ratios, width * 0.92, color=_colour(name, names), label=_label(name), zorder=3
        )
        for place, ratio in zip(places, ratios):
            text = f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
            ax.annotate(
                text,
                (place, ratio),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=INK,
                weight="bold" if name in ("torch", "triton") else "normal",
            )
    ax.set_yscale("log")
    first = {r.setting: r for r in reversed(records)}
    ax.set_xticks(range(len(settings)), [_tick(first[s]) for s in settings], fontsize=8.5)
    _style(ax)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", length=0)


def _tick(r: Record) -> str:
    if r.case is not None:
        return textwrap.fill(r.case, 13)
    _, *spatial, heads, _ = next(iter(r.shapes.values()))
    size = "x".join(map(str, spatial))
    return f"{size}\n{heads} heads\ndilation {r.arguments.get('dilation', 1)}"


def plot_models(
    records: Sequence[Record],
    accuracies: dict[str, float],
    path: str | os.PathLike[str],
) -> None:
    """Accuracy over latency, a point per model, and the front of those that no other beats.

    Args:
        records: of models on one machine; those without an accuracy are left out.
        accuracies: ImageNet-1K top-1 in per cent by model name, as published.
        path: picture file; its suffix chooses the format.

    Raises:
        ValueError: no model has both a record and an accuracy.
    """
    points = {
        r.name: r
        for r in records
        if r.kind == "model" and r.mode == "forward" and r.median and r.name in accuracies
    }
    if not points:
        raise ValueError("no record of a model whose accuracy is known")
    figure = Figure(figsize=(9.4, 5.4), facecolor="white")
    ax = figure.subplots()
    families: dict[str, list[Record]] = {}
    for r in sorted(points.values(), key=lambda r: r.median):
        families.setdefault(r.name.rpartition("_")[0], []).append(r)
    named: list[Named] = []
    palette = ["#0b63c5", "#c2410c", "#2f855a", "#8250a8", "#8a6d00", "#57606a"]
    for number, (family, members) in enumerate(families.items()):
        colour = palette[number % len(palette)]
        x = [1e3 * r.median for r in members]
        y = [accuracies[r.name] for r in members]
        ax.plot(x, y, "-o", color=colour, markersize=7, linewidth=1.4, label=family, zorder=3)
        named += [Named(r.name, *place, colour) for r, *place in zip(members, x, y)]
    measured = list(points.values())
    best = [measured[i] for i in front([(r.median, -accuracies[r.name]) for r in measured])]
    ax.plot(
        [1e3 * r.median for r in best], [accuracies[r.name] for r in best],
        color=MUTED, linewidth=1.2, linestyle="--", drawstyle="steps-post", zorder=2,
    )  # fmt: skip
    _style(ax)
    ax.margins(x=0.17, y=0.1)
    latencies = [p.x for p in named]
    if max(latencies) > 4 * min(latencies):
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("latency of one forward, ms (median)", color=MUTED)
    ax.set_ylabel("ImageNet-1K top-1, % (published)", color=MUTED)
    first = measured[0]
    shape = "x".join(map(str, next(iter(first.shapes.values()))))
    titles = (
        "Accuracy over latency: up and to the left is better",
        f"input {shape}, {first.dtype}, inference mode",
    )
    _frame(figure, measured, titles, [])
    place_names(ax, named, size=8.5, weight="bold")
    _save(figure, path)


def front(costs: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other is at least as good as in both, by the first cost.

    Args:
        costs: two per point; less is better.
    """
    kept: list[int] = []
    for i in sorted(range(len(costs)), key=costs.__getitem__):
        if not kept or costs[i][1] < costs[kept[-1]][1]:
            kept.append(i)
    return kept


def published_accuracies(records: Sequence[Record]) -> dict[str, float]:
    """Published ImageNet-1K top-1, in per cent, of those models that are ours and have one."""
    from vitarium import zoo

    ours = set(zoo.list_models())
    figures = {r.name: zoo.published(r.name) for r in records if r.name in ours}
    return {name: f.top1 for name, f in figures.items() if f is not None and f.top1 is not None}


# --- what both share -----------------------------------------------------------------------------


def _style(ax: Axes) -> None:
    ax.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(MUTED)
    ax.tick_params(colors=MUTED, labelsize=8.5)
    ax.tick_params(axis="y", length=0, which="both")


def _frame(
    figure: Figure, records: Sequence[Record], titles: tuple[str, str], names: Sequence[str]
) -> None:
    """Title, subtitle and legend above the axes; where it was measured below them."""
    height = figure.get_figheight()
    left = 0.74 / figure.get_figwidth()
    title, subtitle = titles
    figure.text(left, 1 - 0.14 / height, title, fontsize=15, weight="bold", color=INK, va="top")
    figure.text(left, 1 - 0.46 / height, subtitle, fontsize=10, color=MUTED, va="top")
    top = 0.62
    if names:
        handles = _legend_handles(names)
        figure.legend(
            handles=handles, loc="upper left", ncols=len(names), frameon=False, fontsize=9.5,
            bbox_to_anchor=(left - 0.01, 1 - 0.66 / height), labelcolor=INK, handlelength=1.0,
            columnspacing=1.6,
        )  # fmt: skip
        top = 1.12
    figure.text(left, 0.10 / height, where_measured(records), fontsize=8, color=MUTED, va="bottom")
    figure.subplots_adjust(
        left=left, right=0.985, top=1 - (top + 0.18) / height, bottom=0.95 / height,
        hspace=0.5, wspace=0.06,
    )  # fmt: skip


def _legend_handles(names: Sequence[str]) -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=_colour(name, names), label=_label(name)) for name in names]


def _colour(name: str, names: Sequence[str]) -> str:
    others = [n for n in names if n not in COLOURS]
    return COLOURS.get(name) or OTHERS[others.index(name) % len(OTHERS)]


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def where_measured(records: Sequence[Record]) -> str:
    """Processor, threads, clock (of what was timed), versions and date of the last of records."""
    r = records[-1]
    libraries = ("torch", "triton", "timm", "natten", "vitarium")
    versions = ", ".join(f"{name} {r.versions[name]}" for name in libraries if name in r.versions)
    parts = [r.machine.processor]
    if r.machine.device == "cpu":
        parts.append(f"{r.machine.threads} thread{'s' if r.machine.threads > 1 else ''}")
    if r.kind != "run":
        parts.append(f"median of interleaved runs ({record.CLOCKS[r.clock]})")
    return f"{', '.join(parts)}; {versions}; {r.date[:10]}"


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
