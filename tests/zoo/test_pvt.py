"""The PVT host, with the mixers of Agent-PVT and InLine-PVT."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from vitarium import zoo
from vitarium.zoo.parts import TokenwiseMlp
from vitarium.zoo.pvt import Patches, Stem

FOLDER = Path(__file__).parents[1] / "data" / "parity"
GOLDENS = sorted(FOLDER.glob("*_pvt_*.json.xz"))
ROWS = [
    row
    for name in ("agent_attention", "inline")
    for row in json.loads((FOLDER / f"published_{name}.json").read_text())["classification"]
    if "-PVT-" in row["name"]
]
SIZES = {"T": "tiny", "S": "small", "M": "medium", "L": "large"}
SMALL = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64)}
HOSTED = {"agent_pvt_tiny": SMALL, "inline_pvt_tiny": {**SMALL, "num_heads": (2, 4, 5, 8)}}


def _name(row: dict) -> str:
    """The registered name of a row, for example agent_pvt_medium_256 of "Agent-PVT-M" at 256."""
    family, host, size = row["name"].lower().split("-")
    suffix = "" if row["resolution"] == 224 else f"_{row['resolution']}"
    return f"{family}_{host}_{SIZES[size.upper()]}{suffix}"


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name.split(".")[0])
@torch.no_grad()
def test_official_weights_give_official_outputs(path, parity, tmp_path):
    """In float64, within 1e-6 of the spread: every stage and logits."""
    golden = parity.load(path)
    model = parity.official(golden, tmp_path, path.name.split(".")[0])
    images = parity.image(*golden["input"])
    final, stages = model.forward_intermediates(images, output_fmt="NHWC")
    parity.close_features(stages, golden["features"])
    parity.close_logits(model.forward_head(final), golden)


def test_there_are_goldens_and_rows():
    assert {path.name.split(".")[0] for path in GOLDENS} >= {"agent_pvt_tiny", "inline_pvt_tiny"}
    assert len(ROWS) == 9


@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_size_and_cost_are_the_published_ones(row, parity):
    """The measured parameters exactly; the published figures within 1 % or their rounding."""
    parameters, gflops = parity.cost(_name(row), row["resolution"])
    assert parameters == row["params_measured"]
    if row["name"] != "InLine-PVT-L":  # the official code has 51.2, the paper states 50.2
        assert parameters / 1e6 == pytest.approx(row["params_M"], rel=0.01)
    assert gflops == pytest.approx(row["gflops"], rel=0.01, abs=0.05)
    parity.check_published(_name(row), row)


@pytest.mark.parametrize("name", HOSTED)
@pytest.mark.parametrize("size", [(1, 1), (7, 40), (97, 130), (225, 193)])
@torch.no_grad()
def test_images_of_any_size_give_a_map_per_stride(name, size):
    model = timm.create_model(name, features_only=True, **HOSTED[name]).eval()
    maps = model(torch.randn(2, 3, *size))
    height, width = (max(1, length // 4) for length in size)
    for features, channels in zip(maps, SMALL["embed_dims"], strict=True):
        assert features.shape == (2, channels, height, width)
        assert features.isfinite().all()
        height, width = max(1, height // 2), max(1, width // 2)
    assert model.feature_info.reduction() == [4, 8, 16, 32]


def test_position_embeddings_of_other_maps():
    """Interpolated; the stem's row by row where there are as many patches, as officially."""
    stem, patches = Stem(3, 8, patch_size=4, map_size=6), Patches(3, 8, map_size=6)
    for part in (stem, patches):
        assert torch.equal(part.embedding(6, 6), part.pos_embed)
        table = part.pos_embed.permute(0, 3, 1, 2)
        want = F.interpolate(table, size=(5, 9), mode="bilinear").permute(0, 2, 3, 1)
        torch.testing.assert_close(part.embedding(5, 9), want)
    assert torch.equal(stem.embedding(4, 9).flatten(1, 2), stem.pos_embed.flatten(1, 2))
    assert not torch.allclose(patches.embedding(4, 9).flatten(), patches.pos_embed.flatten())


@torch.no_grad()
def test_more_agents_for_detection_take_the_same_weights():
    """The numbers of agents of the official detectors; those of the tables change nothing."""
    shapes = ((12, 12), (16, 16), (28, 28), (28, 28))
    plain = timm.create_model("agent_pvt_tiny", **SMALL).eval()
    images = torch.randn(1, 3, 96, 160)
    for agents, same in ((((3, 3), (4, 4), (7, 7), (7, 7)), True), (shapes, False)):
        model = timm.create_model("agent_pvt_tiny", downstream_agent_shapes=agents, **SMALL).eval()
        model.load_state_dict(plain.state_dict())
        assert torch.equal(model(images), plain(images)) == same
    assert [stage.blocks[0].mixer.agent_shape for stage in model.stages] == list(shapes)


@torch.no_grad()
def test_stages_may_mix_in_different_ways():
    dense = [("attention", {"num_heads": n}) for n in (5, 8)]
    agents = [("agent_pvt", {"num_heads": 1, "agent_num": 9, "num_patches": 49})] * 2
    model = timm.create_model("agent_pvt_tiny", mixers=[*agents, *dense], **SMALL).eval()
    assert model(torch.randn(1, 3, 64, 80)).isfinite().all()


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name.split(".")[0])
def test_own_and_official_names_and_those_of_detectors_load(path, parity):
    model = timm.create_model(path.name.split(".")[0])
    official = parity.state_dict(parity.load(path)["state_dict"])
    assert zoo.load_checkpoint(model, official).renamed > 100
    own = {key: value.clone() for key, value in model.state_dict().items()}
    assert zoo.load_checkpoint(model, own).renamed == 0
    headless = timm.create_model(path.name.split(".")[0], num_classes=0)
    found = {f"backbone.{key}": official[key] for key in official if not key.startswith("head.")}
    zoo.load_checkpoint(headless, {**found, "neck.weight": torch.zeros(1)})
    for key, value in headless.state_dict().items():
        assert torch.equal(value, own[key]), key


def test_hooks_see_what_layers_gave() -> None:
    """Without gradients hidden tokens are overwritten, but not those that a hook was given."""
    mlp, x = TokenwiseMlp(8, 16).eval(), torch.randn(1, 5, 8)
    seen: list[torch.Tensor] = []
    mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        mlp(x)
        torch.testing.assert_close(seen[0], mlp.fc1(x))
