"""Launches the kernels of causal linear attention.

Arguments are those that `vitarium.ops.causal_linear_attention` has checked.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from vitarium.ops.kernels import causal_linear_kernels, launch
from vitarium.ops.kernels.rows import view, views

# Tokens are cut into segments until there are so many programs, as long as a segment has so many
# chunks. Constants, so that the result does not depend on a device.
PROGRAMS = 512
CHUNKS = 8
SLOWEST = -1e30  # base-2 logarithm in place of that of decay 0: finite, for it meets distance 0

# By element size and padded head_dim: tokens of a chunk, value channels of a launch, num_warps,
# num_stages and, where the assembler would else spill, max_registers. Read off ahead-of-time
# compilation. Wider heads take several launches, one for each part of head_dim: the output is a sum
# over its channels.
_SIZES: dict[int, dict[int, tuple[int, ...]]] = {
    2: {
        16: (64, 64, 4, 3),
        32: (64, 64, 4, 3),
        64: (32, 64, 4, 3, 255),
        128: (32, 64, 8, 2, 255),
        256: (16, 32, 8, 1),
    },
    4: {16: (32, 32, 4, 2, 255), 32: (32, 32, 8, 2)},
}


@functools.lru_cache(maxsize=256)
def _rates(decays: tuple[float, ...], device: torch.device) -> Tensor | None:
    """Base-2 logarithms of the decays, `(heads,)`; None if nothing is forgotten."""
    if all(decay == 1 for decay in decays):
        return None
    return torch.tensor(
        [math.log2(decay) if decay else SLOWEST for decay in decays],
        dtype=torch.float32,
        device=device,
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decays: list[float],
    scale: float,
    reverse: bool = False,
) -> Tensor:
    """Causal linear attention of `(B, N, heads, channels)`; `reverse`: to later tokens instead."""
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    if not output.numel():
        return output
    rates = _rates(tuple(decays), query.device)
    sizes = _SIZES[query.element_size()]
    widest = min(max(sizes), max(16, 1 << (query.shape[-1] - 1).bit_length()))
    block, width, num_warps, num_stages, *registers = sizes[widest]
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "max_registers": registers[0] if registers else None,
        "BLOCK": block,
        "REVERSE": reverse,
    }
    for start in range(0, value.shape[-1], width):
        part = slice(start, start + width)
        for first in range(0, query.shape[-1], widest):
            channels = slice(first, first + widest)
            _launch(
                query[..., channels], key[..., channels], value[..., part], output[..., part],
                rates, scale, first > 0, options,
            )  # fmt: skip
    return output


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    rates: Tensor | None,
    scale: float,
    adds: bool,
    options: dict[str, Any],
) -> None:
    batch, tokens, heads, _ = query.shape
    chunks = -(-tokens // options["BLOCK"])
    segments = max(1, min(PROGRAMS // (batch * heads), chunks // CHUNKS))
    each = -(-chunks // segments)
    segments = -(-chunks // each)
    maps = views(launch.widths(query, value), query=query, key=key, value=value)
    arguments = {
        **{name: maps[name] for name in maps if name != "query"},
        "rates": rates,
        "states": None,
        "tokens": tokens,
        "heads": heads,
        "chunks": each,
        "FORGETS": rates is not None,
        **options,
    }
    if segments > 1:
        blocks = (maps["BLOCK_D"], maps["BLOCK_VALUE_D"])
        states = query.new_empty(batch, heads, segments - 1, *blocks, dtype=torch.float32)
        arguments["states"] = states
        launch.launch(
            causal_linear_kernels.state_kernel,
            batch * heads * (segments - 1),
            query.device,
            segments=segments - 1,
            **arguments,
        )
    launch.launch(
        causal_linear_kernels.attend_kernel,
        batch * heads * segments,
        query.device,
        query=maps["query"],
        output=view(output),
        segments=segments,
        scale=scale,
        ADDS=adds,
        **arguments,
    )
