"""Groups of options of a training run, each a dataclass that checks itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration that no run can be started with; the message names the key."""


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Refuse `value` of the key `name` unless `condition`."""
    if not condition:
        raise ConfigError(f"{name}={value!r} is not allowed; it must be {allowed}")


def number(name: str, value: Any, least: float = 0.0, most: float = math.inf) -> None:
    """`value` is a finite number within `[least, most]`."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    bound = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
    require(known and math.isfinite(value) and least <= value <= most, name, value, bound)


def integer(name: str, value: Any, least: int) -> None:
    """`value` is an integer of at least `least`."""
    known = isinstance(value, int) and not isinstance(value, bool)
    require(known and value >= least, name, value, f"an integer of at least {least}")


@dataclass
class OptimizerConfig:
    """The optimizer, by timm's names (`timm.optim.list_optimizers()`).

    Args:
        name: optimizer.
        lr: peak learning rate, for the whole batch over all processes.
        weight_decay: decay of weights; biases and norms have none.
        betas: coefficients of Adam-like optimizers; the optimizer's own if null.
        momentum: momentum of SGD-like optimizers.
        clip_grad: largest norm of the gradient; null does not clip.
        layer_decay: the learning rate of every block is so many times that of the next one, the
            head's is `lr` (layer-wise decay, arXiv 2106.08254); null for the same everywhere.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    momentum: float = 0.9
    clip_grad: float | None = None
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        number("optimizer.lr", self.lr)
        number("optimizer.weight_decay", self.weight_decay)
        number("optimizer.momentum", self.momentum, 0, 1)
        for beta in self.betas or ():
            number("optimizer.betas", beta, 0, 1)
        if self.clip_grad is not None:
            number("optimizer.clip_grad", self.clip_grad)
        if self.layer_decay is not None:
            number("optimizer.layer_decay", self.layer_decay, 0, 1)
            require(
                self.layer_decay > 0, "optimizer.layer_decay", self.layer_decay, "above 0, or null"
            )


@dataclass
class ScheduleConfig:
    """The learning rate over the run (`timm.scheduler`).

    Args:
        name: shape of the decay; "poly" is linear, "step" and "multistep" multiply by
            `decay_rate` every `decay_epochs` epochs, or at each of `decay_milestones`.
        warmup_epochs: epochs of linear increase at the start, part of `epochs`.
        warmup_lr: learning rate at the first step.
        warmup_prefix: the decay starts after the warm-up, not below it.
        min_lr: learning rate at the end of the decay.
        cooldown_epochs: epochs at `min_lr` that follow `epochs`.
        decay_epochs: epochs between two decays of "step".
        decay_milestones: epochs of the decays of "multistep", increasing.
        decay_rate: factor of one decay of "step" and "multistep".
        on_updates: change the learning rate after every step; otherwise after every epoch.
    """

    name: Literal["cosine", "tanh", "poly", "step", "multistep"] = "cosine"
    warmup_epochs: int = 5
    warmup_lr: float = 1e-5
    warmup_prefix: bool = False
    min_lr: float = 0.0
    cooldown_epochs: int = 0
    decay_epochs: int = 90
    decay_milestones: list[int] = field(default_factory=lambda: [90, 180, 270])
    decay_rate: float = 0.1
    on_updates: bool = True

    def __post_init__(self) -> None:
        integer("schedule.warmup_epochs", self.warmup_epochs, 0)
        integer("schedule.cooldown_epochs", self.cooldown_epochs, 0)
        integer("schedule.decay_epochs", self.decay_epochs, 1)
        number("schedule.warmup_lr", self.warmup_lr)
        number("schedule.min_lr", self.min_lr)
        number("schedule.decay_rate", self.decay_rate, 0, 1)
        epochs = self.decay_milestones
        increasing = bool(epochs) and min(epochs) > 0 and epochs == sorted(set(epochs))
        require(increasing, "schedule.decay_milestones", epochs, "increasing epochs above 0")


@dataclass
class AugmentConfig:
    """How training images are varied (`timm.data.create_transform`, `RandomErasing`, `Mixup`).

    Args:
        scale: least and largest part of the image's area that a random crop keeps.
        ratio: least and largest aspect ratio of a crop.
        rotation: largest angle in degrees by which an image is turned; what turns in is black.
        hflip: probability of a horizontal flip.
        color_jitter: strength of brightness, contrast and saturation changes.
        auto_augment: policy in timm's notation, such as "rand-m9-mstd0.5-inc1"; null for none.
        repeats: variations of an image in one batch (repeated augmentation, arXiv 1901.09335; 3 in
            DeiT); an epoch stays as long and sees so many times fewer images.
        random_erasing: probability of erasing a rectangle.
        mixup: alpha of Mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
        mixup_prob: probability that a batch is mixed at all.
        mixup_switch_prob: probability of CutMix where both are on.
        mixup_mode: one mixture for the "batch", or one per "pair" of images or per image ("elem").
        mixup_off_epoch: epochs after which nothing is mixed any more; 0 never stops.
        label_smoothing: part of the target that is spread over all classes.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    rotation: float = 0.0
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = None
    repeats: int = 1
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    mixup_off_epoch: int = 0
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        for name, most in (("scale", 1.0), ("ratio", math.inf)):
            pair = getattr(self, name)
            fits = isinstance(pair, (tuple, list)) and len(pair) == 2
            require(
                fits and 0 < pair[0] <= pair[1] <= most,
                f"augment.{name}",
                pair,
                f"two increasing numbers above 0, at most {most:g}",
            )
        probabilities = ("hflip", "random_erasing", "mixup_prob", "mixup_switch_prob")
        for name in (*probabilities, "label_smoothing"):
            number(f"augment.{name}", getattr(self, name), 0, 1)
        number("augment.rotation", self.rotation, 0, 180)
        integer("augment.repeats", self.repeats, 1)
        integer("augment.mixup_off_epoch", self.mixup_off_epoch, 0)
        for name in ("color_jitter", "mixup", "cutmix"):
            number(f"augment.{name}", getattr(self, name))


