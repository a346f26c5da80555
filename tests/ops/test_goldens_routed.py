"""Grouped, routed and re-weighting mixers give the outputs of the official code."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitarium.ops import backend, build_mixer, qkv_heads
from vitarium.ops.catanet import _patches

FOLDER = Path(__file__).parents[1] / "data" / "parity" / "ops"


def _goldens(*kinds):
    paths = (path for kind in kinds for path in sorted(FOLDER.glob(f"{kind}*.json.xz")))
    return [pytest.param(path, id=path.name.split(".")[0]) for path in paths]


GROUPED = _goldens("gqa", "kdgqa", "dgqa")
SUBSPACE = _goldens("ulsam")
GAUSSIAN = _goldens("gaam")
KMEANS = _goldens("routing_kmeans")
AGGREGATION = _goldens("catanet_tab")
PATCHES = _goldens("catanet_lrsa")
SPARSE = _goldens("sparsifiner_attention")
SPARSE_BLOCKS = _goldens("sparsifiner_block")
SPARSE_MODELS = _goldens("sparsifiner_model")


def _draw(*shapes):
    """Standard normal tensors, one after the other from one generator."""
    generator = np.random.Generator(np.random.PCG64(0))
    return [torch.from_numpy(generator.standard_normal(shape)) for shape in shapes]


def _close(found, want, shape=None):
    want = torch.tensor(want, dtype=torch.float64).reshape(shape or found.shape)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("path", GROUPED)
@torch.no_grad()
def test_grouped_query_attention(path, implementation, parity):
    """Key-driven allocation of the batch at hand, and the same frozen."""
    golden = parity.load(path)
    arguments = dict(golden["constructor"])
    arguments.pop("attn_drop", None)  # nothing in evaluation
    if isinstance(arguments.get("num_kv_heads"), str):  # "None -> 4"
        arguments["num_kv_heads"] = None
    kind = {"GQA": None, "KDGQA": "key", "DGQA": arguments.get("kind", "diff")}[golden["op"]]
    name = "grouped_query"
    if kind is not None:
        name = "key_driven_grouped_query"
        arguments |= {"kind": kind, "dynamic": True}
    mixer = build_mixer((name, arguments), arguments.pop("dim"), dtype=torch.float64).eval()
    weights = parity.state_dict(golden["state_dict"])
    if "cache" in weights:
        weights["cache"].zero_()
    mixer.load_state_dict(weights, strict=True)
    (x,) = _draw(golden["input"]["x"]["shape"])
    x = x[:, :, None]
    with backend(implementation):
        _close(mixer(x), golden["output"]["data"])
    if kind is None:
        return
    if "intermediate_cache_after" in golden:
        _close(mixer.cache, golden["intermediate_cache_after"])
        mixer.cache.zero_()
    assert mixer.calibrate(x).tolist() == golden["intermediate_q_allocations"]
    mixer.dynamic = False
    with backend(implementation):
        _close(mixer(x), golden["output"]["data"])


@pytest.mark.parametrize("path", SUBSPACE)
@torch.no_grad()
def test_subspace_attention(path, parity):
    golden = parity.load(path)
    arguments = golden["constructor"]
    mixer = build_mixer(
        ("ulsam", {"num_splits": arguments["num_splits"]}), arguments["nin"], dtype=torch.float64
    )
    mixer.load_state_dict(parity.state_dict(golden["state_dict"]), strict=True)
    (x,) = _draw(golden["input"]["x"]["shape"])
    output = mixer.eval()(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    _close(output, golden["output"]["data"])


@pytest.mark.parametrize("path", GAUSSIAN)
@torch.no_grad()
def test_gaussian_adaptive_attention(path, parity):
    golden = parity.load(path)
    (x,) = _draw(golden["input"]["x"]["shape"])
    name = "gaussian_block" if golden["op"] == "GaussianBlock" else "gaussian_adaptive"
    mixer = build_mixer((name, golden["constructor"]), x.shape[-1], dtype=torch.float64)
    mixer.load_state_dict(parity.state_dict(golden["state_dict"]), strict=True)
    _close(mixer.eval()(x[:, :, None]), golden["output"]["data"])


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("path", KMEANS)
@torch.no_grad()
def test_kmeans_routing(path, implementation, parity):
    """Without projections, which the official module does not have; those of ours are dropped."""
    golden = parity.load(path)
    arguments = dict(golden["constructor"])
    context = arguments.pop("receives_context", False) or None
    arguments.pop("dropout", None)
    shapes = [
        spec["shape"] for names, spec in golden["input"].items() for _ in names.split(",")
    ]  # of q, k, v
    query, key, value = (x.transpose(1, 2) for x in _draw(*shapes))
    dim = arguments["num_heads"] * arguments["head_dim"]
    mixer = build_mixer(("kmeans_routing", arguments), dim, dtype=torch.float64)
    projections = {key: x for key, x in mixer.state_dict().items() if key.startswith("to_")}
    weights = parity.state_dict(golden["state_dict"])
    weights["kmeans.initted"].fill_(1)
    mixer.load_state_dict({**projections, **weights}, strict=True)
    mixer.eval()
    with backend(implementation):
        routes = mixer.route(query, key, context)
        output = mixer.attend(query, key, value, routes)
    _close(output.transpose(1, 2), golden["output"]["out"]["data"])
    times = F.one_hot(routes[0].flatten(2), query.shape[1]).sum(2)
    _close(times.double(), golden["output"]["times_each_query_was_selected"]["data"])
    assert mixer.commitment_loss is None
    mixer.train().route(query, key, context)
    _close(mixer.commitment_loss, golden["aux_loss"])


def _norm(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def _catanet_feed_forward(x, weights, name):
    """The rest of CATANet's layers, on a map `(B, H, W, C)`: what is no mixer."""
    hidden = F.linear(_norm(x, weights, f"{name}.norm"), weights[f"{name}.fn.fc1.weight"])
    hidden = F.gelu(hidden + weights[f"{name}.fn.fc1.bias"])
    kernel = [weights[f"{name}.fn.dwconv.depthwise_conv.0.{part}"] for part in ("weight", "bias")]
    near = F.conv2d(hidden.permute(0, 3, 1, 2), *kernel, padding="same", groups=len(kernel[1]))
    hidden = hidden + F.gelu(near).permute(0, 2, 3, 1)
    hidden = F.linear(hidden, weights[f"{name}.fn.fc2.weight"], weights[f"{name}.fn.fc2.bias"])
    return x + hidden


