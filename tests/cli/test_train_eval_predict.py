"""The commands that train and use models: their results, and one clear error for a wrong call."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from vitarium.cli.main import COMMANDS, main
from vitarium.train.checkpoint import load_model
from vitarium.train.config import TrainConfig, find_recipe
from vitarium.train.data import digit_image, load_data
from vitarium.train.explain import attention_views
from vitarium.train.plots import attention_picture

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def vitarium() -> Run:
    """Runs the command line in a process of its own, as a user does."""

    def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vitarium.cli.main", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600)

    return run


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory, vitarium: Run) -> Path:
    """The folder of `vitarium train --config digits`, run once for this file."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    process = vitarium("train", "--config", "digits", "--output", folder)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """`train/` and `val/` with two class folders of scanned digits, as a user would have them."""
    root = tmp_path_factory.mktemp("folders")
    digits = load_digits()
    for split, part in (("train", slice(0, 24)), ("val", slice(24, 30))):
        for label in (0, 1):
            (root / split / f"is_{label}").mkdir(parents=True)
            for number, scan in enumerate(digits.images[digits.target == label][part]):
                digit_image(scan).save(root / split / f"is_{label}" / f"{number}.png")
    return root


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- digits --------------------------------------------------------------------------------------


def test_digits_are_learnt(digits_run: Path) -> None:
    history = records(digits_run / "metrics.jsonl")
    assert history[-1]["total"] == 360
    assert history[-1]["accuracy"] >= 0.985
    assert history[-1]["epoch"] == TrainConfig.from_yaml(*find_recipe("digits")).epochs


def test_eval_repeats_the_accuracy_to_the_last_image(digits_run: Path, vitarium: Run) -> None:
    history = records(digits_run / "metrics.jsonl")
    best = max(history, key=lambda record: (record["correct"], -record["loss"]))
    for checkpoint, record in ((digits_run, best), (digits_run / "last.safetensors", history[-1])):
        process = vitarium("eval", checkpoint)
        assert process.returncode == 0, process.stderr
        assert f"({record['correct']}/360)" in process.stdout
        evaluation = records(digits_run / "evaluations.jsonl")[-1]
        assert (evaluation["correct"], evaluation["total"]) == (record["correct"], 360)
        assert evaluation["loss"] == pytest.approx(record["loss"], abs=1e-6)


def test_predict_knows_digits(digits_run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    held_out = load_data("digits").held_out
    paths = []
    for number in range(20):
        paths.append(Path(f"{number}.png"))
        held_out.images[number].save(paths[-1])
    assert main(["predict", str(digits_run), *map(str, paths), "--top", "2"]) == 0
    rows = re.findall(r"(\d+)\.png\W+(\d) +([\d.]+)%\W+(\d) +([\d.]+)%", capsys.readouterr().out)
    assert len(rows) == 20
    right = sum(int(label) == held_out.targets[int(name)] for name, label, *_ in rows)
    assert right >= 19
    assert all(float(first) >= float(second) for _, _, first, _, second in rows)


def test_attention_maps_are_those_of_the_mixers(digits_run: Path, tmp_path: Path) -> None:
    model, description = load_model(digits_run)
    held_out = load_data("digits").held_out
    pixels = torch.as_tensor(description.input.transform()(held_out.images[0]))[None]
    image = description.input.normalize(pixels)
    logits, views = attention_views(model, image, (0.2, 0.8))
    with torch.no_grad():
        assert torch.equal(logits, model(image))
    names = [name for name, _ in model.named_modules() if name.endswith(".mixer")]
    assert [view.name for view in views] == names
    assert views[0].query == (1, 6)
    first = views[0].weights.mean(0)
    assert first.shape == (8, 8)
    assert first.sum().item() == pytest.approx(1, abs=1e-5)
    window = torch.zeros(8, 8, dtype=torch.bool)
    window[0:3, 5:8] = True  # 3 x 3 around row 1 (0.2 of 8) and column 6 (0.8 of 8)
    assert torch.equal(first > 0, window)
    attention_picture(model, description, held_out.images[:2], [3, 3], tmp_path / "attention.png")
    assert Image.open(tmp_path / "attention.png").size[0] > 800


def test_demo_does_everything(vitarium: Run, tmp_path: Path) -> None:
    process = vitarium("demo", "--epochs", 1, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    listed = [tmp_path / line for line in process.stdout.splitlines() if line.startswith("runs/")]
    written = {path.name for path in listed}
    assert {"attention.png", "curves.png", "bench.jsonl", "best.safetensors", "samples"} <= written
    assert all(path.exists() for path in listed)
    for name in ("attention.png", "curves.png"):
        assert Image.open(tmp_path / "runs" / "demo" / name).format == "PNG"
    assert len(records(tmp_path / "runs" / "demo" / "bench.jsonl")) == 2
    assert len(list((tmp_path / "runs" / "demo" / "samples").iterdir())) == 6
    for heading in ("train", "eval", "predict", "bench", "written"):
        assert re.search(rf"─ {heading} ─", process.stdout)


# --- one's own folder ----------------------------------------------------------------------------


def test_folders_of_images(folders: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--data", f"folder:{folders}", "--output", str(tmp_path / "run"), "--epochs", "4"]
    assert main(["train", "--config", "digits", "--batch_size", "16", *arguments]) == 0
    history = records(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in history] == [3, 6, 9, 12]
    assert history[-1]["total"] == 12
    _, description = load_model(tmp_path / "run")
    assert description.classes == ["is_0", "is_1"]
    assert main(["eval", str(tmp_path / "run")]) == 0
    # Class folders without train/ and val/: the same command, a fixed fifth held out.
    assert main(["eval", str(tmp_path / "run"), "--data", f"folder:{folders / 'train'}"]) == 0
    assert records(tmp_path / "run" / "evaluations.jsonl")[-1]["total"] == 10
    capsys.readouterr()


# --- wrong calls ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory, folders: Path, digits_run: Path) -> Path:
    """Things that cannot be used."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty").mkdir()
    (root / "no_images" / "cat").mkdir(parents=True)
    (root / "no_images" / "dog").mkdir()
    for name, number in (("one_class", 1), ("broken", 2), ("half_empty", 2), ("few", 2)):
        for label in range(number):
            (root / name / f"class_{label}").mkdir(parents=True)
            for index in range(1 if name == "few" else 20):
                Image.new("RGB", (8, 8)).save(root / name / f"class_{label}" / f"{index:02}.png")
    for path in (root / "half_empty" / "class_1").iterdir():
        path.unlink()
    for path in (root / "broken" / "class_1").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    (root / "train_only" / "train" / "a").mkdir(parents=True)
    (root / "not_an_image.png").write_text("hello")
    (root / "truncated.safetensors").write_bytes(
        (digits_run / "best.safetensors").read_bytes()[:999]
    )
    (root / "foreign.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (root / "typo.yaml").write_text("epochz: 3\n")
    (root / "typo_in_group.yaml").write_text("optimizer: {weight_decy: 0.1}\n")
    (root / "ill_typed.yaml").write_text("epochs: many\n")
    (root / "not_yaml.yaml").write_text("epochs: [1\n")
    (root / "a_list.yaml").write_text("- 1\n")
    (root / "no_run").mkdir()
    (root / "bad_state").mkdir()
    (root / "bad_state" / "config.yaml").write_text((digits_run / "config.yaml").read_text())
    (root / "bad_state" / "checkpoints").mkdir()
    state = root / "bad_state" / "checkpoints" / "step-00000001.training.pt"
    state.write_bytes(b"PK\x03\x04 not a zip")
    return root


# Arguments ("{bad}" and "{run}" are folders), exit status, and what the message must say.
WRONG = [
    ("frobnicate", 2, "unknown command 'frobnicate'"),
    ("trian", 2, "did you mean one of train"),
    ("train --epoch 3", 2, "--epoch 3 (did you mean 'epochs'?)"),
    ("train --lr 0.1", 2, "did you mean 'optimizer.lr'?"),
    ("train --optimizer.weight_decy 0", 2, "did you mean 'optimizer.weight_decay'?"),
    ("train --epochs many", 2, "many"),
    ("train --epochs -3", 2, "epochs=-3"),
    ("train --epochs 0", 2, "epochs=0"),
    ("train --batch_size 0", 2, "batch_size=0"),
    ("train --workers -1", 2, "workers=-1"),
    ("train --threads 0", 2, "threads=0"),
    ("train --image_size 0", 2, "image_size=0"),
    ("train --seed -1", 2, "seed=-1"),
    ("train --crop_pct 2", 2, "crop_pct=2"),
    ("train --ema_decay 1.1", 2, "ema_decay=1.1"),
    ("train --optimizer.lr -1", 2, "optimizer.lr=-1"),
    ("train --optimizer.clip_grad -1", 2, "optimizer.clip_grad=-1"),
    ("train --augment.rotation -5", 2, "augment.rotation=-5"),
    ("train --augment.hflip 3", 2, "augment.hflip=3"),
    ("train --augment.scale [0.9,0.1]", 2, "augment.scale"),
    ("train --augment.mixup 0.2 --batch_size 33", 2, "batch_size=33"),
    ("train --schedule.name linear", 2, "linear"),
    ("train --schedule.warmup_epochs 400", 2, "schedule.warmup_epochs=400"),
    ("train --precision fp8", 2, "fp8"),
    ("train --device tpu", 2, "tpu"),
    ("train --optimizer.name adamx", 2, "optimizer.name='adamx'"),
    ("train --config digit", 2, "did you mean 'digits'?"),
    ("train --config {bad}", 2, "{bad}"),
    ("train --config {bad}/nowhere.yaml", 2, "nowhere.yaml"),
    ("train --config {bad}/not_an_image.png", 2, "mapping"),
    ("train --config {bad}/typo.yaml", 2, "'epochz' (did you mean 'epochs'?)"),
    ("train --config {bad}/typo_in_group.yaml", 2, "did you mean 'optimizer.weight_decay'?"),
    ("train --config {bad}/ill_typed.yaml", 2, "epochs"),
    ("train --config {bad}/not_yaml.yaml", 2, "not YAML"),
    ("train --config {bad}/a_list.yaml", 2, "mapping"),
    ("train --resume {run} --epochs 3", 2, "leave out epochs"),
    ("train --resume {bad}/nowhere", 1, "nowhere holds no run"),
    ("train --resume {bad}/no_run", 1, "no_run holds no run"),
    ("train --resume {bad}/bad_state", 1, "step-00000001.training.pt cannot be read"),
    ("train --config digits --output {run}", 1, "holds a run already"),
    ("train --config digits --output {bad}/typo.yaml", 1, "typo.yaml"),
    ("train --model dinat_nono", 1, "model='dinat_nono' is not registered"),
    ("train --model_kwargs.bogus 1", 1, "bogus"),
    ("train --data foo:bar", 1, "unknown scheme 'foo'"),
    ("train --data digit", 1, "did you mean 'digits'?"),
    ("train --data digits:8", 1, "digits takes no argument"),
    ("train --data folder:", 1, "folder:PATH"),
    ("train --data folder:{bad}/nowhere", 1, "nowhere is not a folder"),
    ("train --data folder:{bad}/typo.yaml", 1, "typo.yaml is not a folder"),
    ("train --data folder:{bad}/empty", 1, "{bad}/empty"),
    ("train --data folder:{bad}/no_images", 1, "cat"),
    ("train --data folder:{bad}/half_empty", 1, "class_1"),
    ("train --data folder:{bad}/one_class", 1, "class_0"),
    ("train --data folder:{bad}/few", 1, "too few"),
    ("train --data folder:{bad}/train_only", 1, "no val/"),
    ("train --data folder:{bad}/one_class --batch_size 2", 1, "class_0"),
    ("train --config digits --data folder:{bad}/broken --batch_size 8", 1, "class_1/"),
    (
        "train --config digits --data folder:{bad}/broken --batch_size 8 --workers 1",
        1,
        "class_1/",
    ),
    ("train --batch_size 5000", 1, "batch_size=5000"),
    ("eval", 2, "model"),
    ("eval {bad}/nowhere", 1, "nowhere does not exist"),
    ("eval {bad}/no_run", 1, "no_run holds no checkpoint"),
    ("eval {bad}/truncated.safetensors", 1, "truncated.safetensors cannot be read"),
    ("eval {bad}/not_an_image.png", 1, "not_an_image.png cannot be read"),
    ("eval {bad}/foreign.safetensors", 1, "not written by vitarium train"),
    ("eval {run} --data folder:{folders}", 1, "is_0"),
    ("eval {run} --data foo:bar", 1, "unknown scheme 'foo'"),
    ("eval {run} --batch_size 0", 2, "batch_size"),
    ("eval {run} --bach_size 3", 2, "did you mean 'batch_size'?"),
    ("predict {run}", 2, "images"),
    ("predict {run} {bad}/nowhere.png", 1, "nowhere.png does not exist"),
    ("predict {run} {bad}/not_an_image.png", 1, "not_an_image.png cannot be read"),
    ("predict {run} {bad}/empty", 1, "{bad}/empty"),
    ("predict {bad}/nowhere {bad}/not_an_image.png", 1, "nowhere does not exist"),
    ("predict {run} {bad}/not_an_image.png --top 0", 2, "top"),
    ("demo --epochs 0", 2, "epochs=0"),
    ("demo --output {run}", 1, "holds a run already"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), WRONG, ids=[row[0] for row in WRONG])
def test_wrong_calls(
    arguments: str,
    status: int,
    message: str,
    bad: Path,
    digits_run: Path,
    folders: Path,
    tmp_path: Path,
    monkeypatch,
    capsys,
) -> None:
    """One line that names the culprit, the right exit status, and nothing written over."""
    monkeypatch.chdir(tmp_path)
    places = {"bad": bad, "run": digits_run, "folders": folders}
    before = {path: path.stat().st_mtime_ns for path in digits_run.iterdir()}
    assert main(arguments.format(**places).split()) == status
    stderr = capsys.readouterr().err
    assert stderr.startswith("vitarium: error: ")
    assert message.format(**places) in stderr
    assert len(stderr.splitlines()) == 1 and "Traceback" not in stderr
    assert {path: path.stat().st_mtime_ns for path in digits_run.iterdir()} == before


def test_wrong_calls_leave_no_run_behind(bad: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", f"folder:{bad}/no_images"]) == 1
    assert main(["train", "--model", "dinat_nono"]) == 1
    assert list(tmp_path.iterdir()) == []
    capsys.readouterr()


def test_errors_of_a_process(vitarium: Run) -> None:
    process = vitarium("eval", "nowhere")
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == (
        "vitarium: error: checkpoint nowhere does not exist, and timm knows no model of this name\n"
    )
    shown = vitarium("--traceback", "eval", "nowhere")
    assert shown.returncode == 1 and "Traceback" in shown.stderr


def test_help_names_every_command_without_importing_torch() -> None:
    code = (
        "import sys; from vitarium.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    for name, text in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", process.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", ["train", "eval", "predict", "demo"])
def test_help_of_a_command(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"vitarium {command}" in capsys.readouterr().out
