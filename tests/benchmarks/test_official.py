"""Backbones beside official code, for which a folder stands that looks like it."""

import sys

import pytest
import timm

from vitarium.benchmarks import official, record
from vitarium.benchmarks.official import OURS, THEIRS, bench_official
from vitarium.benchmarks.official_code import OFFICIAL, Official

CODE = """
import cv2
from apex import amp
from mmcv.runner import load_checkpoint
from timm.models.layers import DropPath, trunc_normal_
from timm.models.registry import register_model
from timm.models.vision_transformer import _cfg
from models.parts import scaled

config = _cfg(url="", hf_hub="somewhere")

@register_model
def network(factor=1.0):
    import timm
    assert DropPath and trunc_normal_ and cv2 and amp
    return scaled(timm.create_model("dinat_nano", num_classes=5), factor)
"""
PARTS = """
from torch import nn

class Scaled(nn.Module):
    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def state_dict(self):
        return self.model.state_dict()

    def forward(self, x):
        return self.factor * self.model(x)

def scaled(model, factor):
    return Scaled(model, factor)
"""


@pytest.fixture
def clones(tmp_path, monkeypatch):
    folder = tmp_path / "Network" / "classification" / "models"
    folder.mkdir(parents=True)
    (folder / "network.py").write_text(CODE)
    (folder / "parts.py").write_text(PARTS)
    create = timm.create_model
    source = Official("somebody/Network", "classification", "models.network", "network")
    wrong = Official(*(source.repository, source.folder, source.module, "network"), {"factor": 2.0})
    monkeypatch.setattr(official, "OFFICIAL", {"dinat_nano": source, "nat_mini": wrong})
    monkeypatch.setattr(
        timm, "create_model", lambda name, **kw: create("dinat_nano", num_classes=5)
    )
    return tmp_path


def test_both_are_timed_and_nothing_stays_behind(clones):
    before = set(sys.modules)
    register = timm.models.register_model
    output = clones / "official.jsonl"
    outcome = bench_official(
        ["dinat_nano"], clones=clones, device="cpu", image_size=32, batch_size=2, min_rounds=1,
        seconds=0.0, output=output, dtypes=["float32", "bfloat16"],
    )  # fmt: skip
    assert outcome.refused == []
    assert record.read(output) == outcome.records
    assert [(r.dtype, r.implementation, r.mode) for r in outcome.records] == [
        (dtype, implementation, mode) for dtype in ("float32", "bfloat16")
        for mode in ("forward", "training") for implementation in (OURS, THEIRS)
    ]  # fmt: skip
    assert all(r.median > 0 and r.peak_memory for r in outcome.records)
    assert outcome.records[0].params == outcome.records[1].params
    left = {name for name in set(sys.modules) - before if name.split(".")[0] in ("models", "cv2")}
    assert not left
    assert timm.models.register_model is register


def test_other_outputs_are_not_timed(clones):
    outcome = bench_official(["nat_mini"], clones=clones, device="cpu", image_size=32)
    assert outcome.records == []
    assert outcome.refused[0].startswith("nat_mini: outputs differ: error")


def test_a_missing_repository_is_named(clones, tmp_path):
    with pytest.raises(ValueError, match="clone https:"):
        bench_official(["dinat_nano"], clones=tmp_path / "empty", device="cpu")
    with pytest.raises(ValueError, match="dinat_nan"):
        bench_official(["dinat_nan"], clones=clones, device="cpu")
    with pytest.raises(ValueError, match="batch_size=0"):
        bench_official(["dinat_nano"], clones=clones, device="cpu", batch_size=0)


def test_official_models_are_of_models_of_ours():
    assert set(OFFICIAL) <= set(timm.list_models())