def _catanet(golden, name, parity, **kwargs):
    """The mixer, the official weights and the map."""
    arguments = {k: v for k, v in golden["constructor"].items() if k != "mlp_dim"} | kwargs
    arguments["num_heads"] = arguments.pop("heads", 1)
    mixer = build_mixer((name, arguments), arguments.pop("dim"), dtype=torch.float64).eval()
    weights = parity.state_dict(golden["state_dict"])
    if "initted" in weights:
        weights["initted"].fill_("initted False" not in golden["notes"])
    mixer.load_state_dict(weights, strict=True)
    (x,) = _draw(golden["input"]["x"]["shape"])
    return mixer, weights, x.permute(0, 2, 3, 1)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("path", AGGREGATION)
@torch.no_grad()
def test_token_aggregation(path, implementation, parity):
    golden = parity.load(path)
    mixer, weights, x = _catanet(golden, "token_aggregation", parity)
    normed = _norm(x, weights, "norm")
    with backend(implementation):
        output = x + mixer(normed)
    output = _catanet_feed_forward(output, weights, "mlp")
    _close(output.permute(0, 3, 1, 2), golden["output"]["data"])


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("path", PATCHES)
@torch.no_grad()
def test_overlapping_patches(path, implementation, parity):
    """The residual passes through the patches, too; it is attention that leaves tokens alone."""
    golden = parity.load(path)
    size = golden["input"]["ps"]
    mixer, weights, x = _catanet(golden, "overlapping_patches", parity, patch_size=size)
    factors = []
    for length in x.shape[1:3]:
        index, factor = _patches(length, min(size, length), x.device)
        factors.append(factor * torch.bincount(index.flatten(), minlength=length))
    with backend(implementation):
        output = mixer(_norm(x, weights, "layer.0.norm"))
    output = output + x * (factors[0][:, None] * factors[1])[..., None]
    output = _catanet_feed_forward(output, weights, "layer.1")
    _close(output.permute(0, 3, 1, 2), golden["output"]["data"])


def _sparsifiner(arguments, cfg, **kwargs):
    """The mixer of an official layer's arguments, and of its configuration as notes tell it."""

    def number(pattern):
        found = re.search(pattern + r"[ =](\d+(?:\.\d+)?(?:e-?\d+)?)", cfg)
        return None if found is None else float(found[1])

    side = math.isqrt(arguments["num_tokens"] - 1)
    square = side**2 == arguments["num_tokens"] - 1
    topk = number("BASIS_COEF(?: top-k|.TOPK)")
    score = None
    if "ATTN_SCORE.USE_TOPK=True" not in cfg and "ATTN_SCORE top-k" not in cfg:
        score = number("ATTN_SCORE.THRESHOLD")
    names = ("num_heads", "attn_keep_rate", "reduce_n_factor", "reduce_c_factor")
    names += ("share_inout_proj", "qkv_bias", "qk_scale")
    pruning = arguments.get("token_pruning_this_layer", False)
    found = {"qkv_bias": False} | {name: arguments[name] for name in names if name in arguments}
    found |= {
        "input_resolution": (side, side) if square else (1, arguments["num_tokens"] - 1),
        "num_prefix_tokens": 1,
        "token_keep_rate": arguments["token_keep_rate"] if pruning else 1.0,
        "basis_threshold": number("BASIS_THRESHOLD") or 0.0,
        "basis_coef_topk": None if topk is None else int(topk),
        "basis_coef_threshold": number("BASIS_COEF.THRESHOLD") or 0.0,
        "attn_score_threshold": score,
        "prune_attn_matrix_row": "PRUNE_ATTN_MATRIX_ROW=True" in cfg,
    }
    return build_mixer(("sparsifiner", found), arguments["dim"], dtype=torch.float64).eval()


