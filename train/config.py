"""What a training run is told: dataclasses, their checks, and recipes found by name.

Defaults follow timm's `train.py` where it has the same setting. Every field can be set in a YAML
recipe and on the command line (`--epochs 20`, `--optimizer.lr 5e-4`).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import math
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser


class ConfigError(ValueError):
    """A configuration that no run can be started with; the message names the key."""


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value!r} is not allowed; it must be {allowed}")


def _number(name: str, value: Any, least: float = 0.0, most: float = math.inf) -> None:
    """`value` is a finite number within `[least, most]`."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    bound = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
    _require(known and math.isfinite(value) and least <= value <= most, name, value, bound)


def _integer(name: str, value: Any, least: int) -> None:
    known = isinstance(value, int) and not isinstance(value, bool)
    _require(known and value >= least, name, value, f"an integer of at least {least}")


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
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    momentum: float = 0.9
    clip_grad: float | None = None

    def __post_init__(self) -> None:
        _number("optimizer.lr", self.lr)
        _number("optimizer.weight_decay", self.weight_decay)
        _number("optimizer.momentum", self.momentum, 0, 1)
        for beta in self.betas or ():
            _number("optimizer.betas", beta, 0, 1)
        if self.clip_grad is not None:
            _number("optimizer.clip_grad", self.clip_grad)


@dataclass
class ScheduleConfig:
    """The learning rate over the run, updated after every step (`timm.scheduler`).

    Args:
        name: shape of the decay; "poly" is linear.
        warmup_epochs: epochs of linear increase at the start, part of `epochs`.
        warmup_lr: learning rate at the first step.
        min_lr: learning rate at the end of the decay.
        cooldown_epochs: epochs at `min_lr` that follow `epochs`.
    """

    name: Literal["cosine", "tanh", "poly"] = "cosine"
    warmup_epochs: int = 5
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    cooldown_epochs: int = 0

    def __post_init__(self) -> None:
        _integer("schedule.warmup_epochs", self.warmup_epochs, 0)
        _integer("schedule.cooldown_epochs", self.cooldown_epochs, 0)
        _number("schedule.warmup_lr", self.warmup_lr)
        _number("schedule.min_lr", self.min_lr)


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
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        for name, most in (("scale", 1.0), ("ratio", math.inf)):
            pair = getattr(self, name)
            fits = isinstance(pair, (tuple, list)) and len(pair) == 2
            _require(
                fits and 0 < pair[0] <= pair[1] <= most,
                f"augment.{name}",
                pair,
                f"two increasing numbers above 0, at most {most:g}",
            )
        for name in ("hflip", "random_erasing", "label_smoothing"):
            _number(f"augment.{name}", getattr(self, name), 0, 1)
        _number("augment.rotation", self.rotation, 0, 180)
        _integer("augment.repeats", self.repeats, 1)
        for name in ("color_jitter", "mixup", "cutmix"):
            _number(f"augment.{name}", getattr(self, name))


@dataclass
class SourceConfig:
    """How images and labels are found in `data`, by timm's names where it has the same option.

    Args:
        train_split: name of the split that is trained on; "train" or "training" if null.
        val_split: name of the split that is held out; the first of "val", "valid", "validation",
            "eval", "evaluation" and "test" that there is if null.
        val_data: another source, written as `data` is, to take the held-out images from.
        class_map: file that says which classes there are, in which order: `.txt` with a name per
            line, or timm's `.pkl`; classes that it does not name are left out.
        input_key: column of the images in a Hugging Face data set; the only one of images if null.
        target_key: column of the labels in a Hugging Face data set, or field of the `.json` of a
            WebDataset; the only one of class labels, or "label", or `.cls` if null.
        download: whether torchvision may download what is missing.
        max_broken: images that may be unreadable before a run stops: below 1 a fraction of all
            training and held-out images together (but at least one image), from 1 a number.
    """

    train_split: str | None = None
    val_split: str | None = None
    val_data: str | None = None
    class_map: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    download: bool = False
    max_broken: float = 0.01

    def __post_init__(self) -> None:
        names = ("train_split", "val_split", "val_data", "class_map", "input_key", "target_key")
        for name in names:
            _require(getattr(self, name) != "", f"source.{name}", "", "a name, or null")
        _number("source.max_broken", self.max_broken)
        _require(
            self.max_broken < 1 or self.max_broken == int(self.max_broken),
            "source.max_broken",
            self.max_broken,
            "a fraction below 1, or a whole number of images",
        )
        _require(
            self.val_split is None or self.val_split != self.train_split,
            "source.val_split",
            self.val_split,
            "another split than source.train_split",
        )


