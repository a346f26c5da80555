"""`vitarium explain --mixers`: which positions each mixer reads, and what it costs."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

FORMATS = (".png", ".svg", ".pdf")


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Draw a map per mixer: which positions one position reads, with the formula of "
        "its multiply-adds and, given records of `vitarium bench scaling`, the measured exponent "
        "of its time.",
    )
    parser.add_argument("--mixers", metavar="MIXER", type=str, nargs="*", help="all, if none")
    parser.add_argument(
        "--records", metavar="RECORDS", type=str, nargs="+", default=[], help="JSON Lines files"
    )
    parser.add_argument(
        "--output", "-o", metavar="FILE", type=str, default="atlas.png",
        help="the picture: .png, .svg or .pdf; it is replaced",
    )  # fmt: skip
    return parser


def run(config: Namespace) -> None:
    from vitarium.benchmarks import atlas, atlas_picture, record

    output = Path(config.output)
    if output.suffix not in FORMATS:
        raise ValueError(f"output={str(output)!r} must end in one of {', '.join(FORMATS)}")
    records = atlas.scaling_records(r for path in config.records for r in record.read(path))
    if config.records and not records:
        raise ValueError(f"{', '.join(config.records)}: no records of `vitarium bench scaling`")
    atlas_picture.draw(atlas.entries(config.mixers, records), output, records)
    print(output)
