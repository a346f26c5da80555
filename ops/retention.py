"""Multi-scale retention: causal linear attention with rotated queries and keys, a decay a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.causal_chunks import count, powers
from vitarium.ops.causal_linear import causal_linear_attention, causal_linear_step
from vitarium.ops.mixer import Mixer
from vitarium.ops.projection import Linear

GATES = {"swish": F.silu, "gelu": F.gelu}
ROWS = 256  # queries whose scores are summed at a time
SMALLEST_SUM, LARGEST_SUM = 1.0, 5e4  # what sums of scores are clamped to


class RetentionState(NamedTuple):
    """What the tokens so far have left: `(B, num_heads, key_dim, value_dim)`, and their number."""

    state: Tensor
    tokens: int


class RetentionAttention(Mixer, name="retention"):
    """Multi-scale retention of RetNet, on a map in raster order as in ViR.

    Head h of 0, 1, ... has the decay r = 1 - 2^(-5 - h). With R_i a rotation of pairs of channels
    by i times their angles, query_i = R_i q_proj(x_i), key_j = R_j k_proj(x_j), d channels a head,

        head_i = RMSNorm(sum_{j <= i} r^(i - j) / sqrt(s_i) (query_i . key_j) / sqrt(d) v_proj(x_j))
        s_i = sum_{j <= i} r^(i - j),  out = out_proj(gate_fn(g_proj(x)) head)

    The map is taken chunk by chunk; `backend("reference")` takes the parallel form and `step` the
    recurrent one, with the same outputs. The official parallel form divides by the sum of a row's
    absolute scores, too, and rounds to float32 before the normalisation (`score_norm`). It changes
    nothing but what the normalisation's epsilon weighs, and costs N^2: no other form can have it.

    Cost for N tokens: N C (2 C + 3 value_dim) for the projections and 2 N C value_dim / num_heads
    in multiply-adds. Parameters are named as in the official code.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim` and `value_dim`, and `dim // num_heads` is even.
        value_dim: channels of all heads' values, `2 * dim`, as in the paper, if None.
        gate_fn: "swish" or "gelu".
        layernorm_eps: epsilon of the heads' normalisation.
        score_norm: the official parallel form to the digit: divide by the sum of a row's absolute
            scores, kept between 1 and 5e4, and normalise heads in float32.

    Raises:
        ValueError: a width is impossible, or `gate_fn` is unknown.
    """

    paper = (
        "Retentive Network: A Successor to Transformer for Large Language Models (arXiv 2307.08621)"
    )
    linear = True
    operator = "causal_linear_attention"
    cost = "8*N*C**2 + 4*N*C**2/num_heads"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 24, "num_heads": 2},
        {"dim": 32, "num_heads": 4, "value_dim": 32, "gate_fn": "gelu", "score_norm": True},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        value_dim: int | None = None,
        gate_fn: Literal["swish", "gelu"] = "swish",
        layernorm_eps: float = 1e-6,
        score_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        value_dim = 2 * dim if value_dim is None else value_dim
        if num_heads < 1 or dim % num_heads or dim // num_heads % 2:
            raise ValueError(f"{owner}: {num_heads=} must divide {dim=} into heads of even width")
        if value_dim < 1 or value_dim % num_heads:
            raise ValueError(f"{owner}: {value_dim=} must be a multiple of {num_heads=}")
        if not layernorm_eps > 0:
            raise ValueError(f"{owner}: {layernorm_eps=} must be positive")
        self.num_heads = num_heads
        self.gate_fn = gate_fn
        self.score_norm = score_norm
        self.scale = (dim // num_heads) ** -0.5
        factory = {"device": device, "dtype": dtype}
        self.q_proj = Linear(dim, dim, bias=False, **factory)
        self.k_proj = Linear(dim, dim, bias=False, **factory)
        self.v_proj = Linear(dim, value_dim, bias=False, **factory)
        self.g_proj = Linear(dim, value_dim, bias=False, **factory)
        self.out_proj = Linear(value_dim, dim, bias=False, **factory)
        width = value_dim // num_heads
        self.group_norm = nn.RMSNorm(width, eps=layernorm_eps, elementwise_affine=False)
        # Constants, for no cast of the module may round them: as official, rounded to float32.
        with torch.device("cpu"):
            logarithms = torch.log(1 - 2.0 ** (-5 - torch.arange(num_heads, dtype=torch.float32)))
            self.decay = tuple(logarithms.double().exp().tolist())
            place = torch.linspace(0, 1, dim // num_heads // 2)
            self.angle = tuple((1 / 10000**place).double().tolist())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, those of the input layers small."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=0.5)

    def _heads(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `(B, N, num_heads, channels)` of tokens, `first` that of the first.

        Channels of queries and keys come in another order, in which pairs lie apart.
        """
        places = count(x.shape[1], x.device, first)
        query, key, value = (
            layer(x).unflatten(-1, (self.num_heads, -1))
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        angles = places[:, None] * places.new_tensor(self.angle)
        cos, sin = (table[:, None].to(query.dtype) for table in (angles.cos(), angles.sin()))
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
        factor = self._sums(places).rsqrt()
        return query * factor[..., None].to(query.dtype), key, value

    def _sums(self, places: Tensor) -> Tensor:
        """Sum of the decays that a token of each place gives itself and all before it."""
        tokens = places[:, None] + 1
        base = places.new_tensor(self.decay)
        logarithm = base.log()
        sums = torch.expm1(tokens * logarithm) / torch.expm1(logarithm)
        return torch.where(base < 1, sums, tokens)

    @torch.no_grad()
    def _score_sums(self, query: Tensor, key: Tensor) -> Tensor:
        """`(B, N, num_heads)`: the sum of every query's absolute scores."""
        query, key = query.transpose(1, 2) * self.scale, key.transpose(1, 2)
        if torch.compiler.is_compiling() or dispatch.plain_aten():  # no loop over unknown sizes
            return self._absolute_sums(query, key, 0).transpose(1, 2)
        found = []
        for block, rows in enumerate(query.split(ROWS, 2)):
            first = block * ROWS
            seen = key[:, :, : first + rows.shape[2]]
            found.append(self._absolute_sums(rows, seen, first))
        return torch.cat(found, -1).transpose(1, 2)

    def _absolute_sums(self, query: Tensor, key: Tensor, first: int) -> Tensor:
        """`(B, num_heads, queries)`; `first` is the number of the first query."""
        places = count(key.shape[2], key.device)
        distance = places[first:, None] - places
        decays = powers(self.decay, distance.clamp(min=0)).tril(first)
        return ((query @ key.mT).abs() * decays.to(query.dtype)).sum(-1)

    def _combine(self, x: Tensor, heads: Tensor) -> Tensor:
        gate = GATES[self.gate_fn](self.g_proj(x))
        normed = self.group_norm(heads.float() if self.score_norm else heads)
        return self.out_proj(gate * normed.to(heads.dtype).flatten(-2))

    def mix(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        query, key, value = self._heads(tokens, 0)
        if self.score_norm:
            sums = self._score_sums(query, key).clamp(SMALLEST_SUM, LARGEST_SUM)
            query = query / sums[..., None].to(query.dtype)
        heads = causal_linear_attention(query, key, value, decay=self.decay, scale=self.scale)
        return self._combine(tokens, heads).view(x.shape)

    def step(self, x: Tensor, state: RetentionState | None = None) -> tuple[Tensor, RetentionState]:
        """The recurrent form: the output at one more token, in constant time and memory.

        Args:
            x: `(B, C)`, the next token in raster order.
            state: what the step before returned; None at the first token.

        Returns:
            Output `(B, C)`, and the state for the next token.

        Raises:
            ValueError: the mixer is made with `score_norm`, which needs all keys.
        """
        if self.score_norm:
            raise ValueError("RetentionAttention: step is not defined with score_norm=True")
        past, first = (None, 0) if state is None else state
        query, key, value = (heads[:, 0] for heads in self._heads(x[:, None], first))
        heads, following = causal_linear_step(
            query, key, value, past, decay=self.decay, scale=self.scale
        )
        return self._combine(x, heads), RetentionState(following, first + 1)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, gate_fn={self.gate_fn}, score_norm={self.score_norm}"


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbouring channels, turned; first all first ones, then all second ones."""
    first, second = x[..., ::2], x[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
