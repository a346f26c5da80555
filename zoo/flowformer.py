"""Flowformer for vision: flow attention in four stages of patches.

Wu et al., "Flowformer: Linearizing Transformers with Conservation Flows" (arXiv 2202.06258, ICML
2022). Code and checkpoint (MIT): https://github.com/thuml/Flowformer, folder Flowformer_CV.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, to_2tuple, trunc_normal_
from torch import Tensor, nn

from vitarium.zoo.parts import Block, PatchConv
from vitarium.zoo.pyramid import Pyramid
from vitarium.zoo.registry import Published, imagenet_cfg, register_family

_LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)
_PATCH = 4  # pixels along each axis


def _resized(table: Tensor, size: tuple[int, int]) -> Tensor:
    """A table of position embeddings, `(1, H, W, C)`, interpolated to another size of map."""
    if tuple(table.shape[1:3]) == size:
        return table
    exact = table.to(torch.promote_types(table.dtype, torch.float32))  # CPUs have no kernel below
    resized = F.interpolate(exact.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).to(table.dtype)


class PositionStem(nn.Module):
    """Patches of 4x4 pixels plus an embedding of their positions, `(B, C, H, W) -> NHWC`.

    The table of embeddings is interpolated to maps of other sizes than its own.

    Args:
        in_chans: channels of the image.
        dim: channels of the map.
        img_size: height and width of the images that the table has an entry per patch of.
    """

    no_weight_decay = ("pos_embed",)

    def __init__(self, in_chans: int, dim: int, img_size: int | tuple[int, int] = 224) -> None:
        super().__init__()
        self.conv = PatchConv(in_chans, dim, _PATCH)
        size = [max(1, length // _PATCH) for length in to_2tuple(img_size)]
        self.pos_embed = nn.Parameter(torch.empty(1, *size, dim))

    def reset_parameters(self) -> None:
        """Draw the table anew; the convolution has a `reset_parameters` of its own."""
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 2, 3, 1))
        return x + _resized(self.pos_embed, (x.shape[1], x.shape[2]))


register_notrace_module(PositionStem)


def _block(dim: int, mixer: nn.Module, *, layer_scale: float, **kwargs: Any) -> Block:
    """A block with layer scale in the feed-forward branch alone."""
    block = Block(dim, mixer, layer_scale=layer_scale, norm_layer=_LAYER_NORM, **kwargs)
    block.ls1 = nn.Identity()
    return block


def flowformer(
    *,
    embed_dim: int = 96,
    depths: Sequence[int] = (3, 3, 10, 3),
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    layer_scale: float = 1e-5,
    img_size: int | tuple[int, int] = 224,
    **kwargs: Any,
) -> Pyramid:
    """Flowformer: patches and flow attention in every stage.

    Args:
        embed_dim: channels of the first stage, a multiple of `num_heads`; they double per stage.
        depths: blocks per stage.
        num_heads: attention heads, as many in every stage.
        mlp_ratio: hidden width of the feed-forward networks over the stage's channels.
        layer_scale: initial layer scale of the feed-forward branches.
        img_size: height and width of the images that the position embedding is made for; images
            of other sizes have it interpolated.
        kwargs: further arguments of `Pyramid`, which win over those set here.
    """
    arguments = {
        "stem": partial(PositionStem, img_size=img_size),
        "downsample": PatchConv,
        "block": partial(_block, mlp_ratio=mlp_ratio, layer_scale=layer_scale),
        "dims": [embed_dim * 2**i for i in range(len(depths))],
        "mixers": [("flow", {"num_heads": num_heads})] * len(depths),
        "norm_layer": _LAYER_NORM,
        "drop_path_rate": 0.2,
    }
    return Pyramid(depths=depths, **{**arguments, **kwargs})


VARIANTS: dict[str, Callable[..., Pyramid]] = {"flowformer_cv": flowformer}

_CFG = imagenet_cfg(
    224,
    origin_url="https://cloud.tsinghua.edu.cn/d/82d93375f97f4ca58886/",
    description="The authors publish this checkpoint on a drive's page; load the file from it.",
    first_conv="stem.conv",
    license="mit",
    paper_ids="arXiv:2202.06258",
    paper_name="Flowformer: Linearizing Transformers with Conservation Flows",
)


def _rename(key: str) -> str:
    """Our name of an official parameter; other names, ours among them, as they are."""
    key = re.sub(r"^patch_embed\.0\.proj\.", "stem.conv.", key)
    key = re.sub(r"^patch_embed\.(\d+)\.proj\.", r"stages.\1.downsample.", key)
    key = re.sub(r"^pos_embed$", "stem.pos_embed", key)
    key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
    key = re.sub(r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
    key = re.sub(r"^(stages\.\d+\.blocks\.\d+)\.attn\.", r"\1.mixer.", key)
    return re.sub(r"^(stages\.\d+\.blocks\.\d+)\.gamma$", r"\1.ls2.gamma", key)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict in official or in our names, in our names.

    Counters of operations, which checkpoints hold besides parameters, are dropped. Position
    embeddings, a row of tokens in the official code, become a map of the model's size.
    """
    renamed = {
        _rename(key): value
        for key, value in state_dict.items()
        if not key.endswith(("total_ops", "total_params"))
    }
    table = renamed.get("stem.pos_embed")
    if table is not None:
        if table.dim() == 3:  # the official code takes square images alone
            side = round(table.shape[1] ** 0.5)
            table = table.unflatten(1, (side, -1))
        renamed["stem.pos_embed"] = _resized(table, tuple(model.stem.pos_embed.shape[1:3]))
    return renamed


register_family(
    __name__,
    VARIANTS,
    default_cfgs={"flowformer_cv.in1k": _CFG},
    published={"flowformer_cv.in1k": Published(80.6, 41, 6.3, 224)},
    checkpoint_filter_fn=checkpoint_filter_fn,
)
