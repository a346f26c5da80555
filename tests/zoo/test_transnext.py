"""TransNeXt, and MoH-TransNeXt's goldens: official weights, published figures, maps of any size."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from vitarium import zoo
from vitarium.ops import Mixer

FOLDER = Path(__file__).parents[1] / "data" / "parity"
GOLDENS = sorted([*FOLDER.glob("transnext_*.json.xz"), *FOLDER.glob("moh_*.json.xz")])
ROWS = json.loads((FOLDER / "published_transnext.json").read_text())["classification"]
# GFLOPs of "2.7", which stands for anything from 2.65 to 2.75: the count is 2.66.
ROUNDED = {"transnext_micro"}
SMALL = {"depths": (1, 1, 1, 1), "embed_dim": 24}


def _name(row: dict) -> str:
    """The registered name of a row: its factory, and the resolution of a fine-tuned one."""
    factory = row["factory"].partition("(")[0]
    return f"{factory}_384" if row["resolution"] == 384 else factory


every_row = pytest.mark.parametrize("row", ROWS, ids=_name)


# --- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name.split(".")[0])
@torch.no_grad()
def test_official_weights_give_official_outputs(path, parity, tmp_path):
    """In float64, within 1e-6 of the spread: every stage, and logits where there is a head."""
    golden = parity.load(path)
    is_dense = "logits" not in golden
    model = parity.official(golden, tmp_path, features_only=is_dense)
    images = parity.image(*golden["input"])
    if is_dense:
        maps = model(images)
    else:
        _, maps = model.forward_intermediates(images, output_fmt="NHWC")
        parity.close_logits(model(images), golden)
    parity.close_features(maps, golden["features"])


def test_there_are_goldens_of_every_form():
    names = {path.name.split(".")[0] for path in GOLDENS}
    assert {"transnext_micro", "moh_transnext_small_75"} <= names
    assert {"transnext_micro_dense_97x130", "transnext_micro_dense_extrapolation_70x161"} <= names


@pytest.mark.parametrize("name", ["transnext_micro", "moh_transnext_base_50"])
def test_our_names_pass_and_tables_are_dropped(name):
    model = timm.create_model(name, device="meta")
    ours = model.state_dict()
    assert set(zoo.transnext.checkpoint_filter_fn(ours, model)) == set(ours)
    tables = {
        name: torch.ones(1)
        for name in (
            "relative_pos_index1",
            "relative_coords_table4",
            "block1.0.attn.seq_length_scale",
            "block1.0.attn.padding_mask",
        )
    }
    assert zoo.transnext.checkpoint_filter_fn(tables, model) == {}


def test_a_detectors_checkpoint_is_its_backbones():
    model = timm.create_model("transnext_micro", device="meta", **SMALL)
    official = {"backbone.patch_embed2.norm.bias": torch.ones(1), "neck.0": torch.ones(1)}
    mapped = zoo.transnext.checkpoint_filter_fn(official, model)
    assert list(mapped) == ["stages.1.downsample.norm.bias"]


# --- published figures ---------------------------------------------------------------------------


@every_row
def test_size_and_cost_are_the_published_ones(row, parity):
    parameters, gflops = parity.cost(_name(row), row["resolution"])
    assert parameters / 1e6 == pytest.approx(row["params_M"], rel=0.01)
    if _name(row) in ROUNDED:
        assert round(gflops, 1) == row["gflops"]
    else:
        assert gflops == pytest.approx(row["gflops"], rel=0.01)


@every_row
def test_configuration_and_figures(row, parity):
    parity.check_published(
        _name(row),
        row,
        url=row["checkpoint_url"],
        license="apache-2.0",
        paper_ids="arXiv:2311.17132",
        tag="in1k",
        crop_mode="squash" if row["resolution"] == 384 else "center",
    )


# --- what is special of the family ---------------------------------------------------------------


def _mixers(model: nn.Module) -> list[Mixer]:
    return [module for module in model.modules() if isinstance(module, Mixer)]


def test_the_last_stage_is_dense_unless_all_are_aggregated():
    plain = timm.create_model("transnext_micro", device="meta", **SMALL)
    names = [mixer.name for mixer in _mixers(plain)]
    assert names == ["aggregated"] * 3 + ["length_scaled_cosine"]
    assert {m.pretrain_size for m in _mixers(plain)} == {(56, 56), (28, 28), (14, 14), (7, 7)}
    aggregated = timm.create_model("transnext_micro_AAAA", device="meta", **SMALL)
    assert [(m.name, m.sr_ratio) for m in _mixers(aggregated)] == [
        ("aggregated", ratio) for ratio in (16, 8, 4, 2)
    ]
    assert _mixers(aggregated)[0].pretrain_size == (64, 64)


def test_distances_are_those_of_pretraining():
    fine_tuned = timm.create_model("transnext_base_384", device="meta", **SMALL)
    assert _mixers(fine_tuned)[0].pretrain_size == (56, 56)
    other = timm.create_model("transnext_micro", device="meta", img_size=(256, 320), **SMALL)
    assert _mixers(other)[0].pretrain_size == (64, 80)


@torch.no_grad()
def test_linear_inference_pools_to_a_fixed_size():
    torch.manual_seed(0)
    model = timm.create_model("transnext_micro", **SMALL).eval()
    fixed = timm.create_model("transnext_micro", fixed_pool_size=7, **SMALL).eval()
    fixed.load_state_dict(model.state_dict())
    native, larger = torch.randn(1, 3, 224, 224), torch.randn(1, 3, 288, 288)
    torch.testing.assert_close(fixed(native), model(native))
    assert (fixed(larger) - model(larger)).abs().max() > 1e-5


def test_gates_of_the_feed_forward_network_see_their_neighbours():
    torch.manual_seed(0)
    network = zoo.transnext.ConvolutionalGLU(5, 20).double()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    assert network.fc1.out_features == 2 * 13
    hidden = network.fc1(x).permute(0, 3, 1, 2)
    gate = nn.functional.gelu(network.dwconv(hidden[:, :13]))
    torch.testing.assert_close(network(x), network.fc2((gate * hidden[:, 13:]).permute(0, 2, 3, 1)))


def test_convolutions_start_by_fan_out():
    torch.manual_seed(0)
    model = timm.create_model("transnext_tiny", depths=(1, 1, 1, 1), embed_dim=72)
    block = model.stages[3].blocks[0]
    assert block.mlp.dwconv.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert model.stem.proj.weight.std().item() == pytest.approx(math.sqrt(2 / 49 / 72), rel=0.05)
    sr = model.stages[2].blocks[0].mixer.sr
    assert sr.weight.std().item() == pytest.approx(math.sqrt(2 / 288), rel=0.05)
    assert not any(layer.bias.any() for layer in (block.mlp.dwconv, model.stem.proj, sr))


@pytest.mark.parametrize("name", ["transnext_micro", "transnext_micro_AAAA"])
@pytest.mark.parametrize("is_extrapolation", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (5, 300), (32, 33), (97, 61)])
@torch.no_grad()
def test_images_may_have_any_size(name, is_extrapolation, size):
    torch.manual_seed(0)
    arguments = {"img_size": 64, "is_extrapolation": is_extrapolation, **SMALL}
    model = timm.create_model(name, features_only=True, **arguments).eval()
    maps = model(torch.randn(1, 3, *size))
    assert all(x.isfinite().all() for x in maps)
    strides = (4, 8, 16, 32)
    assert [x.shape[2:] for x in maps] == [tuple(-(-n // s) for n in size) for s in strides]


@torch.no_grad()
def test_autocast_is_close():
    torch.manual_seed(0)
    model = timm.create_model("transnext_micro", **SMALL).eval()
    images = torch.randn(2, 3, 65, 97)
    want = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (model(images) - want).abs().max() < 0.1 * want.std()
