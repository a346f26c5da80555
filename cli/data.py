"""`vitarium data check`: what is in a data set, and what is wrong with it."""

from __future__ import annotations

import json
from argparse import ArgumentError
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from vitarium.train.check import DataReport, SplitReport, check_data, guess_source
from vitarium.train.checkpoint import write_text
from vitarium.train.config import ConfigError, SourceConfig

LISTED = 10  # names of a kind; --json has all


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Read every image once and report sizes, broken files, duplicates, class "
        "balance and speed. Exit status 1: images are broken, or in several splits, or classes "
        "are empty or not in every split.",
    )
    parser.add_argument("action", type=Literal["check"], help="what to do")
    parser.add_argument(
        "path",
        metavar="PATH",
        type=str,
        help="a folder, tar file, shards, a data set of Hugging Face; or a source as `train "
        "--data` takes it",
    )
    parser.add_argument(
        "--workers", type=NonNegativeInt | None, help="reading processes; one per core if absent"
    )
    parser.add_argument("--json", metavar="FILE", type=str | None, help="write all of it here")
    parser.add_class_arguments(SourceConfig, "source")
    return parser


def run(config: Namespace) -> int:
    try:
        options = SourceConfig(**config.source.as_dict())
    except ConfigError as error:
        raise ArgumentError(None, str(error)) from None
    output = None if config.json is None else Path(config.json)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise ValueError(f"json={config.json!r} cannot be written: not a file in a folder")
    console = Console()
    source = guess_source(config.path)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading")
        report = check_data(
            source,
            options,
            workers=config.workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print_report(report, console)
    if output is not None:
        write_text(output, json.dumps(report.to_record(), indent=1) + "\n")
        console.print(f"written to {output}", highlight=False, soft_wrap=True)
    return 1 if report.problems else 0


def print_report(report: DataReport, console: Console) -> None:
    """A table with a row per fact and a column per split, then what is wrong, by name."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=escape(report.source))
    table.add_column("")
    for name in report.splits:
        table.add_column(escape(name), justify="right", overflow="fold")
    columns = [_facts(split) for split in report.splits.values()]
    for fact in columns[0]:
        table.add_row(fact, *(escape(column[fact]) for column in columns))
    console.print(table)
    for name, split in report.splits.items():
        _print_list(console, f"{name}, broken", [entry["reason"] for entry in split.broken])
        _print_list(console, f"{name}, empty classes", split.empty)
        _print_list(console, f"{name}, same pixels", list(map(" = ".join, split.duplicates)))
    for title, groups in (
        ("in several splits", report.leaks),
        ("same pixels, several classes", report.contradictions),
    ):
        described = [" = ".join(f"{e['image']} ({e['class']})" for e in group) for group in groups]
        _print_list(console, title, described)
    unshared = [f"{k} (only in {', '.join(v)})" for k, v in report.unshared_classes.items()]
    _print_list(console, "classes that not every split has", unshared)
    console.print(
        f"read in {report.seconds:.1f} s by {report.workers} processes: "
        f"{report.images_per_second:.0f} images/s, {report.megabytes_per_second:.1f} MB/s",
        highlight=False,
    )
    summary = "; ".join(report.problems) or "nothing broken, nothing in several splits"
    console.print(summary, highlight=False, soft_wrap=True, markup=False)


def _facts(split: SplitReport) -> dict[str, str]:
    counts = list(split.classes.values())

    def spread(values: dict[str, float]) -> str:
        return " / ".join(f"{value:g}" for value in values.values()) or "-"

    def listed(numbers: dict[str, int]) -> str:
        return ", ".join(f"{name} {number}" for name, number in numbers.items()) or "-"

    return {
        "images": f"{split.images}",
        "megabytes": f"{split.megabytes:.1f}",
        "classes": f"{len(counts)}",
        "images per class, min / max": f"{min(counts, default=0)} / {max(counts, default=0)}",
        "largest class / smallest": f"{split.balance:.2f}",
        "empty classes": f"{len(split.empty)}",
        "width, min / median / max": spread(split.width),
        "height, min / median / max": spread(split.height),
        "modes": listed(split.modes),
        "broken": f"{len(split.broken)}",
        "duplicates": f"{sum(len(group) - 1 for group in split.duplicates)}",
        "ignored files": listed(split.ignored),
    }


def _print_list(console: Console, title: str, lines: list[str]) -> None:
    if not lines:
        return
    console.print(f"{title}:", highlight=False, markup=False)
    for line in lines[:LISTED]:
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
    if len(lines) > LISTED:
        console.print(f"  and {len(lines) - LISTED} more; --json FILE has all", highlight=False)
