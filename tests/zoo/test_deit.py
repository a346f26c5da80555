"""The DeiT host, with the mixers of Agent-DeiT and InLine-DeiT."""

import copy
import json
import math
from pathlib import Path

import pytest
import timm
import torch
from timm.models._features_fx import FeatureGraphNet
from torch import nn

import vitarium.zoo  # noqa: F401

FOLDER = Path(__file__).parents[1] / "data" / "parity"
GOLDENS = sorted(FOLDER.glob("*_deit_*.json.xz"))
ROWS = [
    row
    for name in ("agent_attention", "inline")
    for row in json.loads((FOLDER / f"published_{name}.json").read_text())["classification"]
    if "-DeiT-" in row["name"]
]
SIZES = {"T": "tiny", "S": "small", "B": "base"}
# Agent attention and then softmax attention, as in the base model.
SMALL = {
    "agent_deit_base": {"embed_dim": 32, "num_heads": 2, "depth": 3, "agent_depth": 2},
    "inline_deit_tiny": {"embed_dim": 32, "num_heads": 2, "depth": 3},
}
every_host = pytest.mark.parametrize("name", SMALL)


def _name(row: dict) -> str:
    """The registered name of a row; InLine-DeiT has one resolution per size."""
    family, host, size = row["name"].lower().split("-")
    extra = row["resolution"] != 224 and family == "agent"
    return f"{family}_{host}_{SIZES[size.upper()]}" + (f"_{row['resolution']}" if extra else "")


def _images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *(size or (64, 48)), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def models():
    """Per host one small model, for tests that leave it as it is."""
    torch.manual_seed(0)
    return {name: timm.create_model(name, **SMALL[name]).eval() for name in SMALL}


# --- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name.split(".")[0])
@torch.no_grad()
def test_official_weights_give_official_outputs(path, parity, tmp_path):
    """In float64, within 1e-6 of the spread: patches, some blocks and logits."""
    golden = parity.load(path)
    model = parity.official(golden, tmp_path, path.name.split(".")[0])
    images = parity.image(*golden["input"])
    final, taps = model.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True)
    computed = {f"blocks.{i}": torch.cat([b, a], 1) for i, (a, b) in enumerate(taps)}
    computed["patch_embed"] = model.patch_embed(images).flatten(1, 2)
    listed = golden["features"]
    parity.close_features([computed[want["name"]] for want in listed], listed)
    parity.close_logits(model.forward_head(final), golden)


def test_there_are_goldens_and_rows():
    names = {path.name.split(".")[0] for path in GOLDENS}
    assert names >= {"agent_deit_tiny", "inline_deit_tiny"}
    assert len(ROWS) == 7


@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_size_and_cost_are_the_published_ones(row, parity):
    """The measured parameters exactly; the published figures within 1 % or their rounding."""
    parameters, gflops = parity.cost(_name(row), row["resolution"])
    assert parameters == row["params_measured"]
    assert parameters / 1e6 == pytest.approx(row["params_M"], rel=0.01)
    assert gflops == pytest.approx(row["gflops"], rel=0.01, abs=0.05)
    parity.check_published(_name(row), row)


def test_the_base_model_attends_densely_after_four_blocks():
    model = timm.create_model("agent_deit_base", device="meta")
    assert [block.mixer.name for block in model.blocks] == ["agent"] * 4 + ["attention"] * 8
    assert model.blocks[3].mixer.agent_num == 81


# --- contract ------------------------------------------------------------------------------------


@every_host
def test_an_unknown_argument_is_refused(name):
    for argument in ("not_an_argument", "qk_norm"):  # timm has one that mixers decide on
        with pytest.raises(TypeError, match=argument):
            timm.create_model(name, **{argument: True})


@every_host
def test_parameters_are_made_where_and_as_asked(name):
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16, **SMALL[name])
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}
    assert {t.dtype for t in tensors} == {torch.bfloat16}


@every_host
def test_weights_of_a_meta_model_can_be_drawn_later(name):
    torch.manual_seed(0)
    model = timm.create_model(name, device="meta", **SMALL[name]).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    model.init_weights()
    assert not [n for n, p in model.named_parameters() if not p.isfinite().all()]
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)


@every_host
def test_rates_reach_their_layers(name):
    rates = {"drop_rate": 0.1, "proj_drop_rate": 0.2, "drop_path_rate": 0.3}
    model = timm.create_model(name, **rates, **SMALL[name])
    assert model.head_drop.p == 0.1
    assert {block.mixer.proj_drop.p for block in model.blocks} == {0.2}
    assert {block.mlp.drop1.p for block in model.blocks} == {0.2}
    assert isinstance(model.blocks[0].drop_path1, nn.Identity)
    found = [block.drop_path1.drop_prob for block in model.blocks[1:]]
    assert found == pytest.approx([0.15, 0.3])


