"""Counts: by formula, by torch on meta and by fvcore they are one number."""

import dataclasses
import os

import pytest
import torch
from rich.console import Console
from torch import nn

from vitarium import zoo
from vitarium.benchmarks import counters, flops, table
from vitarium.benchmarks.counters import Counted
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


# The smallest model of every family of ours, or with VITARIUM_ALL_MODELS=1 all of them. Without it
# Agent and InLine share hosts, and MoH has TransNeXt's: fvcore takes its time for them. timm's: a
# convolutional net; SDPA with a class token; windows with bias; channel attention; depthwise
# convolutions; attention between convolutions.
OURS = (
    zoo.list_models()
    if os.environ.get("VITARIUM_ALL_MODELS") == "1"
    else [
        names[0]
        for family, names in table.families().items()
        if family not in ("agent_deit", "agent_cswin", "inline_pvt", "inline_swin", "moh_transnext")
    ]
)


@pytest.mark.parametrize(
    "name",
    [
        *OURS,
        "resnet18",
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "davit_tiny",
        "mobilenetv3_small_100",
        "efficientvit_m0",
    ],
)
def test_our_counter_torchs_and_fvcores_agree(name):
    counted = counters.count_by_all(name, 128)
    assert counted.equal, counted
    expected = Counts(counted.params, counted.macs["ours"], counted.activations["ours"])
    assert flops.count(flops.build(name, 128), 128) == expected  # on the CPU as on meta


def test_counters_side_by_side(capsys):
    counted = counters.bench_flops(["resnet18", "dinat_nano"], image_size=32)
    assert [row.name for row in counted] == ["resnet18", "dinat_nano"]
    assert all(row.equal for row in counted)
    differs = dataclasses.replace(counted[0], macs={**counted[0].macs, "torch": 1})
    failed = Counted("broken", failure="ValueError: no")
    assert not differs.equal and not failed.equal
    Console(width=100).print(counters.counters_table([*counted, differs, failed]))
    text = capsys.readouterr().out
    assert "equal" in text and "differ" in text and "failed: ValueError: no" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"names": ["resnet_18"]}, "did you mean"), ({"names": [], "image_size": 0}, "at least 1")],
)
def test_bad_arguments_of_counters(arguments, message):
    with pytest.raises(ValueError, match=message):
        counters.bench_flops(**arguments)


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
