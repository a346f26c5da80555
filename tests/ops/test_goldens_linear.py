"""Linear attention's relatives with official weights give the outputs of official code."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitarium.ops import backend, build_mixer, flow_attention
from vitarium.ops.inline_mixers import InLineStripes

FOLDER = Path(__file__).parents[1] / "data" / "parity" / "ops"
INLINE = sorted(FOLDER.glob("inline_attention_*.json.xz"))
FLOW = [
    path for path in sorted(FOLDER.glob("flow_attention*.json.xz")) if "causal" not in path.name
]
FOCUSED = sorted(FOLDER.glob("focused_linear_attention_*.json.xz"))
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "torch"])


def _name(path):
    return path.name.split(".")[0]


def _arguments(golden):
    """The constructor's, without those that have no effect on the official outputs."""
    idle = ("attn_drop", "proj_drop", "qk_scale", "dim_out")
    return {name: x for name, x in golden["constructor"].items() if name not in idle}


def _images(golden, parity):
    size = [int(n) for n in re.findall(r"\d+", golden["inputs"].split("#")[0])][:4]
    batch, height, width, channels = size
    return parity.image(batch, channels, height, width).permute(0, 2, 3, 1)


@IMPLEMENTATIONS
@pytest.mark.parametrize("path", INLINE, ids=_name)
@torch.no_grad()
def test_inline(path, implementation, parity):
    """In float64, to the ten digits that the golden holds; tokens of a map in raster order."""
    golden = parity.load(path)
    form = re.search(r"inline_(\w+)\.py", golden["file"])[1]
    arguments = _arguments(golden)
    images = _images(golden, parity)
    height, width = images.shape[1:3]
    dim = arguments.pop("dim")
    if form == "cswin":
        mixer = InLineStripes(dim, **arguments, dtype=torch.float64)
    else:
        name = "inline_window" if form == "swin" else "inline"
        mixer = build_mixer((name, arguments), dim, dtype=torch.float64)
    mixer.eval().load_state_dict(parity.state_dict(golden["state_dict"]), strict=True)

    with backend(implementation):
        if form == "deit":
            tokens = images.flatten(1, 2)
            side = math.isqrt(tokens.shape[1] - 1)
            output = mixer.mix_tokens(tokens, (side, side))
        elif form == "cswin":
            tokens = images.flatten(1, 2)
            rolled = [tokens.roll(n, 1).unflatten(1, (height, width)) for n in range(3)]
            output = mixer(*rolled, tokens.mean(1)).flatten(1, 2)
        else:
            output = mixer(images).flatten(1, 2)
    parity.close(output, golden)


@IMPLEMENTATIONS
@pytest.mark.parametrize("path", FOCUSED, ids=_name)
@torch.no_grad()
def test_focused(path, implementation, parity):
    golden = parity.load(path)
    arguments = _arguments(golden)
    name = "focused_linear_window" if "window_size" in arguments else "focused_linear"
    mixer = build_mixer((name, arguments), arguments.pop("dim"), dtype=torch.float64).eval()
    mixer.load_state_dict(parity.state_dict(golden["state_dict"]), strict=True)
    with backend(implementation):
        output = mixer(_images(golden, parity)).flatten(1, 2)
    parity.close(output, golden)


def _inputs(golden):
    for spec in golden["inputs"]:
        values = np.random.Generator(np.random.PCG64(spec["seed"])).standard_normal(spec["shape"])
        yield torch.from_numpy(values * spec.get("scale", 1))


def _library(weights, queries, keys, values, heads, eps):
    """Flow-Attention with a projection for each of its three inputs, which no mixer takes."""

    def project(name, x):
        return F.linear(x, weights[f"{name}_projection.weight"], weights[f"{name}_projection.bias"])

    inputs = {"query": queries, "key": keys, "value": values}
    heads = [project(name, x).unflatten(-1, (heads, -1)) for name, x in inputs.items()]
    return project("out", flow_attention(*heads, eps=eps).flatten(-2))


@IMPLEMENTATIONS
@pytest.mark.parametrize("path", FLOW, ids=_name)
@torch.no_grad()
def test_flow(path, implementation, parity):
    golden = parity.load(path)
    weights = parity.state_dict(golden["state_dict"])
    arguments = dict(golden["constructor"])
    with backend(implementation):
        if "Flowformer_CV" in golden["file"]:
            (tokens,) = _inputs(golden)
            mixer = build_mixer(("flow", arguments), arguments.pop("dim"), dtype=torch.float64)
            mixer.eval().load_state_dict(weights, strict=True)
            output = mixer(tokens[:, None]).squeeze(1)
        else:
            output = _library(
                weights, *_inputs(golden), arguments["n_heads"], arguments.get("eps", 1e-6)
            )
    parity.close(output, golden)


@torch.no_grad()
def test_flow_takes_the_library_s_weights(parity):
    """Queries of one map, keys and values of another, in the mixer."""
    shapes = {
        "query_projection": (16, 24),
        "key_projection": (16, 24),
        "value_projection": (16, 24),
    }
    shapes["out_projection"] = (24, 16)
    entries = [(f"{name}.weight", shape, "float") for name, shape in shapes.items()]
    entries += [(f"{name}.bias", shape[:1], "float") for name, shape in shapes.items()]
    weights = parity.state_dict(entries)
    mixer = build_mixer(
        ("flow", {"num_heads": 4, "d_model": 16, "flow_eps": 0.0}), 24, dtype=torch.float64
    )
    mixer.load_state_dict(dict(weights), strict=True)
    maps = parity.image(2, 24, 5, 7).permute(0, 2, 3, 1)
    x, context = maps[:, :, :3], maps
    output = _library(weights, x, context, context, 4, 1e-6)
    torch.testing.assert_close(mixer(x, context), output)


def test_every_form_has_goldens():
    forms = {re.match(r"inline_attention_([a-z]+)", path.name)[1] for path in INLINE}
    assert forms == {"deit", "pvt", "swin", "cswin"}
    assert len(FOCUSED) >= 3
    assert {"flow_attention.json.xz", "flow_attention_cv.json.xz"} <= {path.name for path in FLOW}
