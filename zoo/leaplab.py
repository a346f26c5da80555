"""What the models of Agent attention and of InLine share: addresses and the authors' evaluation."""

import re
from collections.abc import Callable, Mapping, Set
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vitarium.zoo.registry import CheckpointFilter, Published, register_family

Checkpoints = Mapping[str, tuple[str, Published]]

_CLOUD = "https://cloud.tsinghua.edu.cn/f"


def register_host(
    module: str,
    variants: Mapping[str, Callable[..., nn.Module]],
    *,
    checkpoints: Checkpoints,
    whole: Set[str],
    repository: str,
    checkpoint_filter_fn: CheckpointFilter,
    configuration: Mapping[str, Any],
    stride: int | None = 32,
    out_indices: tuple[int, ...] = (0, 1, 2, 3),
) -> None:
    """Register a paper's models of one host network.

    Images are resized to squares whatever their shape, then cropped, as in the official evaluation.

    Args:
        module: the paper's module.
        variants: by registered name, what makes the model.
        checkpoints: by registered name, the last part of the checkpoint's address and the figures;
            models that are not in it have none.
        whole: names of models that see whole images, not cropped ones.
        repository: the official one.
        checkpoint_filter_fn: maps official state-dict keys to ours.
        configuration: further entries of timm's configurations, those of the paper and the host.
        stride: pixels per token of the last map, along each axis; None for models of sequences.
        out_indices: stages that `features_only=True` returns unless told otherwise.
    """
    default_cfgs, published = {}, {}
    for name in variants:
        address, figures = checkpoints.get(name, (None, None))
        suffix = re.search(r"_(\d+)$", name)
        size = figures.resolution if figures else int(suffix[1]) if suffix else 224
        if figures:
            published[f"{name}.in1k"] = figures
        default_cfgs[f"{name}.in1k" if figures else name] = {
            "num_classes": 1000,
            "input_size": (3, size, size),
            "pool_size": (size // stride, size // stride) if stride else None,
            "crop_pct": 1.0 if name in whole else 0.875,
            "crop_mode": "squash",
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "license": "none stated",
            "origin_url": f"{_CLOUD}/{address}/?dl=1" if address else repository,
            "description": _description(address, repository),
            **configuration,
        }
    register_family(
        module,
        variants,
        default_cfgs=default_cfgs,
        published=published,
        checkpoint_filter_fn=partial(_in_our_shapes, checkpoint_filter_fn),
        out_indices=out_indices,
    )


def _in_our_shapes(
    rename: CheckpointFilter, state_dict: dict[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """The renamed state dict, without an axis that agents' biases of rows and columns have more."""
    return {
        key: value.squeeze(0)
        if re.search(r"\.(ah|aw|ha|wa)_bias$", key) and value.ndim == 5
        else value
        for key, value in rename(state_dict, model).items()
    }


def _description(address: str | None, repository: str) -> str:
    if address is None:
        return f"No weights are published. Code: {repository}"
    return (
        "The weights have no licence and an address that names no file: they are not downloaded, "
        f"but load from a file. Code: {repository}"
    )
