"""Grouped, routed and re-weighting mixers give the outputs of the official code."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitarium.ops import backend, build_mixer
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
    (names,) = golden["input"]
    shape = golden["input"][names]["shape"]
    query, key, value = (x.transpose(1, 2) for x in _draw(*[shape] * 3))
    dim = arguments["num_heads"] * arguments["head_dim"]
    arguments.pop("receives_context", None)
    mixer = build_mixer(("kmeans_routing", arguments), dim, dtype=torch.float64)
    projections = {key: x for key, x in mixer.state_dict().items() if key.startswith("to_")}
    weights = parity.state_dict(golden["state_dict"])
    weights["kmeans.initted"].fill_(1)
    mixer.load_state_dict({**projections, **weights}, strict=True)
    mixer.eval()
    with backend(implementation):
        routes = mixer.route(query, key)
        output = mixer.attend(query, key, value, routes)
    _close(output.transpose(1, 2), golden["output"]["out"]["data"])
    times = torch.nn.functional.one_hot(routes[0].flatten(2), shape[2]).sum(2)
    _close(times.double(), golden["output"]["times_each_query_was_selected"]["data"])
    assert mixer.commitment_loss is None
    mixer.train().route(query, key)
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


def test_every_kind_has_goldens():
    assert len(AGGREGATION) >= 3
    assert PATCHES
    assert KMEANS
    assert len(GROUPED) >= 4
    assert SUBSPACE
    assert len(GAUSSIAN) >= 3
