"""CrossFormer and CrossFormer++: embeddings of several scales, attention near and far in turn.

Wang et al., "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention" (arXiv
2108.00154, ICLR 2022). Wang et al., "CrossFormer++: A Versatile Vision Transformer Hinging on
Cross-scale Attention" (arXiv 2303.06908, TPAMI 2023).
Code and checkpoints (MIT): https://github.com/cheerss/CrossFormer
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitarium.ops.projection import plain
from vitarium.zoo.checkpoint import backbone_entries
from vitarium.zoo.parts import Block
from vitarium.zoo.pyramid import Pyramid
from vitarium.zoo.registry import Published, imagenet_cfg, register_family


@register_notrace_module  # one node to torch.fx: its size arithmetic is Python
class CrossScaleEmbedding(nn.Module):
    """Convolutions of several kernel sizes around the same places, `(B, C, H, W) -> NHWC`.

    Their outputs stand side by side, half of the channels from the smallest kernel, a quarter from
    the next, and so on (CrossFormer, section 3.1). Of a map that the stride does not divide, the
    smallest kernel leaves out the last rows or columns, as in the official code for detection; a
    map smaller than the stride is padded with zeros.

    Args:
        dim_in, dim_out: channels.
        kernel_sizes: from the smallest, which is the stride, to the largest.
    """

    def __init__(self, dim_in: int, dim_out: int, kernel_sizes: Sequence[int]) -> None:
        super().__init__()
        self.stride = kernel_sizes[0]
        last = len(kernel_sizes) - 1
        self.convs = nn.ModuleList(
            nn.Conv2d(
                dim_in,
                dim_out // 2 ** min(i + 1, last),
                kernel_size,
                stride=self.stride,
                padding=(kernel_size - self.stride) // 2,
            )
            for i, kernel_size in enumerate(kernel_sizes)
        )

    def forward(self, x: Tensor) -> Tensor:
        missing = [max(0, self.stride - length) for length in x.shape[2:]]
        if any(missing):
            x = F.pad(x, (0, missing[1], 0, missing[0]))
        return torch.cat([_convolved(conv, x).permute(0, 2, 3, 1) for conv in self.convs], -1)


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)`; where its gradient is slow, as a small kernel on patches of many channels."""
    size, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    slow = conv.in_channels < stride**2 <= size
    if not (slow and torch.is_grad_enabled() and plain(conv, nn.Conv2d) and len(x)):
        return conv(x)
    after = [length // stride * stride + padding - length for length in x.shape[2:]]
    x = F.pad(x, (padding, after[1], padding, after[0]))
    weight = F.pixel_unshuffle(conv.weight, stride)
    return F.conv2d(F.pixel_unshuffle(x, stride), weight, conv.bias)


class CrossScaleStem(nn.Module):
    """Patches of several sizes at every fourth pixel and a norm, `(B, C, H, W) -> NHWC`.

    Args:
        in_chans: channels of the image.
        dim: channels of the map.
        kernel_sizes: sides of the patches.
    """

    def __init__(
        self, in_chans: int, dim: int, kernel_sizes: Sequence[int] = (4, 8, 16, 32)
    ) -> None:
        super().__init__()
        self.embed = CrossScaleEmbedding(in_chans, dim, kernel_sizes)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.embed(x))


class CrossScaleMerging(nn.Module):
    """A norm, then convolutions of several kernel sizes that halve a channels-last map.

    Args:
        dim_in, dim_out: channels.
        kernel_sizes: sides of the kernels.
    """

    def __init__(self, dim_in: int, dim_out: int, kernel_sizes: Sequence[int] = (2, 4)) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim_in)
        self.embed = CrossScaleEmbedding(dim_in, dim_out, kernel_sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.norm(x).permute(0, 3, 1, 2))


