"""Linear layers by oneDNN: PyTorch's results, gradients and behaviour."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitarium.ops import projection
from vitarium.ops.projection import Linear, gelu_linear, linear

needs_onednn = pytest.mark.skipif(not projection._ONEDNN, reason="MKL is as fast here, or absent")


@pytest.fixture(autouse=True)
def _small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "WORTH", 0)


def _drawn(shape: tuple[int, ...], out_features: int, bias: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, (out_features, shape[-1])] + [(out_features,)] * bias
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def _with_gradients(function, tensors: list[Tensor]) -> list[Tensor]:
    output = function(*tensors)
    grad = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, tensors, grad)]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=0, max_size=3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
)
def test_errs_at_most_twice_as_much_as_pytorch(
    places: list[int], channels: int, out_features: int, bias: bool
) -> None:
    tensors = _drawn((*places, channels), out_features, bias)
    exact = _with_gradients(F.linear, [t.detach().double().requires_grad_() for t in tensors])
    plain = _with_gradients(F.linear, tensors)
    for have, want, other in zip(_with_gradients(linear, tensors), exact, plain, strict=True):
        assert have.dtype == torch.float32 and have.shape == want.shape
        assert (have - want).abs().max() <= 2 * (other - want).abs().max() + 1e-5


@needs_onednn
def test_products_are_onednn_s() -> None:
    layer, x = Linear(16, 8), torch.randn(3, 5, 16)
    with torch.profiler.profile() as profile:
        layer(x).sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] == 1  # x needs no gradient
    with torch.profiler.profile() as profile, torch.inference_mode():
        layer(x)
    assert "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("change", ["permuted", "sliced", "expanded"])
def test_takes_any_strides(change: str) -> None:
    x = torch.randn(4, 6, 5, 6)
    x = {
        "permuted": lambda: x.permute(0, 2, 3, 1),
        "sliced": lambda: x[:, ::2, :, 1:],
        "expanded": lambda: x[:, :1].expand(4, 6, 5, 6),
    }[change]()
    x = x.detach().requires_grad_()
    weight = torch.randn(x.shape[-1], 7).t().requires_grad_()
    for have, want in zip(
        _with_gradients(linear, [x, weight]), _with_gradients(F.linear, [x, weight])
    ):
        torch.testing.assert_close(have, want)


def _plain_gelu_linear(x: Tensor, *parameters: Tensor) -> Tensor:
    return F.linear(F.gelu(x), *parameters)


def test_gelu_is_computed_again() -> None:
    tensors = _drawn((3, 4, 5), 6, True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gelu_linear(*tensors)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in tensors[:2]}
    plain = _with_gradients(_plain_gelu_linear, tensors)
    for have, want in zip(_with_gradients(gelu_linear, tensors), plain, strict=True):
        torch.testing.assert_close(have, want)


def test_overwrites_only_what_nobody_needs() -> None:
    x, weight, bias = _drawn((3, 4, 5), 6, True)
    want, before = _plain_gelu_linear(x, weight, bias), x.detach().clone()
    torch.testing.assert_close(gelu_linear(x, weight, bias, overwrite=True), want)
    with torch.no_grad():
        torch.testing.assert_close(gelu_linear(x, weight, bias), want)
        assert torch.equal(x, before)
        torch.testing.assert_close(gelu_linear(x, weight, bias, overwrite=True), want)
        assert torch.equal(x, F.gelu(before))


@pytest.mark.parametrize(
    "ours, plain", [(linear, F.linear), (gelu_linear, _plain_gelu_linear)], ids=["linear", "gelu"]
)
def test_gradient_of_a_gradient(ours, plain) -> None:
    tensors = _drawn((3, 4, 5), 6, True)

    def penalty(function) -> list[Tensor]:
        (grad,) = torch.autograd.grad(
            function(*tensors).tanh().sum(), tensors[0], create_graph=True
        )
        return list(torch.autograd.grad(grad.square().sum(), tensors))

    for have, want in zip(penalty(ours), penalty(plain), strict=True):
        torch.testing.assert_close(have, want)


def test_only_wanted_gradients() -> None:
    x, weight, bias = _drawn((3, 5), 4, True)
    for wanted in (x, weight, bias):
        tensors = [t.detach().requires_grad_(t is wanted) for t in (x, weight, bias)]
        linear(*tensors).sum().backward()
        assert [t.grad is not None for t in tensors] == [t.requires_grad for t in tensors]


def test_as_pytorch_elsewhere() -> None:
    layer, x = Linear(16, 8), torch.randn(2, 3, 16)
    want = F.linear(x, layer.weight, layer.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    layer.float()
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(layer(x), want)
    assert layer(x[:0]).shape == (0, 3, 8)
    assert layer.to("meta")(x.to("meta")).shape == (2, 3, 8)
    with pytest.raises(RuntimeError, match="shapes"):
        linear(x, torch.randn(8, 15))


def test_transforms_and_compilers() -> None:
    layer, x = Linear(16, 8), torch.randn(2, 3, 16)
    want = layer(x)
    torch.testing.assert_close(torch.vmap(layer)(x), want)
    torch.testing.assert_close(torch.func.jacrev(layer)(x), torch.func.jacfwd(layer)(x))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), want)
    program = torch.export.export(layer, (x,))
    assert not any("mkldnn" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), want)


def test_operations_are_counted() -> None:
    layer, x = Linear(16, 8), torch.randn(2, 3, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * 16 * 8
