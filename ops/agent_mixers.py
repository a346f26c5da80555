"""Mixers of agent attention on whole maps: those of Agent-DeiT and Agent-PVT.

Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention" (arXiv
2312.08874). Agents are queries pooled to a small square map. Parameters are named as in the
official code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.agent import NAME, agent_attention
from vitarium.ops.mixer import Mixer, pad_map, qkv_heads, spread
from vitarium.ops.projection import Linear, linear, plain

Size = tuple[int, int]

TABLE = 7  # side of the tables an_bias and na_bias
PAPER = "Agent Attention (arXiv 2312.08874)"


class Agents(nn.Module):
    """Agents and their biases: what all forms of agent attention share, for other modules.

    Biases are sums of a table of 7 x 7 that is interpolated to the map and of one number per row
    and per column, which belong to a map of `size` tokens and are interpolated to any other. They
    have `agent_num` agents, a square; where another `agent_shape` pools the queries, as in the
    official code for detection and segmentation, they are interpolated to it too.
    """

    def make_agents(
        self,
        num_heads: int,
        agent_num: int,
        size: Size,
        key_size: Size,
        factory: dict[str, Any],
        agent_shape: Size | None = None,
    ) -> None:
        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **factory))

        side = math.isqrt(agent_num)
        self.num_heads = num_heads
        self.agent_num = agent_num
        self.agent_shape = (side, side) if agent_shape is None else agent_shape
        self.an_bias = table(num_heads, agent_num, TABLE, TABLE)
        self.na_bias = table(num_heads, agent_num, TABLE, TABLE)
        self.ah_bias = table(num_heads, agent_num, key_size[0], 1)
        self.aw_bias = table(num_heads, agent_num, 1, key_size[1])
        self.ha_bias = table(num_heads, size[0], 1, agent_num)
        self.wa_bias = table(num_heads, 1, size[1], agent_num)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the biases anew; the layers have their own `reset_parameters`."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Official biases of rows and columns have one axis more, which no memory format is for.
        for name in ("ah_bias", "aw_bias", "ha_bias", "wa_bias"):
            found = state_dict.get(prefix + name)
            if found is not None and found.ndim == 5:
                state_dict[prefix + name] = found.squeeze(0)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _agent_bias(self, size: Size) -> Tensor:
        """The bias of agents and keys of a map, `(num_heads, agents, H, W)`."""
        tables = (self.an_bias, self.ah_bias, self.aw_bias)
        table, rows, columns = map(self._of_agents, tables)
        table = F.interpolate(table, size=size, mode="bilinear")
        return table + (_stretched(rows, size) + _stretched(columns, size))

    def _query_bias(self, size: Size) -> Tensor:
        """The bias of queries of a map and agents, `(num_heads, H, W, agents)`."""
        # In this memory format the result is contiguous.
        table = self._of_agents(self.na_bias).contiguous(memory_format=torch.channels_last)
        table = F.interpolate(table, size=size, mode="bilinear").permute(0, 2, 3, 1)
        sides = (bias.permute(0, 3, 1, 2) for bias in (self.ha_bias, self.wa_bias))
        sides = map(self._of_agents, sides)
        rows, columns = (_stretched(bias, size).permute(0, 2, 3, 1) for bias in sides)
        return table + (rows + columns)

    def _of_agents(self, table: Tensor) -> Tensor:
        """A table `(num_heads, agent_num, H, W)` for all agents, `(num_heads, agents, H, W)`."""
        side = math.isqrt(self.agent_num)
        if self.agent_shape == (side, side):
            return table
        places = table.flatten(2).transpose(1, 2).unflatten(2, (side, side))
        places = F.interpolate(places, size=self.agent_shape, mode="bilinear")
        return places.flatten(2).transpose(1, 2).unflatten(2, table.shape[2:])

    def pooled(self, x: Tensor) -> Tensor:
        """Adaptive average pooling of `(B, H, W, C)` to one token per agent, `(B, agents, C)`.

        As matrix products, whose gradient is the same in every run.
        """
        lengths = zip(x.shape[1:3], self.agent_shape)
        rows, columns = (_averages(length, cells, x) for length, cells in lengths)
        pooled = columns @ x
        return (rows @ pooled.flatten(2)).unflatten(2, pooled.shape[2:]).flatten(1, 2)

    def agents(self, x: Tensor, query: Tensor, layer: nn.Linear) -> Tensor:
        """Pooled queries, `(B, agents, C)`, of `(B, H, W, heads, head_dim)`.

        Pooling and projecting may change places: first comes what spares work.

        Args:
            x: `(B, H, W, C)`, what the queries are made of.
            query: the queries.
            layer: its first outputs are the queries of x.
        """
        dim = x.shape[-1]
        later = math.prod(self.agent_shape) * dim > x.shape[1] * x.shape[2]
        if later or not plain(layer):
            return self.pooled(query.flatten(-2))
        bias = None if layer.bias is None else layer.bias[:dim]
        return linear(self.pooled(x), layer.weight[:dim], bias)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, agent: Tensor) -> Tensor:
        """Agent attention of `(B, H, W, num_heads, head_dim)`; the agents are `(B, agents, C)`."""
        size, key_size = _size(query), _size(key)
        return agent_attention(
            query,
            key,
            value,
            agent.unflatten(-1, (self.num_heads, -1)),
            agent_bias=self._agent_bias(key_size).flatten(2),
            query_bias=self._query_bias(size).flatten(1, 2),
        )


def _size(x: Tensor) -> Size:
    return x.shape[1], x.shape[2]


def _stretched(bias: Tensor, size: Size) -> Tensor:
    """`(num_heads, agents, H, 1)` or `(..., 1, W)` for a map of another size."""
    wanted = tuple(1 if length == 1 else needed for length, needed in zip(bias.shape[-2:], size))
    if wanted == tuple(bias.shape[-2:]):
        return bias
    return F.interpolate(bias, size=wanted, mode="bilinear")


def _averages(length: int, side: int, like: Tensor) -> Tensor:
    """The matrix `(side, length)` of adaptive average pooling."""
    place = torch.arange(length, device=like.device)
    cell = torch.arange(side, device=like.device)[:, None]
    inside = (place >= cell * length // side) & (place < -(-(cell + 1) * length // side))
    inside = inside.to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def convolved(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of `(B, H, W, C)`."""
    return layer(x.contiguous().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def depthwise(dim: int, factory: dict[str, Any]) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)


