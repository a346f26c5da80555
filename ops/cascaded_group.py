"""Cascaded group attention: every head sees a part of the channels and what the last head gave.

Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention"
(arXiv 2305.07027, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.attention import attention
from vitarium.ops.dense_mixers import LinearNorm
from vitarium.ops.mixer import Mixer
from vitarium.ops.position import kept


class CascadedGroupAttention(Mixer, name="cascaded_group"):
    """Cascaded group attention within windows, the mixer of EfficientViT (MSRA).

    With x_1 ... x_h the channels in `num_heads` equal parts and out_0 = 0, for every head i:

        q, k, v = qkv_i(x_i + out_{i-1})
        out_i = softmax(scale dw_i(q) k^T + bias_i) v
        out = proj(ReLU([out_1, ..., out_h]))

    within each window, where `qkv_i` and `proj` are 1x1 convolutions and `dw_i` a depthwise one,
    all with batch normalisation, and bias_i is a table over the distances of rows and columns. A
    map that windows do not divide is padded with zeros at the bottom and right, which are attended
    to, as in the official code. Cost for N tokens in windows of w x w: with the widths d of queries
    and v = attn_ratio d of values, N (C (2 d + v + num_heads v) + num_heads w^2 (d + v))
    multiply-adds, and the depthwise convolutions.

    Parameters are named as in the official code; state dicts of timm's `CascadedGroupAttention` and
    `LocalWindowAttention` load, too. In `attention_map` a head has its own weights, on what it
    sees: the heads before it are not followed.

    Args:
        dim: number of channels C.
        key_dim: width of queries and keys.
        num_heads: number of heads; divides `dim`.
        attn_ratio: width of values over `key_dim`; it is `dim // num_heads`, which the next head
            adds to its part of the channels, unless there is one head.
        resolution: side of the map that the official code is built for; any map is taken.
        window_resolution: side of the windows; at most `resolution`.
        kernels: sides of the depthwise kernels, one odd number for each head.
        zero_init_last: start the last normalisation at weight 0, for a residual branch.

    Raises:
        ValueError: a width or size is impossible.
    """

    paper = "EfficientViT: Memory Efficient Vision Transformer (arXiv 2305.07027)"
    linear = True
    operator = "attention"
    no_weight_decay = ("attention_biases",)
    official_names: ClassVar[dict[str, str | None]] = {
        r"(attn\.)?(attention_bias_idxs|ab)": None,
        r"(?:attn\.)?((?:qkvs|dws)\.\d+|proj\.1)\.(?:conv|c)\.(\w+)": r"\1.c.\2",
        r"attn\.(.*)": r"\1",
    }
    cost = (
        "N*C*key_dim*(2 + attn_ratio*(1 + num_heads)) "
        "+ N*num_heads*window_resolution**2*key_dim*(1 + attn_ratio) "
        "+ N*key_dim*sum(kernels**2)"
    )
    examples = (
        {"dim": 24, "key_dim": 8, "num_heads": 2, "attn_ratio": 1.5, "window_resolution": 5,
         "kernels": (5, 3), "zero_init_last": False},
        {"dim": 24, "key_dim": 16, "num_heads": 3, "attn_ratio": 0.5, "resolution": 4,
         "kernels": (3, 3, 1), "zero_init_last": False},
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        *,
        key_dim: int,
        num_heads: int = 8,
        attn_ratio: float = 4.0,
        resolution: int = 14,
        window_resolution: int = 7,
        kernels: tuple[int, ...] = (5, 5, 5, 5),
        zero_init_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{owner}: num_heads={num_heads} must divide dim={dim}")
        if key_dim < 1:
            raise ValueError(f"{owner}: key_dim={key_dim} must be at least 1")
        value_dim = int(attn_ratio * key_dim)
        if value_dim < 1 or (num_heads > 1 and value_dim != dim // num_heads):
            raise ValueError(
                f"{owner}: attn_ratio={attn_ratio} makes values {value_dim} wide; allowed is what "
                f"makes them {dim} // {num_heads} = {dim // num_heads} wide (dim, num_heads, "
                f"key_dim={key_dim})"
            )
        sizes = (("resolution", resolution), ("window_resolution", window_resolution))
        for name, size in sizes:
            if size < 1:
                raise ValueError(f"{owner}: {name}={size} must be at least 1")
        if len(kernels) < num_heads or not all(
            isinstance(side, int) and side > 0 and side % 2 for side in kernels
        ):
            raise ValueError(
                f"{owner}: kernels={kernels!r}; allowed are odd numbers, one for each of "
                f"{num_heads} heads"
            )
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.widths = (key_dim, key_dim, value_dim)
        self.window_resolution = min(window_resolution, resolution)
        part = dim // num_heads
        self.qkvs = nn.ModuleList(
            LinearNorm(part, sum(self.widths), **factory) for _ in range(num_heads)
        )
        self.dws = nn.ModuleList(
            DepthwiseNorm(key_dim, side, **factory) for side in kernels[:num_heads]
        )
        last = LinearNorm(value_dim * num_heads, dim, 0.0 if zero_init_last else 1.0, **factory)
        self.proj = nn.Sequential(nn.ReLU(), last)
        self.attention_biases = nn.Parameter(
            torch.empty(num_heads, self.window_resolution**2, **factory)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the bias table to zero; the layers have their own `reset_parameters`."""
        nn.init.zeros_(self.attention_biases)

    def mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        parts = self._windows(x).chunk(self.num_heads, -1)
        bias = self._position_bias()
        outputs: list[Tensor] = []
        for head, (qkv, dw) in enumerate(zip(self.qkvs, self.dws)):
            part = parts[head] + outputs[-1] if outputs else parts[head]
            query, key, value = qkv(part).split(self.widths, -1)
            query = dw(query).unsqueeze(-2)
            key, value = key.unsqueeze(-2), value.unsqueeze(-2)
            output = attention(query, key, value, bias=bias[head, None])
            outputs.append(output.squeeze(-2))
        return self._map(self.proj(torch.cat(outputs, -1)), height, width)

    def _position_bias(self) -> Tensor:
        """The bias of all pairs of a window's tokens, `(num_heads, N, N)`."""
        table = self.attention_biases
        index = _distances(self.window_resolution, table.device)
        if table.device.type == "cpu":
            return table.index_select(1, index.flatten()).unflatten(1, index.shape)
        # A look-up whose derivative is a sum over rows, the same in every run.
        return F.embedding(index, table.T).permute(2, 0, 1)

    def _windows(self, x: Tensor) -> Tensor:
        """The map in windows, `(B * windows, window, window, C)`, padded with zeros."""
        side = self.window_resolution
        below, right = (-length % side for length in x.shape[1:3])
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        if x.shape[1:3] == (side, side):
            return x
        x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))
        return x.transpose(2, 3).flatten(0, 2)

    def _map(self, x: Tensor, height: int, width: int) -> Tensor:
        """The reverse of `_windows`: `(B, H, W, ...)`."""
        side = self.window_resolution
        rows, columns = (-(-length // side) for length in (height, width))
        if rows * columns > 1:
            x = x.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x[:, :height, :width]

    def _followed(self, calls: Sequence[dispatch.Call], wanted: Tensor) -> Tensor:
        size = wanted.shape[-2], wanted.shape[-1]
        windows = self._windows(wanted.movedim(1, -1)).movedim(-1, 1)
        weights = torch.cat([self._weights(call, windows) for call in calls], 1)
        return self._map(weights.movedim(1, -1), *size).movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_resolution={self.window_resolution}"


@kept
def _distances(side: int, device: torch.device) -> Tensor:
    """Index `(N, N)` of every pair of a window's tokens into a table over rows and columns."""
    steps = torch.arange(side, device=device)
    apart = (steps[:, None] - steps).abs()
    return (apart[:, None, :, None] * side + apart[None, :, None, :]).view(side**2, side**2)


class DepthwiseNorm(nn.Sequential):
    """Depthwise convolution `c` and batch normalisation `bn`, on channels-last maps."""

    c: nn.Conv2d
    bn: nn.BatchNorm2d

    def __init__(self, channels: int, kernel_size: int, **factory: Any) -> None:
        convolution = nn.Conv2d(
            channels,
            channels,
            kernel_size,
            padding=kernel_size // 2,
            groups=channels,
            bias=False,
            **factory,
        )
        super().__init__()
        self.add_module("c", convolution)
        self.add_module("bn", nn.BatchNorm2d(channels, **factory))

    def forward(self, input: Tensor) -> Tensor:
        return self.bn(self.c(input.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
