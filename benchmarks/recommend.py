"""Which backbone to take: models by published accuracy, under a budget that is measured here.

Models are not all measured: a few are, from the cheapest on, and a line through the logarithms of
GFLOPs and latency says which of the others can fit. Those that can are measured, the most accurate
first, until enough are found. What is not measured is said to be predicted.
"""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import timm

from vitarium import zoo
from vitarium.benchmarks import flops, record
from vitarium.benchmarks.arguments import device_named
from vitarium.benchmarks.models import bench_models
from vitarium.benchmarks.record import Record

ANCHORS = 4  # models measured at most before any prediction, each of twice the GFLOPs or more
SLACK = 2.0  # a prediction that is over the budget by this factor is believed without a measure
_SLOPES = (0.5, 1.3)  # what the line through few points may have


@dataclass(frozen=True)
class Budget:
    """What a model may take at most; None: anything.

    Attributes:
        latency: seconds of one forward.
        memory: bytes at the peak of one forward, weights included.
        params: number of parameters.
    """

    latency: float | None = None
    memory: float | None = None
    params: float | None = None


@dataclass(frozen=True)
class Choice:
    """A model and what is known of it.

    Attributes:
        name: in timm's registry; "name.tag", if its accuracy is that of one checkpoint of several.
        top1: published ImageNet-1K accuracy, per cent.
        pixels: side of the images that it was published for.
        params, macs: parameters, and multiply-adds of one image of the wanted size.
        predicted: seconds, from the GFLOPs of what was measured; None before anything was.
        measured: the record; None if there is none.
        failure: why a measure failed.
    """

    name: str
    top1: float
    pixels: int
    params: int = 0
    macs: int = 0
    predicted: float | None = None
    measured: Record | None = None
    failure: str | None = None

    def fits(self, budget: Budget) -> bool:
        """Whether it was measured, and to be within the budget."""
        r = self.measured
        if r is None or r.peak_memory is None:
            return False
        return (
            r.median <= (budget.latency or math.inf)
            and r.peak_memory <= (budget.memory or math.inf)
            and self.params <= (budget.params or math.inf)
        )


def published_choices(accuracies: str | os.PathLike[str] | None = None) -> list[Choice]:
    """Models with a published accuracy, the best first: ours, and timm's.

    Args:
        accuracies: timm's, as `results/results-imagenet.csv` in its repository has them; of the
            checkpoints of a model the best counts. Without a file, ours only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of that form.
    """
    found = {}
    for name in zoo.list_models():
        figures = zoo.published(name)
        if figures is not None and figures.top1 is not None:
            found[name] = Choice(name, figures.top1, figures.resolution)
    if accuracies is not None:
        for choice in _timm_choices(accuracies):
            model = choice.name.partition(".")[0]
            if timm.is_model(model) and choice.top1 > getattr(found.get(model), "top1", 0):
                found[model] = choice
    return sorted(found.values(), key=lambda choice: (-choice.top1, choice.name))


def _timm_choices(path: str | os.PathLike[str]) -> Iterator[Choice]:
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                yield Choice(row["model"], float(row["top1"]), int(row["img_size"]))
            except (KeyError, TypeError, ValueError):
                raise ValueError(
                    f"{path} lacks model, top1 or img_size in a row; allowed is the form of "
                    "results/results-imagenet.csv in timm's repository"
                ) from None


