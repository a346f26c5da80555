"""Reports of records: comparisons, curves, points, tables and pictures, and what is refused."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from vitarium.benchmarks import (
    atlas,
    comparisons,
    growth,
    page,
    pareto,
    plot,
    record,
    report_tables,
)
from vitarium.benchmarks.record import Machine, Record
from vitarium.benchmarks.report_files import markdown, read_records, read_sheet, write_report
from vitarium.cli.main import main

MACHINE = Machine("cpu", "Example CPU", 4, 1, "Linux x86_64")


def made(median: float, *, spread: float = 0.02, **fields) -> Record:
    """A record whose samples lie within `spread` of its median."""
    fields = {
        "kind": "model",
        "name": "example_tiny",
        "implementation": "eager",
        "mode": "forward",
        "dtype": "float32",
        "shapes": {"input": [1, 3, 224, 224]},
        "arguments": {},
        "machine": MACHINE,
        **fields,
    }
    samples = [median * (1 + spread * step / 4) for step in range(-4, 5)]
    return record.measured(samples={"cpu": samples}, clock="cpu", **fields)


def operator(implementation: str, median: float, **fields) -> Record:
    return made(
        median,
        kind="operator",
        name="window_attention",
        implementation=implementation,
        case="7x7 heads 2",
        shapes={"query": [4, 7, 7, 2, 32]},
        **{"error": None if implementation in ("floor", "other") else 1e-7, **fields},
    )


def test_ours_is_compared_with_the_fastest_peer_that_gives_the_same():
    (found,) = comparisons.compared(
        [
            operator("torch", 3e-3),
            operator("triton", 2e-3),
            operator("gather", 5e-3),
            operator("sdpa", 4e-3),
            operator("other", 1e-3),  # unchecked: computes another function
            operator("floor", 1e-3),
        ]
    )
    assert (found.ours.implementation, found.peer.implementation) == ("triton", "sdpa")
    assert found.over_peer == pytest.approx(0.5) and found.over_floor == pytest.approx(2)
    assert found.verdict == "faster" and not found.at_floor


@pytest.mark.parametrize(
    ("theirs", "spread", "verdict"),
    [
        (1.1e-3, 0.01, "faster"),
        (1.1e-3, 0.10, "within the spread"),
        (0.9e-3, 0.10, "within the spread"),
        (0.9e-3, 0.01, "slower"),
    ],
)
def test_no_verdict_and_no_ratio_within_the_spread(theirs, spread, verdict):
    records = [operator("torch", 1e-3, spread=spread), operator("gather", theirs, spread=spread)]
    (found,) = comparisons.compared(records)
    assert found.verdict == verdict
    table = report_tables.comparison_table([found])
    row = dict(zip([c.label for c in table.columns], table.rows[0]))
    printed = row.get("ours / peer", "")
    assert printed == ("" if verdict == "within the spread" else f"{1e-3 / theirs:.2f}")
    assert row["ours is"] == verdict


def test_only_records_of_one_run_are_compared_and_the_latest_counts():
    old = [operator("torch", 9e-3), operator("gather", 1e-3)]
    old = [dataclasses.replace(r, commit="old", date="2020-01-01T00:00:00+00:00") for r in old]
    new = [operator("torch", 2e-3), operator("gather", 4e-3)]
    (found,) = comparisons.compared([*new, *old])
    assert found.over_peer == pytest.approx(0.5)
    assert comparisons.compared([old[0], new[1]]) == []


def test_curves_are_of_three_sizes_that_differ_in_nothing_else():
    records = [
        made(
            1e-9 * side**4,
            kind="mixer",
            name="window",
            implementation="vitarium",
            shapes={"x": [1, side, side, dim]},
        )
        for dim in (32, 64)
        for side in ((8, 16, 32) if dim == 32 else (8, 16))
    ]
    records += [made(1e-3 * b, shapes={"input": [b, 3, 224, 224]}) for b in (1, 2, 4)]
    tokens, images = growth.panels(records)
    (curve,) = tokens.curves
    assert (curve.name, curve.note, curve.group) == ("window", "32 channels", "local")
    assert curve.power.exponent == pytest.approx(2)  # time by the square of tokens
    assert [x for x, _ in curve.points] == [64, 256, 1024]
    assert images.size == "images" and images.curves[0].power.exponent == pytest.approx(1)


def test_points_join_modes_and_know_accuracies_at_the_published_size():
    records = [
        made(0.1, name="nat_mini", params=20_000_000, macs=2_700_000_000),
        made(0.3, name="nat_mini", mode="training", peak_memory=2**30),
        made(0.2, name="nat_mini", dtype="bfloat16"),
        made(0.2, name="dinat_mini", macs=1),
        made(0.05, name="dinat_mini", macs=1, shapes={"input": [1, 3, 128, 128]}),
        made(0.4, name="unknown_tiny"),
    ]
    (points,) = pareto.point_sets(records)
    nat, dinat, unknown = points.points
    assert nat.values["accuracy"] == dinat.values["accuracy"] == 81.8
    assert nat.values["forward"] == pytest.approx(100)
    assert nat.values["training"] == pytest.approx(300)
    assert nat.values["training_memory"] == 1024 and nat.values["gflops"] == pytest.approx(2.7)
    assert dinat.values["forward"] == pytest.approx(200), "its own size, not another"
    assert nat.groups["mixer"] == "neighborhood" and dinat.groups["family"] == "dinat"
    assert "accuracy" not in unknown.values
    assert points.axes == ["accuracy", "forward", "throughput", "gflops"]


def test_the_front_is_what_no_other_beats():
    costs = [(3, 1), (1, 3), (2, 2), (2, 3), (3, 2), (4, 1)]
    assert plot.front(costs) == [1, 2, 0]
    assert plot.front([]) == []


def test_data_in_the_page_cannot_end_its_script():
    name = "</script><script>alert(1)</script>"
    records = [made(0.1, name=name, macs=1, params=1), made(0.2, name="<b>&", macs=2, params=2)]
    text = page.page({"<i>.jsonl": records})
    assert "<script>alert" not in text and "<b>&" not in text and "<i>.jsonl" not in text
    data = text.partition('id="data">')[2].partition("</script>")[0]
    assert [p["name"] for p in json.loads(data)["sets"][0]["points"]] == [name, "<b>&"]


def test_kernel_rows_of_any_keys_become_a_table():
    rows = [{"kernel": "a", "registers": 64}, {"kernel": "b", "spills": 0, "mma": {"m16n8k16": 4}}]
    table = report_tables.kernel_table(rows)
    assert [c.label for c in table.columns] == ["kernel", "registers", "spills", "mma"]
    assert [c.numeric for c in table.columns] == [False, True, True, False]
    assert table.rows == [["a", "64", "", ""], ["b", "", "0", '{"m16n8k16": 4}']]


def test_a_row_that_failed_is_shown_and_not_drawn():
    failed = dataclasses.replace(made(0.1, name="broken", macs=1), failure="out of memory")
    records = [failed, made(0.1, macs=1), made(0.2, name="other_tiny", macs=2)]
    (points,) = pareto.point_sets(records)
    assert [p.name for p in points.points] == ["example_tiny", "other_tiny"]
    assert "out of memory" in page.page({"r.jsonl": records})


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    record.append(path, [made(0.1, name="nat_mini", macs=1), made(0.2, name="a|b", macs=2)])
    record.append(path, [operator("torch", 1e-3), operator("gather", 2e-3)])
    return path


def test_markdown_tables(records):
    text = markdown([r for found in read_records([records]).values() for r in found])
    assert "| a\\|b |" in text and "a|b" not in text
    assert "| window_attention | forward | float32 | 7x7 heads 2 | faster | 0.50 |" in text


@pytest.mark.parametrize(
    ("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".md", b"# What")]
)
def test_static_views_by_suffix(records, tmp_path, capsys, suffix, begins):
    output = tmp_path / f"report{suffix}"
    assert main(["bench", "report", str(records), "-o", str(output)]) == 0
    assert output.read_bytes().startswith(begins)
    assert capsys.readouterr().out.strip() == str(output)


def test_files_of_one_name_are_told_apart(records, tmp_path):
    (tmp_path / "other").mkdir()
    second = tmp_path / "other" / records.name
    second.write_text(records.read_text())
    assert list(read_records([records, second])) == [str(records), str(second)]
    assert list(read_records([records, records])) == [records.name]


def test_a_wrong_suffix_is_bad_usage(records, tmp_path, capsys):
    output = tmp_path / "report.pdf"
    assert main(["bench", "report", str(records), "-o", str(output)]) == 2
    assert ".html, .md, .png, .svg" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"must end in \.html"):
        write_report([records], output)


def test_what_cannot_be_read_or_written_is_said_and_nothing_is_overwritten(
    records, tmp_path, capsys
):
    output = tmp_path / "report.html"
    output.write_text("old")
    for name, content in (("empty", b""), ("text", b"hello\n"), ("binary", b"\xff\xfe\x00")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "sheet.json").write_text('{"columns": ["a"], "rows": [1]}')
    (tmp_path / "folder.html").mkdir()
    for arguments, message in (
        (["absent.jsonl"], "there is no such file"),
        ([str(tmp_path)], "is a folder"),
        ([str(tmp_path / "empty")], "no records in"),
        ([str(tmp_path / "text")], "text:1: Expecting value"),
        ([str(tmp_path / "binary")], "binary: 'utf-8' codec"),
        ([str(records), "--kernels", str(tmp_path / "sheet.json")], "is no kernel sheet"),
        ([str(records), "--images", str(tmp_path / "text")], "must end in .png"),
        ([str(records), "-o", str(tmp_path / "no" / "report.html")], "there is no folder"),
        ([str(records), "-o", str(tmp_path / "folder.html")], "is a folder"),
    ):
        arguments = arguments if "-o" in arguments else [*arguments, "-o", str(output)]
        assert main(["bench", "report", *arguments]) == 1, arguments
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert output.read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_a_picture_needs_an_accuracy(tmp_path, capsys):
    path = tmp_path / "operators.jsonl"
    record.append(path, [operator("torch", 1e-3), operator("gather", 2e-3)])
    output = tmp_path / "report.png"
    assert main(["bench", "report", str(path), "-o", str(output)]) == 1
    assert "nothing to draw" in capsys.readouterr().err
    assert not output.exists()


def test_sheets_are_objects_or_columns_and_rows(tmp_path):
    path = tmp_path / "kernels.json"
    for text in ('[{"kernel": "a"}]', '{"schema": 1, "columns": ["kernel"], "rows": [["a"]]}'):
        path.write_text(text)
        assert read_sheet(path) == [{"kernel": "a"}]
    (first, *others) = read_sheet(Path(__file__).parents[2] / "benchmarks/results/kernels.json")
    assert 0 < first["occupancy, %"] <= 100 and first["bound, TFLOP/s"] > 0 and len(others) > 100
    assert len(first) < 20 and {"registers per thread", "shared memory, KiB"} <= first.keys()


def test_the_page_has_an_atlas_if_asked_for(tmp_path, monkeypatch):
    entries = atlas.entries
    monkeypatch.setattr(atlas, "entries", lambda records: entries(["window", "linear"], records))
    records, output = tmp_path / "records.jsonl", tmp_path / "report.html"
    record.append(records, [made(0.1, resident_memory=3 << 20, roofline=0.5)])
    assert main(["bench", "report", str(records), "--atlas", "-o", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 1 and "What every mixer reads" in text
    assert "of the roofline, %" in text and "resident memory, MiB" in text
    rows = re.findall(r"<tr>(<th scope=.row.>(?:window|linear)</th>.*)", text)
    assert len(rows) == 2 and ">16<" in rows[0] and ">256<" in rows[1]  # 4 x 4, and the whole map
    assert "multiply-adds" in text and "C channels" in text
    assert main(["bench", "report", str(records), "-o", str(output)]) == 0
    assert "data:image/png" not in output.read_text(encoding="utf-8")
