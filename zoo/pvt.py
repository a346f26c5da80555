"""The host of Agent-PVT and InLine-PVT: PVT's patches and position embeddings, any mixer.

Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without
Convolutions" (arXiv 2102.12122, ICCV 2021), as the two papers use it: without class token and
without a norm before the head.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from vitarium.zoo.checkpoint import backbone_entries
from vitarium.zoo.parts import Block, PatchConv
from vitarium.zoo.pyramid import Pyramid

_PATCH_SIZE = 4  # pixels per patch of the stem; every later stage has patches of 2 x 2


class Patches(nn.Module):
    """Patches that do not overlap, a norm, and a position embedding that is learned.

    The embedding belongs to a square map and is interpolated to any other, bilinearly as in the
    official code.

    Args:
        dim_in, dim_out: channels of the map before and after.
        patch_size: side of a patch.
        map_size: side of the map of patches that the embedding belongs to.
    """

    def __init__(self, dim_in: int, dim_out: int, *, patch_size: int = 2, map_size: int) -> None:
        super().__init__()
        self.proj = PatchConv(dim_in, dim_out, patch_size)
        self.norm = nn.LayerNorm(dim_out)
        self.pos_embed = nn.Parameter(torch.empty(1, map_size, map_size, dim_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the embedding anew; the layers have their own `reset_parameters`."""
        trunc_normal_(self.pos_embed, std=0.02)

    def embedding(self, height: int, width: int) -> Tensor:
        """The position embedding of a map, `(1, H, W, C)`."""
        if (height, width) == self.pos_embed.shape[1:3]:
            return self.pos_embed
        table = self.pos_embed.permute(0, 3, 1, 2)
        return F.interpolate(table, size=(height, width), mode="bilinear").permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H', W', dim_out)` of a map `(B, H, W, dim_in)`."""
        x = self.norm(self.proj(x))
        return x + self.embedding(x.shape[1], x.shape[2])


class Stem(Patches):
    """Patches of the image, `(B, C, H, W) -> NHWC`."""

    def embedding(self, height: int, width: int) -> Tensor:
        # The official code tells maps by their number of patches: another map with as many gets
        # the embedding row by row, not interpolated. Its outputs are kept.
        if height * width == self.pos_embed.shape[1:3].numel():
            return self.pos_embed.view(1, height, width, -1)
        return super().embedding(height, width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1))


for _part in (Stem, Patches):
    register_notrace_module(_part)  # one node to torch.fx: its size arithmetic is Python


def map_sizes(img_size: int, stages: int = 4) -> list[int]:
    """Sides of the maps of a square image, per stage."""
    return [img_size // (_PATCH_SIZE * 2**i) for i in range(stages)]


def pvt(
    *,
    mixers: Sequence[Any],
    depths: Sequence[int],
    embed_dims: Sequence[int] = (64, 128, 320, 512),
    mlp_ratios: Sequence[float] = (8, 8, 4, 4),
    img_size: int = 224,
    **kwargs: Any,
) -> Pyramid:
    """A pyramid vision transformer.

    Args:
        mixers: per stage a mixer spec, see `Pyramid`.
        depths: blocks per stage.
        embed_dims: channels per stage.
        mlp_ratios: per stage, hidden width of the feed-forward networks over the channels.
        img_size: side of the square image whose maps the position embeddings belong to; images of
            other sizes are taken too.
        kwargs: further arguments of `Pyramid`, which win over those set here.
    """
    norm = partial(nn.LayerNorm, eps=1e-6)
    first, *sizes = map_sizes(img_size, len(depths))
    arguments = {
        "stem": partial(Stem, patch_size=_PATCH_SIZE, map_size=first),
        "downsample": [None, *(partial(Patches, map_size=size) for size in sizes)],
        "block": [partial(Block, mlp_ratio=ratio, norm_layer=norm) for ratio in mlp_ratios],
        "norm_layer": nn.Identity,
        "stem_stride": _PATCH_SIZE,
    }
    return Pyramid(dims=embed_dims, depths=depths, mixers=mixers, **{**arguments, **kwargs})


def _rename(key: str) -> str:
    """Our name of an official parameter; other names, ours among them, as they are."""

    def patches(match: re.Match[str]) -> str:
        stage = int(match[1]) - 1
        return f"stages.{stage}.downsample." if stage else "stem."

    def blocks(match: re.Match[str]) -> str:
        return f"stages.{int(match[1]) - 1}.blocks."

    key = re.sub(r"^pos_embed(\d)$", r"patch_embed\1.pos_embed", key)
    key = re.sub(r"^patch_embed(\d)\.", patches, key)
    key = re.sub(r"^block(\d)\.", blocks, key)
    key = re.sub(r"^(stages\.\d\.blocks\.\d+)\.attn\.", r"\1.mixer.", key)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict in official or in our names, in our names.

    Official queries apart from keys and values are joined where the mixer projects all at once.
    """
    mapped = {_rename(key): value for key, value in backbone_entries(state_dict).items()}
    own = model.state_dict()
    for key, value in list(mapped.items()):
        names = [key.replace(".mixer.q.", f".mixer.{name}.") for name in ("qkv", "q", "kv")]
        if ".mixer.q." in key and names[0] in own and names[2] in mapped:
            mapped[names[0]] = torch.cat([mapped.pop(name) for name in names[1:]])
        if key.endswith(".pos_embed") and value.ndim == 3:
            side = int(value.shape[1] ** 0.5)
            mapped[key] = value.unflatten(1, (side, side))
    return mapped
