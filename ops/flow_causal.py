"""Causal Flow-Attention: attention as a flow from sources to sinks, of which every token has one.

Wu et al., "Flowformer: Linearizing Transformers with Conservation Flows" (arXiv 2202.06258), the
causal version of the official code, on top of `causal_linear_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitarium.ops.causal_chunks import working_dtype
from vitarium.ops.causal_linear import causal_linear_attention
from vitarium.ops.mixer import Mixer
from vitarium.ops.projection import Linear


def flow_attention_causal(
    query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """Causal Flow-Attention of tokens in raster order.

    With q, k the sigmoids of query and key, n_i = i + 1, and sums over j <= i of tokens 0, 1, ...:

        incoming_i = n_i / (q_i . sum_j k_j),  outgoing_i = n_i / (k_i . sum_j q_j)
        sink_i = q_i . sum_j outgoing_j k_j / n_i,  source_i = k_i . sum_j incoming_j q_j / n_i
        competition_i = n_i exp(source_i) / sum_j exp(source_j)
        output_i = sigmoid(sink_i) incoming_i / n_i sum_j (q_i . k_j) competition_j value_j

    with `eps` added to both sides of the products of the first two lines, and sources kept between
    -1 and 1. Memory and time grow with the number of tokens N: 2 N head_dim value_dim multiply-adds
    a head.

    Args:
        query: `(B, *spatial, num_heads, head_dim)`.
        key: `(B, *spatial, num_heads, head_dim)`.
        value: `(B, *spatial, num_heads, value_dim)`.
        eps: keeps flows from zero.
        backend: of `causal_linear_attention`.

    Returns:
        `(B, *spatial, num_heads, value_dim)`, in the dtype of query.

    Raises:
        ValueError, TypeError: as `causal_linear_attention` does.
    """
    if key.shape != query.shape:
        raise ValueError(
            f"flow_attention_causal: key has shape {tuple(key.shape)}, query {tuple(query.shape)}; "
            "they must agree"
        )
    spatial = query.shape[1:-2]
    dtype = working_dtype(query.dtype)
    q, k = (tensor.flatten(1, -3).to(dtype).sigmoid() for tensor in (query, key))
    tokens = torch.arange(1, q.shape[1] + 1, dtype=dtype, device=q.device)[:, None]

    def flow(ends: Tensor, others: Tensor) -> Tensor:
        """What flows between a token and those before it, `(B, N, num_heads)`."""
        return ((ends + eps) * (others.cumsum(1) + eps)).sum(-1)

    incoming, outgoing = tokens / flow(q, k), tokens / flow(k, q)
    sink = flow(q, k * outgoing[..., None]) / tokens
    source = (flow(k, q * incoming[..., None]) / tokens).clamp(-1, 1).exp()
    competition = tokens * source / source.cumsum(1)
    # Factors go to queries and keys, so that the weights of the values are whole.
    q = q * (sink.sigmoid() * incoming / tokens)[..., None]
    k = k * competition[..., None]
    q, k, value = q.to(query.dtype), k.to(query.dtype), value.flatten(1, -3)
    return causal_linear_attention(q, k, value, backend=backend).unflatten(1, spatial)


class FlowAttentionCausal(Mixer, name="flow_causal"):
    """Causal Flow-Attention of Flowformer, on a map in raster order.

        out = out_projection(flow_attention_causal(queries, keys, values))

    of linear projections; equations at `vitarium.ops.flow_attention_causal`. Cost for N tokens:
    4 N C d_model for the projections and 2 N d_model^2 / n_heads, in multiply-adds. Parameters are
    named as in the official code.

    Args:
        dim: number of channels C.
        n_heads: number of heads; divides `d_model`.
        d_model: channels of all heads, `dim` if None.
        drop_out: dropout rate after the output projection.
        eps: keeps flows from zero.

    Raises:
        ValueError: `n_heads` does not divide `d_model`, or a number is out of range.
    """

    paper = "Flowformer: Linearizing Transformers with Conservation Flows (arXiv 2202.06258)"
    linear = True
    operator = "causal_linear_attention"
    cross = True
    cost = "4*N*C**2 + 2*N*C**2/n_heads"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 24, "n_heads": 2},
        {"dim": 16, "n_heads": 3, "d_model": 24},
    )

    def __init__(
        self,
        dim: int,
        *,
        n_heads: int = 8,
        d_model: int | None = None,
        drop_out: float = 0.0,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        d_model = dim if d_model is None else d_model
        if d_model < 1 or n_heads < 1 or d_model % n_heads:
            raise ValueError(f"{owner}: {n_heads=} must divide {d_model=}")
        if not 0 <= drop_out <= 1:
            raise ValueError(f"{owner}: {drop_out=} is a rate; allowed is 0 to 1")
        if not 0 <= eps < math.inf:
            raise ValueError(f"{owner}: {eps=} must be at least 0 and finite")
        self.n_heads = n_heads
        self.eps = eps
        factory = {"device": device, "dtype": dtype}
        self.query_projection = Linear(dim, d_model, **factory)
        self.key_projection = Linear(dim, d_model, **factory)
        self.value_projection = Linear(dim, d_model, **factory)
        self.out_projection = Linear(d_model, dim, **factory)
        self.dropout = nn.Dropout(drop_out)

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        query, key, value = (
            layer(tokens).unflatten(-1, (self.n_heads, -1))
            for layer, tokens in (
                (self.query_projection, x),
                (self.key_projection, context),
                (self.value_projection, context),
            )
        )
        output = flow_attention_causal(query, key, value, eps=self.eps)
        return self.dropout(self.out_projection(output.flatten(-2)))

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, eps={self.eps}"
