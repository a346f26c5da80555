"""Loading checkpoints, in official or in our names, without ever running code from a file."""

import argparse
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict, load_state_dict_from_hf
from timm.models._hub import download_cached_file
from torch import Tensor, nn

from vitarium.zoo.registry import checkpoint_filter

# Where training scripts put the weights, in the order of timm: the averaged ones first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


@dataclass(frozen=True)
class CheckpointReport:
    """What `load_checkpoint` did.

    Attributes:
        source: the file or address, or "state dict".
        wrapper: the entry of the file that held the weights; None if the file is a state dict.
        tensors: number of tensors loaded.
        renamed: how many of them had another name in the checkpoint.
        head_replaced: whether the checkpoint's classifier was left out for the model's own.
    """

    source: str
    wrapper: str | None
    tensors: int
    renamed: int
    head_replaced: bool

    def __str__(self) -> str:
        parts = [f"{self.source}: loaded {self.tensors} tensors"]
        if self.wrapper:
            parts.append(f"from its entry {self.wrapper!r}")
        if self.renamed:
            parts.append(f"{self.renamed} of them renamed from the official names")
        if self.head_replaced:
            parts.append("the classifier left as the model had it")
        return ", ".join(parts)


def load_checkpoint(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    replace_head: bool = False,
) -> CheckpointReport:
    """Load all of a model's weights, strictly: every name and shape must agree.

    The model is left untouched where the call raises.

    Args:
        model: a model made by `timm.create_model`.
        source: a file (.safetensors, or what `torch.save` writes), an address (https://...,
            hf-hub:owner/name), or a state dict; in official or in our names, plain or within
            the usual wrappers ("state_dict_ema", "model_ema", "state_dict", "model", "module.").
        replace_head: keep the model's own classifier and leave out the checkpoint's, as for
            fine-tuning with another number of classes.

    Returns:
        What was done; `str()` of it is a sentence.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file or address is no checkpoint, or it does not fit the model.
        TypeError: `model` or `source` is of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_checkpoint: model must be a module, got {type(model).__name__}")
    origin, content = _read(source)
    wrapper, state_dict = _unwrap(origin, content)
    mapped = _checkpoint_filter(model)(state_dict, model)
    renamed = sum(key not in state_dict for key in mapped)
    classifiers = _classifier_names(model)
    if replace_head:
        mapped = {k: v for k, v in mapped.items() if k not in classifiers}
        own = model.state_dict()
        mapped |= {k: own[k] for k in classifiers if k in own}
    _check_fit(origin, model, mapped, classifiers)
    model.load_state_dict(mapped, strict=True)
    return CheckpointReport(
        source=origin,
        wrapper=wrapper,
        tensors=len(mapped),
        renamed=renamed,
        head_replaced=replace_head,
    )


def mapped_state_dict(model: nn.Module, source: str | Path) -> dict[str, Tensor]:
    """What a file or an address holds, in the model's names; raises as `load_checkpoint`."""
    _, state_dict = _unwrap(*_read(source))
    return _checkpoint_filter(model)(state_dict, model)


def backbone_entries(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the state dict of a detector or segmenter, the backbone's; any other as it is."""
    prefix = "backbone."
    found = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    return found or dict(state_dict)


def _read(source: Any) -> tuple[str, Any]:
    """Name and content of a file, an address or a mapping."""
    if isinstance(source, Mapping):
        return "state dict", source
    if not isinstance(source, str | Path):
        raise TypeError(
            "load_checkpoint: source must be a path, an address or a state dict, "
            f"got {type(source).__name__}"
        )
    address = str(source)
    try:
        if address.startswith("hf-hub:"):
            return address, load_state_dict_from_hf(address[len("hf-hub:") :], weights_only=True)
        if address.startswith(("https://", "http://")):
            return address, _read_file(Path(download_cached_file(address, check_hash=False)))
    except OSError as error:  # of urllib, requests and huggingface_hub
        raise ValueError(f"{address}: cannot be downloaded: {error}") from error
    return address, _read_file(Path(source))


def _read_file(path: Path) -> Any:
    """Content of a checkpoint file; tensors and plain containers only, never other objects."""
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{path}: is a folder, not a checkpoint file")
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the checkpoint file is empty")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training scripts of timm store their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file: {error}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused, because it is no PyTorch checkpoint or holds objects other than "
            f"tensors; nothing in it was run. {_first_line(error)}"
        ) from error
    except Exception as error:  # on damaged bytes torch.load raises nearly anything
        raise ValueError(
            f"{path}: truncated, or not a PyTorch checkpoint: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _unwrap(origin: str, content: Any) -> tuple[str | None, dict[str, Tensor]]:
    """The entry that held the state dict (None if nothing did), and the state dict."""
    wrapper = None
    if isinstance(content, Mapping):
        wrapper = next((k for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
        content = content if wrapper is None else content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"{origin}: holds no state dict (names and tensors), but "
            f"{'nothing' if isinstance(content, Mapping) else type(content).__name__}"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{origin}: is no state dict: its entry {name!r} is {type(value).__name__}, "
                "not a tensor"
            )
    return wrapper, clean_state_dict(content)


def _architecture(model: nn.Module) -> dict[str, Any]:
    return getattr(model, "pretrained_cfg", None) or {}


def _checkpoint_filter(model: nn.Module) -> Any:
    """The function of the model's family that maps official names, as timm would call it."""
    name = _architecture(model).get("architecture", "")
    if not timm.is_model(name):
        return lambda state_dict, model: state_dict
    family = sys.modules[timm.models.model_entrypoint(name).__module__]
    timms = getattr(family, "checkpoint_filter_fn", lambda state_dict, model: state_dict)
    return checkpoint_filter(name) or timms


def _classifier_names(model: nn.Module) -> list[str]:
    """Names of the classifier's parameters."""
    layers = _architecture(model).get("classifier") or ()
    layers = (layers,) if isinstance(layers, str) else layers
    return [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]


def _check_fit(
    origin: str, model: nn.Module, state_dict: dict[str, Tensor], classifiers: list[str]
) -> None:
    """Raise a ValueError that names every key and shape that differs from the model's."""
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    misshapen = {
        key: (tuple(value.shape), tuple(own[key].shape))
        for key, value in state_dict.items()
        if key in own and value.shape != own[key].shape
    }
    if not (missing or unexpected or misshapen):
        return
    problems = [
        f"{key} is {theirs} in the checkpoint and {ours} in the model"
        for key, (theirs, ours) in misshapen.items()
    ]
    problems += [f"{key} is missing from the checkpoint" for key in missing]
    problems += [f"{key} is not in the model" for key in unexpected]
    message = f"{origin}: does not fit the model: " + "; ".join(problems[:8])
    if len(problems) > 8:
        message += f"; and {len(problems) - 8} more"
    if len(missing) == len(own):
        message += f". It has none of the model's names, but for example {unexpected[:3]}"
    if {*missing, *unexpected, *misshapen} <= set(classifiers):
        classes = {state_dict[k].shape[0] for k in classifiers if k in state_dict}
        create = [f"create the model with num_classes={n}, or " for n in classes]
        message += (
            f". Only the classifier differs: {''.join(create) or ''}"
            "pass replace_head=True to keep the model's own"
        )
    raise ValueError(message)
