"""What is measured by one command: operators, models, growth with size, pictures, a report.

On a GPU it takes eight minutes, tests included, on one thread of a CPU a quarter of an hour.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from vitarium.benchmarks import plot, record
from vitarium.benchmarks.models import bench_models
from vitarium.benchmarks.operators import bench_operators
from vitarium.benchmarks.record import Record
from vitarium.benchmarks.report_files import write_report
from vitarium.benchmarks.scaling import SIDES, bench_scaling
from vitarium.benchmarks.selection import smallest_models
from vitarium.benchmarks.steps import Outcome, Place, Step
from vitarium.ops import MIXERS, OPERATORS

MINUTES = {"cuda": 8.0, "cpu": 14.0}
RECORDS = {name: f"{name}.jsonl" for name in ("operators", "models", "scaling")}
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class _Settings:
    """How much is measured.

    Attributes:
        dtypes: of operators; of models the first.
        operators, match: names, all if empty, and what the note of their cases contains.
        images: that an operator is called with; the usual number if None.
        image_size: side of the images of models; each model's own if None.
        models: families whose smallest model is measured; all if None.
        mixers: whose growth with the size of the map is measured; all if None.
        batch_size: images of models, by mode.
        sides: of maps, for growth.
        seconds: of timing per setting.
    """

    dtypes: Sequence[str]
    batch_size: dict[str, int]
    sides: Sequence[int]
    seconds: float
    operators: Sequence[str] = ()
    match: str = ""
    images: int | None = None
    image_size: int | None = None
    models: int | None = None
    mixers: int | None = None


_SETTINGS = {
    "cuda": _Settings(("bfloat16", "float16"), {"forward": 64, "training": 32}, SIDES, 0.5),
    "cpu": _Settings(
        ("float32",), {"forward": 1, "training": 1}, (14, 28, 56), seconds=0.5, images=1
    ),
    "rehearsal": _Settings(
        ("float32", "bfloat16"),
        {"forward": 1, "training": 1},
        (7, 14),
        seconds=0.0,
        operators=("linear_attention",),
        match="elu 14x14",
        images=1,
        image_size=64,
        models=1,
        mixers=1,
    ),
}


def _settings(place: Place) -> _Settings:
    return _SETTINGS["rehearsal" if place.rehearsal else place.device]


def plan(place: Place) -> list[Step]:
    """The steps, with seconds that add up to `MINUTES` of the device."""
    return _cuda_steps(_settings(place).dtypes) if place.device == "cuda" else _cpu_steps(place)


def _cuda_steps(dtypes: Sequence[str]) -> list[Step]:
    first, second = dtypes
    return [
        Step("tests that need a GPU", run_tests, 70),
        Step(f"operators, {first}", partial(run_operators, dtype=first), 85),
        Step(f"operators, {second}", partial(run_operators, dtype=second), 60),
        Step("models, inference", partial(run_models, mode="forward"), 45),
        Step("models, training", partial(run_models, mode="training"), 45),
        Step("growth with the map", run_scaling, 35),
        Step(
            "operators, CUDA graphs",
            partial(run_operators, dtype=first, cuda_graphs=True),
            35,
        ),
        Step("models, compiled", partial(run_models, mode="forward", compile=True), 80),
        Step("pictures", draw, 10, repeated=True),
        Step("report", write_page, 15, repeated=True),
    ]


def _cpu_steps(place: Place) -> list[Step]:
    dtypes = _settings(place).dtypes
    return [
        *(
            Step(f"operators, {dtype}", partial(run_operators, dtype=dtype), 530 / len(dtypes))
            for dtype in dtypes
        ),
        Step("models, inference", partial(run_models, mode="forward"), 95),
        Step("models, training", partial(run_models, mode="training"), 175),
        Step("growth with the map", run_scaling, 15),
        Step("pictures", draw, 8, repeated=True),
        Step("report", write_page, 17, repeated=True),
    ]


def run_tests(place: Place, seconds: float) -> Outcome:
    """The tests that are marked `gpu`, in a checkout; elsewhere there are none."""
    files = [
        str(path)
        for path in sorted((_ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    if not files:
        return Outcome()
    command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-q", "-rfE"]
    lines = []
    with subprocess.Popen(
        command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            lines.append(line.strip())
            _say(lines[-1])
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if process.returncode and not failed:
        failed = [f"pytest ended with exit code {process.returncode}: {(lines or [''])[-1]}"]
    return Outcome(failed)


def run_operators(
    place: Place, seconds: float, *, dtype: str, cuda_graphs: bool = False
) -> Outcome:
    """Operators forward and backward, each in its share of the time; from CUDA graphs, forward.

    What others leave of theirs then goes to those that were not finished.
    """
    settings = _settings(place)
    unfinished, began = list(settings.operators or OPERATORS), time.monotonic()
    modes = ["forward", "backward" if place.device == "cuda" else "training"]
    failures, remaining = [], 0
    for again in (False, True):
        names, unfinished, remaining = unfinished, [], 0
        for number, name in enumerate(names):
            left = seconds - (time.monotonic() - began)
            outcome = bench_operators(
                [name],
                device=place.device,
                batch_size=settings.images,
                dtypes=[dtype],
                modes=modes[:1] if cuda_graphs else modes,
                match=settings.match,
                seconds=settings.seconds,
                cuda_graphs=cuda_graphs,
                output=place.folder / RECORDS["operators"],
                fresh=place.fresh and not again,
                minutes=max(0.0, left / (len(names) - number)) / 60,
                progress=_say,
            )
            failures += outcome.refused
            remaining += outcome.remaining
            unfinished += [name] if outcome.remaining else []
    return Outcome(failures, remaining)


def run_models(place: Place, seconds: float, *, mode: str, compile: bool = False) -> Outcome:
    """The smallest model of every family, in `mode`."""
    settings = _settings(place)
    dtype, output = settings.dtypes[0], place.folder / RECORDS["models"]
    kind = "compiled" if compile else "eager"
    batch_size = settings.batch_size[mode]
    done = {
        r.name
        for r in _recorded(output, place)
        if (r.mode, r.dtype, r.implementation) == (mode, dtype, kind)
        and r.shapes["input"][0] == batch_size
    }

    def measure(name: str) -> str | None:
        torch.compiler.reset()  # families share code, which is compiled for a few modules only
        (found,) = bench_models(
            [name],
            modes=[mode],
            batch_size=batch_size,
            image_size=settings.image_size,
            dtype=dtype,
            device=place.device,
            threads=1 if place.device == "cpu" else None,
            compile=compile,
            min_rounds=5,
            seconds=settings.seconds,
            output=output,
        )
        return found.failure

    smallest = smallest_models()[: settings.models]
    return _each(_without(smallest, done, place), measure, seconds)


def run_scaling(place: Place, seconds: float) -> Outcome:
    """Mixers that claim to be linear, on maps of several sizes."""
    settings = _settings(place)
    dtype, output = settings.dtypes[0], place.folder / RECORDS["scaling"]
    done = {r.name for r in _recorded(output, place) if (r.mode, r.dtype) == ("forward", dtype)}

    def measure(name: str) -> None:
        bench_scaling(
            [name],
            device=place.device,
            dtypes=[dtype],
            sides=settings.sides,
            seconds=settings.seconds,
            output=output,
        )

    linear = [name for name, mixer in MIXERS.items() if mixer.linear][: settings.mixers]
    return _each(_without(linear, done, place), measure, seconds)


def draw(place: Place, seconds: float) -> Outcome:
    """Operators over their floor, a picture each, and models by accuracy and latency."""
    operators = [
        r
        for r in _recorded(place.folder / RECORDS["operators"], place)
        if "cuda_graphs" not in r.arguments
    ]
    names = dict.fromkeys(r.name for r in operators if r.implementation == "floor")

    def picture(name: str) -> None:
        chosen = [r for r in operators if r.name == name]
        plot.plot_operators(chosen, place.folder / f"operators-{name.replace('_', '-')}.png")

    outcome = _each(list(names), picture, seconds)
    models = [
        r
        for r in _recorded(place.folder / RECORDS["models"], place)
        if (r.mode, r.implementation) == ("forward", "eager")
    ]
    accuracies = plot.published_accuracies(models)
    if accuracies:
        plot.plot_models(models, accuracies, place.folder / "models.png")
    return outcome


def write_page(place: Place, seconds: float) -> Outcome:
    """All records of the folder as one page, with an atlas, and the kernel sheet if it is there."""
    records = [path for name in RECORDS.values() if (path := place.folder / name).exists()]
    kernels = _ROOT / "benchmarks" / "results" / "kernels.json"
    write_report(
        records,
        place.folder / "report.html",
        kernels=kernels if kernels.exists() else None,
        atlas=not place.rehearsal,
    )
    return Outcome()


def _without(names: Sequence[str], done: set[str], place: Place) -> list[str]:
    return [name for name in names if place.fresh or name not in done]


def _each(names: Sequence[str], measure: Callable[[str], str | None], seconds: float) -> Outcome:
    """Call `measure` for one after another, which raises or returns what went wrong.

    None is begun when the time is over.
    """
    began, failures = time.monotonic(), []
    for number, name in enumerate(names):
        if time.monotonic() - began > seconds:
            return Outcome(failures, len(names) - number)
        _say(name)
        try:
            failure = measure(name)
        except Exception as error:  # whatever one may do: the others are measured
            failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if failure is not None:
            failures.append(f"{name}: {failure}")
            _say(failures[-1])
    return Outcome(failures)


def _recorded(path: Path, place: Place) -> list[Record]:
    """What was measured on this machine, with these versions, by this commit."""
    if not path.exists():
        return []
    now = (record.this_machine(place.device).processor, record.versions(), record.commit())
    return [
        r
        for r in record.read(path)
        if (r.machine.processor, r.versions, r.commit) == now and r.failure is None
    ]


def _say(line: str) -> None:
    print(line, flush=True)
