"""What in timm's models refuses sizes of images, though the mixers take them all."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed_nhwc
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor

from vitarium.zoo.swap import adapt


@adapt(
    "timm.layers.patch_embed.PatchEmbed",
    mixer="",
    needs=("proj", "norm", "flatten", "output_fmt", "patch_size"),
)
def patch_embed(embed: Any, x: Tensor) -> Tensor:
    """Patches of an image of any size, padded with zeros right and bottom to whole ones."""
    below, right = (-length % patch for length, patch in zip(x.shape[-2:], embed.patch_size))
    x = embed.proj(F.pad(x, (0, right, 0, below)) if below or right else x)
    if embed.flatten:
        x = x.flatten(2).transpose(1, 2)
    elif embed.output_fmt == "NHWC":
        x = x.permute(0, 2, 3, 1)
    return embed.norm(x)


_VOLO = "timm.models.volo.VOLO"
_NEEDS = ("network", "pos_embed", "pos_drop", "stage_ends", "post_network", "norm")


@torch.fx.wrap  # one node to torch.fx: it looks at sizes in Python
def positions_of(x: Tensor, pos_embed: Tensor) -> Tensor:
    """A map of positions `(1, H, W, C)`, interpolated to the map x as timm does for a new size."""
    return resample_abs_pos_embed_nhwc(pos_embed, [x.shape[1], x.shape[2]])


def _volo_block(model: Any, index: int, x: Tensor) -> Tensor:
    """One entry of VOLO's network; positions are added before the third."""
    if index == 2 and model.pos_embed is not None:
        x = model.pos_drop(x + positions_of(x, model.pos_embed))
    block = model.network[index]
    return checkpoint(block, x) if model.grad_checkpointing else block(x)


@adapt(_VOLO, method="forward_tokens", mixer="", needs=_NEEDS)
def volo_tokens(model: Any, x: Tensor) -> Tensor:
    """All stages of VOLO, of a channels-last map of any size: tokens `(B, N, C)`."""
    for index in range(len(model.network)):
        x = _volo_block(model, index, x)
    return x.flatten(1, 2)


@adapt(_VOLO, method="forward_intermediates", mixer="", needs=_NEEDS)
def volo_intermediates(
    model: Any,
    x: Tensor,
    indices: int | list[int] | None = None,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
    """What VOLO's own returns, of images of any size."""
    if output_fmt != "NCHW":
        raise ValueError(f"output_fmt={output_fmt!r} is unknown; allowed is 'NCHW'")
    stages, last = feature_take_indices(len(model.stage_ends), indices)
    wanted = {model.stage_ends[stage] for stage in stages}
    count = model.stage_ends[last] + 1 if stop_early else len(model.network)
    x = model.patch_embed(x).permute(0, 2, 3, 1)
    maps = []
    for index in range(min(count, len(model.network))):
        x = _volo_block(model, index, x)
        if index in wanted:
            maps.append((model.norm(x) if norm and index >= 2 else x).permute(0, 3, 1, 2))
    if intermediates_only:
        return maps
    if count == len(model.network):
        x = x.flatten(1, 2)
        x = model.norm(x if model.post_network is None else model.forward_cls(x))
    return x, maps
