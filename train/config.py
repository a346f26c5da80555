"""What a training run is told: dataclasses, their checks, and recipes found by name.

Defaults follow timm's `train.py` where it has the same setting. Every field can be set in a YAML
recipe and on the command line (`--epochs 20`, `--optimizer.lr 5e-4`).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from vitarium.train.options import (
    AugmentConfig,
    ConfigError,
    DistillationConfig,
    DropPosConfig,
    OptimizerConfig,
    ProgressiveConfig,
    ScheduleConfig,
    integer,
    number,
    require,
)

# Where the tasks are; `vitarium.train.task` says what one is.
TASKS = {
    "classification": "vitarium.train.task:Classification",
    "distillation": "vitarium.train.distill:Distillation",
    "droppos": "vitarium.train.droppos:DropPos",
}


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
            require(getattr(self, name) != "", f"source.{name}", "", "a name, or null")
        number("source.max_broken", self.max_broken)
        require(
            self.max_broken < 1 or self.max_broken == int(self.max_broken),
            "source.max_broken",
            self.max_broken,
            "a fraction below 1, or a whole number of images",
        )
        require(
            self.val_split is None or self.val_split != self.train_split,
            "source.val_split",
            self.val_split,
            "another split than source.train_split",
        )


@dataclass
class CheckpointConfig:
    """When the state of a run is saved, besides every epoch's end and an interruption.

    Args:
        keep: newest states that are kept; resuming takes the one before a damaged one.
        every_steps: also after so many steps; null for no such saving.
        every_minutes: also after so many minutes; null for no such saving.
    """

    keep: int = 2
    every_steps: int | None = None
    every_minutes: float | None = None

    def __post_init__(self) -> None:
        integer("checkpoint.keep", self.keep, 1)
        if self.every_steps is not None:
            integer("checkpoint.every_steps", self.every_steps, 1)
        if self.every_minutes is not None:
            number("checkpoint.every_minutes", self.every_minutes)
            require(
                self.every_minutes > 0, "checkpoint.every_minutes", self.every_minutes, "above 0"
            )


@dataclass
class TrainConfig:
    """Everything that decides a training run, apart from where it is written.

    Args:
        data: "digits" (scikit-learn's bundled scans); "probe:NAME" (drawn tasks, see
            `vitarium.train.probes`); "folder:PATH" with one folder of images per class, or `train/`
            and `val/` that hold them; "tar:PATH" (such folders in tar files); "wds:PATH"
            (WebDataset shards, "{000..127}" expands); "hfds:PATH" (a Hugging Face data set on
            disk); "torch:NAME@ROOT" (torchvision). Where there is one split, a fixed stratified
            fifth is held out.
        source: how images and labels are found there.
        task: what is trained: "classification", "distillation" from a teacher, or "droppos"
            (positions of patches, without labels, as pre-training).
        distillation: the teacher and how it is learned from, where that is the task.
        droppos: settings of the task of that name.
        model: name of a model in timm's registry, ours or not.
        model_kwargs: further arguments of `timm.create_model`, such as `drop_path_rate`.
        pretrained: start from the published weights.
        initial_checkpoint: start from these weights: a file in official or in our names, an
            address, or a run's folder; a classifier of other classes is left out, and layers that
            were pruned stay so.
        freeze: what is not trained and computes as in evaluation: "backbone" for all but the
            classifier (a linear probe); a number n for the first n groups of timm's coarse
            `group_matcher`, of which the stem is the first; or names of modules or patterns of
            parameters' names, such as [stem, stages.0, "*.norm1.*"].
        image_size: height and width of the input in pixels; the model's own if null.
        progressive: smaller training images at first.
        crop_pct: part of the image's shorter side that evaluation sees; the model's own if null.
        epochs: passes over the training images.
        batch_size: images per forward pass and process.
        accumulate_steps: forward and backward passes per step of the optimizer, whose batch is so
            many times as large (timm's grad_accum_steps).
        optimizer: the optimizer.
        schedule: the learning rate over the run.
        augment: how training images are varied.
        bce_loss: binary cross-entropy of every class instead of cross-entropy over all.
        bce_target_thresh: targets above this value count as 1, others as 0, after Mixup and
            smoothing; null leaves them soft. Only for `bce_loss`.
        auxiliary_loss: factor on the mean of the losses that mixers ask to be trained with, such as
            the load balance of chosen heads (0.01 in arXiv 2410.11842); added to the loss.
        ema_decay: decay of the moving average of the weights, which is then what is evaluated
            and saved; null for none.
        precision: "no" (float32), "bf16" or "fp16" mixed precision.
        channels_last: keep images and weights of convolutions with channels innermost.
        grad_checkpointing: recompute activations in the backward pass: less memory, more time.
        compile: run the model through `torch.compile`.
        device: "auto" takes an accelerator if there is one.
        distributed: with several processes, each holds the whole model ("ddp") or a part of every
            weight ("fsdp2").
        checkpoint: when the state of the run is saved.
        workers: processes that read images; 0 reads in the main process.
        threads: CPU threads of torch in the main process; null leaves them as they are. One is
            best for small models: more of them wait for each other.
        seed: of everything random.
        tracking: "wandb" sends the figures to Weights & Biases too, with its own settings
            (WANDB_PROJECT, WANDB_MODE, ...).
    """

    data: str = "digits"
    source: SourceConfig = field(default_factory=SourceConfig)
    task: str = "classification"
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    droppos: DropPosConfig = field(default_factory=DropPosConfig)
    model: str = "dinat_nano"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    initial_checkpoint: str | None = None
    freeze: int | list[str] | str | None = None
    image_size: int | None = None
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    crop_pct: float | None = None
    epochs: int = 300
    batch_size: int = 128
    accumulate_steps: int = 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    bce_loss: bool = False
    bce_target_thresh: float | None = None
    auxiliary_loss: float = 0.01
    ema_decay: float | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    grad_checkpointing: bool = False
    compile: bool = False
    device: Literal["auto", "cpu"] = "auto"
    distributed: Literal["ddp", "fsdp2"] = "ddp"
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    workers: int = 4
    threads: int | None = None
    seed: int = 0
    tracking: Literal["wandb"] | None = None

    def __post_init__(self) -> None:
        allowed = f"one of {', '.join(TASKS)}{nearest(str(self.task), TASKS)}"
        require(self.task in TASKS, "task", self.task, allowed)
        integer("epochs", self.epochs, 1)
        integer("batch_size", self.batch_size, 1)
        integer("accumulate_steps", self.accumulate_steps, 1)
        integer("workers", self.workers, 0)
        integer("seed", self.seed, 0)
        if self.threads is not None:
            integer("threads", self.threads, 1)
        if self.image_size is not None:
            integer("image_size", self.image_size, 1)
        if self.crop_pct is not None:
            number("crop_pct", self.crop_pct, 0.01, 1)
        number("auxiliary_loss", self.auxiliary_loss)
        self._check_start()
        self._check_options()
        if self.ema_decay is not None:
            number("ema_decay", self.ema_decay, 0, 1)
        require(
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

    def _check_start(self) -> None:
        """What a run starts from, and what of it is trained."""
        if self.initial_checkpoint is not None:
            given = f"{self.initial_checkpoint!r} with pretrained=True"
            require(not self.pretrained, "initial_checkpoint", given, "the only source of weights")
            require(self.initial_checkpoint != "", "initial_checkpoint", "", "a path, or null")
        if isinstance(self.freeze, int):
            integer("freeze", self.freeze, 0)
        elif self.freeze is not None:
            patterns = [self.freeze] if isinstance(self.freeze, str) else self.freeze
            named = bool(patterns) and all(patterns)
            require(named, "freeze", self.freeze, '"backbone", a number of groups, or names')
        teacher = self.distillation.teacher
        if self.task == "distillation":
            require(teacher is not None, "distillation.teacher", teacher, "a model of timm's")
        else:
            allowed = f'null, as task={self.task!r} has no teacher (task "distillation" has one)'
            require(teacher is None, "distillation.teacher", teacher, allowed)

    def _check_options(self) -> None:
        """Options that depend on others."""
        threshold = self.bce_target_thresh
        if threshold is not None:
            number("bce_target_thresh", threshold, 0, 1)
            require(self.bce_loss, "bce_target_thresh", threshold, "null without bce_loss")
        progressive = self.progressive
        if progressive.start_size is not None:
            epochs = progressive.epochs
            allowed = f"from 1 to epochs={self.epochs}"
            require(epochs is None or epochs <= self.epochs, "progressive.epochs", epochs, allowed)
            if self.image_size is not None:
                allowed = f"at most image_size={self.image_size}"
                start = progressive.start_size
                require(start <= self.image_size, "progressive.start_size", start, allowed)

    def with_epochs(self, epochs: int) -> TrainConfig:
        """The same with other `epochs`, and no longer a warm-up than they allow.

        Raises:
            ConfigError: `epochs` is below 1.
        """
        warmup = max(0, min(self.schedule.warmup_epochs, epochs - 1))
        schedule = dataclasses.replace(self.schedule, warmup_epochs=warmup)
        growth = self.progressive
        if growth.epochs is not None:
            growth = dataclasses.replace(growth, epochs=min(growth.epochs, max(1, epochs)))
        return dataclasses.replace(self, epochs=epochs, schedule=schedule, progressive=growth)

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
    "distillation": DistillationConfig,
    "progressive": ProgressiveConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "augment": AugmentConfig,
    "droppos": DropPosConfig,
    "checkpoint": CheckpointConfig,
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