@dataclass
class TrainConfig:
    """Everything that decides a training run, apart from where it is written.

    Args:
        data: "digits" (scikit-learn's bundled scans); "folder:PATH" with one folder of images per
            class, or `train/` and `val/` that hold them; "tar:PATH" (such folders in tar files);
            "wds:PATH" (WebDataset shards, "{000..127}" expands); "hfds:PATH" (a Hugging Face data
            set on disk); "torch:NAME@ROOT" (torchvision). Where there is one split, a fixed
            stratified fifth is held out.
        source: how images and labels are found there.
        model: name of a model in timm's registry, ours or not.
        model_kwargs: further arguments of `timm.create_model`, such as `drop_path_rate`.
        pretrained: start from the published weights.
        image_size: height and width of the input in pixels; the model's own if null.
        crop_pct: part of the image's shorter side that evaluation sees; the model's own if null.
        epochs: passes over the training images.
        batch_size: images per step and process.
        optimizer: the optimizer.
        schedule: the learning rate over the run.
        augment: how training images are varied.
        auxiliary_loss: factor on the mean of the losses that mixers ask to be trained with, such as
            the load balance of chosen heads (0.01 in arXiv 2410.11842); added to the loss.
        ema_decay: decay of the moving average of the weights, which is then what is evaluated
            and saved; null for none.
        precision: "no" (float32), "bf16" or "fp16" mixed precision.
        device: "auto" takes an accelerator if there is one.
        workers: processes that read images; 0 reads in the main process.
        threads: CPU threads of torch in the main process; null leaves them as they are. One is
            best for small models: more of them wait for each other.
        seed: of everything random.
        tracking: "wandb" sends the figures to Weights & Biases too, with its own settings
            (WANDB_PROJECT, WANDB_MODE, ...).
    """

    data: str = "digits"
    source: SourceConfig = field(default_factory=SourceConfig)
    model: str = "dinat_nano"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    image_size: int | None = None
    crop_pct: float | None = None
    epochs: int = 300
    batch_size: int = 128
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    auxiliary_loss: float = 0.01
    ema_decay: float | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu"] = "auto"
    workers: int = 4
    threads: int | None = None
    seed: int = 0
    tracking: Literal["wandb"] | None = None

    def __post_init__(self) -> None:
        _integer("epochs", self.epochs, 1)
        _integer("batch_size", self.batch_size, 1)
        _integer("workers", self.workers, 0)
        _integer("seed", self.seed, 0)
        if self.threads is not None:
            _integer("threads", self.threads, 1)
        if self.image_size is not None:
            _integer("image_size", self.image_size, 1)
        if self.crop_pct is not None:
            _number("crop_pct", self.crop_pct, 0.01, 1)
        _number("auxiliary_loss", self.auxiliary_loss)
        if self.ema_decay is not None:
            _number("ema_decay", self.ema_decay, 0, 1)
        _require(
            self.schedule.warmup_epochs < self.epochs or self.schedule.warmup_epochs == 0,
            "schedule.warmup_epochs",
            self.schedule.warmup_epochs,
            f"below epochs={self.epochs}",
        )
        mixes = self.augment.mixup > 0 or self.augment.cutmix > 0
        if mixes and self.batch_size % 2:
            raise ConfigError(
                f"batch_size={self.batch_size} is not allowed; it must be even, "
                "because augment.mixup or augment.cutmix pairs images"
            )

    def with_epochs(self, epochs: int) -> TrainConfig:
        """The same with other `epochs`, and no longer a warm-up than they allow.

        Raises:
            ConfigError: `epochs` is below 1.
        """
        warmup = max(0, min(self.schedule.warmup_epochs, epochs - 1))
        schedule = dataclasses.replace(self.schedule, warmup_epochs=warmup)
        return dataclasses.replace(self, epochs=epochs, schedule=schedule)

    def to_yaml(self) -> str:
        """The configuration as a recipe: `from_yaml` and `--config` read it back."""
        return yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, origin: str = "configuration") -> TrainConfig:
        """The configuration that `to_yaml` wrote.

        Raises:
            ConfigError: not a mapping, or an unknown key, or a value that is not allowed.
        """
        values = read_mapping(text, origin)
        try:
            return cls.from_mapping(config_parser().parse_object(values).as_dict())
        except ArgumentError as error:
            raise ConfigError(f"{origin}: {error}") from None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration with these values; keys that are none of its own are left aside."""
        own = {entry.name: values[entry.name] for entry in dataclasses.fields(cls)}
        groups = {name: group(**values[name]) for name, group in _GROUPS.items()}
        return cls(**{**own, **groups})


_GROUPS = {
    "source": SourceConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "augment": AugmentConfig,
}


def _plain(value: Any) -> Any:
    """`value` without tuples, which YAML's safe subset does not have."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def config_keys() -> list[str]:
    """Every key of a recipe in dotted form: "epochs", "optimizer.lr", ..."""
    keys = []
    for entry in dataclasses.fields(TrainConfig):
        group = _GROUPS.get(entry.name)
        nested = dataclasses.fields(group) if group else ()
        keys += [f"{entry.name}.{inner.name}" for inner in nested] or [entry.name]
    return keys


