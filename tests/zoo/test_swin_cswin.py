"""The Swin and CSWin hosts, with the mixers of the Agent attention and InLine papers."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from vitarium import zoo
from vitarium.zoo.swin import Windows

FOLDER = Path(__file__).parents[1] / "data" / "parity"
GOLDENS = sorted(
    path for path in FOLDER.glob("*swin_*.json.xz") if path.name.startswith(("agent_", "inline_"))
)
ROWS = [
    row
    for name in ("agent_attention", "inline")
    for row in json.loads((FOLDER / f"published_{name}.json").read_text())["classification"]
    if "swin" in row["name"].lower()
]
SIZES = {"t": "tiny", "s": "small", "b": "base"}
# Parameters in millions that the official code has; the repositories state 21, 30, 25, 43 and 96.
PARAMETERS = {
    "Agent-CSwin-T": 20.5,
    "InLine-Swin-T": 29.2,
    "InLine-CSwin-T": 20.6,
    "InLine-CSwin-S": 33.0,
    "InLine-CSwin-B": 73.4,
}
SMALL = {"depths": (2, 1, 2, 1), "embed_dim": 32}
HOSTED = ["agent_swin_tiny", "agent_cswin_tiny", "inline_swin_tiny", "inline_cswin_tiny"]
every_host = pytest.mark.parametrize("name", HOSTED)


def _name(row: dict) -> str:
    """The registered name of a row, for example agent_swin_small_288 of "Agent-Swin-S" at 288."""
    family, host, size = row["name"].lower().split("-")
    suffix = "" if row["resolution"] == 224 else f"_{row['resolution']}"
    return f"{family}_{host}_{SIZES[size]}{suffix}"


def _file_stem(path: Path) -> str:
    return path.name.split(".")[0]


@pytest.mark.parametrize("path", GOLDENS, ids=_file_stem)
@torch.no_grad()
def test_official_weights_give_official_outputs(path, parity, tmp_path):
    """In float64, within 1e-6 of the spread: every stage, norms and logits."""
    golden = parity.load(path)
    is_dense = "logits" not in golden
    model = parity.official(
        golden,
        tmp_path,
        golden["model"] if "arguments" in golden else _file_stem(path),
        **({"features_only": True, "feature_norm": nn.LayerNorm} if is_dense else {}),
    )
    images = parity.image(*golden["input"])
    if is_dense:
        computed = model(images)
    else:
        final, maps = model.forward_intermediates(images, output_fmt="NHWC")
        computed = [*maps, final]
        parity.close_logits(model.forward_head(final), golden)
    listed = golden["features"]
    assert len(listed) >= 4  # some have no last norm
    parity.close_features(computed[: len(listed)], listed)


def test_there_are_goldens_and_rows():
    names = {_file_stem(path) for path in GOLDENS}
    assert names >= {*HOSTED, "agent_swin_tiny_dense_97x131", "agent_swin_tiny_224x448"}
    assert len(ROWS) == 15


@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_size_and_cost_are_the_published_ones(row, parity):
    """The measured parameters exactly; the published figures within 1 %, but for `PARAMETERS`."""
    parameters, gflops = parity.cost(_name(row), row["resolution"])
    assert parameters == row["params_measured"]
    stated = PARAMETERS.get(row["name"], row["params_M"])
    assert parameters / 1e6 == pytest.approx(stated, rel=0.01)
    assert gflops == pytest.approx(row["gflops"], rel=0.01)


@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_configuration_and_figures(row, parity):
    # The official evaluation crops, unless its configuration has "CROP: False".
    whole = _name(row) in ("agent_swin_small_288", "agent_swin_base_384")
    parity.check_published(
        _name(row),
        row,
        url=None,
        origin_url=row["checkpoint_url"],
        license="none stated",
        paper_ids=f"arXiv:{row['paper']}",
        tag="in1k",
        crop_mode="squash",
        crop_pct=1.0 if whole else 0.875,
    )


@pytest.mark.parametrize("name", ["inline_swin_base_384", "inline_cswin_base_384"])
def test_models_without_weights(name):
    model = timm.create_model(name, device="meta")
    assert zoo.published(name) is None
    assert model.pretrained_cfg["description"].startswith("No weights are published.")
    assert model.pretrained_cfg["input_size"] == (3, 384, 384)


@every_host
@torch.no_grad()
def test_images_of_any_size_give_a_map_per_stride(name):
    model = timm.create_model(name, features_only=True, **SMALL).eval()
    stem = (lambda side: max(1, (side + 1) // 4)) if "cswin" in name else (lambda s: -(-s // 4))
    for size in ((1, 1), (2, 40), (97, 130), (225, 32)):
        maps = model(torch.randn(1, 3, *size))
        first = [stem(side) for side in size]
        for i, features in enumerate(maps):
            expected = [math.ceil(side / 2**i) for side in first]
            assert features.shape == (1, 32 * 2**i, *expected)
            assert features.isfinite().all()
    assert model.feature_info.reduction() == [4, 8, 16, 32]


@every_host
def test_own_and_official_names_and_those_of_detectors_load(name, parity):
    model = timm.create_model(name)
    official = parity.state_dict(parity.load(FOLDER / f"{name}.json.xz")["state_dict"])
    assert zoo.load_checkpoint(model, official).renamed > 100
    own = {key: value.clone() for key, value in model.state_dict().items()}
    assert zoo.load_checkpoint(model, own).renamed == 0
    if "cswin" not in name:
        detector = {f"backbone.{key}": value for key, value in official.items()}
        assert zoo.load_checkpoint(model, detector).renamed > 100


def test_blocks_of_a_stage_have_the_official_mixers():
    model = timm.create_model("agent_swin_base_384", device="meta")
    names = [[block.mixer.name for block in stage.blocks] for stage in model.stages]
    assert names == [["agent"] * 2, ["agent"] * 2, ["agent"] * 2 + ["window"] * 16, ["window"] * 2]
    windows = [
        (block.mixer.window_size, block.mixer.shift_size)
        for stage in model.stages[2:]
        for block in stage.blocks
        if block.mixer.name == "window"
    ]
    # An eighth of 96; a map of 12 x 12 is one window, which is not shifted.
    assert windows == [((12, 12), (0, 0)), ((12, 12), (6, 6))] * 8 + [((12, 12), (0, 0))] * 2
    model = timm.create_model("inline_cswin_base_384", device="meta")
    mixers = [stage.blocks[0].mixer for stage in model.stages]
    assert [mixer.name for mixer in mixers] == ["inline_cross_shaped"] * 2 + ["cross_shaped"] * 2
    assert [len(mixer.attns) for mixer in mixers] == [1, 1, 2, 1]
    assert [mixer.attns[0].split_size for mixer in mixers] == [96, 48, 12, 12]


def test_windows_are_clipped_to_the_map_they_are_made_for():
    assert Windows.of_block(1, 0, 2, (14, 28), 7) == Windows(0, 2, (14, 28), 7, 3)
    assert Windows.of_block(0, 0, 2, (14, 28), 7).shift_size == 0
    clipped = Windows.of_block(1, 0, 2, (14, 28), 14)
    assert (clipped.window_size, clipped.shift_size, clipped.whole) == (14, 0, False)
    assert Windows.of_block(1, 0, 2, (14, 14), 20).whole


@torch.no_grad()
def test_small_maps_are_shifted_for_dense_prediction_alone():
    """The official code for classification does not shift a map of one window."""
    model = timm.create_model("agent_swin_tiny", downstream_agent_shapes=(9, 12, 14, 7)).eval()
    plain = timm.create_model("agent_swin_tiny")
    mixers = [m.stages[3].blocks[1].mixer for m in (model, plain)]
    assert [(m.shift_size, m.always_partition) for m in mixers] == [((3, 3), True), ((0, 0), False)]
    assert mixers[0].layout(3, 5).after == (4, 2)
    assert mixers[1].layout(3, 5).after == (0, 0)
    assert [stage.blocks[0].mixer.agent_shape for stage in model.stages[:3]] == [
        (9, 9),
        (12, 12),
        (14, 14),
    ]


@torch.no_grad()
def test_inline_cswin_makes_its_weights_of_the_mean_before_the_norm():
    block = timm.create_model("inline_cswin_tiny", **SMALL).stages[0].blocks[0].eval()
    x = torch.randn(2, 5, 7, 32)
    normalized = block.norm1(x)
    mixed = block.mixer.mix(normalized, mean=x.mean((1, 2)))
    assert not torch.allclose(mixed, block.mixer(normalized), atol=1e-4)
    expected = x + mixed
    torch.testing.assert_close(block(x), expected + block.mlp(block.norm2(expected)))
