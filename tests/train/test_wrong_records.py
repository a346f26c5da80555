"""Wrong inputs of the evaluation and of the records: one clear error each, nothing written over."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from vitarium.cli.main import main
from vitarium.train.imagenet import synsets

CPU = "--workers 0 --device cpu --image_size 32"
MODEL = f"testbed_attention_nano --random {CPU}"


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, format="PNG")


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders and files that cannot be used."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty").mkdir()
    image(root / "pets" / "cat" / "1.png")
    image(root / "pets" / "dog" / "1.png")
    image(root / "typo" / "n0144076" / "1.JPEG")
    image(root / "beyond" / "1000" / "1.jpeg")
    (root / "hollow" / synsets()[0]).mkdir(parents=True)
    image(root / "flat" / "ILSVRC2012_val_00000003.JPEG")
    image(root / "far" / "ILSVRC2012_val_00060000.JPEG")
    image(root / "unlabelled" / "ILSVRC2012_val_00000001.JPEG")  # of which no label is right
    image(root / "v2" / "5" / "1.jpeg")
    image(root / "outside_a" / synsets()[0] / "1.jpg")  # no class of ImageNet-A
    (root / "c" / "fog" / "6" / synsets()[0]).mkdir(parents=True)
    image(root / "c_pets" / "fog" / "1" / "cat" / "1.png")
    (root / "broken" / synsets()[0]).mkdir(parents=True)
    (root / "broken" / synsets()[0] / "1.JPEG").write_bytes(b"\x89PNG nothing")
    (root / "real.json").write_text(json.dumps([[1], [2]]))
    (root / "no_labels.json").write_text(json.dumps({"1": [3]}))
    (root / "high_labels.json").write_text(json.dumps([[1], [1000]]))
    (root / "text.json").write_text("[[1], ")
    (root / "results").mkdir()
    (root / "results" / "results.json").write_text("{}")
    torch.save(timm.create_model("testbed_window_nano").state_dict(), root / "window.pth")
    (root / "damaged.pth").write_bytes(b"PK\x03\x04 not a zip")
    return root


# Arguments of `vitarium eval` ("{bad}" is a folder), exit status, and what the message must say.
WRONG = [
    (f"{MODEL} --data imagenet:{{bad}}/nowhere", 1, "nowhere is not a folder"),
    (f"{MODEL} --data imagenet:", 1, "imagenet:PATH"),
    (f"{MODEL} --data imagnet:{{bad}}/v2", 1, "'imagnet' (did you mean 'imagenet'?)"),
    (f"{MODEL} --data imagenet-sketc:{{bad}}/v2", 1, "did you mean 'imagenet-sketch'?"),
    (f"{MODEL} --data {{bad}}/v2", 1, "unknown scheme"),
    (f"{MODEL} --data imagenet:{{bad}}/empty", 1, "holds no class folders"),
    (f"{MODEL} --data imagenet:{{bad}}/flat", 1, "must be sorted into folders of synsets"),
    (f"{MODEL} --data imagenet:{{bad}}/pets", 1, "pets/cat is not named by one of its 1000"),
    (f"{MODEL} --data imagenet:{{bad}}/typo", 1, "did you mean 'n01440764'?"),
    (f"{MODEL} --data imagenet:{{bad}}/hollow", 1, "hold no images"),
    (f"{MODEL} --data imagenet:{{bad}}/broken", 1, "none of the 1 held-out images can be read"),
    (f"{MODEL} --data imagenet-v2:{{bad}}/beyond", 1, "beyond/1000 is not named"),
    (f"{MODEL} --data imagenet-a:{{bad}}/outside_a", 1, "one of its 200 classes"),
    (f"{MODEL} --data imagenet-r:{{bad}}/v2", 1, "one of its 200 classes"),
    (f"{MODEL} --data imagenet-c:{{bad}}/c", 1, "holds no corruptions"),
    (f"{MODEL} --data imagenet-c:{{bad}}/c_pets", 1, "fog/1/cat is not named"),
    (f"{MODEL} --data imagenet-real:{{bad}}/v2", 1, "ILSVRC2012_val_00000001.JPEG"),
    (f"{MODEL} --data imagenet-real:{{bad}}/far", 1, "beyond the 50000 images"),
    (f"{MODEL} --data imagenet-real:{{bad}}/unlabelled", 1, "has a label"),
    (
        f"{MODEL} --data imagenet-real:{{bad}}/flat --real_labels {{bad}}/nowhere.json",
        1,
        "nowhere.json does not exist",
    ),
    (
        f"{MODEL} --data imagenet-real:{{bad}}/flat --real_labels {{bad}}/text.json",
        1,
        "text.json cannot be read as JSON",
    ),
    (
        f"{MODEL} --data imagenet-real:{{bad}}/flat --real_labels {{bad}}/no_labels.json",
        1,
        "must hold a list",
    ),
    (
        f"{MODEL} --data imagenet-real:{{bad}}/flat --real_labels {{bad}}/high_labels.json",
        1,
        "0 to 999",
    ),
    (
        f"{MODEL} --data imagenet-real:{{bad}}/flat --real_labels {{bad}}/real.json",
        1,
        "beyond the 2 images",
    ),
    (f"{MODEL} --data folder:{{bad}}/pets", 1, "cat, dog, which are none of those"),
    (MODEL, 1, "give data"),
    (f"{MODEL} --data imagenet-v2:{{bad}}/v2 --output {{bad}}/results", 1, "already"),
    (f"{MODEL} --data imagenet-v2:{{bad}}/v2 --output {{bad}}/real.json", 1, "real.json"),
    (f"{MODEL} --pretrained", 1, "--pretrained excludes"),
    (f"{MODEL} --checkpoint {{bad}}/window.pth", 1, "exclude each other"),
    ("testbed_attention_nono", 1, "did you mean 'testbed_attention_nano'?"),
    (f"testbed_attention_nano --checkpoint {{bad}}/nowhere.pth {CPU}", 1, "nowhere.pth"),
    (f"testbed_attention_nano --checkpoint {{bad}}/window.pth {CPU}", 1, "does not fit the model"),
    (f"testbed_attention_nano --checkpoint {{bad}}/damaged.pth {CPU}", 1, "damaged.pth"),
    (f"{MODEL} --data imagenet-v2:{{bad}}/v2 --crop_pct 1.5", 2, "crop_pct"),
    (f"{MODEL} --data imagenet-v2:{{bad}}/v2 --crop_pct 0", 2, "crop_pct"),
    (f"{MODEL} --data imagenet-v2:{{bad}}/v2 --image_size 0", 2, "image_size"),
    (f"{MODEL} --data imagenet-v2:{{bad}}/v2 --precision fp8", 2, "precision"),
    (f"{MODEL} --data imagenet-v2:{{bad}}/v2 --imagesize 3", 2, "did you mean"),
    (
        "vit_tiny_patch16_224 --random --workers 0 --device cpu --image_size 8 "
        "--data imagenet-v2:{bad}/v2",
        1,
        "refuses images of 8x8",
    ),
]


@pytest.mark.parametrize(("arguments", "status", "message"), WRONG, ids=[row[0] for row in WRONG])
def test_wrong_calls(
    arguments: str, status: int, message: str, bad: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in bad.rglob("*")}
    assert main(["eval", *arguments.format(bad=bad).split()]) == status
    stderr = capsys.readouterr().err
    assert stderr.startswith("vitarium: error: ")
    assert message in stderr
    assert len(stderr.splitlines()) == 1 and "Traceback" not in stderr
    assert {path: path.stat().st_mtime_ns for path in bad.rglob("*")} == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["wanb", "tensorboard", "[wandb]"])
def test_unknown_tracking(value: str, tmp_path: Path, capsys) -> None:
    arguments = ["--tracking", value, "--output", str(tmp_path / "run")]
    assert main(["train", "--config", "digits", *arguments]) == 2
    assert "tracking" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and "wandb" not in sys.modules
