"""Attention whose scores are multiplied by what pairs of positions have learned.

Mao et al., "Towards Robust Vision Transformer" (RVT, arXiv 2105.07926, section 3.5: position-aware
attention scaling).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dense, dispatch
from vitarium.ops.attention import attention
from vitarium.ops.mixer import Mixer, qkv_heads
from vitarium.ops.projection import Linear


class PositionAwareAttention(Mixer, name="position_aware"):
    """Multi-head attention with position-aware scaling, the mixer of RVT.

        q, k, v = qkv(x);  out = proj(softmax(scale (q k^T) * sigmoid(att_mask)) v)

    with a factor for each head and each pair of the tokens of a map of `mask_size`. Like the
    official code, a map of N tokens, no more than those, takes the first N rows and columns; for
    more tokens the table is interpolated bilinearly over both positions of a pair. Cost for N
    tokens: 4 N C^2 for the projections and 2 N^2 C, in multiply-adds; the scores of all heads are
    held in memory.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`.
        qkv_bias: bias of the query, key and value projection.
        qk_scale: factor on the scores; `head_dim ** -0.5` if None.
        use_mask: multiply the scores; without it this is plain attention.
        mask_size: map that the table is for, an int or (H, W).
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or a size is impossible.
    """

    paper = "Towards Robust Vision Transformer (arXiv 2105.07926)"
    operator = "attention"
    no_weight_decay = ("att_mask",)
    cost = "4*N*C**2 + N**2*(2*C + num_heads)"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 32, "num_heads": 2, "mask_size": (9, 12)},
        {"dim": 24, "num_heads": 3, "qkv_bias": True, "mask_size": 5},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        use_mask: bool = True,
        mask_size: int | tuple[int, ...] = 14,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{owner}: num_heads={num_heads} must divide dim={dim}")
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.mask_size = dispatch.per_dimension(owner, "mask_size", mask_size, 2)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.att_mask: nn.Parameter | None = None
        if use_mask:
            tokens = self.mask_size[0] * self.mask_size[1]
            self.att_mask = nn.Parameter(torch.empty(num_heads, tokens, tokens, **factory))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew; the projections have their own `reset_parameters`."""
        if self.att_mask is not None:
            nn.init.trunc_normal_(self.att_mask, std=0.02)

    def mix(self, x: Tensor) -> Tensor:
        query, key, value = qkv_heads(self.qkv, x, self.num_heads)
        if self.att_mask is None:
            output = attention(query, key, value, scale=self.scale)
        else:
            scores = dense.flat(query) * self.scale @ dense.flat(key).mT
            scores = scores * self._factors(x.shape[1], x.shape[2]).sigmoid()
            # No product is left for the operator, whose scores are its bias.
            nothing = torch.zeros_like(query[..., :1])
            output = attention(nothing, nothing, value, bias=scores)
        return self.proj_drop(self.proj(output.flatten(-2)))

    def _factors(self, height: int, width: int) -> Tensor:
        """What the sigmoid is taken of, `(num_heads, N, N)`."""
        table, tokens = self.att_mask, height * width
        assert table is not None
        if tokens <= table.shape[-1]:
            return table[:, :tokens, :tokens]
        for _ in range(2):  # the positions of keys, then those of queries
            maps = table.unflatten(-1, self.mask_size)
            maps = F.interpolate(
                maps.flatten(0, 1)[:, None], (height, width), mode="bilinear", align_corners=False
            )
            table = maps.flatten(1).unflatten(0, (self.num_heads, -1)).mT
        return table

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, use_mask={self.att_mask is not None}"
