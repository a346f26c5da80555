"""What bi-level routing attention is measured on, and against.

The settings are those of BiFormer's first three stages at 224 x 224 pixels, and the first with four
regions, as detectors use it. Peers get the same maps and the same table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.benchmarks.floors import attention_floor
from vitarium.benchmarks.suite import Peer, Suite
from vitarium.ops import Case

N_WIN = 7
REGIONS = N_WIN * N_WIN
HEAD_DIM = 32


def _table(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Different regions in every row, at random."""
    return torch.rand(*shape[:2], REGIONS, generator=generator).topk(shape[2]).indices


def cases(batch_size: int) -> list[Case]:
    """Maps, heads and topk of BiFormer's stages."""
    return [
        Case(
            f"{side}x{side} heads {heads} topk {topk}",
            {
                **dict.fromkeys(
                    ("query", "key", "value"), (batch_size, side, side, heads, HEAD_DIM)
                ),
                "routing": (batch_size, REGIONS, topk),
            },
            {"n_win": N_WIN},
            {"routing": _table},
        )
        for side, heads, topk in ((56, 2, 1), (28, 4, 4), (14, 8, 16), (56, 2, 4))
    ]


# --- peers ---------------------------------------------------------------------------------------


def _regions(x: Tensor) -> Tensor:
    """`(B, regions, tokens, heads, head_dim)` of a map."""
    batch, height, width, heads, dim = x.shape
    x = x.view(batch, N_WIN, height // N_WIN, N_WIN, width // N_WIN, heads, dim)
    return x.transpose(2, 3).reshape(batch, REGIONS, -1, heads, dim)


def _map(x: Tensor, shape: torch.Size) -> Tensor:
    """The map again."""
    batch, height, width, heads, dim = shape
    x = x.view(batch, N_WIN, N_WIN, height // N_WIN, width // N_WIN, heads, dim)
    return x.transpose(2, 3).reshape(shape)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    return scores.softmax(-1) @ value


def _gather(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """The formulation of the paper's code: `gather` from keys and values expanded to all rows."""

    def run(query: Tensor, key: Tensor, value: Tensor, routing: Tensor) -> Tensor:
        pairs = torch.cat([_regions(key).flatten(3), _regions(value).flatten(3)], -1)
        batch, _, tokens, width = pairs.shape
        index = routing[..., None, None].expand(-1, -1, -1, tokens, width)
        everywhere = pairs[:, None].expand(-1, REGIONS, -1, -1, -1)
        taken = everywhere.gather(2, index).flatten(2, 3)  # (B, regions, keys, channels)
        shape = (batch * REGIONS, -1, *query.shape[-2:])
        k, v = (part.reshape(shape).transpose(1, 2) for part in taken.chunk(2, -1))
        q = _regions(query).view(shape).transpose(1, 2)
        return _map(_eager(q, k, v).transpose(1, 2), query.shape)

    return run


def _selected(attend: Attend) -> Callable[[Case, torch.device], Callable[..., Tensor]]:
    """Whole regions copied by `index_select`."""

    def build(case: Case, device: torch.device) -> Callable[..., Tensor]:
        def run(query: Tensor, key: Tensor, value: Tensor, routing: Tensor) -> Tensor:
            first = torch.arange(len(routing), device=routing.device)[:, None, None] * REGIONS
            index = (routing + first).flatten()
            q, k, v = (_regions(x).flatten(0, 1) for x in (query, key, value))
            k, v = (
                x.index_select(0, index).view(len(q), -1, *x.shape[2:]).transpose(1, 2)
                for x in (k, v)
            )
            return _map(attend(q.transpose(1, 2), k, v).transpose(1, 2), query.shape)

        return run

    return build


def _flat(x: Tensor) -> Tensor:
    """`(B, heads, N, head_dim)` of a map, region by region."""
    return _regions(x).flatten(1, 2).transpose(1, 2)


def _chosen(routing: Tensor) -> Tensor:
    """Which regions attend to which, `(B, regions, regions)`."""
    table = torch.zeros(len(routing), REGIONS, REGIONS, dtype=torch.bool, device=routing.device)
    return table.scatter_(2, routing, True)


def _sdpa_masked(case: Case, device: torch.device) -> Callable[..., Tensor]:
    tokens = math.prod(case.shapes["query"][1:3]) // REGIONS

    def run(query: Tensor, key: Tensor, value: Tensor, routing: Tensor) -> Tensor:
        mask = _chosen(routing)[:, None, :, None, :, None]
        mask = mask.expand(-1, -1, -1, tokens, -1, tokens).flatten(4, 5).flatten(2, 3)
        output = F.scaled_dot_product_attention(*map(_flat, (query, key, value)), mask)
        return _map(output.transpose(1, 2), query.shape)

    return run


def _flex(case: Case, device: torch.device) -> Callable[..., Tensor]:
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    count = math.prod(case.shapes["query"][1:3])
    tokens = count // REGIONS
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def run(query: Tensor, key: Tensor, value: Tensor, routing: Tensor) -> Tensor:
        chosen = _chosen(routing)

        def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return chosen[batch, q // tokens, k // tokens]

        blocks = create_block_mask(mask_mod, len(query), None, count, count, device=device)
        # A backward that is timed alone runs many times on one graph, which must keep its buffers.
        with config.patch(donated_buffer=False):
            output = compiled(*map(_flat, (query, key, value)), block_mask=blocks)
        return _map(output.transpose(1, 2), query.shape)

    return run


def floor(case: Case, mode: str, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The bare matrix products of the regions on the CPU, the bytes that must move on CUDA."""
    batch, height, width, heads, _ = case.shapes["query"]
    tokens = height * width // REGIONS
    return attention_floor(
        batch * heads * REGIONS,
        tokens,
        tokens * case.shapes["routing"][2],
        HEAD_DIM,
        HEAD_DIM,
        mode,
        dtype,
        device,
        elements=[math.prod(case.shapes[name]) for name in ("query", "key", "value")],
    )


PEERS: Mapping[str, Peer] = {
    "gather": Peer(_gather, devices=("cpu", "cuda")),
    "select": Peer(_selected(_eager), devices=("cpu", "cuda")),
    "sdpa_select": Peer(_selected(F.scaled_dot_product_attention), devices=("cpu", "cuda")),
    "sdpa_masked": Peer(_sdpa_masked, devices=("cpu", "cuda")),
    "flex": Peer(_flex, devices=("cuda",)),
}

SUITE = Suite(cases, PEERS, floor)
