"""`vitarium export`: files that give the model's outputs, and what it says where it cannot."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from vitarium.cli.main import main
from vitarium.zoo import export
from vitarium.zoo.export import SUFFIXES, trace


def test_both_files_give_the_outputs_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = timm.create_model("dinat_nano", num_classes=7).eval()
    torch.save(model.state_dict(), "weights.pth")
    assert main(["export", "dinat_nano", "--checkpoint", "weights.pth"]) == 0
    said = capsys.readouterr().out
    assert "written dinat_nano.pt2" in said and "written dinat_nano.onnx" in said
    assert "batch: 1 or more" in said
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        want = model(images)
    assert want.shape == (5, 7)
    program = torch.export.load("dinat_nano.pt2").module()
    torch.testing.assert_close(program(images), want, rtol=1e-4, atol=1e-5)
    session = onnxruntime.InferenceSession("dinat_nano.onnx")
    (found,) = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), want, rtol=1e-4, atol=1e-5)
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]

    before = Path("dinat_nano.pt2").read_bytes()
    assert main(["export", "dinat_nano", "--random", "--format", "torch"]) == 1
    assert "--overwrite true" in capsys.readouterr().err
    assert Path("dinat_nano.pt2").read_bytes() == before


def test_size_is_free_where_the_path_does_not_depend_on_it(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    output = tmp_path / "resnet"
    arguments = ["--random", "--dynamic-size", "--image-size", "96", "128", "--output", str(output)]
    assert main(["export", "resnet10t", *arguments]) == 0
    said = capsys.readouterr().out
    assert "2x3x128x192" in said and "2x3x101x131" in said and "not for" not in said
    assert (tmp_path / "resnet.onnx").exists() and (tmp_path / "resnet.pt2").exists()


class _PathBySize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.shape[2] == 32 else x.amax((2, 3))


def test_a_size_that_decides_the_path_is_named():
    with pytest.raises(ValueError, match=r"without a dynamic size.*to be a constant \(32\)\."):
        trace(_PathBySize(), (32, 40), dynamic_size=True)
    narrow = nn.Sequential(nn.AvgPool2d(8), nn.ReflectionPad2d(6), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ValueError, match="refuses images of 32 x 40 pixels"):
        trace(narrow, (32, 40))
    assert trace(_PathBySize(), (32, 40)).ranges == {"batch": (1, None)}


def test_sizes_that_take_another_path_are_listed(tmp_path):
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) if x.shape[2] >= 32 else x.amax((2, 3))

    traced = trace(Half(), (32, 40), dynamic_size=True)
    assert list(traced.refused) == [(2, 3, 16, 30)]
    assert traced.ranges["height"] == (32, None) and traced.ranges["width"][0] <= 30
    report = traced.write(tmp_path / "m.pt2", "torch")
    assert (2, 3, 37, 43) in report.shapes and report.error == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dinat_nan", "--random"], "did you mean dinat_nano"),
        (["dinat_nano"], "--random draws them"),
        (["dinat_nano", "--checkpoint", "none.pth"], "none.pth: no such checkpoint file"),
        (["dinat_nano", "--random", "--checkpoint", "none.pth"], "exclude each other"),
        (["dinat_nano", "--random", "--output", "none/m"], "there is no folder"),
        (["dinat_nano", "--random", "--format", "onnx", "--output", "m.pt2"], "ending in .onnx"),
        (["vit_tiny_patch16_224", "--random", "--image-size", "64", "64"], "refuses images of 64"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    output = str(tmp_path / "m.onnx")
    assert main(["export", "resnet10t", "--random", "--output", output]) == 1
    assert "needs onnxruntime: pip install" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_a_file_with_other_outputs_is_refused(wrong, tmp_path, monkeypatch):
    torch.manual_seed(0)
    traced = trace(timm.create_model("resnet10t"), (32, 32))
    monkeypatch.setitem(
        export._READERS, "torch", lambda path: lambda images: traced.model(images) + wrong
    )
    with pytest.raises(ValueError, match="does not give the outputs"):
        traced.write(tmp_path / "m.pt2", "torch")


def test_arguments_are_checked(tmp_path):
    model = timm.create_model("resnet10t")
    with pytest.raises(ValueError, match="image_size=\\(0, 32\\)"):
        trace(model, (0, 32))
    fixed = trace(model, (32, 32), batch_size=3)
    assert (fixed.axes, fixed.ranges, fixed.shapes) == ({}, {}, ((3, 3, 32, 32),))
    with pytest.raises(ValueError, match="format='tf' is unknown"):
        fixed.write(tmp_path / "m", "tf")
    assert set(SUFFIXES) == {"torch", "onnx"}
