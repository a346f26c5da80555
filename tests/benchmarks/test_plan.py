"""The plan of measurements: what a step does wrong is its own affair, what is done stays done."""

import dataclasses
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vitarium.benchmarks import plan, record
from vitarium.benchmarks import steps as steps_module
from vitarium.benchmarks.steps import Place, Step
from vitarium.cli.main import main

# Steps run in processes of their own, which import them by this name.
MADE_UP = """
import os, subprocess, sys, time
from vitarium.benchmarks.steps import Outcome

def note(place, text):
    with open(place.folder / "notes", "a") as file:
        file.write(text + "\\n")

def works(place, seconds):
    note(place, f"worked {0 < seconds < 600}")
    return Outcome()

def raises(place, seconds):
    print("a word before")
    raise ValueError("two\\nlines")

def crashes(place, seconds):
    os._exit(3)

def refuses(place, seconds):
    return Outcome(["one: wrong"], remaining=2)

def has_too_much_to_do(place, seconds):
    note(place, "more")
    return Outcome(remaining=2)

def never_ends(place, seconds):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    note(place, f"process {other.pid}")
    time.sleep(600)
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    (tmp_path / "made_up_steps.py").write_text(MADE_UP)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("made_up_steps")


def _run(
    steps: list[Step], folder: Path, minutes: float = 10, fresh: bool = False
) -> dict[str, tuple[str, str]]:
    place = Place("cpu", folder, fresh)
    reports = steps_module.run_suite(steps, place, minutes=minutes, logs=folder / "logs")
    assert [report.step for report in reports] == [step.name for step in steps]
    return {report.step: (report.status, report.detail) for report in reports}


def test_steps_that_fail_do_not_end_the_run(tmp_path, made_up) -> None:
    steps = [
        Step("raises", made_up.raises, 1),
        Step("crashes", made_up.crashes, 1),
        Step("refuses", made_up.refuses, 1),
        Step("too much", made_up.has_too_much_to_do, 1),
        Step("works", made_up.works, 1),
        Step("always", made_up.works, 1, repeated=True),
    ]
    found = _run(steps, tmp_path)
    assert found["raises"] == ("failed", "ValueError: two lines")
    log = (tmp_path / "logs" / "raises.log").read_text()
    assert "a word before" in log and "Traceback" in log
    status, detail = found["crashes"]
    assert status == "failed" and "exit code 3" in detail
    assert found["refuses"] == ("failed", "one: wrong; 2 remain")
    assert found["too much"] == ("unfinished", "2 remain")
    assert found["works"] == found["always"] == ("done", "")
    # The same call does again what is not done, and nothing else.
    notes = tmp_path / "notes"
    assert notes.read_text().split("\n")[:-1] == ["more", "worked True", "worked True"]
    found = _run(steps, tmp_path)
    assert found["works"][0] == "done before" and found["always"][0] == "done"
    assert notes.read_text().count("more") == 2 and notes.read_text().count("worked True") == 3
    assert _run(steps[4:5], tmp_path, fresh=True)["works"][0] == "done"
    # Another commit has other code.
    ledger = tmp_path / steps_module.LEDGER
    held = steps_module.read_ledger(ledger)
    assert len(held) == 6
    steps_module._write_ledger(ledger, [dataclasses.replace(r, commit="another") for r in held])
    assert _run(steps[4:5], tmp_path)["works"][0] == "done"
    ledger.write_text("[{}]")
    with pytest.raises(ValueError, match="does not say which steps are done"):
        _run(steps, tmp_path)


def test_a_step_that_takes_too_long_is_ended(tmp_path, made_up) -> None:
    steps = [Step("never ends", made_up.never_ends, 2), Step("works", made_up.works, 998)]
    began = time.monotonic()
    found = _run(steps, tmp_path, minutes=25)  # 3 seconds for the first
    assert found["never ends"][0] == "out of time" and found["works"][0] == "done"
    assert time.monotonic() - began < 500
    for line in (tmp_path / "notes").read_text().splitlines():
        if line.startswith("process"):
            _wait_for_the_end_of(int(line.split()[1]))
    found = _run([Step("late", made_up.works, 1)], tmp_path, minutes=0)
    assert found["late"] == ("out of time", "no time is left for it")


def test_a_run_that_is_killed_takes_its_step_along(tmp_path, made_up) -> None:
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(tmp_path)!r})
import made_up_steps
from vitarium.benchmarks.steps import Place, Step, run_suite
folder = Path({str(tmp_path)!r})
step = Step("never ends", made_up_steps.never_ends, 1)
run_suite([step], Place("cpu", folder), minutes=10, logs=folder / "logs")
"""
    notes = tmp_path / "notes"
    with subprocess.Popen([sys.executable, "-c", code]) as run:
        for _ in range(1200):
            if notes.exists() or run.poll() is not None:
                break
            time.sleep(0.1)
        run.kill()
    _wait_for_the_end_of(int(notes.read_text().split()[1]))


def _wait_for_the_end_of(process: int) -> None:
    for _ in range(100):
        try:
            os.kill(process, 0)
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":  # ended, and nobody has asked
            return
        time.sleep(0.1)
    pytest.fail(f"process {process} has outlived its step")


def test_two_steps_of_one_name(tmp_path) -> None:
    steps = [Step("one", print, 1), Step("one", print, 1)]
    with pytest.raises(ValueError, match="must have different names"):
        _run(steps, tmp_path)


def test_the_plans_take_their_minutes() -> None:
    for device, minutes in plan.MINUTES.items():
        for rehearsal in (False, True):
            planned = plan.plan(Place(device, Path(), rehearsal=rehearsal))
            assert sum(step.seconds for step in planned) == 60 * minutes
    named = [step.name for step in plan.plan(Place("cuda", Path()))]
    assert {"operators, bfloat16", "operators, float16"} <= set(named)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys) -> None:
    assert main(["bench", "all", "--device", "cuda"]) == 1
    assert "torch sees 0 CUDA devices" in capsys.readouterr().err


def test_rehearsal(tmp_path, capsys) -> None:
    command = ["bench", "all", "--rehearsal", "--device", "cpu", "--output", str(tmp_path)]
    assert main(command) == 0, capsys.readouterr().out
    ledger = tmp_path / steps_module.LEDGER
    statuses = {report.step: report.status for report in steps_module.read_ledger(ledger)}
    place = Place("cpu", tmp_path, rehearsal=True)
    assert list(statuses) == [step.name for step in plan.plan(place)]
    assert set(statuses.values()) == {"done"}
    held = {path.name: record.read(path) for path in tmp_path.glob("*.jsonl")}
    assert {(r.mode, r.dtype) for r in held["operators.jsonl"]} == {
        (mode, dtype) for mode in ("forward", "training") for dtype in ("float32", "bfloat16")
    }
    assert {r.mode for r in held["models.jsonl"]} == {"forward", "training"}
    assert len(held["scaling.jsonl"]) == 2
    assert (tmp_path / "operators-linear-attention.png").stat().st_size > 10_000
    assert "linear_attention" in (tmp_path / "report.html").read_text(encoding="utf-8")
    # What was measured is not measured again, not even by a step that was not finished.
    ledger.unlink()
    assert main(command) == 0
    assert {path.name: record.read(path) for path in tmp_path.glob("*.jsonl")} == held
    assert "models, training: done" in capsys.readouterr().out
