"""Every published checkpoint has a model with its size, cost, address and figures."""

import json
from pathlib import Path

import pytest
import timm

from vitarium import zoo

SOURCE = Path(__file__).parents[1] / "data" / "parity" / "published_neighborhood_attention.json"
ROWS = json.loads(SOURCE.read_text())["classification"]


def _name(row: dict) -> str:
    """The registered name of a row, for example dinat_s_large_384 of "DiNATs-Large" at 384."""
    name = row["name"].lower().replace("dinats", "dinat_s").replace("vit-rpb", "vitrpb")
    name = name.replace("-iso-", "_isotropic_").replace("-", "_")
    name += "_384" if row["resolution"] == 384 else ""
    return name + ("_11x11" if row.get("kernel_size") == 11 else "")


every_row = pytest.mark.parametrize("row", ROWS, ids=_name)


@every_row
def test_size_and_cost_are_the_published_ones(row, parity):
    """The measured parameters exactly; the published figures within 1 % or their rounding."""
    parameters, gflops = parity.cost(_name(row), row["resolution"])
    assert parameters == row["params_measured"]
    assert parameters / 1e6 == pytest.approx(row["params_M"], rel=0.01, abs=0.5)
    assert gflops == pytest.approx(row["gflops"], rel=0.01)


@every_row
def test_configuration_and_figures(row, parity):
    parity.check_published(
        _name(row),
        row,
        url=row["checkpoint_url"],
        license="mit",
        paper_ids=f"arXiv:{row['paper']}",
        tag="in22k_ft_in1k" if row.get("pretraining") else "in1k",
    )


def test_every_pretraining_checkpoint_has_a_tag():
    addresses = {row.get("pretraining_checkpoint_url") for row in ROWS} - {None}
    configurations = {
        name: timm.get_pretrained_cfg(name)
        for name in timm.list_pretrained("dinat*")
        if name.endswith(".in22k")
    }
    assert {cfg.url for cfg in configurations.values()} == addresses
    assert {cfg.num_classes for cfg in configurations.values()} == {21841}
    assert all(zoo.published(name) is None for name in configurations)


def test_pretrained_configurations_create_their_heads():
    model = timm.create_model("dinat_large.in22k", device="meta")
    assert model.num_classes == model.head.fc.out_features == 21841


def test_an_unknown_model_has_no_figures():
    with pytest.raises(ValueError, match="'nat_huge' is unknown"):
        zoo.published("nat_huge")
    with pytest.raises(ValueError, match=r"'nat_mini\.in22k' is unknown"):
        zoo.published("nat_mini.in22k")
    assert zoo.published("resnet18") is None
