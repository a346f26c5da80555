"""Mixers of linear attention: plain, and focused as in FLatten Transformer.

Katharopoulos et al., "Transformers are RNNs" (arXiv 2006.16236); Han et al., "FLatten Transformer:
Vision Transformer using Focused Linear Attention" (arXiv 2308.00442).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.inline_mixers import JointProjection
from vitarium.ops.linear import NAME, NORMALIZATIONS, FeatureMap, linear_attention
from vitarium.ops.linear_features import FEATURE_MAPS
from vitarium.ops.mixer import Mixer, pad_map, qkv_heads
from vitarium.ops.partition import InWindows, Pair, window_and_shift
from vitarium.ops.projection import Linear, plain


def _check_heads(owner: str, dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{owner}: num_heads={num_heads} must divide dim={dim}")


class LinearAttention(Mixer, name="linear"):
    """Linear attention over a whole map, with any feature map and normalisation.

        q, k, v = qkv(x);  out = proj(sum_j w_ij v_j),  w_ij of phi(q_i) phi(k_j)

    normalised as `vitarium.ops.linear_attention` says. Cost for N tokens: 4 N C^2 + 2 N C head_dim
    multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`.
        feature_map: phi, "elu", "relu", "leaky_relu", "identity", "focused" or a function.
        normalization: "sum", "injective" or "none".
        qkv_bias: bias of the query, key and value projection.
        qk_scale: factor on the products of features; `head_dim ** -0.5` if None.
        eps: added to the mean of a query's weights, for "sum".
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or a name is unknown.
    """

    paper = "Transformers are RNNs (arXiv 2006.16236)"
    operator = NAME
    linear = True
    cross = True
    cost = "4*N*C**2 + 2*N*C**2/num_heads"
    examples = (
        {"dim": 32, "num_heads": 2},
        {"dim": 32, "num_heads": 4, "feature_map": "focused", "normalization": "injective"},
        {"dim": 24, "num_heads": 2, "feature_map": torch.sigmoid, "qkv_bias": True},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        feature_map: FeatureMap = "elu",
        normalization: str = "sum",
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        eps: float = 1e-6,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner, factory = type(self).__name__, {"device": device, "dtype": dtype}
        _check_heads(owner, dim, num_heads)
        if not callable(feature_map) and feature_map not in FEATURE_MAPS:
            allowed = ", ".join(map(repr, FEATURE_MAPS))
            raise ValueError(
                f"{owner}: feature_map={feature_map!r} is unknown; allowed are {allowed} or a "
                "function"
            )
        if normalization not in NORMALIZATIONS:
            allowed = ", ".join(map(repr, NORMALIZATIONS))
            raise ValueError(
                f"{owner}: normalization={normalization!r} is unknown; allowed are {allowed}"
            )
        if not 0 <= eps < math.inf:
            raise ValueError(f"{owner}: eps={eps} must be at least 0 and finite")
        self.num_heads, self.feature_map, self.normalization = num_heads, feature_map, normalization
        self.scale, self.eps = qk_scale, eps
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        query, key, value = qkv_heads(self.qkv, x, self.num_heads, context)
        output = linear_attention(
            query,
            key,
            value,
            feature_map=self.feature_map,
            normalization=self.normalization,
            scale=self.scale,
            eps=self.eps,
        )
        return self.proj_drop(self.proj(output.flatten(-2)))

    def extra_repr(self) -> str:
        """The number of heads, the feature map and the normalisation."""
        name = self.feature_map
        name = getattr(name, "__name__", name)
        return f"num_heads={self.num_heads}, {name}, normalization={self.normalization!r}"


class FocusedLinearAttention(JointProjection, Mixer, name="focused_linear"):
    """Focused linear attention over a whole map, as in FLatten-PVT.

        q, k, v = qkv(x), k with a learned positional encoding;
        out = proj(sum_j phi(q_i) phi(k_j) v_j / (sum_j phi(q_i) phi(k_j)) + dwc(v)_i)

    with phi(x) = |x'| x'^p / |x'^p| of x' = (ReLU(x) + 1e-6) / softplus(scale), norms over all
    channels of a token, and dwc a depthwise convolution that all heads share. On another map than
    `num_patches` the encoding is interpolated. Official state dicts load. Cost for N tokens: 4 N
    C^2 + 2 N C head_dim + N kernel_size^2 C multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`.
        num_patches: tokens of the map that the encoding is of, a square number, or (H, W).
        qkv_bias: bias of the query, key and value projection.
        sr_ratio: keys and values are made of a map pooled by a convolution of that size and
            stride, then layer-normalised; for dwc the values are interpolated along the row of
            tokens. A map that it does not divide is padded with zeros for the convolution.
        focusing_factor: p, positive.
        kernel_size: of dwc, odd.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or an argument is out of range.
    """

    paper = "FLatten Transformer (arXiv 2308.00442)"
    operator = NAME
    linear = True
    no_weight_decay = ("positional_encoding", "scale")
    cost = "4*N*C**2 + 2*N*C**2/num_heads + kernel_size**2*N*C"
    examples = (
        {"dim": 32, "num_heads": 4, "num_patches": 49},
        {"dim": 24, "num_heads": 2, "num_patches": (4, 5), "focusing_factor": 4, "kernel_size": 3},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        num_patches: int | tuple[int, int] = 196,
        qkv_bias: bool = False,
        sr_ratio: int = 1,
        focusing_factor: float = 3,
        kernel_size: int = 5,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner, factory = type(self).__name__, {"device": device, "dtype": dtype}
        _check_heads(owner, dim, num_heads)
        if isinstance(num_patches, int):
            side = math.isqrt(max(0, num_patches))
            map_size = (side, num_patches // max(1, side))
        else:
            map_size = dispatch.per_dimension(owner, "num_patches", num_patches, 2)
        if sr_ratio < 1:
            raise ValueError(f"{owner}: sr_ratio={sr_ratio} must be at least 1")
        self.encoding_size = tuple(length // sr_ratio for length in map_size)
        if isinstance(num_patches, int) and math.prod(map_size) != num_patches:
            raise ValueError(f"{owner}: num_patches={num_patches} is no square; give (H, W)")
        if min(self.encoding_size) < 1:
            raise ValueError(
                f"{owner}: num_patches={num_patches!r} is no map of at least sr_ratio={sr_ratio} "
                "tokens a side"
            )
        if not 0 < focusing_factor < math.inf:
            raise ValueError(f"{owner}: focusing_factor={focusing_factor} must be positive")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"{owner}: kernel_size={kernel_size} must be odd")
        self.num_heads, self.sr_ratio, self.focusing_factor = num_heads, sr_ratio, focusing_factor
        head_dim = dim // num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, **factory)
            self.norm = nn.LayerNorm(dim, **factory)
        self.dwc = nn.Conv2d(
            head_dim, head_dim, kernel_size, padding=kernel_size // 2, groups=head_dim, **factory
        )
        self.scale = nn.Parameter(torch.empty(1, 1, dim, **factory))
        tokens = math.prod(self.encoding_size)
        self.positional_encoding = nn.Parameter(torch.empty(1, tokens, dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the bare parameters anew; the layers have their own `reset_parameters`."""
        nn.init.zeros_(self.scale)
        nn.init.zeros_(self.positional_encoding)

    def _encoding(self, size: Pair) -> Tensor:
        """The positional encoding of a map, `(1, H, W, num_heads, head_dim)`."""
        encoding = self.positional_encoding.unflatten(1, self.encoding_size)
        if tuple(size) != self.encoding_size:
            encoding = F.interpolate(encoding.permute(0, 3, 1, 2), size, mode="bilinear")
            encoding = encoding.permute(0, 2, 3, 1)
        return encoding.unflatten(-1, (self.num_heads, -1))

    def _pooled(self, x: Tensor) -> Tensor:
        lack = [-length % self.sr_ratio for length in x.shape[1:3]]
        x = pad_map(x, lack)
        return self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def _local(self, value: Tensor, size: Pair) -> Tensor:
        """The depthwise branch of a map of values, `(B, H, W, C)`."""
        if self.sr_ratio > 1:
            tokens = value.flatten(-2).flatten(1, 2).transpose(1, 2)
            tokens = F.interpolate(tokens, size[0] * size[1], mode="linear")
            channels = tokens.unflatten(-1, size)
        else:
            channels = value.flatten(-2).permute(0, 3, 1, 2)
        if not plain(self.dwc, nn.Conv2d):  # heads as images
            found = self.dwc(channels.unflatten(1, (self.num_heads, -1)).flatten(0, 1))
            return found.unflatten(0, (-1, self.num_heads)).flatten(1, 2).permute(0, 2, 3, 1)
        weight = self.dwc.weight.repeat(self.num_heads, 1, 1, 1)
        bias = None if self.dwc.bias is None else self.dwc.bias.repeat(self.num_heads)
        found = F.conv2d(channels, weight, bias, padding=self.dwc.padding, groups=len(weight))
        return found.permute(0, 2, 3, 1)

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        size = (x.shape[1], x.shape[2])
        pooled = self._pooled(x) if self.sr_ratio > 1 else None
        query, key, value = qkv_heads(self.qkv, x, self.num_heads, pooled)
        output = linear_attention(
            query,
            key + self._encoding((key.shape[1], key.shape[2])),
            value,
            feature_map="focused",
            focusing_factor=self.focusing_factor,
            temperature=F.softplus(self.scale).view(self.num_heads, -1),
            scale=1.0,
        )
        output = output.flatten(-2) + self._local(value, size)
        return self.proj_drop(self.proj(output))

    def attention_map(self, x: Tensor, query: tuple[int, int]) -> Tensor:
        if self.sr_ratio > 1:
            raise NotImplementedError(
                f"{type(self).__name__}: with sr_ratio={self.sr_ratio} keys are no positions of "
                "the map"
            )
        return super().attention_map(x, query)

    def extra_repr(self) -> str:
        """The number of heads, the power and the pooling."""
        return (
            f"num_heads={self.num_heads}, focusing_factor={self.focusing_factor}, "
            f"sr_ratio={self.sr_ratio}"
        )


