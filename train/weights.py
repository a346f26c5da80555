"""Models with weights, wherever these come from: a run, a file in anyone's names, or a download."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import resolve_data_config
from torch import nn

from vitarium.train.checkpoint import find_checkpoint, load_model
from vitarium.train.config import TrainConfig, nearest
from vitarium.train.data import InputConfig
from vitarium.zoo import from_checkpoint


@dataclass(frozen=True)
class LoadedModel:
    """A model with weights.

    Attributes:
        name: in timm's registry, with the tag of the weights if one was given.
        model: on the CPU, in evaluation mode.
        inputs: size and normalisation of its images.
        classes: names of its classes, if the weights say them.
        config: of the run that trained it, if it is from one.
        path: the file of weights, if it is from one.
    """

    name: str
    model: nn.Module
    inputs: InputConfig
    classes: list[str] | None
    config: TrainConfig | None
    path: Path | None

    def at(self, image_size: int | None, crop_pct: float | None) -> LoadedModel:
        """The same for square images of `image_size`; None leaves what is as it is.

        Models whose positions are of a fixed size are changed by timm's `set_input_size`, which
        interpolates them; any other runs as it is.

        Raises:
            ValueError: the model refuses images of this size.
        """
        inputs = self.inputs
        if crop_pct is not None:
            inputs = dataclasses.replace(inputs, crop_pct=crop_pct)
        size = inputs.image_size if image_size is None else (image_size, image_size)
        model = self.model
        if size != inputs.image_size and hasattr(model, "set_input_size"):
            model = copy.deepcopy(model)  # interpolated from the original, whatever came before
        try:
            if model is not self.model:
                model.set_input_size(size)
            with torch.no_grad():
                model(torch.zeros(1, len(inputs.mean), *size))
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"model {self.name} refuses images of {size[0]}x{size[1]} (image_size="
                f"{image_size}): {reason}"
            ) from error
        return dataclasses.replace(
            self, model=model, inputs=dataclasses.replace(inputs, image_size=size)
        )


def load_weights(
    model: Path | str, checkpoint: Path | str | None = None, *, random: bool = False
) -> LoadedModel:
    """The model that a path or a name means.

    Args:
        model: a run's folder (its best checkpoint), a file that training wrote, or a name that
            timm knows, which may have a tag.
        checkpoint: for a name, its weights: a file in official or in our names, an address, or a
            run's folder; what timm downloads if None.
        random: for a name, draw weights instead.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: timm knows no such model, the checkpoint does not fit it or is damaged, or
            there is nothing to download.
    """
    name = str(model)
    known = timm.is_model(name.partition(".")[0])  # a folder of that name is meant by ./NAME
    if not known and Path(model).exists():
        if checkpoint is not None or random:
            other = "--random" if random else f"--checkpoint {checkpoint}"
            raise ValueError(f"{model} is a checkpoint already; {other} is for names of models")
        return _of_run(model)
    if not known:
        raise FileNotFoundError(
            f"checkpoint {name} does not exist, and timm knows no model of this name"
            f"{nearest(name, timm.list_models())}"
        )
    if checkpoint is not None and random:
        raise ValueError("--checkpoint and --random exclude each other")
    if checkpoint is not None and _is_run(checkpoint):
        loaded = _of_run(checkpoint)
        if loaded.name != name.partition(".")[0]:
            raise ValueError(f"checkpoint {checkpoint} is of {loaded.name}, not of {name}")
        return loaded
    if checkpoint is not None:
        network, _, _ = from_checkpoint(checkpoint, name)
    else:
        network = _create(name, pretrained=not random)
    path = None if checkpoint is None else Path(checkpoint)
    return LoadedModel(name, network.eval(), own_input(network), None, None, path)


def own_input(model: nn.Module) -> InputConfig:
    """Size and normalisation of a model's images, as timm evaluates it."""
    data = resolve_data_config(model=model)
    return InputConfig(
        image_size=tuple(data["input_size"][1:]),  # type: ignore[arg-type]
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
    )


def _of_run(checkpoint: Path | str) -> LoadedModel:
    path = find_checkpoint(checkpoint)
    model, found = load_model(path)
    return LoadedModel(found.model, model, found.input, found.classes, found.config, path)


def _is_run(checkpoint: Path | str) -> bool:
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