def nearest(name: str, allowed: Iterable[str]) -> str:
    """ " (did you mean ...?)" with the allowed name most like `name`, or nothing.

    A dotted name is also found by its last part: "lr" finds "optimizer.lr".
    """
    allowed = list(allowed)
    leaf = name.rpartition(".")[2]
    close = difflib.get_close_matches(name, allowed, 1, 0.7)
    if not close:
        by_leaf = {entry.rpartition(".")[2]: entry for entry in reversed(allowed)}
        close = [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, 1, 0.6)]
    return f" (did you mean {close[0]!r}?)" if close else ""


def read_mapping(text: str, origin: str) -> dict[str, Any]:
    """The YAML mapping in `text`, all of whose keys are those of a configuration.

    Raises:
        ConfigError: not YAML, not a mapping, or an unknown key.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} must hold a mapping of keys to values")
    allowed = config_keys()
    for key, value in values.items():
        if key in _GROUPS and not isinstance(value, Mapping):
            raise ConfigError(f"{origin}: {key}={value!r} must be a mapping")
        for name in [f"{key}.{inner}" for inner in value] if key in _GROUPS else [str(key)]:
            if name not in allowed:
                raise ConfigError(f"{origin}: unknown key {name!r}{nearest(name, allowed)}")
    return values


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    entries = importlib.resources.files("vitarium.configs").iterdir()
    return sorted(Path(entry.name).stem for entry in entries if entry.name.endswith(".yaml"))


def find_recipe(name: str) -> tuple[str, str]:
    """The text of a recipe and where it is from: a packaged one by name, or a file by path.

    Raises:
        ConfigError: there is neither.
    """
    if name in recipe_names():
        entry = importlib.resources.files("vitarium.configs") / f"{name}.yaml"
        return entry.read_text(encoding="utf-8"), f"recipe {name!r}"
    try:
        return Path(name).read_text(encoding="utf-8"), name
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(
            f"config {name!r} is neither a recipe{nearest(name, recipe_names())} nor a readable "
            f"file ({reason}); recipes are {', '.join(recipe_names())}"
        ) from None


class RecipeAction(ActionConfigFile):
    """`--config NAME`: the values of a packaged recipe, or of a YAML file by path."""

    def __call__(self, parser, cfg, values, option_string=None):  # type: ignore[no-untyped-def]
        try:
            text, origin = find_recipe(values)
            read_mapping(text, origin)
        except ConfigError as error:
            raise ArgumentError(None, str(error)) from None
        super().__call__(parser, cfg, text, option_string)


def config_parser(**kwargs: Any) -> ArgumentParser:
    """A parser with an option for every key of the configuration; it raises `ArgumentError`."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, **kwargs)
    parser.add_argument(
        "--config",
        action=RecipeAction,
        metavar="RECIPE",
        help=f"recipe by name ({', '.join(recipe_names())}) or path of a YAML file",
    )
    parser.add_class_arguments(TrainConfig)
    return parser
