"""Gaussian adaptive attention: tokens or channels weighted by how near they are to their mean.

Ioannides et al., "Gaussian Adaptive Attention is All You Need: Robust Contextual Representations
Across Multiple Modalities" (arXiv 2401.11143). There are neither queries nor keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitarium.ops.mixer import Mixer

LEAST_VARIANCE = 1e-8
LEAST_SUM = 1e-8


class GaussianAdaptiveAttention(Mixer, name="gaussian_adaptive"):
    """Every head weighs its part of an axis by a product of Gaussians around its mean.

    A head has the mean m and the unbiased variance s^2 (+ 1e-8) of its part of the axis, and
    `num_gaussians` learned offsets o_g and widths c_g:

        w = prod_g exp(-(x - m - o_g)^2 / (2 c_g^2 s^2)) / sqrt(2 pi c_g^2)
        out = x w / max(sum(w), 1e-8)

    with the sum along the axis. Parts are consecutive tokens in raster order, or channels; what
    does not divide goes to the last head. Where there are fewer tokens than heads, the last heads
    have none; a part of one entry has the variance 0. Cost: about 10 N C for N tokens, however
    many Gaussians there are: a product of Gaussians is a Gaussian, and computed as one.

    Args:
        dim: number of channels C.
        norm_axis: what is weighted: 1 or -2 tokens, 2 or -1 channels.
        num_heads: number of heads, each with a part of the axis; at most C of channels.
        num_gaussians: Gaussians of a head.
        padding_value: entries of x that count as zero in mean and variance, and stay as they are.
        eps: taken for the sake of the official constructor, where it has no effect either.

    Raises:
        ValueError: a number is impossible; the message says which.
    """

    paper = "Gaussian Adaptive Attention is All You Need (arXiv 2401.11143)"
    linear = True
    cost = "0"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 18, "num_heads": 4, "num_gaussians": 3},
        {"dim": 8, "norm_axis": 1, "num_heads": 4, "num_gaussians": 2, "padding_value": 0.0},
    )

    def __init__(
        self,
        dim: int,
        *,
        norm_axis: int = -1,
        num_heads: int = 4,
        num_gaussians: int = 4,
        padding_value: float | None = None,
        eps: float = 1e-8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        if norm_axis not in (1, 2, -1, -2):
            raise ValueError(
                f"{owner}: norm_axis={norm_axis}; allowed are 1 and -2 (tokens), 2 and -1 "
                "(channels) of (B, tokens, channels)"
            )
        if num_gaussians < 1:
            raise ValueError(f"{owner}: num_gaussians={num_gaussians} must be at least 1")
        self.of_tokens = norm_axis in (1, -2)
        if num_heads < 1 or (num_heads > dim and not self.of_tokens):
            raise ValueError(f"{owner}: num_heads={num_heads}; allowed are 1 to {dim=}")
        self.num_heads = num_heads
        self.num_gaussians = num_gaussians
        self.padding_value = padding_value
        factory = {"device": device, "dtype": dtype}
        self.mean_offsets = nn.Parameter(torch.empty(num_heads, num_gaussians, **factory))
        self.c = nn.Parameter(torch.empty(num_heads, num_gaussians, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No offsets, and widths whose logarithms are standard normal."""
        nn.init.zeros_(self.mean_offsets)
        with torch.no_grad():
            self.c.normal_().exp_()

    def weights(self, x: Tensor) -> Tensor:
        """What every entry of the map `(B, H, W, C)` is multiplied by, float32 or wider."""
        axis = 1 if self.of_tokens else 2
        tokens = x.flatten(1, 2).to(torch.promote_types(x.dtype, torch.float32))
        length = tokens.shape[axis]
        heads = min(self.num_heads, length)
        size, rest = length // heads, length % heads  # torch.jit.trace has no divmod
        parts = [(0, heads, tokens)]
        if rest:
            last = (heads - 1) * size
            head, tail = tokens.split([last, size + rest], axis)
            parts = [(0, heads - 1, head)] * (heads > 1) + [(heads - 1, heads, tail)]
        found = [
            self._of_heads(part.unflatten(axis, (stop - start, -1)), axis, start, stop)
            for start, stop, part in parts
        ]
        return torch.cat([part.flatten(axis, axis + 1) for part in found], axis).view(x.shape)

    def _of_heads(self, x: Tensor, axis: int, start: int, stop: int) -> Tensor:
        """Weights of heads `start` to `stop`, which lie along `axis`, each along the next one."""
        shape = (-1, *[1] * (3 - axis))  # of a value per head
        offset = self.mean_offsets[start:stop].to(x.dtype)
        width = self.c[start:stop].to(x.dtype)
        # The Gaussian that the product is: the centre, the sum of the precisions, and its height.
        precision = width.square().reciprocal()
        total = precision.sum(-1)
        centre = (precision * offset).sum(-1) / total
        spread = (precision * (offset - centre[:, None]).square()).sum(-1)
        height = (2 * math.pi * width.square()).log().sum(-1)
        total, centre, spread, height = (t.view(shape) for t in (total, centre, spread, height))

        counted = x
        if self.padding_value is not None:
            counted = x.masked_fill(x == self.padding_value, 0)
        mean = counted.mean(axis + 1, keepdim=True)
        degrees = max(x.shape[axis + 1] - 1, 1)
        variance = (counted - mean).square().sum(axis + 1, keepdim=True) / degrees + LEAST_VARIANCE
        distance = total * (x - mean - centre).square() + spread
        product = (-0.5 * (distance / variance + height)).exp()
        return product / product.sum(axis + 1, keepdim=True).clamp_min(LEAST_SUM)

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        output = (x * self.weights(x)).to(x.dtype)
        if self.padding_value is None:
            return output
        return torch.where(x == self.padding_value, x, output)

    def _attention_map(self, x: Tensor, row: int, column: int) -> Tensor:
        """The same for all queries: of tokens, each head's weights, averaged over channels.

        Weights of channels sum to 1 at every position, and give a flat map.
        """
        weights = self.weights(x).to(x.dtype)
        if not self.of_tokens:
            return torch.ones_like(weights[..., : self.num_heads]).permute(0, 3, 1, 2)
        tokens = weights.mean(-1).flatten(1)
        place = torch.arange(tokens.shape[1], device=x.device)
        heads = min(self.num_heads, tokens.shape[1])
        head = (place // (tokens.shape[1] // heads)).clamp_max(heads - 1)
        own = head == torch.arange(self.num_heads, device=x.device)[:, None]
        return (tokens[:, None] * own).unflatten(-1, x.shape[1:3])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Official ones hold the heads one by one.
        for name in ("mean_offsets", "c"):
            keys = [f"{prefix}attention_heads.{i}.{name}" for i in range(self.num_heads)]
            if all(key in state_dict for key in keys):
                state_dict[prefix + name] = torch.stack([state_dict.pop(key) for key in keys])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        axis = "tokens" if self.of_tokens else "channels"
        return f"{axis}, num_heads={self.num_heads}, num_gaussians={self.num_gaussians}"


class GaussianBlock(Mixer, name="gaussian_block"):
    """Layers of Gaussian adaptive attention, each added to what it gets.

        x = x + layer(x),  for every layer;  out = x

    Cost: that of its layers, see `GaussianAdaptiveAttention`.

    Args:
        dim: number of channels C.
        norm_axes, num_heads, num_gaussians: of every layer, as in `GaussianAdaptiveAttention`.
        num_layers: number of layers; as many as there are entries if None.
        padding_value, eps: of all layers, as in `GaussianAdaptiveAttention`.

    Raises:
        ValueError: numbers of entries differ, or a number is impossible; the message says which.
    """

    paper = "Gaussian Adaptive Attention is All You Need (arXiv 2401.11143)"
    linear = True
    cost = "0"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = ({"dim": 12},)

    def __init__(
        self,
        dim: int,
        *,
        norm_axes: tuple[int, ...] = (1, -1),
        num_heads: tuple[int, ...] = (2, 4),
        num_gaussians: tuple[int, ...] = (2, 4),
        num_layers: int | None = None,
        padding_value: float | None = None,
        eps: float = 1e-8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        lengths = {
            "norm_axes": len(norm_axes),
            "num_heads": len(num_heads),
            "num_gaussians": len(num_gaussians),
            "num_layers": len(norm_axes) if num_layers is None else num_layers,
        }
        if len(set(lengths.values())) > 1 or not norm_axes:
            raise ValueError(f"GaussianBlock: numbers of layers differ, or are none: {lengths}")
        self.layers = nn.ModuleList(
            GaussianAdaptiveAttention(
                dim,
                norm_axis=axis,
                num_heads=heads,
                num_gaussians=gaussians,
                padding_value=padding_value,
                eps=eps,
                device=device,
                dtype=dtype,
            )
            for axis, heads, gaussians in zip(norm_axes, num_heads, num_gaussians)
        )

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x

    def _attention_map(self, x: Tensor, row: int, column: int) -> Tensor:
        """That of the last layer."""
        *layers, last = self.layers
        for layer in layers:
            x = x + layer(x)
        assert isinstance(last, GaussianAdaptiveAttention)
        return last.attention_map(x, (row, column))
