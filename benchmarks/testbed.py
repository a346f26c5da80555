"""All mixers in one macro design: trained with one recipe and several seeds, then measured.

Accuracy is that of the last epoch on held-out images, of the same images, order, variation and
initial weights outside of the mixers for every mixer of a seed. Latency and memory are measured
in one process, in turns, after training. Everything is a record; what is recorded is not done
again, so that the same command goes on where it ended.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from torch import Tensor, nn

import vitarium.zoo  # noqa: F401  (registers our models with timm)
from vitarium.benchmarks import flops, memory, mixers, record, testbed_views, timer
from vitarium.benchmarks.arguments import known
from vitarium.benchmarks.record import Record
from vitarium.benchmarks.testbed_views import Row
from vitarium.ops import MIXERS
from vitarium.train import Interrupted, train
from vitarium.train.config import TrainConfig, find_recipe

RECIPE = "testbed"
TRAINED, MODES = "trained", ("forward", "training")  # implementation of a run; modes of measures


class Run(NamedTuple):
    """One training to be done.

    Attributes:
        mixer: name in `MIXERS`.
        module: where that is defined: a new process must import it.
        config: what is trained, the seed among it.
    """

    mixer: str
    module: str
    config: TrainConfig


def bench_testbed(
    names: Sequence[str] = (),
    *,
    seeds: int = 3,
    jobs: int = 1,
    recipe: TrainConfig | None = None,
    seconds: float = 2.0,
    output: str | os.PathLike[str],
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Train every mixer with every seed, measure them, and draw the result.

    Args:
        names: mixers; all, if empty.
        seeds: how many, from 0; all mixers are trained with one before any is with the next.
        jobs: processes of one thread each that train at a time.
        recipe: what is trained, but for mixer and seed; the packaged one if None.
        seconds: time given to the measure of each mixer.
        output: folder of `testbed.jsonl`, `testbed.md` and `testbed.png`.
        progress: called with a line about each step.

    Returns:
        What is known of the mixers, the best first; also of those that failed.

    Raises:
        ValueError: an argument is unknown or out of range.
    """
    names = mixers_named(names)
    at_least_one(seeds=seeds, jobs=jobs)
    recipe = recipe or TrainConfig.from_yaml(*find_recipe(RECIPE))
    if recipe.image_size is None:
        raise ValueError("recipe.image_size=None must be a size: mixers are measured with it")
    file = Path(output) / "testbed.jsonl"
    runs = [run_of(name, seed, recipe) for seed in range(seeds) for name in names]
    records = train_due(runs, file, jobs, progress)
    trained = [row for row in rows(records, names, recipe) if row.accuracies]
    if not all(row.forward and row.training for row in trained):
        record.append(file, _measured(names, recipe, seconds, progress))
        records = record.read(file)
    found = rows(records, names, recipe)
    testbed_views.write(found, Path(output))
    return found


# --- training -------------------------------------------------------------------------------------


def mixers_named(names: Sequence[str]) -> list[str]:
    """Each of them once; all, if there are none.

    Raises:
        ValueError: one is unknown.
    """
    known("mixer", names, MIXERS)
    return list(dict.fromkeys(names)) or sorted(MIXERS)


def at_least_one(**numbers: int) -> None:
    """Refuse an argument below 1.

    Raises:
        ValueError: with its name.
    """
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def train_due(
    runs: Sequence[Run], file: Path, jobs: int, progress: Callable[[str], None]
) -> list[Record]:
    """All records of a file, when those runs are in it; only what it lacks is trained.

    Args:
        runs: what is wanted, in this order.
        file: JSON Lines file that records are appended to.
        jobs: processes of one thread each that train at a time.
        progress: called with a line about each step.
    """
    before = record.read(file) if file.exists() else []
    done = {_identity(r) for r in before if r.implementation == TRAINED and r.accuracy is not None}
    due = [run for run in runs if _run_identity(run) not in done]
    if len(due) < len(runs):
        progress(f"{len(runs) - len(due)} of {len(runs)} runs recorded before")
    for number, found in enumerate(_train_all(due, jobs), 1):
        record.append(file, [found])
        progress(f"{number}/{len(due)} {_outcome(found)}")
    return record.read(file) if file.exists() else []


def run_of(mixer: str, seed: int, recipe: TrainConfig) -> Run:
    kwargs = {**recipe.model_kwargs, "mixers": mixer}
    return Run(mixer, MIXERS[mixer].__module__, replace(recipe, model_kwargs=kwargs, seed=seed))


def _arguments(recipe: TrainConfig) -> dict[str, Any]:
    """What tells recipes apart, but for mixer and seed."""
    values = yaml.safe_load(recipe.to_yaml())
    values["model_kwargs"].pop("mixers", None)
    return {key: value for key, value in values.items() if key not in ("seed", "workers")}


