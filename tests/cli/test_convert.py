"""`vitarium convert`."""

import pytest
import timm
import torch
from safetensors import safe_open

import vitarium.zoo  # noqa: F401
from vitarium.cli.main import main


@pytest.fixture
def official(tmp_path):
    """A checkpoint of a model with ten classes, in the wrapper of training scripts."""
    torch.manual_seed(0)
    model = timm.create_model("nat_mini", num_classes=10)
    state_dict = {
        key.replace("head.fc.", "head.").replace("stem.conv1.", "patch_embed.proj.0."): value
        for key, value in model.state_dict().items()
    }
    path = tmp_path / "official.pth"
    torch.save({"model": state_dict, "epoch": 3}, path)
    return model.eval(), path


def test_the_file_gives_the_same_outputs_through_timm(official, tmp_path, capsys):
    model, path = official
    output = tmp_path / "ours.safetensors"
    assert main(["convert", str(path), "--model", "nat_mini", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "4 of them renamed" in text and "10 classes" in text
    with safe_open(output, "pt") as file:
        assert file.metadata()["architecture"] == "nat_mini"
        assert file.metadata()["license"] == "mit"
    loaded = timm.create_model(
        "nat_mini",
        pretrained=True,
        num_classes=10,
        pretrained_cfg_overlay={"file": str(output), "num_classes": 10},
    ).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)


def test_nothing_is_written_over_or_made_of_another_model(official, tmp_path, capsys):
    _, path = official
    output = tmp_path / "ours.safetensors"
    output.write_bytes(b"precious")
    command = ["convert", str(path), "--model", "nat_mini", "--output", str(output)]
    assert main(command) == 1
    assert "exists; --overwrite true replaces it" in capsys.readouterr().err
    command[3] = "nat_small"
    assert main([*command, "--overwrite", "true"]) == 1
    assert "does not fit the model" in capsys.readouterr().err
    command[3] = "nat_huge"
    assert main([*command, "--overwrite", "true"]) == 1
    assert "model 'nat_huge' is unknown" in capsys.readouterr().err
    assert output.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("output", "message"),
    [("ours.pth", "must end in .safetensors"), ("none/ours.safetensors", "there is no folder")],
)
def test_bad_outputs_are_refused(official, output, message, tmp_path, capsys):
    target = str(tmp_path / output)
    assert main(["convert", str(official[1]), "--model", "nat_mini", "--output", target]) == 1
    assert message in capsys.readouterr().err
