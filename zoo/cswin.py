"""The host of Agent-CSwin and InLine-CSwin: CSWin's convolutions and stripes, and other mixers.

Dong et al., "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows"
(arXiv 2107.00652, CVPR 2022), as papers use it that put another mixer into part of the stages.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitarium.zoo.parts import Block, ConvDownsample
from vitarium.zoo.pyramid import Pyramid


@register_notrace_module  # one node to torch.fx: it looks at sizes in Python
class ConvStem(nn.Module):
    """Overlapping stem: a 7x7 convolution of stride 4 and a norm, `(B, C, H, W) -> NHWC`.

    A side of L pixels gives (L + 1) // 4 tokens, as in the official code; a side shorter than 3 is
    padded with zeros to 3.

    Args:
        in_chans: channels of the image.
        dim: channels of the map.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        below, right = (max(0, 3 - length) for length in x.shape[2:])
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


def cswin(
    *,
    mixers: Sequence[Any],
    embed_dim: int,
    depths: Sequence[int],
    mlp_ratio: float = 4.0,
    block: Callable[..., nn.Module] = Block,
    **kwargs: Any,
) -> Pyramid:
    """A CSWin transformer.

    Args:
        mixers: per stage a mixer spec, see `Pyramid`.
        embed_dim: channels of the first stage; they double per stage.
        depths: blocks per stage.
        mlp_ratio: hidden width of the feed-forward networks over the stage's channels.
        block: the blocks of all stages, or per stage; they take the arguments of `Block`.
        kwargs: further arguments of `Pyramid`, which win over those set here.
    """
    blocks = [block] * len(depths) if callable(block) else block
    arguments = {
        "stem": ConvStem,
        "downsample": partial(ConvDownsample, bias=True),
        "block": [partial(make, mlp_ratio=mlp_ratio) for make in blocks],
        "dims": [embed_dim * 2**i for i in range(len(depths))],
    }
    return Pyramid(depths=depths, mixers=mixers, **{**arguments, **kwargs})


def stripes(
    *,
    mixer: str,
    replaced: Sequence[bool],
    num_heads: Sequence[int],
    further: Sequence[dict[str, Any]],
    img_size: int = 224,
    split_size: Sequence[int] = (1, 2, 7, 7),
    large_split_size: Sequence[int] | None = None,
) -> list[Any]:
    """Mixers of the stages: a paper's own in wide stripes, or CSWin's in narrow ones.

    Args:
        mixer: name of the paper's mixer.
        replaced: per stage, whether it has that mixer.
        num_heads: per stage, number of heads.
        further: per stage, arguments of the paper's mixer that CSWin's has not.
        img_size: side of the image that the stripes are made for.
        split_size: width of CSWin's stripes, per stage.
        large_split_size: width of the paper's stripes, per stage; as wide as the map if None.
    """
    last = len(num_heads) - 1
    found = []
    for stage, heads in enumerate(num_heads):
        resolution = img_size // (4 * 2**stage)
        large = resolution if large_split_size is None else large_split_size[stage]
        shared = {
            "num_heads": heads,
            "qkv_bias": True,
            "resolution": resolution,
            "last_stage": stage == last,
        }
        if replaced[stage]:
            found.append((mixer, {**shared, "split_size": large, **further[stage]}))
        else:
            found.append(("cross_shaped", {**shared, "split_size": split_size[stage]}))
    return found


# Patterns of official names, and ours, applied in turn.
_NAMES: tuple[tuple[str, Any], ...] = (
    (r"^stage1_conv_embed\.0\.", "stem.conv."),
    (r"^stage1_conv_embed\.2\.", "stem.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^merge(\d)\.", r"stages.\1.downsample."),
    (r"^stage(\d)\.(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks.{match[2]}."),
    (r"^(stages\.\d+\.blocks\.\d+)\.(qkv|proj|attns)\.", r"\1.mixer.\2."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict in official or in our names, in our names."""
    found = {}
    for key, value in state_dict.items():
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        found[key] = value
    return found
