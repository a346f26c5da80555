"""`vitarium bench`: words, options, output."""

import pytest

from vitarium.benchmarks import record, selection
from vitarium.cli.main import main

NAME = "neighborhood_attention"


def test_words_are_models_unless_the_first_says_otherwise(tmp_path, capsys):
    output = tmp_path / "models.jsonl"
    options = ["--image-size", "32", "--device", "cpu", "--seconds", "0", "--output", str(output)]
    assert main(["bench", "resnet18", "--profile", "--threads", "1", *options]) == 0
    assert main(["bench", "models", *options, "resnet18", "--dtype", "bfloat16"]) == 0
    assert main(["bench", *options, "resnet18", "--channels-last"]) == 0
    first, second, third = record.read(output)
    assert first.parts and not second.parts
    assert (first.dtype, second.dtype) == ("float32", "bfloat16")
    assert third.arguments == {"channels_last": True}
    text = capsys.readouterr().out
    assert "resnet18" in text and str(output) in text.replace("\n", "")


def test_a_family_in_training_and_a_picture_of_its_profile(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(selection, "families", lambda: {"dinat": ["dinat_nano"]})
    output, picture = tmp_path / "models.jsonl", tmp_path / "profile.svg"
    options = ["--device", "cpu", "--threads", "1", "--seconds", "0", "--output", str(output)]
    words = ["bench", "models", "--family", "dinat", "--modes", "forward", "training", "--profile"]
    assert main([*words, *options]) == 0
    forward, training = record.read(output)
    assert (forward.mode, training.mode) == ("forward", "training")
    assert forward.stages and not training.stages
    assert main(["bench", "plot", str(output), "--profile", "-o", str(picture)]) == 0
    assert picture.stat().st_size > 1000
    assert main(["bench", "models", "--all-smallest", *options]) == 0
    assert [r.name for r in record.read(output)] == ["dinat_nano"] * 3
    assert main(["bench", "compare", str(output), str(output)]) == 0
    text = capsys.readouterr().out
    assert "Forward and backward" in text and "stages.0" in text and "no difference shown" in text


def test_a_model_that_fails_is_a_row_and_exit_status_1(tmp_path, capsys):
    output = tmp_path / "models.jsonl"
    options = ["--device", "cpu", "--threads", "1", "--seconds", "0", "--output", str(output)]
    words = ["bench", "dinat_nano", "vit_tiny_patch16_224", "--image-size", "9"]
    assert main([*words, *options]) == 1
    assert "vit_tiny_patch16_224 failed: " in " ".join(capsys.readouterr().out.split())
    assert [r.failure is None for r in record.read(output)] == [True, False]


def test_counters(capsys):
    assert main(["bench", "flops", "dinat_nano", "--image-size", "32"]) == 0
    assert "equal" in capsys.readouterr().out


def test_operators_and_their_picture(tmp_path, capsys):
    output, picture = tmp_path / "operators.jsonl", tmp_path / "operators.png"
    command = ["bench", "ops", NAME, "--device", "cpu", "--match", "7x7", "--modes", "forward"]
    command += ["--dtypes", "float32", "--peers", "gather", "--batch-size", "1"]
    command += ["--seconds", "0", "--output", str(output)]
    assert main(command) == 0
    assert main(command) == 0
    assert "recorded before" in capsys.readouterr().out
    records = record.read(output)
    assert {r.implementation for r in records} == {"torch", "gather", "floor"}
    assert (
        main(
            ["bench", "plot", str(output), "-o", str(picture), "--dtype", "float32", "--name", NAME]
        )
        == 0
    )
    assert picture.stat().st_size > 10_000
    assert main(["bench", "plot", str(output), "-o", str(picture), "--dtype", "float16"]) == 1


def test_mixers(tmp_path, capsys):
    output = tmp_path / "mixers.jsonl"
    command = ["bench", "mixers", "window", "--match", "7x7 C 512", "--dtypes", "float32"]
    command += ["--modes", "forward", "--batch-size", "1", "--seconds", "0", "--device", "cpu"]
    assert main([*command, "--output", str(output)]) == 0
    assert "timm_sdpa" in capsys.readouterr().out
    assert {r.kind for r in record.read(output)} == {"mixer"}


def test_swap(tmp_path, capsys):
    output = tmp_path / "swap.jsonl"
    command = ["bench", "swap", "shvit_s1", "--modes", "forward", "--batch-size", "1"]
    command += ["--seconds", "0", "--device", "cpu", "--output", str(output)]
    assert main(command) == 0
    assert "shvit_s1" in capsys.readouterr().out
    records = record.read(output)
    assert [(r.kind, r.implementation) for r in records] == [
        ("model", "vitarium"),
        ("model", "timm"),
    ]
    assert records[0].params == records[1].params
    assert main(["bench", "swap", "resnet18", "--output", str(output)]) == 1
    assert "model='resnet18' is unknown" in capsys.readouterr().err


def test_operators_write_where_results_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["bench", "ops", NAME, "--device", "cpu", "--match", "7x7", "--modes", "forward"]
    command += ["--dtypes", "float32", "--peers", "--batch-size", "1", "--seconds", "0"]
    folder = record.this_machine("cpu").slug
    assert main(command) == 0
    assert record.read(tmp_path / "runs" / "bench" / folder / "operators.jsonl")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert main(command) == 0
    assert record.read(tmp_path / "benchmarks" / "results" / folder / "operators.jsonl")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nat_mimi"], 1, "model 'nat_mimi' is not registered; did you mean nat_mini"),
        (["resnet18", "--device", "tpu"], 1, "device='tpu' is unknown"),
        (["resnet18", "--batch-size", "0"], 2, "batch_size"),
        (["resnet18", "--dtype", "float8"], 2, "dtype"),
        (["resnet18", "--bach-size", "2"], 2, "bach-size"),
        (["models"], 2, "required"),
        (["models", "--family", "natt"], 1, "family='natt' is unknown; did you mean nat"),
        (["models", "resnet18", "--modes", "backward"], 2, "modes"),
        (["flops", "nat_mimi"], 1, "did you mean nat_mini"),
        (["compare", "no/such.jsonl", "no/other.jsonl"], 1, "no/such.jsonl"),
        (["compare", "resnet18", "resnet18"], 1, "two models are compared"),
        (["loader", "--workers", "-1"], 2, "workers"),
        (["scaling", "nat_mimi"], 1, "did you mean nat_mini"),
        ([], 2, "what"),
        (["ops", "attentoin"], 1, "operator='attentoin' is unknown"),
        (["ops", "--modes", "both"], 2, "modes"),
        (["ops", "--peers", "flash"], 1, "peer='flash' is unknown"),
        (["plot", "no/such.jsonl", "-o", "x.png"], 1, "no/such.jsonl"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, status, message, capsys):
    assert main(["bench", *arguments]) == status
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_help_of_every_word(capsys):
    for words in (
        ["--help"],
        ["models", "--help"],
        ["ops", "--help"],
        ["plot", "--help"],
        ["mixers", "--help"],
        ["scaling", "--help"],
        ["swap", "--help"],
        ["compare", "--help"],
        ["flops", "--help"],
        ["loader", "--help"],
    ):
        with pytest.raises(SystemExit) as done:
            main(["bench", *words])
        assert done.value.code == 0
    text = capsys.readouterr().out
    assert "--batch-size" in text and "--cuda-graphs" in text and "RECORDS" in text
