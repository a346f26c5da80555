"""TransNeXt: a pyramid of aggregated attention and convolutional gated linear units.

Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers" (arXiv 2311.17132, CVPR
2024). Code and checkpoints (Apache-2.0): https://github.com/DaiShiResearch/TransNeXt
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from vitarium.ops.projection import Linear, linear, plain
from vitarium.zoo.parts import Block
from vitarium.zoo.pyramid import Pyramid
from vitarium.zoo.registry import Published, imagenet_cfg, register_family

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)  # of blocks and stages


class FanOutConv2d(nn.Conv2d):
    """A convolution that starts with variance 2 / fan-out and no bias (He et al., 1502.01852)."""

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        fan_out = self.out_channels * math.prod(self.kernel_size) // self.groups
        nn.init.normal_(self.weight, std=math.sqrt(2 / fan_out))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class OverlappingPatches(nn.Module):
    """A convolution of odd kernel whose stride is about half of it, and a norm.

    Args:
        in_chans, dim: channels of the image or map; channels of the patches.
        stride: pixels per patch along each axis.
        kernel_size: pixels that a patch sees along each axis.
    """

    def __init__(self, in_chans: int, dim: int, *, stride: int, kernel_size: int) -> None:
        super().__init__()
        self.proj = FanOutConv2d(in_chans, dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """The map `(B, H', W', dim)` of `(B, in_chans, H, W)`."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class OverlappingDownsample(OverlappingPatches):
    """Overlapping patches of stride 2 of a map `(B, H, W, C)`."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, stride=2, kernel_size=3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2))


class ConvolutionalGLU(nn.Module):
    """A feed-forward network whose gates see their neighbours (section 3.4 of the paper).

        out = fc2(GELU(dwconv(fc1_x(x))) * fc1_v(x))

    with a depthwise 3x3 convolution, on channels-last maps. Both halves of `fc1` have two thirds
    of the hidden width, so that it costs what the usual network does.

    Args:
        dim: channels of the map.
        hidden_dim: hidden width of the network that it takes the place of.
        drop: dropout rate before and after the last layer.
    """

    def __init__(self, dim: int, hidden_dim: int, *, drop: float = 0.0) -> None:
        super().__init__()
        width = 2 * hidden_dim // 3
        self.fc1 = Linear(dim, 2 * width)
        self.dwconv = FanOutConv2d(width, width, 3, padding=1, groups=width)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(width, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if not plain(self.fc1):
            gate, value = self.fc1(x).chunk(2, -1)
        else:
            # Two products: the convolution reads a map whose channels lie together.
            weights, biases = self.fc1.weight.chunk(2), self.fc1.bias.chunk(2)
            gate, value = linear(x, weights[0], biases[0]), linear(x, weights[1], biases[1])
        gate = self.dwconv(gate.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop2(self.fc2(self.drop1(self.act(gate) * value)))


def _map_size(img_size: int | Sequence[int], stride: int) -> tuple[int, int]:
    """Size of the map of a stage, as the official code rounds it."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return max(1, height // stride), max(1, width // stride)


def transnext(
    *,
    embed_dim: int,
    depths: Sequence[int],
    head_dim: int = 24,
    mlp_ratios: Sequence[float] = (8, 8, 4, 4),
    sr_ratios: Sequence[int] = (8, 4, 2, 1),
    window_size: int = 3,
    img_size: int | Sequence[int] = 224,
    pretrain_size: int | Sequence[int] | None = None,
    is_extrapolation: bool = True,
    fixed_pool_size: int | Sequence[int] | None = None,
    heads: Sequence[dict[str, int]] | None = None,
    **kwargs: Any,
) -> Pyramid:
    """TransNeXt.

    Images may have any size. Position biases are functions of distances, relative to the extent
    that the network was trained on.

    Args:
        embed_dim: channels of the first stage, a multiple of `head_dim`; they double per stage.
        depths: blocks per stage.
        head_dim: channels per attention head.
        mlp_ratios: per stage, hidden width of a usual feed-forward network over its channels.
        sr_ratios: per stage, how many times smaller the pooled map of aggregated attention is; a
            stage with 1 has dense attention.
        window_size: side of the window of aggregated attention.
        img_size: image that the network is trained on, in pixels, (H, W) or one number for both.
        pretrain_size: image that it was trained on before that, whose extent is the unit of
            distances; None: `img_size`. For any use of weights that were trained at 224 pixels, it
            is 224.
        is_extrapolation: compute the biases of every image; if false, those of other sizes are
            interpolated from the ones of `img_size`, as detectors and most segmentors in the
            official repository do.
        fixed_pool_size: size of the pooled maps in place of `sr_ratios` (linear inference mode);
            the paper has 7 for networks trained at 224 pixels.
        heads: per stage, numbers of shared and routed heads of a mixture of heads; None for none.
        kwargs: further arguments of `Pyramid`, which win over those set here.
    """
    dims = [embed_dim * 2**i for i in range(len(depths))]
    mixers = []
    for i, (dim, sr_ratio) in enumerate(zip(dims, sr_ratios)):
        arguments: dict[str, Any] = {
            "num_heads": dim // head_dim,
            "pretrain_size": _map_size(pretrain_size or img_size, 2 ** (i + 2)),
            "input_resolution": _map_size(img_size, 2 ** (i + 2)),
            "is_extrapolation": is_extrapolation,
            **({} if heads is None else heads[i]),
        }
        name = "length_scaled_cosine" if heads is None else "mixture_of_head"
        if sr_ratio > 1:
            name = "aggregated" if heads is None else "aggregated_mixture_of_head"
            arguments["window_size"] = window_size
            arguments["sr_ratio"] = sr_ratio
            arguments["fixed_pool_size"] = fixed_pool_size
        mixers.append((name, arguments))
    blocks = [
        partial(Block, mlp_ratio=ratio, norm_layer=LAYER_NORM, mlp_layer=ConvolutionalGLU)
        for ratio in mlp_ratios[: len(dims)]
    ]
    defaults: dict[str, Any] = {
        "stem": partial(OverlappingPatches, stride=4, kernel_size=7),
        "downsample": OverlappingDownsample,
        "block": blocks,
        "dims": dims,
        "mixers": mixers,
        "stage_norm": LAYER_NORM,
        "norm_layer": nn.Identity,  # the last stage has its own
    }
    return Pyramid(depths=depths, **{**defaults, **kwargs})


