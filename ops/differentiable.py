"""Custom operators with a derivative: what every fused operator of this library declares.

An operator computes one output from tensors and plain arguments, by a portable path or by Triton
kernels, which the last argument `fused` says. One custom operator stands for both, so that one
graph node, one fake kernel, one derivative and one count of operations hold wherever it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitarium.ops import dispatch
from vitarium.ops.dispatch import Implementation

Shape = Sequence[int]


def _names(schema: str) -> list[str]:
    return [part.split()[-1] for part in schema.split(",")]


ORDINARY = (Tensor, torch.nn.Parameter)


class _Direct(torch.autograd.Function):
    """A differentiable operator without its custom operator."""

    @staticmethod
    def forward(ctx: Any, operator: Differentiable, *inputs: Any) -> Tensor:
        output = operator.forward(*inputs)
        ctx.operator = operator
        ctx.save_for_backward(*inputs[: operator.count], *output)
        ctx.arguments = inputs[operator.count :]
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        operator, tensors = ctx.operator, ctx.saved_tensors
        needs = ctx.needs_input_grad[1 : 1 + operator.count]
        grads = operator.backward(grad, *tensors, *ctx.arguments, needs)
        found = (g if need else None for g, need in zip(grads, needs))
        return None, *found, *(None,) * len(ctx.arguments)


class Differentiable:
    """A custom operator `vitarium::name` and `vitarium::name_backward`.

    Args:
        name: of the operator.
        tensors: schema of the tensor arguments, such as "Tensor query, Tensor? bias"; the first
            one is never None and gives the output its dtype and device. Tensors of integers or
            booleans have no gradient.
        arguments: schema of the others, such as "int[] kernel_size, float scale".
        forward: `(*tensors, *arguments, fused)` to the output and one float32 tensor that the
            backward wants, which may be empty.
        backward: `(grad, *tensors, output, saved, *arguments, fused, needs)` to one gradient per
            tensor, or None where `needs`, a sequence of booleans, is false.
        output_shape, saved_shape: `(*tensors, *arguments, fused)` to the shapes of what `forward`
            returns.
        flops, backward_flops: `(*tensors, *arguments)` to 2 x multiply-adds, tensors replaced by
            their shapes; the backward's includes what is computed again.
    """

    def __init__(
        self,
        name: str,
        *,
        tensors: str,
        arguments: str,
        forward: Callable[..., tuple[Tensor, Tensor]],
        backward: Callable[..., Sequence[Tensor | None]],
        output_shape: Callable[..., Shape],
        saved_shape: Callable[..., Shape],
        flops: Callable[..., int],
        backward_flops: Callable[..., int],
    ) -> None:
        self.name = name
        self.forward = forward
        self.backward = backward
        self._output_shape = output_shape
        self._saved_shape = saved_shape
        self.count = count = len(_names(tensors))
        rest = f"{arguments}, bool fused"
        self._operator = torch.library.custom_op(
            f"vitarium::{name}",
            forward,
            mutates_args=(),
            schema=f"({tensors}, {rest}) -> (Tensor, Tensor)",
        )
        # torch.jit.trace, which FLOP counters use, cannot trace a list of bool: hence int[].
        self._backward_operator = torch.library.custom_op(
            f"vitarium::{name}_backward",
            self._run_backward,
            mutates_args=(),
            schema=f"(Tensor grad, {tensors}, Tensor output, Tensor saved, {rest}, int[] needs)"
            f" -> ({', '.join(['Tensor'] * count)})",
        )
        self._operator.register_fake(self._fake)
        self._backward_operator.register_fake(self._fake_backward)
        self._operator.register_autograd(self._autograd, setup_context=self._setup_context)
        arguments_count = len(_names(arguments))

        def count_forward(*args: Any, out_shape: Any = None, **_: Any) -> int:
            return flops(*args[: count + arguments_count])

        def count_backward(*args: Any, out_shape: Any = None, **_: Any) -> int:
            first = 3 + count
            return backward_flops(*args[1 : 1 + count], *args[first : first + arguments_count])

        dispatch.register_flops(self._operator)(count_forward)
        dispatch.register_flops(self._backward_operator)(count_backward)

    def __call__(self, *args: Any, fused: bool) -> Tensor:
        """The output; `args` are the tensors and the other arguments."""
        if not self.direct(args):
            return self._operator(*args, fused)[0]
        if self.differentiated(args):
            return _Direct.apply(self, *args, fused)
        return self.forward(*args, fused)[0]

    def differentiated(self, args: Sequence[Any]) -> bool:
        """Whether a backward may follow."""
        return torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in args[: self.count]
        )

    def direct(self, args: Sequence[Any]) -> bool:
        """Whether the way past the custom operator may be taken: nobody would see it."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if torch._C._len_torch_dispatch_stack():
            return False
        tensors = [tensor for tensor in args[: self.count] if tensor is not None]
        return all(type(t) in ORDINARY and t.device.type != "meta" for t in tensors)

    def implementations(
        self,
        *,
        reference: Callable[..., Tensor],
        plain: Callable[..., Tensor],
        refuses: Callable[..., str | None],
    ) -> Mapping[str, Implementation]:
        """Implementations by backend name; all take the tensors and the other arguments.

        Args:
            reference: the definition.
            plain: the same as plain ATen, for exporters and function transforms.
            refuses: why the Triton kernels cannot run a call, or None.
        """

        def portable(*args: Any) -> Tensor:
            return plain(*args) if dispatch.plain_aten() else self(*args, fused=False)

        def fused(*args: Any) -> Tensor:
            return self(*args, fused=True)

        return {
            "reference": Implementation(reference),
            "torch": Implementation(portable),
            "triton": Implementation(fused, refuses),
        }

    def _fake(self, *args: Any) -> tuple[Tensor, Tensor]:
        like = args[0]
        output = like.new_empty(self._output_shape(*args))
        return output, like.new_empty(self._saved_shape(*args), dtype=torch.float32)

    def _fake_backward(self, grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        tensors, needs = args[: self.count], args[-1]
        return tuple(
            tensor.new_empty(tensor.shape) if need else grad.new_empty(0)
            for tensor, need in zip(tensors, needs)
        )

    def _run_backward(self, grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *args, needs = args
        grads = self.backward(grad, *args, tuple(map(bool, needs)))
        return tuple(
            found.contiguous() if need and found is not None else grad.new_empty(0)
            for found, need in zip(grads, needs)
        )

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: self.count], *output)
        ctx.arguments = inputs[self.count :]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # no zeros as large as what is saved

    def _autograd(self, ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad[: self.count]
        grads = self._backward_operator(
            grad, *ctx.saved_tensors, *ctx.arguments, list(map(int, needs))
        )
        found = (g if need else None for g, need in zip(grads, needs))
        return *found, *(None,) * len(ctx.arguments)
