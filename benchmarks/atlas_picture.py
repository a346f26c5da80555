"""The atlas as a picture: a panel per mixer, grouped by what they attend to."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from vitarium.benchmarks.atlas import QUERY, SIDE, Entry, formula, letters_of
from vitarium.benchmarks.plot import INK, MUTED, where_measured
from vitarium.benchmarks.record import Record
from vitarium.benchmarks.testbed_views import COLOURS
from vitarium.zoo.testbed_settings import KINDS

COLUMNS = 8
_UNREAD, _REACHED = "#f3f4f6", 0.16  # ground, and tint of what is reached but not attended to
_FAINTEST = 0.3  # tint of the smallest weight
_WIDTH, _HEIGHT, _GAP = 1.9, 2.5, 0.4  # inches: of a panel with its text, above a group
_TOP, _BOTTOM = 1.2, 1.05


def draw(
    entries: Sequence[Entry], path: str | os.PathLike[str], records: Sequence[Record] = ()
) -> None:
    """Draw what the mixers read, what they cost, and how their measured time grows.

    Args:
        entries: of `vitarium.benchmarks.atlas.entries`.
        path: picture file; its suffix chooses the format, such as .png or .svg.
        records: those that the exponents are from; the picture says where they were measured.

    Raises:
        ValueError: there are no entries.
    """
    if not entries:
        raise ValueError("entries=() must be at least one")
    groups = {kind: [e for e in entries if e.kind == kind] for kind in COLOURS}
    groups = {kind: members for kind, members in groups.items() if members}
    columns = max(4, min(COLUMNS, max(map(len, groups.values()))))
    lines = {kind: -(-len(members) // columns) for kind, members in groups.items()}
    height = _TOP + _BOTTOM + sum(_GAP + _HEIGHT * n for n in lines.values())
    width = 0.4 + _WIDTH * columns
    figure = Figure(figsize=(width, height), facecolor="white")
    _title(figure, width, height)
    top = height - _TOP
    for kind, members in groups.items():
        label = f"{kind}: {KINDS[kind]}" if kind in KINDS else kind
        figure.text(
            0.3 / width, (top - 0.2) / height, label, fontsize=13, weight="bold",
            color=COLOURS[kind], va="center",
        )  # fmt: skip
        top -= _GAP
        for number, entry in enumerate(members):
            line, column = divmod(number, columns)
            side = _WIDTH - 0.3
            left, upper = 0.3 + _WIDTH * column, top - _HEIGHT * line - 0.2
            box = (left / width, (upper - side) / height, side / width, side / height)
            _panel(figure.add_axes(box), entry)
        top -= _HEIGHT * lines[kind]
    _foot(figure, [e.mixer for e in entries], records, width, height)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=88)


def _title(figure: Figure, width: float, height: float) -> None:
    left = 0.3 / width
    figure.text(
        left, 1 - 0.2 / height, "What one position reads", fontsize=20, weight="bold", color=INK,
        va="top",
    )  # fmt: skip
    note = (
        f"A map of {SIDE} x {SIDE} tokens, random weights, settings of the small testbed; content "
        "chooses in one draw, all else is the mean of several."
    )
    figure.text(left, 1 - 0.62 / height, note, fontsize=10, color=MUTED, va="top", wrap=True)
    handles = [
        Patch(facecolor="white", edgecolor=INK, linewidth=1.6, label="the position that reads"),
        Patch(color=_tint(INK, 1.0), label="attended to; paler: with less weight"),
        Patch(color=_tint(INK, _REACHED), label="only through statistics or convolutions"),
        Patch(color=_UNREAD, label="not read"),
    ]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(left - 0.005, 1 - 0.84 / height),
        ncols=4, frameon=False, fontsize=10, labelcolor=INK, handlelength=1.1, columnspacing=1.6,
        borderpad=0, handletextpad=0.5,
    )  # fmt: skip


def _tint(colour: str, strength: float) -> tuple[float, ...]:
    """The colour mixed with white."""
    return tuple(1 - strength * (1 - part) for part in to_rgb(colour))


def pixels(entry: Entry) -> np.ndarray:
    """The colours of a panel, `(SIDE, SIDE, 3)`."""
    weights = entry.reads.numpy()
    strength = np.where(weights > 0, _FAINTEST + (1 - _FAINTEST) * np.sqrt(weights), _REACHED)
    colour = np.array(to_rgb(COLOURS[entry.kind]))
    shown = 1 - strength[..., None] * (1 - colour)
    return np.where(entry.reached.numpy()[..., None], shown, to_rgb(_UNREAD))


def _panel(ax: Axes, entry: Entry) -> None:
    ax.imshow(pixels(entry), interpolation="nearest")
    for place in range(1, SIDE):
        ax.axhline(place - 0.5, color="white", linewidth=0.6)
        ax.axvline(place - 0.5, color="white", linewidth=0.6)
    row, column = QUERY
    for colour, thickness in (("white", 4.5), (INK, 1.8)):
        corner = (column - 0.5, row - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=thickness))
    ax.set_axis_off()
    size = 9.5 if len(entry.mixer) < 21 else 8
    ax.set_title(entry.mixer, loc="left", fontsize=size, weight="bold", color=INK, pad=3)
    lines = [_extent(entry), *textwrap.wrap(formula(entry.mixer), 29, break_long_words=False)]
    if entry.exponent is not None:
        lines.append(f"measured: time ~ N$^{{{entry.exponent:.2f}}}$")
    ax.text(
        0, -0.03, "\n".join(lines), transform=ax.transAxes, fontsize=7.8, color=INK, va="top",
        linespacing=1.2,
    )  # fmt: skip


def _extent(entry: Entry) -> str:
    """How many positions are attended to, and whether others are reached otherwise."""
    attended, reached = int((entry.reads > 0).sum()), int(entry.reached.sum())
    text = "attends to all" if attended == SIDE**2 else f"attends to {attended} of {SIDE**2}"
    if attended == 1:
        text = "attends to channels"
    return text + (", reaches all" if attended < reached == SIDE**2 else "")


def _foot(
    figure: Figure, names: Sequence[str], records: Sequence[Record], width: float, height: float
) -> None:
    letters = letters_of(names)
    legend = "Below each map: multiply-adds for N = H W tokens of C channels; "
    legend += ", ".join(f"{letter} {' or '.join(of)}" for letter, of in letters.items())
    text = textwrap.fill(legend, int(width * 13))
    if records:
        where = f"Exponents: {where_measured(records)}; maps of 196 to 65,536 tokens."
        text += "\n" + textwrap.fill(where, int(width * 13))
    figure.text(0.3 / width, 0.12 / height, text, fontsize=8.5, color=MUTED, va="bottom")
