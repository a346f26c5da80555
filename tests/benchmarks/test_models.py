"""The measurement of models: checks before the clock, memory, parts, records."""

import itertools
import time

import pytest
import timm
import torch
from rich.console import Console
from torch import nn

from vitarium.benchmarks import bench_models, breakdown, guard, memory, print_table, record
from vitarium.benchmarks.selection import chosen_models
from vitarium.benchmarks.table import families
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
    assert sum(sum(shares.values()) for shares in resnet.stages.values()) == pytest.approx(1)
    assert [name for name in resnet.stages if name.startswith("layer")] == [
        f"layer{number}.{block}" for number in (1, 2, 3, 4) for block in (0, 1)
    ]
    assert {"patch_embed", "blocks", "norm", "head"} <= vit.stages.keys()  # twelve are no stages
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
    (result,) = bench_models(["wrong"], image_size=8, channels_last=True, **QUICK)
    assert message in result.failure
    assert (result.samples, result.median) == ({}, None)


class _Toy(nn.Module):
    """A convolution whose means go through a function."""

    def __init__(self, function):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.function = function

    def forward(self, x):
        return self.function(self.convolution(x).mean((2, 3)))


def _raise(x):
    raise KeyError("no such thing")


def _raise_later():
    calls = itertools.count()
    return lambda x: _raise(x) if next(calls) > 7 else x


MISBEHAVING = {
    "raises": (_raise, "KeyError: 'no such thing'"),
    "raises_later": (_raise_later(), "KeyError: 'no such thing'"),
    "nan": (lambda x: x / 0 * 0, "not finite"),
    "slow": (lambda x: (time.sleep(30), x)[1], "too slow: takes longer than the limit of 0.5 s"),
    "large": (lambda x: x + torch.empty(1 << 60).sum(), "out of memory"),
    "greedy": (lambda x: x + len(bytearray(1 << 60)), "out of memory"),
}


def test_a_misbehaving_model_is_reported_in_its_row_and_ends_nothing(monkeypatch, tmp_path, capsys):
    for name, (function, _) in MISBEHAVING.items():
        _register(monkeypatch, name, _Toy(function))
    entrypoints = timm.models._registry._model_entrypoints
    monkeypatch.setitem(entrypoints, "unbuilt", lambda pretrained=False, **kwargs: _raise(None))
    _register(monkeypatch, "good", _Toy(lambda x: x))
    output = tmp_path / "models.jsonl"
    names = [*MISBEHAVING, "unbuilt", "good"]
    records = bench_models(names, image_size=8, limit=0.5, output=output, **QUICK)
    assert [r.name for r in records] == names and record.read(output) == records
    *bad, good = records
    reasons = {**{name: why for name, (_, why) in MISBEHAVING.items()}, "unbuilt": "no such thing"}
    for r in bad:
        assert reasons[r.name] in r.failure and "\n" not in r.failure
        assert (r.samples, r.median, r.throughput) == ({}, None, None)
        assert r.shapes == {"input": [1, 3, 8, 8]}
    assert good.failure is None and good.median > 0
    print_table(records, Console(width=100))
    text = capsys.readouterr().out
    assert "slow failed: too slow" in text and "nan failed" in text


def test_memory_that_is_not_there_is_refused_before_it_is_touched():
    """Blocks of a size that each would be granted, until together they are too many."""
    blocks = []
    with pytest.raises(RuntimeError) as raised, guard.memory_limit(torch.device("cpu")):
        while len(blocks) < 1 << 16:
            blocks.append(torch.empty(1 << 30, dtype=torch.uint8))
    assert guard.reason(raised.value).startswith("out of memory")


def test_gradients_that_are_no_numbers_fail_in_training_alone(monkeypatch):
    _register(monkeypatch, "cusp", _Toy(lambda x: (x - x).abs().sqrt() + x))
    _register(monkeypatch, "good", _Toy(lambda x: x))
    modes = ["forward", "training"]
    forward, _, training, good = bench_models(["cusp", "good"], modes=modes, image_size=8, **QUICK)
    assert (forward.mode, forward.failure) == ("forward", None)
    assert training.mode == "training" and "gradients that are not finite" in training.failure
    assert good.failure is None


