"""Lightning attention, retention and causal Flow-Attention give the official outputs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitarium.ops import (
    SimpleRMSNorm,
    backend,
    build_mixer,
    causal_chunks,
    causal_linear_attention,
    flow_attention_causal,
    lightning_slopes,
)

FOLDER = Path(__file__).parents[1] / "data" / "parity" / "ops"
BACKENDS = ["reference", "torch"]
ROUNDED = 5e-8  # what outputs differ by if exponents are rounded to float32


def _goldens(kind):
    found = sorted(FOLDER.glob(f"{kind}*.json.xz"))
    assert found, kind
    return [pytest.param(path, id=path.name.split(".")[0]) for path in found]


def _inputs(golden):
    for spec in golden["inputs"]:
        values = np.random.Generator(np.random.PCG64(spec["seed"])).standard_normal(spec["shape"])
        yield torch.from_numpy(values * spec.get("scale", 1))


@pytest.mark.parametrize("path", _goldens("lightning_attention"))
def test_lightning_attention(path, parity, monkeypatch):
    """Slopes of two to a power have products with distances that float32 holds; others do not."""
    golden = parity.load(path)
    slopes = golden["constructor"]["slopes"]
    exact = slopes is None or all(math.frexp(slope)[0] == 0.5 for slope in slopes)
    decay = None if slopes is None else [math.exp(-slope) for slope in slopes]
    query, key, value = (tensor.transpose(1, 2) for tensor in _inputs(golden))

    def compare(implementation, tolerance):
        output = causal_linear_attention(query, key, value, decay=decay, backend=implementation)
        parity.close(output.transpose(1, 2), golden, tolerance)

    for implementation in BACKENDS:
        compare(implementation, 1e-9 if exact else ROUNDED)
    if not exact:
        monkeypatch.setattr(causal_chunks, "decay_matrix", _rounded_decay_matrix)
        compare("reference", 1e-9)


def _rounded_decay_matrix(decays, tokens, *, like):
    """As in the code behind the goldens: slope times distance is rounded to float32."""
    place = torch.arange(tokens)
    slopes = -torch.tensor(decays, dtype=torch.float64).log()
    exponents = slopes.float()[:, None, None] * (place[:, None] - place).clamp(min=0)
    return torch.exp(-exponents.double()).tril().to(like.dtype)


@pytest.mark.parametrize("path", _goldens("lightning_slopes"))
def test_slopes(path, parity):
    for heads, want in parity.load(path)["slopes_by_heads"].items():
        assert lightning_slopes(int(heads)) == pytest.approx(want, rel=1e-7)


def _build(name, golden, parity, **kwargs):
    """The mixer with the golden's weights; facts that follow from others are no arguments."""
    arguments = {**golden["constructor"], **kwargs}
    for derived in ("slope_rate", "decay", "angle_rule", "recurrent_chunk_size", "causal"):
        arguments.pop(derived, None)
    mixer = build_mixer((name, arguments), arguments.pop("embed_dim"), dtype=torch.float64)
    mixer.load_state_dict(parity.state_dict(golden["state_dict"]), strict=True)
    return mixer.eval()


@pytest.mark.parametrize("path", _goldens("lightning_tnl_attention"))
@torch.no_grad()
def test_lightning_mixer(path, parity):
    """With the official rounding of exponents; without it, to that rounding."""
    golden = parity.load(path)
    (x,) = _inputs(golden)
    mixer = _build("lightning", golden, parity)
    rates = [-math.log(decay) for decay in mixer.decay]
    assert rates == pytest.approx(golden["constructor"]["slope_rate"], rel=1e-9)
    parity.close(mixer(x[:, None])[:, 0], golden)
    mixer = _build("lightning", golden, parity, float32_exponents=False)
    for implementation in BACKENDS:
        with backend(implementation):
            parity.close(mixer(x[:, None])[:, 0], golden, 2e-8)


@pytest.mark.parametrize("path", _goldens("simple_rms_norm"))
def test_simple_rms_norm(path, parity):
    golden = parity.load(path)
    (x,) = _inputs(golden)
    parity.close(SimpleRMSNorm(**golden["constructor"])(x), golden)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("path", _goldens("retnet"))
@torch.no_grad()
def test_retention_mixer(path, implementation, parity):
    """The official parallel form; without its sums of scores only the epsilon weighs otherwise."""
    golden = parity.load(path)
    (x,) = _inputs(golden)
    mixer = _build("retention", golden, parity, score_norm=True)
    assert [math.log(decay) for decay in mixer.decay] == pytest.approx(
        golden["constructor"]["decay"], rel=1e-9
    )
    with backend(implementation):
        official = mixer(x[:, None])[:, 0]
    parity.close(official, golden)
    linear = _build("retention", golden, parity)(x[:, None])[:, 0]
    eps = golden["constructor"].get("layernorm_eps", 1e-6)
    torch.testing.assert_close(linear, official, rtol=0, atol=1e3 * eps)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("path", _goldens("flow_attention_causal"))
def test_flow_attention(path, implementation, parity):
    golden = parity.load(path)
    state = parity.state_dict(golden["state_dict"])
    heads, eps = golden["constructor"]["n_heads"], golden["constructor"].get("eps", 1e-6)

    def project(name, x):
        return F.linear(x, state[f"{name}_projection.weight"], state[f"{name}_projection.bias"])

    query, key, value = (
        project(name, x).unflatten(-1, (heads, -1))
        for name, x in zip(("query", "key", "value"), _inputs(golden))
    )
    output = flow_attention_causal(query, key, value, eps=eps, backend=implementation)
    parity.close(project("out", output.flatten(-2)), golden)
