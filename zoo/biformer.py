"""BiFormer: bi-level routing attention between depthwise convolutions.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention" (arXiv 2303.08810,
CVPR 2023). Code and checkpoints (MIT): https://github.com/rayleizhu/BiFormer
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitarium.ops.dispatch import plain_aten
from vitarium.zoo.checkpoint import backbone_entries
from vitarium.zoo.parts import BatchNorm, Block, PatchConv
from vitarium.zoo.pyramid import Pyramid
from vitarium.zoo.registry import Published, imagenet_cfg, register_family

_LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class BatchNormStem(nn.Module):
    """3x3 convolutions of stride 2 with batch norms, a GELU between, `(B, C, H, W) -> NHWC`.

    Args:
        in_chans: channels of the image.
        dim: channels of the map; the first convolution has half of them.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(dim // 2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x)).permute(0, 2, 3, 1)


class BatchNormDownsample(nn.Module):
    """A 3x3 convolution of stride 2, then a batch norm."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class PatchStem(nn.Module):
    """Patches of 4x4 pixels, then a batch norm, `(B, C, H, W) -> NHWC`."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = PatchConv(in_chans, dim, 4)
        self.norm = BatchNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 2, 3, 1)))


class PatchMerging(nn.Module):
    """A batch norm, then a convolution of 2x2 patches."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.norm = BatchNorm(dim_in)
        self.conv = PatchConv(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class LeanBlock(Block):
    """A block that keeps half as much for the backward pass, and computes a tenth more in it.

    What is kept is little of routed attention and much of the feed-forward network. This keeps the
    network's input alone.

    Args: as of `Block`.
    """

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map that attention's output is added to, and that output."""
        return x, self.ls1(self.mixer(self.norm1(x)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))

    def _recomputed(self, function: Callable[[Tensor], Any], x: Tensor) -> Any:
        """`function(x)`, of which the backward pass computes anew what it needs."""
        if not torch.is_grad_enabled() or plain_aten():  # transforms of functions cannot
            return function(x)
        draws = self.training and self.mlp.drop1.p > 0  # the same numbers must be drawn again
        return checkpoint(function, x, use_reentrant=False, preserve_rng_state=draws)

    def forward(self, x: Tensor) -> Tensor:
        x, mixed = self._attend(x)
        return self.fed(x + self.drop_path1(mixed))

    def _fed(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self._recomputed(self._feed_forward, x))


