"""`vitarium train`: train a model, or go on with an interrupted run."""

from __future__ import annotations

from argparse import ArgumentError

from accelerate import PartialState
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from vitarium.train import ConfigError, Interrupted, RunResult, TrainConfig, resume, train
from vitarium.train.config import config_keys, config_parser


def parser() -> ArgumentParser:
    parser = config_parser(description="Train a model on images and keep its checkpoints.")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=str | None,
        help="folder of the run; by default a new one in runs/",
    )
    parser.add_argument(
        "--resume",
        metavar="FOLDER",
        type=str | None,
        help="go on with the run in this folder, with the configuration saved in it",
    )
    return parser


def run(config: Namespace) -> int:
    console = Console()
    try:
        if config.resume is None:
            result = train(_train_config(config), output=config.output, console=console)
        else:
            _refuse_other_options(config)
            result = resume(config.resume, console=console)
    except ConfigError as error:
        raise ArgumentError(None, str(error)) from None
    except Interrupted as interruption:
        if PartialState().is_main_process:
            Console(stderr=True).print(str(interruption), highlight=False, soft_wrap=True)
        return 128 + interruption.signum
    if PartialState().is_main_process:
        print_result(result, console)
    return 0


def _train_config(config: Namespace) -> TrainConfig:
    return TrainConfig.from_mapping(config.as_dict())


def _refuse_other_options(config: Namespace) -> None:
    defaults = parser().get_defaults()
    given = [key for key in [*config_keys(), "output"] if config[key] != defaults[key]]
    if given:
        raise ConfigError(
            f"--resume goes on with the saved configuration; leave out {', '.join(given)}"
        )


def print_result(result: RunResult, console: Console) -> None:
    """The figures of a finished run and where it is."""
    for name, record in (("last", result.last), ("best", result.best)):
        console.print(
            f"{name}: epoch {record['epoch']}, held-out accuracy {record['accuracy']:.2%} "
            f"({record['correct']}/{record['total']})",
            highlight=False,
        )
    broken = result.folder / "broken.jsonl"
    if broken.exists():
        count = len(broken.read_text(encoding="utf-8").splitlines())
        console.print(
            f"{count} images could not be read: {broken}", highlight=False, soft_wrap=True
        )
    console.print(
        f"{result.seconds:.1f} s, written to {result.folder}", highlight=False, soft_wrap=True
    )
