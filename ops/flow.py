"""Flow-Attention: attention as a flow from sources (keys) to sinks (queries) that is conserved.

Wu et al., "Flowformer: Linearizing Transformers with Conservation Flows" (arXiv 2202.06258). What
flows into every sink and out of every source is set to one; then sources compete for what they
send, and sinks are allocated what they take. The causal version is in `vitarium.ops.flow_causal`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.linear import NAME as LINEAR
from vitarium.ops.linear import linear_attention
from vitarium.ops.linear_features import HALF
from vitarium.ops.mixer import Mixer, qkv_heads
from vitarium.ops.projection import Linear

NAME = "flow_attention"


def flow_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    eps: float = 1e-6,
    flow_eps: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Flow-Attention of all queries to all keys.

    With q, k the sigmoids of query and key, L queries, S keys, sums over all tokens, and <a, b> the
    product of a + eps and b + eps:

        incoming_i = 1 / (<q_i, sum_j k_j> + flow_eps),  outgoing_j = 1 / (<k_j, sum_i q_i> + ...)
        sink_i = <q_i, sum_j outgoing_j k_j> + flow_eps
        source_j = <k_j, sum_i incoming_i q_i> + flow_eps, kept between -1 and 1
        output_i = sigmoid(sink_i L / S) incoming_i sum_j (q_i k_j) S softmax(source)_j value_j

    The last line is `linear_attention` of the weighted q and k. Cost: that, and six products with a
    vector, of 2 N head_dim value_dim + 6 N head_dim multiply-adds a head for N tokens.

    Args:
        query: `(B, *spatial, num_heads, head_dim)`.
        key: `(B, *spatial_kv, num_heads, head_dim)`.
        value: `(B, *spatial_kv, num_heads, value_dim)`.
        eps: added to the features in flows.
        flow_eps: added to flows, 1e-6 in the paper's vision models.
        backend: of `linear_attention`.

    Returns:
        `(B, *spatial, num_heads, value_dim)`, contiguous, in the dtype of query.

    Raises:
        ValueError: shapes or devices do not fit, or a number is negative.
        TypeError: as `linear_attention` does.
    """
    _check(query, key, value, eps, flow_eps)
    query, key, value = dispatch.autocast(query, key, value)
    dtype = torch.float32 if query.dtype in HALF else query.dtype
    # (B, heads, tokens, head_dim)
    q, k = (x.flatten(1, -3).transpose(1, 2).to(dtype).sigmoid() for x in (query, key))
    queries, keys, width = q.shape[-2], k.shape[-2], q.shape[-1]

    def flow(tokens: Tensor, total: Tensor) -> Tensor:
        """<tokens, total> + flow_eps, `(B, heads, tokens, 1)`; `total` is a row."""
        column = total.transpose(-1, -2) + eps
        return tokens @ column + (eps * column.sum(-2, keepdim=True) + flow_eps)

    incoming = flow(q, k.sum(-2, keepdim=True)).reciprocal()
    outgoing = flow(k, q.sum(-2, keepdim=True)).reciprocal()
    sink = flow(q, outgoing.transpose(-1, -2) @ k)
    source = flow(k, incoming.transpose(-1, -2) @ q).clamp(-1, 1)
    allocation = torch.sigmoid(sink * (queries / keys))
    competition = source.softmax(-2) * keys
    # What is near one in size, for half precision; `scale` does the rest.
    q = q * (allocation * incoming * (keys * width))
    k = k * competition
    q = q.transpose(1, 2).to(query.dtype).reshape(query.shape)
    k = k.transpose(1, 2).to(key.dtype).reshape(key.shape)
    return linear_attention(
        q,
        k,
        value,
        feature_map="identity",
        normalization="none",
        scale=1 / (keys * width),
        backend=backend,
    )


@dispatch.remembered
def _check(query: Tensor, key: Tensor, value: Tensor, eps: float, flow_eps: float) -> None:
    dispatch.check_tensors(NAME, query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 4 or min(tensor.shape[1:]) < 1:
            raise ValueError(
                f"{NAME}: {name} has shape {tuple(tensor.shape)}; allowed is (B, *spatial, "
                "num_heads, head_dim), only the batch may be empty"
            )
    if key.shape[0] != query.shape[0] or key.shape[-2:] != query.shape[-2:]:
        raise ValueError(
            f"{NAME}: key has shape {tuple(key.shape)}, query {tuple(query.shape)}; batch, heads "
            "and head_dim must agree"
        )
    for name, number in (("eps", eps), ("flow_eps", flow_eps)):
        if not 0 <= number < math.inf:
            raise ValueError(f"{NAME}: {name}={number} must be at least 0 and finite")


class FlowAttention(Mixer, name="flow"):
    """Flow-Attention over a whole map.

        q, k, v = qkv(x);  out = proj(flow_attention(q, k, v))

    with `vitarium.ops.flow_attention`. Official state dicts load: those of the vision models
    (`flow_eps` 1e-6), and those of the library, with projections of their own for queries, keys and
    values (`flow_eps` 0). Cost for N tokens: 4 N C d_model + 2 N d_model head_dim multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `d_model`.
        d_model: channels of all heads; `dim` if None.
        qkv_bias: bias of the query, key and value projection.
        eps, flow_eps: as in `flow_attention`.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: `num_heads` does not divide `d_model`, or a number is out of range.
    """

    paper = "Flowformer (arXiv 2202.06258)"
    operator = LINEAR
    linear = True
    cross = True
    official_names: ClassVar[Mapping[str, str | None]] = {
        r"out_projection\.(weight|bias)": r"proj.\1"
    }
    cost = "4*N*C**2 + 2*N*C**2/num_heads + 6*N*C"
    examples = (
        {"dim": 32, "num_heads": 4},
        {"dim": 24, "num_heads": 2, "d_model": 16, "flow_eps": 0.0},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 12,
        d_model: int | None = None,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        flow_eps: float = 1e-6,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner, factory = type(self).__name__, {"device": device, "dtype": dtype}
        d_model = dim if d_model is None else d_model
        if num_heads < 1 or d_model < 1 or d_model % num_heads:
            raise ValueError(f"{owner}: num_heads={num_heads} must divide d_model={d_model}")
        for name, number in (("eps", eps), ("flow_eps", flow_eps)):
            if not 0 <= number < math.inf:
                raise ValueError(f"{owner}: {name}={number} must be at least 0 and finite")
        self.num_heads, self.eps, self.flow_eps = num_heads, eps, flow_eps
        self.qkv = Linear(dim, 3 * d_model, bias=qkv_bias, **factory)
        self.proj = Linear(d_model, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        query, key, value = qkv_heads(self.qkv, x, self.num_heads, context)
        output = flow_attention(query, key, value, eps=self.eps, flow_eps=self.flow_eps)
        return self.proj_drop(self.proj(output.flatten(-2)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for kind in ("weight", "bias"):
            names = [f"{prefix}{name}_projection.{kind}" for name in ("query", "key", "value")]
            if all(name in state_dict for name in names):
                parts = [state_dict.pop(name) for name in names]
                state_dict[f"{prefix}qkv.{kind}"] = torch.cat(parts)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The number of heads."""
        return f"num_heads={self.num_heads}"
