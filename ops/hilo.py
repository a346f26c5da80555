"""HiLo attention: heads in tiny windows for what is near, heads on pooled keys for the rest.

Pan et al., "Fast Vision Transformers with HiLo Attention" (LITv2, arXiv 2205.13213). The heads of
either kind are those of operators that exist: `window_attention` and `attention`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.attention import attention
from vitarium.ops.mixer import Mixer, pad_map, qkv_heads, spread
from vitarium.ops.projection import Linear
from vitarium.ops.window import window_attention


class HiLoAttention(Mixer, name="hilo"):
    """HiLo attention, the mixer of LITv2.

    Of `num_heads` heads, l = int(num_heads * alpha) attend to means of the map's cells of s x s
    tokens (low frequencies), the others within windows of s x s tokens (high frequencies). With
    P(x) the map of means:

        hifi = h_proj(attention(h_qkv(x)) within each window)
        lofi = l_proj(attention(l_q(x), l_kv(P(x))))
        out = [hifi, lofi]

    A map that s does not divide is padded with zeros at the bottom and right before the
    projections; they are attended to and averaged like any token, as in the official code for
    dense prediction. With s = 1 all heads attend to the whole map. Cost for N tokens, a share a of
    the heads being low: N C^2 (3 - 2 a (1 - 1 / s^2) + a^2 + (1 - a)^2) for the projections and
    2 N C (a N / s^2 + (1 - a) s^2) of the attention, in multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads of both kinds together; divides `dim`.
        window_size: side s of windows and cells.
        alpha: share of low-frequency heads, 0 to 1.
        qkv_bias: biases of the query, key and value projections.
        qk_scale: factor on the scores; `head_dim ** -0.5` if None.
        proj_drop: dropout rate after the output projections.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `window_size` or `alpha` is impossible.
    """

    paper = "Fast Vision Transformers with HiLo Attention (arXiv 2205.13213)"
    operator = "window_attention"
    cost = (
        "N*C**2*(3 - 2*alpha*(1 - 1/window_size**2) + alpha**2 + (1 - alpha)**2) "
        "+ 2*N*C*(alpha*N/window_size**2 + (1 - alpha)*window_size**2)"
    )
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 32, "num_heads": 4, "alpha": 0.5, "qkv_bias": True},
        {"dim": 24, "num_heads": 3, "window_size": 3, "alpha": 0.9},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        window_size: int = 2,
        alpha: float = 0.5,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"HiLoAttention: num_heads={num_heads} must divide dim={dim}")
        if window_size < 1:
            raise ValueError(f"HiLoAttention: window_size={window_size} must be at least 1")
        if not 0 <= alpha <= 1:
            raise ValueError(f"HiLoAttention: alpha={alpha} is a share; allowed is 0 to 1")
        factory = {"device": device, "dtype": dtype}
        head_dim = dim // num_heads
        self.window_size = window_size
        self.l_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.h_heads = num_heads - self.l_heads
        self.scale = head_dim**-0.5 if qk_scale is None else qk_scale
        if self.l_heads:
            width = self.l_heads * head_dim
            self.l_q = Linear(dim, width, bias=qkv_bias, **factory)
            self.l_kv = Linear(dim, 2 * width, bias=qkv_bias, **factory)
            self.l_proj = Linear(width, width, **factory)
        if self.h_heads:
            width = self.h_heads * head_dim
            self.h_qkv = Linear(dim, 3 * width, bias=qkv_bias, **factory)
            self.h_proj = Linear(width, width, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        padded = pad_map(x, [-length % self.window_size for length in (height, width)])
        found = []
        if self.h_heads:
            found.append(self._near(padded)[:, :height, :width])
        if self.l_heads:
            found.append(self._far(x, padded))
        return self.proj_drop(found[0] if len(found) == 1 else torch.cat(found, -1))

    def _near(self, x: Tensor) -> Tensor:
        """What the high-frequency heads make of a map that windows fill."""
        query, key, value = qkv_heads(self.h_qkv, x, self.h_heads)
        output = window_attention(query, key, value, self.window_size, scale=self.scale)
        return self.h_proj(output.flatten(-2))

    def _far(self, x: Tensor, padded: Tensor) -> Tensor:
        """What the low-frequency heads make of a map and of the cells of the padded one."""
        query = self.l_q(x).unflatten(-1, (self.l_heads, -1))
        key_value = self.l_kv(self._pooled(padded)).unflatten(-1, (2, self.l_heads, -1))
        key, value = key_value.unbind(-3)
        return self.l_proj(attention(query, key, value, scale=self.scale).flatten(-2))

    def _pooled(self, x: Tensor) -> Tensor:
        """Means of cells, `(B, H / s, W / s, C)`."""
        if self.window_size == 1:
            return x
        return F.avg_pool2d(x.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)

    def _followed(self, calls: Sequence[dispatch.Call], wanted: Tensor) -> Tensor:
        found = []
        for call in calls:
            if call.operator == "window_attention" or self.window_size == 1:
                found.append(self._weights(call, wanted))
            else:  # a key is a cell
                cells = self._key_weights(call, wanted)
                found.append(spread(cells, self.window_size, wanted.shape[-2:]))
        return torch.cat(found, 1)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, h_heads={self.h_heads}, l_heads={self.l_heads}"
