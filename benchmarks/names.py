"""Names of points in pictures, placed so that they can be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox

# Where a name may be: points from its mark, and sixteenths of a turn, the sides first.
_RADII = (8, 12, 17, 23, 30, 38, 47, 57, 69, 83, 99, 117, 137, 160)
_TURNS = (0, 8, 1, 15, 7, 9, 2, 14, 6, 10, 4, 12, 3, 13, 5, 11)


class Named(NamedTuple):
    """A point with its name, in the coordinates of the axes' data."""

    name: str
    x: float
    y: float
    colour: str


def place_names(ax: Axes, points: Sequence[Named], size: float, **style: Any) -> None:
    """Write every point's name at the nearest place that is free, with a line to it where far.

    Args:
        ax: axes whose limits and place in the figure are final.
        points: that are drawn already.
        size: of the names, points.
        style: further properties of the texts.
    """
    renderer = FigureCanvasAgg(ax.get_figure(root=True)).get_renderer()
    where = [ax.transData.transform((p.x, p.y)) for p in points]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in where]
    inside = ax.get_window_extent(renderer)

    def neighbours(i: int) -> int:
        x, y = where[i]
        return sum(abs(x - a) < 120 and abs(y - b) < 40 for a, b in where)

    for i in sorted(range(len(points)), key=neighbours, reverse=True):
        name, x, y, colour = points[i]
        line = {"arrowstyle": "-", "color": colour, "lw": 0.7, "alpha": 0.7, "shrinkB": 3}
        text = ax.annotate(
            name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=size, color=colour,
            va="center", arrowprops={**line, "shrinkA": 0}, zorder=5,
            path_effects=[withStroke(linewidth=2.5, foreground="white")], **style,
        )  # fmt: skip
        for radius, turn in product(_RADII, _TURNS):
            dx, dy = radius * math.cos(turn * math.pi / 8), radius * math.sin(turn * math.pi / 8)
            sideways = "left" if dx > 0.1 else "right" if dx < -0.1 else "center"
            text.set(position=(dx, dy), horizontalalignment=sideways)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(1)  # without the line
            if inside.x0 < box.x0 and box.x1 < inside.x1 and not any(map(box.overlaps, taken)):
                break
        taken.append(box)
        text.arrow_patch.set_visible(radius > _RADII[1])
