"""Growth with the number of tokens: what is measured, and what mixers claim."""

import math

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from vitarium.benchmarks import record
from vitarium.benchmarks.report import scaling_table
from vitarium.benchmarks.scaling import bench_scaling, exponents
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
    assert power == pytest.approx(expected)
    Console(width=140).print(scaling_table(records))
    text = capsys.readouterr().out
    assert "float32 forward" in text and "window" in text and f"{power:.2f}" in text


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
