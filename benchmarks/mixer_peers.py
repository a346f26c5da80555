"""timm's modules as peers of our mixers, with the mixers' weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers.halo_attn import HaloAttn
from timm.models.davit import ChannelAttention, ChannelAttentionV2
from timm.models.efficientvit_msra import LocalWindowAttention
from timm.models.focalnet import FocalModulation
from timm.models.maxxvit import (
    MaxxVitTransformerCfg,
    PartitionAttentionCl,
)
from timm.models.shvit import SHSA
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Attention
from timm.models.volo import OutlookAttention
from torch import Tensor, nn

from vitarium.benchmarks import linear_peers, pooled_peers, routed_peers
from vitarium.benchmarks.mixers import Build, Contest
from vitarium.ops import Mixer


class _Through(nn.Module):
    """A part of a timm module, called by a function."""

    def __init__(self, module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _loaded(module: nn.Module, mixer: Mixer) -> nn.Module:
    """The module with the mixer's parameters, which go by the same names."""
    missing, unexpected = module.load_state_dict(mixer.state_dict(), strict=False)
    own = dict(module.named_parameters())
    if unexpected or set(missing) & own.keys():
        raise ValueError(f"state dicts differ: missing {missing}, unexpected {unexpected}")
    return module


def _loaded_convolutions(
    module: nn.Module, mixer: Mixer, renamed: Callable[[str], str] = str
) -> nn.Module:
    """The same, where the mixer's linear layers are the module's 1x1 convolutions."""
    state = {renamed(name): tensor for name, tensor in mixer.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    module.load_state_dict({name: state[name].view(shape) for name, shape in shapes.items()})
    return module


def _swin(fused: bool, shift: int = 0) -> Build:
    """timm's Swin attention with its partition, by SDPA or by separate products and softmax."""

    def build(mixer: Mixer, size: tuple[int, int]) -> nn.Module:
        block = SwinTransformerBlock(
            mixer.dim, size, num_heads=mixer.num_heads, window_size=7, shift_size=shift
        )
        block.attn.fused_attn = fused
        _loaded(block.attn, mixer)
        block.norm1 = block.norm2 = block.mlp = nn.Identity()
        return _Through(block, block._attn)

    return build


def _maxvit(partition: str, fused: bool) -> Build:
    """timm's MaxViT attention with its partition."""

    def build(mixer: Mixer, size: tuple[int, int]) -> nn.Module:
        config = MaxxVitTransformerCfg(
            dim_head=mixer.dim // mixer.num_heads,
            head_first=False,
            window_size=(7, 7),
            grid_size=(7, 7),
        )
        block = PartitionAttentionCl(mixer.dim, partition, config)
        block.attn.fused_attn = fused
        state = {
            name.replace("relative_position_bias_table", "rel_pos.relative_position_bias_table"): t
            for name, t in mixer.state_dict().items()
        }
        missing = block.attn.load_state_dict(state, strict=False).missing_keys
        if set(missing) & dict(block.attn.named_parameters()).keys():
            raise ValueError(f"missing {missing}")
        block.norm1 = block.norm2 = block.mlp = nn.Identity()
        return _Through(block, block._partition_attn)

    return build


def _halo(mixer: Mixer, size: tuple[int, int]) -> nn.Module:
    """timm's halo attention."""
    module = HaloAttn(mixer.dim, num_heads=mixer.num_heads, block_size=8, halo_size=3)
    return _loaded_convolutions(module, mixer)


def _vit(mixer: Mixer, size: tuple[int, int]) -> nn.Module:
    """timm's ViT attention, on the map's tokens as a sequence."""
    module = _loaded(Attention(mixer.dim, mixer.num_heads, qkv_bias=True), mixer)
    return _Through(module, lambda x: module(x.flatten(1, 2)).view(x.shape))


def _shvit(mixer: Mixer, size: tuple[int, int]) -> nn.Module:
    """timm's single-head attention."""
    return _loaded_convolutions(
        SHSA(mixer.dim, qk_dim=mixer.widths[0], pdim=mixer.widths[-1]), mixer
    )


def _volo(mixer: Mixer, size: tuple[int, int]) -> nn.Module:
    """timm's outlook attention."""
    kernel = {name: getattr(mixer, name) for name in ("kernel_size", "padding", "stride")}
    return _loaded(OutlookAttention(mixer.dim, mixer.num_heads, **kernel), mixer)


def _focalnet(mixer: Mixer, size: tuple[int, int]) -> nn.Module:
    """timm's focal modulation."""
    return _loaded_convolutions(
        FocalModulation(mixer.dim, mixer.focal_window, mixer.focal_level), mixer
    )


def _davit(kind: type[nn.Module]) -> Build:
    """timm's channel attention, on the map's tokens as a sequence."""

    def build(mixer: Mixer, size: tuple[int, int]) -> nn.Module:
        bias = mixer.qkv.bias is not None
        module = _loaded(kind(mixer.dim, mixer.num_heads, qkv_bias=bias), mixer)
        return _Through(module, lambda x: module(x.flatten(1, 2)).view(x.shape))

    return build


def _efficientvit(mixer: Mixer, size: tuple[int, int]) -> nn.Module:
    """timm's cascaded group attention in windows."""
    key_dim, _, value_dim = mixer.widths
    module = LocalWindowAttention(
        mixer.dim,
        key_dim,
        mixer.num_heads,
        attn_ratio=value_dim / key_dim,
        resolution=size[0],
        window_resolution=mixer.window_resolution,
        kernels=[dw.c.kernel_size[0] for dw in mixer.dws],
    )
    _loaded_convolutions(module.attn, mixer, lambda name: name.replace(".c.", ".conv."))

    def run(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # in evaluation it keeps its bias, with the graph it came by
            module.attn.attention_bias_cache.clear()
        return module(x)

    return _Through(module, run)


SWIN = {"timm_eager": _swin(False), "timm_sdpa": _swin(True)}
SHIFTED = {"timm_eager": _swin(False, 3), "timm_sdpa": _swin(True, 3)}

CONTESTS: list[Contest] = [
    *(
        Contest(f"{side}x{side} C {dim} window 7", "window", dim, (side, side),
                {"num_heads": dim // 32, "window_size": 7}, SWIN)
        for side, dim in ((56, 64), (28, 128), (14, 256), (7, 512))
    ),
    *(
        Contest(f"{side}x{side} C {dim} window 7 shift 3", "window", dim, (side, side),
                {"num_heads": dim // 32, "window_size": 7, "shift_size": 3}, SHIFTED)
        for side, dim in ((56, 64), (14, 256))
    ),
    *(
        Contest(f"{side}x{side} C {dim} grid 7", "grid", dim, (side, side),
                {"num_heads": dim // 32, "grid_size": 7},
                {"timm_eager": _maxvit("grid", False), "timm_sdpa": _maxvit("grid", True)})
        for side, dim in ((56, 64), (14, 256))
    ),
    Contest("32x32 C 128 block 8 halo 3", "halo", 128, (32, 32),
            {"num_heads": 4, "block_size": 8, "halo_size": 3}, {"timm_nchw": _halo}),
    Contest("14x14 C 384 heads 6", "attention", 384, (14, 14), {"num_heads": 6}, {"timm": _vit}),
    Contest("28x28 C 192 heads 6", "attention", 192, (28, 28), {"num_heads": 6}, {"timm": _vit}),
    Contest("14x14 C 128 pdim 32", "single_head", 128, (14, 14), {"pdim": 32},
            {"timm_nchw": _shvit}),
    Contest("7x7 C 224 pdim 48", "single_head", 224, (7, 7), {"pdim": 48}, {"timm_nchw": _shvit}),
    Contest("28x28 C 192 kernel 3 stride 2", "outlook", 192, (28, 28),
            {"num_heads": 6, "stride": 2}, {"timm": _volo}),
    *(
        Contest(f"{side}x{side} C {dim} levels 3", "focal", dim, (side, side),
                {"focal_window": 3, "focal_level": 3}, {"timm_nchw": _focalnet})
        for side, dim in ((56, 96), (14, 384))
    ),
    *(
        Contest(f"{side}x{side} C {dim} channels", name, dim, (side, side),
                {"num_heads": dim // 32}, {"timm": _davit(kind)})
        for name, kind in (("channel", ChannelAttention), ("channel_v2", ChannelAttentionV2))
        for side, dim in ((56, 96), (14, 384))
    ),
    Contest("14x14 C 128 window 7 heads 4", "cascaded_group", 128, (14, 14),
            {"key_dim": 16, "num_heads": 4, "attn_ratio": 2, "kernels": (7, 5, 3, 3)},
            {"timm_nchw": _efficientvit}),
    Contest("7x7 C 384 window 7 heads 4", "cascaded_group", 384, (7, 7),
            {"key_dim": 16, "num_heads": 4, "attn_ratio": 6, "kernels": (7, 5, 3, 3),
             "resolution": 7},
            {"timm_nchw": _efficientvit}),
    *linear_peers.CONTESTS,
    *pooled_peers.CONTESTS,
    *routed_peers.CONTESTS,
]  # fmt: skip
