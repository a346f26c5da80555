"""The arguments of the subcommands that look at one model with weights."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from vitarium.benchmarks import flops
from vitarium.train.weights import LoadedModel, load_weights


def add_weight_arguments(parser: ArgumentParser) -> None:
    """MODEL, and where its weights come from."""
    parser.add_argument("model", metavar="MODEL", type=str, help="a name that timm knows")
    add_source_arguments(parser)


def add_source_arguments(parser: ArgumentParser) -> None:
    """Where the weights of a named model come from."""
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        type=str | None,
        help="its weights: a file in official or in our names, an address, or the folder of a run; "
        "by default those that timm downloads",
    )
    parser.add_argument("--random", action="store_true", help="draw weights instead")


def weights_of(config: Namespace) -> LoadedModel:
    """The named model that the arguments mean.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: timm knows no such model, the checkpoint does not fit it, or there is nothing
            to download.
    """
    flops.check_name(config.model)
    return load_weights(config.model, config.checkpoint, random=config.random)
