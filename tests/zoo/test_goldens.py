"""NAT's official weights give the official outputs. A golden's file is named like its model."""

from pathlib import Path

import pytest
import torch

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
    weights = parity.state_dict(golden["state_dict"])
    model = parity.official(golden, tmp_path, stored=weights)  # NAT's files hold nothing else
    images = parity.image(*golden["input"])
    final, stages = model.forward_intermediates(images, output_fmt="NHWC")
    parity.close_features([model.stem(images), *stages, final], golden["features"])
    parity.close_logits(model(images), golden)


def test_there_are_goldens():
    names = {path.name.split(".")[0] for path in GOLDENS}
    assert {"nat_mini", "dinat_mini", "dinat_s_tiny"} <= names
