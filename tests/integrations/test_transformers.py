"""Our backbones inside Hugging Face transformers."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vitarium.zoo  # noqa: F401

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# Of each host and kind of attention one, with arguments that make it small.
SMALL = {
    "dinat_nano": {},
    "biformer_tiny": {"depths": (1, 1, 1, 1), "embed_dim": 32},
    "transnext_micro": {"depths": (1, 1, 1, 1), "embed_dim": 24},
    "agent_deit_tiny": {},
    "inline_swin_tiny": {"depths": (1, 1, 1, 1), "embed_dim": 32},
}
every_model = pytest.mark.parametrize("name", SMALL)


def _images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@every_model
@torch.no_grad()
def test_classifier_comes_back_from_its_folder(name, tmp_path):
    config = transformers.TimmWrapperConfig(
        architecture=name,
        num_labels=5,
        model_args=SMALL[name],
        pretrained_cfg=timm.get_pretrained_cfg(name).to_dict(),
    )
    model = transformers.TimmWrapperForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert isinstance(again, transformers.TimmWrapperForImageClassification)
    for size in ((64, 96), (63, 65)):
        images = _images(*size)
        logits = model(images).logits
        assert logits.shape == (2, 5)
        torch.testing.assert_close(again(images).logits, logits)
    with_states = again(images, output_hidden_states=True)
    torch.testing.assert_close(with_states.logits, logits)
    assert len(with_states.hidden_states) == len(model.timm_model.feature_info)


def test_processor_reads_the_configuration_of_the_model(tmp_path):
    config = transformers.TimmWrapperConfig(
        architecture="dinat_nano",
        num_labels=5,
        pretrained_cfg=timm.get_pretrained_cfg("dinat_nano").to_dict(),
    )
    model = transformers.TimmWrapperForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, transformers.TimmWrapperImageProcessor)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    have = processor(image, return_tensors="pt")["pixel_values"]
    data = timm.data.resolve_model_data_config(timm.create_model("dinat_nano"))
    assert (data["mean"], data["crop_pct"]) == ((0.5, 0.5, 0.5), 1.0)
    want = timm.data.create_transform(**data, is_training=False)(image)
    assert torch.equal(have, want[None])
    assert model(have).logits.shape == (1, 5)


def test_classifier_learns():
    config = transformers.TimmWrapperConfig(architecture="dinat_nano", num_labels=5)
    torch.manual_seed(0)
    model = transformers.TimmWrapperForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(_images(32, 32), labels=torch.tensor([1, 3])).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert losses[2] < losses[0]


@every_model
@torch.no_grad()
def test_backbone_gives_the_maps_of_features_only(name):
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=[0, 2])
    torch.manual_seed(0)
    backbone = transformers.AutoBackbone.from_config(config, **SMALL[name]).eval()
    assert isinstance(backbone, transformers.TimmBackbone)
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, out_indices=(0, 2), **SMALL[name]).eval()
    model.load_state_dict(
        {k.removeprefix("_backbone."): v for k, v in backbone.state_dict().items()}
    )
    images = _images(64, 96)
    have = backbone(images).feature_maps
    assert backbone.channels == model.feature_info.channels() == [f.shape[1] for f in have]
    for feature, want in zip(have, model(images), strict=True):
        assert torch.equal(feature, want)


def test_backbone_loads_from_a_local_folder(tmp_path):
    source = timm.create_model("dinat_nano", num_classes=5).eval()
    timm.models.save_for_hf(source, tmp_path)
    backbone = transformers.TimmBackbone.from_pretrained(
        f"local-dir:{tmp_path}", out_indices=[0, 1, 2]
    ).eval()
    with torch.no_grad():
        have = backbone(_images(32, 48)).feature_maps
        want = source.forward_intermediates(_images(32, 48), intermediates_only=True)
    for feature, tap in zip(have, want, strict=True):
        torch.testing.assert_close(feature, tap)


def test_segmenter_around_a_backbone_comes_back_from_its_folder(tmp_path):
    """The way transformers' own detectors and segmenters store a backbone of timm."""
    config = transformers.UperNetConfig(
        backbone_config=transformers.TimmBackboneConfig(
            backbone="dinat_nano", out_indices=[0, 1, 2]
        ),
        num_labels=3,
        hidden_size=16,
        use_auxiliary_head=False,
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    labels = torch.randint(3, (2, 32, 48), generator=torch.Generator().manual_seed(0))
    model(_images(32, 48), labels=labels).loss.backward()
    stem = [p for n, p in model.named_parameters() if ".stem." in n]
    assert stem and all(p.grad.abs().sum() > 0 for p in stem)
    model.eval().save_pretrained(tmp_path)
    again = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(_images(32, 48)).logits, model(_images(32, 48)).logits)
