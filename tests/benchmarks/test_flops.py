"""Counts: by formula, by torch on meta and by fvcore they are one number."""

import pytest
import torch
from torch import nn

import vitarium.zoo  # noqa: F401
from vitarium.benchmarks import flops, table
from vitarium.benchmarks.flops import Counts
from vitarium.ops import MIXERS, OPERATORS, build_mixer, dispatch


def test_a_convolution_and_a_linear_layer_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Flatten(), nn.Linear(8 * 15 * 15, 5))
    assert flops.count(model, 32, batch=2) == Counts(
        params=3 * 8 * 9 + 8 + 8 * 225 * 5 + 5,
        macs=2 * (225 * 8 * 27 + 8 * 225 * 5),
        activations=2 * (8 * 225 + 5),
    )
    assert flops.count_with_fvcore(model, 32, batch=2) == flops.count(model, 32, batch=2)


# The smallest model of every family of ours. timm's: a convolutional net; SDPA with a class token;
# windows with bias; channel attention; depthwise convolutions; attention between convolutions.
@pytest.mark.parametrize(
    "name",
    [
        *(names[0] for names in table.families().values()),
        "resnet18",
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "davit_tiny",
        "mobilenetv3_small_100",
        "efficientvit_m0",
    ],
)
def test_torch_and_fvcore_agree(name):
    expected = flops.count(name, 128)
    model = flops.build(name, 128)
    assert flops.count(model, 128) == expected
    assert flops.count_with_fvcore(model, 128) == expected


def test_a_vision_transformer_by_formula():
    tokens, dim = 24 * 24 + 1, 192
    block = tokens * 12 * dim**2 + 2 * tokens**2 * dim
    expected = 12 * block + (tokens - 1) * 768 * dim + dim * 1000
    assert flops.count("vit_tiny_patch16_224", 384).macs == expected


class _OneMixer(nn.Module):
    def __init__(self, name, dim, **arguments):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 1)
        self.mixer = build_mixer((name, arguments), dim)

    def forward(self, x):
        return self.mixer(self.stem(x).permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param(name, example, id=f"{name}-{i}")
        for name, mixer in MIXERS.items()
        for i, example in enumerate(mixer.examples)
    ],
)
def test_our_operators_count_the_same_everywhere(name, arguments):
    model = _OneMixer(name, **arguments).eval()
    counts = flops.count(model, 14)
    assert counts == flops.count_with_fvcore(model, 14)
    stem = 14 * 14 * 3 * arguments["dim"]
    assert counts.macs > stem or (counts.macs == stem and not MIXERS[name].operator)


def test_neighborhood_attention_counts_its_windows_and_nothing_else():
    model = _OneMixer("neighborhood", 32, num_heads=2, kernel_size=7).eval()
    tokens = 28 * 28
    assert flops.count(model, 28).macs == tokens * (3 * 32 + 4 * 32 * 32 + 2 * 49 * 32)


def test_counting_leaves_the_model_and_the_operators_alone():
    model = _OneMixer("neighborhood", 32, num_heads=2, kernel_size=7).train()
    x = torch.randn(1, 3, 14, 14)
    before = model(x)
    flops.count(model, 14)
    flops.count_with_fvcore(model.eval(), 14)
    torch.testing.assert_close(model(x), before)
    assert all(p.device.type == "cpu" for p in model.parameters())
    if not (dispatch.TRITON_INTERPRET or torch.cuda.is_available()):
        q = torch.zeros(1, 7, 7, 1, 16)
        with pytest.raises(ValueError, match="triton"):
            OPERATORS["neighborhood_attention"].function(q, q, q, 3, backend="triton")


def test_every_custom_operator_has_a_formula():
    names = {f"vitarium::{n}" for n, operator in OPERATORS.items() if operator.operation}
    assert names <= dispatch.FLOP_FORMULAS.keys()


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(ValueError, match=r"'resnet_18' is not registered; did you mean .*resnet18"):
        flops.count("resnet_18")


@pytest.mark.parametrize(
    "arguments", [{"image_size": 0}, {"image_size": -224}, {"image_size": 224, "batch": 0}]
)
def test_impossible_inputs(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        flops.count("resnet18", **arguments)
