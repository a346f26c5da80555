"""What the probes found: mixers by tasks, as a table in Markdown and as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from vitarium.benchmarks.plot import INK, MUTED, where_measured
from vitarium.benchmarks.probes import Seen, interval
from vitarium.benchmarks.record import Record
from vitarium.benchmarks.testbed_views import COLOURS, CONFIDENCE, Row, kind_of
from vitarium.train.probes import HELD_OUT, PROBES, drawn

_SHADES = LinearSegmentedColormap.from_list("accuracy", ("#ffffff", "#9ec5e8", "#0b4f9c"))
_WIDTH, _HEIGHT, _EXAMPLE = 1.75, 0.46, 0.72  # inches: of a cell, of an example image
_LEFT, _TOP, _BOTTOM = 2.3, 1.72, 0.62


def ordered(seen: Sequence[Seen]) -> list[Seen]:
    """By what they attend to, then by name."""
    kinds = list(COLOURS)
    return sorted(seen, key=lambda s: (kinds.index(kind_of(s.mixer)), s.mixer))


def write(seen: Sequence[Seen], records: Sequence[Record], folder: Path) -> None:
    """Write `probes.md` and, if any run ended well, `probes.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "probes.md").write_text(markdown(seen, records), encoding="utf-8")
    if any(row.accuracies for s in seen for row in s.probes.values()):
        plot(seen, records, folder / "probes.png")


def cell(row: Row) -> str:
    """Accuracy in per cent and its interval, or why there is none."""
    failures = [f"seed {seed} failed: {why}" for seed, why in sorted(row.failures.items())]
    if row.accuracy is None:
        return "; ".join(failures)
    low, high = interval(row.accuracy)
    text = f"{100 * row.accuracy:.0f} ({100 * low:.0f} to {100 * high:.0f})"
    if len(row.accuracies) > 1:
        each = ", ".join(f"{100 * a:.0f}" for _, a in sorted(row.accuracies.items()))
        text += f"; seeds {each}"
    return "; ".join([text, *failures])


def markdown(seen: Sequence[Seen], records: Sequence[Record]) -> str:
    """The table with what its columns mean."""
    probes = list(seen[0].probes) if seen else []
    lines = [("mixer", "attends to", *probes), ("---",) * (2 + len(probes))]
    lines += [
        (s.mixer, kind_of(s.mixer), *(cell(row).replace("|", "/") for row in s.probes.values()))
        for s in seen
    ]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    questions = "\n".join(f"- `{name}`: {PROBES[name].question}" for name in probes)
    where = f"\n{where_measured(records)}.\n" if records else ""
    return (
        "# Probes\n\nDrawn tasks that tell mixers apart by what they see in one look: one block on "
        f"8 x 8 tokens, one recipe.\nAccuracy in per cent on {HELD_OUT} held-out images after the "
        f"last epoch, mean over seeds, with Wilson's {CONFIDENCE:.0%}\nconfidence interval, which "
        f"holds images apart, not seeds. Guessing gives 50.\n\n{questions}\n{where}\n{table}\n"
    )


def plot(seen: Sequence[Seen], records: Sequence[Record], path: Path) -> None:
    """A row per mixer, a column per task with two of its images above it.

    Args:
        seen: of `bench_probes`, at least one.
        records: where it was trained.
        path: picture file; its suffix chooses the format.
    """
    probes = list(seen[0].probes)
    width = _LEFT + _WIDTH * len(probes) + 0.2
    height = _TOP + _HEIGHT * len(seen) + _BOTTOM
    figure = Figure(figsize=(width, height), facecolor="white")
    box = (_LEFT / width, _BOTTOM / height, _WIDTH * len(probes) / width,
           _HEIGHT * len(seen) / height)  # fmt: skip
    ax = figure.add_axes(box)
    values = [[row.accuracy or float("nan") for row in s.probes.values()] for s in seen]
    ax.imshow(values, cmap=_SHADES, vmin=0.5, vmax=1.0, aspect="auto")
    for number, s in enumerate(seen):
        _row(ax, number, s)
    ax.set_yticks([])
    ax.set_xticks([])
    for edge in range(1, len(seen)):
        changed = kind_of(seen[edge].mixer) != kind_of(seen[edge - 1].mixer)
        ax.axhline(edge - 0.5, color="white", linewidth=5 if changed else 1.5)
    for edge in range(1, len(probes)):
        ax.axvline(edge - 0.5, color="white", linewidth=1.5)
    for spine in ax.spines.values():
        spine.set_visible(False)
    for column, name in enumerate(probes):
        _head(figure, name, _LEFT + _WIDTH * column, width, height)
    title = "What a mixer sees in one look"
    figure.text(0.15 / width, 1 - 0.12 / height, title, fontsize=15, weight="bold", color=INK,
                va="top")  # fmt: skip
    note = (
        f"Held-out accuracy in %, in grey its {CONFIDENCE:.0%} interval over {HELD_OUT} images; "
        "guessing gives 50.\n" + (where_measured(records) if records else "")
    )
    figure.text(0.15 / width, 0.1 / height, note, fontsize=7.5, color=MUTED, va="bottom")
    figure.savefig(path, dpi=130)


def _row(ax: Axes, number: int, s: Seen) -> None:
    colour = COLOURS[kind_of(s.mixer)]
    ax.text(-0.56, number, s.mixer, ha="right", va="center", fontsize=9.5, color=colour,
            weight="bold")  # fmt: skip
    for column, row in enumerate(s.probes.values()):
        if row.accuracy is None:
            ax.text(column, number, "failed" if row.failures else "", ha="center", va="center",
                    fontsize=8, color=MUTED)  # fmt: skip
            continue
        low, high = (100 * end for end in interval(row.accuracy))
        strong, weak = ("white", "#dbe7f3") if row.accuracy > 0.82 else (INK, MUTED)
        ax.text(column - 0.06, number, f"{100 * row.accuracy:.0f}", ha="right", va="center",
                fontsize=11, weight="bold", color=strong)  # fmt: skip
        ax.text(column + 0.02, number, f"{low:.0f} to {high:.0f}", ha="left", va="center",
                fontsize=8, color=weak)  # fmt: skip


def _head(figure: Figure, name: str, left: float, width: float, height: float) -> None:
    """The name of a task, its question, and an image with each answer."""
    middle = (left + _WIDTH / 2) / width
    figure.text(middle, 1 - 0.5 / height, name, fontsize=11, weight="bold", color=INK, ha="center",
                va="top")  # fmt: skip
    images, answers = drawn(name, 16)
    for answer, label in enumerate(PROBES[name].classes):
        image = images[int((answers == answer).argmax())]
        x = left + _WIDTH / 2 + (answer - 0.5) * (_EXAMPLE + 0.08) - _EXAMPLE / 2
        box = (x / width, 1 - (0.74 + _EXAMPLE) / height, _EXAMPLE / width, _EXAMPLE / height)
        ax = figure.add_axes(box)
        ax.imshow(image, interpolation="nearest")
        ax.set_axis_off()
        ax.set_title(label, fontsize=6.5, color=MUTED, pad=-7, y=-0.1)
