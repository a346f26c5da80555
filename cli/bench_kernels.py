"""`vitarium bench kernels` and `vitarium bench all`: kernels without a GPU; all in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat
from rich.console import Console

RESULTS = Path("benchmarks/results")  # in a checkout: what is kept
RUNS = Path("runs/bench")


def kernels_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="What the compiler makes of every launch configuration of the Triton kernels, "
        "without a GPU: registers, spills, shared memory, occupancy, tensor cores, and the "
        "roofline. Configurations that are in the sheet already are not compiled again."
    )
    parser.add_argument("names", metavar="OPERATOR", type=str, nargs="*", help="all, if none")
    parser.add_argument(
        "--targets",
        type=Literal["cuda:80", "cuda:90", "cuda:100"],
        nargs="+",
        default=["cuda:80", "cuda:90", "cuda:100"],
        help="compute capabilities",
    )
    parser.add_argument(
        "--minutes", type=PositiveFloat | None, default=None, help="begin nothing after so many"
    )
    parser.add_argument("--fresh", action="store_true", help="compile again what the sheet has")
    parser.add_argument(
        "--output",
        "-o",
        type=str | None,
        default=None,
        help=f"the sheet, which is written to; {RESULTS}/kernels.json in a checkout of the "
        f"repository and {RUNS}/kernels.json elsewhere, if not given",
    )
    return parser


def run_kernels(config: Namespace) -> int:
    from vitarium.benchmarks import kernel_sheet

    console = Console()
    output = config.output or str((RESULTS if RESULTS.is_dir() else RUNS) / "kernels.json")
    rows, remaining = kernel_sheet.bench_kernels(
        **{**vars(config), "output": output},
        progress=lambda line: console.print(line, style="dim", highlight=False),
    )
    console.print(kernel_sheet.table(rows))
    faults = [f"{row}: {fault}" for row in rows for fault in kernel_sheet.faults(row)]
    for line in faults:
        console.print(line, style="red", markup=False, highlight=False)
    if remaining:
        console.print(f"{remaining} configurations remain; the same command goes on with them")
    print(f"sheet: {output}")
    return 1 if faults else 0


def all_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Everything in one command: operators, the smallest model of every family in "
        "inference and training, growth with the map, pictures, a report; on a GPU also tests, "
        "CUDA graphs and compiled models. The same command goes on where it ended."
    )
    parser.add_argument(
        "--device",
        type=Literal["cuda", "cpu"] | None,
        default=None,
        help="a GPU if there is one, if not given",
    )
    parser.add_argument(
        "--minutes",
        type=PositiveFloat | None,
        default=None,
        help="for all steps together; 8 on a GPU and 14 on a CPU, if not given",
    )
    parser.add_argument("--fresh", action="store_true", help="do again what was done before")
    parser.add_argument(
        "--rehearsal",
        action="store_true",
        help="a little of every step, to see that it works; no results",
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help=f"folder; {RESULTS}/<gpu> or {RESULTS}/<processor>/all in a checkout of the "
        f"repository and below {RUNS} elsewhere, if not given",
    )
    return parser


def run_all(config: Namespace) -> int:
    from vitarium.benchmarks import plan, record, steps
    from vitarium.benchmarks.arguments import device_named

    device = device_named(config.device).type
    console = Console()
    slug = record.this_machine(device).slug
    root = RESULTS if RESULTS.is_dir() and not config.rehearsal else RUNS
    folder = root / slug / "rehearsal" if config.rehearsal else root / slug
    if device == "cpu" and not config.rehearsal:
        folder /= "all"  # beside records that took longer
    if config.output:
        folder = Path(config.output)
    place = steps.Place(device, folder, config.fresh, config.rehearsal)
    reports = steps.run_suite(
        plan.plan(place),
        place,
        minutes=config.minutes or plan.MINUTES[device],
        logs=RUNS / slug / "logs" if config.output is None else folder / "logs",
        progress=lambda line: console.print(line, style="dim", highlight=False),
    )
    for report in reports:
        style = {"failed": "red", "out of time": "yellow", "unfinished": "yellow"}
        line = f"{report.step}: {report.status}, {report.seconds:.0f} s"
        console.print(
            f"{line}; {report.detail}" if report.detail else line,
            style=style.get(report.status),
            markup=False,
            highlight=False,
        )
    if any(report.status in ("unfinished", "out of time") for report in reports):
        console.print("the same command goes on with what is not done")
    print(f"records: {folder}")
    return 1 if any(report.status == "failed" for report in reports) else 0
