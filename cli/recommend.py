"""`vitarium recommend`: models by published accuracy under a latency, memory or size budget."""

from __future__ import annotations

import difflib
import re
from argparse import ArgumentError
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from vitarium.benchmarks.recommend import Budget, Choice

OVER = 3  # rows that are shown of models over the budget

# By option: its units, an example, and what it is of.
QUANTITIES = {
    "latency": ({"us": 1e-6, "ms": 1e-3, "s": 1.0}, "20ms", "of one image"),
    "memory": (
        {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "MB": 1e6, "GB": 1e9},
        "2GiB",
        "peak of one forward, weights included",
    ),
    "params": ({"K": 1e3, "M": 1e6, "B": 1e9}, "30M", "number of parameters"),
}


def quantity(option: str, text: str | None) -> float | None:
    """The value of an option of `QUANTITIES`, in seconds, bytes or parameters.

    Raises:
        ArgumentError: it is no positive number with a unit.
    """
    if text is None:
        return None
    units, example, _ = QUANTITIES[option]
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2] not in units or float(match[1]) == 0:
        raise ArgumentError(
            None,
            f"--{option} {text}: must be a number above 0 with a unit ({', '.join(units)}), such "
            f"as {example}",
        )
    return float(match[1]) * units[match[2]]


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Rank models by published ImageNet-1K accuracy, of those that keep to a budget "
        "on this machine. Those that could are measured; figures with ~ are predicted from GFLOPs."
    )
    for option, (_, example, what) in QUANTITIES.items():
        parser.add_argument(
            f"--{option}", metavar=example, type=str | None, default=None, help=f"{what}, at most"
        )
    parser.add_argument("--resolution", type=PositiveInt, default=224, help="side of the images")
    parser.add_argument("--device", type=str | None, default=None, help="cpu or cuda")
    parser.add_argument("--threads", type=PositiveInt | None, default=None, help="on the CPU")
    parser.add_argument(
        "--features", action="store_true", help="only models that give a map per stage"
    )
    parser.add_argument(
        "--all", metavar="RESULTS.csv", type=str | None, default=None,
        help="timm's models, too, with their accuracies from this file: "
        "results/results-imagenet.csv of timm's repository",
    )  # fmt: skip
    parser.add_argument("--count", type=PositiveInt, default=5, help="models that are enough")
    parser.add_argument("--seconds", type=NonNegativeFloat, default=1.0, help="per measure")
    return parser


def run(config: Namespace) -> int:
    from vitarium.benchmarks.recommend import Budget, published_choices, recommend, where

    budget = Budget(**{option: quantity(option, config[option]) for option in QUANTITIES})
    if budget == Budget():
        raise ArgumentError(None, "a budget is needed: --latency, --memory or --params")
    console = Console()
    found = recommend(
        published_choices(config.all),
        budget,
        resolution=config.resolution,
        device=config.device,
        threads=config.threads,
        features=config.features,
        count=config.count,
        seconds=config.seconds,
        progress=lambda line: console.print(line, style="dim", highlight=False, markup=False),
    )
    fitting = [choice for choice in found if choice.fits(budget)][: config.count]
    console.print(_table(found, fitting, budget, where(found)))
    if not fitting:
        console.print("no model was measured to be within the budget")
        return 1
    for line in _next(fitting[0], config):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _table(found: Sequence[Choice], fitting: Sequence[Choice], budget: Budget, place: str) -> Table:
    """Those within the budget, then the most accurate over it."""
    table = Table(
        caption=f"latency and memory measured on {place}; ~: predicted from GFLOPs, not measured; "
        "top-1: published, at those pixels",
        box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    table.add_column("model", overflow="fold")
    for heading in ("top-1", "at pixels", "params, M", "GFLOPs", "latency, ms", "memory, MiB"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for choice in fitting:
        table.add_row(*_cells(choice), "fits")
    over = [c for c in found if (c.measured or c.predicted) and not c.fits(budget)]
    for choice in sorted(over, key=_latency)[:OVER]:
        table.add_row(*_cells(choice), "over", style="dim")
    return table


def _latency(choice: Choice) -> float:
    return choice.measured.median if choice.measured else choice.predicted or 0.0


def _cells(choice: Choice) -> tuple[str, ...]:
    sign, memory = "~", ""
    if choice.measured is not None:
        sign, memory = "", f"{(choice.measured.peak_memory or 0) / 2**20:.0f}"
    return (
        choice.name,
        f"{choice.top1:.1f}",
        str(choice.pixels),
        f"{choice.params / 1e6:.3g}",
        f"{choice.macs / 1e9:.3g}",
        f"{sign}{1e3 * _latency(choice):.3g}",
        memory,
    )


def recipe_of(name: str) -> str:
    """The recipe of the model of the same family with the most alike name; else for fine-tuning."""
    import timm
    import yaml

    from vitarium.train.config import find_recipe, recipe_names

    def family(model: str) -> str:
        return timm.models.model_entrypoint(model).__module__

    model = name.partition(".")[0]
    fitting = {}
    for recipe in recipe_names():
        values = yaml.safe_load(find_recipe(recipe)[0])
        other = values.get("model", "")
        anew = not any(values.get(key) for key in ("task", "pretrained", "freeze"))
        if anew and timm.is_model(other) and family(other) == family(model):
            likeness = difflib.SequenceMatcher(None, model, other).ratio()
            fitting[recipe] = (likeness, -len(recipe))
    return max(fitting, key=lambda recipe: fitting[recipe], default="finetune")


def _next(choice: Choice, config: Namespace) -> list[str]:
    """What to do with the best one."""
    name = choice.name
    model = name.partition(".")[0]
    lines = [
        f"next, for {name}:",
        f"  vitarium info {model}  # where its weights are",
        f"  vitarium train --config {recipe_of(name)} --model {model} --data folder:PATH",
        f"  vitarium bench {model} --image-size {config.resolution} --profile",
    ]
    if config.features:
        lines += ["in Python:", "  import timm, vitarium.zoo"]
        lines += [f"  timm.create_model({model!r}, features_only=True)"]
    return lines