class FocusedLinearWindowAttention(InWindows, FocusedLinearAttention, name="focused_linear_window"):
    """Focused linear attention within windows of the map, as in FLatten-Swin.

        out = proj(sum_j phi(q_i) phi(k_j) v_j / (sum_j phi(q_i) phi(k_j)) + dwc(v)_i)

    within each window, see `FocusedLinearAttention`. A map at most as long as the window along a
    dimension is one window there, without shift; one that windows do not divide is padded with
    zeros at the bottom and right, which are attended to. A shifted window is not masked, as in the
    official code. Cost for N tokens: 4 N C^2 + 2 N C head_dim + N kernel_size^2 C multiply-adds.

    Args:
        dim, num_heads, qkv_bias, focusing_factor, kernel_size, proj_drop: as in
            `FocusedLinearAttention`.
        window_size: the window, a length or one per dimension (H, W).
        shift_size: tokens that the windows are shifted by, a number or one per dimension.

    Raises:
        ValueError: as in `FocusedLinearAttention`, or a size is impossible.
    """

    cost = "4*N*C**2 + 2*N*C**2/num_heads + kernel_size**2*N*C"
    examples = (
        {"dim": 32, "num_heads": 4, "window_size": 7},
        {"dim": 24, "num_heads": 2, "window_size": (4, 5), "shift_size": 2},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        window_size: int | Pair = 7,
        shift_size: int | Pair = 0,
        qkv_bias: bool = True,
        focusing_factor: float = 3,
        kernel_size: int = 5,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size, shift = window_and_shift(type(self).__name__, window_size, shift_size)
        super().__init__(
            dim,
            num_heads=num_heads,
            num_patches=size,
            qkv_bias=qkv_bias,
            focusing_factor=focusing_factor,
            kernel_size=kernel_size,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )
        self.window_size, self.shift_size = size, shift
