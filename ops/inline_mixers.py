"""InLine attention: linear attention that is injective, with a dynamic local residual.

Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention" (arXiv 2412.06590). Of
N tokens with queries q_i, keys k_j and values v_j of a head,

    attention_i = mean_j (1 + scale (q_i k_j - mean_l q_i k_l)) v_j
    residual_i = sum over the 3x3 neighbors n of i of r_n v_n,  r = MLP(mean token)

where r has nine weights for every channel and image. Weights of the first sum to one. Cost of both:
2 N C head_dim + 9 N C multiply-adds for C channels. The official code drops no attention weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.linear import NAME, FeatureMap, linear_attention
from vitarium.ops.mixer import Mixer, qkv_heads
from vitarium.ops.partition import InWindows, Pair, Partition, window_and_shift
from vitarium.ops.projection import Linear

PAPER = "InLine attention (arXiv 2412.06590)"

KernelFunction = Literal["identity", "relu", "leakyrelu", "exp"]


def _exponential(x: Tensor) -> Tensor:
    return torch.exp(0.2 * x)


SMALL = 1 << 14  # elements of an image from which on it is worth a call of its own

FEATURES: Mapping[str, FeatureMap] = {
    "identity": "identity",
    "relu": "relu",
    "leakyrelu": "leaky_relu",
    "exp": _exponential,
}


def _check_heads(owner: str, dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{owner}: num_heads={num_heads} must divide dim={dim}")


def _residual(dim: int, num_heads: int, factory: dict[str, Any]) -> nn.Sequential:
    """The network of the residual's weights, one for every head."""
    return nn.Sequential(
        nn.Conv1d(dim, dim, 1, groups=num_heads, **factory),
        nn.GELU(),
        nn.Conv1d(dim, 9 * dim, 1, groups=num_heads, **factory),
    )


def dynamic_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise 3x3 convolution of every image with weights of its own, zeros around the map.

    Args:
        x: `(B, H, W, C)`.
        weight: `(B, C, 9)`, taps in raster order.

    Returns:
        `(B, H, W, C)`.
    """
    if _one_by_one(x):
        return torch.stack(list(_convolved(x, weight)))
    # A convolution's groups are a constant in ONNX, batches need not be.
    if dispatch.exporting() and not torch.jit.is_tracing():
        height, width = x.shape[1:3]
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        shifts = [(row, column) for row in range(3) for column in range(3)]
        return torch.stack(
            [
                padded[:, row : row + height, column : column + width] * tap[:, None, None]
                for (row, column), tap in zip(shifts, weight.unbind(-1))
            ]
        ).sum(0)
    batch, channels = weight.shape[:2]
    if batch == 0:  # nor are there convolutions without groups
        return x * weight[:, None, None, :, 0]
    images = x.permute(0, 3, 1, 2).reshape(1, batch * channels, *x.shape[1:3])
    kernels = weight.reshape(batch * channels, 1, 3, 3)
    found = F.conv2d(images, kernels, padding=1, groups=batch * channels)
    return found.view(batch, channels, *x.shape[1:3]).permute(0, 2, 3, 1)


def _one_by_one(x: Tensor) -> bool:
    """Whether images are convolved one after the other, several times faster on a CPU."""
    if torch.compiler.is_compiling() or dispatch.plain_aten():
        return False
    return x.device.type == "cpu" and x[:1].numel() > SMALL


def _convolved(x: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """`(H, W, C)` of every image, see `dynamic_convolution`."""
    channels = x.shape[-1]
    kernels = weight.unflatten(-1, (1, 3, 3))
    # Batches of one image keep the strides by which they are known to be channels-last.
    for image, kernel in zip(x.permute(0, 3, 1, 2).split(1), kernels):
        found = F.conv2d(image, kernel, padding=1, groups=channels)
        yield found.squeeze(0).permute(1, 2, 0)


def inline_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mean: Tensor,
    residual: nn.Module,
    size: Pair,
    feature_map: FeatureMap = "identity",
) -> Tensor:
    """Injective linear attention and the dynamic local residual.

    Args:
        query, key, value: `(B, N, num_heads, head_dim)`; the last H * W tokens are a map, those
            before it, such as a class token, have no residual.
        mean: `(B, C)`, what the residual's weights are made of.
        residual: from `(B, C, 1)` to the weights, `(B, 9 * C, 1)`, those of a channel in a row.
        size: H and W.
        feature_map: of `linear_attention`.

    Returns:
        `(B, N, C)`.
    """
    output = linear_attention(
        query, key, value, feature_map=feature_map, normalization="injective"
    ).flatten(-2)
    weight = residual(mean[..., None]).unflatten(1, (-1, 9)).squeeze(-1)
    extra = output.shape[1] - size[0] * size[1]
    tokens = value.flatten(-2)[:, extra:].unflatten(1, size)
    weight = weight.to(tokens.dtype)
    if _one_by_one(tokens) and not (torch.is_grad_enabled() and output.requires_grad):
        for row, found in zip(output, _convolved(tokens, weight)):
            row[extra:].add_(found.flatten(0, 1))
        return output
    local = dynamic_convolution(tokens, weight).flatten(1, 2)
    return output + (F.pad(local, (0, 0, extra, 0)) if extra else local)


class JointProjection:
    """Takes official weights of `q` and `kv` for those of `qkv`."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for kind in ("weight", "bias"):
            names = [f"{prefix}{name}.{kind}" for name in ("q", "kv")]
            if all(name in state_dict for name in names):
                parts = [state_dict.pop(name) for name in names]
                state_dict[f"{prefix}qkv.{kind}"] = torch.cat(parts)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


