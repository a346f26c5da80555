"""A step of our loop beside a bare one, and whole commands beside timm's script."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vitarium.benchmarks import record, timm_script
from vitarium.cli.main import main

# Works for a tenth of a second per epoch, after a start of a fifth.
WORK = "import sys, time\nend = time.process_time() + 0.2 + 0.1 * int(sys.argv[1])\n"
WORK += "while time.process_time() < end: pass"


def test_a_step_beside_a_bare_one(tmp_path: Path) -> None:
    output = tmp_path / "training.jsonl"
    command = ["bench", "train", "--batch-size", "4", "--device", "cpu", "--output", str(output)]
    assert main([*command, "--seconds", "0"]) == 0
    assert main([*command, "--memory-only"]) == 0
    ours, bare, eager, checkpointing = record.read(output)
    assert [r.implementation for r in (ours, bare)] == ["vitarium", "bare"]
    assert len(ours.samples["cpu"]) == len(bare.samples["cpu"]) >= 10
    assert checkpointing.peak_memory < eager.peak_memory


def test_an_epoch_is_the_difference_of_runs(tmp_path: Path, monkeypatch) -> None:
    def stand_in(script, data, name, batch_size, image_size):
        assert len(list(data.glob("train/*/*.jpg"))) == 16
        assert len(list(data.glob("val/*/*.jpg"))) == 4
        work = [sys.executable, "-c", WORK]
        return {"vitarium": lambda epochs, output: [*work, str(epochs)],
                "timm": lambda epochs, output: [*work, str(4 * epochs)]}  # fmt: skip

    monkeypatch.setattr(timm_script, "_commands", stand_in)
    script = tmp_path / "train.py"
    script.write_text("")
    records = timm_script.bench_timm_script(
        script, images=16, epochs=3, rounds=1, output=tmp_path / "training.jsonl"
    )
    assert record.read(tmp_path / "training.jsonl") == records
    medians = {r.implementation: r.median for r in records}
    assert medians["vitarium"] == pytest.approx(0.1, abs=0.05)
    assert medians["timm"] == pytest.approx(0.4, abs=0.05)


def test_a_script_that_fails_or_is_missing(tmp_path: Path, capsys) -> None:
    output = tmp_path / "training.jsonl"
    script = tmp_path / "train.py"
    command = ["bench", "timm-script", str(script), "--images", "16", "--output", str(output)]
    assert main(command) == 1
    assert f"{script} is no file" in capsys.readouterr().err
    script.write_text("raise SystemExit('no such model')")
    assert main(command) == 1
    assert "no such model" in capsys.readouterr().err
    assert not output.exists()
