"""Growth with the number of tokens: what is measured, and what mixers claim."""

import math

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from vitarium.benchmarks import model_scaling, record
from vitarium.benchmarks.model_scaling import bench_model_scaling, growth
from vitarium.benchmarks.report import print_growth, scaling_table
from vitarium.benchmarks.scaling import bench_scaling, exponents, power
from vitarium.ops import MIXERS, build_mixer

LINEAR = [name for name, mixer in MIXERS.items() if mixer.linear]


def _flops(name: str, side: int) -> int:
    arguments = dict(MIXERS[name].examples[0])
    dim = arguments.pop("dim")
    mixer = build_mixer((name, arguments), dim, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        mixer(torch.empty(1, side, side, dim, device="meta"))
    return counter.get_total_flops()


# What is not a product is not counted: a mixer that only weighs tokens has none.
@pytest.mark.parametrize("name", [name for name in LINEAR if _flops(name, 14)])
def test_operations_grow_with_tokens(name):
    """By counting: a map of 16 times as many tokens takes at most 16 times as many, and padding."""
    small, large = _flops(name, 56), _flops(name, 224)
    assert 0 < small < large <= 16 * 1.1 * small


def test_some_mixers_are_linear():
    assert {"neighborhood", "window", "linear"} <= set(LINEAR)
    assert "attention" not in LINEAR and _flops("attention", 112) > 10 * _flops("attention", 56)


def test_records_and_table(tmp_path, capsys):
    output = tmp_path / "scaling.jsonl"
    records = bench_scaling(["window"], device="cpu", sides=(7, 14), seconds=0.0, output=output)
    assert record.read(output) == records
    assert [r.shapes["x"][1:3] for r in records] == [[7, 7], [14, 14]]
    ((setting, power),) = exponents(records).items()
    assert setting == ("window", "float32", "forward")
    expected = math.log(records[1].median / records[0].median) / math.log(4)
    assert power.exponent == pytest.approx(expected) and power.error is None
    Console(width=140).print(scaling_table(records))
    text = capsys.readouterr().out
    assert "float32 forward" in text and "window" in text and f"{power}" in text


def test_a_power_law_has_its_exponent_and_what_is_none_a_wide_interval():
    sizes = [1, 4, 16, 64, 256]
    exact = power([(n, 3 * n**1.5) for n in sizes])
    assert exact.exponent == pytest.approx(1.5) and exact.error < 1e-6
    bent = power([(n, 10 + n) for n in sizes])
    assert bent.exponent < 1 and bent.error > 0.2
    assert str(power([(1, 1), (4, 16)])) == "2.00" and str(exact) == "1.50 ± 0.00"


def test_models_on_larger_images_and_batches(tmp_path, capsys):
    output = tmp_path / "scaling.jsonl"
    records = bench_model_scaling(
        ["dinat_nano"],
        resolutions=(32, 64),
        batch_sizes=(1, 1 << 40),
        device="cpu",
        min_rounds=1,
        seconds=0.0,
        output=output,
    )
    assert record.read(output) == records
    assert [r.shapes["input"] for r in records] == [
        [1, 3, 32, 32],
        [1, 3, 64, 64],
        [1, 3, 32, 32],
        [1 << 40, 3, 32, 32],
    ]
    assert [r.failure is None for r in records] == [True, True, True, False]
    assert "not tried, it would take" in records[-1].failure
    assert growth(records).keys() == {("dinat_nano", "float32", "forward", "resolution")}
    print_growth(records, Console(width=140))
    text = capsys.readouterr().out
    assert "64" in text and "1099511627776x3x32x32: not tried" in text


def test_what_failed_is_not_tried_at_a_larger_size(monkeypatch):
    def bench(names, *, image_size, **_):
        fields = {"kind": "model", "implementation": "eager", "mode": "forward"}
        fields |= {"dtype": "float32", "arguments": {}, "clock": "wall"}
        fields["machine"] = record.this_machine("cpu")
        fields["shapes"] = {"input": [1, 3, image_size, image_size]}
        seen.append((image_size, list(names)))
        return [record.failed(name=name, failure="out of memory: 9 GB", **fields) for name in names]

    seen = []
    monkeypatch.setattr(model_scaling, "bench_models", bench)
    records = bench_model_scaling(["nat_mini"], resolutions=(32, 64, 128), batch_sizes=())
    assert seen == [(32, ["nat_mini"])]
    why = "not tried, a smaller one failed: out of memory: 9 GB"
    assert [r.failure for r in records] == ["out of memory: 9 GB", why, why]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["nat_mimi"]}, "did you mean nat_mini"),
        ({"names": []}, "nothing to measure"),
        ({"resolutions": (), "batch_sizes": ()}, "nothing to measure"),
        ({"resolutions": (128,)}, r"resolutions=\(128,\) must be at least two"),
        ({"batch_sizes": (0, 1)}, r"batch_sizes=\(0, 1\) must be at least two"),
    ],
)
def test_bad_arguments_of_models(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench_model_scaling(**{"names": ["nat_mini"], **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["windw"]}, "mixer='windw' is unknown"),
        ({"sides": (14,)}, r"sides=\(14,\) must be at least two"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"modes": ["both"]}, "mode='both' is unknown"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench_scaling(**arguments)
