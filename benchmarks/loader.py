"""Images per second of the data loading that training uses, by number of worker processes.

Reading, decoding, varying as the recipe says, and collating into batches of uint8; no model.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from vitarium.benchmarks import flops, record
from vitarium.benchmarks.record import Record
from vitarium.train.config import TrainConfig, find_recipe
from vitarium.train.data import (
    EpochBatches,
    ImageData,
    InputConfig,
    Samples,
    available_cores,
    batches,
    create_loader,
    ending_workers,
    load_data,
)
from vitarium.train.setup import input_config


def bench_loader(
    source: str = "digits",
    *,
    recipe: str | None = None,
    workers: Sequence[int] = (),
    batch_size: int | None = None,
    image_size: int | None = None,
    min_samples: int = 5,
    seconds: float = 5.0,
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Record]:
    """Measure the training images of a source.

    With several workers, batches come in bunches of as many: a sample is a bunch, divided by its
    batches. Workers are started, and have filled their queues, before the clock is.

    Args:
        source: as `TrainConfig.data`.
        recipe: name or file of a recipe, for batch size, image size and augmentation; defaults of
            `TrainConfig` if None.
        workers: numbers of processes; 0 reads in this one. 0, 1, 2, 4... and one per core if empty.
        batch_size: images; the recipe's if None.
        image_size: side in pixels; the recipe's, or that of its model, if None.
        min_samples: samples at least for each number of workers.
        seconds: wall time for each.
        output: JSON Lines file that records are appended to.
        progress: called with a line about each number.

    Raises:
        ValueError: an unknown source or recipe, or an impossible number, such as more workers than
            cores.
    """
    cores = available_cores()
    chosen = sorted(set(workers)) or _up_to(cores)
    if chosen[0] < 0 or chosen[-1] > cores:
        raise ValueError(f"workers={tuple(chosen)} must be from 0 to {cores}, one per core")
    config = TrainConfig() if recipe is None else TrainConfig.from_yaml(*find_recipe(recipe))
    given = {"batch_size": batch_size, "image_size": image_size}
    config = replace(config, **{name: value for name, value in given.items() if value is not None})
    data = load_data(source, config.source)
    inputs = input_config(flops.on_meta(config.model), config)
    found = []
    for count in chosen:
        progress(f"{count} worker{'' if count == 1 else 's'}")
        samples = _samples(config, data, inputs, count, min_samples, seconds)
        found.append(
            record.measured(
                samples={"wall": samples},
                clock="wall",
                machine=record.this_machine("cpu"),
                images=config.batch_size,
                kind="loader",
                name=source,
                implementation="vitarium",
                mode="loading",
                dtype="uint8",
                shapes={"images": [config.batch_size, 3, *inputs.image_size]},
                arguments={"workers": count, "recipe": recipe},
            )
        )
    if output is not None:
        record.append(output, found)
    return found


def _up_to(cores: int) -> list[int]:
    powers = itertools.takewhile(lambda count: count < cores, (2**n for n in itertools.count()))
    return [0, *powers, cores]


def _samples(
    config: TrainConfig,
    data: ImageData,
    inputs: InputConfig,
    workers: int,
    min_samples: int,
    seconds: float,
) -> list[float]:
    """Seconds per batch."""
    stream = _endless(config, data, inputs, workers)
    bunch = max(1, workers)
    for _ in range(3 * bunch):  # a worker prepares two batches ahead
        next(stream)
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < min_samples or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(bunch):
            next(stream)
        found.append((time.perf_counter() - start) / bunch)
    return found


def _endless(
    config: TrainConfig, data: ImageData, inputs: InputConfig, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch after another."""
    samples = Samples(data.train, inputs.transform(config.augment), data.broken)
    order = EpochBatches(
        len(samples), config.batch_size, config.seed, repeats=config.augment.repeats
    )
    loader = create_loader(samples, workers, batch_sampler=order)
    with ending_workers(loader):
        for order.epoch in itertools.count():
            yield from batches(loader, torch.device("cpu"))


def loader_table(records: Sequence[Record]) -> Table:
    """A row per number of workers."""
    first = records[0]
    shape = "x".join(map(str, first.shapes["images"]))
    table = Table(
        title=f"{first.name}, recipe {first.arguments['recipe']}: batches of {shape}",
        caption=f"{first.machine.processor}, {first.machine.cores} cores, {first.date[:10]}; "
        "of batches: median, p10-p90",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for heading in ("workers", "images/s", "per batch, ms", "p10-p90, ms"):
        table.add_column(heading, justify="right")
    for r in records:
        assert r.median and r.p10 and r.p90
        spread = f"{1e3 * r.p10:.3g}-{1e3 * r.p90:.3g}"
        images = f"{r.throughput:,.0f}"
        table.add_row(str(r.arguments["workers"]), images, f"{1e3 * r.median:.3g}", spread)
    return table