@dataclass
class ProgressiveConfig:
    """Training images that grow with the epochs (as in EfficientNetV2, arXiv 2104.00298).

    A batch is drawn at full size and reduced on the device (bilinear, antialiased), so that the
    order and the crops are those of a run without it. Evaluation always sees `image_size`.

    Args:
        start_size: height and width of the first epoch's images in pixels; null for full size.
        epochs: epochs over which the size grows linearly; it is full from then on. Half of the
            run if null.
        multiple: sizes are rounded to a multiple of it; the model's total stride is safe.
    """

    start_size: int | None = None
    epochs: int | None = None
    multiple: int = 32

    def __post_init__(self) -> None:
        integer("progressive.multiple", self.multiple, 1)
        if self.epochs is not None:
            integer("progressive.epochs", self.epochs, 1)
        if self.start_size is None:
            require(self.epochs is None, "progressive.epochs", self.epochs, "null without a size")
        else:
            integer("progressive.start_size", self.start_size, self.multiple)

    def sizes(self, image_size: int, epochs: int) -> list[int]:
        """The size of every epoch's images, the last one full, for a run of `epochs`."""
        if self.start_size is None:
            return [image_size] * epochs
        growing = self.epochs or max(1, epochs // 2)
        sizes = []
        for epoch in range(epochs):
            size = self.start_size + (image_size - self.start_size) * epoch / growing
            rounded = self.multiple * round(size / self.multiple)
            sizes.append(image_size if epoch >= growing else min(rounded, image_size))
        return sizes


@dataclass
class DistillationConfig:
    """A teacher, and how a student learns from it, beside the labels.

    Args:
        teacher: name of a model in timm's registry, with the tag of its weights if it has several;
            or a folder of a run, or a file that a run wrote.
        checkpoint: weights of a teacher given by name; those that timm downloads if null.
        image_size: height and width of the teacher's images in pixels; its own if null.
        kind: "soft" learns the teacher's probabilities (Hinton et al., arXiv 1503.02531), "hard"
            its most probable class (DeiT, arXiv 2012.12877, section 4).
        temperature: by which logits of both are divided for "soft".
        weight: part of the loss that comes from the teacher; the rest comes from the labels.
    """

    teacher: str | None = None
    checkpoint: str | None = None
    image_size: int | None = None
    kind: Literal["soft", "hard"] = "soft"
    temperature: float = 1.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        number("distillation.weight", self.weight, 0, 1)
        number("distillation.temperature", self.temperature)
        allowed = "above 0"
        require(self.temperature > 0, "distillation.temperature", self.temperature, allowed)
        if self.image_size is not None:
            integer("distillation.image_size", self.image_size, 1)
        if self.teacher is None:
            checkpoint = self.checkpoint
            require(checkpoint is None, "distillation.checkpoint", checkpoint, "null (no teacher)")


@dataclass
class DropPosConfig:
    """Position reconstruction (arXiv 2309.03576), for the task "droppos".

    Args:
        mask_ratio: part of the patches that is not seen.
        position_mask_ratio: part of the seen ones whose positions are dropped and asked for.
        decoder_depth: blocks of the decoder.
        decoder_dim: its width; the model's own if null.
        decoder_num_heads: its heads; the model's own if null.
        sigma: width of position smoothing at the start, in patches; it falls linearly to 0.
        temperature: of attentive reconstruction; null weighs all patches alike.
    """

    mask_ratio: float = 0.75
    position_mask_ratio: float = 0.75
    decoder_depth: int = 2
    decoder_dim: int | None = None
    decoder_num_heads: int | None = None
    sigma: float = 1.0
    temperature: float | None = 0.1

    def __post_init__(self) -> None:
        number("droppos.mask_ratio", self.mask_ratio, 0, 0.99)
        number("droppos.position_mask_ratio", self.position_mask_ratio, 0.01, 1)
        integer("droppos.decoder_depth", self.decoder_depth, 0)
        for name in ("decoder_dim", "decoder_num_heads"):
            if getattr(self, name) is not None:
                integer(f"droppos.{name}", getattr(self, name), 1)
        number("droppos.sigma", self.sigma)
        if self.temperature is not None:
            number("droppos.temperature", self.temperature, 1e-3)
