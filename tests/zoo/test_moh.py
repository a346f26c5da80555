"""MoH-TransNeXt: published figures, heads by choice, and their load-balance losses."""

import json
from pathlib import Path

import pytest
import timm
import torch

from vitarium import zoo
from vitarium.ops.mixture_of_head import HeadRouter

FOLDER = Path(__file__).parents[1] / "data" / "parity"
GOLDENS = sorted(FOLDER.glob("moh_*.json.xz"))
ROWS = json.loads((FOLDER / "published_moh.json").read_text())["classification"]
SMALL = {"depths": (1, 1, 2, 1)}
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row["factory"])


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name.split(".")[0])
@torch.no_grad()
def test_load_balance_losses_are_the_official_ones(path, parity):
    golden = parity.load(path)
    model = timm.create_model(golden["model"], dtype=torch.float64, drop_path_rate=0.0)
    weights = parity.state_dict(golden["state_dict"])
    model.load_state_dict(zoo.moh.checkpoint_filter_fn(weights, model))
    images = parity.image(*golden["input"])
    model.train()(images)
    losses = zoo.moh.load_balance_losses(model)
    want = golden["load_balance_losses"]
    assert [loss.item() for loss in losses] == pytest.approx(want["values"], rel=1e-6)
    assert 0.01 * torch.stack(losses).mean() == pytest.approx(want["training_term"], rel=1e-6)
    model.eval()(images[:1, :, :32, :32])
    assert zoo.moh.load_balance_losses(model) == []


def test_there_are_goldens():
    assert "moh_transnext_small_75" in {path.name.split(".")[0] for path in GOLDENS}


@every_row
def test_heads_and_size_are_the_published_ones(row):
    """Parameters, and the share of all heads that a token uses."""
    model = timm.create_model(row["factory"], device="meta")
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e6 == pytest.approx(row["params_M"], rel=0.01)
    routers = [module for module in model.modules() if isinstance(module, HeadRouter)]
    assert len(routers) == sum(len(stage.blocks) for stage in model.stages)
    used = sum(router.shared_head + router.routed_head for router in routers)
    share = 100 * used / sum(router.num_heads for router in routers)
    assert share == pytest.approx(row["activated_heads_percent"], abs=0.5)


@every_row
def test_configuration_and_figures(row, parity):
    cfg = parity.check_published(
        row["factory"],
        row,
        url=None,
        origin_url=row["checkpoint_url"],  # a page, not a file
        license="apache-2.0",
        paper_ids="arXiv:2410.11842",
        tag="in1k",
    )
    assert "pretrained_cfg_overlay" in cfg.description


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_train_the_routers(checkpointing):
    torch.manual_seed(0)
    model = timm.create_model("moh_transnext_small_75", **SMALL).train()
    model.set_grad_checkpointing(checkpointing)
    assert zoo.moh.load_balance_losses(model) == []
    model(torch.randn(2, 3, 32, 64))
    losses = zoo.moh.load_balance_losses(model)
    assert len(losses) == 3  # of two stages, with two and one block
    torch.stack(losses).mean().backward()
    routers = [module for module in model.modules() if isinstance(module, HeadRouter)]
    assert [router.wg is not None and bool(router.wg.weight.grad.any()) for router in routers] == [
        False, False, True, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (97, 61)])
@torch.no_grad()
def test_images_may_have_any_size(size):
    torch.manual_seed(0)
    model = timm.create_model("moh_transnext_base_50", features_only=True, **SMALL).eval()
    maps = model(torch.randn(1, 3, *size))
    assert all(x.isfinite().all() for x in maps)
    strides = (4, 8, 16, 32)
    assert [x.shape[2:] for x in maps] == [tuple(-(-n // s) for n in size) for s in strides]
