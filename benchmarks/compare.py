"""Is B faster than A? A ratio of times with its confidence interval, and a verdict.

What is resampled are blocks of consecutive rounds, because neighbouring samples are alike. Of one
run, whose samples were taken in turns, the ratio is the median of the rounds' ratios, so that what
slowed both does not count. Of two runs it is the ratio of their medians. These also differ by what
happened to the machine in between, of which a run says nothing; two things account for it:

- a noise between runs of `BETWEEN_RUNS`, as a factor of either median;
- the ratio is taken twice, of the times and of the times over those of a matrix product in the same
  rounds (`Record.pace`), and the interval covers both. It is wide where the machine changed its
  pace.

Both were chosen on 21 runs of 6 unchanged models, ten samples each or a few more, on two cores
that several other processes kept busy. Of 300 intervals (50 pairs of runs), 97 % had 1 in them, by
process CPU time and by wall time alike; without the pace, about 81 % and 41 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vitarium.benchmarks.record import Record, percentile

LEVEL = 0.95
RESAMPLES = 2000
# Standard deviations of the logarithm of a median that no sample of its run shows: of two
# candidates in one process (where their memory lies), of two runs whose pace is known, and of two
# others.
WITHIN_RUN, BETWEEN_RUNS, WITHOUT_PACE = 0.005, 0.02, 0.04

Verdict = Literal["faster", "slower", "no difference shown"]


@dataclass(frozen=True)
class Ratio:
    """B over A, and the ends of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """What B is, compared with A."""
        if self.high < 1:
            return "faster"
        return "slower" if self.low > 1 else "no difference shown"

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def paired_ratio(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Ratio:
    """The median ratio of samples taken in turns, the n-th of both in one round.

    Raises:
        ValueError: they are not equally many, or there are none, or one is not above 0.
    """
    first, second = _logarithms(a=a, b=b)
    if len(first) != len(second):
        raise ValueError(f"a has {len(first)} samples and b {len(second)}; rounds have one of each")
    draw = np.random.default_rng(seed)
    ratios = second - first
    draws = np.median(ratios[_blocks(len(ratios), draw)], axis=1)
    return _ratio(np.median(ratios), draws, WITHIN_RUN, draw)


def independent_ratio(
    a: Sequence[float],
    b: Sequence[float],
    *,
    a_pace: Sequence[float] = (),
    b_pace: Sequence[float] = (),
    seed: int = 0,
) -> Ratio:
    """The ratio of medians of two runs.

    Args:
        a, b: seconds, in the order taken.
        a_pace, b_pace: of the same rounds, see `Record.pace`; unknown if one is empty.
        seed: of the resampling.

    Raises:
        ValueError: there are no samples, one is not above 0, or a pace has not as many.
    """
    first, second = _logarithms(a=a, b=b)
    draw = np.random.default_rng(seed)
    if not len(a_pace) or not len(b_pace):
        return _unpaired(first, second, WITHOUT_PACE, draw)
    paces = _logarithms(a_pace=a_pace, b_pace=b_pace)
    for name, samples, pace in zip("ab", (first, second), paces):
        if len(samples) != len(pace):
            raise ValueError(f"{name}_pace has {len(pace)} rounds and {name} {len(samples)}")
    timed = _unpaired(first, second, BETWEEN_RUNS, draw)
    paced = _unpaired(first - paces[0], second - paces[1], BETWEEN_RUNS, draw)
    return Ratio(timed.value, min(timed.low, paced.low), max(timed.high, paced.high))


def _logarithms(**samples: Sequence[float]) -> list[NDArray[np.float64]]:
    found = []
    for name, values in samples.items():
        array = np.asarray(values, dtype=np.float64)
        if not array.size or not (array > 0).all():
            raise ValueError(f"{name} must be at least one number, all above 0")
        found.append(np.log(array))
    return found


def _unpaired(
    a: NDArray[np.float64], b: NDArray[np.float64], noise: float, draw: np.random.Generator
) -> Ratio:
    medians = [np.median(x[_blocks(len(x), draw)], axis=1) for x in (a, b)]
    value = np.log(np.median(np.exp(b)) / np.median(np.exp(a)))
    return _ratio(value, medians[1] - medians[0], noise, draw)


def _blocks(length: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """`(RESAMPLES, length)` indices: blocks of consecutive ones, the last followed by the first."""
    size = max(1, round(length ** (1 / 3)))
    starts = draw.integers(length, size=(RESAMPLES, math.ceil(length / size), 1))
    return ((starts + np.arange(size)) % length).reshape(RESAMPLES, -1)[:, :length]


def _ratio(
    value: np.floating, draws: NDArray[np.float64], noise: float, draw: np.random.Generator
) -> Ratio:
    """From logarithms; `noise` is added for either median."""
    noisy = draws + draw.normal(scale=noise * math.sqrt(2), size=len(draws))
    low, high = np.quantile(noisy, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Ratio(float(np.exp(value)), float(np.exp(low)), float(np.exp(high)))


# --- records -------------------------------------------------------------------------------------


def ratio(a: Record, b: Record) -> Ratio:
    """Of b over a: by rounds if they are of one series, else of two runs.

    Raises:
        ValueError: one has no samples of the clock that is compared, see `clock_of`.
    """
    clock = clock_of(a, b)
    for r in (a, b):
        if not r.samples.get(clock):
            raise ValueError(f"the record of {r.name!r} has no samples of the clock {clock!r}")
    if a.series is not None and a.series == b.series:
        return paired_ratio(a.samples[clock], b.samples[clock])
    paces = {"a_pace": a.pace.get(clock, []), "b_pace": b.pace.get(clock, [])}
    return independent_ratio(a.samples[clock], b.samples[clock], **paces)


def clock_of(a: Record, b: Record) -> str:
    """Process CPU time, which others disturb least, if both ran on one thread; else a's clock."""
    return "cpu" if all(_one_thread(r) for r in (a, b)) else a.clock


def _one_thread(r: Record) -> bool:
    return r.machine.device == "cpu" and r.machine.threads == 1 and bool(r.samples.get("cpu"))


def ratio_text(a: Record, b: Record) -> str:
    """`x1.32`, b over a, for a table; `~` where the interval has 1 in it."""
    found = ratio(a, b)
    return "~" if found.verdict == "no difference shown" else f"x{found.value:.3g}"


@dataclass(frozen=True)
class Pair:
    """Records of one setting, A's and B's, and their ratio; None if one of them failed."""

    a: Record
    b: Record
    ratio: Ratio | None


@dataclass(frozen=True)
class Comparison:
    """What two files have in common, and names of what only one of them has."""

    pairs: list[Pair]
    only_a: list[str]
    only_b: list[str]


def compare(a: Iterable[Record], b: Iterable[Record]) -> Comparison:
    """Pair records of equal settings, implementations, devices and numbers of threads.

    Of several records of one thing the last counts. Trainings are left out.
    """
    first, second = _latest(a), _latest(b)
    return Comparison(
        [pair(r, second[key]) for key, r in first.items() if key in second],
        [f"{r.name} {r.mode}" for key, r in first.items() if key not in second],
        [f"{r.name} {r.mode}" for key, r in second.items() if key not in first],
    )


def pair(a: Record, b: Record) -> Pair:
    """Two records with their ratio."""
    return Pair(a, b, None if a.median is None or b.median is None else ratio(a, b))


def _latest(records: Iterable[Record]) -> dict[tuple[object, ...], Record]:
    return {
        (*r.setting, r.implementation, r.machine.device, r.machine.threads): r
        for r in records
        if r.kind != "run"
    }


# --- outliers ------------------------------------------------------------------------------------


def outliers(samples: Sequence[float]) -> int:
    """How many samples lie above p90 by more than three times the interquartile range.

    They are kept: medians do not mind them, and their number tells how disturbed a run was.
    """
    spread = percentile(samples, 75) - percentile(samples, 25)
    return sum(value > percentile(samples, 90) + 3 * spread for value in samples)
