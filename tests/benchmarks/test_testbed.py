"""The comparison of mixers in the testbed: runs, resumption, failures, views."""

import dataclasses
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from vitarium.benchmarks import record, testbed, testbed_views
from vitarium.benchmarks.testbed_views import Row
from vitarium.ops import MIXERS
from vitarium.train.config import TrainConfig, find_recipe
from vitarium.zoo.testbed import SETTINGS

RECIPE = TrainConfig.from_yaml(*find_recipe("testbed")).with_epochs(1)


class InProcess:
    """A pool whose runs happen here, one after the other."""

    def __init__(self, *arguments):
        pass

    def submit(self, function, run):
        future = Future()
        try:
            future.set_result(function(run))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **arguments):
        pass


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(testbed, "ProcessPoolExecutor", InProcess)


@pytest.fixture
def broken():
    """A mixer that cannot be built."""

    class Broken(MIXERS["window"], name="broken"):
        def __init__(self, dim, **kwargs):
            raise ZeroDivisionError("a bug | of the mixer")

    yield "broken"
    del MIXERS["broken"]


def test_a_comparison_goes_on_where_it_ended(here, broken, tmp_path, monkeypatch):
    told, drawn = [], []
    monkeypatch.setattr(testbed_views, "plot", lambda rows, path: drawn.append(path.name))
    arguments = {"recipe": RECIPE, "seconds": 0.0, "output": tmp_path, "progress": told.append}
    first = testbed.bench_testbed(["window", broken], seeds=1, **arguments)
    assert [row.mixer for row in first] == ["window", broken]
    window, failed = first
    assert 0.3 < window.accuracies[0] < 1 and window.margin is None
    assert failed.accuracy is None and failed.failures.keys() == {0}
    assert "ZeroDivisionError: a bug" in failed.failures[0]
    assert window.forward.macs > 1e6 and window.training.peak_memory > window.forward.peak_memory
    assert window.forward.samples.keys() == {"wall", "cpu"} and failed.forward is None
    text = (tmp_path / "testbed.md").read_text()
    assert "| window | local |" in text and "seed 0 failed: ZeroDivisionError" in text
    assert drawn == ["testbed.png"]

    told.clear()
    second = testbed.bench_testbed(["window"], seeds=1, **arguments)
    assert told == ["1 of 1 runs recorded before"] and second == [window]
    told.clear()
    (third,) = testbed.bench_testbed(["window"], seeds=2, **arguments)
    assert third.accuracies.keys() == {0, 1} and third.margin > 0
    records = record.read(tmp_path / "testbed.jsonl")
    assert [r.seed for r in records if r.kind == "run"] == [0, 0, 1]
    older = [dataclasses.replace(r, arguments={**r.arguments}) for r in records]
    for r in older:
        del r.arguments["precision"]  # as if recipes had come to have it later
    assert testbed.rows(older, ["window"], RECIPE)[0].accuracies == third.accuracies
    other = dataclasses.replace(RECIPE, batch_size=128)
    assert testbed.rows(records, ["window"], RECIPE) == [third]
    assert testbed.rows(records, ["window"], other) == [Row("window", {}, {})]


def test_a_process_that_dies_fails_its_run_alone(monkeypatch):
    class Dying(InProcess):
        def submit(self, function, run):
            if run.mixer == "grid":
                future = Future()
                future.set_exception(BrokenProcessPool("killed"))
                return future
            return super().submit(function, run)

    monkeypatch.setattr(testbed, "ProcessPoolExecutor", Dying)
    monkeypatch.setattr(testbed, "train_one", lambda run: run.mixer)
    runs = [testbed.run_of(mixer, 0, RECIPE) for mixer in ("window", "grid", "halo")]
    first, died, last = testbed._train_all(runs, 1)
    assert (first, last) == ("window", "halo")
    assert (died.name, died.accuracy, died.failure) == ("grid", None, "the process died")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["windows"]}, "mixer='windows' is unknown; did you mean window"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"jobs": 0}, "jobs=0 must be at least 1"),
        ({"recipe": TrainConfig()}, "recipe.image_size=None must be a size"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        testbed.bench_testbed(output=tmp_path, **{"recipe": RECIPE, **arguments})


# --- views ----------------------------------------------------------------------------------------


def _measure(name: str, mode: str, number: int) -> record.Record:
    return record.measured(
        samples={"cpu": [0.01 * (1 + number % 9)]}, clock="cpu", machine=record.this_machine("cpu"),
        kind="model", name=name, implementation="eager", mode=mode, dtype="float32",
        shapes={"input": [64, 3, 32, 32]}, arguments={}, params=100_000,
        macs=1_000_000 + 50_000 * (number % 11), peak_memory=2**20 * (10 + number % 7),
    )  # fmt: skip


@pytest.fixture
def rows() -> list[Row]:
    """Of every mixer, crowded."""
    return [
        Row(
            mixer,
            {seed: 0.97 + 0.001 * ((number + 7 * seed) % 20) for seed in range(3)},
            {},
            _measure(mixer, "forward", number),
            _measure(mixer, "training", number),
        )
        for number, mixer in enumerate(SETTINGS)
    ]


def test_the_interval_is_students():
    row = Row("window", {0: 0.90, 1: 0.92, 2: 0.94}, {})
    assert row.accuracy == pytest.approx(0.92)
    assert row.margin == pytest.approx(4.302653 * 0.02 / 3**0.5)
    assert Row("window", {}, {}).accuracy is None


def test_the_table_has_a_row_per_mixer(rows):
    lines = testbed_views.markdown(rows).splitlines()
    table = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert [line[0].removeprefix("| ") for line in table[2:]] == list(SETTINGS)
    assert all(len(line) == len(testbed_views.COLUMNS) for line in table)
    assert {line[1] for line in table[2:]} <= testbed_views.COLOURS.keys()


def test_the_picture_names_every_mixer_and_no_names_overlap(rows, tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k)
    )
    failed = Row("window", {}, {0: "why"})
    testbed_views.plot([*rows, failed], tmp_path / "testbed.png")
    (figure,) = drawn
    assert len(figure.axes) == 3
    for ax in figure.axes:
        names = [text for text in ax.texts if isinstance(text, Annotation)]
        assert sorted(text.get_text() for text in names) == sorted(SETTINGS)
        renderer = figure.canvas.get_renderer()
        boxes = [Text.get_window_extent(text, renderer) for text in names]  # without their lines
        overlaps = sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert overlaps == 0
    with pytest.raises(ValueError, match="no mixer has both"):
        testbed_views.plot([failed], tmp_path / "none.png")