def test_modes_of_training_hold_gradients_and_the_state_of_the_optimizer():
    modes = ["forward", "training", "step"]
    records = bench_models(["resnet18"], modes=modes, image_size=64, **QUICK)
    assert [r.mode for r in records] == modes
    forward, training, step = records
    weights = 4 * forward.params
    assert training.peak_memory > forward.peak_memory + 0.9 * weights
    assert step.peak_memory > training.peak_memory + 1.9 * weights
    assert len({r.series for r in records}) == 3 and len({r.params for r in records}) == 1


def test_the_share_of_the_roofline_by_hand():
    (r,) = bench_models(["resnet18"], image_size=32, batch_size=2, **QUICK)
    buffers = 4 * (r.params + 2 * 4800) + 8 * 20  # running statistics, and their counters
    moved = buffers + 4 * 2 * (3 * 32 * 32 + 2 * r.activations)
    assert r.intensity == pytest.approx(2 * 2 * r.macs / moved)
    possible = min(r.peak_flops, r.intensity * r.peak_bandwidth)
    assert r.roofline == pytest.approx(2 * 2 * r.macs / r.median / possible)
    assert r.pace.keys() == r.samples.keys() and len(r.pace["cpu"]) == len(r.samples["cpu"])


def test_families_and_their_smallest():
    assert chosen_models(family="nat") == ["nat_mini", "nat_tiny", "nat_small", "nat_base"]
    assert chosen_models(["resnet18", "nat_mini"], family="nat")[:2] == ["resnet18", "nat_mini"]
    smallest = chosen_models(all_smallest=True)
    assert len(smallest) == len(families()) and {"nat_mini", "biformer_tiny"} <= set(smallest)
    assert "dinat_mini" in smallest  # dinat_nano is of no paper
    with pytest.raises(ValueError, match="family='natt' is unknown; did you mean nat"):
        chosen_models(family="natt")
    with pytest.raises(ValueError, match="no model is named"):
        chosen_models()


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
        ({"modes": ["backward"]}, "mode='backward' is unknown"),
        ({"modes": []}, "at least one mode"),
        ({"limit": 0.0}, "limit=0.0 must be above 0"),
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


def test_time_counts_once_by_stage_and_part(monkeypatch):
    """With a clock that ticks at every call of a module's own work."""
    now = 0.0

    def work(seconds):
        nonlocal now
        now += seconds

    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            work(1.0)
            x = self.norm(x)
            return torch.cat([x, x])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.Sequential(Stage(), Stage())

        def forward(self, x):
            work(4.0)
            return self.stages(x)

    cat, norm = torch.cat, nn.BatchNorm2d.forward
    monkeypatch.setattr(breakdown, "_clock", lambda device: lambda: now)
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: (work(2.0), norm(self, x))[1])

    def slow_cat(tensors):
        work(0.5)
        return cat(tensors)

    monkeypatch.setattr(
        torch,
        "cat",
        lambda t: (
            torch.overrides.handle_torch_function(slow_cat, t, t)
            if torch.overrides.has_torch_function(t)
            else slow_cat(t)
        ),
    )
    monkeypatch.setattr(breakdown, "_MOVING", {slow_cat})
    stages = breakdown.forward_stages(Model().eval(), torch.randn(1, 3, 4, 4), repeats=1)
    assert list(stages) == ["", "stages.0", "stages.1"]
    seconds = {name: {p: 11 * s for p, s in parts.items() if s} for name, parts in stages.items()}
    stage = {breakdown.REST: 1.0, breakdown.NORM: 2.0, breakdown.MOVES: 0.5}
    assert seconds == {
        "": {breakdown.REST: pytest.approx(4.0)},
        **{name: pytest.approx(stage) for name in ("stages.0", "stages.1")},
    }
