"""Every family keeps timm's model contract. (run_timm_suite.py runs timm's own tests.)"""

import copy
import math

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import create_model
from timm.models._features_fx import FeatureGraphNet
from timm.optim import param_groups_weight_decay
from torch import nn

import vitarium.zoo  # noqa: F401
from vitarium.ops import Mixer

NAT = ("dinat_isotropic_small", "dinat_s_tiny", "nat_mini", "vitrpb_small")
FAMILIES = [
    "agent_cswin_tiny",
    "agent_pvt_tiny",
    "agent_swin_tiny",
    "biformer_tiny",
    "crossformer_pp_small",
    "crossformer_tiny",
    "dinat_isotropic_small",
    "dinat_s_tiny",
    "flowformer_cv",
    "inline_cswin_tiny",
    "inline_pvt_tiny",
    "litv2_small",
    "moh_transnext_small_75",
    "nat_mini",
    "transnext_micro",
    "vitrpb_small",
]
# Families whose patches leave out what does not fill one at the bottom and right of a map.
LEAVES_OUT = {
    "agent_pvt_tiny",
    "crossformer_pp_small",
    "crossformer_tiny",
    "flowformer_cv",
    "inline_pvt_tiny",
}
# Families that do so between stages alone.
MERGING_LEAVES_OUT = {"litv2_small"}
# Families whose stem makes (L + 1) // 4 tokens of L pixels.
OVERLAPPING = {"agent_cswin_tiny", "inline_cswin_tiny"}
# Families with tables of position biases or embeddings, or what stands for them, by how their
# names end.
TRANSNEXT = (
    ".query_embedding",
    ".relative_pos_bias_local",
    ".temperature",
    *(f".cpb_fc{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")),
)
TABLES = {
    "agent_swin_tiny": ".relative_position_bias_table",
    "flowformer_cv": ".pos_embed",
    **dict.fromkeys(NAT, ".rpb"),
    **dict.fromkeys(("moh_transnext_small_75", "transnext_micro"), TRANSNEXT),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def models():
    """Per family one small model, for tests that leave it as it is."""
    torch.manual_seed(0)
    return {name: create_model(name, **_small(name)).eval() for name in FAMILIES}


def _small(name: str) -> dict:
    """Fewer and narrower blocks: the contract does not depend on their number or width."""
    if name in ("dinat_isotropic_small", "vitrpb_small"):
        return {"depth": 3}
    if name in ("flowformer_cv", "transnext_micro"):
        return {"depths": (2, 1, 2, 1), "embed_dim": 24}
    if name == "moh_transnext_small_75":
        return {"depths": (2, 1, 2, 1)}  # its width follows from its numbers of heads
    if name in ("agent_pvt_tiny", "inline_pvt_tiny"):
        return {"depths": (2, 1, 2, 1), "embed_dims": (16, 32, 40, 64)}
    return {"depths": (2, 1, 2, 1), "embed_dim": 32}


def _images(*size: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, *(size or (64, 64)), generator=generator)


# --- construction --------------------------------------------------------------------------------


@every_family
def test_an_unknown_argument_is_refused(name):
    with pytest.raises(TypeError, match="not_an_argument"):
        create_model(name, not_an_argument=1)


@every_family
def test_parameters_are_made_where_and_as_asked(name):
    model = create_model(name, device="meta", dtype=torch.bfloat16, **_small(name))
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.bfloat16}


@every_family
def test_weights_of_a_meta_model_can_be_drawn_later(name):
    torch.manual_seed(0)
    model = create_model(name, device="meta", **_small(name)).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    model.init_weights()
    assert not [n for n, p in model.named_parameters() if not p.isfinite().all()]
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.05)


@every_family
def test_rates_reach_their_layers(name):
    model = create_model(
        name, drop_rate=0.1, proj_drop_rate=0.2, drop_path_rate=0.3, **_small(name)
    )
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert model.head.drop.p == 0.1
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    assert {mixer.proj_drop.p for mixer in mixers} == {0.2}
    assert {block.mlp.drop1.p for block in blocks} == {0.2}
    rates = [
        {module.drop_prob for module in block.modules() if isinstance(module, DropPath)}
        for block in blocks
    ]
    assert rates[0] == set()
    rising = [0.3 * i / (len(blocks) - 1) for i in range(1, len(blocks))]
    assert [rate for (rate,) in rates[1:]] == pytest.approx(rising)


@every_family
def test_images_may_have_other_channels(name):
    model = create_model(name, in_chans=1, **_small(name)).eval()
    assert model.in_chans == 1
    assert model(_images(channels=1)).shape == (2, 1000)


