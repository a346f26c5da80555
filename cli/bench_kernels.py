"""`vitarium bench kernels` and `vitarium bench gpu`: kernels without a GPU, all of it with one."""

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


def gpu_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Everything that is measured on a GPU, within a few minutes: tests, operators "
        "in bfloat16 and float16, the smallest model of every family in inference and training, "
        "growth with the map, CUDA graphs, compiled models, pictures. The same command goes on "
        "where it ended."
    )
    parser.add_argument(
        "--device",
        type=Literal["cuda", "cpu"],
        default="cuda",
        help="cpu is a rehearsal: a little of every step, and no results",
    )
    parser.add_argument("--minutes", type=PositiveFloat, default=8.0, help="for all steps together")
    parser.add_argument("--fresh", action="store_true", help="do again what was done before")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help=f"folder; {RESULTS}/<gpu> in a checkout of the repository and {RUNS}/<gpu> elsewhere, "
        "if not given",
    )
    return parser


def run_gpu(config: Namespace) -> int:
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise OSError("no CUDA device is found; --device cpu rehearses the steps without one")
    from vitarium.benchmarks import gpu_plan, gpu_suite, record

    console = Console()
    slug = record.this_machine(config.device).slug
    if config.device == "cpu":
        slug += "-rehearsal"
    root = RESULTS if RESULTS.is_dir() and config.device == "cuda" else RUNS
    folder = Path(config.output) if config.output else root / slug
    reports = gpu_suite.run_suite(
        gpu_plan.plan(config.device),
        gpu_suite.Place(config.device, folder, config.fresh),
        minutes=config.minutes,
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
