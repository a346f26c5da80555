"""`vitarium bench report`: records as a page, as tables or as a picture."""

from __future__ import annotations

from argparse import ArgumentError
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="One file that shows records: a page that opens from disk without a network "
        "(.html), tables in Markdown (.md), or a picture of accuracy over latency (.png, .svg)."
    )
    parser.add_argument("records", metavar="RECORDS", type=str, nargs="+", help="JSON Lines files")
    parser.add_argument(
        "--output", "-o", type=str, required=True, help="such as report.html; its suffix decides"
    )
    parser.add_argument(
        "--kernels", metavar="SHEET", type=str | None, default=None, help="kernel sheet, JSON"
    )
    parser.add_argument(
        "--atlas", action="store_true",
        help="a picture of what every mixer reads and how its time grows, for the page",
    )  # fmt: skip
    parser.add_argument(
        "--images", metavar="PICTURE", type=str, nargs="+", default=[],
        help="further pictures for the page",
    )  # fmt: skip
    return parser


def run(config: Namespace) -> None:
    from vitarium.benchmarks.report_files import SUFFIXES, write_report

    if Path(config.output).suffix not in SUFFIXES:
        raise ArgumentError(None, f"--output {config.output} must end in {', '.join(SUFFIXES)}")
    write_report(
        config.records,
        config.output,
        kernels=config.kernels,
        images=config.images,
        atlas=config.atlas,
    )
    print(config.output)
