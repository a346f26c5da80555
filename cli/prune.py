"""`vitarium prune`: a smaller model out of a trained one, and what that costs."""

from __future__ import annotations

from argparse import ArgumentError
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from rich.console import Console

from vitarium.benchmarks import flops
from vitarium.cli.compression import (
    add_compression_arguments,
    add_latencies,
    checkpoint_of,
    claim_files,
    example,
    figures_of,
    print_comparison,
    write_report,
)
from vitarium.train.checkpoint import WEIGHTS, load_model, save_weights
from vitarium.train.prune import CRITERIA, check_ratios, prune_model
from vitarium.zoo.pruned import pruned_layers


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Remove hidden units of feed-forward networks and heads of attention from a "
        "trained model, and compare it with what it was. "
        "`vitarium train --initial_checkpoint FOLDER` fine-tunes the result."
    )
    add_compression_arguments(parser)
    parser.add_argument(
        "--ratio", type=float, default=0.3, help="share of all hidden units to remove, below 1"
    )
    parser.add_argument(
        "--heads_ratio", type=float, default=0.0, help="share of all heads to remove, below 1"
    )
    parser.add_argument(
        "--criterion",
        type=Literal[CRITERIA],  # type: ignore[valid-type]
        default="dimap",
        help="what decides: relative distortion of modules, magnitude alone, or chance",
    )
    parser.add_argument(
        "--round_to",
        type=PositiveInt,
        default=1,
        help="widths that remain are multiples of this; fast kernels like 8 or 16",
    )
    return parser


def run(config: Namespace) -> None:
    try:
        check_ratios(config.ratio, config.heads_ratio)
    except ValueError as error:
        raise ArgumentError(None, str(error)) from None
    loaded = checkpoint_of(config)
    folder = claim_files(config.output, f"last{WEIGHTS}", "pruning.json")
    before = figures_of(config, loaded, loaded.model)
    images = example(loaded, 2)
    pruned, description = load_model(loaded.path)
    report = prune_model(
        pruned,
        images,
        config.ratio,
        heads_ratio=config.heads_ratio,
        criterion=config.criterion,
        round_to=config.round_to,
        seed=description.config.seed,
    )
    description.pruned.update(pruned_layers(pruned))
    description.metrics.clear()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"last{WEIGHTS}"
    save_weights(path, pruned, description)
    pruned, _ = load_model(path)  # what is measured is what was written
    after = figures_of(config, loaded, pruned)
    add_latencies(config, loaded, (loaded.model, pruned), (before, after))
    for figures, model in ((before, loaded.model), (after, pruned)):
        size = loaded.inputs.image_size
        figures["multiply-adds"] = flops.count(model, size[0] if size[0] == size[1] else None).macs
        figures["parameters"] = sum(p.numel() for p in model.parameters())
    before["bytes"], after["bytes"] = (p.stat().st_size for p in (loaded.path, path))
    console = Console()
    print_comparison(console, f"{loaded.name}, pruned by {config.criterion}", before, after)
    for kind, layers in (("hidden units", report.units), ("heads", report.heads)):
        if layers:
            full, left = (sum(pair[i] for pair in layers.values()) for i in range(2))
            console.print(f"{kind}: {left} of {full} left in {len(layers)} layers", highlight=False)
    for layer, reason in report.kept.items():
        console.print(f"left whole: {layer}: {reason}", highlight=False, soft_wrap=True)
    settings = {name: config[name] for name in ("ratio", "heads_ratio", "criterion", "round_to")}
    layers = {"units": report.units, "heads": report.heads, "kept": report.kept}
    write_report(folder / "pruning.json", loaded, settings, before, after, layers)
    console.print(f"written {path} and pruning.json", highlight=False, soft_wrap=True)
