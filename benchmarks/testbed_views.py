"""What the testbed found: one row per mixer, as a table in Markdown and as a picture."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from scipy.stats import t as students_t

from vitarium.benchmarks.names import Named, place_names
from vitarium.benchmarks.plot import GRID, INK, MUTED, front, where_measured
from vitarium.benchmarks.record import Record
from vitarium.zoo.testbed_settings import KINDS, SETTINGS

CONFIDENCE = 0.95
OTHER = "other"  # of mixers that the testbed has no settings of
COLOURS = {
    "dense": "#1b1f24",
    "local": "#0b63c5",
    "sparse": "#17a2b8",
    "routed": "#c2410c",
    "pooled": "#2f855a",
    "linear": "#8250a8",
    "channel": "#b8860b",
    OTHER: "#57606a",
}
MARKERS = dict(zip(COLOURS, "sovD^Pp*"))
_LEAST_ERROR = 0.1  # per cent: the top of the axis, where a confidence interval ends if not before


@dataclass(frozen=True)
class Row:
    """What is known of one mixer.

    Attributes:
        mixer: its name.
        accuracies: held-out accuracy, 0 to 1, by seed.
        failures: why a run has none, by seed.
        forward, training: records of the measures, if there are.
    """

    mixer: str
    accuracies: dict[int, float]
    failures: dict[int, str]
    forward: Record | None = None
    training: Record | None = None

    @property
    def accuracy(self) -> float | None:
        """The mean over seeds."""
        return statistics.fmean(self.accuracies.values()) if self.accuracies else None

    @property
    def margin(self) -> float | None:
        """Half the confidence interval of the mean, by Student's t; None of fewer than 2 seeds."""
        count = len(self.accuracies)
        if count < 2:
            return None
        error = statistics.stdev(self.accuracies.values()) / count**0.5
        return float(students_t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error


def kind_of(mixer: str) -> str:
    """What a mixer attends to: a key of `COLOURS`."""
    return SETTINGS[mixer].kind if mixer in SETTINGS else OTHER


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write `testbed.md` and, of what has an accuracy and measures, `testbed.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "testbed.md").write_text(markdown(rows), encoding="utf-8")
    if any(is_whole(row) for row in rows):
        plot(rows, folder / "testbed.png")


def is_whole(row: Row) -> bool:
    """Whether a row can be drawn: it has an accuracy and both measures."""
    return row.accuracy is not None and row.forward is not None and row.training is not None


# --- the table ------------------------------------------------------------------------------------

COLUMNS = (
    "mixer", "attends to", "accuracy, %", "seeds", "params, K", "MFLOPs", "forward, ms",
    "training, ms", "memory, MiB", "settings of",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """What there is to say of a mixer, in the order of `COLUMNS`."""
    forward, training = row.forward, row.training
    result = "" if row.accuracy is None else f"{100 * row.accuracy:.2f}"
    if row.margin is not None:
        result += f" ± {100 * row.margin:.2f}"
    failures = [
        f"seed {seed} failed: {why.replace('|', '/')}" for seed, why in sorted(row.failures.items())
    ]
    return (
        row.mixer,
        kind_of(row.mixer),
        "; ".join([result, *failures] if result else failures),
        str(len(row.accuracies)),
        "" if forward is None else f"{(forward.params or 0) / 1e3:.0f}",
        "" if forward is None else f"{(forward.macs or 0) / 1e6:.2f}",
        "" if forward is None else f"{_per_image(forward):.3g}",
        "" if training is None else f"{_per_image(training):.3g}",
        "" if training is None else f"{(training.peak_memory or 0) / 2**20:.0f}",
        SETTINGS[row.mixer].source if row.mixer in SETTINGS else "",
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table with what its columns mean."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, rows)]
    table = "\n".join(
        "| " + " | ".join(entry.replace("|", "/") for entry in e) + " |" for e in lines
    )
    text = (
        "# The testbed\n\nOne macro design, one recipe, the same seeds: only the mixer differs. "
        "Accuracy is top-1 on held-out\nimages after the last epoch, mean over seeds ± half its "
        f"{CONFIDENCE:.0%} confidence interval (Student's t; it holds\nseeds apart, not images). "
        "MFLOPs count 1 multiply-add of one image as 1. Times are process CPU time per\nimage, "
        "median of interleaved runs on one thread; training is forward and backward. Memory is "
        "the peak of\nweights and a training step.\n"
    )
    measured = [row.training for row in rows if row.training is not None]
    if measured:
        shape = "x".join(map(str, measured[-1].shapes["input"]))
        text += f"\nInput {shape}, {measured[-1].dtype}; {where_measured(measured)}.\n"
    return f"{text}\n{table}\n"


def _per_image(r: Record) -> float:
    """Milliseconds."""
    return 1e3 * r.median / r.shapes["input"][0]


# --- the picture ----------------------------------------------------------------------------------

_PANELS: tuple[tuple[str, Callable[[Row], float]], ...] = (
    ("multiply-adds of one image, millions", lambda row: row.forward.macs / 1e6),
    ("forward, ms of CPU time per image", lambda row: _per_image(row.forward)),
    ("peak memory of a training step, MiB", lambda row: row.training.peak_memory / 2**20),
)  # type: ignore[union-attr, operator]


def plot(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Accuracy with its confidence interval over operations, latency and memory.

    The accuracy axis is logarithmic in the error. The line joins those that no other beats in both.

    Args:
        rows: of mixers; those without an accuracy or measures are left out.
        path: picture file; its suffix chooses the format.

    Raises:
        ValueError: there are none.
    """
    rows = [row for row in rows if is_whole(row)]
    if not rows:
        raise ValueError("no mixer has both an accuracy and measures")
    figure = Figure(figsize=(13, 25), facecolor="white")
    panels = figure.subplots(len(_PANELS), 1)
    for ax, (label, value) in zip(panels, _PANELS):
        _panel(ax, rows, label, value)
    present = [kind for kind in COLOURS if kind in {kind_of(row.mixer) for row in rows}]
    handles = [
        panels[0].plot([], [], MARKERS[kind], color=COLOURS[kind], markersize=8, linestyle="",
                       label=f"{kind}: {KINDS[kind]}" if kind in KINDS else kind)[0]
        for kind in present
    ]  # fmt: skip
    figure.text(0.06, 0.987, "One macro design, any mixer", fontsize=20, weight="bold", color=INK)
    fewest, most = (pick(len(row.accuracies) for row in rows) for pick in (min, max))
    count = str(most) if fewest == most else f"{fewest} to {most}"
    note = (
        f"Held-out accuracy, mean of {count} seed{'s' if most > 1 else ''}"
        f"{f' with {CONFIDENCE:.0%} confidence interval' if most > 1 else ''}, log scale in the "
        "error.\nUp and to the left is better; the line joins what no other mixer beats in both."
    )
    figure.text(0.06, 0.983, note, fontsize=11, color=MUTED, va="top")
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.05, 0.9705), ncols=4, frameon=False,
        fontsize=10, columnspacing=1.2, handletextpad=0.1, labelcolor=INK,
    )  # fmt: skip
    records = [row.training for row in rows if row.training is not None]
    figure.text(0.06, 0.006, where_measured(records), fontsize=9.5, color=MUTED)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.94, bottom=0.04, hspace=0.13)
    for ax, (_, value) in zip(panels, _PANELS):
        points = [
            Named(row.mixer, value(row), _error(row), COLOURS[kind_of(row.mixer)]) for row in rows
        ]
        place_names(ax, points, size=9.5)
    figure.savefig(path, dpi=110)


def _error(row: Row) -> float:
    """Per cent, at least what the axis shows."""
    return max(_LEAST_ERROR, 100 * (1 - (row.accuracy or 0)))


def _panel(ax: Axes, rows: Sequence[Row], label: str, value: Callable[[Row], float]) -> None:
    for row in rows:
        colour, error = COLOURS[kind_of(row.mixer)], _error(row)
        margin = 100 * (row.margin or 0)
        ends = [max(_LEAST_ERROR, error - margin), min(100, error + margin)]
        ax.plot([value(row)] * 2, ends, color=colour, linewidth=1.1, alpha=0.3, zorder=2)
        ax.plot(
            value(row), error, MARKERS[kind_of(row.mixer)], color=colour, markersize=7, zorder=4,
            markeredgecolor="white", markeredgewidth=0.6,
        )  # fmt: skip
    best = [rows[i] for i in front([(value(row), _error(row)) for row in rows])]
    ax.plot(
        [value(row) for row in best], [_error(row) for row in best],
        color=MUTED, linewidth=1.4, linestyle="--", zorder=1, drawstyle="steps-post",
    )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    errors = [_error(row) for row in rows]
    ax.set_ylim(1.5 * max(errors), min(errors) / 1.5)
    values = [value(row) for row in rows]
    ax.set_xlim(min(values) / 1.2, max(values) * 1.35)
    low, high = ax.get_xlim()
    ticks = [s * 10**e for e in range(-4, 6) for s in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)]
    ax.set_xticks([tick for tick in ticks if low <= tick <= high])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    accuracies = (0, 50, 70, 80, 90, 93, 95, 96, 97, 98, 98.5, 99, 99.5, 99.8)
    bottom, top = ax.get_ylim()
    ax.set_yticks([100 - a for a in accuracies if top <= 100 - a <= bottom])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{100 - error:g}"))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(NullLocator())
    ax.grid(color=GRID, linewidth=0.8, zorder=0)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        ax.spines[side].set_visible(False)
    ax.tick_params(colors=MUTED, labelsize=10.5, length=0)
    ax.set_xlabel(label, color=INK, fontsize=12)
    ax.set_ylabel("held-out accuracy, %", color=INK, fontsize=12)
