"""What families may pass to the pyramid, and what the families of this package pass."""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._manipulate import group_parameters
from torch import nn

from vitarium.zoo import Pyramid, list_models, litv2, nat, parts
from vitarium.zoo.parts import Block, ConvDownsample, ConvStem, patch_stem


def _mixer(**arguments) -> tuple:
    return ("neighborhood", {"num_heads": 2, "kernel_size": 3, **arguments})


def _pyramid(**arguments) -> Pyramid:
    defaults = {
        "stem": ConvStem,
        "downsample": ConvDownsample,
        "block": Block,
        "dims": (16, 32),
        "depths": (3, 2),
        "mixers": [_mixer(), [_mixer(), _mixer(dilation=2)]],
        "num_classes": 4,
    }
    return Pyramid(**{**defaults, **arguments})


def _dilations(model: Pyramid) -> list[list[int]]:
    return [[block.mixer.dilation[0] for block in stage.blocks] for stage in model.stages]


def test_mixers_are_taken_in_turn():
    three = [_mixer(dilation=d) for d in (1, 2, 4)]
    as_yaml = [["neighborhood", {"num_heads": 2, "kernel_size": 3, "dilation": 5}]]
    model = _pyramid(depths=(5, 2), mixers=[three, as_yaml])
    assert _dilations(model) == [[1, 2, 4, 1, 2], [5, 5]]
    assert _dilations(_pyramid(mixers=(_mixer(dilation=3), as_yaml[0]))) == [[3, 3, 3], [5, 5]]


class _FeedForward(nn.Module):
    """A block of a family without token mixer."""

    def __init__(self, dim, mixer, *, drop_path, proj_drop):
        super().__init__()
        assert mixer is None
        self.linear = nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.linear(x)


def test_stages_may_differ_in_block_and_blocks_may_go_without_mixer():
    wide = partial(Block, mlp_ratio=2.0)
    model = _pyramid(block=(_FeedForward, [wide, Block]), mixers=[None, _mixer()])
    assert [type(block) for block in model.stages[0].blocks] == [_FeedForward] * 3
    assert [block.mlp.fc1.out_features for block in model.stages[1].blocks] == [64, 128]
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 4)


