"""What in timm's models refuses sizes of images, though the mixers take them all."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
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