class InLineAttention(JointProjection, Mixer, name="inline"):
    """InLine attention over a whole map, as in InLine-DeiT and InLine-PVT.

        q, k, v = qkv(x);  out = proj(attention(q, k, v) + residual(v; mean of x))

    with attention and residual as in this module's docstring. Official state dicts of both forms
    load. Cost for N tokens: 4 N C^2 + 2 N C head_dim + 9 N C multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`.
        qkv_bias: bias of the query, key and value projection.
        kernel_func: feature map of queries and keys: "identity", "relu", "leakyrelu" or "exp",
            exp(x / 5).
        sr_ratio: 1; the official code has the argument, and fails with any other.
        window: taken for the official code's sake, which uses it for nothing.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or an argument is not among those allowed.
    """

    paper = PAPER
    operator = NAME
    linear = True
    cost = "4*N*C**2 + 2*N*C**2/num_heads + 9*N*C"
    examples = (
        {"dim": 32, "num_heads": 4},
        {"dim": 24, "num_heads": 2, "qkv_bias": True, "kernel_func": "exp"},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = False,
        kernel_func: KernelFunction = "identity",
        sr_ratio: int = 1,
        window: int | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner, factory = type(self).__name__, {"device": device, "dtype": dtype}
        _check_heads(owner, dim, num_heads)
        if sr_ratio != 1:
            raise ValueError(f"{owner}: sr_ratio={sr_ratio} is not defined; allowed is 1")
        self.num_heads, self.kernel_func = num_heads, kernel_func
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.residual = _residual(dim, num_heads, factory)

    def mix_tokens(self, x: Tensor, size: Pair) -> Tensor:
        """As `forward`, for tokens `(B, N, C)`, of which the last H * W are a map of that size.

        Tokens before it, such as a class token, take part in attention and have no residual.
        """
        query, key, value = qkv_heads(self.qkv, x, self.num_heads)
        output = inline_attention(
            query, key, value, x.mean(1), self.residual, size, FEATURES[self.kernel_func]
        )
        return self.proj_drop(self.proj(output))

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        size = (x.shape[1], x.shape[2])
        return self.mix_tokens(x.flatten(1, 2), size).unflatten(1, size)

    def extra_repr(self) -> str:
        """The number of heads and the feature map."""
        return f"num_heads={self.num_heads}, kernel_func={self.kernel_func!r}"


class InLineWindowAttention(InWindows, InLineAttention, name="inline_window"):
    """InLine attention within windows of the map, plain or shifted, as in InLine-Swin.

        q, k, v = qkv(x);  out = proj(attention(q, k, v) + residual(v; mean of x))  within a window

    A map at most as long as the window along a dimension is one window there, without shift; one
    that windows do not divide is padded with zeros at the bottom and right, which are attended to.
    A shifted window is not masked, as in the official code. Cost for N tokens: 4 N C^2 + 2 N C
    head_dim + 9 N C multiply-adds.

    Args:
        dim, num_heads, qkv_bias, kernel_func, proj_drop: as in `InLineAttention`.
        window_size: the window, a length or one per dimension (H, W).
        shift_size: tokens that the windows are shifted by, a number or one per dimension.

    Raises:
        ValueError: as in `InLineAttention`, or a size is impossible.
    """

    cost = "4*N*C**2 + 2*N*C**2/num_heads + 9*N*C"
    examples = (
        {"dim": 32, "num_heads": 4, "window_size": 7},
        {"dim": 24, "num_heads": 2, "window_size": (4, 5), "shift_size": 2, "kernel_func": "relu"},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        window_size: int | Pair = 7,
        shift_size: int | Pair = 0,
        qkv_bias: bool = True,
        kernel_func: KernelFunction = "identity",
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            kernel_func=kernel_func,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )
        self.window_size, self.shift_size = window_and_shift(
            type(self).__name__, window_size, shift_size
        )


class InLineStripes(nn.Module):
    """InLine attention within stripes of the map, and local enhancement: a branch of InLine-CSwin.

    Args:
        dim: number of channels.
        num_heads: number of heads; divides `dim`.
        idx: -1 for the whole map, 0 for stripes as high as the map, 1 for stripes as wide.
        split_size: tokens across a stripe.
        resolution: taken for the official code's sake; any map will do.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        idx: int = -1,
        split_size: int = 7,
        resolution: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner, factory = type(self).__name__, {"device": device, "dtype": dtype}
        _check_heads(owner, dim, num_heads)
        if idx not in (-1, 0, 1):
            raise ValueError(f"{owner}: idx={idx} is unknown; allowed are -1, 0, 1")
        if split_size < 1:
            raise ValueError(f"{owner}: split_size={split_size} must be at least 1")
        self.dim, self.num_heads, self.idx, self.split_size = dim, num_heads, idx, split_size
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.residual = _residual(dim, num_heads, factory)

    def partition(self, size: Pair) -> Partition:
        """The stripes of a map."""
        return Partition.stripes(size, self.idx, self.split_size)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mean: Tensor) -> Tensor:
        """`(B, H, W, C)` of queries, keys and values of that shape and `mean`, `(B, C)`."""
        partition = self.partition((query.shape[1], query.shape[2]))
        query, key, value = (partition.split(x) for x in (query, key, value))
        stripes = math.prod(partition.grid)
        heads = (x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)) for x in (query, key, value))
        mean = mean.repeat_interleave(stripes, 0) if stripes > 1 else mean
        output = inline_attention(*heads, mean, self.residual, partition.window_size)
        enhanced = self.get_v(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return partition.join(output.unflatten(1, partition.window_size) + enhanced)


class CrossShapedInLineAttention(Mixer, name="inline_cross_shaped"):
    """InLine attention within a cross of stripes, as in InLine-CSwin.

        q, k, v = qkv(x);  out = proj([stripes_0(q, k, v), stripes_1(q, k, v)])

    where half of the channels attends within stripes as high as the map, the other within stripes
    as wide, each with the dynamic residual and a depthwise convolution of v within its stripe; in
    the last stage all attend to the map. Weights of the residual are made of the mean token of
    the map. Stripes that do not fill the map are padded with zeros, which are attended to. Cost for
    N tokens: 4 N C^2 + 2 N C head_dim + 18 N C multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`, even unless there is one branch.
        split_size: tokens across a stripe.
        resolution: side of the map that the mixer is for; any map will do.
        last_stage: whether there is one branch on the whole map; so too if the stripes are as wide
            as `resolution`.
        qkv_bias: bias of the query, key and value projection.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: numbers do not fit.
    """

    paper = PAPER
    operator = NAME
    linear = True
    cost = "4*N*C**2 + 2*N*C**2/num_heads + 18*N*C"
    examples = (
        {"dim": 32, "num_heads": 4, "split_size": 2},
        {"dim": 24, "num_heads": 3, "last_stage": True, "qkv_bias": True},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        split_size: int = 7,
        resolution: int | None = None,
        last_stage: bool = False,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner, factory = type(self).__name__, {"device": device, "dtype": dtype}
        _check_heads(owner, dim, num_heads)
        last_stage = last_stage or resolution == split_size
        branches = 1 if last_stage else 2
        if num_heads % branches:
            raise ValueError(f"{owner}: num_heads={num_heads} must be even without last_stage")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.attns = nn.ModuleList(
            InLineStripes(
                dim // branches,
                num_heads=num_heads // branches,
                idx=-1 if last_stage else index,
                split_size=split_size,
                **factory,
            )
            for index in range(branches)
        )

    def mix(self, x: Tensor, context: Tensor | None = None, mean: Tensor | None = None) -> Tensor:
        """The mixed map.

        Args:
            x: `(B, H, W, C)`.
            mean: `(B, C)`, the mean token that the residual's weights are made of, that of x if
                None; in the official block it is that of x before its normalisation.
        """
        mean = x.mean((1, 2)) if mean is None else mean
        parts = self.qkv(x).unflatten(-1, (3, len(self.attns), -1)).unbind(-2)
        means = mean.chunk(len(self.attns), -1)
        outputs = [
            branch(*part.unbind(-2), mean) for branch, part, mean in zip(self.attns, parts, means)
        ]
        return self.proj_drop(self.proj(torch.cat(outputs, -1)))

    @torch.no_grad()
    def attention_map(self, x: Tensor, query: Pair) -> Tensor:
        size = (x.shape[1], x.shape[2])
        if not (0 <= query[0] < size[0] and 0 <= query[1] < size[1]):
            raise ValueError(f"query={tuple(query)} is outside the map {size}")
        with dispatch.recording() as calls:
            self(x)
        wanted = x.new_zeros(len(x), 1, *size)
        wanted[:, :, query[0], query[1]] = 1
        found = [
            branch.partition(size).weights(self, call, wanted)
            for branch, call in zip(self.attns, calls)
        ]
        return torch.cat(found, 1)

    def extra_repr(self) -> str:
        """The number of heads."""
        return f"num_heads={self.num_heads}"
