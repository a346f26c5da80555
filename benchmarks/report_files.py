"""Reports of records as files: a page, tables in Markdown or a picture, by the file's suffix."""

from __future__ import annotations

import contextlib
import html
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitarium.benchmarks import atlas as atlas_of
from vitarium.benchmarks import (
    atlas_picture,
    comparisons,
    growth,
    kernel_sheet,
    page,
    pareto,
    plot,
    record,
    report_tables,
    table,
    testbed,
    testbed_views,
)
from vitarium.benchmarks.record import Record
from vitarium.benchmarks.report_tables import Table
from vitarium.train.checkpoint import write_atomic, write_text

SUFFIXES = (".html", ".md", ".png", ".svg")


def write_report(
    records: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    kernels: str | os.PathLike[str] | None = None,
    images: Sequence[str | os.PathLike[str]] = (),
    atlas: bool = False,
) -> None:
    """Write a report of records, whole or not at all.

    Args:
        records: JSON Lines files; of several records of one thing, the last counts.
        output: file to be written, in a folder that there is: `.html` for the page, `.md` for
            tables, `.png` or `.svg` for a picture of accuracy over latency.
        kernels: kernel sheet, see `read_sheet`; for page and tables.
        images: pictures for the page.
        atlas: draw one of all mixers for the page, with the growth that the records tell.

    Raises:
        ValueError: the suffix is another one, a file holds no records, or there is nothing to draw.
        OSError: a file cannot be read or written, or the folder is not there.
    """
    output = Path(output)
    check_output(output)
    found = read_records(records)
    sheet = [] if kernels is None else read_sheet(kernels)
    everything = [r for part in found.values() for r in part]
    if output.suffix == ".html":
        with tempfile.TemporaryDirectory() as folder:
            pictures, rows = [*map(Path, images)], None
            if atlas:
                grown = atlas_of.scaling_records(everything)
                entries = atlas_of.entries(records=grown)
                pictures.append(Path(folder, "What every mixer reads.png"))
                atlas_picture.draw(entries, pictures[-1], grown)
                rows = report_tables.atlas_table(entries)
            html = page.page(found, kernels=sheet, images=pictures, atlas=rows)
            write_text(output, html)
    elif output.suffix == ".md":
        write_text(output, markdown(everything, sheet))
    else:
        _write_picture(everything, output)


def check_output(output: Path) -> None:
    """Refuse what no report can be written to.

    Raises:
        ValueError: the suffix is not one of `SUFFIXES`, or it is a folder.
        FileNotFoundError: its folder is not there.
    """
    if output.suffix not in SUFFIXES:
        raise ValueError(f"output={str(output)!r} must end in {', '.join(SUFFIXES)}")
    if output.is_dir():
        raise ValueError(f"output={str(output)!r} is a folder")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output={str(output)!r}: there is no folder {output.parent}")


# --- what is read --------------------------------------------------------------------------------


def read_records(paths: Sequence[str | os.PathLike[str]]) -> dict[str, list[Record]]:
    """Records by file: by its name, or by its path where two files have the same name.

    Raises:
        ValueError: a file is not of records, or there are none in any.
        FileNotFoundError: there is no such file.
    """
    files = list(dict.fromkeys(map(Path, paths)))
    names = [path.name for path in files]
    found = {}
    for path in files:
        _check_file(path)
        try:
            records = record.read(path)
        except ValueError as error:  # text that is no UTF-8 included
            where = "" if str(error).startswith(str(path)) else f"{path}: "
            raise ValueError(
                f"{where}{error}; records are JSON Lines, as `vitarium bench` writes them"
            ) from error
        found[path.name if names.count(path.name) == 1 else str(path)] = records
    if not any(found.values()):
        raise ValueError(f"no records in {', '.join(map(str, files)) or 'no files'}")
    return found


def read_sheet(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a kernel sheet, with what follows from them; or of any table in JSON.

    Such a table is a list of objects, or an object of `columns` and `rows`.

    Raises:
        ValueError: it is something else.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    _check_file(path)
    with contextlib.suppress(ValueError):
        return [kernel_sheet.for_readers(entry) for entry in kernel_sheet.read(path)]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            columns = found["columns"]
            return [dict(zip(columns, row, strict=True)) for row in found["rows"]]
        return [dict(row) for row in found]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no kernel sheet, a list of objects or an object of columns and rows: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the files in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")


# --- what is written -----------------------------------------------------------------------------


def markdown(records: Sequence[Record], kernels: Sequence[Mapping[str, Any]] = ()) -> str:
    """The tables of the page, but for that of all records."""
    parts = ["# What was measured"]
    for points in pareto.point_sets(records):
        parts += [f"## {points.title}", *([points.remark] if points.remark else [])]
        parts.append(_table(report_tables.set_table(points)))
    compared = comparisons.compared(records)
    if compared:
        parts += ["## Beside peers", "No ratio is given where the spread exceeds the difference."]
        parts.append(_table(report_tables.comparison_table(compared)))
    for panel in growth.panels(records):
        parts += [f"## Growth: {panel.title}", _table(report_tables.panel_table(panel))]
    if kernels:
        parts += ["## Kernel sheet", _table(report_tables.kernel_table(kernels))]
    parts += ["## Where", _table(report_tables.place_table(records))]
    return "\n\n".join(parts) + "\n"


def _table(found: Table) -> str:
    rows = [[_escaped(cell) for cell in row] for row in found.rows]
    return table.markdown([_escaped(column.label) for column in found.columns], rows)


def _escaped(cell: str) -> str:
    """A text that Markdown shows as it is, in one cell."""
    return html.escape(" ".join(cell.split()), quote=False).replace("|", "\\|")


def _write_picture(records: Sequence[Record], output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, output.name)
        _draw(records, picture)
        write_atomic(output, lambda temporary: temporary.write_bytes(picture.read_bytes()))


def _draw(records: Sequence[Record], path: Path) -> None:
    """Models by accuracy and latency, of the set that most is known of; or else the testbed."""
    models = [r for r in records if r.kind == "model" and not testbed.is_of_testbed(r)]
    for points in pareto.point_sets(models):
        ours = [r for r in points.records if r.mode == "forward" and not pareto.is_peer(r)]
        accuracies = plot.published_accuracies(ours)
        if accuracies:
            plot.plot_models(ours, accuracies, path)
            return
    for rows in testbed.rows_by_recipe([r for r in records if testbed.is_of_testbed(r)]):
        if any(testbed_views.is_whole(row) for row in rows):
            testbed_views.plot(rows, path)
            return
    raise ValueError(
        "no record of a model or of the testbed whose accuracy is known: nothing to draw"
    )
