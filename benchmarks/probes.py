"""What mixers see: each trained on the drawn tasks of `vitarium.train.probes`, in one block.

The runs are those of the testbed (`vitarium.benchmarks.testbed`), with another recipe and with the
task in place of the data. What is recorded is not trained again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scipy.stats import binomtest

from vitarium.benchmarks import testbed
from vitarium.benchmarks.arguments import known
from vitarium.benchmarks.record import Record
from vitarium.benchmarks.testbed_views import CONFIDENCE, Row
from vitarium.train.config import TrainConfig, find_recipe
from vitarium.train.probes import HELD_OUT, PROBES

RECIPE = "probe"


@dataclass(frozen=True)
class Seen:
    """What a mixer answers.

    Attributes:
        mixer: its name.
        probes: by task, the accuracies and failures of the runs, by seed.
    """

    mixer: str
    probes: Mapping[str, Row]


def bench_probes(
    names: Sequence[str] = (),
    *,
    probes: Sequence[str] = (),
    seeds: int = 3,
    jobs: int = 1,
    recipe: TrainConfig | None = None,
    output: str | os.PathLike[str],
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[list[Seen], list[Record]]:
    """Train every mixer on every task with every seed, and draw the result.

    Args:
        names: mixers; all, if empty.
        probes: tasks; all, if empty.
        seeds: how many, from 0; everything is trained with one before anything is with the next.
        jobs: processes of one thread each that train at a time.
        recipe: what is trained, but for task, mixer and seed; the packaged one if None.
        output: folder of `probes.jsonl`, `probes.md` and `probes.png`.
        progress: called with a line about each step.

    Returns:
        What is known of the mixers, in the order of the table, and all records of the folder.

    Raises:
        ValueError: an argument is unknown or out of range.
    """
    from vitarium.benchmarks import probes_views

    names = testbed.mixers_named(names)
    known("probe", probes, PROBES)
    testbed.at_least_one(seeds=seeds, jobs=jobs)
    recipe = recipe or TrainConfig.from_yaml(*find_recipe(RECIPE))
    tasks = {probe: replace(recipe, data=f"probe:{probe}") for probe in probes or PROBES}
    runs = [
        testbed.run_of(name, seed, task)
        for seed in range(seeds)
        for task in tasks.values()
        for name in names
    ]
    records = testbed.train_due(runs, Path(output) / "probes.jsonl", jobs, progress)
    by_task = {
        probe: {row.mixer: row for row in testbed.rows(records, names, task)}
        for probe, task in tasks.items()
    }
    seen = [Seen(name, {probe: rows[name] for probe, rows in by_task.items()}) for name in names]
    seen = probes_views.ordered(seen)
    probes_views.write(seen, records, Path(output))
    return seen, records


def interval(accuracy: float, images: int = HELD_OUT) -> tuple[float, float]:
    """Wilson's confidence interval of a share of held-out images."""
    found = binomtest(round(accuracy * images), images).proportion_ci(CONFIDENCE, "wilson")
    return float(found.low), float(found.high)
