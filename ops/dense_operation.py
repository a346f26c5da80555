"""Dense attention as a custom operator, plain or with gates and heads that skip queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vitarium.ops import dense
from vitarium.ops.differentiable import Differentiable

Shape = Sequence[int]


def dense_operation(name: str, *, gated: bool) -> Differentiable:
    """The operator `vitarium::name`.

    Its tensors are query, key, value and bias or None and, if `gated`, gate and active or None; the
    other arguments is_causal, scale, and whether a backward may follow.
    """
    tensors = "Tensor query, Tensor key, Tensor value, Tensor? bias"
    if gated:
        tensors += ", Tensor? gate, Tensor? active"
    count = tensors.count("Tensor")

    def split(args: Sequence[Any]) -> tuple[tuple[Any, ...], Sequence[Any]]:
        """All six tensors, None for those that there are not, and the other arguments."""
        return (*args[:count], None, None)[:6], args[count:]

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        (*operands, gate, active), (is_causal, scale, training, fused) = split(args)
        if fused:
            from vitarium.ops.kernels import dense as kernels

            return kernels.forward(*operands, gate, active, is_causal, scale)
        if gate is None:
            return dense.forward(*operands, active, is_causal, scale, training)
        room = dense.output_room(operands[0], operands[2]) if training else 0
        output, saved = dense.forward(*operands, active, is_causal, scale, training, room)
        if training:  # the gradient of the gate wants the output without it
            dense.kept_output(saved, output).copy_(output)
        return output.mul_(shown(gate, active)[..., None]), saved

    def backward(grad: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        (*operands, gate, active), (output, saved, *rest) = split(args)
        is_causal, scale, training, fused, needs = rest
        if fused:
            from vitarium.ops.kernels import dense as kernels

            results = (output, saved, is_causal, scale)
            grads = kernels.backward(grad, *operands, gate, active, *results, needs[3])
            return (*grads, None)[:count]  # none of active
        grad_gate = None
        if gate is not None:
            output = dense.kept_output(saved, output)
            saved = saved[dense.output_room(operands[0], operands[2]) :]
            grad_gate = shown((grad * output).sum(-1), active) if needs[4] else None
            grad = grad * shown(gate, active)[..., None]
        results = (output, saved, is_causal, scale)
        grads = dense.backward(grad, *operands, active, *results, training, needs[3])
        return (*grads, grad_gate, None)[:count]

    def saved_shape(*args: Any) -> tuple[int, ...]:
        (*operands, gate, active), (is_causal, _, training, fused) = split(args)
        if fused:  # base-2 log-sum-exp
            return tuple(operands[0].shape[:-1])
        gated = gate is not None and training
        room = dense.output_room(operands[0], operands[2]) if gated else 0
        return dense.saved_shape(*operands, active, is_causal, training, room)

    def flops(query: Shape, key: Shape, value: Shape, *args: Any) -> int:
        """Of all heads at all queries: how many are active is not in the shapes."""
        return 2 * _scores(query, key, args[count - 3]) * (query[-1] + value[-1])

    def backward_flops(query: Shape, key: Shape, value: Shape, *args: Any) -> int:
        """Three products over head_dim (scores again, query, key) and two over value_dim."""
        return 2 * _scores(query, key, args[count - 3]) * (3 * query[-1] + 2 * value[-1])

    return Differentiable(
        name,
        tensors=tensors,
        arguments="bool is_causal, float scale, bool training",
        forward=forward,
        backward=backward,
        output_shape=lambda query, key, value, *_: (*query.shape[:-1], value.shape[-1]),
        saved_shape=saved_shape,
        flops=flops,
        backward_flops=backward_flops,
    )


def shown(gate: Tensor, active: Tensor | None) -> Tensor:
    """The gate, or its gradient, with 0 where a head skips a query, whatever it is there."""
    return gate if active is None else gate.masked_fill(~active, 0)


def _scores(query: Shape, key: Shape, is_causal: bool) -> int:
    """Pairs of query and key of which a score is needed."""
    queries, keys = math.prod(query[1:-2]), math.prod(key[1:-2])
    pairs = queries * keys
    if is_causal:
        triangle = min(queries, keys)
        pairs = triangle * (triangle + 1) // 2 + (queries - triangle) * keys
    return query[0] * query[-2] * pairs
