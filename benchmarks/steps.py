"""A plan of steps under a budget of time, each in a process of its own: what is done once stays.

A step that raises, crashes or takes too long is reported and does not end the run. Which steps are
done is kept in a file beside the records, so that the same call goes on where it ended; the steps
pass over their own records. `vitarium.benchmarks.plan` has the plan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from vitarium.benchmarks.record import _build
from vitarium.train.environment import commit, versions

LEDGER = "suite.json"
# A step is to begin nothing after this part of its time; what is left is for what it has begun.
BEGINNING = 0.8

Status = Literal["done", "unfinished", "failed", "out of time", "done before"]


@dataclass(frozen=True)
class Place:
    """Where steps measure and what they write to.

    Attributes:
        device: "cpu" or "cuda".
        folder: of the records.
        fresh: measure again what was measured.
        rehearsal: measure a little of everything, to see that the steps work.
    """

    device: str
    folder: Path
    fresh: bool = False
    rehearsal: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a step could not do: a line each; and how much it had no time for."""

    failures: Sequence[str] = ()
    remaining: int = 0


@dataclass(frozen=True)
class Step:
    """A part of a plan.

    Attributes:
        name: unique in the plan.
        run: a function that can be pickled, from the place and the seconds after which it is to
            begin nothing more.
        seconds: its share of the time, in relation to the other steps'.
        repeated: it runs again even if it was done before.
    """

    name: str
    run: Callable[[Place, float], Outcome]
    seconds: float
    repeated: bool = False


@dataclass(frozen=True)
class Report:
    """How a step ended, in what time, with which code; `detail` says why if it is not done."""

    step: str
    status: Status
    detail: str = ""
    seconds: float = 0.0
    commit: str | None = field(default_factory=commit)
    versions: dict[str, str] = field(default_factory=versions)
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )


def run_suite(
    steps: Sequence[Step],
    place: Place,
    *,
    minutes: float,
    logs: Path,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Report]:
    """Run steps one after another, all together within `minutes`.

    A step may take its share of the time that is left, so time that one does not need goes to those
    after it; then it is ended. What was done before, by this commit with these versions, is passed
    over unless `place.fresh`.

    Args:
        steps: in this order.
        place: device and folder of the records.
        minutes: for all steps.
        logs: folder for what the steps print.
        progress: called with a line about each step before it begins.

    Raises:
        ValueError: two steps have one name, or the file of what is done is broken.
    """
    if len({step.name for step in steps}) < len(steps):
        raise ValueError(f"steps={[step.name for step in steps]} must have different names")
    began = time.monotonic()
    ledger = place.folder / LEDGER
    held = {report.step: report for report in read_ledger(ledger)}
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    # Imported once, in a process that never touches the device, and not in every step again.
    context.set_forkserver_preload(["torch", "vitarium.benchmarks.plan"])
    reports = []
    for number, step in enumerate(steps):
        before = held.get(step.name)
        left = 60 * minutes - (time.monotonic() - began)
        seconds = left * step.seconds / sum(later.seconds for later in steps[number:])
        if not (place.fresh or step.repeated) and before is not None and _done(before):
            report = dataclasses.replace(before, status="done before")
        elif seconds <= 0:
            report = Report(step.name, "out of time", "no time is left for it")
        else:
            progress(f"{step.name}: at most {seconds:.0f} s")
            report = _run(context, step, place, seconds, logs / f"{_slug(step.name)}.log")
            held[step.name] = report
            _write_ledger(ledger, list(held.values()))
        reports.append(report)
    return reports


def _done(report: Report) -> bool:
    return report.status == "done" and report.commit == commit() and report.versions == versions()


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# --- one step in a process of its own ------------------------------------------------------------


def _run(context: Any, step: Step, place: Place, seconds: float, log: Path) -> Report:
    """Run a step, and end it, with all processes that it began, when its time is over."""
    began = time.monotonic()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(step, place, BEGINNING * seconds, log, sender))
    process.start()
    sender.close()  # so that a process that dies without a word ends the waiting
    try:
        status, detail = "out of time", f"ended after its {seconds:.0f} s; it printed to {log}"
        if receiver.poll(seconds):
            try:
                status, detail = receiver.recv()
            except EOFError:
                process.join(10)
                detail = f"its process ended with exit code {process.exitcode}; see {log}"
                status = "failed"
    finally:
        _end(process)
        receiver.close()
    return Report(step.name, status, detail, round(time.monotonic() - began, 1))


def _end(process: Any) -> None:
    """End the process and those that it began, which are in one group with it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # where it had no time to found the group
    process.join()


def _child(step: Step, place: Place, seconds: float, log: Path, sender: Connection) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        outcome = step.run(place, seconds)
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        sender.send(("failed", f"{type(error).__name__}: {text}"))
    else:
        remaining = f"{outcome.remaining} remain" if outcome.remaining else ""
        if outcome.failures:
            sender.send(("failed", "; ".join([*outcome.failures, *filter(None, [remaining])])))
        else:
            sender.send(("unfinished" if remaining else "done", remaining))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _end_with_parent() -> None:
    """Wait until the process that waits for this one is gone, killed perhaps, and end the group."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


# --- what is done --------------------------------------------------------------------------------


def read_ledger(path: Path) -> list[Report]:
    """How the steps ended when they last ran; empty if there is no such file.

    Raises:
        ValueError: it is not a file of this kind.
    """
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [_build(Report, entry, "step") for entry in entries]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not say which steps are done: {error}") from error


def _write_ledger(path: Path, reports: Sequence[Report]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(dataclasses.asdict(report)) for report in reports)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    partial.replace(path)
