"""Folders in the form of the Hugging Face hub, as timm's `push_to_hf_hub` uploads them."""

import json

import pytest
import timm
import torch

import vitarium.zoo  # noqa: F401

SMALL = {
    "dinat_nano": {},
    "crossformer_pp_small": {"depths": (1, 1, 1, 1), "embed_dim": 32},
    "inline_deit_tiny": {},
}


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_model_comes_back_from_its_folder(name, tmp_path):
    model = timm.create_model(name, num_classes=7, in_chans=1, **SMALL[name]).eval()
    arguments = {"in_chans": 1, **SMALL[name]}
    timm.models.save_for_hf(model, tmp_path, model_args=arguments)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["architecture"], stored["num_classes"]) == (name, 7)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert (again.num_classes, again.in_chans) == (7, 1)
    images = torch.randn(2, 1, 64, 80, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(images), model(images))
    finer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
    torch.testing.assert_close(finer.forward_features(images), model.forward_features(images))
    assert finer(images).shape == (2, 3)
