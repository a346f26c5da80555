"""Mixers of agent attention in windows (Agent-Swin) and in stripes of the map (Agent-CSwin).

Every window has agents of its own; all share the biases. Han et al. (arXiv 2312.08874).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.agent import NAME
from vitarium.ops.agent_mixers import (
    PAPER,
    AgentAttention,
    Agents,
    Size,
    check_numbers,
    convolved,
    depthwise,
)
from vitarium.ops.mixer import Mixer, qkv_heads
from vitarium.ops.partition import InWindows, Partition, window_and_shift
from vitarium.ops.projection import Linear


class AgentWindowAttention(InWindows, AgentAttention, name="agent_window"):
    """Agent attention within windows of the map, the mixer of Agent-Swin.

    With q, k, v of qkv(x), P(q) the queries of a window pooled to sqrt(agent_num) x
    sqrt(agent_num) agents, and biases as in `AgentAttention`:

        out = proj(softmax(scale q P(q)^T + B_Q) softmax(scale P(q) k^T + B_A) v + dwc(v))

    within each window, convolution included. A shifted map is rolled without a mask, so windows at
    the border hold tokens of opposite borders, as in the official code. A map that windows do not
    divide is padded with zeros at the bottom and right before the projection; along an axis no
    longer than the window there is one window as long as it. Cost for N tokens and n agents:
    4 N C^2 for the projections, 4 N n C of the attention and 9 N C, in multiply-adds.

    Args:
        dim: number of channels C.
        window_size: the window, a length or one per dimension (H, W).
        num_heads: number of heads; divides `dim`.
        qkv_bias: bias of the query, key and value projection.
        shift_size: tokens that the windows are shifted by.
        agent_num: number of agents of a window, a square.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: a number of heads or agents, or a size, is impossible.
    """

    cost = "4*N*C**2 + 4*N*agent_num*C + 9*N*C"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 32, "window_size": 5, "num_heads": 2, "agent_num": 4, "shift_size": 2},
    )

    def __init__(
        self,
        dim: int,
        *,
        window_size: int | Size = 7,
        num_heads: int,
        qkv_bias: bool = True,
        shift_size: int | Size = 0,
        agent_num: int = 49,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        window, shift = window_and_shift(type(self).__name__, window_size, shift_size)
        super().__init__(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            agent_num=agent_num,
            window=window,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )
        self.window_size, self.shift_size = window, shift


class AgentStripes(Agents):
    """Agent attention within stripes of a map, one branch of Agent-CSwin, without projections.

    Args:
        dim: number of channels C.
        resolution: side of the map that the biases of rows and columns belong to; on maps of other
            sizes they are interpolated.
        idx: which stripes: 0 upright ones as high as the map, 1 those as wide as it, -1 one stripe
            that is the map.
        split_size: width of a stripe.
        num_heads: number of heads; divides `dim`.
        agent_num: number of agents of a stripe, a square.

    Raises:
        ValueError: a number of heads or agents, a size or `idx` is impossible.
    """

    def __init__(
        self,
        dim: int,
        *,
        resolution: int,
        idx: int,
        split_size: int = 7,
        num_heads: int = 8,
        agent_num: int = 49,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = "AgentStripes"
        check_numbers(owner, dim, num_heads, agent_num)
        for name, size in (("resolution", resolution), ("split_size", split_size)):
            if size < 1:
                raise ValueError(f"{owner}: {name}={size} must be at least 1")
        if idx not in (-1, 0, 1):
            raise ValueError(f"{owner}: idx={idx} is unknown; allowed are -1, 0, 1")
        factory = {"device": device, "dtype": dtype}
        self.idx = idx
        self.split_size = split_size
        self.get_v = depthwise(dim, factory)
        size = self.partition((resolution, resolution)).window_size
        self.make_agents(num_heads, agent_num, size, size, factory)

    def partition(self, size: Size) -> Partition:
        """The stripes of a map of this size."""
        return Partition.stripes(size, self.idx, self.split_size)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The map `(B, H, W, C)` of queries, keys and values of that shape.

        Where stripes do not divide it, all three are padded with zeros at the bottom and right.
        """
        partition = self.partition((query.shape[1], query.shape[2]))
        query, key, value = map(partition.split, (query, key, value))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (query, key, value))
        output = self.attend(q, k, v, self.pooled(query)).flatten(-2)
        return partition.join(output + convolved(self.get_v, value))


class AgentCrossShapedAttention(Mixer, name="agent_cswin"):
    """Agent attention in a cross-shaped window, the mixer of Agent-CSwin.

    With q, k, v of qkv(x), half of the channels and heads attend within upright stripes of the map
    and the others within level ones, all by way of the agents of their stripe, P(q):

        branch = softmax(scale q P(q)^T + B_Q) softmax(scale P(q) k^T + B_A) v + get_v(v)
        out = proj([branch_0, branch_1])

    with get_v a depthwise 3 x 3 convolution within the stripe. In the last stage there is one
    branch, on the whole map. Cost for N tokens and n agents: 4 N C^2 for the projections, 4 N n C
    of the attention and 9 N C, in multiply-adds.

    Args:
        dim: number of channels C.
        resolution: side of the map that the biases of rows and columns belong to; on maps of other
            sizes they are interpolated.
        num_heads: number of heads of both branches together.
        split_size: width of a stripe.
        qkv_bias: bias of the query, key and value projection.
        agent_num: number of agents of a stripe, a square.
        last_stage: whether there is one branch on the whole map; so too if the stripes are as wide
            as `resolution`.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: a number of heads or agents, or a size, is impossible.
    """

    paper = PAPER
    linear = True
    operator = NAME
    cost = "4*N*C**2 + 4*N*agent_num*C + 9*N*C"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 32, "resolution": 8, "num_heads": 2, "split_size": 3, "agent_num": 4},
        {"dim": 24, "resolution": 7, "num_heads": 3, "agent_num": 9, "last_stage": True},
    )

    def __init__(
        self,
        dim: int,
        *,
        resolution: int,
        num_heads: int,
        split_size: int = 7,
        qkv_bias: bool = False,
        agent_num: int = 49,
        last_stage: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        branches = (-1,) if last_stage or resolution == split_size else (0, 1)
        count = len(branches)
        if num_heads < 1 or num_heads % count or dim % num_heads:
            raise ValueError(
                f"AgentCrossShapedAttention: num_heads={num_heads} must divide dim={dim}, and the "
                f"branches, {count}, must divide num_heads"
            )
        self.num_heads = num_heads
        factory = {"device": device, "dtype": dtype}
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.attns = nn.ModuleList(
            AgentStripes(
                dim // count,
                resolution=resolution,
                idx=idx,
                split_size=split_size,
                num_heads=num_heads // count,
                agent_num=agent_num,
                **factory,
            )
            for idx in branches
        )

    def mix(self, x: Tensor) -> Tensor:
        count = len(self.attns)
        parts = (part.flatten(-2).chunk(count, -1) for part in qkv_heads(self.qkv, x, count))
        found = [branch(*three) for branch, three in zip(self.attns, zip(*parts))]
        return self.proj_drop(self.proj(found[0] if count == 1 else torch.cat(found, -1)))

    def _followed(self, calls: Sequence[dispatch.Call], wanted: Tensor) -> Tensor:
        size = (wanted.shape[-2], wanted.shape[-1])
        found = [
            branch.partition(size).weights(self, call, wanted)  # type: ignore[operator, union-attr]
            for branch, call in zip(self.attns, calls)
        ]
        return torch.cat(found, 1)
