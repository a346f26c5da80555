"""What a run leaves for people: TensorBoard, Weights & Biases, the page and the model card."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitarium.cli.main import main
from vitarium.train import ConfigError, Interrupted, TrainConfig, load_model, resume, train
from vitarium.train import tracking as tracking_module
from vitarium.train.data import InputConfig, load_data
from vitarium.train.loop import _Run
from vitarium.train.metrics import Evaluation, Predictions
from vitarium.train.model_card import MARK, model_card, write_model_card
from vitarium.train.run_page import RunFacts
from vitarium.train.tracking import Tracker, figures

INPUTS = InputConfig((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)


def record(epoch: int, **further: Any) -> dict[str, Any]:
    return {
        "epoch": epoch, "step": 3 * epoch, "lr": 0.1 / epoch, "train_loss": 2.0 / epoch,
        "correct": epoch, "total": 12, "loss": 1.5 / epoch, "accuracy": epoch / 12,
        "accuracy_top5": None, "calibration_error": 0.1, "broken": 0, "seconds": 10.0 * epoch,
        **further,
    }  # fmt: skip


@pytest.fixture
def facts(tiny_config: TrainConfig, tmp_path: Path) -> RunFacts:
    folder = tmp_path / "run"
    folder.mkdir()
    data = load_data(tiny_config.data)
    return RunFacts(folder, tiny_config, data, INPUTS, 1234, "cpu", 1)


def answers(facts: RunFacts) -> Evaluation:
    """Drawn answers on the held-out images."""
    targets = np.asarray(facts.data.held_out.targets)
    logits = 3 * torch.randn(len(targets), 3, generator=torch.Generator().manual_seed(0))
    return Evaluation(Predictions.from_logits(logits, targets, np.arange(len(targets))), 3)


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every point in the event files, by name; nothing is thrown away as TensorBoard would."""
    events = EventAccumulator(str(folder), {"scalars": 0}, purge_orphaned_data=False).Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


# --- TensorBoard ---------------------------------------------------------------------------------


def test_resumed_runs_have_every_point_once(facts: RunFacts) -> None:
    evaluation, history = answers(facts), [record(epoch) for epoch in range(1, 6)]
    with Tracker(facts, [], enabled=True) as tracker:
        for entry in history[:4]:
            tracker.epoch(entry, evaluation)
    (facts.folder / "tensorboard" / "events.out.tfevents.1.other").write_bytes(b"")  # not ours
    with Tracker(facts, history[:2], enabled=True) as tracker:  # epochs 3 and 4 are repeated
        for entry in history[2:]:
            tracker.epoch(entry, evaluation)
    found = points(facts.folder / "tensorboard")
    assert found["accuracy/held_out"] == [
        (3 * e, pytest.approx(e / 12)) for e in range(1, 6)
    ]  # fmt: skip
    assert found["loss/train"] == [(3 * e, pytest.approx(2 / e)) for e in range(1, 6)]
    assert set(found) == {name for name, _ in figures(history[0])}
    assert (facts.folder / "tensorboard" / "events.out.tfevents.1.other").exists()


def test_figures_of_a_record() -> None:
    entry = record(2, gigabytes=1.5, note="text", ok=True, best=float("nan"), nested={"a": 1})
    assert dict(figures(entry)) == {
        "run/lr": 0.05, "loss/train": 1.0, "loss/held_out": 0.75, "accuracy/held_out": 2 / 12,
        "calibration_error/held_out": 0.1, "run/broken": 0, "run/seconds": 20, "run/gigabytes": 1.5,
    }  # fmt: skip


def test_other_processes_write_nothing(facts: RunFacts) -> None:
    with Tracker(facts, [], enabled=False) as tracker:
        tracker.epoch(record(1), answers(facts))
    assert list(facts.folder.iterdir()) == []


