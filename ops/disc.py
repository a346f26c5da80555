"""Disc attention: every token attends to the tokens less than a radius away.

Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up" (arXiv
2412.16112). A sliding window with a mask over offsets, hence a module over `window_attention`, and
with pooled tokens one over `aggregated_attention`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.aggregated import aggregated_attention
from vitarium.ops.mixer import Mixer, qkv_heads
from vitarium.ops.position import kept
from vitarium.ops.projection import Linear
from vitarium.ops.window import window_attention
from vitarium.ops.window_mixers import check_context

# Added to the scores outside of the disc: their weights are zeros in every dtype, and half
# precision still holds the sum. Infinity would leave queries that pad a tile without any key.
HIDDEN = -30000.0


@kept
def _disc(radius: int, device: torch.device) -> Tensor:
    """0 for offsets inside of the disc, else `HIDDEN`: `(2 * radius - 1, 2 * radius - 1)`."""
    offset = torch.arange(1 - radius, radius, device=device)
    outside = offset[:, None].square() + offset.square() >= radius**2
    return torch.zeros(outside.shape, device=device).masked_fill(outside, HIDDEN)


class DiscAttention(Mixer, name="disc"):
    """Attention to the disc around each token, and optionally to all tokens of a pooled map.

        q, k, v = qkv(x);  out = proj(softmax(scale q k^T + bias) v)

    over the keys at a squared distance dy^2 + dx^2 < radius^2, as far as they lie on the map, and,
    with `down_factor`, over keys and values summed over blocks of tokens with learned weights. Cost
    for N tokens: 4 N C^2 for the projections and 2 N (2 radius - 1)^2 C of the square around the
    disc, whose corners are masked, in multiply-adds; N / down_factor^2 more keys where pooled.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`.
        radius: of the disc in tokens; CLEAR's `window_size`.
        rel_pos_bias: learn a bias of every offset in the disc, for each head.
        down_factor: side of the blocks that are pooled to one key, None for no pooled keys. Blocks
            at the border of the map may be cut off; what is missing counts as zeros.
        qkv_bias: bias of the query, key and value projection.
        qk_scale: factor on the scores; `head_dim ** -0.5` if None.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or a size is impossible.
    """

    paper = "CLEAR (arXiv 2412.16112)"
    linear = True
    operator = "window_attention"
    cross = True
    no_weight_decay = ("rpb",)
    cost = "4*N*C**2 + 2*N*(2*radius - 1)**2*C"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 24, "num_heads": 2, "radius": 3, "rel_pos_bias": True},
        {"dim": 24, "num_heads": 2, "radius": 2, "down_factor": 4},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        radius: int = 8,
        rel_pos_bias: bool = False,
        down_factor: int | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"DiscAttention: num_heads={num_heads} must divide dim={dim}")
        for name, size in (("radius", radius), ("down_factor", down_factor)):
            if size is not None and size < 1:
                raise ValueError(f"DiscAttention: {name}={size} must be at least 1")
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.radius = radius
        self.down_factor = down_factor
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        side = 2 * radius - 1
        self.rpb = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, side, side, **factory))
        self.spatial_weight = None
        if down_factor is not None:
            self.spatial_weight = nn.Parameter(torch.empty(down_factor, down_factor, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bare parameters anew; the projections have their own `reset_parameters`."""
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)
        if self.spatial_weight is not None:
            nn.init.constant_(self.spatial_weight, 1 / self.spatial_weight.numel())

    def position_bias(self) -> Tensor:
        """Mask and bias of every key minus query, `(num_heads, 2 * radius - 1, 2 * radius - 1)`."""
        mask = _disc(self.radius, self.proj.weight.device)
        if self.rpb is None:
            return mask.expand(self.num_heads, -1, -1)
        return self.rpb + mask.to(self.rpb.dtype)

    def pool(self, x: Tensor) -> Tensor:
        """Weighted sums of the blocks of `(B, H, W, heads, channels)`: `(B, blocks, ...)`.

        Raises:
            ValueError: there is no `down_factor`.
        """
        weight = self.spatial_weight
        if weight is None:
            raise ValueError("DiscAttention: without down_factor there is nothing to pool")
        height, width = x.shape[1:3]
        factor = len(weight)
        padded = F.pad(x, (0, 0, 0, 0, 0, -width % factor, 0, -height % factor))
        blocks = padded.unflatten(2, (-1, factor)).unflatten(1, (-1, factor))
        weight = weight[:, None, :, None, None].to(x.dtype)
        return (blocks * weight).sum((2, 4)).flatten(1, 2)

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_context(self, x, context)
        query, key, value = qkv_heads(self.qkv, x, self.num_heads, context)
        bias = self.position_bias()
        if self.down_factor is None:
            output = window_attention(
                query, key, value, 1, halo=self.radius - 1, bias=bias, scale=self.scale
            )
        else:
            output = aggregated_attention(
                query,
                key,
                value,
                self.pool(key),
                self.pool(value),
                2 * self.radius - 1,
                bias=bias.flatten(1),
                scale=self.scale,
            )
        return self.proj_drop(self.proj(output.flatten(-2)))

    def _weights(self, call: dispatch.Call, wanted: Tensor) -> Tensor:
        if self.down_factor is None:
            return super()._weights(call, wanted)
        query, key, value, pooled_key, _, *rest = call.args
        with torch.enable_grad():
            value = torch.ones_like(value[..., :1]).requires_grad_()
            run = call.implementations["reference"].run
            output = run(query, key, value, pooled_key, self.pool(value), *rest)
        wanted = wanted.movedim(1, -1)[..., None].expand_as(output)
        (weights,) = torch.autograd.grad(output, value, wanted)
        return weights[..., 0].movedim(-1, 1)

    def extra_repr(self) -> str:
        parts = [f"num_heads={self.num_heads}", f"radius={self.radius}"]
        return ", ".join(parts + [f"down_factor={self.down_factor}"] * bool(self.down_factor))
