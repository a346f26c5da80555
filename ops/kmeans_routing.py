"""Routing attention: tokens attend to those of their clusters.

Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers" (arXiv 2003.05997).
A gather, dense attention inside of each cluster, which is `attention`, and a mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import spherical_kmeans
from vitarium.ops.attention import attention
from vitarium.ops.gathering import take_by_head
from vitarium.ops.mixer import Mixer, weights_on_values
from vitarium.ops.projection import Linear

INITIAL_STEPS = 10
UNCHOSEN = 1e-5  # added to the number of clusters that chose a token
HIDDEN_SELF = -5e4  # score of a token with itself where queries are keys: if there is no other


def scatter_mean(x: Tensor, index: Tensor, tokens: int) -> Tensor:
    """The mean of what clusters hold of each token, almost: the divisor is larger by 1e-5.

    Args:
        x: `(B, heads, T, w, channels)`.
        index: `(B, heads, T, w)`, the token that each is of.
        tokens: their number N.

    Returns:
        `(B, N, heads, channels)`, zero for tokens that are in no cluster.
    """
    places = index.flatten(2)[..., None]
    shape = (*index.shape[:2], tokens)
    total = x.new_zeros((*shape, x.shape[-1]))
    total = total.scatter_add(2, places.expand(-1, -1, -1, x.shape[-1]), x.flatten(2, 3))
    count = x.new_zeros((*shape, 1)).scatter_add(2, places, torch.ones_like(places, dtype=x.dtype))
    return (total / (count + UNCHOSEN)).transpose(1, 2)


def clustered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_index: Tensor,
    key_index: Tensor,
    *,
    memory: tuple[Tensor, Tensor] | None = None,
    is_causal: bool = False,
    shared_qk: bool = False,
) -> Tensor:
    """Attention of the queries of each cluster to its keys, and the mean over clusters.

    Args:
        query: `(B, N, heads, head_dim)`.
        key: `(B, M, heads, head_dim)`.
        value: `(B, M, heads, value_dim)`.
        query_index, key_index: `(B, heads, T, w)` and `(B, heads, T, v)`, the tokens of each of T
            clusters.
        memory: keys and values `(heads, T, m, channels)` of each cluster that all its queries see.
        is_causal: a token sees none after itself.
        shared_qk: a token sees itself only where it sees nothing else.

    Returns:
        `(B, N, heads, value_dim)`, zero for tokens that are in no cluster.
    """
    shape = query_index.shape
    near = [take_by_head(query, query_index)]
    near += [take_by_head(x, key_index) for x in (key, value)]
    remembered = 0
    if memory is not None:
        remembered = memory[0].shape[2]
        near[1:] = [
            torch.cat([m.to(x.dtype).expand(shape[0], -1, -1, -1, -1), x], 3)
            for m, x in zip(memory, near[1:])
        ]
    bias = None
    if is_causal or shared_qk:
        row, column = query_index[..., :, None], key_index[..., None, :]
        bias = near[0].new_zeros((*shape, key_index.shape[-1]))
        if is_causal:
            bias = bias.masked_fill(row < column, -torch.inf)
        if shared_qk:
            bias = bias.masked_fill(row == column, HIDDEN_SELF)
        bias = F.pad(bias, (remembered, 0)).flatten(0, 2)[:, None]
    output = attention(*(x.flatten(0, 2)[:, :, None] for x in near), bias=bias)
    return scatter_mean(output[:, :, 0].unflatten(0, shape[:3]), query_index, query.shape[1])


class KmeansRouter(nn.Module):
    """Centres that tokens are routed by, one set for every head.

    In training the first forward finds them by k-means, and every later one moves them a little
    towards what another step of k-means makes of them.

    Args:
        num_heads, head_dim, num_clusters: as in `KmeansRoutingAttention`.
        ema_decay: how much of the centres stays in a step of training.
        commitment: factor on the commitment loss.
    """

    means: Tensor
    initted: Tensor

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_clusters: int,
        ema_decay: float = 0.999,
        commitment: float = 1e-4,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.ema_decay = ema_decay
        self.commitment = commitment
        self.commitment_loss: Tensor | None = None
        means = F.normalize(torch.randn(num_heads, num_clusters, head_dim, **factory), dim=-1)
        self.register_buffer("means", means)
        self.register_buffer("initted", torch.tensor(False, device=factory.get("device")))
        self._ready = False  # whether training found `means`, without a look at a tensor

    def forward(self, x: Tensor) -> Tensor:
        """Similarity `(B, heads, N, T)` of the directions of x `(B, N, heads, head_dim)`."""
        x = F.normalize(x.transpose(1, 2), dim=-1)
        self.commitment_loss = None
        if not self.training:
            return x @ self.means.to(x.dtype).mT
        with torch.no_grad():
            wide = torch.promote_types(x.dtype, torch.float32)
            tokens = x.transpose(0, 1).flatten(1, 2).to(wide)
            means = self.means.to(wide, copy=True)
            if not self._ready:
                means = spherical_kmeans.initial(tokens, means.shape[1], INITIAL_STEPS)
                self.initted.fill_(True)
                self._ready = True
            moved = spherical_kmeans.step(tokens, means)
            self.means.copy_(torch.lerp(moved, means, self.ema_decay))
        means = means.to(x.dtype)
        similarity = x.detach() @ means.mT
        index = similarity.argmax(-1)[..., None].expand_as(x)
        own = means.expand(len(x), -1, -1, -1).gather(2, index)
        self.commitment_loss = F.mse_loss(x, own) * self.commitment
        return similarity

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.initted.is_meta:
            self._ready = bool(self.initted)

    def __getstate__(self) -> dict[str, Any]:
        """Without the loss of the last step, whose graph can neither be copied nor stored."""
        return {**self.__dict__, "commitment_loss": None}


class KmeansRoutingAttention(Mixer, name="kmeans_routing"):
    """Attention within clusters of tokens, which centres choose (Routing Transformer).

    Of the directions of queries and of keys, each of `num_clusters` learned centres of every head
    takes the `window_size` nearest, so that clusters are of equal size:

        Q_c = top(q / |q| . centre_c),  K_c = top(k / |k| . centre_c)
        out = to_out(mean over the clusters c with token i in Q_c of softmax(scale q_i K_c^T) V_c)

    A token may be in several clusters, or in none: then its output is zero before `to_out`. In
    evaluation each image is routed for itself. Cost for N tokens: 4 N C^2 for the projections, 2 N
    T C of the routing to T clusters and 2 N w C of the attention for w = N / T, in multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads.
        head_dim: channels of a head; `dim // num_heads` if None.
        num_clusters: number T of clusters of every head.
        window_size: tokens of a cluster, at most those of the map; ceil(N / T) if None.
        context_window_size: keys of a cluster where they are of a second map; `window_size` if
            None.
        causal: a token sees none after itself, in raster order.
        num_mem_kv: learned keys and values of every cluster, seen by all of its queries; at least
            1 if causal, since a query may find no other, unless `shared_qk`.
        shared_qk: queries, normalised, are the keys; a token sees itself only where it sees nothing
            else.
        ema_decay: how much of the centres stays in a step of training.
        commitment: factor on the commitment loss.
        proj_drop: dropout rate after the output projection.

    Attributes:
        commitment_loss: mean squared distance of directions to their centres, times `commitment`,
            of the last forward in training, to be added to a loss; else None.

    Raises:
        ValueError: a number is impossible, or a second map is given where it is not defined.
    """

    paper = "Routing Transformer (arXiv 2003.05997)"
    operator = "attention"
    cross = True
    routed = True
    cost = "4*N*C**2 + 2*N*num_clusters*C + 2*N**2*C/num_clusters"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 24, "num_heads": 2, "num_clusters": 4},
        {"dim": 24, "num_heads": 2, "num_clusters": 3, "window_size": 80, "num_mem_kv": 2},
    )
    official_names: ClassVar[Mapping[str, str | None]] = {r"kmeans\.(.*)": r"router.\1"}

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        num_clusters: int = 16,
        window_size: int | None = None,
        context_window_size: int | None = None,
        causal: bool = False,
        num_mem_kv: int = 0,
        shared_qk: bool = False,
        ema_decay: float = 0.999,
        commitment: float = 1e-4,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(f"{owner}: num_heads={num_heads} must divide dim={dim}")
        for name, number in (
            ("head_dim", head_dim),
            ("num_clusters", num_clusters),
            ("window_size", window_size),
            ("context_window_size", context_window_size),
        ):
            if number is not None and number < 1:
                raise ValueError(f"{owner}: {name}={number} must be at least 1")
        if num_mem_kv < 0:
            raise ValueError(f"{owner}: num_mem_kv={num_mem_kv} must be at least 0")
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"{owner}: ema_decay={ema_decay} is a weight; allowed is 0 to 1")
        factory = {"device": device, "dtype": dtype}
        head_dim = dim // num_heads if head_dim is None else head_dim
        self.num_heads = num_heads
        self.num_clusters = num_clusters
        self.window_size = window_size
        self.context_window_size = context_window_size
        self.causal = causal
        self.shared_qk = shared_qk
        self.num_mem_kv = max(num_mem_kv, int(causal and not shared_qk))
        width = num_heads * head_dim
        self.to_q = Linear(dim, width, bias=False, **factory)
        self.to_k = None if shared_qk else Linear(dim, width, bias=False, **factory)
        self.to_v = Linear(dim, width, bias=False, **factory)
        self.to_out = Linear(width, dim, bias=False, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.router = KmeansRouter(
            num_heads, head_dim, num_clusters, ema_decay, commitment, **factory
        )
        if self.num_mem_kv:
            shape = (num_heads, num_clusters, self.num_mem_kv, head_dim)
            self.mem_key = nn.Parameter(torch.empty(shape, **factory))
            self.mem_value = nn.Parameter(torch.empty(shape, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the memory anew; the layers have their own `reset_parameters`."""
        if self.num_mem_kv:
            nn.init.normal_(self.mem_key)
            nn.init.normal_(self.mem_value)

    @property
    def commitment_loss(self) -> Tensor | None:
        return self.router.commitment_loss

    def route(
        self, query: Tensor, key: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The tokens of every cluster.

        Args:
            query: `(B, N, num_heads, head_dim)`.
            key: `(B, M, num_heads, head_dim)`.
            context: the second map that keys are of, if there is one.

        Returns:
            Indices of queries `(B, num_heads, T, w)` and of keys `(B, num_heads, T, v)`.
        """
        if self.shared_qk:
            index = self._nearest(self.router(query), self.window_size)
            return index, index
        tokens = query.shape[1]
        found = self.router(torch.cat([query, key], 1))
        window = self.window_size
        if context is not None and self.context_window_size is not None:
            window = self.context_window_size
        return (
            self._nearest(found[:, :, :tokens], self.window_size),
            self._nearest(found[:, :, tokens:], window),
        )

    def _nearest(self, similarity: Tensor, window_size: int | None) -> Tensor:
        tokens = similarity.shape[2]
        if window_size is None:
            window_size = (tokens + self.num_clusters - 1) // self.num_clusters
        return similarity.detach().topk(min(window_size, tokens), dim=2).indices.mT

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, routes: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The outputs `(B, N, num_heads, channels)` of these clusters, without projections."""
        memory = None
        if self.num_mem_kv:
            memory = self.mem_key, self.mem_value[..., : value.shape[-1]]
        if self.shared_qk:
            key = F.normalize(key, dim=-1)
        return clustered_attention(
            query,
            key,
            value,
            *routes,
            memory=memory,
            is_causal=self.causal,
            shared_qk=self.shared_qk,
        )

    def _project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if context is not None and (self.causal or self.shared_qk):
            raise ValueError(
                f"{type(self).__name__}: context is defined without causal and shared_qk only"
            )
        source = (x if context is None else context).flatten(1, 2)
        query = self.to_q(x.flatten(1, 2)).unflatten(-1, (self.num_heads, -1))
        value = self.to_v(source).unflatten(-1, (self.num_heads, -1))
        if self.to_k is None:
            return query, query, value
        return query, self.to_k(source).unflatten(-1, (self.num_heads, -1)), value

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        query, key, value = self._project(x, context)
        output = self.attend(query, key, value, self.route(query, key, context))
        return self.proj_drop(self.to_out(output.flatten(-2)).view(x.shape))

    def _attention_map(self, x: Tensor, row: int, column: int) -> Tensor:
        query, key, _ = self._project(x, None)
        routes = self.route(query, key)

        def attend(value: Tensor) -> Tensor:
            output = self.attend(query, key, value.flatten(1, 2), routes)
            return output.unflatten(1, x.shape[1:3])

        return weights_on_values(attend, x, self.num_heads, (row, column))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not self.num_mem_kv:  # official ones hold memories of nothing
            state_dict.pop(prefix + "mem_key", None)
            state_dict.pop(prefix + "mem_value", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_clusters={self.num_clusters}"
