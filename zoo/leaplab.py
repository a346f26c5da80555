"""What the models of Agent attention and of InLine share: addresses and the authors' evaluation."""

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from vitarium.zoo import cswin, deit, pvt, swin
from vitarium.zoo.registry import CheckpointFilter, Published, imagenet_cfg, register_family

Checkpoints = Mapping[str, tuple[str, Published]]

_CLOUD = "https://cloud.tsinghua.edu.cn/f"


@dataclass(frozen=True)
class Host:
    """A network whose attention the papers replace.

    Attributes:
        checkpoint_filter_fn: maps official state-dict keys to ours.
        first_conv, classifier: names of these layers.
        stride: pixels per token of the last map, along each axis; None for models of sequences.
        out_indices: stages that `features_only=True` returns unless told otherwise.
    """

    checkpoint_filter_fn: CheckpointFilter
    first_conv: str
    classifier: str = "head.fc"
    stride: int | None = 32
    out_indices: tuple[int, ...] = (0, 1, 2, 3)


HOSTS = {
    "deit": Host(
        deit.checkpoint_filter_fn,
        "patch_embed.proj",
        classifier="head",
        stride=None,
        out_indices=(2, 5, 8, 11),
    ),
    "pvt": Host(pvt.checkpoint_filter_fn, "stem.proj"),
    "swin": Host(swin.checkpoint_filter_fn, "stem.proj"),
    "cswin": Host(cswin.checkpoint_filter_fn, "stem.conv"),
}


def register_paper(
    module: str, variants: Mapping[str, Mapping[str, Callable[..., nn.Module]]], **paper: Any
) -> None:
    """Register a paper's models.

    Args:
        module: the paper's module.
        variants: by the host's name and the registered one, what makes the model.
        paper: arguments of `_register_host` that all hosts have in common.
    """
    for name, models in variants.items():
        _register_host(module, models, HOSTS[name], **paper)


def _register_host(
    module: str,
    variants: Mapping[str, Callable[..., nn.Module]],
    host: Host,
    *,
    checkpoints: Checkpoints,
    whole: Set[str],
    repository: str,
    paper: Mapping[str, str],
) -> None:
    """Register a paper's models of one host.

    Images are resized to squares whatever their shape, then cropped, as in the official evaluation.

    Args:
        module, variants: as of `register_paper`, of the host.
        host: the network.
        checkpoints: by registered name, the last part of the checkpoint's address and the figures;
            models that are not in it have none.
        whole: names of models that see whole images, not cropped ones.
        repository: the official one.
        paper: entries of timm's configurations that name it.
    """
    default_cfgs, published = {}, {}
    for name in variants:
        address, figures = checkpoints.get(name, (None, None))
        suffix = re.search(r"_(\d+)$", name)
        size = figures.resolution if figures else int(suffix[1]) if suffix else 224
        if figures:
            published[f"{name}.in1k"] = figures
        cfg = {
            "crop_pct": 1.0 if name in whole else 0.875,
            "crop_mode": "squash",
            "license": "none stated",
            "origin_url": f"{_CLOUD}/{address}/?dl=1" if address else repository,
            "description": _description(address, repository),
            "first_conv": host.first_conv,
            "classifier": host.classifier,
            **paper,
        }
        default_cfgs[f"{name}.in1k" if figures else name] = imagenet_cfg(
            size, stride=host.stride, **cfg
        )
    register_family(
        module,
        variants,
        default_cfgs=default_cfgs,
        published=published,
        checkpoint_filter_fn=partial(_in_our_shapes, host.checkpoint_filter_fn),
        out_indices=host.out_indices,
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
