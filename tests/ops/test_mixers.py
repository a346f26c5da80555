"""Every mixer in the table, on maps of every kind. Nothing in this file knows a mixer."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import nn

from vitarium.ops import MIXERS, OPERATORS, Mixer, build_mixer

MAPS = [(1, 1), (1, 9), (5, 3), (7, 7), (14, 15), (23, 8)]
EXAMPLES = [
    pytest.param(name, example, id=f"{name}-{i}")
    for name, mixer in MIXERS.items()
    for i, example in enumerate(mixer.examples)
]


def _build(name: str, example: dict[str, Any], **kwargs: Any) -> Mixer:
    torch.manual_seed(0)
    arguments = {key: value for key, value in example.items() if key != "dim"}
    return build_mixer((name, arguments), example["dim"], **kwargs)


def test_table() -> None:
    assert MIXERS
    for name, mixer in MIXERS.items():
        assert mixer.name == name
        assert mixer.paper
        assert mixer.examples
        if mixer.operator:
            assert mixer.operator in OPERATORS
        else:
            assert mixer._attention_map is not Mixer._attention_map


@pytest.mark.parametrize("name", MIXERS)
def test_documentation(name: str) -> None:
    """What a reader wants to know: the equation, what it costs, arguments, errors, the source."""
    mixer = MIXERS[name]
    text = inspect.getdoc(mixer)
    assert "out = " in text or "output = " in text or "x = " in text or "score = " in text
    for heading in ("Args:", "Raises:", "Cost"):
        assert heading in text, heading
    assert re.search(r"\d{4}\.\d{5}", mixer.paper), mixer.paper
    missing = inspect.signature(mixer.__init__).parameters.keys() - {"self", "kwargs"}
    missing -= {"device", "dtype", *re.findall(r"\w+", text)}
    assert not missing, f"arguments that are not explained: {missing}"


@pytest.mark.parametrize("size", MAPS, ids=str)
@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_any_map(name: str, example: dict[str, Any], size: tuple[int, int]) -> None:
    mixer = _build(name, example)
    x = torch.randn(2, *size, example["dim"], requires_grad=True)
    y = mixer(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0
    for key, parameter in mixer.named_parameters():
        if any(re.fullmatch(pattern, key) for pattern in mixer.indirect):
            assert parameter.grad is None, key
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    mixer.eval()  # in training, batch normalisation would let images of a batch meet
    y = mixer(x)
    # A map that is a view of an NCHW tensor in channels-last memory, and one that is not.
    channels_first = x.detach().permute(0, 3, 1, 2).contiguous()
    torch.testing.assert_close(mixer(channels_first.permute(0, 2, 3, 1)), y)
    alone = torch.cat([mixer(image[None]) for image in x])
    torch.testing.assert_close(alone, y, msg="images of a batch must not meet")


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_dtypes_devices_and_compile(name: str, example: dict[str, Any]) -> None:
    mixer = _build(name, example)
    x = torch.randn(2, 9, 12, example["dim"])
    state = {key: tensor.clone() for key, tensor in mixer.state_dict().items()}

    def fresh(dtype: torch.dtype) -> Mixer:
        """The mixer as it was: a forward in training may change what it holds."""
        found = _build(name, example, dtype=dtype)
        found.load_state_dict(state)
        return found

    expected = fresh(torch.float64)(x.double())
    torch.testing.assert_close(mixer(x).double(), expected, rtol=1e-4, atol=1e-5)
    # Of routes that are learned in training, small differences make large ones.
    half, wide = (fresh(d).train(not mixer.routed) for d in (torch.bfloat16, torch.float64))
    found, wanted = half(x.bfloat16()), wide(x.double())
    assert found.dtype == torch.bfloat16
    # A few places may differ more: where rounding decides what a token is routed to.
    near = (found.double() - wanted).abs() <= 0.05 + 0.1 * wanted.abs()
    assert near.double().mean() > (0.97 if mixer.routed else 0.999)
    assert _build(name, example, device="meta")(x.to("meta")).shape == x.shape
    torch._dynamo.reset()
    compiled = torch.compile(fresh(torch.float64), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.double()), expected)


@pytest.mark.parametrize("name", MIXERS)
def test_no_images(name: str) -> None:
    for example in MIXERS[name].examples:
        mixer = _build(name, example).eval()
        x = torch.randn(0, 9, 12, example["dim"], requires_grad=True)
        y = mixer(x)
        assert y.shape == x.shape
        y.sum().backward()
        with torch.no_grad():
            assert mixer(x).shape == x.shape


@pytest.mark.parametrize("name", MIXERS)
def test_layers_may_be_adapted_and_watched(name: str, adapted, unheard) -> None:
    """Low-rank adaptation counts wherever a layer's weight is used, and hooks run."""
    example = MIXERS[name].examples[-1]
    mixer = _build(name, example, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours, merged = adapted(mixer)
    for size in ((7, 7), (24, 24)):
        x = torch.randn(2, *size, example["dim"], dtype=torch.float64)
        context = {"context": torch.randn_like(x)} if mixer.cross else {}
        torch.testing.assert_close(ours(x, **context), merged(x, **context))
        with torch.no_grad():
            torch.testing.assert_close(ours(x, **context), merged(x, **context))
        types = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)
        assert not unheard(mixer, lambda x=x: mixer(x), *types)


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_attention_map(name: str, example: dict[str, Any]) -> None:
    mixer = _build(name, example).eval()
    x = torch.randn(2, 11, 16, example["dim"])
    weights = mixer.attention_map(x, query=(10, 3))
    assert weights.shape[0] == 2 and weights.shape[2:] == (11, 16)
    assert weights.isfinite().all()
    assert (weights.flatten(1).amax(1) > 0).all()
    alone = mixer.attention_map(x[1:], query=(10, 3))
    torch.testing.assert_close(alone, weights[1:])
    for query in ((11, 0), (0, -1)):
        with pytest.raises(ValueError, match="is outside the map"):
            mixer.attention_map(x, query)


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_context(name: str, example: dict[str, Any]) -> None:
    """Keys and values of a second map, where the mixer defines it; else a clear refusal."""
    mixer = _build(name, example, dtype=torch.float64).eval()
    x, context = torch.randn(2, 2, 8, 9, example["dim"], dtype=torch.float64)
    if not mixer.cross:
        with pytest.raises(ValueError, match=f"context is not defined for mixer '{name}'"):
            mixer(x, context)
        return
    torch.testing.assert_close(mixer(x, x.clone()), mixer(x))
    assert not torch.allclose(mixer(x, context), mixer(x))
    with pytest.raises(ValueError, match="context has shape"):
        mixer(x, context[..., 1:])


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_bad_maps(name: str, example: dict[str, Any]) -> None:
    mixer = _build(name, example)
    for shape in ((2, 8, 9, example["dim"] + 1), (8, 9, example["dim"]), (2, example["dim"], 8, 9)):
        with pytest.raises(ValueError, match="x has shape"):
            mixer(torch.randn(shape))
    with pytest.raises(ValueError, match="dim=0 must be"):
        build_mixer((name, {k: v for k, v in example.items() if k != "dim"}), 0)


@pytest.mark.parametrize("name", MIXERS)
def test_bad_constructor_arguments_are_named(name: str) -> None:
    """Whatever is put in place of an argument: it works, or the error names the argument."""
    example = MIXERS[name].examples[0]
    signature = inspect.signature(MIXERS[name].__init__)
    for argument in signature.parameters.keys() - {"self", "device", "dtype", "kwargs"}:
        for value in (None, -1, 0, "a", (1, 2, 3), 2.5, True):
            arguments = {**example, argument: value}
            try:
                build_mixer((name, arguments), arguments.pop("dim"), device="meta")
            except (ValueError, TypeError) as error:
                assert argument in str(error), f"{argument}={value!r}: {error}"


def test_specs() -> None:
    with pytest.raises(ValueError, match="mixer 'neighbourhood' is unknown; allowed are"):
        build_mixer("neighbourhood", 32)
    for spec in (7, ("neighborhood", 7), ("neighborhood", {}, {}), ()):
        with pytest.raises(TypeError, match="is neither a name nor"):
            build_mixer(spec, 32)
    with pytest.raises(ValueError, match="mixer 'neighborhood' is already registered"):

        class Again(Mixer, name="neighborhood"):
            pass