def _completed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of a record; what recipes have come to say since then, by its default."""
    return {**_defaults(), **arguments}


@functools.cache
def _defaults() -> dict[str, Any]:
    return _arguments(TrainConfig())


def _run_identity(run: Run) -> tuple[Any, ...]:
    return (run.mixer, run.config.seed, json.dumps(_arguments(run.config), sort_keys=True))


def _identity(r: Record) -> tuple[Any, ...]:
    return (r.name, r.seed, json.dumps(_completed(r.arguments), sort_keys=True))


def _outcome(r: Record) -> str:
    result = f"failed: {r.failure}" if r.accuracy is None else f"{r.accuracy:.2%}"
    return f"{r.name} seed {r.seed}: {result}, {r.median:.1f} s of CPU"


def _train_all(runs: Sequence[Run], jobs: int) -> Iterator[Record]:
    """The records of runs as they end, `jobs` at a time, each process with one thread.

    A process that dies fails the runs that were under way; the others go on in new ones.
    """
    waiting = list(runs)
    while waiting:
        pool = ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
        )
        under_way: dict[Future[Record], Run] = {}
        try:
            while waiting or under_way:
                while waiting and len(under_way) < jobs:
                    under_way[pool.submit(train_one, waiting[0])] = waiting[0]
                    waiting.pop(0)
                ended, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield future.result()
                    del under_way[future]
        except BrokenProcessPool:
            for run in under_way.values():
                yield _trained(run, time.time(), time.process_time(), failure="the process died")
        finally:
            pool.shutdown(cancel_futures=True)


def train_one(run: Run) -> Record:
    """Train in this process; a run that fails is a record, too."""
    wall, cpu = time.time(), time.process_time()
    accuracy = failure = None
    try:
        importlib.import_module(run.module)
        with tempfile.TemporaryDirectory() as folder:
            accuracy = train(run.config, output=folder).last["accuracy"]
    except Interrupted:
        raise
    except Exception as error:  # whatever a mixer does must not end the comparison
        failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return _trained(run, wall, cpu, accuracy=accuracy, failure=failure)


def _trained(run: Run, wall: float, cpu: float, **result: Any) -> Record:
    """The record of a run that began at these times."""
    samples = {"wall": [time.time() - wall], "cpu": [time.process_time() - cpu]}
    size = run.config.image_size or 0
    return record.measured(
        samples=samples,
        clock="cpu",
        machine=record.this_machine("cpu"),
        kind="run",
        name=run.mixer,
        implementation=TRAINED,
        mode="training",
        dtype="float32",
        shapes={"input": [run.config.batch_size, 3, size, size]},
        arguments=_arguments(run.config),
        seed=run.config.seed,
        **result,
    )


# --- measures -------------------------------------------------------------------------------------


def _measured(
    names: Sequence[str], recipe: TrainConfig, seconds: float, progress: Callable[[str], None]
) -> list[Record]:
    """Forward and training step of every mixer's testbed on one thread, in turns."""
    shape = (recipe.batch_size, 3, recipe.image_size, recipe.image_size)
    found = []
    with timer.torch_threads(1), torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(shape)
        models: dict[str, nn.Module] = {}
        for name in names:
            try:
                model = _build(name, recipe)
                for mode in MODES:
                    _call(model, x, mode)()
            except Exception as error:  # as in training: the others are measured all the same
                progress(f"{name} is not measured: {type(error).__name__}: {error}")
            else:
                models[name] = model
        for mode in MODES if models else ():
            calls = {name: _call(model, x, mode) for name, model in models.items()}
            progress(f"measuring {mode} of {len(calls)} mixers")
            taken = timer.interleave(
                calls, min_rounds=7, max_rounds=50, seconds=seconds * len(calls)
            )
            for name, model in models.items():
                counts = flops.count(model, recipe.image_size)
                found.append(
                    record.measured(
                        samples=taken[name],
                        clock="cpu",
                        machine=record.this_machine("cpu"),
                        images=recipe.batch_size,
                        kind="model",
                        name=name,
                        implementation="eager",
                        mode=mode,
                        dtype="float32",
                        shapes={"input": list(shape)},
                        arguments=_arguments(recipe),
                        params=counts.params,
                        macs=counts.macs,
                        peak_memory=memory.state_size(model) + memory.peak_growth(calls[name]),
                    )
                )
    return found


def _build(name: str, recipe: TrainConfig) -> nn.Module:
    kwargs = {**recipe.model_kwargs, "mixers": name}
    return timm.create_model(recipe.model, num_classes=10, **kwargs)


def _call(model: nn.Module, x: Tensor, mode: str) -> Callable[[], object]:
    """A forward in inference mode, or a forward and backward; sets the model to the mode."""
    model.train(mode == "training")
    if mode == "forward":
        return mixers.call(model, x, mode)
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(model(x).square().mean(), parameters, allow_unused=True)


# --- views ----------------------------------------------------------------------------------------


def rows(records: Sequence[Record], names: Sequence[str], recipe: TrainConfig) -> list[Row]:
    """What records of this recipe say of mixers, the best first; the last record of a thing counts.

    Args:
        records: of `bench_testbed`.
        names: mixers.
        recipe: what was trained.
    """
    return _rows(records, names, _arguments(recipe))


def rows_by_recipe(records: Sequence[Record]) -> list[list[Row]]:
    """Rows as `rows` makes them, of each recipe that there are records of."""
    names: dict[str, list[str]] = {}
    for r in records:
        recipe = json.dumps(_completed(r.arguments), sort_keys=True)
        names.setdefault(recipe, []).append(r.name)
    return [_rows(records, found, json.loads(recipe)) for recipe, found in names.items()]


def is_of_testbed(r: Record) -> bool:
    """Whether a record is a training of the testbed, or a measure of a model that it trains."""
    return "model_kwargs" in r.arguments


def _rows(records: Sequence[Record], names: Sequence[str], wanted: Mapping[str, Any]) -> list[Row]:
    found = {name: Row(name, {}, {}) for name in names}
    for r in records:
        if r.name not in found or _completed(r.arguments) != wanted:
            continue
        row = found[r.name]
        if r.implementation != TRAINED:
            found[r.name] = replace(row, **{r.mode: r})
        elif r.accuracy is not None:
            row.accuracies[r.seed] = r.accuracy
            row.failures.pop(r.seed, None)
        else:
            row.failures[r.seed] = r.failure or ""
    return sorted(found.values(), key=lambda row: (-(row.accuracy or 0), row.mixer))
