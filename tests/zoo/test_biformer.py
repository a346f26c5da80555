"""BiFormer: official weights, published figures, and regions on maps of any size."""

import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from vitarium import zoo
from vitarium.benchmarks.memory import peak_growth
from vitarium.ops import Mixer
from vitarium.zoo.parts import Block

FOLDER = Path(__file__).parents[1] / "data" / "parity"
GOLDENS = sorted(FOLDER.glob("biformer_*.json.xz"))
ROWS = json.loads((FOLDER / "published_biformer.json").read_text())["classification"]
SIZES = {"t": "tiny", "s": "small", "b": "base"}
FEATURE_NORM = partial(nn.LayerNorm, eps=1e-6)  # of the official dense-prediction backbones


def _name(row: dict) -> str:
    """The registered name of a row, for example biformer_stl_nchw of "BiFormer-STL-nchw"."""
    first, *rest = row["name"].lower().split("-")
    return "_".join([first, *(SIZES.get(part, part) for part in rest)])


every_row = pytest.mark.parametrize("row", ROWS, ids=_name)


# --- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name.split(".")[0])
@torch.no_grad()
def test_official_weights_give_official_outputs(path, parity, tmp_path):
    """In float64, within 1e-6 of the spread: every stage, and logits where there is a head."""
    golden = parity.load(path)
    is_dense = "logits" not in golden
    features = {"features_only": True, "feature_norm": FEATURE_NORM} if is_dense else {}
    model = parity.official(golden, tmp_path, **features)
    images = parity.image(*golden["input"])
    maps = model(images) if is_dense else model.forward_intermediates(images)[1]
    computed = {f"{'extra_norms' if is_dense else 'stages'}.{i}": x for i, x in enumerate(maps)}
    if not is_dense:
        computed["norm"] = model.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        computed["downsample_layers.0"] = model.stem(images).permute(0, 3, 1, 2)
    listed = [want for want in golden["features"] if want["name"] in computed]
    assert len(listed) >= 4
    parity.close_features([computed[want["name"]] for want in listed], listed)
    if not is_dense:
        parity.close_logits(model(images), golden)


def test_there_are_goldens_of_every_layout():
    names = {path.name.split(".")[0] for path in GOLDENS}
    assert {"biformer_tiny", "biformer_stl", "biformer_stl_nchw"} <= names
    assert "biformer_tiny_dense_97x130" in names


def test_a_detectors_checkpoint_is_its_backbones():
    model = timm.create_model("biformer_tiny", embed_dim=32, depths=(1, 1, 1, 1))
    official = {"backbone.downsample_layers.0.3.weight": torch.ones(1), "neck.0": torch.ones(1)}
    assert list(zoo.biformer.checkpoint_filter_fn(official, model)) == ["stem.conv2.weight"]


def test_our_names_pass():
    for name in ("biformer_tiny", "biformer_stl", "biformer_stl_nchw"):
        model = timm.create_model(name, embed_dim=32, depths=(1, 1, 1, 1), device="meta")
        ours = model.state_dict()
        assert set(zoo.biformer.checkpoint_filter_fn(ours, model)) == set(ours)


# --- published figures ---------------------------------------------------------------------------


@every_row
def test_size_and_cost_are_the_published_ones(row, parity):
    parameters, gflops = parity.cost(_name(row), row["resolution"])
    assert parameters == row["params_measured"]
    assert parameters / 1e6 == pytest.approx(row["params_M"], rel=0.01)
    assert gflops == pytest.approx(row["gflops"], rel=0.01)


@every_row
def test_configuration_and_figures(row, parity):
    parity.check_published(
        _name(row),
        row,
        url=None,
        origin_url="/".join((row["checkpoint_url"], "root", "content")),  # it answers no more
        license="mit",
        paper_ids=f"arXiv:{row['paper']}",
        tag="in1k",
    )


# --- what is special of the family ---------------------------------------------------------------


def test_regions_can_be_those_of_detectors():
    model = timm.create_model("biformer_small", device="meta", n_win=16, features_only=True)
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    assert [(m.n_win, m.topk) for m in mixers if m.routed] == (
        [((16, 16), 1)] * 4 + [((16, 16), 4)] * 4 + [((16, 16), 16)] * 18
    )
    assert [m.num_heads for m in mixers if not m.routed] == [8] * 4


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
@pytest.mark.parametrize("size", [(1, 1), (5, 300), (32, 33), (97, 61)])
@torch.no_grad()
def test_images_may_have_any_size(name, size):
    torch.manual_seed(0)
    model = timm.create_model(name, embed_dim=32, depths=(1, 1, 1, 1), features_only=True).eval()
    maps = model(torch.randn(1, 3, *size))
    assert len(maps) == 4
    assert all(x.numel() and x.isfinite().all() for x in maps)
    if name == "biformer_tiny":  # convolutions that overlap, and see everything
        assert [x.shape[2] for x in maps] == [-(-size[0] // r) for r in (4, 8, 16, 32)]
    else:  # the patches of Swin's layout leave out what does not fill one
        assert [x.shape[2] for x in maps] == [max(1, size[0] // r) for r in (4, 8, 16, 32)]


# --- what blocks keep for the backward pass ------------------------------------------------------


class _PlainPositionBlock(Block):
    """The block as the paper writes it, which keeps everything."""

    def __init__(self, dim, mixer, **kwargs):
        super().__init__(dim, mixer, **kwargs)
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x):
        return super().forward(x + self.pos_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def _trained(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Outputs and gradients of a training step with random numbers that are always the same."""
    torch.manual_seed(3)
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # its place among the random numbers differs
    output = model.train()(images)
    output.square().sum().backward()
    return [output, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_recomputed_blocks_have_the_gradients_of_the_plain_ones(rate):
    small = {"embed_dim": 32, "depths": (1, 1, 1, 1), "proj_drop_rate": rate, "num_classes": 5}
    lean = timm.create_model("biformer_tiny", **small).double()
    plain = timm.create_model("biformer_tiny", blocks=(_PlainPositionBlock,) * 2, **small).double()
    plain.load_state_dict(lean.state_dict())
    images = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    torch.testing.assert_close(_trained(lean, images), _trained(plain, images))


def test_recomputed_blocks_keep_less():
    sizes = []
    for blocks in ({}, {"blocks": (_PlainPositionBlock,) * 2}):
        model = timm.create_model("biformer_tiny", depths=(1, 1, 1, 1), embed_dim=32, **blocks)
        images = torch.randn(1, 3, 320, 320)
        model(images).sum().backward()  # gradients are there already: they are not counted
        sizes.append(peak_growth(lambda model=model, images=images: model(images).sum().backward()))
    assert sizes[0] < 0.7 * sizes[1]


def test_training_compiles_to_one_graph():
    torch._dynamo.reset()
    model = timm.create_model("biformer_tiny", embed_dim=32, depths=(1, 1, 1, 1), num_classes=5)
    images = torch.randn(2, 3, 64, 48)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = [t.clone() for t in _trained(model, images)]
    model.zero_grad(set_to_none=True)
    torch.testing.assert_close(_trained(compiled, images), eager)
