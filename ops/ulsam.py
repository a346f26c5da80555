"""Subspace attention: every group of channels weighs the positions of the map (ULSAM).

Saini et al., "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural
Networks" (arXiv 2006.15102).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops.mixer import Mixer
from vitarium.ops.projection import plain


class SubspaceAttention(Mixer, name="ulsam"):
    """A map of weights for each of `num_splits` groups of channels, and what it adds to them.

        a = softmax(relu(bn_point(conv_point(maxpool3x3(relu(bn_dws(conv_dws(x))))))))
        out = (1 + a) x

    with a softmax over all positions, a scale and a shift per channel (`conv_dws`) and a sum over
    the channels of a group (`conv_point`). The subspaces are computed together. Each map sums to 1,
    so that on a large one a position gains little. Cost for N tokens: 12 N C, 9 of it comparisons.

    Args:
        dim: number of channels C.
        num_splits: number of subspaces, which divides `dim`.

    Raises:
        ValueError: `num_splits` does not divide `dim`.
    """

    paper = "ULSAM (arXiv 2006.15102)"
    linear = True
    cost = "0"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 24, "num_splits": 3},
        {"dim": 16, "num_splits": 1},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_splits: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        if num_splits < 1 or dim % num_splits:
            raise ValueError(f"SubspaceAttention: num_splits={num_splits} must divide dim={dim}")
        self.num_splits = num_splits
        factory = {"device": device, "dtype": dtype}
        self.conv_dws = nn.Conv2d(dim, dim, 1, groups=dim, **factory)
        self.bn_dws = nn.BatchNorm2d(dim, momentum=0.9, **factory)
        self.conv_point = nn.Conv2d(dim, num_splits, 1, groups=num_splits, **factory)
        self.bn_point = nn.BatchNorm2d(num_splits, momentum=0.9, **factory)

    def weights(self, x: Tensor) -> Tensor:
        """The weights `(B, H, W, num_splits)`, which sum to 1 over the positions of each group."""
        found = F.relu(self.bn_dws(_grouped(self.conv_dws, x.permute(0, 3, 1, 2))))
        found = F.max_pool2d(found, 3, stride=1, padding=1)
        found = F.relu(self.bn_point(_grouped(self.conv_point, found))).permute(0, 2, 3, 1)
        return found.flatten(1, 2).softmax(1).view(found.shape)

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        gain = 1 + self.weights(x)[..., None]
        return (x.unflatten(-1, (self.num_splits, -1)) * gain).flatten(-2)

    def _attention_map(self, x: Tensor, row: int, column: int) -> Tensor:
        """The weights of every subspace: the same ones for all queries."""
        return self.weights(x).permute(0, 3, 1, 2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Official ones hold the subspaces one by one.
        found: dict[str, list[Tensor]] = {}
        for split in range(self.num_splits):
            start = f"{prefix}subspaces.{split}."
            for key in [key for key in state_dict if key.startswith(start)]:
                found.setdefault(key.removeprefix(start), []).append(state_dict.pop(key))
        for name, parts in found.items():
            state_dict[prefix + name] = torch.cat(parts) if parts[0].dim() else parts[0]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"num_splits={self.num_splits}"


def _grouped(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)` of a 1x1 convolution with an output per group, as a product and a sum: faster."""
    if not plain(conv, nn.Conv2d):
        return conv(x)
    groups = x.permute(0, 2, 3, 1).unflatten(-1, (conv.groups, -1))
    return ((groups * conv.weight.flatten(1)).sum(-1) + conv.bias).permute(0, 3, 1, 2)