posix_signals = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, tiny_config: TrainConfig) -> Path:
    """A run that was stopped in its second epoch and went on to its end."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    original = _Run._train_step

    def step(self: _Run, *batch: Any) -> Any:
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_train_step", step)
        with pytest.raises(Interrupted):
            train(tiny_config, output=folder)
    assert 'data-step="3"' in (folder / "report.html").read_text()  # also of a stopped run
    resume(folder)
    return folder


@posix_signals
def test_a_real_run(resumed: Path) -> None:
    history = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    found = points(resumed / "tensorboard")
    assert found["loss/held_out"] == [(r["step"], pytest.approx(r["loss"])) for r in history]
    page = (resumed / "report.html").read_text()
    assert 'data-step="9"' in page and "Mistakes" in page
    before = {path.name: path.read_bytes() for path in resumed.glob("*.html")}
    resume(resumed)  # at its end there is nothing to evaluate: the page keeps what it shows
    assert {path.name: path.read_bytes() for path in resumed.glob("*.html")} == before
    assert points(resumed / "tensorboard") == found


@posix_signals
def test_loading_as_the_card_says(resumed: Path, monkeypatch) -> None:
    card = ModelCard.load(str(resumed / "README.md"))
    code = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    assert len(code) == 2
    monkeypatch.chdir(resumed)
    names: dict[str, Any] = {}
    exec(code[0], names)
    own, description = load_model(resumed / "best.safetensors")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(names["model"](images), own(images))
    exec(code[1], names)
    assert names["description"] == description


# --- Weights & Biases ----------------------------------------------------------------------------


class FakeWandb(types.ModuleType):
    """As much of wandb as is used, with its rule: a step that has points takes no others."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.points: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.arguments: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> types.SimpleNamespace:
        self.arguments.append(arguments)
        kept = self.points.setdefault(arguments["id"], [])
        run = types.SimpleNamespace(step=kept[-1][0] + 1 if kept else 0)

        def log(values: dict[str, float], step: int) -> None:
            assert step >= run.step, "wandb would warn, and drop it"
            kept.append((step, values))
            run.step = step + 1

        def finish() -> None:
            self.finished += 1

        run.log, run.finish = log, finish
        return run


