"""The host of Agent-Swin and InLine-Swin: Swin's patches and windows, any mixer in large windows.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (arXiv
2103.14030, ICCV 2021), as papers use it that put another mixer into part of the blocks.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from vitarium.zoo.checkpoint import backbone_entries
from vitarium.zoo.parts import Block, patch_stem
from vitarium.zoo.pyramid import Pyramid

_PATCH_SIZE = 4  # pixels per patch of the stem
_WINDOW = 7  # Swin's own


class Windows(NamedTuple):
    """What a mixer of a block is built for.

    Attributes:
        stage: index of the stage.
        num_heads: number of heads.
        map_size: the stage's map, of images as large as the network is made for.
        window_size: side of the square windows.
        shift_size: tokens that the windows are shifted by.
    """

    stage: int
    num_heads: int
    map_size: tuple[int, int]
    window_size: int
    shift_size: int

    @property
    def whole(self) -> bool:
        """Whether the map is one window."""
        return self.map_size == (self.window_size, self.window_size)

    @classmethod
    def of_block(
        cls, block: int, stage: int, num_heads: int, map_size: tuple[int, int], window_size: int
    ) -> "Windows":
        """Windows that every second block shifts, at most as large as the map."""
        shorter = min(map_size)
        if shorter <= window_size:
            return cls(stage, num_heads, map_size, shorter, 0)
        return cls(stage, num_heads, map_size, window_size, block % 2 * (window_size // 2))


def map_sizes(img_size: int | tuple[int, int], stages: int) -> list[tuple[int, int]]:
    """Height and width of the map of every stage."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    height, width = height // _PATCH_SIZE, width // _PATCH_SIZE
    return [(height // 2**i, width // 2**i) for i in range(stages)]


def swin(
    *,
    mixer: Callable[[Windows], Any],
    replaced: Sequence[int],
    embed_dim: int,
    depths: Sequence[int],
    mlp_ratio: float = 4.0,
    head_dim: int = 32,
    qkv_bias: bool = True,
    img_size: int | tuple[int, int] = 224,
    window_size: int | None = None,
    always_partition: bool = False,
    **kwargs: Any,
) -> Pyramid:
    """Swin with another mixer in large windows, in the first blocks of every stage.

    The other blocks have Swin's attention in windows an eighth as large, but at least of 7 x 7.
    Maps that these windows do not divide are padded as in Swin's detection code; the other mixer
    pads as it does.

    Args:
        mixer: the spec of a block's mixer, of its windows.
        replaced: per stage, how many blocks have that mixer; at most all.
        embed_dim: channels of the first stage, a multiple of `head_dim`; they double per stage.
        depths: blocks per stage.
        mlp_ratio: hidden width of the feed-forward networks over the stage's channels.
        head_dim: channels per attention head.
        qkv_bias: bias of the query, key and value projection of Swin's attention.
        img_size: side of the image that windows and tables are made for, or (height, width);
            images of other sizes are taken too.
        window_size: side of the large windows; a quarter of `img_size`, the whole map, if None.
        always_partition: shift windows of maps that are not larger, too, as the official code for
            detection and segmentation does, and that for classification does not.
        kwargs: further arguments of `Pyramid`, which win over those set here.
    """
    dims = [embed_dim * 2**i for i in range(len(depths))]
    sizes = map_sizes(img_size, len(depths))
    large = max(sizes[0]) if window_size is None else window_size
    small = max(_WINDOW, large // 8)

    def spec(stage: int, block: int) -> Any:
        place = (stage, dims[stage] // head_dim, sizes[stage])
        if block < replaced[stage]:
            return mixer(Windows.of_block(block, *place, large))
        windows = Windows.of_block(block, *place, small)
        if always_partition:
            windows = Windows(*place, small, block % 2 * (small // 2))
        arguments = {
            "num_heads": windows.num_heads,
            "qkv_bias": qkv_bias,
            "window_size": windows.window_size,
            "shift_size": windows.shift_size,
            "padding": "zeros_before_shift",
            "always_partition": always_partition,
        }
        return ("window", arguments)

    arguments = {
        "stem": partial(patch_stem, patch_size=_PATCH_SIZE),
        "downsample": PatchMerging,
        "block": partial(Block, mlp_ratio=mlp_ratio),
        "dims": dims,
        "mixers": [[spec(s, block) for block in range(depth)] for s, depth in enumerate(depths)],
    }
    return Pyramid(depths=depths, **{**arguments, **kwargs})


# Patterns of official names, and ours, applied in turn. Official stages end with the downsampler
# that ours begin with.
_NAMES: tuple[tuple[str, Any], ...] = (
    (r"^patch_embed\.", "stem."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^norm(\d+)\.", r"feature_norms.\1."),
    (r"^layers\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^(stages\.\d+\.blocks\.\d+)\.attn\.", r"\1.mixer."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict in official or in our names, in our names.

    Of a detector's or segmenter's checkpoint, the backbone. Masks and indices are dropped, which
    are computed from sizes.
    """
    found = {}
    for key, value in backbone_entries(state_dict).items():
        if key.endswith((".attn_mask", ".relative_position_index")):
            continue
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        found[key] = value
    return found
