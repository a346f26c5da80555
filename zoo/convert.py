"""Official checkpoints as models of ours, whatever the number of classes they were trained for."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import nn

from vitarium.zoo.checkpoint import CheckpointReport, load_checkpoint, mapped_state_dict


def from_checkpoint(
    source: str | Path, model_name: str
) -> tuple[nn.Module, CheckpointReport, dict[str, str]]:
    """A registered model with all the weights of a checkpoint, its classifier's size included.

    Args:
        source: a file or an address, as of `load_checkpoint`.
        model_name: a name that timm knows, with a tag or without.

    Returns:
        The model on the CPU, what was loaded, and what a file of its weights should say of them:
        model, classes, licence and origin.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: timm knows no such model, or the checkpoint does not fit it.
    """
    if not timm.is_model(model_name):
        raise ValueError(f"model {model_name!r} is unknown; vitarium.zoo.list_models() has ours")
    model = timm.create_model(model_name)
    classifier = _classifier_weight(model)
    with torch.no_grad():
        weight = mapped_state_dict(model, source).get(classifier)
        if weight is not None and weight.dim() == 2 and len(weight) != model.num_classes:
            model.reset_classifier(len(weight))
    report = load_checkpoint(model, source)
    cfg = model.pretrained_cfg
    metadata = {
        "format": "pt",
        "architecture": model_name.split(".")[0],
        "num_classes": str(model.num_classes),
        "license": cfg.get("license") or "none stated",
        "origin_url": cfg.get("origin_url") or "",
    }
    return model.eval(), report, metadata


def _classifier_weight(model: nn.Module) -> str:
    names = model.pretrained_cfg.get("classifier") or ""
    return f"{names if isinstance(names, str) else names[0]}.weight"
