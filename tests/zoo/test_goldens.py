"""NAT's official weights give the official outputs. A golden's file is named like its model."""

from pathlib import Path

import pytest
import timm
import torch

import vitarium.zoo  # noqa: F401

FAMILIES = ("nat_", "dinat_", "vitrpb_")
GOLDENS = [
    path
    for path in sorted((Path(__file__).parents[1] / "data" / "parity").glob("*.json.xz"))
    if path.name.startswith(FAMILIES)
]


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name.split(".")[0])
@torch.no_grad()
def test_official_weights_give_official_outputs(path, parity, tmp_path):
    """In float64, within 1e-6 of the spread: stem, every stage, norm and logits."""
    golden = parity.load(path)
    file = tmp_path / "official.pth"
    torch.save(parity.state_dict(golden["state_dict"]), file)
    model = timm.create_model(
        golden["model"],
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file)},
        dtype=torch.float64,
    ).eval()
    assert sum(p.numel() for p in model.parameters()) == golden["params"]

    images = parity.image(*golden["input"])
    final, stages = model.forward_intermediates(images, output_fmt="NHWC")
    computed = [model.stem(images), *stages, final]
    assert len(computed) == len(golden["features"])
    for want, have in zip(golden["features"], computed):
        assert list(have.shape) == want["shape"], want["name"]
        tolerance = 1e-6 * want["std"]
        assert have.mean().item() == pytest.approx(want["mean"], abs=tolerance), want["name"]
        assert have.std(unbiased=False).item() == pytest.approx(want["std"], abs=tolerance)
        assert have.flatten()[:8].tolist() == pytest.approx(want["first8"], abs=tolerance)

    logits = torch.tensor(golden["logits"], dtype=torch.float64)
    assert (model(images) - logits).abs().max() < 1e-6 * logits.std()


def test_there_are_goldens():
    names = {path.name.split(".")[0] for path in GOLDENS}
    assert {"nat_mini", "dinat_mini", "dinat_s_tiny"} <= names
