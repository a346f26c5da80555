"""Mixture-of-head attention: every token chooses the heads that it uses.

Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842). A router
gives head h at token i the weight g_ih, and the output is sum_h g_ih Attention_h(i) W_h. Some heads
are shared by all tokens; of the others a token uses the k with the highest score, and g_ih = 0 for
the rest. What a head would compute for tokens that did not choose it is never used, and is not
computed here: cost and time are those of dense attention times the share of active heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dense, dispatch
from vitarium.ops.attention import check, portable, reference, training
from vitarium.ops.dense_operation import dense_operation, shown
from vitarium.ops.dispatch import Case, Implementation, Operator

NAME = "mixture_of_head_attention"


def mixture_of_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    active: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query to every key, the output of each head times a gate at each query.

    Counters of floating-point operations see shapes only, and so count all heads at all queries;
    what is computed is that times the share of `active`.

    Args:
        query, key, value, bias, is_causal, scale: as in `vitarium.ops.attention`.
        gate: `(B, *spatial, num_heads)`, factor on the output of each head at each query; of any
            floating-point dtype.
        active: bool, of the same shape, or None for all; where false, the head skips the query:
            the output is 0 whatever the gate is, neither gate nor query gets a gradient, and
            nothing is computed.
        backend: "reference", "torch", "triton", or None to choose.

    Returns:
        `(B, *spatial, num_heads, value_dim)`, contiguous, in the dtype of query.

    Raises:
        ValueError: shapes or devices do not fit, or the named backend cannot run this.
        TypeError: an argument is of the wrong type, or dtypes differ.
    """
    scale = check(NAME, query, key, value, bias, is_causal, scale)
    for argument, tensor in (("gate", gate), ("active", active)):
        if argument == "active" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{NAME}: {argument} must be a tensor, got {type(tensor).__name__}")
        if tensor.shape != query.shape[:-1]:
            raise ValueError(
                f"{NAME}: {argument} has shape {tuple(tensor.shape)}; allowed is "
                f"{tuple(query.shape[:-1])}, (B, *spatial, num_heads)"
            )
        if tensor.device != query.device:
            raise ValueError(f"{NAME}: {argument} is on {tensor.device}, query on {query.device}")
    if not gate.is_floating_point():
        raise TypeError(f"{NAME}: gate must be floating-point, got {gate.dtype}")
    if active is not None and active.dtype != torch.bool:
        raise TypeError(f"{NAME}: active must be bool, got {active.dtype}")
    query, key, value = dispatch.autocast(query, key, value)
    gate = gate.to(query.dtype)
    may_train = training(query, key, value, bias, gate)
    args = (query, key, value, bias, gate, active, is_causal, scale, may_train)
    return dispatch.choose(NAME, backend, _IMPLEMENTATIONS, query.device, *args)(*args)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    active: Tensor | None,
    is_causal: bool,
    scale: float,
    training: bool,
) -> Tensor:
    output = reference(query, key, value, bias, is_causal, scale, training)
    return output * shown(gate, active)[..., None]


# --- the portable path ---------------------------------------------------------------------------


def _portable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    active: Tensor | None,
    is_causal: bool,
    scale: float,
    training: bool,
) -> Tensor:
    rest = (is_causal, scale, training)
    if active is None or dispatch.plain_aten() or not dense.packing_pays(query, key):
        output = portable(query, key, value, bias, *rest)
        return output * shown(gate, active)[..., None]
    return _OPERATION(query, key, value, bias, gate, active, *rest, fused=False)


# --- the custom operator -------------------------------------------------------------------------


_OPERATION = dense_operation(NAME, gated=True)

_IMPLEMENTATIONS = {
    **_OPERATION.implementations(
        reference=_reference, plain=_reference, refuses=dispatch.triton_refuses
    ),
    "torch": Implementation(_portable),
}


# --- the router ----------------------------------------------------------------------------------


