"""Models with weights, as the subcommands that look at one model take them."""

from __future__ import annotations

from pathlib import Path

import timm
from jsonargparse import ArgumentParser, Namespace
from safetensors import SafetensorError, safe_open
from torch import nn

from vitarium.benchmarks import flops
from vitarium.train import load_model
from vitarium.train.checkpoint import find_checkpoint
from vitarium.train.data import InputConfig
from vitarium.zoo import from_checkpoint


def add_weight_arguments(parser: ArgumentParser) -> None:
    """MODEL, and where its weights come from."""
    parser.add_argument("model", metavar="MODEL", type=str, help="a name that timm knows")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        type=str | None,
        help="its weights: a file in official or in our names, an address, or the folder of a run; "
        "by default those that timm downloads",
    )
    parser.add_argument("--random", action="store_true", help="draw weights instead")


def load_weights(config: Namespace) -> tuple[nn.Module, InputConfig, list[str] | None]:
    """The model that the arguments mean, on the CPU and in evaluation mode.

    Returns:
        The model, the size and normalisation of its images, and the names of its classes if the
        checkpoint says them.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: timm knows no such model, the checkpoint does not fit it, or there is nothing
            to download.
    """
    name, checkpoint = config.model, config.checkpoint
    flops.check_name(name)
    if checkpoint is not None and config.random:
        raise ValueError("--checkpoint and --random exclude each other")
    if checkpoint is not None and _is_run(checkpoint):
        model, description = load_model(checkpoint)
        if description.model != name.partition(".")[0]:
            raise ValueError(f"checkpoint {checkpoint} is of {description.model}, not of {name}")
        return model, description.input, description.classes
    if checkpoint is not None:
        model, _, _ = from_checkpoint(checkpoint, name)
    else:
        model = _create(name, pretrained=not config.random)
    data = timm.data.resolve_model_data_config(model)
    inputs = InputConfig(
        image_size=data["input_size"][1:],
        mean=data["mean"],
        std=data["std"],
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
    )
    return model.eval(), inputs, None


def _is_run(checkpoint: str) -> bool:
    """Whether it is a folder of a run, or a file that training wrote."""
    path = Path(checkpoint)
    if path.is_dir():
        path = find_checkpoint(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return "model_kwargs" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False  # whoever loads it says what is wrong


def _create(name: str, pretrained: bool) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained)
    except (RuntimeError, OSError) as error:  # nothing to download, or no way to it
        if not pretrained:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{reason}. --checkpoint FILE gives weights, --random draws them"
        ) from error
