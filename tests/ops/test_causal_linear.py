"""Causal linear attention: its three forms, long sequences, errors, and its mixers."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vitarium.ops import (
    backend,
    build_mixer,
    causal_linear_attention,
    causal_linear_step,
    flow_attention_causal,
)
from vitarium.ops.causal_chunks import CHUNK

# As the official code rounds exponents, there is no recurrent form.
EXACT = {"float32_exponents": False}
MIXERS = [
    ("retention", {"num_heads": 2}),
    ("lightning", {"num_heads": 3, "norm_type": "simplermsnorm", "num_layers": 2, **EXACT}),
    ("lightning", {"num_heads": 2, "bias": True, **EXACT}),
]


def _steps(step, *tensors, **kwargs):
    """What a step function gives for tokens (the second dimension) one after the other."""
    state, outputs = None, []
    for i in range(tensors[0].shape[1]):
        output, state = step(*(tensor[:, i] for tensor in tensors), state, **kwargs)
        outputs.append(output)
    return torch.stack(outputs, 1)


def _assert_same(found, expected):
    atol = 1e-10 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=atol)


@pytest.mark.parametrize("decay", [None, 0.97, (1, 0.999, 0.5), (0, 1e-300, 1 - 2**-30)], ids=str)
@pytest.mark.parametrize("tokens", [CHUNK - 1, 4 * CHUNK + 7])
def test_parallel_chunkwise_and_recurrent_forms_agree(tokens, decay):
    query, key = torch.randn(2, 2, tokens, 3, 8, dtype=torch.float64)
    value = torch.randn(2, tokens, 3, 12, dtype=torch.float64)
    kwargs = {"decay": decay, "scale": 0.3}
    parallel, chunkwise = (
        causal_linear_attention(query, key, value, **kwargs, backend=name)
        for name in ("reference", "torch")
    )
    _assert_same(chunkwise, parallel)
    _assert_same(_steps(causal_linear_step, query, key, value, **kwargs), parallel)


def test_long_sequences_stay_finite_and_exact():
    """65,536 tokens in float32, where the inverse of a power of any of the decays overflows.

    The parallel form would take 16 GiB a head.
    """
    decay = (1.0, 1 - 2**-12, 0.9, 1e-20, 0.0)
    query, key, value = torch.randn(3, 1, 256, 256, len(decay), 4).unbind()
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = causal_linear_attention(*leaves, decay=decay)
    grads = torch.autograd.grad(output.square().mean(), leaves)
    assert all(tensor.isfinite().all() for tensor in (output, *grads))
    with torch.no_grad():
        exact = causal_linear_attention(*(leaf.double() for leaf in leaves), decay=decay)
    error = (output.double() - exact).abs().amax((0, 1, 2, 4)) / exact.abs().amax((0, 1, 2, 4))
    assert (error < 1e-5).all(), error


def test_half_precision_keeps_sums_in_float32():
    """Where a sum in bfloat16 would stand still."""
    ones = torch.ones(1, 3000, 1, 16, dtype=torch.bfloat16)
    output = causal_linear_attention(ones, ones, ones, scale=1 / 16)
    torch.testing.assert_close(
        output[0, :, 0, 0].float(), torch.arange(3000) + 1.0, rtol=0.01, atol=0
    )


@pytest.mark.parametrize("tokens", [20, 200])
def test_tables_that_calls_share(tokens):
    """What was made in inference mode, or for fake tensors, is of no harm to a later call."""
    decay = 0.123 + tokens / 1e4  # of no other test
    x = torch.randn(1, tokens, 2, 8)
    with FakeTensorMode():
        causal_linear_attention(*torch.empty(3, *x.shape).unbind(), decay=decay)
    with torch.inference_mode():
        expected = causal_linear_attention(x, x, x, decay=decay).clone()
    leaf = x.clone().requires_grad_()
    output = causal_linear_attention(leaf, leaf, leaf, decay=decay)
    output.sum().backward()
    torch.testing.assert_close(output, expected)
    with torch.inference_mode():
        assert torch.equal(causal_linear_attention(x, x, x, decay=decay), expected)


def test_bad_arguments():
    x = torch.randn(2, 3, 4, 2, 8)

    def call(query=x, key=x, value=x, **kwargs):
        return causal_linear_attention(query, key, value, **kwargs)

    for decay in (-0.1, 1.5, (0.5, math.nan)):
        with pytest.raises(ValueError, match=r"decay=.* must hold numbers between 0 and 1"):
            call(decay=decay)
    for decay in ((0.5,), (0.5, 0.5, 0.5)):
        with pytest.raises(ValueError, match=r"decay has . entries; allowed are one number or 2"):
            call(decay=decay)
    for decay in ("0.5", True, (None, 1), torch.ones(2)):
        with pytest.raises(TypeError, match=r"decay=.* must be a number"):
            call(decay=decay)
    with pytest.raises(ValueError, match="query has shape"):
        call(query=x[0, 0])
    with pytest.raises(ValueError, match="key has 8 tokens, query 12"):
        call(key=x[:, 1:], value=x[:, 1:])
    with pytest.raises(ValueError, match="key has 2 heads, which do not divide the query's 3"):
        call(query=x.repeat_interleave(2, -2)[..., :3, :])
    with pytest.raises(ValueError, match="value has shape"):
        call(value=x[..., :1, :])
    with pytest.raises(ValueError, match="key has head_dim 4, query 8"):
        call(key=x[..., :4])
    with pytest.raises(ValueError, match="batch size 1"):
        call(key=x[:1], value=x[:1])
    with pytest.raises(ValueError, match=r"causal_linear_step: state has shape \(2, 2, 8\)"):
        causal_linear_step(x[:, 0, 0], x[:, 0, 0], x[:, 0, 0], x[:, 0, 0])
    with pytest.raises(ValueError, match="query, key and value have shapes"):
        causal_linear_step(x[:, 0], x[:, 0], x[:, 0])
    with pytest.raises(ValueError, match="flow_attention_causal: key has shape"):
        flow_attention_causal(x, x[:, 1:], x[:, 1:])


@pytest.mark.parametrize(("name", "arguments"), MIXERS)
@torch.no_grad()
def test_mixers_have_three_forms(name, arguments):
    torch.manual_seed(0)
    mixer = build_mixer((name, arguments), 24, dtype=torch.float64)
    x = torch.randn(2, 11, 13, 24, dtype=torch.float64)
    chunkwise = mixer(x)
    with backend("reference"):
        _assert_same(chunkwise, mixer(x))
    _assert_same(_steps(mixer.step, x.flatten(1, 2)).view(x.shape), chunkwise)


@pytest.mark.parametrize(
    ("name", "argument"), [("retention", "score_norm"), ("lightning", "float32_exponents")]
)
def test_official_forms_that_are_parallel_have_no_recurrent_form(name, argument):
    mixer = build_mixer((name, {"num_heads": 2, argument: True}), 16)
    with pytest.raises(ValueError, match=f"step is not defined with {argument}=True"):
        mixer.step(torch.randn(1, 16))
    x = torch.randn(1, 3, 4, 16)
    exact = build_mixer((name, {"num_heads": 2}), 16)
    exact.load_state_dict(mixer.state_dict())
    weights, expected = (m.attention_map(x, (1, 2)) for m in (mixer, exact))
    assert weights.shape == expected.shape == (1, 2, 3, 4) and not weights[:, :, 2].any()


@pytest.mark.parametrize("name", ["retention", "lightning", "flow_causal"])
@torch.no_grad()
def test_attention_maps_are_the_weights_of_the_values(name, monkeypatch):
    """Nothing at later positions; with the values they give the heads that the mixer combines."""
    heads = {"n_heads": 2} if name == "flow_causal" else {"num_heads": 2}
    mixer = build_mixer((name, heads), 16, dtype=torch.float64)
    x = torch.randn(1, 4, 5, 16, dtype=torch.float64)
    seen = []
    module = f"vitarium.ops.{name}"

    def attend(query, key, value, **kwargs):
        output = causal_linear_attention(query, key, value, **kwargs)
        seen.append((value.flatten(1, -3), output.flatten(1, -3)))
        return output

    monkeypatch.setattr(f"{module}.causal_linear_attention", attend)
    weights = mixer.attention_map(x, (2, 1)).flatten(2)
    value, output = seen[0]
    assert not weights[:, :, 12:].any()
    found = torch.einsum("bhn,bnhd->bhd", weights, value)
    torch.testing.assert_close(found, output[:, 11])


@torch.no_grad()
def test_flow_attention_needs_no_epsilon():
    """Features are positive."""
    mixers = [
        build_mixer(("flow_causal", {"n_heads": 2, "eps": eps}), 8, dtype=torch.float64)
        for eps in (0.0, 1e-12)
    ]
    mixers[1].load_state_dict(mixers[0].state_dict())
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(*(mixer(x) for mixer in mixers), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="eps=-1 must be at least 0 and finite"):
        build_mixer(("flow_causal", {"n_heads": 2, "eps": -1}), 8)
