"""The measurement of models: checks before the clock, memory, parts, records."""

import pytest
import timm
import torch
from rich.console import Console
from torch import nn

from vitarium.benchmarks import bench_models, breakdown, memory, print_table, record
from vitarium.ops import build_mixer

QUICK = {"threads": 1, "min_rounds": 2, "seconds": 0.0, "device": "cpu"}


def _register(monkeypatch, name, model):
    """`model` as what timm builds under `name`, within one test."""
    entrypoints = timm.models._registry._model_entrypoints
    monkeypatch.setitem(entrypoints, name, lambda pretrained=False, **kwargs: model)


def test_models_side_by_side(tmp_path):
    output = tmp_path / "models.jsonl"
    names = ["resnet18", "vit_tiny_patch16_224"]
    records = bench_models(names, batch_size=2, image_size=64, profile=True, output=output, **QUICK)
    assert [r.name for r in records] == names
    assert record.read(output) == records
    resnet, vit = records
    assert resnet.shapes == {"input": [2, 3, 64, 64]}
    assert (resnet.params, vit.params) == (11689512, vit.params)
    assert resnet.clock == "wall" and {"wall", "cpu"} == resnet.samples.keys()
    assert resnet.p10 <= resnet.median <= resnet.p90
    assert resnet.throughput == 2 / resnet.median
    assert resnet.machine.threads == 1
    # Weights and input, and at least the first feature map and its copy after the activation.
    assert resnet.peak_memory > 4 * (resnet.params + 2 * 3 * 64 * 64 + 2 * 2 * 64 * 32 * 32)
    assert sum(vit.parts.values()) == pytest.approx(1)
    assert vit.parts[breakdown.CHANNEL_MLP] > 0 and vit.parts[breakdown.OPERATOR] > 0
    assert resnet.parts[breakdown.OPERATOR] == 0 and resnet.parts[breakdown.CONVOLUTION] > 0.3


def test_the_table_shows_every_model_and_says_where(capsys):
    records = bench_models(["resnet18"], image_size=32, dtype="bfloat16", **QUICK)
    print_table(records, Console(width=100))
    text = capsys.readouterr().out
    for expected in (
        "resnet18",
        "bfloat16",
        "1x3x32x32",
        "11.7",
        "1 thread",
        torch.__version__[:4],
    ):
        assert expected in text


def test_channels_last_is_recorded_and_checked():
    (result,) = bench_models(["resnet18"], image_size=32, channels_last=True, **QUICK)
    assert result.arguments == {"channels_last": True}
    assert 0 <= result.error < 1e-4


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: x.mean((2, 3)) / 0, "not finite"),
        (lambda x: torch.rand(1, 10), "different outputs for the same input"),
        (lambda x: x.mean((2, 3)) + 1 * x.is_contiguous(), "another output than as built"),
    ],
)
def test_a_wrong_model_is_not_timed(monkeypatch, output, message):
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return output(x)

    _register(monkeypatch, "wrong", Wrong())
    with pytest.raises(FloatingPointError, match=message):
        bench_models(["wrong"], image_size=8, channels_last=True, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": []}, "at least one model name"),
        ({"names": "resnet18"}, "must be a sequence"),
        ({"names": ["resnet81"]}, "did you mean"),
        ({"dtype": "float8"}, "dtype='float8' is unknown; did you mean float32"),
        ({"device": "tpu"}, "device='tpu' is unknown"),
        ({"device": "mps"}, "device='mps' cannot be timed"),
        ({"device": "cuda:99"}, "torch sees"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"image_size": -1}, "image_size=-1 must be at least 1"),
        ({"threads": 0}, "threads=0 must be at least 1"),
        ({"compile": True, "profile": True}, "profile=True needs compile=False"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench_models(**{"names": ["resnet18"], **QUICK, **arguments})


def test_peak_memory_of_a_known_chain():
    x = torch.ones(1000, 1000)

    def run():
        first = x + 1  # 4 MB
        second = first * 2  # 8 MB
        del first
        return second - 1  # 8 MB again

    assert memory.peak_growth(run) == pytest.approx(8e6, rel=0.01)


def test_parts_of_a_mixer_are_told_apart():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 1)
            self.norm = nn.LayerNorm(32)
            self.mixer = build_mixer("neighborhood", 32, num_heads=2)

        def forward(self, x):
            return self.mixer(self.norm(self.stem(x).permute(0, 2, 3, 1)))

    parts = breakdown.forward_parts(Tokens().eval(), torch.randn(1, 3, 28, 28), repeats=3)
    assert set(parts) == set(breakdown.PARTS)
    assert parts[breakdown.CHANNEL_MLP] == 0
    for part in (breakdown.OPERATOR, breakdown.PROJECTIONS, breakdown.CONVOLUTION, breakdown.NORM):
        assert parts[part] > 0
