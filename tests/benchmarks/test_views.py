"""Pictures and the README's table."""

import dataclasses
from pathlib import Path

import pytest

from vitarium import zoo
from vitarium.benchmarks import plot, plot_profile, record, table
from vitarium.benchmarks.record import Machine, Record
from vitarium.ops import MIXERS, OPERATORS

README = Path(__file__).parents[2] / "README.md"
MACHINE = Machine("cpu", "Example CPU", 4, 1, "Linux x86_64")


START, END = "<!-- models:start -->", "<!-- models:end -->"


def _operator(implementation: str, median: float, **changes) -> Record:
    shape = [4, 56, 56, 2, 32]
    fields = {
        "kind": "operator",
        "name": "neighborhood_attention",
        "mode": "forward",
        "dtype": "float32",
        "shapes": {"query": shape, "key": shape, "value": shape},
        "arguments": {"kernel_size": 7, "dilation": 1},
        **changes,
    }
    return record.measured(
        samples={"cpu": [median]},
        clock="cpu",
        machine=MACHINE,
        implementation=implementation,
        **fields,
    )


def _model(name: str, median: float) -> Record:
    return _operator("eager", median, kind="model", name=name, shapes={"input": [1, 3, 224, 224]})


def _texts(figure) -> str:
    texts = [t.get_text() for t in figure.texts]
    for ax in figure.axes:
        texts += [t.get_text() for t in (*ax.texts, *ax.get_xticklabels(), ax.title)]
        texts += [ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()]
    return "\n".join(texts)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    save = plot._save
    monkeypatch.setattr(plot, "_save", lambda f, path: (figures.append(f), save(f, path)))
    return figures


def test_bars_are_times_over_the_floor(tmp_path, drawn):
    records = [
        _operator("floor", 2.0),
        _operator("torch", 99.0),
        _operator("torch", 6.0),  # the last of equal settings counts
        _operator("gather", 80.0),
        _operator("floor", 5.0, mode="training"),
        _operator("torch", 20.0, mode="training"),
    ]
    path = tmp_path / "folder" / "operators.png"
    plot.plot_operators(records, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    forward, training = drawn[0].axes
    assert [bar.get_height() for bar in forward.patches] == [3.0, 40.0]
    assert [bar.get_height() for bar in training.patches] == [4.0]
    text = _texts(drawn[0])
    for expected in (
        "time over the floor",
        "4 images, head_dim 32, kernel size 7",
        "56x56\n2 heads\ndilation 1",
        "forward, float32",
        "training, float32",
        "Example CPU, 1 thread",
        "process CPU time",
        f"torch {records[0].versions['torch']}",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no records of operators"),
        ([_model("resnet18", 1.0)], "no records of operators"),
        ([_operator("floor", 1.0), _operator("floor", 1.0, name="other")], "differ in name"),
        (
            [
                _operator("floor", 1.0),
                dataclasses.replace(
                    _operator("torch", 1.0), machine=dataclasses.replace(MACHINE, threads=2)
                ),
            ],
            "differ in machine",
        ),
    ],
)
def test_what_is_not_comparable_is_not_drawn(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        plot.plot_operators(records, tmp_path / "x.png")


def test_models_by_published_accuracy_and_latency(tmp_path, drawn):
    records = [_model("nat_tiny", 0.08), _model("nat_mini", 0.05), _model("resnet18", 0.02)]
    accuracies = plot.published_accuracies(records)
    assert accuracies == {"nat_mini": 81.8, "nat_tiny": 83.2}
    plot.plot_models(records, accuracies, tmp_path / "models.png")
    (line,) = drawn[0].axes[0].lines
    assert line.get_xydata().tolist() == [[50.0, 81.8], [80.0, 83.2]]
    assert "nat_mini" in _texts(drawn[0]) and "latency" in _texts(drawn[0])
    with pytest.raises(ValueError, match="no record of a model whose accuracy is known"):
        plot.plot_models(records, {}, tmp_path / "models.png")


def test_bars_of_a_profile_are_milliseconds_by_stage(tmp_path, drawn):
    stages = {"stem": {"convolution": 0.25}, "stages.0": {"norm": 0.25, "mixer operator": 0.5}}
    records = [_model("nat_mini", 0.08), dataclasses.replace(_model("vit", 0.1), stages=stages)]
    path = tmp_path / "profile.png"
    plot_profile.plot_profile(records, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (ax,) = drawn[0].axes
    bars = {
        (container.get_label(), stage): bar.get_width()
        for container in ax.containers
        for stage, bar in zip(stages, container)
        if bar.get_width()
    }
    assert bars == {
        ("convolution", "stem"): pytest.approx(25.0),
        ("norm", "stages.0"): pytest.approx(25.0),
        ("mixer operator", "stages.0"): pytest.approx(50.0),
    }
    with pytest.raises(ValueError, match="no record of a model with its stages"):
        plot_profile.plot_profile(records[:1], path)


def test_the_table_has_every_model_and_mixer():
    text = table.models_table()
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    families = table.families()
    assert sorted(name for names in families.values() for name in names) == sorted(
        zoo.list_models()
    )
    for family, names in families.items():
        (row,) = [row for row in rows if f"`{family}_`" in row or f"`{family}`" in row]
        for name in names:
            assert name.removeprefix(family).strip("_") in row
    mixers = (row.split(" | ")[0].removeprefix("| ").split(", ") for row in rows)
    assert {name for names in mixers for name in names} <= MIXERS.keys()
    assert "2.7 - 13.7" in text and "81.8 - 84.3" in text  # nat_mini to nat_base


def test_the_tables_of_mixers_have_every_mixer_and_operator():
    rows = {row[0]: row for row in table.mixer_rows()}
    assert rows.keys() == MIXERS.keys()
    assert rows["neighborhood"][1] == "neighborhood_attention"
    text = table.mixers_table()
    assert all(f"| `{name}` |" in text for name in MIXERS)
    assert "[2204.07143](https://arxiv.org/abs/2204.07143)" in text
    text = table.patterns_table()
    assert all(f"| `{name}` |" in text for name in OPERATORS)
    assert "| `neighborhood_attention` | yes | yes | same size | same size |" in text
    assert "| `causal_linear_attention` | no | yes | no | same size |" in text


def test_the_table_is_written_between_its_markers_and_checked(tmp_path, capsys):
    file = tmp_path / "README.md"
    file.write_text(f"# Title\n{START}\nold\n{END}\nafter\n")
    assert table.main([str(file), "--check"]) == 1
    assert "differs from the registry" in capsys.readouterr().err
    assert "old" in file.read_text()
    assert table.main([str(file)]) == 0
    text = file.read_text()
    assert text.startswith("# Title\n") and text.endswith(f"\n{END}\nafter\n")
    assert "old" not in text and "`nat_`: mini" in text
    assert table.main([str(file), "--check"]) == 0


@pytest.mark.parametrize("text", [START, f"{END}{START}", START * 2])
def test_missing_markers_are_named(text):
    with pytest.raises(ValueError, match="no table is marked; known markers are <!-- mixers:start"):
        table.updated("# Title")
    with pytest.raises(ValueError, match="must be marked by one <!-- models:start -->"):
        table.updated(text)


@pytest.mark.skipif(not README.exists(), reason="no README.md: these tests run outside a checkout")
def test_the_readme_has_the_present_table():
    assert table.main([str(README), "--check"]) == 0