_micro = partial(transnext, embed_dim=48, depths=(2, 2, 15, 2), drop_path_rate=0.15)
_tiny = partial(transnext, embed_dim=72, depths=(2, 2, 15, 2), drop_path_rate=0.25)
_small = partial(transnext, embed_dim=72, depths=(5, 5, 22, 5), drop_path_rate=0.45)
_base = partial(transnext, embed_dim=96, depths=(5, 5, 23, 5), drop_path_rate=0.6)

VARIANTS = {
    "transnext_micro": _micro,
    "transnext_micro_AAAA": partial(_micro, sr_ratios=(16, 8, 4, 2), img_size=256),
    "transnext_tiny": _tiny,
    "transnext_small": _small,
    "transnext_small_384": partial(_small, img_size=384, pretrain_size=224, drop_path_rate=0.7),
    "transnext_base": _base,
    "transnext_base_384": partial(_base, img_size=384, pretrain_size=224, drop_path_rate=0.8),
}

# Per model: its checkpoint (repository and file on Hugging Face), and the official figures.
CHECKPOINTS: dict[str, tuple[str, Published]] = {
    "transnext_micro": ("transnext-micro-224-1k", Published(82.5, 12.8, 2.7, 224)),
    "transnext_micro_AAAA": ("transnext-micro-AAAA-256-1k", Published(82.6, 13.1, 3.3, 256)),
    "transnext_tiny": ("transnext-tiny-224-1k", Published(84.0, 28.2, 5.7, 224)),
    "transnext_small": ("transnext-small-224-1k", Published(84.7, 49.7, 10.3, 224)),
    "transnext_small_384": ("transnext-small-384-1k-ft-1k", Published(86.0, 49.7, 32.1, 384)),
    "transnext_base": ("transnext-base-224-1k", Published(84.8, 89.7, 18.4, 224)),
    "transnext_base_384": ("transnext-base-384-1k-ft-1k", Published(86.2, 89.7, 56.3, 384)),
}


def default_cfg(size: int, **further: Any) -> dict[str, Any]:
    """timm's configuration for images of `size`, prepared as the official evaluation does.

    From 384 pixels on images are not cropped, but resized whatever their shape.
    """
    whole = {"crop_pct": 1.0, "crop_mode": "squash"} if size >= 384 else {}
    cfg = {"first_conv": "stem.proj", "license": "apache-2.0", **whole, **further}
    return imagenet_cfg(size, **cfg)


def _default_cfg(name: str) -> dict[str, Any]:
    checkpoint, figures = CHECKPOINTS[name]
    return default_cfg(
        figures.resolution,
        url=(
            f"https://huggingface.co/DaiShiResearch/{checkpoint}/resolve/main/"
            f"{checkpoint.replace('-', '_')}.pth?download=true"
        ),
        paper_ids="arXiv:2311.17132",
        paper_name="TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
        origin_url="https://github.com/DaiShiResearch/TransNeXt",
    )


_PARTS = {"patch_embed": "downsample", "block": "blocks", "norm": "norm"}  # of a stage
_BUFFERS = re.compile(
    r"(relative_pos_index|relative_coords_table)\d$|seq_length_scale$|padding_mask$"
)


def _rename(key: str) -> str:
    """Our name of an official parameter; other names, ours among them, as they are."""
    key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
    key = re.sub(r"^patch_embed1\.", "stem.", key)
    key = re.sub(
        r"^(patch_embed|block|norm)(\d)\.",
        lambda match: f"stages.{int(match[2]) - 1}.{_PARTS[match[1]]}.",
        key,
    )
    key = re.sub(r"^(stages\.\d+\.blocks\.\d+)\.attn\.", r"\1.mixer.", key)
    key = re.sub(r"\.mixer\.(wg(?:_[01])?)\.", r".mixer.router.\1.", key)
    return key.replace(".mlp.dwconv.dwconv.", ".mlp.dwconv.")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict in official or in our names, in our names.

    Tables of positions and lengths are dropped: they are computed from the map's size. A 1x1
    convolution of the official code is a linear layer here. Of a detector only the backbone is
    taken.
    """
    backbone = {
        key.removeprefix("backbone."): value
        for key, value in state_dict.items()
        if key.startswith("backbone.")
    }
    return {
        _rename(key): value.flatten(1) if key.endswith(".sr.weight") else value
        for key, value in (backbone or state_dict).items()
        if not _BUFFERS.search(key)
    }


register_family(
    __name__,
    VARIANTS,
    default_cfgs={f"{name}.in1k": _default_cfg(name) for name in CHECKPOINTS},
    published={f"{name}.in1k": figures for name, (_, figures) in CHECKPOINTS.items()},
    checkpoint_filter_fn=checkpoint_filter_fn,
)
