"""Lightning attention of TransNormer: causal linear attention, a gate, and fixed decays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops.causal_linear import causal_linear_attention, causal_linear_step
from vitarium.ops.mixer import Mixer
from vitarium.ops.projection import Linear


def lightning_slopes(num_heads: int) -> list[float]:
    """The slope s of every head, whose decay is exp(-s): 2^(-8 h / num_heads) for h = 1, 2, ...

    Press et al., "Train Short, Test Long" (arXiv 2108.12409). For n heads that are no power of two,
    with p the largest one below: the slopes of p heads, then every second one of 2 p heads.

    Raises:
        ValueError: there is no head.
    """
    if num_heads < 1:
        raise ValueError(f"lightning_slopes: num_heads={num_heads} must be at least 1")
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    if power < num_heads:
        slopes += lightning_slopes(2 * power)[::2][: num_heads - power]
    return slopes


class SimpleRMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps), without weights (TransNormerLLM, arXiv 2307.14995, section 3.4).

    Args:
        dim: number of channels, the last dimension.
        eps: keeps the root from zero.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=False)


ROUNDED = 1024  # tokens


class LightningAttention(Mixer, name="lightning"):
    """Lightning attention, the mixer of TransNormer, on a map in raster order.

    With SiLU activations of q_proj, k_proj and v_proj, and for head h of layer l of L the decay
    r = exp(-slope_h (1 - l / (L - 1) + 1e-5)), slopes of `lightning_slopes`:

        head_i = sum_{j <= i} r^(i - j) (query_i . key_j) value_j
        out = o_proj(norm(head) sigmoid(output_gate(x)))

    with a gate of two linear layers and a normalisation over all heads. The map is taken chunk by
    chunk; `backend("reference")` takes the parallel form and `step` the recurrent one. Cost for N
    tokens: 4 N C^2 + 2 N C^2 / num_heads for the projections and the gate, and 2 N C^2 / num_heads
    for the heads, in multiply-adds. Parameters are named as in the official code.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`.
        bias: of all linear layers.
        norm_type: "layernorm", or "simplermsnorm", as in TransNormerLLM.
        layer_idx: the layer l, 0 ... num_layers - 1: decays are slower in later ones.
        num_layers: the number of layers L.
        float32_exponents: round the exponents slope (i - j) to float32 as the official code does,
            which moves outputs by some 1e-8. There is only a parallel form of it, with N^2 scores.
            None does so where it shows and costs little: in float64, up to 1,024 tokens.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or there is no such layer or norm.
    """

    paper = (
        "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large "
        "Language Models (arXiv 2401.04658)"
    )
    linear = True
    operator = "causal_linear_attention"
    cost = "4*N*C**2 + 4*N*C**2/num_heads"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 24, "num_heads": 3, "layer_idx": 2},
        {"dim": 32, "num_heads": 2, "bias": True, "norm_type": "simplermsnorm", "layer_idx": 11},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        bias: bool = False,
        norm_type: Literal["layernorm", "simplermsnorm"] = "layernorm",
        layer_idx: int = 0,
        num_layers: int = 12,
        float32_exponents: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{owner}: {num_heads=} must divide {dim=}")
        if num_layers < 1:
            raise ValueError(f"{owner}: {num_layers=} must be at least 1")
        if not 0 <= layer_idx < num_layers:
            raise ValueError(f"{owner}: {layer_idx=} must be between 0 and {num_layers=} - 1")
        self.num_heads = num_heads
        self.float32_exponents = float32_exponents
        factory = {"device": device, "dtype": dtype}
        self.q_proj = Linear(dim, dim, bias=bias, **factory)
        self.k_proj = Linear(dim, dim, bias=bias, **factory)
        self.v_proj = Linear(dim, dim, bias=bias, **factory)
        self.o_proj = Linear(dim, dim, bias=bias, **factory)
        if norm_type == "layernorm":
            self.norm: nn.Module = nn.LayerNorm(dim, **factory)
        else:
            self.norm = SimpleRMSNorm(dim)
        width = dim // num_heads
        self.output_gate = nn.Sequential(
            Linear(dim, width, bias=bias, **factory), Linear(width, dim, bias=bias, **factory)
        )
        # Constants, for no cast of the module may round them: as official, rounded to float32.
        with torch.device("cpu"):
            slopes = torch.tensor(lightning_slopes(num_heads), dtype=torch.float32)
            slopes = slopes * (1 - layer_idx / max(num_layers - 1, 1) + 1e-5)
        self.slopes = tuple(slopes.tolist())
        self.decay = tuple(math.exp(-slope) for slope in self.slopes)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `(..., num_heads, head_dim)`."""
        query, key, value = (
            F.silu(layer(x)).unflatten(-1, (self.num_heads, -1))
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value

    def _combine(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.o_proj(self.norm(heads.flatten(-2)) * torch.sigmoid(self.output_gate(x)))

    def mix(self, x: Tensor) -> Tensor:
        heads, rounded = self._heads(x), self.float32_exponents
        if rounded is None:
            rounded = x.dtype == torch.float64 and x.shape[1] * x.shape[2] <= ROUNDED
        if rounded:
            return self._combine(x, self._rounded(*heads))
        return self._combine(x, causal_linear_attention(*heads, decay=self.decay))

    def _rounded(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The parallel form with exponents rounded to float32, `(B, H, W, num_heads, head_dim)`."""
        q, k, v = (tensor.flatten(1, 2).transpose(1, 2) for tensor in (query, key, value))
        place = torch.arange(q.shape[2], dtype=torch.float32, device=q.device)
        slopes = torch.tensor(self.slopes, dtype=torch.float32, device=q.device)
        exponents = slopes[:, None, None] * (place[:, None] - place).clamp(min=0)
        decays = torch.exp(-exponents.to(q.dtype)).tril()
        return (q @ k.mT * decays @ v).transpose(1, 2).unflatten(1, query.shape[1:3])

    def _attention_map(self, x: Tensor, row: int, column: int) -> Tensor:
        """The map does not depend on how exponents are rounded."""
        rounded, self.float32_exponents = self.float32_exponents, False
        try:
            return super()._attention_map(x, row, column)
        finally:
            self.float32_exponents = rounded

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The recurrent form: the output at one more token, in constant time and memory.

        Args:
            x: `(B, C)`, the next token in raster order.
            state: what the step before returned; None at the first token.

        Returns:
            Output `(B, C)`, and the state for the next token.

        Raises:
            ValueError: the mixer was made with `float32_exponents=True`.
        """
        if self.float32_exponents:
            raise ValueError(
                f"{type(self).__name__}: step is not defined with float32_exponents=True"
            )
        heads, following = causal_linear_step(*self._heads(x), state, decay=self.decay)
        return self._combine(x, heads), following

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
