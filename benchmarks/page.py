"""Records as one HTML page that needs nothing else: no network, no other file.

Every table is written here and readable without a script. The script sorts and filters them and
draws the charts, by itself: a charting library in the page would be megabytes (plotly.js is 4.5,
several times what the committed records are), and none of them has what the page must have, points
that are walked through by keyboard, colours of both schemes and a print of what is shown. What is
needed of charts, three kinds of scales, marks and lines, is a few hundred lines.

A content security policy in the page names the script by its hash: nothing else runs, whatever a
record is called, and nothing is fetched.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from vitarium.benchmarks import comparisons, growth, pareto, report_tables
from vitarium.benchmarks.atlas import letters_of
from vitarium.benchmarks.comparisons import Comparison
from vitarium.benchmarks.record import Record
from vitarium.ops import MIXERS
from vitarium.train.run_page import html_environment

_IMAGE_KINDS = {
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
}


def page(
    records: Mapping[str, Sequence[Record]],
    *,
    kernels: Sequence[Mapping[str, Any]] = (),
    images: Sequence[Path] = (),
    atlas: report_tables.Table | None = None,
) -> str:
    """The page's HTML.

    Args:
        records: by the name of the file that they are from; at least one.
        kernels: rows of a kernel sheet, their keys as columns.
        images: PNG, SVG, JPEG or WebP files, such as those of a mixer atlas, shown with their
            names.
        atlas: what one of `images`, an atlas of mixers, shows, as a table.

    Raises:
        ValueError: there are no records, or an image is of another kind.
        OSError: an image cannot be read.
    """
    everything = [r for found in records.values() for r in found]
    if not everything:
        raise ValueError("no records to report")
    sets = pareto.point_sets(everything)
    panels = growth.panels(everything)
    compared = comparisons.compared(everything)
    data = {
        "axes": {key: axis._asdict() for key, axis in pareto.AXES.items()},
        "sets": [_set_data(s) for s in sets],
        "panels": [_panel_data(panel) for panel in panels],
        "comparisons": _strips(compared),
    }
    script, style = _text("charts.js") + _text("report.js"), _text("report.css")
    return _template().render(
        data=data,
        script=script,
        script_hash=_hash(script),
        style=style,
        style_hash=_hash(style),
        summary=_summary(everything),
        verdicts=_verdicts(compared),
        sets=[(s, report_tables.set_table(s)) for s in sets],
        panels=[(panel, report_tables.panel_table(panel)) for panel in panels],
        comparisons=report_tables.comparison_table(compared) if compared else None,
        kernels=report_tables.kernel_table(kernels) if kernels else None,
        images=[(_caption(path), _address(path)) for path in images],
        atlas=atlas,
        letters=", ".join(f"{key} {' or '.join(of)}" for key, of in letters_of(MIXERS).items()),
        records=report_tables.record_table(records),
        places=report_tables.place_table(everything),
    )


def _text(name: str) -> str:
    folder = importlib.resources.files("vitarium.benchmarks") / "templates"
    return (folder / name).read_text(encoding="utf-8")


@functools.cache
def _template() -> jinja2.Template:
    environment = html_environment()
    # `tojson` escapes what could end a script element.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.from_string(_text("report.html"))


def _hash(text: str) -> str:
    """A content security policy's name for an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _address(path: Path) -> str:
    """An image as a `data:` address."""
    kind = _IMAGE_KINDS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"image {str(path)!r} must end in {', '.join(_IMAGE_KINDS)}")
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _caption(path: Path) -> str:
    return path.stem.replace("_", " ")


# --- what the script draws -----------------------------------------------------------------------


def _set_data(points: pareto.PointSet) -> dict[str, Any]:
    return {
        "title": points.title,
        "accuracy": points.accuracy,
        "memory": points.memory,
        "axes": points.axes,
        "colours": points.colours,
        "points": [
            {
                "name": p.name,
                "values": {key: float(f"{value:.5g}") for key, value in p.values.items()},
                "groups": p.groups,
                "note": p.note,
                "margin": p.margin,
                "peer": p.peer,
            }
            for p in points.points
        ],
    }


def _panel_data(panel: growth.Panel) -> dict[str, Any]:
    return {
        "title": panel.title,
        "size": panel.size,
        "curves": [
            {
                "name": curve.name,
                "group": curve.group,
                "exponent": str(curve.power),
                "points": [[size, float(f"{1e3 * s:.5g}")] for size, s in curve.points],
            }
            for curve in panel.curves
        ],
    }


def _strips(found: Sequence[Comparison]) -> dict[str, list[dict[str, Any]]]:
    """Ratios to the best peer, by kind."""
    strips: dict[str, list[dict[str, Any]]] = {}
    for c in found:
        if c.peer is not None and c.over_peer is not None:
            entry = {
                "name": c.ours.name,
                "ratio": float(f"{c.over_peer:.4g}"),
                "verdict": c.verdict,
                "peer": c.peer.implementation,
                "setting": f"{c.ours.mode}, {c.ours.dtype}, {report_tables.described(c.ours)}",
            }
            strips.setdefault(c.ours.kind, []).append(entry)
    return strips


# --- in a few words ------------------------------------------------------------------------------


def _summary(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Figures at the top of the page, with what they are of."""
    kinds = Counter(r.kind for r in records)
    figures = [(f"{len(records):,}", "records")]
    for kind, noun in (("model", "models"), ("mixer", "mixers"), ("operator", "operators")):
        if kind in kinds:
            figures.append((str(len({r.name for r in records if r.kind == kind})), noun))
    if kinds["run"]:
        figures.append((str(kinds["run"]), "trainings"))
    return figures


def _verdicts(found: Sequence[Comparison]) -> list[tuple[str, dict[str, int]]]:
    """By kind: how many settings are faster, slower and within the spread."""
    counts: dict[str, Counter[str]] = {}
    for c in found:
        if c.verdict is not None:
            counts.setdefault(c.ours.kind, Counter())[c.verdict] += 1
    return [(kind, dict(count)) for kind, count in counts.items()]
