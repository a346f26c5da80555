"""NAT, DiNAT and DiNAT_s, and their isotropic relatives: neighborhood attention backbones.

Hassani et al., "Neighborhood Attention Transformer" (arXiv 2204.07143, CVPR 2023).
Hassani and Shi, "Dilated Neighborhood Attention Transformer" (arXiv 2209.15001).
Code and checkpoints (MIT): https://github.com/SHI-Labs/Neighborhood-Attention-Transformer
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from vitarium.zoo.parts import Block, ConvDownsample, ConvStem, patch_stem
from vitarium.zoo.pyramid import Pyramid
from vitarium.zoo.registry import Published, imagenet_cfg, register_family


def _neighborhood(num_heads: int, kernel_size: int, dilations: Sequence[int]) -> list[Any]:
    """Mixer specs that differ in dilation, for blocks that take them in turn."""
    shared = {"num_heads": num_heads, "kernel_size": kernel_size}
    return [("neighborhood", {**shared, "dilation": dilation}) for dilation in dilations]


def nat(
    *,
    embed_dim: int,
    depths: Sequence[int],
    mlp_ratio: float,
    kernel_size: int = 7,
    dilations: Sequence[int] = (1, 1, 1, 1),
    head_dim: int = 32,
    layer_scale: float | None = None,
    **kwargs: Any,
) -> Pyramid:
    """NAT and DiNAT: overlapping convolutions as stem and between stages.

    Args:
        embed_dim: channels of the first stage, a multiple of `head_dim`; they double per stage.
        depths: blocks per stage.
        mlp_ratio: hidden width of the feed-forward networks over the stage's channels.
        kernel_size: width of the square window.
        dilations: per stage, the dilation of every second block; the others have dilation 1.
        head_dim: channels per attention head.
        layer_scale: initial layer scale; None for none.
        kwargs: further arguments of `Pyramid`, which win over those set here.
    """
    dims = [embed_dim * 2**i for i in range(len(depths))]
    arguments = {
        "stem": ConvStem,
        "downsample": ConvDownsample,
        "block": partial(Block, mlp_ratio=mlp_ratio, layer_scale=layer_scale),
        "dims": dims,
        "mixers": [
            _neighborhood(dim // head_dim, kernel_size, (1, d)) for dim, d in zip(dims, dilations)
        ],
    }
    return Pyramid(depths=depths, **{**arguments, **kwargs})


def dinat_s(
    *,
    embed_dim: int,
    depths: Sequence[int],
    mlp_ratio: float = 4.0,
    kernel_size: int = 7,
    dilations: Sequence[int] = (8, 4, 2, 1),
    **kwargs: Any,
) -> Pyramid:
    """DiNAT_s: Swin's patches and patch merging around dilated neighborhood attention.

    Args: as of `nat`.
    """
    return nat(
        embed_dim=embed_dim,
        depths=depths,
        mlp_ratio=mlp_ratio,
        kernel_size=kernel_size,
        dilations=dilations,
        **{"stem": patch_stem, "downsample": PatchMerging, **kwargs},
    )


def isotropic(
    *,
    embed_dim: int,
    mixers: Sequence[Any],
    depth: int = 12,
    patch_size: int = 16,
    mlp_ratio: float = 4.0,
    **kwargs: Any,
) -> Pyramid:
    """A plain vision transformer on a map, without class token and position embedding.

    Every block is a stage, so that features can be taken after each of them. timm's
    VisionTransformer does not serve: it hands its attention layer a sequence of tokens without
    the height and width that a mixer needs.

    Args:
        embed_dim: channels.
        mixers: specs that the blocks take in turn.
        depth: number of blocks.
        patch_size: pixels per patch along each axis.
        mlp_ratio: hidden width of the feed-forward networks over `embed_dim`.
        kwargs: further arguments of `Pyramid`, which win over those set here.
    """
    arguments = {
        "stem": partial(patch_stem, patch_size=patch_size),
        "downsample": None,
        "block": partial(Block, mlp_ratio=mlp_ratio),
        "stem_stride": patch_size,
    }
    return Pyramid(
        dims=(embed_dim,) * depth,
        depths=(1,) * depth,
        mixers=[mixers[i % len(mixers)] for i in range(depth)],
        **{**arguments, **kwargs},
    )


_mini = partial(nat, embed_dim=64, depths=(3, 4, 6, 5), mlp_ratio=3.0, drop_path_rate=0.2)
_tiny = partial(_mini, depths=(3, 4, 18, 5))
_small = partial(nat, embed_dim=96, depths=(3, 4, 18, 5), mlp_ratio=2.0, drop_path_rate=0.3)
_base = partial(_small, embed_dim=128, drop_path_rate=0.5, layer_scale=1e-5)
_large = partial(_small, embed_dim=192, drop_path_rate=0.35, dilations=(8, 4, 2, 1))
_s_small = partial(dinat_s, embed_dim=96, depths=(2, 2, 18, 2), drop_path_rate=0.3)
_s_large = partial(_s_small, embed_dim=192, drop_path_rate=0.35)
_isotropic_small = partial(isotropic, embed_dim=384, drop_path_rate=0.1)
_isotropic_base = partial(isotropic, embed_dim=768, drop_path_rate=0.4)

# The official factories, by their names. Layer scale is in three of them only.
VARIANTS: dict[str, Callable[..., Pyramid]] = {
    "nat_mini": _mini,
    "nat_tiny": _tiny,
    "nat_small": partial(_small, layer_scale=1e-5),
    "nat_base": _base,
    "dinat_mini": partial(_mini, dilations=(8, 4, 2, 1)),
    "dinat_tiny": partial(_tiny, dilations=(8, 4, 2, 1)),
    "dinat_small": partial(_small, dilations=(8, 4, 2, 1)),
    "dinat_base": partial(_base, dilations=(8, 4, 2, 1)),
    "dinat_large": _large,
    "dinat_large_384": partial(_large, dilations=(13, 6, 3, 1)),
    "dinat_large_384_11x11": partial(_large, kernel_size=11),
    "dinat_large_21k": partial(_large, drop_path_rate=0.2),
    "dinat_large_21k_11x11": partial(_large, drop_path_rate=0.2, kernel_size=11),
    "dinat_s_tiny": partial(dinat_s, embed_dim=96, depths=(2, 2, 6, 2), drop_path_rate=0.2),
    "dinat_s_small": _s_small,
    "dinat_s_base": partial(_s_small, embed_dim=128, drop_path_rate=0.5),
    "dinat_s_large": _s_large,
    "dinat_s_large_384": partial(_s_large, dilations=(13, 6, 3, 1)),
    "dinat_s_large_21k": partial(_s_large, drop_path_rate=0.2),
    "nat_isotropic_small": partial(_isotropic_small, mixers=_neighborhood(12, 7, (1,))),
    "nat_isotropic_base": partial(_isotropic_base, mixers=_neighborhood(24, 7, (1,))),
    "dinat_isotropic_small": partial(_isotropic_small, mixers=_neighborhood(12, 7, (1, 2))),
    "dinat_isotropic_base": partial(_isotropic_base, mixers=_neighborhood(24, 7, (1, 2))),
    "vitrpb_small": partial(
        _isotropic_small, mixers=[("global", {"num_heads": 12, "map_size": 14})]
    ),
    "vitrpb_base": partial(_isotropic_base, mixers=[("global", {"num_heads": 24, "map_size": 14})]),
}

# Per checkpoint: its address, and the figures of the official repository. The ImageNet-22K
# checkpoints come without figures.
_NAT, _DINAT = "nat/checkpoints/CLS", "dinat/checkpoints/imagenet1k"
_22K, _ISOTROPIC = "dinat/checkpoints/imagenet22k", "dinat/checkpoints/isotropic"
CHECKPOINTS: dict[str, tuple[str, Published | None]] = {
    "nat_mini.in1k": (f"{_NAT}/nat_mini.pth", Published(81.8, 20, 2.7, 224)),
    "nat_tiny.in1k": (f"{_NAT}/nat_tiny.pth", Published(83.2, 28, 4.3, 224)),
    "nat_small.in1k": (f"{_NAT}/nat_small.pth", Published(83.7, 51, 7.8, 224)),
    "nat_base.in1k": (f"{_NAT}/nat_base.pth", Published(84.3, 90, 13.7, 224)),
    "dinat_mini.in1k": (f"{_DINAT}/dinat_mini_in1k_224.pth", Published(81.8, 20, 2.7, 224)),
    "dinat_tiny.in1k": (f"{_DINAT}/dinat_tiny_in1k_224.pth", Published(82.7, 28, 4.3, 224)),
    "dinat_small.in1k": (f"{_DINAT}/dinat_small_in1k_224.pth", Published(83.8, 51, 7.8, 224)),
    "dinat_base.in1k": (f"{_DINAT}/dinat_base_in1k_224.pth", Published(84.4, 90, 13.7, 224)),
    "dinat_large.in22k_ft_in1k": (
        f"{_DINAT}/dinat_large_in22k_in1k_224.pth",
        Published(86.6, 200, 30.6, 224),
    ),
    "dinat_large.in22k": (f"{_22K}/dinat_large_in22k_224.pth", None),
    "dinat_large_384.in22k_ft_in1k": (
        f"{_DINAT}/dinat_large_in22k_in1k_384.pth",
        Published(87.4, 200, 89.7, 384),
    ),
    "dinat_large_384_11x11.in22k_ft_in1k": (
        f"{_DINAT}/dinat_large_in22k_in1k_384_11x11.pth",
        Published(87.5, 200, 92.4, 384),
    ),
    "dinat_large_21k.in22k": (f"{_22K}/dinat_large_in22k_224.pth", None),
    "dinat_large_21k_11x11.in22k": (f"{_22K}/dinat_large_in22k_224_11x11interp.pth", None),
    "dinat_s_tiny.in1k": (f"{_DINAT}/dinat_s_tiny_in1k_224.pth", Published(81.8, 28, 4.5, 224)),
    "dinat_s_small.in1k": (f"{_DINAT}/dinat_s_small_in1k_224.pth", Published(83.5, 50, 8.7, 224)),
    "dinat_s_base.in1k": (f"{_DINAT}/dinat_s_base_in1k_224.pth", Published(83.8, 88, 15.4, 224)),
    "dinat_s_large.in22k_ft_in1k": (
        f"{_DINAT}/dinat_s_large_in1k_224.pth",
        Published(86.5, 197, 34.5, 224),
    ),
    "dinat_s_large.in22k": (f"{_22K}/dinat_s_large_in22k_224.pth", None),
    "dinat_s_large_384.in22k_ft_in1k": (
        f"{_DINAT}/dinat_s_large_in1k_384.pth",
        Published(87.4, 197, 101.5, 384),
    ),
    "dinat_s_large_21k.in22k": (f"{_22K}/dinat_s_large_in22k_224.pth", None),
    **{
        f"{name}.in1k": (f"{_ISOTROPIC}/{name}_in1k_224.pth", Published(*figures, 224))
        for name, figures in {
            "nat_isotropic_small": (80.0, 22, 4.3),
            "dinat_isotropic_small": (80.8, 22, 4.3),
            "vitrpb_small": (81.2, 22, 4.6),
            "nat_isotropic_base": (81.6, 86, 16.9),
            "dinat_isotropic_base": (82.1, 86, 16.9),
            "vitrpb_base": (82.5, 86, 17.5),
        }.items()
    },
}


def _default_cfg(name: str, path: str) -> dict[str, Any]:
    """timm's configuration of the checkpoint `name` = "model.tag" at `path` on the authors' site.

    Images are prepared as the official evaluation does: timm's defaults at 224 pixels, and no
    crop margin at 384.
    """
    model, tag = name.split(".")
    is_nat, is_isotropic = model.startswith("nat_"), _ISOTROPIC in path
    size, stride = (384 if "_384" in model else 224), (16 if is_isotropic else 32)
    overlapping = not is_isotropic and not model.startswith("dinat_s_")
    dilated = not is_nat or is_isotropic
    return imagenet_cfg(
        size,
        stride=stride,
        url=f"https://shi-labs.com/projects/{path}",
        num_classes=21841 if tag == "in22k" else 1000,
        crop_pct=1.0 if size == 384 else 0.875,
        first_conv="stem.conv1" if overlapping else "stem.proj",
        license="mit",
        paper_ids="arXiv:2209.15001" if dilated else "arXiv:2204.07143",
        paper_name=f"{'Dilated ' if dilated else ''}Neighborhood Attention Transformer",
        origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    )


def _rename(key: str) -> str:
    """Our name of an official parameter; other names, ours among them, as they are."""
    key = re.sub(r"^patch_embed\.proj\.0\.", "stem.conv1.", key)
    key = re.sub(r"^patch_embed\.proj\.1\.", "stem.conv2.", key)
    key = re.sub(r"^patch_embed\.", "stem.", key)
    key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
    # Official stages end with their downsampler, ours begin with it; NAT's is a convolution.
    key = re.sub(r"^levels\.(\d+)\.downsample\.reduction\.", r"levels.\1.downsample.conv.", key)
    key = re.sub(
        r"^(?:levels|layers)\.(\d+)\.downsample\.",
        lambda match: f"stages.{int(match[1]) + 1}.downsample.",
        key,
    )
    key = re.sub(r"^(?:levels|layers)\.(\d+)\.blocks\.", r"stages.\1.blocks.", key)
    key = re.sub(r"^layers\.(\d+)\.", r"stages.\1.blocks.0.", key)  # isotropic
    key = re.sub(r"^(stages\.\d+\.blocks\.\d+)\.attn\.", r"\1.mixer.", key)
    return re.sub(r"^(stages\.\d+\.blocks\.\d+)\.gamma([12])$", r"\1.ls\2.gamma", key)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict in official or in our names, in our names.

    The index table of the ViT-rpb checkpoints is dropped: it is computed from the map's size.
    """
    return {
        _rename(key): value
        for key, value in state_dict.items()
        if not key.endswith(".relative_position_index")
    }


register_family(
    __name__,
    VARIANTS,
    default_cfgs={name: _default_cfg(name, path) for name, (path, _) in CHECKPOINTS.items()},
    published={name: figures for name, (_, figures) in CHECKPOINTS.items() if figures},
    checkpoint_filter_fn=checkpoint_filter_fn,
)
