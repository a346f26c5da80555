"""What the loop works with, made from a configuration: loaders, optimizer, schedule, loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup, resolve_data_config
from timm.optim import create_optimizer_v2, list_optimizers
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


def create_batch_preparation(
    config: TrainConfig, classes: int, inputs: InputConfig, device: torch.device
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """From a batch as loaded to the model's input and target: normalised, erased, mixed."""
    augment = config.augment
    erase = random_erasing(augment, device) if augment.random_erasing else None
    mix = None
    if augment.mixup or augment.cutmix:
        mix = Mixup(
            augment.mixup,
            augment.cutmix,
            label_smoothing=augment.label_smoothing,
            num_classes=classes,
        )

    def prepare(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        images = inputs.normalize(images)
        if erase is not None:
            images = erase(images)
        return mix(images, targets) if mix is not None else (images, targets)

    return prepare


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
        **betas,
    )


def create_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int
) -> Scheduler:
    """The learning rate as a function of the step: `step_update(step)` sets it, no state needed."""
    schedule = config.schedule
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=schedule.name,
        num_epochs=config.epochs,
        warmup_epochs=schedule.warmup_epochs,
        warmup_lr=schedule.warmup_lr,
        min_lr=schedule.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    assert scheduler is not None  # only timm's name "none", which is not allowed here, gives None
    return scheduler


def create_loss(config: TrainConfig) -> nn.Module:
    """Cross-entropy for the targets that `create_batch_preparation` makes."""
    mixes = config.augment.mixup > 0 or config.augment.cutmix > 0  # Mixup smooths by itself
    return nn.CrossEntropyLoss(label_smoothing=0.0 if mixes else config.augment.label_smoothing)
