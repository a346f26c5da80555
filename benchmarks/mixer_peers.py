"""timm's modules as peers of our mixers, with the mixers' weights."""

from __future__ import annotations

from collections.abc import Callable

from timm.layers.halo_attn import HaloAttn
from timm.models.maxxvit import (
    MaxxVitTransformerCfg,
    PartitionAttentionCl,
)
from timm.models.shvit import SHSA
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

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


def _loaded_convolutions(module: nn.Module, mixer: Mixer) -> nn.Module:
    """The same, where the mixer's linear layers are the module's 1x1 convolutions."""
    state = mixer.state_dict()
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
]  # fmt: skip