class CoolingBlock(Block):
    """A block and the amplitude cooling layer of CrossFormer++ (arXiv 2303.06908).

    That is a 3x3 depthwise convolution and a norm, without a way around them.

    Args: as of `Block`.
    """

    def __init__(self, dim: int, mixer: nn.Module, **kwargs: Any) -> None:
        super().__init__(dim, mixer, **kwargs)
        self.cooling_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.cooling_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.cooling_norm(self.cooling_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def crossformer(
    *,
    embed_dim: int,
    depths: Sequence[int],
    group_size: Sequence[int | Sequence[int]] = (7, 7, 7, 7),
    interval: Sequence[int] = (8, 4, 2, 1),
    adaptive_interval: bool = False,
    mlp_ratio: float = 4.0,
    head_dim: int = 32,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    kernel_sizes: Sequence[int] = (4, 8, 16, 32),
    merge_kernel_sizes: Sequence[int] = (2, 4),
    **kwargs: Any,
) -> Pyramid:
    """CrossFormer: blocks attend within groups of near tokens and of distant ones in turn.

    The official backbones for detection and segmentation have groups and intervals of their own
    for some networks; they compute the same on maps that are square.

    Args:
        embed_dim: channels of the first stage, a multiple of `head_dim`; they double per stage.
        depths: blocks per stage.
        group_size: per stage, the side of a group of tokens, or one for each of its blocks.
        interval: per stage, the distance between tokens of a group of distant ones.
        adaptive_interval: make the distance so large that groups span the map.
        mlp_ratio: hidden width of the feed-forward networks over the stage's channels.
        head_dim: channels per attention head.
        qkv_bias: biases of the query, key and value projections.
        qk_scale: factor on the scores; `head_dim ** -0.5` if None.
        kernel_sizes: patches of the stem, from the smallest, its stride.
        merge_kernel_sizes: kernels between stages, from the smallest, 2.
        kwargs: further arguments of `Pyramid`, which win over those set here.
    """
    dims = [embed_dim * 2**i for i in range(len(depths))]
    shared = {
        "qkv_bias": qkv_bias,
        "qk_scale": qk_scale,
        "adaptive_interval": adaptive_interval,
        "dense_prediction": True,
    }
    mixers = []
    for stage, (dim, depth) in enumerate(zip(dims, depths)):
        sizes = group_size[stage]
        sizes = [sizes] * depth if isinstance(sizes, int) else sizes
        common = {**shared, "num_heads": dim // head_dim, "interval": interval[stage]}
        mixers.append(
            [
                ("long_short_distance", {**common, "group_size": size, "lsda_flag": i % 2})
                for i, size in enumerate(sizes)
            ]
        )
    arguments = {
        "stem": partial(CrossScaleStem, kernel_sizes=kernel_sizes),
        "downsample": partial(CrossScaleMerging, kernel_sizes=merge_kernel_sizes),
        "block": partial(Block, mlp_ratio=mlp_ratio),
        "dims": dims,
        "mixers": mixers,
        "stem_stride": kernel_sizes[0],
    }
    return Pyramid(depths=depths, **{**arguments, **kwargs})


def crossformer_pp(
    *,
    depths: Sequence[int],
    group_size: Sequence[int | Sequence[int]] = (4, 4, 14, 7),
    interval: Sequence[int] = (4, 2, 1, 1),
    mlp_ratio: float = 4.0,
    **kwargs: Any,
) -> Pyramid:
    """CrossFormer++: groups grow from stage to stage; every third block cools its amplitudes.

    The last block of a stage never does.

    Args: as of `crossformer`.
    """
    plain, cooling = partial(Block, mlp_ratio=mlp_ratio), partial(CoolingBlock, mlp_ratio=mlp_ratio)
    block = [[cooling if i % 3 == 2 and i < n - 1 else plain for i in range(n)] for n in depths]
    return crossformer(
        depths=depths,
        group_size=group_size,
        interval=interval,
        **{"block": block, **kwargs},
    )


_tiny = partial(crossformer, embed_dim=64, depths=(1, 1, 8, 6), drop_path_rate=0.1)
_small = partial(crossformer, embed_dim=96, depths=(2, 2, 6, 2), drop_path_rate=0.2)
_base = partial(crossformer, embed_dim=96, depths=(2, 2, 18, 2), drop_path_rate=0.3)
_large = partial(crossformer, embed_dim=128, depths=(2, 2, 18, 2), drop_path_rate=0.5)
_pp_small = partial(crossformer_pp, embed_dim=64, depths=(2, 2, 18, 2), drop_path_rate=0.2)
_pp_base = partial(crossformer_pp, embed_dim=96, depths=(2, 2, 18, 2), drop_path_rate=0.3)
_pp_large = partial(crossformer_pp, embed_dim=128, depths=(2, 2, 18, 2), drop_path_rate=0.5)
_pp_huge = partial(crossformer_pp, embed_dim=128, depths=(6, 6, 18, 2), drop_path_rate=0.5)

# Per model: how it is built, the page of its checkpoint, and the figures of the official
# repository. The repository gives one page for the large and the huge network.
_DRIVE, _BAIDU = "https://drive.google.com/file/d", "https://pan.baidu.com/s"
MODELS: dict[str, tuple[Callable[..., Pyramid], str, Published]] = {
    "crossformer_tiny": (
        _tiny,
        f"{_DRIVE}/1YSkU9enn-ITyrbxLH13zNcBYvWSEidfq/view",
        Published(81.5, 27.8, 2.9, 224),
    ),
    "crossformer_small": (
        _small,
        f"{_DRIVE}/1RAkigsgr33va0RZ85S2Shs2BhXYcS6U8/view",
        Published(82.5, 30.7, 4.9, 224),
    ),
    "crossformer_base": (
        _base,
        f"{_DRIVE}/1bK8biVCi17nz_nkt7rBfio_kywUpllSU/view",
        Published(83.4, 52.0, 9.2, 224),
    ),
    "crossformer_large": (
        _large,
        f"{_DRIVE}/1zRWByVW_KIZ87NgaBkDIm60DAsGJErdG/view",
        Published(84.0, 92.0, 16.1, 224),
    ),
    "crossformer_pp_small": (
        _pp_small,
        f"{_BAIDU}/1smc_kRoogd0Ig5vfqwuGTA?pwd=crsf",
        Published(83.2, 23.3, 4.9, 224),
    ),
    "crossformer_pp_base": (
        _pp_base,
        f"{_BAIDU}/13XVP0ebtNcyRMmkl11ALYg?pwd=crsf",
        Published(84.2, 52.0, 9.5, 224),
    ),
    "crossformer_pp_large": (
        _pp_large,
        f"{_BAIDU}/1xtPh-ndcOxRM7fPYYxIIRg?pwd=crsf",
        Published(84.7, 92.0, 16.6, 224),
    ),
    "crossformer_pp_huge": (
        _pp_huge,
        f"{_BAIDU}/1xtPh-ndcOxRM7fPYYxIIRg?pwd=crsf",
        Published(84.9, 96.0, 21.8, 224),
    ),
}


def _default_cfg(name: str) -> dict[str, Any]:
    """timm's configuration of a model's checkpoint, which lies behind a page, not at an address."""
    _, page, figures = MODELS[name]
    size = figures.resolution
    paper = "2303.06908" if "_pp_" in name else "2108.00154"
    return imagenet_cfg(
        size,
        first_conv=tuple(f"stem.embed.convs.{i}" for i in range(4)),
        license="mit",
        paper_ids=f"arXiv:{paper}",
        paper_name="CrossFormer++" if "_pp_" in name else "CrossFormer",
        origin_url=page,
        description="The weights are behind a page that no program can download from; "
        "code: https://github.com/cheerss/CrossFormer",
    )


# Patterns of official names, and ours, applied in turn. Official stages end with the downsampler
# that ours begin with.
_NAMES: tuple[tuple[str, Any], ...] = (
    (r"^patch_embed\.projs\.", "stem.embed.convs."),
    (r"^patch_embed\.", "stem."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"\.downsample\.reductions\.", ".downsample.embed.convs."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"(\.blocks\.\d+)\.attn\.", r"\1.mixer."),
    (r"(\.blocks\.\d+)\.ex_conv\.", r"\1.cooling_conv."),
    (r"(\.blocks\.\d+)\.ex_ln\.", r"\1.cooling_norm."),
)
# Tables of older checkpoints, which are computed from sizes.
_TABLES = re.compile(r".*\.(attn_mask|biases|relative_position_index)")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict in official or in our names, in our names.

    Of a detector's or segmenter's checkpoint, the backbone.
    """
    found = {}
    for key, value in backbone_entries(state_dict).items():
        if _TABLES.fullmatch(key):
            continue
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        found[key] = value
    return found


register_family(
    __name__,
    {name: build for name, (build, _, _) in MODELS.items()},
    default_cfgs={f"{name}.in1k": _default_cfg(name) for name in MODELS},
    published={f"{name}.in1k": figures for name, (_, _, figures) in MODELS.items()},
    checkpoint_filter_fn=checkpoint_filter_fn,
)
