"""HiLo and agent attention as their papers write them, with the weights of our mixers.

Every step is an operation of PyTorch on a contiguous tensor, windows and heads are moved to the
front, weights are softmaxes of products.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.benchmarks.mixers import Build, Contest
from vitarium.ops import Mixer


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Any = 0.0) -> Tensor:
    """Attention of `(..., tokens, channels)`."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + bias
    return scores.softmax(-1) @ value


def _heads(x: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """`(..., tokens, parts * C)` as `parts` times `(..., heads, tokens, head_dim)`."""
    x = x.unflatten(-1, (parts, heads, -1)).movedim(-3, 0)
    return x.transpose(-3, -2).unbind(0)


class _Copy(nn.Module):
    """A module that computes with a mixer's layers."""

    def __init__(self, mixer: Mixer, size: tuple[int, int]) -> None:
        super().__init__()
        self.mixer: Any = copy.deepcopy(mixer)
        self.size = size


class EagerHiLo(_Copy):
    """Both kinds of heads one after the other, on maps that windows divide."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._near(x), self._far(x)], -1)

    def _near(self, x: Tensor) -> Tensor:
        mixer, side = self.mixer, self.mixer.window_size
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height // side, side, width // side, side, -1).transpose(2, 3)
        query, key, value = _heads(mixer.h_qkv(x).flatten(3, 4).flatten(1, 2), mixer.h_heads, 3)
        windows = _attend(query, key, value).transpose(2, 3)
        windows = windows.reshape(batch, height // side, width // side, side, side, -1)
        return mixer.h_proj(windows.transpose(2, 3).reshape(batch, height, width, -1))

    def _far(self, x: Tensor) -> Tensor:
        mixer = self.mixer
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), mixer.window_size, mixer.window_size)
        (query,) = _heads(mixer.l_q(x.flatten(1, 2)), mixer.l_heads, 1)
        key, value = _heads(mixer.l_kv(pooled.flatten(2).transpose(1, 2)), mixer.l_heads, 2)
        output = _attend(query, key, value).transpose(1, 2)
        return mixer.l_proj(output.reshape(*x.shape[:-1], -1))


class EagerAgent(_Copy):
    """Both stages with two products and a softmax each; the biases are repeated for all images."""

    def forward(self, x: Tensor) -> Tensor:
        mixer, heads, size = self.mixer, self.mixer.num_heads, x.shape[1:3]
        tokens = x.flatten(1, 2)
        if hasattr(mixer, "kv"):
            query, (key, value) = mixer.q(tokens), mixer.kv(tokens).chunk(2, -1)
        else:
            query, key, value = mixer.qkv(tokens).chunk(3, -1)
        side = math.isqrt(mixer.agent_num)
        agent = F.adaptive_avg_pool2d(query.transpose(1, 2).unflatten(2, size), side)
        agent = agent.flatten(2).transpose(1, 2)
        q, a, k, v = (_heads(part, heads, 1)[0] for part in (query, agent, key, value))
        gathered = _attend(a, k, v, self._bias("n", size).repeat(len(x), 1, 1, 1))
        bias = self._bias("q", size).repeat(len(x), 1, 1, 1)
        output = _attend(q, a, gathered, bias).transpose(1, 2).flatten(2)
        near = mixer.dwc(value.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
        return mixer.proj(output + near).view(x.shape)

    def _bias(self, stage: str, size: tuple[int, int]) -> Tensor:
        mixer = self.mixer
        table = mixer.an_bias if stage == "n" else mixer.na_bias
        table = F.interpolate(table, size=size, mode="bilinear").flatten(2)[None]
        if stage == "n":
            return table + (mixer.ah_bias + mixer.aw_bias).flatten(2)
        return table.transpose(2, 3) + (mixer.ha_bias + mixer.wa_bias).flatten(1, 2)


HILO: dict[str, Build] = {"official": EagerHiLo}
AGENT: dict[str, Build] = {"official": EagerAgent}

CONTESTS: list[Contest] = [
    *(
        Contest(f"{side}x{side} C {dim} window 2 alpha {alpha}", "hilo", dim, (side, side),
                {"num_heads": dim // 32, "alpha": alpha, "qkv_bias": True}, HILO)
        for side, dim, alpha in ((56, 64, 0.5), (28, 192, 0.9), (14, 384, 0.9))
    ),
    *(
        Contest(f"{side}x{side} C {dim} agents {agents}", "agent", dim, (side, side),
                {"num_heads": dim // 32, "agent_num": agents, "window": side}, AGENT)
        for side, dim, agents in ((56, 64, 9), (28, 128, 16), (14, 384, 49))
    ),
    Contest("28x28 C 128 agents 16", "agent_pvt", 128, (28, 28),
            {"num_heads": 4, "num_patches": 784, "agent_num": 16, "qkv_bias": True}, AGENT),
]  # fmt: skip