def recommend(
    choices: Sequence[Choice],
    budget: Budget,
    *,
    resolution: int = 224,
    device: str | None = None,
    threads: int | None = None,
    features: bool = False,
    count: int = 5,
    seconds: float = 1.0,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Choice]:
    """Measure what can be within a budget, the most accurate first, until enough is found.

    Args:
        choices: models; see `published_choices`.
        budget: what they may take; batches are of one image, in float32.
        resolution: side of the images, pixels.
        device: "cpu" or "cuda"; CUDA if there is any, if None.
        threads: threads that torch uses on the CPU; as they are if None.
        features: only models that give a map per stage (timm's `features_only`).
        count: models within the budget that are enough.
        seconds: time given to each measure.
        progress: called with a line about each step.

    Returns:
        The choices that were counted, the most accurate first; those that can take no images of
        this size are not among them.

    Raises:
        ValueError: an argument is unknown or out of range.
    """
    for name, value in (("resolution", resolution), ("count", count)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    device_named(device)
    progress(f"counting {len(choices)} models at {resolution} x {resolution} pixels")
    counted = [found for c in choices if (found := _counted(c, resolution, budget, features))]

    def measure(choice: Choice) -> Choice:
        try:
            (r,) = bench_models(
                [choice.name], image_size=resolution, device=device, threads=threads,
                min_rounds=5, seconds=seconds,
            )  # fmt: skip
        except Exception as error:  # whatever one model does must not end the search
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            progress(f"{choice.name}: {reason}")
            return replace(choice, failure=reason)
        progress(f"{choice.name}: {1e3 * r.median:.1f} ms measured")
        return replace(choice, measured=r)

    known = {choice.name: choice for choice in counted}
    if budget.latency is not None:
        for choice in _anchors(counted, budget.latency, measure):
            known[choice.name] = choice
    enough = 0
    for choice in counted:
        choice = known[choice.name]
        if choice.measured is None and choice.failure is None:
            predicted = predict(list(known.values()), choice.macs)
            choice = replace(choice, predicted=predicted)
            if budget.latency is None or predicted is None or predicted <= SLACK * budget.latency:
                choice = measure(choice)
            known[choice.name] = choice
        enough += choice.fits(budget)
        if enough == count:
            break
    return list(known.values())


def _counted(choice: Choice, resolution: int, budget: Budget, features: bool) -> Choice | None:
    """With parameters and multiply-adds; None if the size, the features or the weights don't do."""
    try:
        counts = flops.count(flops.on_meta(choice.name, resolution), resolution)
        within = counts.params <= (budget.params or math.inf)
        within &= 4 * counts.params <= (budget.memory or math.inf)  # weights alone, in float32
        if within and features:
            timm.create_model(choice.name.partition(".")[0], features_only=True, device="meta")
    except Exception:  # timm's models refuse sizes and features with errors of many kinds
        return None
    return replace(choice, params=counts.params, macs=counts.macs) if within else None


def _anchors(
    choices: Sequence[Choice], latency: float, measure: Callable[[Choice], Choice]
) -> Iterator[Choice]:
    """Measured choices of ever more GFLOPs, from the cheapest, until one is over the latency."""
    last, done = 0.0, 0
    for choice in sorted(choices, key=lambda choice: choice.macs):
        if choice.macs < 2 * last or done == ANCHORS:
            continue
        found = measure(choice)
        yield found
        last, done = choice.macs, done + 1
        if found.measured is not None and found.measured.median > latency:
            return


def predict(choices: Sequence[Choice], macs: int) -> float | None:
    """Seconds that the measured choices make likely of a model with so many multiply-adds.

    The least-squares line through the logarithms, of a slope from 0.5 to 1.3; None if nothing is
    measured.
    """
    points = [
        (math.log(c.macs), math.log(c.measured.median)) for c in choices if c.measured and c.macs
    ]
    if not points or not macs:
        return None
    x, y = (statistics.fmean(values) for values in zip(*points))
    spread = sum((a - x) ** 2 for a, _ in points)
    slope = sum((a - x) * (b - y) for a, b in points) / spread if spread > 0 else 1.0
    slope = min(max(slope, _SLOPES[0]), _SLOPES[1])
    return math.exp(y + slope * (math.log(macs) - x))


def where(choices: Sequence[Choice]) -> str:
    """Processor, threads and clock of the measures, in words; empty if there are none."""
    records = [c.measured for c in choices if c.measured is not None]
    if not records:
        return ""
    r = records[-1]
    threads = f", {r.machine.threads} threads" if r.machine.device == "cpu" else ""
    clock = record.CLOCKS[r.clock]
    return f"{r.machine.processor}{threads}, float32, one image, median {clock}"
