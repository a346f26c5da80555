"""LITv2: official weights, published figures, and deformable token merging."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d

from vitarium import zoo
from vitarium.zoo.litv2 import DeformableMerging

FOLDER = Path(__file__).parents[1] / "data" / "parity"
ROWS = json.loads((FOLDER / "published_litv2.json").read_text())["classification"]
SIZES = {"S": "small", "M": "medium", "B": "base"}
SMALL = {"embed_dim": 32, "depths": (1, 1, 1, 1)}


def _name(row: dict) -> str:
    """The registered name of a row, for example litv2_small_alpha_20 of "LITv2-S alpha=0.2"."""
    name = f"litv2_{SIZES[row['name'][6]]}"
    name += "_384" if row["resolution"] == 384 else ""
    return name + (f"_alpha_{round(100 * row['alpha'])}" if "alpha" in row else "")


every_row = pytest.mark.parametrize("row", ROWS, ids=_name)


# --- parity --------------------------------------------------------------------------------------


@torch.no_grad()
def test_official_weights_give_official_outputs(parity, tmp_path):
    """In float64, within 1e-6 of the spread: stem, every stage, norm and logits."""
    golden = parity.load(FOLDER / "litv2_small.json.xz")
    model = parity.official(golden, tmp_path, "litv2_small")
    images = parity.image(*golden["input"])
    final, stages = model.forward_intermediates(images, output_fmt="NHWC")
    parity.close_features([model.stem(images), *stages, final], golden["features"])
    parity.close_logits(model(images), golden)


@torch.no_grad()
def test_the_detectors_backbone_gives_official_features(parity, tmp_path):
    """Windows of 4 x 4 on a map that they do not divide, and odd maps that are merged."""
    golden = parity.load(FOLDER / "litv2_small_dense_97x131.json.xz")
    norms = (None, nn.LayerNorm, nn.LayerNorm, nn.LayerNorm)
    model = parity.official(golden, tmp_path, features_only=True, feature_norm=norms)
    parity.close_features(model(parity.image(*golden["input"])), golden["features"])


def test_a_detectors_checkpoint_is_its_backbones():
    model = timm.create_model("litv2_small", device="meta", **SMALL)
    official = {"backbone.layers.1.downsample.dconv.weight": torch.ones(8, 4, 2, 2)}
    official |= {"backbone.norm2.bias": torch.ones(1), "neck.0": torch.ones(1)}
    found = zoo.litv2.checkpoint_filter_fn(official, model)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "stages.2.downsample.weight": (8, 16),
        "feature_norms.2.bias": (1,),
    }


def test_our_names_pass():
    model = timm.create_model("litv2_small", feature_norm=nn.LayerNorm, device="meta", **SMALL)
    ours = model.state_dict()
    found = zoo.litv2.checkpoint_filter_fn(ours, model)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in ours.items()}


# --- published figures ---------------------------------------------------------------------------


@every_row
def test_size_and_cost_are_the_published_ones(row, parity):
    """The measured parameters exactly; the table rounds them to millions."""
    parameters, gflops = parity.cost(_name(row), row["resolution"])
    assert parameters == row["params_measured"]
    assert round(parameters / 1e6) == row["params_M"]
    assert gflops == pytest.approx(row["gflops"], rel=0.01)


@every_row
def test_configuration_and_figures(row, parity):
    parity.check_published(
        _name(row),
        row,
        url=row["checkpoint_url"],
        license="apache-2.0",
        paper_ids=f"arXiv:{row['paper']}",
        tag="in1k",
    )


@pytest.mark.parametrize("row", [row for row in ROWS if "alpha" in row], ids=_name)
def test_shares_of_heads_are_the_published_ones(row):
    model = timm.create_model(_name(row), device="meta")
    heads = {(block.mixer.l_heads, block.mixer.h_heads) for block in model.stages[2].blocks}
    assert heads == {(row["lofi_heads"], row["hifi_heads"])}
    assert {(block.mixer.l_heads, block.mixer.h_heads) for block in model.stages[3].blocks} == {
        (24, 0)
    }


# --- deformable token merging --------------------------------------------------------------------


def _merging(dim: int, spread: float) -> DeformableMerging:
    torch.manual_seed(0)
    merging = DeformableMerging(dim, 2 * dim).double().eval()
    for parameter in merging.offset.parameters():
        nn.init.normal_(parameter, std=spread)
    return merging


def _expected(merging: DeformableMerging, x: torch.Tensor) -> torch.Tensor:
    """What torchvision's deformable convolution, the norm and GELU give."""
    x = x.permute(0, 3, 1, 2)
    weight = merging.weight.unflatten(1, (2, 2, x.shape[1])).permute(0, 3, 1, 2)
    convolved = deform_conv2d(x, merging.offset(x), weight, merging.bias, stride=2)
    return F.gelu(merging.norm(convolved)).permute(0, 2, 3, 1)


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("size", [(8, 6), (7, 9), (2, 3)])
def test_merging_is_a_deformable_convolution(size, spread):
    """Outputs and gradients, also where the taps stay, between two places, or leave the map."""
    merging = _merging(5, spread)
    x = torch.randn(2, *size, 5, dtype=torch.float64, requires_grad=True)
    sources = [x, *merging.parameters()]
    results = []
    for output in (merging(x), _expected(merging, x)):
        probe = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
        results.append([output, *torch.autograd.grad((output * probe).sum(), sources)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_merging_starts_as_a_convolution_whose_taps_learn_to_move():
    merging = DeformableMerging(8, 16)
    assert not any(parameter.any() for parameter in merging.offset.parameters())
    x = torch.randn(2, 6, 6, 8)
    weight = merging.weight.unflatten(1, (2, 2, 8)).permute(0, 3, 1, 2)
    convolved = F.conv2d(x.permute(0, 3, 1, 2), weight, merging.bias, stride=2)
    expected = F.gelu(merging.norm(convolved)).permute(0, 2, 3, 1)
    output = merging(x)
    torch.testing.assert_close(output, expected)
    output[..., 0].sum().backward()
    assert merging.offset.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_merging_in_half_precision_finds_its_places_on_large_maps(dtype):
    """On row 400 these types cannot tell two thirds of a pixel from a whole one."""
    merging = _merging(4, 0.0)
    merging.offset.bias.fill_(2 / 3)
    x = torch.randn(1, 800, 4, 4, dtype=torch.float64)
    half = merging.to(dtype)(x.to(dtype)).double()
    merging = _merging(4, 0.0)
    merging.offset.bias.fill_(2 / 3)
    expected = merging(x)
    assert (half - expected).abs().max() < 0.05 * expected.std()


@torch.no_grad()
def test_taps_far_away_or_nowhere_read_nothing_else():
    merging = _merging(4, 0.0)
    x = torch.randn(1, 6, 6, 4, dtype=torch.float64)
    merging.offset.bias.fill_(1e30)
    beyond = merging(x)
    torch.testing.assert_close(beyond, merging(torch.zeros_like(x)))
    merging.offset.bias.fill_(torch.nan)
    assert merging(x).shape == beyond.shape


# --- maps of any size ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (32, 33), (97, 61)])
@torch.no_grad()
def test_images_may_have_any_size(size):
    torch.manual_seed(0)
    model = timm.create_model("litv2_small", features_only=True, window_size=4, **SMALL).eval()
    maps = model(torch.randn(1, 3, *size))
    patches = [-(-length // 4) for length in size]  # the last ones are filled with zeros
    assert [list(x.shape[2:]) for x in maps] == [
        [max(1, length // step) for length in patches] for step in (1, 2, 4, 8)
    ]
    assert all(x.isfinite().all() for x in maps)
