"""How time grows with tokens, pixels or images: curves of records, and their exponents."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from vitarium.benchmarks import report
from vitarium.benchmarks.mixers import OURS
from vitarium.benchmarks.record import Record
from vitarium.benchmarks.scaling import Power, power
from vitarium.benchmarks.testbed_views import kind_of

_POINTS = 3  # at least: two always lie on a line


@dataclass(frozen=True)
class Curve:
    """Median times of one thing at several sizes.

    Attributes:
        name: of the mixer or the model, with the implementation if it is a peer.
        group: what a mixer attends to; of models, their implementation.
        note: what else tells the curve apart, such as the number of channels.
        points: size and seconds, by size.
    """

    name: str
    group: str
    note: str
    points: list[tuple[float, float]]

    @property
    def power(self) -> Power:
        """By which power of the size the time grows."""
        return power(self.points)


@dataclass(frozen=True)
class Panel:
    """Curves that can be compared: one machine, clock, mode and data type, one kind of size.

    Attributes:
        title: what they share.
        size: what grows, in words.
        curves: the slowest growth first.
    """

    title: str
    size: str
    curves: list[Curve] = field(default_factory=list)


def panels(records: Iterable[Record]) -> list[Panel]:
    """Every curve of three sizes or more that differ in nothing else."""
    series: defaultdict[tuple, dict[float, float]] = defaultdict(dict)
    for r in records:
        if r.kind in ("mixer", "model") and r.failure is None:
            for title, size, note, value in _sizes(r):
                arguments = json.dumps(r.arguments, sort_keys=True)
                key = (title, size, r.name, r.implementation, note, arguments)
                series[key][value] = r.median  # the last record of a thing counts
    found: dict[tuple[str, str], Panel] = {}
    for (title, size, name, implementation, note, _), points in series.items():
        if len(points) >= _POINTS:
            ours = implementation in (OURS, "eager")
            curve = Curve(
                name if ours else f"{name} ({implementation})",
                kind_of(name) if size == "tokens" else implementation,
                note,
                sorted(points.items()),
            )
            found.setdefault((title, size), Panel(title, size)).curves.append(curve)
    for panel in found.values():
        panel.curves.sort(key=lambda curve: curve.power.exponent)
    return list(found.values())


def _sizes(r: Record) -> Iterable[tuple[str, str, str, float]]:
    """What may grow in a record: what else must be equal, the size's name, a note, the size."""
    shape = next(iter(r.shapes.values()), [])
    if len(shape) != 4:
        return
    where = f"{r.dtype}, {report.place(r)}"
    if r.kind == "mixer":
        batch, height, width, dim = shape
        title = f"Mixers, {r.mode}, {report.plural(batch, 'image')}, {where}"
        yield title, "tokens", f"{dim} channels", height * width
    else:
        batch, _, height, width = shape
        title = f"Models, {r.mode}, {report.plural(batch, 'image')}, {where}"
        yield title, "pixels", "", height * width
        yield f"Models, {r.mode}, {height}x{width} pixels, {where}", "images", "", batch