class PositionBlock(LeanBlock):
    """A block behind a residual depthwise 3x3 convolution, which tells positions apart.

    Args: as of `Block`.
    """

    def __init__(self, dim: int, mixer: nn.Module, **kwargs: Any) -> None:
        super().__init__(dim, mixer, **kwargs)
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super()._attend(x + self.pos_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class _LeanAttention:
    """Makes a block keep nothing of its attention either: for the largest maps, in few blocks."""

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._recomputed(super()._attend, x)  # type: ignore[misc, attr-defined]


class FirstBlock(_LeanAttention, LeanBlock):
    """`LeanBlock` of the first stage."""


class FirstPositionBlock(_LeanAttention, PositionBlock):
    """`PositionBlock` of the first stage."""


def biformer(
    *,
    embed_dim: int,
    depths: Sequence[int],
    mlp_ratio: float = 3.0,
    n_win: int | tuple[int, int] = 7,
    topks: Sequence[int] = (1, 4, 16),
    head_dim: int = 32,
    side_dwconv: int = 5,
    routing: str = "bilevel_routing",
    dense: Any = "attention_lepe",
    blocks: Sequence[Callable[..., nn.Module]] = (FirstPositionBlock, PositionBlock),
    layer_scale: float | None = None,
    **kwargs: Any,
) -> Pyramid:
    """BiFormer: stages of bi-level routing attention, and a last one of dense attention.

    The official backbones of detection and segmentation have `n_win=16` and `n_win=8`, and
    `feature_norm=partial(nn.LayerNorm, eps=1e-6)`. Maps that the regions do not divide are padded.

    Args:
        embed_dim: channels of the first stage, a multiple of `head_dim`; they double per stage.
        depths: blocks per stage.
        mlp_ratio: hidden width of the feed-forward networks over the stage's channels.
        n_win: regions along a side of the map.
        topks: regions that each region attends to, per stage but the last.
        head_dim: channels per attention head of the routed stages; the last has 8 heads.
        side_dwconv: kernel size of the local enhancement of attention.
        routing: the mixer of the routed stages: its default, or "bilevel_routing_nchw".
        dense: the mixer spec of the last stage.
        blocks: the block of the first stage, and that of the others, each called as `Block`.
        layer_scale: initial layer scale; None for none.
        kwargs: further arguments of `Pyramid`, which win over those set here.
    """
    dims = [embed_dim * 2**i for i in range(len(depths))]
    routed = [
        (
            routing,
            {"num_heads": dim // head_dim, "n_win": n_win, "topk": k, "side_dwconv": side_dwconv},
        )
        for dim, k in zip(dims, topks)
    ]
    arguments = {
        "stem": BatchNormStem,
        "downsample": BatchNormDownsample,
        "block": [
            partial(block, mlp_ratio=mlp_ratio, layer_scale=layer_scale, norm_layer=_LAYER_NORM)
            for block in (blocks[0], *[blocks[1]] * (len(depths) - 1))
        ],
        "dims": dims,
        "mixers": [*routed, dense][: len(dims)],
        "norm_layer": BatchNorm,
    }
    return Pyramid(depths=depths, **{**arguments, **kwargs})


def biformer_stl(**kwargs: Any) -> Pyramid:
    """BiFormer in the layout of Swin-T: patches, patch merging, and no convolution in the blocks.

    Args: as of `biformer`.
    """
    layout = {"stem": PatchStem, "downsample": PatchMerging, "blocks": (FirstBlock, LeanBlock)}
    shape = {"embed_dim": 96, "depths": (2, 2, 6, 2), "mlp_ratio": 4.0}
    return biformer(**{**layout, **shape, **kwargs})


VARIANTS: dict[str, Callable[..., Pyramid]] = {
    "biformer_tiny": partial(biformer, embed_dim=64, depths=(2, 2, 8, 2)),
    "biformer_small": partial(biformer, embed_dim=64, depths=(4, 4, 18, 4)),
    "biformer_base": partial(biformer, embed_dim=96, depths=(4, 4, 18, 4)),
    "biformer_stl": biformer_stl,
    "biformer_stl_nchw": partial(
        biformer_stl,
        routing="bilevel_routing_nchw",
        dense=("attention_lepe", {"lepe_on": "value"}),
    ),
}

# Per checkpoint: its part of the published address, and the figures of the official repository.
CHECKPOINTS: dict[str, tuple[str, Published]] = {
    "biformer_tiny.in1k": ("ChHEOoGkgwgQzEDlM", Published(81.4, 13.1, 2.2, 224)),
    "biformer_small.in1k": ("ChHDyM-x9KWRBZ832", Published(83.8, 25.5, 4.5, 224)),
    "biformer_base.in1k": ("ChHI_XPhoadjaNxtO", Published(84.3, 56.8, 9.8, 224)),
    "biformer_stl.in1k": ("ChSf-m7ujkvx9lIQ1", Published(82.7, 28.4, 4.6, 224)),
    "biformer_stl_nchw.in1k": ("ChWYrKbWbMgqd2Ai0", Published(82.7, 28.4, 4.6, 224)),
}


# An address of the authors' drive: a share, and the content of what is shared.
_SHARES, _CONTENT = "https://api.onedrive.com/v1.0/shares", "root/content"


def _default_cfg(name: str, share: str) -> dict[str, Any]:
    """timm's configuration of the checkpoint `name` = "model.tag"; see the official evaluation."""
    return imagenet_cfg(
        224,
        origin_url=f"{_SHARES}/s!AkBbczdRlZv{share}/{_CONTENT}",
        description="The authors' address of this checkpoint no longer answers; load a file.",
        first_conv="stem.conv" if "_stl" in name else "stem.conv1",
        license="mit",
        paper_ids="arXiv:2303.08810",
        paper_name="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    )


# Official names, which number the layers of sequences, and ours.
_STEM = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}
_IN_STAGES = {
    r"\.attn\.(?:qkv\.qkv|qkv_linear)\.": ".mixer.qkv.",
    r"\.attn\.(?:wo|output_linear)\.": ".mixer.proj.",
    r"\.attn\.": ".mixer.",
    r"\.mlp\.0\.": ".mlp.fc1.",
    r"\.mlp\.[23]\.": ".mlp.fc2.",
    r"\.gamma([12])$": r".ls\1.gamma",
}


def _rename(key: str, is_stl: bool) -> str:
    """Our name of an official parameter; other names, ours among them, as they are."""
    match = re.fullmatch(r"downsample_layers\.(\d)\.(\d)\.(\w+)", key)
    if match:
        stage, layer, kind = match.groups()
        if stage == "0" and not is_stl:
            return f"stem.{_STEM[layer]}.{kind}"
        is_conv = (layer == "0") != (is_stl and stage != "0")  # patch merging begins with its norm
        place = "stem" if stage == "0" else f"stages.{stage}.downsample"
        return f"{place}.{'conv' if is_conv else 'norm'}.{kind}"
    key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
    key = re.sub(r"^extra_norms\.", "feature_norms.", key)
    key = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
    for pattern, ours in _IN_STAGES.items() if key.startswith("stages.") else ():
        key = re.sub(pattern, ours, key)
    return key


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict in official or in our names, in our names.

    The 1x1 convolutions of the nchw variant become linear layers; of a detector or segmenter, the
    backbone is taken.
    """
    is_stl = isinstance(model.stem, PatchStem)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    entries = backbone_entries(state_dict)
    renamed = {_rename(key, is_stl): value for key, value in entries.items()}
    return {
        key: value.flatten(1) if tuple(value.shape) == (*shapes.get(key, ()), 1, 1) else value
        for key, value in renamed.items()
    }


register_family(
    __name__,
    VARIANTS,
    default_cfgs={name: _default_cfg(name, share) for name, (share, _) in CHECKPOINTS.items()},
    published={name: figures for name, (_, figures) in CHECKPOINTS.items()},
    checkpoint_filter_fn=checkpoint_filter_fn,
)
