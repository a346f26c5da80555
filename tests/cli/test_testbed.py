"""`vitarium testbed`: a comparison in processes of its own."""

from vitarium.benchmarks import record
from vitarium.cli.main import main


def test_two_mixers_and_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    command = ["testbed", "window", "ulsam", "--seeds", "1", "--epochs", "1", "--seconds", "0"]
    command += ["--output", str(tmp_path)]
    assert main(command) == 0
    text = capsys.readouterr().out
    for expected in ("2/2 ulsam seed 0", "accuracy, %", "local", "channel"):
        assert expected in text
    runs = [r for r in record.read(tmp_path / "testbed.jsonl") if r.kind == "run"]
    assert {r.name for r in runs} == {"window", "ulsam"}
    assert all(r.arguments["epochs"] == 1 and r.machine.threads == 1 for r in runs)
    assert (tmp_path / "testbed.md").exists() and (tmp_path / "testbed.png").exists()
    assert main(command) == 0
    assert "2 of 2 runs recorded before" in capsys.readouterr().out


def test_bad_words(tmp_path, capsys):
    assert main(["testbed", "windows", "--output", str(tmp_path)]) == 1
    assert "mixer='windows' is unknown; did you mean window" in capsys.readouterr().err
    assert main(["testbed", "--config", "nothing"]) == 2
    assert "is neither a recipe" in capsys.readouterr().err
