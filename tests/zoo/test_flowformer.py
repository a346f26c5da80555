"""Flowformer: official weights, published figures, and position embeddings at any size."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitarium import zoo

FOLDER = Path(__file__).parents[1] / "data" / "parity"
GOLDENS = sorted(FOLDER.glob("flowformer_*.json.xz"))
ROW, *UNRELEASED = json.loads((FOLDER / "published_flowformer.json").read_text())["classification"]
SMALL = {"embed_dim": 24, "depths": (1, 1, 1, 1)}


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name.split(".")[0])
@torch.no_grad()
def test_official_weights_give_official_outputs(path, parity, tmp_path):
    """In float64, within 1e-6 of the spread: every stage and logits."""
    golden = parity.load(path)
    weights = parity.state_dict(golden["state_dict"])
    weights["blocks.0.0.total_ops"] = torch.zeros(1)  # as the authors' checkpoints hold
    model = parity.official(golden, tmp_path, "flowformer_cv", stored={"model": weights})
    images = parity.image(*golden["input"])
    stages = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
    parity.close_features(stages, golden["features"])
    parity.close_logits(model(images), golden)


def test_there_are_goldens():
    names = {path.name.split(".")[0] for path in GOLDENS}
    assert {"flowformer_cv", "flowformer_cv_97x97"} <= names


def test_size_and_cost_are_the_published_ones():
    """The paper's 41 and 6.3 count in 2^20 and 2^30, and of operations only those of layers."""
    model = timm.create_model("flowformer_cv", device="meta").eval()
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == 43_311_304
    assert parameters / 2**20 == pytest.approx(ROW["params_M"], rel=0.01)
    image = torch.empty(1, 3, ROW["resolution"], ROW["resolution"], device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    counts = counter.get_flop_counts()["Global"]
    layers = sum(n for op, n in counts.items() if op.__name__ in ("addmm", "convolution"))
    # The counter has 2 operations per multiply-add, papers have 1.
    assert layers / 2 / 2**30 == pytest.approx(ROW["gflops"], rel=0.01)
    assert counter.get_total_flops() / 2e9 == pytest.approx(6.883, rel=0.001)


def test_configuration_and_figures(parity):
    assert all(row["checkpoint_url"] is None for row in UNRELEASED)
    parity.check_published(
        "flowformer_cv",
        ROW,
        url=None,
        origin_url=ROW["checkpoint_url"],  # a drive's page
        license="mit",
        paper_ids="arXiv:2202.06258",
        tag="in1k",
    )


def test_layer_scale_is_in_the_feed_forward_branch_alone():
    model = timm.create_model("flowformer_cv", layer_scale=0.5, **SMALL)
    factors = {n: p for n, p in model.named_parameters() if "gamma" in n}
    assert set(factors) == {f"stages.{i}.blocks.0.ls2.gamma" for i in range(4)}
    assert all((factor == 0.5).all() for factor in factors.values())


@torch.no_grad()
def test_positions_are_interpolated_to_other_sizes():
    torch.manual_seed(0)
    model = timm.create_model("flowformer_cv", img_size=(32, 48), **SMALL).eval()
    stem = model.stem
    assert stem.pos_embed.shape == (1, 8, 12, 24)
    rows = torch.linspace(-1, 1, 8)[None, :, None, None]
    stem.pos_embed.copy_(rows.expand(1, 8, 12, 24))
    image = torch.zeros(1, 3, 40, 70)
    added = stem(image) - stem.conv(image.permute(0, 2, 3, 1))
    assert added.shape == (1, 10, 17, 24)
    assert added.amax((2, 3)).allclose(added.amin((2, 3)))  # as the table: alike in every column
    height = added[0, :, 0, 0]
    assert (height.diff() > 0).all()
    torch.testing.assert_close(height, -height.flip(0))


@torch.no_grad()
def test_a_checkpoint_of_another_size_is_interpolated():
    small = timm.create_model("flowformer_cv", img_size=32, **SMALL).eval()
    large = timm.create_model("flowformer_cv", img_size=64, **SMALL).eval()
    state = {**small.state_dict(), "pos_embed": small.stem.pos_embed.flatten(1, 2)}
    del state["stem.pos_embed"]
    large.load_state_dict(zoo.flowformer.checkpoint_filter_fn(state, large))
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(large(image), small(image))


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (32, 33), (97, 61)])
@torch.no_grad()
def test_images_may_have_any_size(size):
    torch.manual_seed(0)
    model = timm.create_model("flowformer_cv", features_only=True, **SMALL).eval()
    maps = model(torch.randn(1, 3, *size))
    for x, reduction in zip(maps, (4, 8, 16, 32), strict=True):
        assert list(x.shape[2:]) == [max(1, math.floor(n / reduction)) for n in size]
        assert x.isfinite().all()
