"""`vitarium explain --mixers`."""

import pytest

from vitarium.benchmarks import atlas
from vitarium.cli.main import main


def test_a_picture_of_two_mixers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(atlas, "SEEDS", 1)
    output = tmp_path / "atlas.png"
    assert main(["explain", "--mixers", "window", "grid", "-o", str(output)]) == 0
    assert output.read_bytes()[1:4] == b"PNG" and str(output) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["windows"], 1, "mixer='windows' is unknown; did you mean window"),
        (["window", "-o", "atlas.txt"], 1, "output='atlas.txt' must end in one of .png"),
        (["window", "--records", "pyproject.toml"], 1, "pyproject.toml:1"),
        (["--nothing"], 2, "unrecognized arguments: --nothing"),
    ],
)
def test_wrong_words(arguments, status, message, capsys):
    assert main(["explain", "--mixers", *arguments]) == status
    assert message in capsys.readouterr().err


def test_without_it_a_model_is_needed(capsys):
    assert main(["explain"]) == 2
    assert "required: model, images" in capsys.readouterr().err