@every_host
@pytest.mark.parametrize("size", [(1, 1), (225, 193), (7, 40), (224, 224)])
@torch.no_grad()
def test_images_may_have_any_size(name, size, models):
    model = models[name]
    assert model(_images(*size)).isfinite().all()
    taps = model.forward_intermediates(_images(*size), intermediates_only=True)
    assert len(taps) == 3
    for tap in taps:
        assert tap.shape == (2, 32, *(math.ceil(length / 16) for length in size))


@every_host
@torch.no_grad()
def test_tokens_know_their_place(name, models):
    model = models[name]
    x, size = model._embedded(_images(32, 128))
    assert (x.shape, size) == ((2, 17, 32), (2, 8))
    once, other = (model.blocks[0](x, shape) for shape in (size, (4, 4)))
    assert (once - other).abs().max() > 1e-3
    taps = model.forward_intermediates(_images(32, 128), [0], output_fmt="NLC", stop_early=True)
    assert torch.equal(taps[1][0], once[:, 1:])


@every_host
@torch.no_grad()
def test_compiles_exports_and_traces(name, models):
    model, images = models[name], _images()
    want = model(images)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), want)
    free = torch.export.export(
        model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    three = torch.cat([images, images[:1]])
    torch.testing.assert_close(free.module()(three), model(three))
    graph = FeatureGraphNet(copy.deepcopy(model), out_indices=(0, 2)).eval()
    taps = model.forward_intermediates(
        images, [0, 2], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    for have, (tokens, prefix) in zip(graph(images), taps, strict=True):
        assert torch.equal(have, torch.cat([prefix, tokens], 1))


@every_host
@torch.no_grad()
def test_formats_and_half_precision(name, models):
    model, images = models[name], _images()
    want = model(images)
    nhwc = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(nhwc(images.to(memory_format=torch.channels_last)), want)
    half = copy.deepcopy(model).to(torch.bfloat16)(images.bfloat16())
    assert (half - want).abs().max() < 0.1 * want.std()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(images) - want).abs().max() < 0.1 * want.std()


@every_host
def test_checkpointing_keeps_outputs_and_gradients(name, models):
    results = []
    for enable in (False, True):
        model = copy.deepcopy(models[name])  # in evaluation: without stochastic depth
        model.set_grad_checkpointing(enable)
        logits = model(_images())
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    assert all(grad is not None for grad in results[0])
    torch.testing.assert_close(results[0], results[1])


@every_host
@torch.no_grad()
def test_features(name, models):
    model, images = models[name], _images(65, 63)
    final, taps = model.forward_intermediates(images, norm=True)
    assert torch.equal(final, model.forward_features(images))
    assert torch.equal(taps[-1].flatten(2).transpose(1, 2), final[:, 1:])
    assert torch.equal(model.forward_head(final), model(images))
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")
    features = timm.create_model(name, features_only=True, out_indices=(0, 2), **SMALL[name])
    features.model.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in features.model.state_dict()}
    )
    taps = model.forward_intermediates(images, intermediates_only=True)
    for have, want in zip(features.eval()(images), (taps[0], taps[2]), strict=True):
        assert torch.equal(have, want)
    assert features.feature_info.reduction() == [16, 16]
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([1]) == [1]
    assert torch.equal(pruned.forward_intermediates(images, 1, intermediates_only=True)[0], taps[1])


@every_host
@pytest.mark.parametrize("pool", ["token", "avg"])
@torch.no_grad()
def test_a_new_classifier(name, pool, models):
    model = copy.deepcopy(models[name])
    model.reset_classifier(5, pool)
    assert model(_images()).shape == (2, 5)
    model.reset_classifier(0)
    assert model(_images()).shape == (2, model.num_features)


@every_host
def test_parameters_form_groups_by_depth(name, models):
    model = models[name]
    assert {"pos_embed", "cls_token"} <= model.no_weight_decay()
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()}
    assert groups["head.weight"] > groups["blocks.1.mixer.proj.weight"] > groups["pos_embed"]


@torch.no_grad()
def test_weights_of_another_image_size(tmp_path):
    """The position embedding is interpolated when it is loaded; the mixers' biases when used."""
    small = timm.create_model("inline_deit_tiny", img_size=64, **SMALL["inline_deit_tiny"]).eval()
    file = tmp_path / "small.pth"
    torch.save(small.state_dict(), file)
    large = timm.create_model(
        "inline_deit_tiny",
        img_size=96,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file)},
        **SMALL["inline_deit_tiny"],
    ).eval()
    assert large.pos_embed.shape == (1, 37, 32)
    images = _images(96, 96)
    torch.testing.assert_close(large(images), small(images))
    small.set_input_size((96, 96))
    assert torch.equal(large(images), small(images))
