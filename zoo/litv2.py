"""LITv2: convolutional stages, then HiLo attention, with deformable token merging in between.

Pan et al., "Fast Vision Transformers with HiLo Attention" (arXiv 2205.13213, NeurIPS 2022).
Pan et al., "Less is More: Pay Less Attention in Vision Transformers" (arXiv 2105.14217), for the
token merging. Code and checkpoints (Apache-2.0): https://github.com/ziplab/LITv2
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, register_notrace_module
from torch import Tensor, nn

from vitarium.ops.dispatch import exporting, plain_aten
from vitarium.ops.mixer import pad_map
from vitarium.ops.projection import Linear, linear
from vitarium.zoo.checkpoint import backbone_entries
from vitarium.zoo.parts import Block, in_turn, patch_stem, second_half
from vitarium.zoo.pyramid import Pyramid
from vitarium.zoo.registry import Published, imagenet_cfg, register_family

HIDDEN_BYTES = 2**22  # of hidden maps, which are slow to come by where they are larger


@register_notrace_module  # one node to torch.fx: how it computes depends on the size
class DepthwiseMlp(nn.Module):
    """A feed-forward network with a 3x3 depthwise convolution before its activation.

    Args:
        dim: channels of a channels-last map.
        hidden_dim: channels of the hidden layer.
        drop: dropout rate after both layers.
    """

    def __init__(self, dim: int, hidden_dim: int, *, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return second_half(self, x)


class ConvBlock(nn.Module):
    """The block of the first stages, without attention: `x + mlp(norm(x))`.

    Args:
        dim: channels.
        mixer: None, where other blocks have their mixer.
        mlp_ratio: width of the hidden layer over `dim`.
        drop_path: rate of stochastic depth.
        proj_drop: dropout rate in the feed-forward network.
    """

    def __init__(
        self,
        dim: int,
        mixer: None = None,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = DepthwiseMlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        modules = self.norm, self.mlp, self.drop_path
        sizes = {"hidden_dim": self.mlp.fc1.out_features, "limit": HIDDEN_BYTES}
        return in_turn(self._fed, x, modules, axes=1, **sizes)

    def _fed(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm(x)))


@register_notrace_module  # one node to torch.fx: its size arithmetic is Python
class DeformableMerging(nn.Module):
    """Deformable token merging: a 2x2 deformable convolution of stride 2, a norm and GELU.

    Every tap of the kernel reads the map (B, H, W, C) at a place that a second 2x2 convolution
    moves it to, by bilinear interpolation, with zeros around the map (Dai et al., arXiv
    1703.06211). An odd last row or column is left out, as in the official code; of a map with one
    row or column, a second one is zeros.

    It computes what `torchvision.ops.deform_conv2d` does. Channels lie together here, so that one
    gathering sum per tap and one matrix product do it, several times as fast on a CPU.

    Args:
        dim_in, dim_out: channels.
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(dim_in, 8, 2, stride=2)  # (y, x) of each tap
        self.weight = nn.Parameter(torch.empty(dim_out, 4 * dim_in))  # of tap, channel
        self.bias = nn.Parameter(torch.empty(dim_out))
        self.norm = nn.BatchNorm2d(dim_out)
        self.act = nn.GELU()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew; the taps start where those of an ordinary convolution are."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -bound, bound)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_map(x, [max(0, 2 - length) for length in x.shape[1:3]])
        offset = self.offset(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = linear(_sampled(x, offset), self.weight, self.bias)
        return self.act(self.norm(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


def _sampled(x: Tensor, offset: Tensor) -> Tensor:
    """What the taps of 2x2 kernels of stride 2 read, `(B, H', W', 4 * C)`.

    Args:
        x: `(B, H, W, C)`, H and W at least 2.
        offset: `(B, H', W', 8)`, row and column that each tap is moved by.
    """
    batch, height, width, channels = x.shape
    if offset.dtype in (torch.float16, torch.bfloat16):
        offset = offset.float()  # they cannot tell places on a large map apart
    rows, columns = offset.shape[1:3]
    tap = torch.arange(4, device=x.device)
    row = 2 * torch.arange(rows, device=x.device)[:, None, None] + tap // 2
    column = 2 * torch.arange(columns, device=x.device)[:, None] + tap % 2
    row, row_weight = _neighbours(row + offset[..., 0::2], height)
    column, column_weight = _neighbours(column + offset[..., 1::2], width)
    image = torch.arange(batch, device=x.device).view(-1, 1, 1, 1, 1, 1) * (height * width)
    place = image + row[..., :, None] * width + column[..., None, :]
    weight = row_weight[..., :, None] * column_weight[..., None, :]
    place, source = place.reshape(-1, 4), x.reshape(-1, channels)
    weight = weight.reshape(-1, 4).to(x.dtype)
    if plain_aten() and not exporting():  # there is no derivative in forward mode of the other
        found = (source[place] * weight[..., None]).sum(1)
    else:
        found = F.embedding_bag(place, source, per_sample_weights=weight, mode="sum")
    return found.view(batch, rows, columns, 4 * channels)


def _neighbours(position: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The two indices around each position and their weights, `(..., 2)`; zero weights outside."""
    first = position.detach().floor()
    fraction = position - first
    index = first.clamp(-2, length).long()
    index = torch.stack([index, index + 1], -1)
    weight = torch.stack([1 - fraction, fraction], -1)
    inside = (index >= 0) & (index < length)
    return index.clamp(0, length - 1), weight * inside


def litv2(
    *,
    embed_dim: int,
    depths: Sequence[int],
    alpha: float = 0.9,
    window_size: int = 2,
    mlp_ratio: float = 4.0,
    head_dim: int = 32,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    **kwargs: Any,
) -> Pyramid:
    """LITv2: two convolutional stages, one of HiLo attention, one of global attention.

    The official backbones for detection and segmentation differ in `window_size`, 2 or 4, and in a
    norm of their features: `feature_norm=nn.LayerNorm` for segmentation, and for detection
    `feature_norm=(None, nn.LayerNorm, nn.LayerNorm, nn.LayerNorm)`.

    Args:
        embed_dim: channels of the first stage, a multiple of `head_dim`; they double per stage.
        depths: blocks per stage.
        alpha: share of low-frequency heads in the third stage.
        window_size: side of the windows there.
        mlp_ratio: hidden width of the feed-forward networks over the stage's channels.
        head_dim: channels per attention head.
        qkv_bias: biases of the query, key and value projections.
        qk_scale: factor on the scores; `head_dim ** -0.5` if None.
        kwargs: further arguments of `Pyramid`, which win over those set here.
    """
    dims = [embed_dim * 2**i for i in range(len(depths))]
    convolution = partial(ConvBlock, mlp_ratio=mlp_ratio)
    transformer = partial(Block, mlp_ratio=mlp_ratio, mlp_layer=DepthwiseMlp)
    shared = {"alpha": alpha, "qkv_bias": qkv_bias, "qk_scale": qk_scale}
    hilo = [
        ("hilo", {**shared, "num_heads": dim // head_dim, "window_size": size})
        for dim, size in zip(dims[2:], (window_size, 1))
    ]
    arguments = {
        "stem": patch_stem,
        "downsample": DeformableMerging,
        "block": (convolution, convolution, transformer, transformer),
        "dims": dims,
        "mixers": (None, None, *hilo),
    }
    return Pyramid(depths=depths, **{**arguments, **kwargs})


_small = partial(litv2, embed_dim=96, depths=(2, 2, 6, 2), drop_path_rate=0.2)
_base = partial(litv2, embed_dim=128, depths=(2, 2, 18, 2), drop_path_rate=0.5)
ALPHAS = {0: 0.0, 20: 0.2, 40: 0.4, 50: 0.5, 70: 0.7, 90: 0.9, 100: 1.0}  # by percent

VARIANTS: dict[str, Callable[..., Pyramid]] = {
    "litv2_small": _small,
    "litv2_medium": partial(litv2, embed_dim=96, depths=(2, 2, 18, 2), drop_path_rate=0.3),
    "litv2_base": _base,
    "litv2_base_384": _base,
    **{
        f"litv2_small_alpha_{percent}": partial(_small, alpha=alpha)
        for percent, alpha in ALPHAS.items()
    },
}

# Per model: path of its checkpoint, and the figures of the official repository.
CHECKPOINTS: dict[str, tuple[str, Published]] = {
    "litv2_small": ("v1.0/litv2_s", Published(82.0, 28, 3.7, 224)),
    "litv2_medium": ("v1.0/litv2_m", Published(83.3, 49, 7.5, 224)),
    "litv2_base": ("v1.0/litv2_b", Published(83.6, 87, 13.2, 224)),
    "litv2_base_384": ("v1.0/litv2_b_384", Published(84.7, 87, 39.7, 384)),
    "litv2_small_alpha_0": ("v1.1/alpha_0", Published(81.16, 28, 3.97, 224)),
    "litv2_small_alpha_20": ("v1.1/alpha_0.2", Published(81.89, 28, 3.88, 224)),
    "litv2_small_alpha_40": ("v1.1/alpha_0.4", Published(81.81, 28, 3.82, 224)),
    "litv2_small_alpha_50": ("v1.1/alpha_0.5", Published(81.88, 28, 3.77, 224)),
    "litv2_small_alpha_70": ("v1.1/alpha_0.7", Published(81.94, 28, 3.74, 224)),
    "litv2_small_alpha_90": ("v1.1/alpha_0.9", Published(82.03, 28, 3.73, 224)),
    "litv2_small_alpha_100": ("v1.1/alpha_1", Published(81.89, 28, 3.7, 224)),
}


def _default_cfg(name: str) -> dict[str, Any]:
    """timm's configuration of a model's checkpoint; images are prepared as officially.

    That is timm's default at 224 pixels; at 384 pixels the whole image is squeezed to a square.
    """
    path, figures = CHECKPOINTS[name]
    size = figures.resolution
    return imagenet_cfg(
        size,
        url=f"https://github.com/ziplab/LITv2/releases/download/{path}.pth",
        **({"crop_pct": 1.0, "crop_mode": "squash"} if size == 384 else {}),
        first_conv="stem.proj",
        license="apache-2.0",
        paper_ids="arXiv:2205.13213",
        paper_name="Fast Vision Transformers with HiLo Attention",
        origin_url="https://github.com/ziplab/LITv2",
    )


# Patterns of official names, and ours, applied in turn. Official stages end with the downsampler
# that ours begin with; its convolution holds the offsets' convolution.
_NAMES: tuple[tuple[str, Any], ...] = (
    (r"^patch_embed\.", "stem."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^norm(\d+)\.", r"feature_norms.\1."),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"\.downsample\.norm_layer\.", ".downsample.norm."),
    (r"\.downsample\.dconv\.conv_offset\.", ".downsample.offset."),
    (r"\.downsample\.dconv\.", ".downsample."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"(\.blocks\.\d+)\.attn\.", r"\1.mixer."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict in official or in our names, in our names.

    Of a detector's or segmenter's checkpoint, the backbone.
    """
    found = {}
    for key, value in backbone_entries(state_dict).items():
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        # The first two stages' blocks have one norm, which is officially called the second.
        key = re.sub(r"^(stages\.[01]\.blocks\.\d+)\.norm2\.", r"\1.norm.", key)
        if key.endswith(".downsample.weight") and value.ndim == 4:
            value = value.permute(0, 2, 3, 1).flatten(1)
        found[key] = value
    return found


register_family(
    __name__,
    VARIANTS,
    default_cfgs={f"{name}.in1k": _default_cfg(name) for name in VARIANTS},
    published={f"{name}.in1k": figures for name, (_, figures) in CHECKPOINTS.items()},
    checkpoint_filter_fn=checkpoint_filter_fn,
)
