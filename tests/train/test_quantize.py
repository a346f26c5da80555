"""Int8 through torchao: programs that answer nearly as the float model does."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn

import vitarium.zoo  # noqa: F401  registers our models
from vitarium.cli.main import main
from vitarium.train import TrainConfig, train
from vitarium.train.config import AugmentConfig, ScheduleConfig
from vitarium.train.quantize import Program, quantize_model, tensor_bytes

SIZE = (32, 32)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 64, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **kwargs).eval()


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_int8_answers_like_float(mode, model, tmp_path) -> None:
    images = torch.randn(6, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    export = quantize_model(model, mode, SIZE, [images[:3], images[3:]])
    export.write(tmp_path / "model.pt2", "torch", 0.05)
    program = Program(tmp_path / "model.pt2").eval()
    with torch.no_grad():
        expected, found = model(images), program(images)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert 1e-6 < error < 0.1  # rounded, and not much
    assert tensor_bytes(program.program) < 0.6 * tensor_bytes(model)
    assert type(model.blocks[0].mlp.fc1) is nn.Linear  # the float model is as it was
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.float32


def test_wrong_arguments(model, tmp_path) -> None:
    with pytest.raises(ValueError, match="mode='int4' is unknown"):
        quantize_model(model, "int4", SIZE)
    with pytest.raises(ValueError, match="images to calibrate"):
        quantize_model(model, "static", SIZE)
    with pytest.raises(ValueError, match="has none"):
        quantize_model(nn.Sequential(nn.Conv2d(3, 4, 3)), "dynamic", SIZE)
    (tmp_path / "bad.pt2").write_text("nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        Program(tmp_path / "bad.pt2")


def test_what_torchao_cannot_trace_is_refused(model) -> None:
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 1e9:  # no tracer follows a choice by value
                return self.head(x.amax((2, 3)))
            return self.head(x.mean((2, 3)))

    with pytest.raises(ValueError, match="torchao does not support this model in mode 'static'"):
        quantize_model(Choosy(), "static", SIZE, [torch.zeros(2, 3, *SIZE)])


def test_from_the_command_line(digit_folders, tmp_path, capsys) -> None:
    config = TrainConfig(
        data=f"folder:{digit_folders}", model="vit_tiny_patch16_224",
        model_kwargs={"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 32,
                      "num_heads": 2},
        image_size=32, epochs=1, batch_size=16, workers=0, threads=1, device="cpu",
        schedule=ScheduleConfig(warmup_epochs=0), augment=AugmentConfig(hflip=0.0),
    )  # fmt: skip
    train(config, output=tmp_path / "run")
    output = tmp_path / "int8"
    call = ["quantize", str(tmp_path / "run"), "--mode", "static", "--output", str(output)]
    assert main([*call, "--calibration_images", "20"]) == 0
    report = json.loads((output / "quantization.json").read_text())
    assert report["after"]["images"] == 12
    assert report["after"]["bytes"] < report["before"]["bytes"]
    assert report["file_bytes"] == (output / "model.pt2").stat().st_size
    assert "latency_ms" in capsys.readouterr().out