def agents_shape(owner: str, shape: int | Size | None) -> Size | None:
    """A map of agents, given as a side or as (H, W). Raises ValueError for one without agents."""
    if shape is None:
        return None
    shape = dispatch.per_dimension(owner, "downstream_agent_shape", shape, 2)
    return shape[0], shape[1]


def check_numbers(owner: str, dim: int, num_heads: int, agent_num: int) -> None:
    """Raises ValueError for an impossible number of heads or agents."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{owner}: num_heads={num_heads} must divide dim={dim}")
    if agent_num < 1 or math.isqrt(agent_num) ** 2 != agent_num:
        raise ValueError(f"{owner}: agent_num={agent_num} must be a square, of at least 1")


class AgentAttention(Agents, Mixer, name="agent"):
    """Agent attention on the whole map, the mixer of Agent-DeiT.

    With q, k, v of qkv(x), P(q) their queries pooled to sqrt(agent_num) x sqrt(agent_num) agents,
    and the biases B_A and B_Q of agents and keys, of queries and agents:

        out = proj(softmax(scale q P(q)^T + B_Q) softmax(scale P(q) k^T + B_A) v + dwc(v))

    with dwc a depthwise 3 x 3 convolution of the map. Cost for N tokens and n agents: 4 N C^2 for
    the projections, 4 N n C of the attention and 9 N C, in multiply-adds.

    A sequence that begins with a class token, as in Agent-DeiT, goes through `mix_tokens`: that
    token attends and is attended to with biases of its own, but is neither pooled nor convolved.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`.
        qkv_bias: bias of the query, key and value projection.
        agent_num: number of agents, a square.
        window: the map that the biases of rows and columns belong to, a side or (H, W); on maps of
            other sizes they are interpolated.
        class_token: whether there are biases of a class token, `ac_bias` and `ca_bias`.
        downstream_agent_shape: rows and columns of agents, where they are more or fewer than the
            `agent_num` that the biases belong to, as in the official code for detection and
            segmentation; the biases are interpolated. Not together with `class_token`.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: a number of heads or agents, or a size, is impossible.
    """

    paper = PAPER
    linear = True
    operator = NAME
    cost = "4*N*C**2 + 4*N*agent_num*C + 9*N*C"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 32, "num_heads": 2, "agent_num": 9, "window": 7},
        {"dim": 24, "agent_num": 4, "window": 5, "downstream_agent_shape": (3, 4)},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = False,
        agent_num: int = 49,
        window: int | Size = 14,
        class_token: bool = False,
        downstream_agent_shape: int | Size | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_numbers("AgentAttention", dim, num_heads, agent_num)
        size = dispatch.per_dimension("AgentAttention", "window", window, 2)
        factory = {"device": device, "dtype": dtype}
        self.class_token = class_token
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.dwc = depthwise(dim, factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        if class_token:
            self.ac_bias = nn.Parameter(torch.empty(1, num_heads, agent_num, 1, **factory))
            self.ca_bias = nn.Parameter(torch.empty(1, num_heads, 1, agent_num, **factory))
        agents = agents_shape("AgentAttention", downstream_agent_shape)
        if class_token and agents is not None:
            raise ValueError(
                f"AgentAttention: downstream_agent_shape={downstream_agent_shape!r} is not defined "
                "with class_token=True"
            )
        self.make_agents(num_heads, agent_num, size, size, factory, agents)

    def mix(self, x: Tensor) -> Tensor:
        query, key, value = qkv_heads(self.qkv, x, self.num_heads)
        output = self.attend(query, key, value, self.agents(x, query, self.qkv)).flatten(-2)
        output = output + convolved(self.dwc, value.flatten(-2))
        return self.proj_drop(self.proj(output))

    def mix_tokens(self, x: Tensor, size: Size | None = None) -> Tensor:
        """Agent attention of a class token and of the tokens of a map, as in Agent-DeiT.

        Args:
            x: `(B, 1 + H * W, C)`, the class token first.
            size: H and W; those of a square map if None.

        Returns:
            `(B, 1 + H * W, C)`.

        Raises:
            ValueError: the mixer was built without `class_token`, or x is of another shape.
        """
        if not self.class_token:
            raise ValueError("AgentAttention: mix_tokens needs a mixer with class_token=True")
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(
                f"AgentAttention: x has shape {tuple(x.shape)}; allowed is (B, 1 + H * W, "
                f"{self.dim})"
            )
        if size is None:
            side = math.isqrt(x.shape[1] - 1)
            size = side, side
        if 1 + size[0] * size[1] != x.shape[1] or not x.shape[1] > 1:
            raise ValueError(f"AgentAttention: size={size} is not that of {x.shape[1] - 1} tokens")
        query, key, value = qkv_heads(self.qkv, x, self.num_heads)
        tokens, queries = (part[:, 1:].unflatten(1, size) for part in (x, query))
        agent = self.agents(tokens, queries, self.qkv).unflatten(-1, (self.num_heads, -1))
        agent_bias, query_bias = self._agent_bias(size), self._query_bias(size)
        output = agent_attention(
            query,
            key,
            value,
            agent,
            agent_bias=torch.cat([self.ac_bias[0], agent_bias.flatten(2)], -1),
            query_bias=torch.cat([self.ca_bias[0], query_bias.flatten(1, 2)], 1),
        ).flatten(-2)
        near = convolved(self.dwc, value[:, 1:].flatten(-2).unflatten(1, size)).flatten(1, 2)
        output = output + F.pad(near, (0, 0, 1, 0))
        return self.proj_drop(self.proj(output))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, agent_num={self.agent_num}"


class AgentReducedAttention(Agents, Mixer, name="agent_pvt"):
    """Agent attention with keys and values of a smaller map, the mixer of Agent-PVT.

    As `AgentAttention`, with keys and values of S(x), where for sr_ratio R > 1

        S(x) = LayerNorm(sr(x)),  sr a convolution of R x R tokens with stride R,
        out = proj(softmax(scale q P(q)^T + B_Q) softmax(scale P(q) k^T + B_A) v + dwc(U(v)))

    and U is bilinear interpolation back to the map. A map that R does not divide is padded with
    zeros at the bottom and right before sr. Cost for N tokens and n agents: 2 N C^2 (1 + 1 / R^2)
    for the projections, N C^2 for sr if R > 1, 2 N n C (1 + 1 / R^2) of the attention and 9 N C, in
    multiply-adds.

    Args:
        dim: number of channels C.
        num_patches: number of tokens of the square map that the biases of rows and columns belong
            to; on maps of other sizes they are interpolated.
        num_heads: number of heads; divides `dim`.
        qkv_bias: biases of the query, key and value projections.
        sr_ratio: reduction R of the map that is attended to.
        agent_num: number of agents, a square.
        downstream_agent_shape: rows and columns of agents, where they are more or fewer than the
            `agent_num` that the biases belong to, as in the official code for detection and
            segmentation; the biases are interpolated.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: a number of heads or agents, or a size, is impossible.
    """

    paper = PAPER
    linear = True
    operator = NAME
    cost = "4*N*C**2 + 4*N*agent_num*C + 9*N*C"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 32, "num_patches": 64, "num_heads": 2, "agent_num": 9, "qkv_bias": True},
        {"dim": 24, "num_patches": 49, "num_heads": 3, "agent_num": 4, "sr_ratio": 2},
        {"dim": 24, "num_patches": 49, "agent_num": 4, "downstream_agent_shape": (3, 4)},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_patches: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        sr_ratio: int = 1,
        agent_num: int = 49,
        downstream_agent_shape: int | Size | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = "AgentReducedAttention"
        check_numbers(owner, dim, num_heads, agent_num)
        if sr_ratio < 1:
            raise ValueError(f"{owner}: sr_ratio={sr_ratio} must be at least 1")
        side = math.isqrt(max(0, num_patches))
        if side < sr_ratio:
            raise ValueError(
                f"{owner}: num_patches={num_patches} must be at least sr_ratio^2, {sr_ratio**2}"
            )
        factory = {"device": device, "dtype": dtype}
        self.sr_ratio = sr_ratio
        self.q = Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.dwc = depthwise(dim, factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, **factory)
            self.norm = nn.LayerNorm(dim, **factory)
        reduced = side // sr_ratio
        agents = agents_shape(owner, downstream_agent_shape)
        self.make_agents(num_heads, agent_num, (side, side), (reduced, reduced), factory, agents)

    def mix(self, x: Tensor) -> Tensor:
        ratio, source = self.sr_ratio, x
        if ratio > 1:
            padded = pad_map(x, [-length % ratio for length in _size(x)])
            source = self.norm(convolved(self.sr, padded))
        query = self.q(x).unflatten(-1, (self.num_heads, -1))
        key, value = self.kv(source).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        agent = self.agents(x, query, self.q)
        output = self.attend(query, key, value, agent).flatten(-2)
        value = value.flatten(-2)
        if ratio > 1:
            value = F.interpolate(value.permute(0, 3, 1, 2), size=_size(x), mode="bilinear")
            value = value.permute(0, 2, 3, 1)
        return self.proj_drop(self.proj(output + convolved(self.dwc, value)))

    def _weights(self, call: dispatch.Call, wanted: Tensor) -> Tensor:
        if self.sr_ratio == 1:
            return super()._weights(call, wanted)
        return spread(self._key_weights(call, wanted), self.sr_ratio, wanted.shape[-2:])

    def extra_repr(self) -> str:
        parts = f"num_heads={self.num_heads}, agent_num={self.agent_num}"
        return f"{parts}, sr_ratio={self.sr_ratio}"
