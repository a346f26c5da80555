"""Launches the kernels of window attention for windows that fit one tile.

`fits` says which calls these are; all others are those of `vitarium.ops.kernels.local`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from vitarium.ops.kernels import window_kernels
from vitarium.ops.kernels.launch import (
    capability,
    diagonal_sums,
    large,
    launch,
    map_strides,
    widths,
)
from vitarium.ops.windows import Block, Pattern

AXES = 2
LARGEST_TILE = 64  # tokens
# Tokens of windows that share a tile, at most: alone they would leave most of it empty. And by
# element size tokens of that tile: without tensor cores products with what no query sees cost time.
TINY = 8
PATCH = {2: 64, 4: 32}
# A program walks over as many windows as leave this many programs, or half as many where walks are
# short: enough for the multiprocessors, few enough for the bias and the mask to be worth it.
# Constants, so that results do not depend on a device.
PROGRAMS = {"forward": 1024, "backward": 512}
SHORT_WALK, LONGEST_WALK = 4, 32

# (kernel, element size) -> by padded head_dim: num_warps for a tile of 64 tokens, of which smaller
# ones have fewer, num_stages and, where the assembler would else spill a few registers,
# max_registers. In three stages the next window is loaded during a whole step; in two its loads
# begin when the step is over. As in `tiles.py`, read off ahead-of-time compilation.
_SIZES: dict[tuple[str, int], dict[int, tuple[int, ...]]] = {
    ("forward", 2): {32: (4, 3), 64: (4, 3), 128: (4, 1)},
    ("forward", 4): {32: (8, 1)},
    ("backward", 2): {32: (4, 3), 64: (8, 3)},
    ("backward", 4): {32: (8, 1, 255)},
}
# Before compute capability 9.0 operands of products need registers: too many for the backward to
# load the next window meanwhile.
_SIZES_BEFORE_90 = {
    **_SIZES,
    ("forward", 2): {**_SIZES["forward", 2], 32: (4, 3, 168)},
    ("backward", 2): {32: (4, 1)},
}


def fits(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, windows: Sequence[Pattern]
) -> bool:
    """Whether the kernel, "forward" or "backward", can run this call."""
    one_head = query.shape[-2] == key.shape[-2]
    return (kernel == "forward" or one_head) and _config(kernel, query, value, windows) is not None


def _config(
    kernel: str, query: Tensor, value: Tensor, windows: Sequence[Pattern]
) -> dict[str, Any] | None:
    """Shape of the tile and options of the launch; None if the windows or heads are too large."""
    head_dim = max(query.shape[-1], value.shape[-1])
    return _lookup(kernel, capability(), query.element_size(), head_dim, tuple(windows))


@functools.lru_cache(maxsize=1024)
def _lookup(
    kernel: str, capability: int, element_size: int, head_dim: int, windows: tuple[Pattern, ...]
) -> dict[str, Any] | None:
    sizes = (_SIZES if capability >= 90 else _SIZES_BEFORE_90)[kernel, element_size]
    simple = all(isinstance(window, Block) and not window.halo for window in windows)
    if len(windows) > AXES or not simple or head_dim > max(sizes):
        return None
    tokens, columns = _tile(_patch(windows, element_size))
    if tokens > LARGEST_TILE:
        return None
    warps, stages, *registers = sizes[min(dim for dim in sizes if dim >= head_dim)]
    return {
        "BLOCK": tokens,
        "COLUMNS": columns,
        "num_warps": max(1, warps * tokens // LARGEST_TILE),
        "num_stages": stages,
        "max_registers": registers[0] if registers else None,
    }


@functools.lru_cache(maxsize=1024)
def _patch(windows: tuple[Block, ...], element_size: int) -> tuple[Block, ...]:
    """The windows, or for tiny ones the patches of them that tiles hold."""
    sizes, tokens = [window.window_size for window in windows], PATCH[element_size]
    if math.prod(sizes) > TINY:
        return windows
    across = (8 if len(windows) == AXES else tokens) // sizes[-1] * sizes[-1]
    down = tokens // triton.next_power_of_2(across)
    lengths = [down // size * size for size in sizes[:-1]] + [across]
    if not all(lengths):  # too high for the tile
        return windows
    return tuple(  # with the same lead
        window._replace(window_size=length, shift=-window.lead % length)
        for window, length in zip(windows, lengths)
    )


def _tile(windows: Sequence[Pattern]) -> tuple[int, int]:
    """Tokens of a tile that holds a window, a power of two, and of each of its rows.

    Rows are lengthened to a power of two where that costs nothing: it spares divisions.
    """
    height, width = _two((window.window_size for window in windows), 1)
    tokens = max(16, triton.next_power_of_2(height * width))  # the least of a matrix product
    columns = triton.next_power_of_2(width)
    return tokens, columns if height * columns <= tokens else width


def _two(values: Any, fill: Any) -> tuple[Any, Any]:
    """`values` with an entry in front for the axis that a row lacks."""
    values = tuple(values)
    return (fill,) * (AXES - len(values)) + values


def _axis(length: int, window: Block) -> tuple[int, int, int, int]:
    """How the windows of an axis lie in all residue classes.

    Returns:
        Their number; number of the first that looks like those that follow, how many do, and by
        how many positions the tokens before the axis are moved, 0 if they are not.
    """
    size, lead = window.window_size, window.lead
    n = -(-length // window.dilation)
    count = -(-(n + lead) // size)
    last = n + lead - (count - 1) * size  # tokens in the last window
    wrap = 0
    if count > 1 and last <= lead:  # they fit before those of the first window
        count -= 1
        wrap = count * size
    cut = not wrap and (last < size or length % window.dilation > 0)
    first = min(count, int(lead > 0))
    return count, first, count - first - int(cut and count > first), wrap


@functools.lru_cache(maxsize=1024)
def _geometry(
    kernel: str,
    batch: int,
    heads: int,
    spatial: tuple[int, ...],
    windows: tuple[Block, ...],
    patch: tuple[Block, ...],
    dense: bool,
) -> tuple[int, dict[str, Any]]:
    """Number of programs, and the arguments that follow from the sizes.

    `patch`: what tiles hold, of `_patch`. `dense`: images lie one behind the other in all tensors.
    """
    alone = Block(1, 1, 0, 0, 0)
    sizes = (axis.window_size for axis in _two(windows, alone))
    axes = _two(patch, alone)
    lengths = _two(spatial, 1)
    (tiles_y, first_row, rows, wrap_y), (tiles_x, _, _, wrap_x) = map(_axis, lengths, axes)
    places = heads * tiles_x * axes[0].dilation * axes[1].dilation
    total = places * tiles_y * batch
    steps = max(total // PROGRAMS[kernel], min(2 * total // PROGRAMS[kernel], SHORT_WALK))
    steps = max(1, min(steps, LONGEST_WALK))
    if dense and rows * axes[0].window_size == lengths[0]:  # images are rows of one large image
        tiles_y, rows, batch = tiles_y * batch, rows * batch, 1
    elif batch >= rows:
        first_row = rows = 0
    walks = batch * triton.cdiv(rows, steps) + (tiles_y - rows) * triton.cdiv(batch, steps)
    return places * walks, {
        "images": batch,
        "heads": heads,
        "height": lengths[0],
        "width": lengths[1],
        "size_y": axes[0].window_size,
        "size_x": axes[1].window_size,
        **dict(zip(("window_y", "window_x"), sizes)),
        "dilation_y": axes[0].dilation,
        "dilation_x": axes[1].dilation,
        "lead_y": axes[0].lead,
        "lead_x": axes[1].lead,
        "wrap_y": wrap_y,
        "wrap_x": wrap_x,
        "tiles_x": tiles_x,
        "first_row": first_row,
        "rows": rows,
        "steps": steps,
        "SHIFTED": any(axis.lead for axis in axes),
        "PATCH": patch != windows,
    }


def _arguments(
    kernel: str, bias: Tensor | None, windows: Sequence[Pattern], *tensors: Tensor
) -> tuple[int, dict[str, Any]]:
    """Number of programs, and arguments and options that both kernels have.

    `tensors`: query, key, value and, if there is one, the gradient of the output.
    """
    query, key, value = tensors[:3]
    batch, height, heads = query.shape[0], query.shape[1], query.shape[-2]
    dense = len(windows) == AXES and all(
        batch == 1 or tensor.stride(0) == height * tensor.stride(1) for tensor in tensors
    )
    patch = _patch(tuple(windows), query.element_size())
    programs, geometry = _geometry(
        kernel, batch, heads, tuple(query.shape[1:-2]), tuple(windows), patch, dense
    )
    config = _config(kernel, query, value, windows)
    assert config is not None, "the call does not fit"
    bias_strides = (0,) * (1 + AXES)
    if bias is not None:
        bias_strides = (bias.stride(0), *_two(bias.stride()[1:], 0))
    return programs, {
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "query_strides": map_strides(query),
        "key_strides": map_strides(key),
        "value_strides": map_strides(value),
        "bias_strides": bias_strides,
        **config,
        **geometry,
        **widths(query, value),
    }


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    windows: Sequence[Pattern],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What `vitarium.ops.kernels.local.forward` computes, of tensors that are not empty."""
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
    programs, arguments = _arguments("forward", bias, windows, query, key, value)
    launch(
        window_kernels.forward_kernel,
        programs,
        query.device,
        output=output,
        logsumexp=logsumexp,
        scale=scale,
        GROUP=query.shape[-2] // key.shape[-2],
        LARGE=large(query, key, value, output),
        **arguments,
    )
    return output, logsumexp


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    windows: Sequence[Pattern],
    scale: float,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `vitarium.ops.kernels.local.backward` computes, of tensors that are not empty."""
    grads = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
    programs, arguments = _arguments("backward", bias, windows, query, key, value, grad_output)
    partial_sums = None
    if bias is not None and bias_needs_grad:
        shape = (programs, arguments["BLOCK"], arguments["BLOCK"])
        partial_sums = query.new_empty(shape, dtype=torch.float32)
    launch(
        window_kernels.backward_kernel,
        programs,
        query.device,
        logsumexp=logsumexp,
        grad_output=grad_output,
        grad_query=grads[0],
        grad_key=grads[1],
        grad_value=grads[2],
        partial_sums=partial_sums,
        grad_output_strides=map_strides(grad_output),
        scale=scale,
        LARGE=large(query, key, value, grad_output, *grads),
        **arguments,
    )
    if bias is None or partial_sums is None:
        return *grads, query.new_empty(0)
    return *grads, _grad_bias(partial_sums, bias, windows, query.element_size())


def _grad_bias(
    partial_sums: Tensor, bias: Tensor, windows: Sequence[Pattern], element_size: int
) -> Tensor:
    """The gradient of the table from that of the score of every pair in a window, by program."""
    patch = _patch(tuple(windows), element_size)
    heads, height = bias.shape[0], _two((window.window_size for window in patch), 1)[0]
    _, columns = _tile(patch)
    count = height * columns
    sums = partial_sums.unflatten(0, (-1, heads)).sum(0)[:, :count, :count]
    sums = sums.reshape(heads, height, columns, height, columns).transpose(2, 3).contiguous()
    table = diagonal_sums(sums, (0, 0), _two((window.reach for window in windows), 0))
    return table.reshape(bias.shape).to(bias.dtype)
