"""Windows, grids and halos give what timm's modules give, with their weights, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers.halo_attn import HaloAttn
from timm.models.maxxvit import (
    MaxxVitBlock,
    MaxxVitTransformerCfg,
    ParallelPartitionAttention,
    PartitionAttention2d,
    PartitionAttentionCl,
)
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from vitarium.ops import Mixer
from vitarium.ops.halo import HaloAttention
from vitarium.ops.multi_axis import MultiAxisAttention
from vitarium.ops.window_mixers import GridAttention, WindowAttention


def _random(module: nn.Module) -> nn.Module:
    """The module in float64 with weights that leave no parameter without effect."""
    generator = torch.Generator().manual_seed(0)
    module = module.double().eval()
    for name, buffer in module.named_buffers():
        if name.endswith("rel_coords_log"):  # timm computes them in float32
            buffer.copy_(buffer.sign() * buffer.abs().expm1().round().log1p())
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(noise / max(1, parameter.shape[-1]) ** 0.5 + (parameter.dim() == 1))
    return module


def _map(*size: int) -> Tensor:
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _assert_same(mixer: Mixer, theirs: Any, state: nn.Module, x: Tensor) -> None:
    """Output, and gradient of the input and of every parameter, which have timm's names."""
    mixer = mixer.double().eval()
    mixer.load_state_dict(state.state_dict(), strict=True)
    x = x.clone().requires_grad_()
    expected = theirs(x)
    output = mixer(x)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    parameters = list(state.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), [x, *parameters])
    got = torch.autograd.grad(output.square().sum(), [x, *mixer.parameters()])
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-8, atol=1e-8)
    shapes = sorted((g.numel(), g.double().norm().item()) for g in wanted[1:])
    ours = sorted((g.numel(), g.double().norm().item()) for g in got[1:])
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(shapes), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("always_partition", [False, True])
@pytest.mark.parametrize("size", [(14, 14), (8, 12), (10, 9), (13, 7), (5, 16), (6, 4)], ids=str)
@pytest.mark.parametrize(
    ("window_size", "shift_size"), [(7, 0), (7, 3), (4, 1), ((5, 4), (2, 3)), ((3, 7), (0, 3))]
)
def test_swin(window_size: Any, shift_size: Any, size: Any, always_partition: bool) -> None:
    block: Any = SwinTransformerBlock(
        24,
        size,
        num_heads=3,
        head_dim=None if shift_size else 5,
        window_size=window_size,
        shift_size=shift_size,
        always_partition=always_partition,
    )
    _random(block)
    mixer = WindowAttention(
        24,
        num_heads=3,
        head_dim=None if shift_size else 5,
        window_size=block.window_size,
        shift_size=block.shift_size,
        always_partition=always_partition,
    )
    _assert_same(mixer, block._attn, block.attn, _map(*size, 24))


def test_swin_of_maps_that_grow_smaller_than_the_window() -> None:
    """The window is built once, the map shrinks: timm's block of the small map agrees."""
    large: Any = _random(SwinTransformerBlock(16, (14, 14), window_size=7, shift_size=3))
    small: Any = _random(SwinTransformerBlock(16, (5, 9), window_size=7, shift_size=3))
    table = large.attn.relative_position_bias_table.data.unflatten(0, (13, 13))
    small.attn.load_state_dict(
        large.attn.state_dict() | {"relative_position_bias_table": table[2:11].flatten(0, 1)}
    )
    mixer = WindowAttention(16, num_heads=4, window_size=7, shift_size=3).double().eval()
    mixer.load_state_dict(large.attn.state_dict())
    x = _map(5, 9, 16)
    torch.testing.assert_close(mixer(x), small._attn(x), rtol=1e-9, atol=1e-9)


def _config(rel_pos_type: str, head_first: bool, **kwargs: Any) -> MaxxVitTransformerCfg:
    return MaxxVitTransformerCfg(
        dim_head=8, rel_pos_type=rel_pos_type, head_first=head_first, **kwargs
    )


