"""What is measured on a GPU in eight minutes: tests, operators, models, growth with size, pictures.

On the CPU the same plan is a rehearsal: little of everything, which shows that the steps work.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vitarium.benchmarks import plot, record, table
from vitarium.benchmarks.gpu_suite import Outcome, Place, Step
from vitarium.benchmarks.models import bench_models
from vitarium.benchmarks.operators import bench_operators
from vitarium.benchmarks.record import Record
from vitarium.benchmarks.scaling import SIDES, bench_scaling
from vitarium.ops import MIXERS

MINUTES = 8.0
OPERATORS, MODELS, SCALING = "operators.jsonl", "models.jsonl", "scaling.jsonl"
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


def plan(device: str) -> list[Step]:
    """The steps, with seconds that add up to `MINUTES`.

    Args:
        device: "cuda", or "cpu" for a rehearsal.
    """
    first, second = _SETTINGS[device].dtypes
    return [
        Step("tests that need a GPU", run_tests, 90, needs_cuda=True),
        Step(f"operators, {first}", partial(run_operators, dtype=first), 90),
        Step(f"operators, {second}", partial(run_operators, dtype=second), 60),
        Step("models, inference", partial(run_models, mode="forward"), 55),
        Step("models, training", partial(run_models, mode="training"), 55),
        Step("growth with the map", run_scaling, 40),
        Step(
            "operators, CUDA graphs",
            partial(run_operators, dtype=first, cuda_graphs=True),
            40,
            needs_cuda=True,
        ),
        Step(
            "models, compiled",
            partial(run_models, mode="forward", compile=True),
            40,
            needs_cuda=True,
        ),
        Step("pictures", draw, 10, repeated=True),
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
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not failed:
        lines = (done.stdout + done.stderr).strip().splitlines() or [""]
        failed = [f"pytest ended with {done.returncode}: {lines[-1]}"]
    return Outcome(failed)


def run_operators(
    place: Place, seconds: float, *, dtype: str, cuda_graphs: bool = False
) -> Outcome:
    """Operators forward and backward; from CUDA graphs, forward."""
    settings = _SETTINGS[place.device]
    outcome = bench_operators(
        settings.operators,
        device=place.device,
        batch_size=settings.images,
        dtypes=[dtype],
        modes=["forward"] if cuda_graphs else ["forward", "backward"],
        match=settings.match,
        seconds=settings.seconds,
        cuda_graphs=cuda_graphs,
        output=place.folder / OPERATORS,
        minutes=seconds / 60,
        progress=_say,
    )
    return Outcome(outcome.refused, outcome.remaining)


def run_models(place: Place, seconds: float, *, mode: str, compile: bool = False) -> Outcome:
    """The smallest model of every family, in `mode`."""
    settings = _SETTINGS[place.device]
    dtype, output = settings.dtypes[0], place.folder / MODELS
    kind = "compiled" if compile else "eager"
    batch_size = settings.batch_size[mode]
    done = {
        r.name
        for r in _held(output, place)
        if (r.mode, r.dtype, r.implementation) == (mode, dtype, kind)
        and r.shapes["input"][0] == batch_size
    }

    def measure(name: str) -> None:
        bench_models(
            [name],
            modes=[mode],
            batch_size=batch_size,
            image_size=settings.image_size,
            dtype=dtype,
            device=place.device,
            compile=compile,
            min_rounds=5,
            seconds=settings.seconds,
            output=output,
        )

    smallest = [names[0] for names in table.families().values()][: settings.models]
    return _each([name for name in smallest if name not in done], measure, seconds)


def run_scaling(place: Place, seconds: float) -> Outcome:
    """Mixers that claim to be linear, on maps of several sizes."""
    settings = _SETTINGS[place.device]
    dtype, output = settings.dtypes[0], place.folder / SCALING
    done = {r.name for r in _held(output, place) if (r.mode, r.dtype) == ("forward", dtype)}

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
    return _each([name for name in linear if name not in done], measure, seconds)


def draw(place: Place, seconds: float) -> Outcome:
    """Operators over their floor, a picture each, and models by accuracy and latency."""
    operators = [
        r for r in _held(place.folder / OPERATORS, place) if "cuda_graphs" not in r.arguments
    ]
    names = dict.fromkeys(r.name for r in operators if r.implementation == "floor")

    def picture(name: str) -> None:
        chosen = [r for r in operators if r.name == name]
        plot.plot_operators(chosen, place.folder / f"operators-{name.replace('_', '-')}.png")

    outcome = _each(list(names), picture, seconds)
    models = [
        r
        for r in _held(place.folder / MODELS, place)
        if (r.mode, r.implementation) == ("forward", "eager")
    ]
    accuracies = plot.published_accuracies(models)
    if accuracies:
        plot.plot_models(models, accuracies, place.folder / "models.png")
    return outcome


def _each(names: Sequence[str], measure: Callable[[str], None], seconds: float) -> Outcome:
    """Call `measure` for one after another; none is begun when the time is over."""
    began, failures = time.monotonic(), []
    for number, name in enumerate(names):
        if time.monotonic() - began > seconds:
            return Outcome(failures, len(names) - number)
        _say(name)
        try:
            measure(name)
        except Exception as error:  # whatever one may do: the others are measured
            failures.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")
            _say(failures[-1])
    return Outcome(failures)


def _held(path: Path, place: Place) -> list[Record]:
    """Records of this machine, these versions and this commit."""
    if not path.exists():
        return []
    now = (record.this_machine(place.device).processor, record.versions(), record.commit())
    return [r for r in record.read(path) if (r.machine.processor, r.versions, r.commit) == now]


def _say(line: str) -> None:
    print(line, flush=True)
