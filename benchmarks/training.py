"""A training step of our loop beside a bare one: overhead, and memory with checkpointing.

Both train the same model on the same batch, which is in memory as it was read, in uint8: the bare
loop normalises it and does forward, loss, backward and step, ours all that a run does between two
batches (also seeding, a look at the loss, schedule). They take turns in one process.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F

from vitarium.benchmarks import memory, record, timer
from vitarium.benchmarks.record import Record
from vitarium.train.config import AugmentConfig, CheckpointConfig, ScheduleConfig, TrainConfig
from vitarium.train.loop import _Run
from vitarium.train.setup import create_optimizer


def bench_training(
    name: str = "dinat_nano",
    *,
    batch_size: int = 64,
    image_size: int = 32,
    device: str | None = None,
    threads: int | None = 1,
    min_rounds: int = 10,
    seconds: float = 20.0,
    memory_only: bool = False,
    output: str | os.PathLike[str] | None = None,
) -> list[Record]:
    """Measure a step of ours and of a bare loop, or the memory of ours with checkpointing.

    Args:
        name: a model of timm's registry.
        batch_size: images per step.
        image_size: side of the images.
        device: "cpu", or None for an accelerator if there is one.
        threads: of torch on the CPU.
        min_rounds: samples of each at least.
        seconds: wall time for both.
        memory_only: instead of time, the peak growth of memory in a step of ours, as it is and
            with activation checkpointing.
        output: JSON Lines file that the records are appended to.

    Returns:
        Records named by `implementation`: "vitarium" and "bare"; or "eager" and "checkpointing",
        whose one sample is the step that was profiled.

    Raises:
        ValueError: an unknown model, or one that has no activation checkpointing.
    """
    config = TrainConfig(
        data="digits",
        model=name,
        image_size=image_size,
        epochs=100_000,
        batch_size=batch_size,
        schedule=ScheduleConfig(warmup_epochs=0),
        augment=AugmentConfig(label_smoothing=0.0),
        checkpoint=CheckpointConfig(),
        device="cpu" if device == "cpu" else "auto",
        workers=0,
        threads=threads,
    )
    with timer.torch_threads(threads), torch.random.fork_rng():
        run = _Run(config)
        place = run.accelerator.device
        images, targets, *_ = next(iter(run.loader))
        images, targets = images.to(place), targets.to(place)
        run.model.train()
        if memory_only:
            found = _peaks(run, images, targets)
        else:
            bare = _Run(config)
            optimizer = create_optimizer(bare.network, config)
            bare.network.train()

            def bare_step() -> None:
                inputs = bare.inputs.normalize(
                    images
                )  # images are in memory as they are read, uint8
                F.cross_entropy(bare.network(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()

            samples = timer.interleave(
                {
                    "vitarium": lambda: run._train_step(images, targets),
                    "bare": bare_step,
                },
                device=place,
                min_rounds=min_rounds,
                max_rounds=1000,
                seconds=seconds,
            )
            found = {key: (value, None) for key, value in samples.items()}
        series = None if memory_only else record.new_series()
        records = [
            record.measured(
                samples=samples,
                clock="cuda" if "cuda" in samples else "cpu",
                machine=record.this_machine(place),
                kind="model",
                name=name,
                implementation=implementation,
                mode="training",
                dtype="float32",
                shapes={"input": list(images.shape)},
                arguments={"loop": True},
                images=batch_size,
                series=series,
                peak_memory=peak,
                params=run.parameters,
            )
            for implementation, (samples, peak) in found.items()
        ]
    if output is not None:
        record.append(output, records)
    return records


def _peaks(
    run: _Run, images: torch.Tensor, targets: torch.Tensor
) -> dict[str, tuple[timer.Samples, int]]:
    """Peak growth of memory in a step, after one that made the optimizer's state."""
    if not hasattr(run.network, "set_grad_checkpointing"):
        raise ValueError(f"model {run.config.model!r} has no activation checkpointing")
    found = {}
    for implementation, enable in (("eager", False), ("checkpointing", True)):
        run.network.set_grad_checkpointing(enable)

        def step() -> None:
            run._train_step(images, targets)

        step()
        peak = memory.peak_growth(step, images.device)
        samples = timer.interleave(
            {"step": step}, device=images.device, min_rounds=1, max_rounds=1, seconds=0
        )
        found[implementation] = (samples["step"], peak)
    return found