def test_norm_and_stem_stride_are_the_families():
    model = _pyramid(
        stem=partial(patch_stem, patch_size=8), stem_stride=8, norm_layer=partial(nn.RMSNorm)
    )
    assert isinstance(model.norm, nn.RMSNorm)
    assert [info["reduction"] for info in model.feature_info] == [8, 16]
    taps = model.forward_intermediates(torch.randn(1, 3, 33, 20), intermediates_only=True)
    assert [tuple(tap.shape[2:]) for tap in taps] == [(5, 3), (3, 2)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depths": (1,)}, ValueError, r"depths=\(1,\) must have one entry per stage"),
        ({"depths": (1, 0)}, ValueError, r"depths=\(1, 0\) must be at least 1"),
        ({"mixers": [_mixer()]}, ValueError, "mixers=.* must have one entry per stage"),
        ({"mixers": "neighborhood"}, ValueError, "mixers='neighborhood' must have one entry"),
        ({"mixers": [_mixer(), []]}, ValueError, "list of a stage's mixers or blocks is empty"),
        ({"mixers": [_mixer(), "nothing"]}, ValueError, "mixer 'nothing' is unknown"),
        ({"mixers": [_mixer(), 7]}, TypeError, "7"),
        ({"mixers": [_mixer(), _mixer(window=7)]}, TypeError, "window"),
        ({"block": [Block]}, ValueError, "block=.* must have one entry per stage"),
        ({"dims": (), "depths": (), "mixers": []}, ValueError, "depths"),
        ({"img_size": 224}, TypeError, "img_size"),
        ({"global_pool": "median"}, Exception, "median|pool"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        _pyramid(**arguments)


# --- blocks of large maps ------------------------------------------------------------------------


def _tokens() -> tuple[nn.Module, torch.Tensor, list[int]]:
    """A block whose hidden map of 2600 tokens is large, a map, and the tokens of three parts."""
    return Block(16, nn.Identity(), mlp_ratio=32), torch.randn(2, 26, 50, 16), [867, 867, 866]


def _images() -> tuple[nn.Module, torch.Tensor, list[int]]:
    """A block of LITv2, five images and how many are in a part."""
    return litv2.ConvBlock(8, mlp_ratio=2), torch.randn(5, 4, 6, 8), [2, 2, 1]


@pytest.mark.parametrize("made", [_tokens, _images])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cpu_takes_large_maps_in_parts(made, dtype, monkeypatch):
    """Without gradients, and where no hook would see parts."""
    torch.manual_seed(0)
    block, x, sizes = made()
    block.eval().to(dtype)
    x = x.to(dtype)
    hidden = x[..., 0].numel() * block.mlp.fc1.out_features * x.element_size()
    monkeypatch.setattr(parts, "HIDDEN_BYTES", hidden // 3)
    monkeypatch.setattr(litv2, "HIDDEN_BYTES", hidden // 3)
    seen = []
    plain = type(block.mlp).forward
    monkeypatch.setattr(
        type(block.mlp), "forward", lambda self, x: (seen.append(len(x)), plain(self, x))[1]
    )
    whole = block(x)
    assert seen == [len(x)]
    with torch.no_grad():
        torch.testing.assert_close(block(x), whole)
        assert seen[1:] == sizes
        channels_first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        torch.testing.assert_close(block(channels_first), whole)
        del seen[:]
        shapes = []
        handle = block.mlp.fc1.register_forward_hook(
            lambda module, args, output: shapes.append(output.shape)
        )
        torch.testing.assert_close(block(x), whole)
        handle.remove()
        assert seen == [len(x)] and shapes == [(*x.shape[:-1], block.mlp.fc1.out_features)]
        block.train()(x)
        assert seen == [len(x)] * 2


# --- the families --------------------------------------------------------------------------------


def _blocks(name: str, **arguments) -> list[nn.Module]:
    model = timm.create_model(name, device="meta", **arguments)
    return [block for stage in model.stages for block in stage.blocks]


OFFICIAL_FACTORIES = [
    "nat_mini",
    "nat_tiny",
    "nat_small",
    "nat_base",
    "dinat_mini",
    "dinat_tiny",
    "dinat_small",
    "dinat_base",
    "dinat_large",
    "dinat_large_384",
    "dinat_large_384_11x11",
    "dinat_large_21k",
    "dinat_large_21k_11x11",
    "dinat_s_tiny",
    "dinat_s_small",
    "dinat_s_base",
    "dinat_s_large",
    "dinat_s_large_384",
    "dinat_s_large_21k",
    "nat_isotropic_small",
    "nat_isotropic_base",
    "dinat_isotropic_small",
    "dinat_isotropic_base",
    "vitrpb_small",
    "vitrpb_base",
]


def test_every_official_factory_is_a_model_of_this_package():
    assert sorted(OFFICIAL_FACTORIES) == sorted(nat.VARIANTS)
    names = list_models()
    assert set(names) >= set(OFFICIAL_FACTORIES)
    assert len(names) == len(set(names))
    assert not [name for name in names if "resnet" in name]
    assert set(list_models("dinat_s_*")) == {n for n in names if n.startswith("dinat_s_")}


@pytest.mark.parametrize(
    ("name", "dilations"),
    [
        ("nat_tiny", [1] * 30),
        ("dinat_mini", [1, 8, 1] + [1, 4] * 2 + [1, 2] * 3 + [1] * 5),
        ("dinat_large_384", [1, 13, 1] + [1, 6] * 2 + [1, 3] * 9 + [1] * 5),
        ("dinat_large_384_11x11", [1, 8, 1] + [1, 4] * 2 + [1, 2] * 9 + [1] * 5),
        ("dinat_s_small", [1, 8] + [1, 4] + [1, 2] * 9 + [1, 1]),
        ("dinat_s_large_384", [1, 13] + [1, 6] + [1, 3] * 9 + [1, 1]),
        ("nat_isotropic_base", [1] * 12),
        ("dinat_isotropic_base", [1, 2] * 6),
    ],
)
def test_dilations_are_those_of_the_official_factories(name, dilations):
    assert [block.mixer.dilation[0] for block in _blocks(name)] == dilations


def test_layer_scale_is_in_three_variants_only():
    with_scale = {
        name
        for name in OFFICIAL_FACTORIES
        if "isotropic" not in name
        and "vitrpb" not in name
        and hasattr(_blocks(name, depths=(1, 1, 1, 1))[0].ls1, "gamma")
    }
    assert with_scale == {"nat_small", "nat_base", "dinat_base"}


def test_families_have_arguments_of_their_own():
    """As one needs for small images: other widths, depths, windows and dilations."""
    model = timm.create_model(
        "dinat_mini", embed_dim=24, depths=(1, 2), kernel_size=3, dilations=(2, 1), head_dim=8
    )
    assert [info["num_chs"] for info in model.feature_info] == [24, 48]
    assert [b.mixer.num_heads for stage in model.stages for b in stage.blocks] == [3, 6, 6]
    assert model(torch.randn(1, 3, 28, 28)).shape == (1, 1000)


@torch.no_grad()
def test_vit_rpb_is_dense_attention_with_relative_bias():
    """bias[h, query, key] = rpb[h, key - query + 13] per axis, for the 14x14 map it is made for."""
    mixer = _blocks("vitrpb_small")[0].mixer.to_empty(device="cpu").double()
    generator = torch.Generator().manual_seed(0)
    for parameter in mixer.parameters():
        parameter.normal_(std=0.2, generator=generator)
    x = torch.randn(1, 14, 14, 384, generator=generator, dtype=torch.float64)
    query, key, value = mixer.qkv(x).reshape(196, 3, 12, 32).permute(1, 2, 0, 3)
    row, column = torch.arange(196) // 14, torch.arange(196) % 14
    bias = mixer.rpb[:, row[None] - row[:, None] + 13, column[None] - column[:, None] + 13]
    weights = F.softmax(query @ key.transpose(1, 2) * 32**-0.5 + bias, dim=-1)
    want = mixer.proj((weights @ value).transpose(0, 1).reshape(1, 14, 14, 384))
    torch.testing.assert_close(mixer(x), want, rtol=1e-10, atol=1e-10)


def test_features_may_have_norms_of_their_own():
    plain, normed = _pyramid(), _pyramid(feature_norm=nn.LayerNorm)
    for norm in normed.feature_norms:
        nn.init.normal_(norm.bias)
    normed.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(1, 3, 32, 40)
    maps = plain.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
    final, taps = normed.forward_intermediates(images, output_fmt="NHWC")
    for norm, have, stage in zip(normed.feature_norms, taps, maps, strict=True):
        assert torch.equal(have, norm(stage))
    assert torch.equal(final, plain.forward_features(images))
    normed.prune_intermediate_layers([1])
    assert {name for name, _ in normed.feature_norms.named_parameters()} == {"1.weight", "1.bias"}
    (tap,) = normed.forward_intermediates(images, [1], output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(tap, taps[1])


def test_norms_of_features_may_differ_by_stage():
    model = _pyramid(feature_norm=[None, nn.LayerNorm])
    assert [type(norm) for norm in model.feature_norms] == [nn.Identity, nn.LayerNorm]
    with pytest.raises(ValueError, match=r"feature_norm=.*one entry per stage"):
        _pyramid(feature_norm=[nn.LayerNorm])


def test_stages_may_end_with_a_norm_that_the_next_one_sees():
    model = _pyramid(stage_norm=nn.LayerNorm, norm_layer=nn.Identity)
    for stage in model.stages:
        nn.init.normal_(stage.norm.bias)
    images = torch.randn(1, 3, 32, 40)
    first = model.stages[0].norm(model.stages[0].blocks(model.stem(images)))
    second = model.stages[1].norm(model.stages[1].blocks(model.stages[1].downsample(first)))
    final, taps = model.forward_intermediates(images, output_fmt="NHWC")
    assert torch.equal(taps[0], first)
    assert torch.equal(taps[1], second)
    assert torch.equal(final, second)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    last_of_first = groups["stages.0.blocks.2.norm1.weight"]
    assert (
        groups["stages.0.norm.weight"] == last_of_first < groups["stages.1.downsample.norm.weight"]
    )
    model.prune_intermediate_layers([0])
    assert torch.equal(model.forward_features(images), first)
