"""The measurement of data loading: what is recorded, never how fast."""

import pytest
from rich.console import Console

from vitarium.benchmarks import record
from vitarium.benchmarks.loader import bench_loader, loader_table


def test_records_by_number_of_workers(tmp_path, capsys):
    output = tmp_path / "loader.jsonl"
    records = bench_loader(
        "digits", workers=(1, 0), batch_size=512, image_size=32, min_samples=2, seconds=0.0,
        output=output,
    )  # fmt: skip
    assert record.read(output) == records
    assert [r.arguments for r in records] == [
        {"workers": 0, "recipe": None},
        {"workers": 1, "recipe": None},
    ]
    for r in records:  # more batches than an epoch has
        assert (r.kind, r.mode, len(r.samples["wall"])) == ("loader", "loading", 2)
        assert r.shapes == {"images": [512, 3, 32, 32]}
        assert r.throughput == pytest.approx(512 / r.median)
    Console(width=100).print(loader_table(records))
    assert "512x3x32x32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": (10_000,)}, "must be from 0 to"),
        ({"workers": (-1,)}, "must be from 0 to"),
        ({"recipe": "digit"}, "neither a recipe"),
        ({"source": "nowhere"}, "nowhere"),
        ({"batch_size": 100_000}, "exceeds the"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench_loader(**{"seconds": 0.0, "workers": (0,), **arguments})
