"""Attention within small windows that fill the map, where no backward follows.

In float32 PyTorch's fused attention for CPUs is the fastest. Tokens of all heads move as wholes
into windows, of which heads are strided views, and back. On maps like 14 x 14 calls of small
operations take as long as copies, so everything about shapes is worked out once.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitarium.ops.additive import Additive
from vitarium.ops.packed import joint
from vitarium.ops.plan import portioned, row_tiles
from vitarium.ops.whole_windows import Axes, Band, Part, geometry
from vitarium.ops.workspace import Workspace

CHUNK = 2 << 20  # bytes of query, key and value in a piece of work

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

Strided = tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides, offset


def serves(query: Tensor, value: Tensor) -> bool:
    """Whether the fused attention computes this, and is the fastest to do so."""
    alike = query.shape[-1] == value.shape[-1]
    return alike and query.dtype == torch.float32 and query.device.type == "cpu"


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, axes: Axes, scale: float
) -> Tensor:
    """What `vitarium.ops.tiled.attend` computes."""
    work, dtype = Workspace(query), query.dtype
    additive = Additive(axes, bias, dtype, work)
    if all(axis.tiles == axis.classes == 1 for axis in axes):
        return attend_tile(query, key, value, additive.of(slice(None), (0, 1)), scale)
    output = query.new_empty(query.shape)
    whole = joint(query, key, value)
    maps = (whole,) if whole is not None else tuple(map(_tokens, (query, key, value)))
    strides = tuple(x.stride() for x in maps)
    for piece in _pieces(query.shape, strides, axes, additive.alike):
        sources = []
        for number, (x, parts) in enumerate(zip(maps, piece.sources)):
            windows = work.take(f"tokens {number}", piece.windows, dtype)
            for part in parts:
                part.of_tiles(windows).copy_(part.of_map(x))
            sources.append(windows)
        table = additive.of(slice(None), piece.band)
        mask = None if table is None else table.transpose(0, 1)
        found = []
        for run in piece.runs:
            heads = (x.as_strided(*strided) for x in sources for strided in run)
            found.append(_flash(*heads, attn_mask=mask, scale=scale)[0].transpose(1, 2))
        tokens = torch.cat(found) if len(found) > 1 else found[0].contiguous()
        for part in piece.targets:
            part.of_map(output).copy_(part.of_tiles(tokens))
    work.close()
    return output


def attend_tile(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor | None, scale: float
) -> Tensor:
    """The same for a map that is one tile, whose tokens stay where they are.

    Args:
        query, key, value: `(B, *spatial, num_heads, channels)`; heads of key and value repeat.
        table: what is added to scores: `(num_heads or 1, 1, queries, keys)`.
        scale: factor on the scores.
    """
    group = query.shape[-2] // key.shape[-2]
    shape = query.shape
    tensors = (tensor.flatten(1, -3).transpose(1, 2) for tensor in (query, key, value))
    # It takes strides for all dimensions but the last.
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
    if group > 1:
        key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    mask = None if table is None else table.transpose(0, 1)
    output, _ = _flash(query, key, value, attn_mask=mask, scale=scale)
    return output.transpose(1, 2).contiguous().view(shape)


def _tokens(x: Tensor) -> Tensor:
    """`(B, *spatial, heads, channels)` as `(B, *spatial, 1, heads * channels)`."""
    return x.flatten(-2).unsqueeze(-2)


class _Piece(NamedTuple):
    """A band of windows of some images.

    Attributes:
        band: which rows of windows.
        windows: shape of the tokens of one source in windows.
        sources: by source, where its tokens lie in the map and in windows.
        runs: what is computed at once: the heads of the windows of a source, each `(windows,
            heads, tokens, channels)`.
        targets: where windows of the output lie in the map.
    """

    band: Band
    windows: tuple[int, ...]
    sources: tuple[Sequence[Part], ...]
    runs: tuple[tuple[Strided, ...], ...]
    targets: Sequence[Part]


@functools.lru_cache(maxsize=256)
def _pieces(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], axes: Axes, alike: bool
) -> list[_Piece]:
    """Pieces of work that stay in cache.

    Args:
        shape: of query.
        strides: of the sources `(B, *spatial, 1, channels)`: query, key and value, or all in one.
        alike: whether windows have the same mask. One that differs has no stride from an image to
            the next, so that images take turns.
    """
    images, *spatial, heads, channels = shape
    window, size = math.prod(axis.tile for axis in axes), heads * channels
    inside = 3 // len(strides)  # of query, key and value in one source
    row = 12 * row_tiles(axes) * window * size
    bands, chunks = portioned((images, 1), axes[0].tiles, row, CHUNK)
    pieces = []
    for chunk, band in itertools.product(chunks, bands):
        first, count = chunk.images.start, chunk.pairs[0]
        placed = functools.partial(_placed, first, count, tuple(spatial), axes, band)
        sources = [placed(inside * size, steps) for steps in strides]
        windows = sources[0][0]
        turns = 1 if alike else count
        of_heads = (math.prod(windows[:-1]) // window // turns, heads, window, channels)
        steps = (window * inside * size, channels, inside * size, 1)
        runs = tuple(
            tuple(
                (of_heads, steps, turn * of_heads[0] * steps[0] + n * size) for n in range(inside)
            )
            for turn in range(turns)
        )
        contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape) - 2))
        pieces.append(
            _Piece(
                band,
                windows,
                tuple(parts for _, parts in sources),
                runs,
                placed(size, (*contiguous, 0, 1))[1],
            )
        )
    return pieces


def _placed(
    first: int,
    count: int,
    spatial: tuple[int, ...],
    axes: Axes,
    band: Band,
    channels: int,
    strides: tuple[int, ...],
) -> tuple[tuple[int, ...], list[Part]]:
    """Shape and parts of windows of images from the first on, of a `(B, *spatial, 1, channels)`."""
    shape = (1, count, *spatial, channels)
    windows, parts = geometry(shape, (0, *strides[:-2], strides[-1]), axes, band)
    offset = first * strides[0]
    return windows, [part._replace(map_offset=part.map_offset + offset) for part in parts]
