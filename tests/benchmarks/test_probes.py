"""Probes: runs of the testbed's machinery, intervals, table and heat map."""

from dataclasses import replace

import pytest
import timm
import torch
from matplotlib.figure import Figure

import vitarium.zoo  # noqa: F401  (registers our models with timm)
from vitarium.benchmarks import probes, probes_views, record, testbed
from vitarium.benchmarks.probes import Seen
from vitarium.benchmarks.testbed_views import Row
from vitarium.cli.main import main
from vitarium.train.config import TrainConfig, find_recipe


@pytest.fixture
def trained(monkeypatch):
    """What would be trained, in place of its training: attention sees all, windows texture."""
    runs = []

    def outcome(due, jobs):
        for run in due:
            runs.append((run.mixer, run.config.data, run.config.seed))
            sees = run.mixer == "attention" or run.config.data == "probe:texture"
            result = {"accuracy": 1.0 if sees else 0.5}
            if run.mixer == "halo":
                result = {"failure": "a | bug", "accuracy": None}
            yield testbed._trained(run, 0.0, 0.0, **result)

    monkeypatch.setattr(testbed, "_train_all", outcome)
    return runs


def test_mixers_by_tasks_and_again(trained, tmp_path):
    arguments = {"probes": ["texture", "pair"], "seeds": 2, "output": tmp_path}
    seen, records = probes.bench_probes(["window", "halo", "attention"], **arguments)
    assert [s.mixer for s in seen] == ["attention", "halo", "window"]  # dense before local
    assert len(trained) == len(records) == 12
    assert trained[:4] == [
        ("window", "probe:texture", 0), ("halo", "probe:texture", 0),
        ("attention", "probe:texture", 0), ("window", "probe:pair", 0),
    ]  # fmt: skip
    assert seen[2].probes["pair"].accuracies == {0: 0.5, 1: 0.5}
    text = (tmp_path / "probes.md").read_text()
    assert "| attention | dense | 100 (99 to 100); seeds 100, 100 |" in text
    assert "seed 0 failed: a / bug" in text and "50 (46 to 54)" in text
    trained.clear()
    again, _ = probes.bench_probes(["window", "attention"], **arguments)
    assert trained == [] and again == [seen[0], seen[2]]
    assert len(record.read(tmp_path / "probes.jsonl")) == 12


def test_the_interval_is_wilsons():
    low, high = probes.interval(0.75, 100)
    z, p, n = 1.959964, 0.75, 100
    middle, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert (low, high) == pytest.approx(((middle - half) / (1 + z**2 / n),
                                         (middle + half) / (1 + z**2 / n)))  # fmt: skip


def test_the_heat_map_has_a_cell_per_mixer_and_task(tmp_path, monkeypatch):
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: drawn.append(f) or save(f, *a, **k))
    seen = [
        Seen(mixer, {"pair": Row(mixer, {0: accuracy}, {}), "path": Row(mixer, {}, {0: "why"})})
        for mixer, accuracy in (("attention", 0.98), ("window", 0.47))
    ]
    probes_views.plot(seen, [], tmp_path / "probes.png")
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert texts == ["attention", "98", "96 to 99", "failed", "window", "47", "43 to 51", "failed"]
    assert len(drawn[0].axes) == 1 + 2 * 2  # and two images of each task


def test_weights_are_drawn_wider_and_otherwise_alike():
    config = TrainConfig.from_yaml(*find_recipe("probe"))
    kwargs = dict(config.model_kwargs)
    assert kwargs.pop("init_std") == 0.2
    models = []
    for extra in ({}, {"init_std": 0.2}):
        torch.manual_seed(0)
        models.append(timm.create_model(config.model, **kwargs, **extra).state_dict())
    narrow, wide = models
    for name, value in narrow.items():
        linear = name.endswith("weight") and value.dim() == 2
        torch.testing.assert_close(wide[name], 10 * value if linear else value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["windows"]}, "mixer='windows' is unknown; did you mean window"),
        ({"probes": ["pairs"]}, "probe='pairs' is unknown; did you mean pair"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        probes.bench_probes(output=tmp_path, **arguments)


def test_command(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    command = ["probes", "attention", "window", "--seeds", "1", "--output", str(tmp_path)]
    assert main([*command, "--probes", "pair"]) == 0
    text = capsys.readouterr().out
    assert "pair" in text and "50 (46 to 54)" in text and "counting" not in text
    assert (tmp_path / "probes.png").exists()
    assert main(["probes", "--config", "nothing"]) == 2
    assert "is neither a recipe" in capsys.readouterr().err


def test_a_mixer_is_trained_on_a_task(tmp_path):
    recipe = TrainConfig.from_yaml(*find_recipe("probe")).with_epochs(1)
    recipe = replace(recipe, data="probe:texture", batch_size=256)
    found = testbed.train_one(testbed.run_of("channel", 0, recipe))
    assert found.failure is None and 0 < found.accuracy <= 1
    assert found.arguments["data"] == "probe:texture"
