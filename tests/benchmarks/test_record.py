"""Records: the schema, files, refusals."""

import dataclasses
import json

import pytest

from vitarium.benchmarks import record
from vitarium.benchmarks.record import Machine, Record

MACHINE = Machine("cpu", "Example CPU (TM) 3.0", 4, 1, "Linux x86_64")

# A line as schema 1 writes it. It stays here for ever: later schemas must read it.
FIRST_SCHEMA = (
    '{"kind": "operator", "name": "neighborhood_attention", "implementation": "torch", '
    '"mode": "forward", "dtype": "float32", "shapes": {"query": [4, 56, 56, 2, 32]}, '
    '"arguments": {"kernel_size": 7}, "clock": "cpu", '
    '"samples": {"wall": [0.3, 0.1], "cpu": [0.2, 0.1]}, "median": 0.15, "p10": 0.11, '
    '"p90": 0.19, "machine": {"device": "cpu", "processor": "Example CPU", "cores": 2, '
    '"threads": 1, "system": "Linux x86_64"}, "versions": {"torch": "2.11.0"}, '
    '"date": "2026-11-20T00:00:00+00:00", "throughput": null, "peak_memory": null, '
    '"params": null, "macs": 157351936, "activations": null, "error": 1e-07, '
    '"error_of": "output against the float64 reference", "parts": {}, "commit": null, "schema": 1}'
)


@pytest.fixture
def example() -> Record:
    return record.measured(
        samples={"wall": [4.0, 1.0, 2.0, 3.0, 5.0], "cpu": [1.0] * 5},
        clock="wall",
        machine=MACHINE,
        images=6,
        kind="model",
        name="resnet18",
        implementation="eager",
        mode="forward",
        dtype="float32",
        shapes={"input": [6, 3, 32, 32]},
        arguments={"channels_last": False},
        params=11,
    )


def test_statistics_are_of_the_clock_that_is_named(example):
    assert (example.median, example.p10, example.p90) == (3.0, pytest.approx(1.4), 4.6)
    assert example.throughput == 2.0
    assert example.versions.keys() >= {"python", "torch", "timm", "vitarium"}
    assert example.machine.slug == "example-cpu-tm-3-0"


def test_a_clock_without_samples_is_refused():
    with pytest.raises(ValueError, match="clock='cuda' has no samples; sampled were wall"):
        record.measured(samples={"wall": [1.0]}, clock="cuda", machine=MACHINE)


def test_files_keep_every_record(tmp_path, example):
    path = tmp_path / "folder" / "records.jsonl"
    record.append(path, [example])
    other = dataclasses.replace(example, name="vit")
    record.append(path, [other, example])
    assert record.read(path) == [example, other, example]
    assert len(path.read_text().splitlines()) == 3


def test_the_first_schema_stays_readable(tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_text(FIRST_SCHEMA + "\n\n")
    (old,) = record.read(path)
    assert old.macs == 157351936 and old.samples["cpu"] == [0.2, 0.1]


def test_fields_of_the_schema_are_these():
    """Fields may be added with a default and a new number of the schema; none may go."""
    fields = {item.name for item in dataclasses.fields(Record)}
    added = {"case", "seed", "accuracy", "failure"}
    added |= {"stages", "series", "pace", "resident_memory"}  # 4
    added |= {"intensity", "peak_flops", "peak_bandwidth", "roofline"}
    assert (fields, record.SCHEMA) == ({*json.loads(FIRST_SCHEMA), *added}, 4)


def test_what_failed_has_no_samples_and_says_why(tmp_path):
    path = tmp_path / "records.jsonl"
    made = record.failed(
        failure="out of memory",
        clock="wall",
        machine=MACHINE,
        kind="model",
        name="large",
        implementation="eager",
        mode="step",
        dtype="float32",
        shapes={},
        arguments={},
    )
    record.append(path, [made])
    assert record.read(path) == [made]
    assert (made.samples, made.median, made.failure) == ({}, None, "out of memory")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema=99 was written by a later version"),
        ({"median": "fast"}, "field median='fast' is no float"),
        ({"macs": True}, "field macs=True is no int"),
        ({"kind": "train"}, "field kind='train' is no Literal"),
        ({"samples": {"wall": [1.0, None]}}, "field samples="),
        ({"speed": 3}, "unknown fields: speed"),
        ({"machine": 3}, "machine must be an object, got int"),
        ({"machine": {"device": "cpu"}}, "machine lacks the field 'processor'"),
    ],
)
def test_malformed_lines_are_refused_with_their_place(tmp_path, change, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(FIRST_SCHEMA + "\n" + json.dumps({**json.loads(FIRST_SCHEMA), **change}))
    with pytest.raises(ValueError, match=message) as raised:
        record.read(path)
    assert str(raised.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize("line", ["{", "[]", FIRST_SCHEMA[:-20], FIRST_SCHEMA + FIRST_SCHEMA])
def test_broken_lines_are_refused_with_their_place(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError) as raised:
        record.read(path)
    assert str(raised.value).startswith(f"{path}:1: ")


def test_values_that_are_no_numbers_are_not_written(tmp_path, example):
    path = tmp_path / "records.jsonl"
    with pytest.raises(ValueError):
        record.append(path, [dataclasses.replace(example, error=float("nan"))])
    assert not path.exists()