class HeadRouter(nn.Module):
    """Chooses, for every token, the heads that it uses and their weights.

    The first `shared_head` heads are used by all tokens. Of the others a token uses the
    `routed_head` ones with the largest softmax(x W_g), renormalised to the sum `routed_head`.
    Shared heads have the weights softmax(x W_1) shared_head (1 for a single one), and where both
    kinds exist, 2 softmax(x W_0) weighs them against each other. With `routed_head=0` every head
    is shared, and none is skipped.

    Parameters are named as in the official code: `wg`, `wg_0`, `wg_1`, where there is a choice.

    Args:
        dim: number of channels.
        num_heads: number of heads.
        shared_head: heads that every token uses.
        routed_head: heads that a token chooses of the other `num_heads - shared_head`; 0 only if
            all heads are shared.

    Attributes:
        balance_loss: load-balance loss of the last forward in training (equation 8 of the paper,
            times the number of routed heads): E^2 mean_e(mean softmax_e * share of tokens that
            chose e) over the E heads that can be chosen. None before it, in evaluation, and where
            nothing is chosen.

    Raises:
        ValueError: the numbers of heads do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared_head: int = 0,
        routed_head: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        choices = num_heads - shared_head
        if not 0 <= shared_head <= num_heads:
            raise ValueError(
                f"HeadRouter: shared_head={shared_head} must be between 0 and {num_heads=}"
            )
        if not 0 <= routed_head <= choices or (routed_head == 0) != (choices == 0):
            raise ValueError(
                f"HeadRouter: routed_head={routed_head} must be between 1 and num_heads - "
                f"shared_head={choices}, or 0 if that is 0"
            )
        self.num_heads = num_heads
        self.shared_head = shared_head
        self.routed_head = routed_head
        factory = {"bias": False, "device": device, "dtype": dtype}
        self.wg = nn.Linear(dim, choices, **factory) if routed_head else None
        self.wg_0 = nn.Linear(dim, 2, **factory) if routed_head and shared_head else None
        self.wg_1 = nn.Linear(dim, shared_head, **factory) if shared_head > 1 else None
        self.balance_loss: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights and choice of the heads of every token.

        Args:
            x: `(..., dim)`.

        Returns:
            The weights `(..., num_heads)`, 0 where a head is not chosen, and whether it is, bool of
            the same shape; None if no token can skip a head.
        """
        self.balance_loss = None
        parts: list[Tensor] = []  # shared, routed
        active = None
        if self.wg_1 is not None:
            parts.append(self.wg_1(x).softmax(-1) * self.shared_head)
        elif self.shared_head:
            parts.append(x.new_ones((*x.shape[:-1], 1)))
        if self.wg is not None:
            scores = self.wg(x).softmax(-1)
            chosen = scores.topk(self.routed_head, -1).indices
            ones = torch.ones_like(chosen, dtype=torch.bool)  # a number could not be traced
            active = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, ones)
            if self.training:
                self.balance_loss = self._balance_loss(scores, active)
            routed = scores * active
            total = routed.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).eps)
            parts.append(routed / total * self.routed_head)
        if self.wg_0 is not None:
            weights = self.wg_0(x).softmax(-1) * 2
            parts = [weights[..., :1] * parts[0], weights[..., 1:] * parts[1]]
        gate = torch.cat(parts, -1)
        if active is None or self.routed_head == self.num_heads - self.shared_head:
            return gate, None
        return gate, F.pad(active, (self.shared_head, 0), value=True)

    @property
    def auxiliary_loss(self) -> Tensor | None:
        """The balance loss, for `vitarium.ops.auxiliary_losses`."""
        return self.balance_loss

    @staticmethod
    def _balance_loss(scores: Tensor, active: Tensor) -> Tensor:
        experts = scores.shape[-1]
        # Shares in float32 whatever the dtype, as in the official code.
        score, share = (t.flatten(0, -2).mean(0) for t in (scores, active.float()))
        return (score * share).mean() * experts**2

    def __getstate__(self) -> dict[str, Any]:
        """Without the loss of the last step, whose graph can neither be copied nor stored."""
        return {**self.__dict__, "balance_loss": None}

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, shared_head={self.shared_head}, "
            f"routed_head={self.routed_head}"
        )


# --- test cases ----------------------------------------------------------------------------------


def _active(share: float) -> Any:
    """Draws which heads a token uses: head 0 always, of the others `share`, the last never."""

    def draw(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        active = torch.rand(shape, generator=generator) < share
        active[..., -1] = False
        active[..., 0] = True
        return active

    return draw


def _case(
    note: str,
    spatial: tuple[int, ...],
    spatial_kv: tuple[int, ...] | None = None,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (16, 16),
    bias: tuple[int, ...] = (),
    share: float | None = 0.5,
    **kwargs: Any,
) -> Case:
    """A call with (query, key) heads and (query, value) widths; `bias`: leading dimensions."""
    spatial_kv = spatial if spatial_kv is None else spatial_kv
    shapes: dict[str, tuple[int, ...]] = {
        "query": (batch, *spatial, heads[0], dims[0]),
        "key": (batch, *spatial_kv, heads[1], dims[0]),
        "value": (batch, *spatial_kv, heads[1], dims[1]),
        "gate": (batch, *spatial, heads[0]),
    }
    values = {}
    if share is not None:
        shapes["active"] = shapes["gate"]
        values["active"] = _active(share)
    if bias:
        shapes["bias"] = (*bias, math.prod(spatial), math.prod(spatial_kv))
    return Case(note, shapes, kwargs, values)


CASES = (
    _case("one head unused, bias of every head", (5, 4), batch=2, heads=(3, 3), bias=(3,)),
    _case("no head is skipped", (4, 5), share=None),
    _case("grouped heads, bias of images", (3, 8), batch=2, heads=(4, 2), bias=(2, 1)),
    _case("causal, unequal widths", (71,), dims=(16, 24), is_causal=True),
    _case("cross, few tokens active", (5, 9), (21,), bias=(1, 1), share=0.1, scale=0.3),
    _case("only one head active", (30,), heads=(3, 1), share=0.0),
    _case("no images", (4, 4), batch=0, bias=(1,)),
)

LAUNCHES = tuple(
    _case(f"width {width}", (14, 14), heads=(4, 4), dims=(width, width), bias=bias)
    for width, bias in ((32, ()), (64, (4,)))
)

OPERATOR = Operator(
    NAME,
    mixture_of_head_attention,
    _IMPLEMENTATIONS,
    CASES,
    operation=_OPERATION,
    launches=LAUNCHES,
    context="any size",
)
