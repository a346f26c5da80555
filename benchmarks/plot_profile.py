"""A picture of where forward time goes: a stacked bar per stage of every model."""

from __future__ import annotations

import os
from collections.abc import Sequence

from matplotlib.figure import Figure

from vitarium.benchmarks import plot
from vitarium.benchmarks.breakdown import (
    CHANNEL_MLP,
    CONVOLUTION,
    MOVES,
    NORM,
    OPERATOR,
    PROJECTIONS,
    REST,
)
from vitarium.benchmarks.record import Record

# Colours that stay apart for colour-blind readers; what is the mixer's in two shades of blue.
COLOURS = {
    OPERATOR: "#0a3d91",
    PROJECTIONS: "#6aa5e8",
    CHANNEL_MLP: "#e08a00",
    CONVOLUTION: "#57a773",
    NORM: "#8250a8",
    MOVES: "#c2410c",
    REST: "#b4bcc6",
}


def plot_profile(records: Sequence[Record], path: str | os.PathLike[str]) -> None:
    """Milliseconds by stage and part, a panel per model.

    Args:
        records: of models with `stages`, on one machine; others are left out, and of several of
            one model the last counts.
        path: picture file; its suffix chooses the format.

    Raises:
        ValueError: none has stages.
    """
    profiled = {r.name: r for r in records if r.stages and r.median is not None}
    if not profiled:
        raise ValueError("no record of a model with its stages; `bench models --profile` makes one")
    heights = [len(r.stages) for r in profiled.values()]
    figure = Figure(
        figsize=(9.4, 1.6 + 0.26 * sum(heights) + 0.5 * len(heights)), layout="constrained"
    )
    axes = figure.subplots(
        len(profiled), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for ax, r in zip(axes.flat, profiled.values()):
        assert r.median is not None
        names = [stage or "outside" for stage in r.stages]
        ends = [0.0] * len(names)
        for part, colour in COLOURS.items():
            widths = [1e3 * r.median * shares.get(part, 0.0) for shares in r.stages.values()]
            ax.barh(names, widths, left=ends, color=colour, label=part, zorder=3)
            ends = [end + width for end, width in zip(ends, widths)]
        ax.invert_yaxis()
        ax.grid(axis="x", color=plot.GRID, linewidth=0.8, zorder=0)
        ax.set_title(f"{r.name}, {1e3 * r.median:.3g} ms", loc="left", fontsize=10.5, weight="bold")
        ax.tick_params(colors=plot.MUTED, labelsize=8.5, length=0)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
    last = list(profiled.values())
    shapes = dict.fromkeys("x".join(map(str, r.shapes["input"])) for r in last)
    axes[-1, 0].set_xlabel(
        f"ms of one forward, input {', '.join(shapes)}\n{plot.where_measured(last)}",
        fontsize=8,
        color=plot.MUTED,
    )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    plot._save(figure, path)
