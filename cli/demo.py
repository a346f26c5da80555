"""`vitarium demo`: train, evaluate, predict and measure on handwritten digits in one go."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from PIL import Image
from rich.console import Console

from vitarium.benchmarks import bench_models, print_table
from vitarium.cli.predict import prediction_table
from vitarium.cli.train import print_result
from vitarium.train import (
    ConfigError,
    Interrupted,
    TrainConfig,
    evaluate_suite,
    load_model,
    load_weights,
    train,
)
from vitarium.train.checkpoint import claim_folder
from vitarium.train.config import find_recipe
from vitarium.train.data import load_data, read_image
from vitarium.train.plots import attention_picture
from vitarium.train.predict import predict
from vitarium.train.suite import record_evaluation

SAMPLES = 6  # held-out digits to predict and to draw
PEER = "resnet10t"  # a small convolutional network of timm to measure beside ours


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Train a small dilated neighborhood attention model on scikit-learn's scanned "
        "digits, evaluate it, classify image files with it, draw what it attends to, and measure "
        "it.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output", metavar="FOLDER", type=str | None, help="by default a new folder in runs/"
    )
    parser.add_argument("--epochs", type=int | None, help="of training; the recipe's if absent")
    return parser


def run(config: Namespace) -> int:
    console = Console()
    recipe = TrainConfig.from_yaml(*find_recipe("digits"))
    try:
        if config.epochs is not None:
            recipe = recipe.with_epochs(config.epochs)
    except ConfigError as error:
        raise ArgumentError(None, str(error)) from None
    folder = claim_folder(config.output, "demo")
    try:
        console.rule("train")
        result = train(recipe, output=folder, console=console)
    except Interrupted as interruption:
        Console(stderr=True).print(str(interruption), highlight=False, soft_wrap=True)
        return 128 + interruption.signum
    print_result(result, console)

    console.rule("eval")
    (evaluated,) = evaluate_suite(load_weights(folder))
    evaluation = evaluated.evaluation
    console.print(
        f"best checkpoint: {evaluation.correct} of {evaluation.total} held-out digits, "
        f"{evaluation.accuracy:.2%}",
        highlight=False,
    )
    record_evaluation(evaluated)

    console.rule("predict")
    held_out = load_data(recipe.data).held_out
    images, targets = held_out.images[:SAMPLES], held_out.targets[:SAMPLES]
    paths = _write_samples(folder / "samples", images, targets)
    console.print(prediction_table(predict(folder, paths, device=recipe.device)))
    model, description = load_model(folder)
    attention_picture(model, description, images, targets, folder / "attention.png")

    console.rule("bench")
    records = bench_models(
        [recipe.model, PEER],
        batch_size=recipe.batch_size,
        image_size=recipe.image_size,
        device=recipe.device,
        seconds=2.0,
        output=folder / "bench.jsonl",
    )
    print_table(records, console)

    console.rule("written")
    for path in sorted(folder.iterdir()):
        console.print(str(path), highlight=False, soft_wrap=True)
    return 0


def _write_samples(
    folder: Path, images: Sequence[Image.Image | Path], targets: Sequence[int]
) -> list[Path]:
    """The images as PNG files, for `vitarium predict`; named by what they show."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number, (image, target) in enumerate(zip(images, targets)):
        paths.append(folder / f"{number}_is_{target}.png")
        read_image(image).save(paths[-1])
    return paths