# --- forward -------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("size", [(225, 193), (32, 32), (7, 40)])
@torch.no_grad()
def test_images_may_have_any_size(name, size, models):
    model = models[name]
    images = _images(*size)
    logits = model(images)
    assert logits.shape == (2, 1000)
    assert logits.isfinite().all()
    taps = model.forward_intermediates(images, intermediates_only=True)
    for tap, info in zip(taps, model.feature_info):
        exact = [length / info["reduction"] for length in size]
        if name in LEAVES_OUT:
            expected = [max(1, math.floor(length)) for length in exact]
        elif name in MERGING_LEAVES_OUT:
            tokens = [math.ceil(length / 4) for length in size]
            expected = [max(1, length * 4 // info["reduction"]) for length in tokens]
        elif name in OVERLAPPING:
            expected = [math.ceil((s + 1) // 4 * 4 / info["reduction"]) for s in size]
        else:
            expected = [math.ceil(length) for length in exact]
        assert tap.shape == (2, info["num_chs"], *expected)


@every_family
@torch.no_grad()
def test_channels_last_changes_nothing(name, models):
    model = copy.deepcopy(models[name]).to(memory_format=torch.channels_last)
    images = _images(65, 47)
    logits = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, models[name](images))


@every_family
@torch.no_grad()
def test_bfloat16_is_close_to_float32(name, models):
    logits = copy.deepcopy(models[name]).to(torch.bfloat16)(_images().bfloat16())
    assert logits.dtype == torch.bfloat16
    want = models[name](_images())
    assert (logits - want).abs().max() < 0.1 * want.std()


@every_family
def test_no_images(name, models):
    model = copy.deepcopy(models[name])
    logits = model(_images()[:0])
    assert logits.shape == (0, 1000)
    logits.sum().backward()


@every_family
def test_transforms_of_functions(name, models):
    """Gradients per image by `vmap`, and derivatives in forward mode, as the loop has them."""
    model, images = copy.deepcopy(models[name]).double(), _images(33, 40).double()
    weights = {"head.fc.weight": model.get_classifier().weight.detach()}
    if "head.fc.weight" not in dict(model.named_parameters()):
        weights = {"head.weight": model.get_classifier().weight.detach()}

    def total(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    together = torch.func.vmap(torch.func.grad(total), (None, 0))(weights, images)
    for key, found in together.items():
        alone = torch.stack([torch.func.grad(total)(weights, image)[key] for image in images])
        torch.testing.assert_close(found, alone)
    direction = torch.randn_like(images)
    slope = torch.func.jvp(model, (images,), (direction,))[1]
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (model(images + sign * step * direction) for sign in (1, -1))
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), atol=1e-6, rtol=1e-4)


@every_family
def test_layers_may_be_adapted_and_watched(name, models, adapted, unheard):
    """Low-rank adaptation counts wherever a layer's weight is used, and hooks run."""
    model = copy.deepcopy(models[name]).double()
    ours, merged = adapted(model)
    images = _images().double()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours(images), merged(images))
            types = nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d, nn.GELU
            assert not unheard(model, lambda: model(images), *types)


@every_family
@torch.no_grad()
def test_compiles_to_one_graph(name, models):
    torch._dynamo.reset()
    compiled = torch.compile(models[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(_images()), models[name](_images()))


@every_family
@torch.no_grad()
def test_exports_with_a_fixed_and_a_free_batch(name, models):
    model, images = models[name], _images()
    torch.testing.assert_close(
        torch.export.export(model, (images,)).module()(images), model(images)
    )
    free = torch.export.export(
        model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    three = torch.cat([images, images[:1]])
    torch.testing.assert_close(free.module()(three), model(three))


@every_family
@torch.no_grad()
def test_fx_gives_equal_features(name, models):
    graph = FeatureGraphNet(copy.deepcopy(models[name]), out_indices=(0, 1, 2)).eval()
    want = models[name].forward_intermediates(
        _images(), [0, 1, 2], output_fmt="NHWC", intermediates_only=True
    )
    for have, expected in zip(graph(_images()), want):
        assert torch.equal(have, expected)


@every_family
def test_checkpointing_keeps_outputs_and_gradients(name, models):
    results = []
    for enable in (False, True):
        model = copy.deepcopy(models[name]).train()
        for module in model.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        model.set_grad_checkpointing(enable)
        logits = model(_images())
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    assert all(grad is not None for grad in results[0])
    torch.testing.assert_close(results[0], results[1])


# --- head ----------------------------------------------------------------------------------------


@every_family
def test_a_new_classifier_keeps_pooling_dtype_and_mode(name, models):
    model = copy.deepcopy(models[name]).to(torch.float64).eval().requires_grad_(False)
    model.reset_classifier(7, "max")
    assert model.head.global_pool.pool_type == "max"
    model.reset_classifier(5)
    assert (model.num_classes, model.head.global_pool.pool_type) == (5, "max")
    assert model.get_classifier() is model.head.fc
    assert model.head.fc.weight.dtype == torch.float64
    assert not any(module.training for module in model.modules())
    assert model(_images().double()).shape == (2, 5)
    model.reset_classifier(0)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


@every_family
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
@torch.no_grad()
def test_pooled_features(name, pool, models):
    model = copy.deepcopy(models[name])
    model.reset_classifier(3, pool)
    features = model.forward_head(model.forward_features(_images()), pre_logits=True)
    assert features.shape == (2, model.head_hidden_size)
    assert model(_images()).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(_images()), features)


@every_family
@torch.no_grad()
def test_without_classes_and_pooling_the_map_comes_out(name, models):
    model = create_model(name, num_classes=0, global_pool="", **_small(name)).eval()
    model.load_state_dict({k: v for k, v in models[name].state_dict().items() if "head" not in k})
    assert model.num_classes == 0
    assert torch.equal(model(_images()), models[name].forward_features(_images()))


# --- features ------------------------------------------------------------------------------------


@every_family
@torch.no_grad()
def test_intermediates(name, models):
    model, images = models[name], _images(65, 63)
    final, taps = model.forward_intermediates(images)
    assert torch.equal(final, model.forward_features(images))
    assert len(taps) == len(model.feature_info)
    nhwc = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(a.permute(0, 2, 3, 1), b) for a, b in zip(taps, nhwc))
    early_final, (first,) = model.forward_intermediates(images, [0], stop_early=True)
    assert torch.equal(first, taps[0])
    assert torch.equal(early_final, nhwc[0])
    (normed,) = model.forward_intermediates(images, 1, norm=True, intermediates_only=True)
    assert torch.equal(normed, final.permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        model.forward_intermediates(images, output_fmt="NLC")


@every_family
@torch.no_grad()
def test_features_only_gives_every_stage(name, models):
    images = _images()
    taps = models[name].forward_intermediates(images, intermediates_only=True)
    count = len(taps)
    for indices in [tuple(range(count)), *((i,) for i in range(-count, count))]:
        model = create_model(name, features_only=True, out_indices=indices, **_small(name))
        model.model.load_state_dict(
            {k: v for k, v in models[name].state_dict().items() if k in model.model.state_dict()}
        )
        features = model.eval()(images)
        assert [f.shape[1] for f in features] == model.feature_info.channels()
        assert [64 // f.shape[2] for f in features] == model.feature_info.reduction()
        assert all(torch.equal(f, taps[i]) for f, i in zip(features, indices, strict=True))


@every_family
def test_pruned_models_keep_what_their_stages_need(name, models):
    taps = models[name].forward_intermediates(_images(), intermediates_only=True)
    last = len(taps) - 1
    for i, tap in enumerate(taps):
        model = copy.deepcopy(models[name])
        assert model.prune_intermediate_layers([i], prune_norm=True) == [i]
        assert model.num_features == model.head_hidden_size == tap.shape[1]
        features = model.forward_features(_images())
        assert torch.equal(features.permute(0, 3, 1, 2), tap)
        features.sum().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None]
    model = copy.deepcopy(models[name])
    model.prune_intermediate_layers([last], prune_head=False)
    assert torch.equal(model(_images()), models[name](_images()))


# --- training ------------------------------------------------------------------------------------


@every_family
def test_position_tables_are_not_decayed(name, models):
    model = models[name]
    tables = {n for n, _ in model.named_parameters() if n.endswith(TABLES.get(name, "no table"))}
    assert model.no_weight_decay() == tables
    assert bool(tables) == (name in TABLES)
    if name in NAT:
        assert len(tables) == sum(len(stage.blocks) for stage in model.stages)
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    (free,) = (group["params"] for group in groups if group["weight_decay"] == 0)
    free = {id(parameter) for parameter in free}
    assert all(id(p) in free for n, p in model.named_parameters() if n in tables or p.ndim == 1)


@every_family
def test_parameters_form_groups_by_depth(name, models):
    for coarse in (False, True):
        groups = timm.models.group_parameters(
            models[name], models[name].group_matcher(coarse), reverse=True
        )
        assert set(groups) == {n for n, _ in models[name].named_parameters()}
        assert groups["head.fc.weight"] > groups["stages.2.blocks.0.mlp.fc1.weight"]
        first = groups["stages.0.blocks.0.mlp.fc1.weight"]
        assert groups["stages.2.blocks.0.mlp.fc1.weight"] > first
        assert all(groups[n] < first for n in groups if n.startswith("stem."))
