"""InLine and focused linear attention as their papers write them, with the weights of our mixers.

Heads are moved to the front and copied there, features and means are tensors of their own. The
floor is the matrix products alone: projections, keys times values, queries times that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.benchmarks.mixers import Build, Contest
from vitarium.ops import Mixer


class _Copy(nn.Module):
    """A module that computes with a mixer's layers, on maps of a size."""

    def __init__(self, mixer: Mixer, size: tuple[int, int]) -> None:
        super().__init__()
        self.mixer: Any = copy.deepcopy(mixer)
        self.size = size

    @staticmethod
    def plain(layer: nn.Linear, x: Tensor) -> Tensor:
        """PyTorch's linear layer, as papers have it."""
        return F.linear(x, layer.weight, layer.bias)

    def heads(self, x: Tensor) -> Tensor:
        """`(B, heads, N, head_dim)` of `(B, N, C)`, contiguous."""
        return x.unflatten(-1, (self.mixer.num_heads, -1)).transpose(1, 2).contiguous()


class WrittenInLine(_Copy):
    """The state and the mean of weights apart, the residual one grouped convolution."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, mixer = len(x), x.shape[-1], self.mixer
        tokens = x.flatten(1, 2)
        q, k, v = map(self.heads, self.plain(mixer.qkv, tokens).chunk(3, -1))
        share = (q.shape[-1] ** -0.5 / k.shape[2]) ** 0.5
        state = (k.transpose(-1, -2) * share) @ (v * share)
        rest = 1 - q @ k.mean(2, keepdim=True).transpose(-1, -2) * q.shape[-1] ** -0.5
        output = q @ state + rest * v.mean(2, keepdim=True)
        weight = mixer.residual(tokens.mean(1)[..., None]).reshape(batch * channels, 1, 3, 3)
        maps = v.transpose(-1, -2).reshape(1, batch * channels, *self.size)
        local = F.conv2d(maps, weight, padding=1, groups=batch * channels)
        output = output.transpose(1, 2).reshape(tokens.shape)
        output = output + local.reshape(batch, channels, -1).transpose(1, 2)
        return self.plain(mixer.proj, output).view(x.shape)


class WrittenFocused(_Copy):
    """Features by division and power; all heads share a convolution."""

    def focus(self, x: Tensor) -> Tensor:
        """Focused features of `(B, N, C)`."""
        x = (F.relu(x) + 1e-6) / F.softplus(self.mixer.scale)
        norm = x.norm(dim=-1, keepdim=True)
        x = x**self.mixer.focusing_factor
        return x / x.norm(dim=-1, keepdim=True) * norm

    def forward(self, x: Tensor) -> Tensor:
        mixer, tokens = self.mixer, x.flatten(1, 2)
        query, key, value = self.plain(mixer.qkv, tokens).chunk(3, -1)
        key = key + mixer.positional_encoding
        q, k, v = map(self.heads, (self.focus(query), self.focus(key), value))
        count = k.shape[2]
        weight = 1 / (q @ k.mean(2, keepdim=True).transpose(-1, -2) + 1e-6)
        state = (k.transpose(-1, -2) * count**-0.5) @ (v * count**-0.5)
        output = (q @ state * weight).transpose(1, 2).reshape(tokens.shape)
        local = mixer.dwc(v.flatten(0, 1).transpose(1, 2).unflatten(-1, self.size))
        local = local.reshape(len(x), -1, count).transpose(1, 2)
        return self.plain(mixer.proj, output + local).view(x.shape)


class Products(_Copy):
    """The matrix products alone, of heads that lie as they like it: what is due in any case."""

    def forward(self, x: Tensor) -> Tensor:
        mixer, tokens = self.mixer, self.size[0] * self.size[1]
        q, k, v = mixer.qkv(x).view(3, -1, tokens, mixer.dim // mixer.num_heads)
        return mixer.proj((q @ (k.transpose(-1, -2) @ v)).view(x.shape))


_MAPS = ((56, 96), (28, 192), (14, 384))  # sides and channels, 32 of a head


def _contests(mixer: str, build: Build, more: Callable[[int], dict[str, int]]) -> list[Contest]:
    return [
        Contest(
            f"{side}x{side} C {dim} heads {dim // 32}",
            mixer,
            dim,
            (side, side),
            {"num_heads": dim // 32, **more(side)},
            {"official": build},
            Products,
        )
        for side, dim in _MAPS
    ]


CONTESTS: list[Contest] = [
    *_contests("inline", WrittenInLine, lambda side: {}),
    *_contests("focused_linear", WrittenFocused, lambda side: {"num_patches": side**2}),
]
