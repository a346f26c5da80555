"""Stems, downsamplers and blocks that families share. Maps are channels-last, `(B, H, W, C)`."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.layers import (
    DropPath,
    LayerScale,
    Mlp,
    PatchEmbed,
    register_notrace_function,
    register_notrace_module,
)
from torch import Tensor, nn

from vitarium.ops.dispatch import plain_aten
from vitarium.ops.mixer import pad_map
from vitarium.ops.projection import Linear, gelu_linear, linear, plain

HIDDEN_BYTES = 2**21  # of hidden tokens that stay in a core's cache
_WIDE = 256  # channels from which on products of few tokens lose more than that gains


class ConvStem(nn.Module):
    """Overlapping stem: two 3x3 convolutions of stride 2 and a norm, `(B, C, H, W) -> NHWC`.

    Hassani et al., "Neighborhood Attention Transformer" (arXiv 2204.07143), section 3.2.

    Args:
        in_chans: channels of the image.
        dim: channels of the map; the first convolution has half of them.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        return self.norm(x.permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """A 3x3 convolution of stride 2, then a norm (arXiv 2204.07143, section 3.2).

    Args:
        dim_in, dim_out: channels.
        bias: whether the convolution has one.
    """

    def __init__(self, dim_in: int, dim_out: int, *, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, 3, stride=2, padding=1, bias=bias)
        self.norm = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 3, 1, 2))
        return self.norm(x.permute(0, 2, 3, 1))


def patch_stem(in_chans: int, dim: int, patch_size: int = 4) -> PatchEmbed:
    """Non-overlapping patches and a norm; images are padded right and bottom to whole patches."""
    return PatchEmbed(
        img_size=None,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=dim,
        norm_layer=nn.LayerNorm,
        flatten=False,
        output_fmt="NHWC",
        dynamic_img_pad=True,
    )


class PatchConv(nn.Conv2d):
    """A convolution of patches that do not overlap, of channels-last maps to such maps.

    What is left over at the right and bottom and fills no patch is not seen, as in the official
    code of the families here; a side shorter than one patch is padded with zeros to one.

    Args:
        dim_in, dim_out: channels before and after.
        patch_size: side of a patch.
    """

    def __init__(self, dim_in: int, dim_out: int, patch_size: int = 2) -> None:
        super().__init__(dim_in, dim_out, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        lack = [max(0, p - length) for p, length in zip(self.kernel_size, x.shape[1:3])]
        x = pad_map(x, lack)
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of the channels of a channels-last map."""

    def forward(self, input: Tensor) -> Tensor:
        # As rows: compilers are mistaken about the layout of the gradient of permuted maps.
        return super().forward(input.flatten(0, -2)).unflatten(0, input.shape[:-1])


def in_turn(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    modules: Iterable[nn.Module],
    *,
    hidden_dim: int,
    limit: int,
    axes: int,
) -> Tensor:
    """`function(x)`, on a CPU without gradients of some entries of x after another.

    What passes between layers then stays in cache, and new memory, which takes as long to come by
    as a layer takes, is small.

    Args:
        function: of a channels-last map or tokens, keeps its shape, treats every entry by itself.
        x: of any shape.
        modules: what `function` calls. Where one trains or is watched by a hook, it gets all of x.
        hidden_dim: channels of the widest map between layers.
        limit: bytes of that map from which on it is made in parts, of about as many bytes.
        axes: the axes of x that count entries, `x.shape[:axes]`.
    """
    # Proxies of torch.fx are no tensors.
    if torch.is_grad_enabled() or not isinstance(x, Tensor) or not x.is_cpu or _traced():
        return function(x)
    parts = math.prod(x.shape[:-1]) * hidden_dim * x.element_size() // limit
    if parts < 2 or any(map(_watched, modules)):
        return function(x)
    entries = x.reshape(-1, *x.shape[axes:])
    return torch.cat([function(part) for part in entries.chunk(parts)]).view(x.shape)


def _watched(module: nn.Module) -> bool:
    return any(m.training or m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def _traced() -> bool:
    return torch.compiler.is_compiling() or plain_aten()


def second_half(mlp: Any, x: Tensor) -> Tensor:
    """`drop2(fc2(drop1(act(x))))` of a feed-forward network whose activation is GELU.

    A CPU keeps x for the backward, and not its GELU as well, and overwrites it without gradients.

    Args:
        mlp: has these layers.
        x: what a layer of the network gave, which nothing else reads.
    """
    layers = plain(mlp.act, nn.GELU), plain(mlp.drop1, nn.Dropout), plain(mlp.fc2)
    unwatched = all(plain(layer, type(layer)) for layer in mlp.children())
    exact = unwatched and all(layers) and mlp.act.approximate == "none"
    if not exact or x.device.type != "cpu" or (mlp.training and mlp.drop1.p > 0):
        return mlp.drop2(mlp.fc2(mlp.drop1(mlp.act(x))))
    return mlp.drop2(gelu_linear(x, mlp.fc2.weight, mlp.fc2.bias, overwrite=True))


class TokenwiseMlp(Mlp):
    """timm's feed-forward network; a CPU keeps one hidden map for the backward, not two.

    Args:
        dim: channels of a channels-last map.
        hidden_dim: channels of the hidden layer.
        drop: dropout rate after both layers.
    """

    def __init__(self, dim: int, hidden_dim: int, *, drop: float = 0.0) -> None:
        super().__init__(dim, hidden_dim, drop=drop)
        self.fc1, self.fc2 = Linear(dim, hidden_dim), Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if _traced() or not x.is_cpu:
            return super().forward(x)
        return second_half(self, self.fc1(x))


for _part in (PatchConv, BatchNorm, TokenwiseMlp, Linear):
    register_notrace_module(_part)  # one node to torch.fx: it looks at sizes in Python
register_notrace_function(linear)


class Block(nn.Module):
    """Pre-norm transformer block: `x + mixer(norm(x))`, then `x + mlp(norm(x))`.

    Args:
        dim: channels.
        mixer: a module `(B, H, W, dim) -> (B, H, W, dim)`.
        mlp_ratio: width of the hidden layer over `dim`.
        layer_scale: initial factor of both branches, learned per channel; None for no factor.
        drop_path: rate of stochastic depth.
        proj_drop: dropout rate in the feed-forward network.
        norm_layer: `norm_layer(dim)`, both norms.
        mlp_layer: `mlp_layer(dim, hidden, drop=rate)`, the feed-forward network, of the map.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        mlp_layer: Callable[..., nn.Module] = TokenwiseMlp,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.mixer = mixer
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = mlp_layer(dim, hidden, drop=proj_drop)
        self._hidden = hidden if dim < _WIDE else None
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fed(x + self.drop_path1(self.ls1(self.mixer(self.norm1(x)))))

    def fed(self, x: Tensor) -> Tensor:
        """`x + mlp(norm(x))`, the second half of the block, of a channels-last map."""
        if self._hidden is None or type(self.mlp) is not TokenwiseMlp:
            return self._fed(x)
        modules = self.norm2, self.mlp, self.ls2, self.drop_path2
        sizes = {"hidden_dim": self._hidden, "limit": HIDDEN_BYTES}
        return in_turn(self._fed, x, modules, axes=-1, **sizes)

    def _fed(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
