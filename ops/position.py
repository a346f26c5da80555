"""Position bias from coordinates: log-spaced distances, and what a small network makes of them.

Liu et al., "Swin Transformer V2" (arXiv 2111.09883, section 3.3); for queries and pooled keys of
maps of any size: Shi, "TransNeXt" (2311.17132, section 3.3). A network that takes distances in
place of a table of them has an answer for maps that it was not trained on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitarium.ops import dispatch

Size = tuple[int, int]

CPU_ROWS = 1024  # rows of a table whose hidden units stay in cache
KEPT_ROWS = 1 << 14  # up to which training keeps the hidden units; of more it computes them again

P = ParamSpec("P")
T = TypeVar("T")


def _recorded() -> bool:
    """True while a graph is made, of which sizes may be variables."""
    return torch.compiler.is_compiling() or dispatch.plain_aten()


def kept(make: Callable[P, T]) -> Callable[P, T]:
    """Decorator: tensors that follow from sizes and a device are made once, and not written to.

    Only plain tensors are kept: a compiler, an exporter or a fake tensor mode gets its own.
    """
    cached = functools.lru_cache(maxsize=256)(make)

    @functools.wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> T:
        if _recorded() or type(torch.empty(0)) is not Tensor:
            return make(*args, **kwargs)
        with torch.inference_mode(False):  # or no later backward could use them
            return cached(*args, **kwargs)

    return get


def pooled_range(queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First query that each key of adaptive average pooling stands for, and one past the last."""
    key = torch.arange(keys, device=device)
    return key * queries // keys, ((key + 1) * queries + keys - 1) // keys


@kept
def _axis(queries: int, keys: int, extent: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index `(queries, keys)` of every pair's distance, and the log-spaced distances, float32."""
    start, stop = pooled_range(queries, keys, device)
    # The centre of the queries that a key stands for lies on one of them or halfway to the next.
    # In halves of a step:
    distance = 2 * torch.arange(queries, device=device)[:, None] - (start + stop - 1)
    reach = 2 * queries - 1 - (queries + keys - 1) // keys
    fixed = isinstance(queries, int)
    step = 2 if fixed and queries % keys == 0 else 1
    found = torch.arange(-reach, reach + 1, step, device=device)
    index = (distance + reach) // step
    if step == 1 and fixed and not _recorded():  # not all of these occur
        centres = [j * queries // keys - -(j + 1) * queries // keys - 1 for j in range(keys)]
        met = {2 * query - centre for query in range(queries) for centre in centres}
        found = torch.tensor(sorted(met), device=device)
        index = torch.searchsorted(found, distance)
    relative = found.float() / 2 / max(extent - 1, 1) * 8
    spaced = torch.sign(relative) * torch.log2(relative.abs() + 1) / math.log2(8)
    return index, spaced


def relative_coordinates(
    query_size: Size,
    key_size: Size,
    pretrain_size: Size | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-spaced distances from the tokens of a map to those of the same map, pooled.

    A key lies at the mean position of the queries that adaptive average pooling makes it of. A
    distance is counted in extents of the map, times 8, and becomes sign(x) log2(|x| + 1) / 3.

    Args:
        query_size: (H, W) of the map.
        key_size: of the pooled map; the same if it is not pooled.
        pretrain_size: of the map whose extent is the unit; `query_size` if None.
        device: of the results.

    Returns:
        Index `(N, M)`, int64, of every pair of query and key (raster order) into the table
        `(T, 2)`, float32, of all distances (vertical, horizontal) that occur, in ascending order.
    """
    if torch.jit.is_tracing():  # which makes tensors of sizes
        query_size, key_size = (tuple(map(int, size)) for size in (query_size, key_size))
    device = torch.device("cpu" if device is None else device)
    extents = query_size if pretrain_size is None else pretrain_size
    (down, rows), (right, columns) = (
        _axis(queries, keys, extent, device)
        for queries, keys, extent in zip(query_size, key_size, extents)
    )
    table = torch.cartesian_prod(rows, columns)
    index = down[:, None, :, None] * columns.shape[0] + right[None, :, None, :]
    return index.flatten(2).flatten(0, 1), table


def _two_layers(fc1: nn.Linear, fc2: nn.Linear, table: Tensor) -> Tensor:
    """`fc2(relu(fc1(table)))`, a chunk at a time: there are far more hidden units than results."""

    def network(rows: Tensor) -> Tensor:
        return fc2(F.relu(fc1(rows)))

    chunk = CPU_ROWS if table.device.type == "cpu" else KEPT_ROWS
    if _recorded() or len(table) <= chunk:
        return network(table)
    if torch.is_grad_enabled() and len(table) > KEPT_ROWS:
        chunks = (
            checkpoint(network, rows, use_reentrant=False, preserve_rng_state=False)
            for rows in table.split(chunk)
        )
        return torch.cat(list(chunks))
    return torch.cat([network(rows) for rows in table.split(chunk)])


def continuous_position_bias(
    fc1: nn.Linear,
    fc2: nn.Linear,
    query_size: Size,
    key_size: Size,
    pretrain_size: Size | None = None,
    of: tuple[Size, Size] | None = None,
) -> Tensor:
    """Bias `(num_heads, N, M)` that two layers make of `relative_coordinates`.

    Args:
        fc1: from the 2 coordinates to the hidden units, a ReLU after it.
        fc2: from them to num_heads.
        query_size, key_size, pretrain_size: as in `relative_coordinates`.
        of: sizes of queries and keys whose bias is computed, and interpolated bilinearly to
            `query_size` and `key_size`; the same if None.
    """
    found = of or (query_size, key_size)
    index, table = relative_coordinates(*found, pretrain_size, fc1.weight.device)
    entries = _two_layers(fc1, fc2, table.to(fc1.weight.dtype))
    # A look-up whose derivative is a sum over rows, unlike that of indexing.
    bias = F.embedding(index, entries).permute(2, 0, 1)
    if found[1] != key_size:
        bias = _resized(bias, found[1], key_size)
    if found[0] != query_size:
        bias = _resized(bias.mT, found[0], query_size).mT
    return bias


def _resized(bias: Tensor, size: Size, wanted: Size) -> Tensor:
    """`(num_heads, N, tokens of size)`, bilinearly interpolated to `(..., tokens of wanted)`."""
    maps = bias.unflatten(-1, size)
    return F.interpolate(maps, size=wanted, mode="bilinear", align_corners=False).flatten(-2)