@pytest.mark.parametrize("rel_pos_type", ["bias", "bias_tf", "mlp", ""])
@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("partition", ["block", "grid"])
def test_maxvit_attention(partition: str, head_first: bool, rel_pos_type: str) -> None:
    cfg = _config(rel_pos_type, head_first, window_size=(4, 3), attn_bias=not head_first)
    theirs: Any = _random(PartitionAttentionCl(24, partition, cfg=cfg))
    arguments: dict[str, Any] = {
        "num_heads": 3,
        "rel_pos_type": rel_pos_type or None,
        "head_first": head_first,
        "qkv_bias": cfg.attn_bias,
        "proj_bias": cfg.attn_bias,
    }
    mixer = (
        WindowAttention(24, window_size=(4, 3), **arguments)
        if partition == "block"
        else GridAttention(24, grid_size=(4, 3), **arguments)
    )
    for size in ((8, 9), (4, 3), (12, 6)):
        _assert_same(mixer, theirs._partition_attn, theirs.attn, _map(*size, 24))


@pytest.mark.parametrize("no_block_attn", [False, True])
@pytest.mark.parametrize("nchw", [False, True])
@pytest.mark.parametrize("rel_pos_type", ["bias", "bias_tf", "mlp"])
def test_maxvit_block(rel_pos_type: str, nchw: bool, no_block_attn: bool) -> None:
    cfg = _config(
        rel_pos_type,
        rel_pos_type == "bias",
        window_size=4,
        grid_size=3,
        init_values=None if nchw else 0.1,
        act_layer="gelu_tanh" if no_block_attn else "gelu",
        norm_eps=1e-5,
        expand_ratio=2.5,
        use_nchw_attn=nchw,
        no_block_attn=no_block_attn,
    )
    block: Any = _random(MaxxVitBlock(16, 16, transformer_cfg=cfg))
    block.conv = nn.Identity()
    mixer = MultiAxisAttention(
        16,
        dim_head=8,
        window_size=4,
        grid_size=3,
        rel_pos_type=rel_pos_type,
        head_first=cfg.head_first,
        init_values=cfg.init_values,
        act_layer=cfg.act_layer,
        norm_eps=1e-5,
        expand_ratio=2.5,
        no_block_attn=no_block_attn,
    )
    assert isinstance(block.attn_grid, PartitionAttention2d if nchw else PartitionAttentionCl)

    def theirs(x: Tensor) -> Tensor:
        return block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    _assert_same(mixer, theirs, block, _map(12, 24, 16))


@pytest.mark.parametrize("rel_pos_type", ["bias", "bias_tf"])
def test_maxvit_parallel(rel_pos_type: str) -> None:
    cfg = _config(rel_pos_type, True, window_size=4, init_values=0.2)
    block: Any = _random(ParallelPartitionAttention(16, cfg=cfg))
    mixer = MultiAxisAttention(
        16, dim_head=8, window_size=4, rel_pos_type=rel_pos_type, init_values=0.2, parallel=True
    )
    _assert_same(mixer, block, block, _map(8, 12, 16))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_heads": 2},
        {"num_heads": 4, "block_size": 4, "halo_size": 1, "dim_head": 6},
        {"num_heads": 2, "block_size": 4, "halo_size": 2, "qk_ratio": 0.5, "qkv_bias": True},
        {"num_heads": 2, "block_size": 2, "halo_size": 3, "scale_pos_embed": True},
        {"num_heads": 1, "block_size": 8, "halo_size": 0, "qk_ratio": 0.3},
    ],
    ids=str,
)
def test_halo(arguments: dict[str, Any]) -> None:
    theirs = _random(HaloAttn(32, **arguments))
    mixer = HaloAttention(32, **arguments)

    def channels_last(x: Tensor) -> Tensor:
        return theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    for size in ((8, 16), (24, 8)):
        _assert_same(mixer, channels_last, theirs, _map(*size, 32))