def test_weights_and_biases(facts: RunFacts, monkeypatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    facts = dataclasses.replace(facts, config=dataclasses.replace(facts.config, tracking="wandb"))
    evaluation, history = answers(facts), [record(epoch) for epoch in range(1, 6)]
    with Tracker(facts, [], enabled=True) as tracker:
        for entry in history[:3]:
            tracker.epoch(entry, evaluation)
    ((identity, kept),) = wandb.points.items()
    del kept[2:]  # as if the third had not been sent when the process was killed
    with Tracker(facts, history[:3], enabled=True) as tracker:
        for entry in history[3:]:
            tracker.epoch(entry, evaluation)
    with Tracker(facts, history[:2], enabled=True) as tracker:  # repeated: they are there
        for entry in history[2:]:
            tracker.epoch(entry, evaluation)
    assert [step for step, _ in wandb.points[identity]] == [3, 6, 9, 12, 15]
    assert wandb.points[identity][4][1] == {**dict(figures(history[4])), "epoch": 5}
    assert wandb.arguments[0]["config"]["optimizer"]["lr"] == facts.config.optimizer.lr
    assert [a["id"] for a in wandb.arguments] == [identity] * 3 and wandb.finished == 3


def test_absent_weights_and_biases_are_told_before_anything_is_written(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = dataclasses.replace(tiny_config, tracking="wandb")
    with pytest.raises(ConfigError, match="pip install wandb"):
        train(config, output=tmp_path / "run")
    arguments = ["--tracking", "wandb", "--output", str(tmp_path / "run")]
    assert main(["train", "--config", "digits", *arguments]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- the page ------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects addresses and text, and checks that elements nest."""

    VOID = frozenset({"meta", "img", "br", "link", "path", "use"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.addresses += [v or "" for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_stands_alone_and_says_it_all(facts: RunFacts) -> None:
    data = dataclasses.replace(facts.data, classes=["<script>", "a & b", "plain"])
    facts = dataclasses.replace(facts, data=data)
    evaluation = answers(facts)
    with Tracker(facts, [], enabled=True) as tracker:
        tracker.epoch(record(1, **evaluation.to_record()), evaluation)
    text = (facts.folder / "report.html").read_text()
    page = Page(text)
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import|http-equiv", text)
    shown = " ".join(page.text)
    wrong = evaluation.total - evaluation.correct
    assert sum(a.startswith("data:image/jpeg") for a in page.addresses) == wrong > 3
    assert f"{100 * evaluation.accuracy:.2f} %" in shown
    for expected in ("<script>", "a & b", torch.__version__, facts.config.model, "drop_path_rate"):
        assert expected in shown
    assert len(text) < 300_000


def test_pages_are_drawn_once_a_minute_and_at_the_end(facts: RunFacts, monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(tracking_module.time, "monotonic", lambda: now[0])
    drawn: list[int] = []
    monkeypatch.setattr(tracking_module, "write_run_page", lambda _, h, __: drawn.append(len(h)))
    monkeypatch.setattr(tracking_module, "learning_curves", lambda *_: None)
    evaluation = answers(facts)
    with Tracker(facts, [], enabled=True) as tracker:
        for epoch in range(1, 10):
            now[0] += 25
            tracker.epoch(record(epoch), evaluation)
    assert drawn == [3, 6, 9, 9]


def test_what_failed_first_is_what_is_raised(facts: RunFacts, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking_module, "write_run_page", full)
    with (
        pytest.raises(FloatingPointError, match="the loss is nan"),
        Tracker(facts, [record(1)], enabled=True),
    ):
        raise FloatingPointError("the loss is nan")
    with pytest.raises(OSError, match="No space left"), Tracker(facts, [record(1)], enabled=True):
        pass


# --- the model card ------------------------------------------------------------------------------


def test_the_card_is_valid_and_has_the_figures(facts: RunFacts) -> None:
    history = [record(1), record(2, accuracy_top5=0.75), record(3, correct=1, accuracy=1 / 12)]
    write_model_card(facts, history)
    card = ModelCard.load(str(facts.folder / "README.md"))
    assert card.data.library_name == "timm" and card.data.datasets == ["digit_folders0"]
    assert card.data.license is None
    results = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert results["top-1 accuracy"] == pytest.approx(2 / 12, abs=1e-6)  # of the best epoch
    assert results["top-5 accuracy"] == 0.75
    assert card.data.model_name == "run"
    for expected in ("| `best.safetensors` | 2 |", "| `last.safetensors` | 3 |", torch.__version__):
        assert expected in card.content
    recipe = re.search(r"```yaml\n(.*?)```", card.content, re.DOTALL)
    assert recipe and TrainConfig.from_yaml(recipe[1]) == facts.config
    assert "| commit |" in card.content
    for table in re.findall(r"(?:^\|.*\n)+", card.content, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_other_tasks_claim_no_accuracy_of_classes(facts: RunFacts) -> None:
    config = dataclasses.replace(facts.config)
    config.task = "positions"  # a task that may come
    card = model_card(dataclasses.replace(facts, config=config), [record(1)])
    assert card.data.eval_results is None or card.data.eval_results == []
    assert card.data.metrics is None and "image classifier" not in card.content
    assert "pre-trained by the task `positions`" in card.content
    with Tracker(facts, [], enabled=True) as tracker:
        tracker.epoch(record(1), None)
    page = (facts.folder / "report.html").read_text()
    assert "Curves" in page and "Mistakes" not in page


@pytest.mark.parametrize(
    ("model", "license", "text"),
    [
        ("nat_mini", "mit", "under the licence `mit`"),
        ("agent_deit_tiny", None, "states no licence"),
        ("resnet18", "apache-2.0", "under the licence `apache-2.0`"),
    ],
)
def test_licences_are_those_of_the_weights(facts: RunFacts, model, license, text) -> None:
    config = dataclasses.replace(facts.config, model=model, pretrained=True)
    card = model_card(dataclasses.replace(facts, config=config), [record(1)])
    assert card.data.license == license and text in card.content


def test_somebody_elses_readme_stays(facts: RunFacts) -> None:
    path = facts.folder / "README.md"
    path.write_text("mine")
    write_model_card(facts, [record(1)])
    assert path.read_text() == "mine"
    path.write_text(f"old\n{MARK}")
    write_model_card(facts, [record(1)])
    assert path.read_text().startswith("---\n")
