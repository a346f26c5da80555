"""What the loop works with, made from a configuration: loaders, optimizer, schedule, loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import Mixup, resolve_data_config
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitarium.train.config import ConfigError, TrainConfig, nearest
from vitarium.train.data import (
    EpochBatches,
    ImageData,
    InputConfig,
    Samples,
    create_loader,
    random_erasing,
)
from vitarium.train.evaluate import held_out_loader


def input_config(network: nn.Module, config: TrainConfig) -> InputConfig:
    """The input that the configuration asks for; what it leaves open, as the model's own."""
    resolved = resolve_data_config(model=network)
    channels, *size = resolved["input_size"]
    if channels != 3:
        raise ValueError(f"model={config.model!r} takes {channels} channels; images have 3")
    if config.image_size is not None:
        size = [config.image_size, config.image_size]
    return InputConfig(
        image_size=tuple(size),  # type: ignore[arg-type]
        mean=tuple(resolved["mean"]),
        std=tuple(resolved["std"]),
        interpolation=resolved["interpolation"],
        crop_pct=resolved["crop_pct"] if config.crop_pct is None else config.crop_pct,
    )


def share_batch(config: TrainConfig, state: Mapping[str, Any], processes: int) -> TrainConfig:
    """The configuration of a saved run with its batch shared among so many processes.

    Raises:
        ConfigError: it cannot be shared equally.
    """
    total = state.get("total_batch", config.batch_size * processes)
    if total % processes:
        raise ConfigError(
            f"the run has batches of {total} images over all processes, which {processes} "
            "processes cannot share equally; resume with a number that divides it"
        )
    return dataclasses.replace(config, batch_size=total // processes)


def create_loaders(
    config: TrainConfig, data: ImageData, inputs: InputConfig, accelerator: Accelerator
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of the training images and of the held-out ones."""
    samples = Samples(data.train, inputs.transform(config.augment), data.broken)
    order = EpochBatches(
        len(samples),
        config.batch_size,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
        config.augment.repeats,
    )
    loader = create_loader(samples, config.workers, batch_sampler=order)
    batch_size, workers = config.batch_size, config.workers
    return loader, held_out_loader(data, inputs, batch_size, workers, accelerator)


def steps_per_epoch(config: TrainConfig, batches: int) -> int:
    """Steps of the optimizer in an epoch of so many batches; those that fill no step are left out.

    Raises:
        ConfigError: there is none.
    """
    if batches < config.accumulate_steps:
        raise ConfigError(
            f"accumulate_steps={config.accumulate_steps} is not allowed; an epoch has {batches} "
            f"batches of {config.batch_size} images"
        )
    return batches // config.accumulate_steps


class BatchPreparation:
    """From a batch as loaded to the model's input and target: normalised, resized, erased, mixed.

    Args:
        config: the run's.
        classes: number of classes.
        inputs: size and normalisation of the images.
        device: where the batches are.
    """

    def __init__(
        self, config: TrainConfig, classes: int, inputs: InputConfig, device: torch.device
    ) -> None:
        augment = config.augment
        self.inputs = inputs
        self.channels_last = config.channels_last
        self.off_epoch = augment.mixup_off_epoch
        self.size: int | None = None
        self.erase = random_erasing(augment, device) if augment.random_erasing else None
        self.mix = None
        if augment.mixup or augment.cutmix:
            self.mix = Mixup(
                augment.mixup,
                augment.cutmix,
                prob=augment.mixup_prob,
                switch_prob=augment.mixup_switch_prob,
                mode=augment.mixup_mode,
                label_smoothing=augment.label_smoothing,
                num_classes=classes,
            )

    def start_epoch(self, epoch: int, size: int) -> None:
        """From now on, square images of `size` pixels, mixed as the epoch (from 0) has it."""
        self.size = None if (size, size) == self.inputs.image_size else size
        if self.mix is not None:
            self.mix.mixup_enabled = self.off_epoch == 0 or epoch < self.off_epoch

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        images = self.inputs.normalize(images)
        if self.size is not None:
            size = (self.size, self.size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.erase is not None:
            images = self.erase(images)
        return self.mix(images, targets) if self.mix is not None else (images, targets)


def create_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration names.

    Raises:
        ConfigError: timm knows no optimizer of that name.
    """
    optimizer = config.optimizer
    known = [str(name) for name in list_optimizers()]
    if optimizer.name not in known:
        raise ConfigError(
            f"optimizer.name={optimizer.name!r} is unknown{nearest(optimizer.name, known)}"
        )
    betas: dict[str, Any] = {} if optimizer.betas is None else {"betas": tuple(optimizer.betas)}
    return create_optimizer_v2(
        network,
        opt=optimizer.name,
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        momentum=optimizer.momentum,
        layer_decay=optimizer.layer_decay,
        **betas,
        **_fused(network, config),
    )


def _fused(network: nn.Module, config: TrainConfig) -> dict[str, Any]:
    """PyTorch's fused step on the CPU, for whole weights and without a gradient scaler.

    It takes a fifth of the usual step's time.
    """
    fused = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
    whole = all(type(p) is nn.Parameter and p.device.type == "cpu" for p in network.parameters())
    known = get_optimizer_info(config.optimizer.name).opt_class in fused
    return {"fused": True} if known and whole and config.precision != "fp16" else {}


def create_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int
) -> Scheduler:
    """The learning rate as a function of the step, which `set_learning_rate` sets."""
    schedule = config.schedule
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=schedule.name,
        num_epochs=config.epochs,
        decay_epochs=schedule.decay_epochs,
        decay_milestones=schedule.decay_milestones,
        decay_rate=1.0 if schedule.name == "poly" else schedule.decay_rate,  # poly's: its power
        warmup_epochs=schedule.warmup_epochs,
        warmup_prefix=schedule.warmup_prefix,
        warmup_lr=schedule.warmup_lr,
        min_lr=schedule.min_lr,
        step_on_epochs=not schedule.on_updates,
        updates_per_epoch=steps_per_epoch,
    )
    assert scheduler is not None  # only timm's name "none", which is not allowed here, gives None
    return scheduler


def set_learning_rate(scheduler: Scheduler, step: int, steps_per_epoch: int) -> None:
    """Set the learning rate of the step `step` (from 0); the scheduler needs no other state."""
    scheduler.step_update(step)  # of these two, one does nothing
    scheduler.step(step // steps_per_epoch)


def create_loss(config: TrainConfig) -> nn.Module:
    """The loss for the targets that `BatchPreparation` makes."""
    mixes = config.augment.mixup > 0 or config.augment.cutmix > 0  # Mixup smooths by itself
    smoothing = 0.0 if mixes else config.augment.label_smoothing
    if config.bce_loss:
        return BinaryCrossEntropy(smoothing, target_threshold=config.bce_target_thresh)
    return nn.CrossEntropyLoss(label_smoothing=smoothing)