def _of(weights, prefix):
    return {k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)}


def _sparsifiner_block(x, weights, mixer, token_mask):
    """A layer around the mixer: what is no mixer is ordinary."""
    mixer.load_state_dict(_of(weights, "attn."), strict=True)

    def norm(name):
        return F.layer_norm(
            x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6
        )

    mixed, token_mask = mixer.mix_tokens(norm("norm1"), token_mask=token_mask)
    x = x + mixed
    hidden = F.gelu(F.linear(norm("norm2"), weights["mlp.fc1.weight"], weights["mlp.fc1.bias"]))
    x = x + F.linear(hidden, weights["mlp.fc2.weight"], weights["mlp.fc2.bias"])
    if token_mask is not None:
        x = x * F.pad(token_mask, (1, 0), value=True)[..., None]
    return x, token_mask


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("path", SPARSE)
@torch.no_grad()
def test_sparsifiner_attention(path, implementation, parity):
    golden = parity.load(path)
    arguments = golden["constructor"]
    mixer = _sparsifiner(arguments, arguments["cfg"])
    mixer.load_state_dict(parity.state_dict(golden["state_dict"]), strict=True)
    (x,) = _draw(golden["input"]["x"]["shape"])
    with backend(implementation):
        output, token_mask = mixer.mix_tokens(x)
    assert (token_mask is None) == ("token_mask" not in golden["output"])
    if token_mask is not None:
        _close(token_mask.double(), golden["output"]["token_mask"]["data"])
    _close(output, golden["output"]["x"]["data"])
    if "approx_attn_first64" in golden["output"]:
        query, key, _ = qkv_heads(mixer.qkv, x, mixer.num_heads)
        coefficients, basis = mixer.predict(query, key, mixer.input_resolution)
        predicted = (coefficients @ basis).flatten()
        _close(predicted[:64], golden["output"]["approx_attn_first64"]["first64"])
        _close(predicted[-64:], golden["output"]["approx_attn_first64"]["last64"])


@pytest.mark.parametrize("path", SPARSE_BLOCKS)
@torch.no_grad()
def test_sparsifiner_block(path, parity):
    golden = parity.load(path)
    arguments = golden["constructor"]
    (x,) = _draw(golden["input"]["x"]["shape"])
    weights = parity.state_dict(golden["state_dict"])
    mixer = _sparsifiner(arguments, arguments["cfg"])
    output, token_mask = _sparsifiner_block(x, weights, mixer, None)
    _close(output, golden["output"]["x"]["data"])
    assert token_mask.flatten().int().tolist() == [
        int(kept) for kept in golden["output"]["token_mask"]["data"]
    ]


@pytest.mark.parametrize("path", SPARSE_MODELS)
@torch.no_grad()
def test_sparsifiner_model(path, parity):
    golden = parity.load(path)
    arguments = golden["constructor"]
    (images,) = _draw(golden["input"]["x"]["shape"])
    weights = parity.state_dict(golden["state_dict"])
    patches = F.conv2d(
        images,
        weights["patch_embed.proj.weight"],
        weights["patch_embed.proj.bias"],
        stride=arguments["patch_size"],
    )
    x = patches.flatten(2).mT
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], 1) + weights["pos_embed"]
    token_mask = None
    for i in range(arguments["depth"]):
        own = {
            **arguments,
            "dim": arguments["embed_dim"],
            "num_tokens": x.shape[1],
            "attn_keep_rate": arguments["attn_keep_rate_list"][i],
            "token_keep_rate": arguments["token_keep_rate_list"][i],
            "token_pruning_this_layer": arguments["token_pruning_loc_indicator"][i],
        }
        mixer = _sparsifiner(own, arguments["cfg"])
        x, token_mask = _sparsifiner_block(x, _of(weights, f"blocks.{i}."), mixer, token_mask)
    x = F.layer_norm(x, x.shape[-1:], weights["norm.weight"], weights["norm.bias"], 1e-6)
    _close(x[:, 1:], golden["output"]["features"]["data"])
    logits = F.linear(x[:, 0], weights["head.weight"], weights["head.bias"])
    _close(logits, golden["output"]["logits"]["data"])


def test_every_kind_has_goldens():
    assert len(SPARSE) >= 3
    assert SPARSE_BLOCKS and SPARSE_MODELS
    assert len(AGGREGATION) >= 3
    assert PATCHES
    assert KMEANS
    assert len(GROUPED) >= 4
    assert SUBSPACE
    assert len(GAUSSIAN) >= 3
