"""Linear layers whose float32 products a CPU computes by oneDNN where MKL holds back.

MKL takes its widest kernels on Intel's processors only; oneDNN, which PyTorch brings along for
convolutions, takes what the processor has, and multiplies tokens with weights faster on others.
Sums over tokens, the gradients of weights, are MKL's as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from vitarium.ops.dispatch import plain_aten

WORTH = 1 << 21  # multiply-adds from which on a call through Python costs nothing


def _has_onednn() -> bool:
    """Whether there is oneDNN, on a processor that MKL does not take for Intel's."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return (
        hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and capabilities.get("avx512_f", False)
        and "Intel" not in capabilities.get("cpu_name", "Intel")
    )


_ONEDNN = _has_onednn()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by oneDNN where that is faster.

    Args:
        x: `(..., in_features)`.
        weight: `(out_features, in_features)`.
        bias: `(out_features)`.

    Returns:
        `(..., out_features)`.
    """
    if not _ONEDNN or not _by_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or plain_aten():
        return False
    return (
        x.dtype == weight.dtype == torch.float32
        and type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * len(weight) >= WORTH
        and x.shape[-1] == weight.shape[-1]
        and (bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1]))
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(grad, *ctx.saved_tensors, ctx.needs_input_grad)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias, as far as they are needed."""
    again = torch.is_grad_enabled()  # a gradient that will be differentiated
    rows, tokens = (t.flatten(0, -2) if t.dim() > 1 else t[None] for t in (grad, x))
    by_mkl = again or not _ONEDNN or not _by_onednn(grad, weight.t(), None)
    return (
        (grad @ weight if by_mkl else _product(grad, weight.t())) if needs[0] else None,
        rows.t() @ tokens if needs[1] else None,
        rows.sum(0) if needs[2] else None,
    )


def gelu_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, overwrite: bool = False
) -> Tensor:
    """`linear(gelu(x), weight, bias)`, whose backward computes the GELU again: less is kept.

    Args:
        x, weight, bias: as `linear` has them.
        overwrite: whether x may be written to, where no gradient needs it: memory for a hidden map
            takes as long to come by as its GELU.
    """
    plain = (
        torch.compiler.is_compiling() or plain_aten() or torch.is_autocast_enabled(x.device.type)
    )
    if plain:
        return linear(F.gelu(x), weight, bias)
    if torch.is_grad_enabled():
        return _GeluLinear.apply(x, weight, bias)
    return linear(torch.ops.aten.gelu_(x) if overwrite else F.gelu(x), weight, bias)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        # One after the other, so that one hidden map's memory does for all.
        of_layer = _gradients(grad, F.gelu(x), weight, (False, *needs[1:]))[1:]
        (of_gelu, *_) = _gradients(grad, x, weight, (needs[0], False, False))
        if of_gelu is None:
            return None, *of_layer
        if torch.is_grad_enabled():
            return torch.ops.aten.gelu_backward(of_gelu, x), *of_layer
        return torch.ops.aten.gelu_backward.grad_input(of_gelu, x, grad_input=of_gelu), *of_layer


class Linear(nn.Linear):
    """`torch.nn.Linear`, by oneDNN where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def plain(layer: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a layer computes what its type says of its parameters, and nobody watches it.

    Only then may its parameters be used without calling it: layers of low-rank adaptation,
    quantised and parametrised ones are of other types, and hooks would not run. Hooks of whoever
    traces are not counted: the graph shall be that of the model as it runs.

    Args:
        layer: any module.
        types: what it may be; `Linear` or `torch.nn.Linear` if none are named.
    """
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    watched = any(hooks) and not torch.jit.is_tracing()
    if not torch.compiler.is_compiling():  # accelerate, to load weights when they are needed
        watched = watched or "forward" in layer.__dict__
    return type(layer) in (types or (Linear, nn.Linear)) and not watched


if _ONEDNN and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        tokens = 1
        for length in x[:-1]:
            tokens *= length
        return 2 * tokens * weight[0] * weight[1]
