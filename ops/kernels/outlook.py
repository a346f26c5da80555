"""Triton kernels of outlook attention.

A token gathers from the windows that cover it: nothing is unfolded, nothing added up in memory, and
each row of scores is read where its token is. Windows are so small that products are sums on
ordinary cores, far from being what takes the time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitarium.ops.kernels import launch
from vitarium.ops.kernels.common import load_tokens, store_tokens
from vitarium.ops.workspace import LOG2E


def forward(
    scores: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output, and the base-2 log-sum-exp of those rows of scores whose tokens lie on the map."""
    scores = scores.contiguous()
    output = value.new_empty(value.shape)
    saved = scores.new_empty(scores.shape[:-1], dtype=torch.float32)
    shared = _arguments(scores, value, kernel_size, stride, padding, scale, output)
    _launch(forward_kernel, math.prod(value.shape[1:3]), scores, value, shared, output=output,
            output_strides=launch.map_strides(output), saved=saved)  # fmt: skip
    return output, saved


def backward(
    grad: Tensor,
    scores: Tensor,
    value: Tensor,
    saved: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of scores and value."""
    scores = scores.contiguous()
    grad_scores, grad_value = torch.empty_like(scores), value.new_empty(value.shape)
    shared = _arguments(scores, value, kernel_size, stride, padding, scale, grad, grad_value)
    shared.update(grad=grad, grad_strides=launch.map_strides(grad), saved=saved)
    _launch(value_kernel, math.prod(value.shape[1:3]), scores, None, shared,
            output=grad_value, output_strides=launch.map_strides(grad_value))  # fmt: skip
    _launch(scores_kernel, math.prod(scores.shape[1:3]), scores, value, shared,
            output=grad_scores, scale=scale)  # fmt: skip
    return grad_scores, grad_value


def _arguments(
    scores: Tensor,
    value: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    scale: float,
    *maps: Tensor,
) -> dict[str, Any]:
    """What all kernels take."""
    widths = launch.widths(value, value)
    return {
        "height": value.shape[1],
        "width": value.shape[2],
        "rows": scores.shape[1],
        "columns": scores.shape[2],
        "heads": value.shape[3],
        "factor": scale * LOG2E,
        "K": kernel_size,
        "STRIDE": stride,
        "PADDING": padding,
        "PLACES": 1 << (kernel_size**2 - 1).bit_length(),
        "D": widths["D"],
        "BLOCK_D": widths["BLOCK_D"],
        "LARGE": launch.large(scores, value, *maps),
    }


def _launch(
    kernel: Any,
    count: int,
    scores: Tensor,
    value: Tensor | None,
    shared: dict[str, Any],
    **arguments: Any,
) -> None:
    """One program for some tokens, or windows, of every image and head: `count` in each image."""
    if value is not None:
        arguments.update(value=value, value_strides=launch.map_strides(value))
    block = 32 if shared["BLOCK_D"] <= 64 and shared["PLACES"] <= 16 else 16
    tiles = (count + block - 1) // block
    programs = tiles * scores.shape[0] * scores.shape[3]
    if programs:
        launch.launch(
            kernel,
            programs,
            scores.device,
            num_warps=4 if shared["BLOCK_D"] <= 128 else 8,
            num_stages=1,
            max_registers=192,  # or the assembler would rather spill some than take a few more
            scores=scores,
            tiles=tiles,
            BLOCK=block,
            **shared,
            **arguments,
        )


@triton.jit
def _split(tiles, heads, columns, BLOCK: tl.constexpr):
    """Image and head of this program, and row and column of its tokens or windows."""
    program = tl.program_id(0)
    index = program % tiles * BLOCK + tl.arange(0, BLOCK)
    return program // tiles // heads, program // tiles % heads, index // columns, index % columns


@triton.jit
def _image(tensor, lines, length, batch):
    """Pointer to an image's rows of scores, each of `length` numbers."""
    return tensor + batch.to(tl.int64) * lines * length


@triton.jit
def _line(row, column, place, columns, heads, head, K: tl.constexpr, LARGE: tl.constexpr):
    """Number of a window's row of scores in its image."""
    window = row * columns + column
    if LARGE:
        window = window.to(tl.int64)
    return (window * heads + head) * (K * K) + place


@triton.jit
def _cover(y, x, number, rows, columns, height, K: tl.constexpr, STRIDE: tl.constexpr,
           PADDING: tl.constexpr):  # fmt: skip
    """The window number `number` over tokens: row, column, the token's place, whether it exists."""
    REACH: tl.constexpr = (K + STRIDE - 1) // STRIDE
    row = (y + PADDING) // STRIDE - number // REACH
    column = (x + PADDING) // STRIDE - number % REACH
    down = y + PADDING - row * STRIDE
    right = x + PADDING - column * STRIDE
    exists = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    exists = exists & (down < K) & (right < K) & (y < height)
    return row, column, down * K + right, exists


@triton.jit
def _token(row, column, place, exists, height, width, K: tl.constexpr, STRIDE: tl.constexpr,
           PADDING: tl.constexpr):  # fmt: skip
    """Position (z, y, x) of a window's token, and whether it lies on the map."""
    y = row * STRIDE - PADDING + place // K
    x = column * STRIDE - PADDING + place % K
    return (y * 0, y, x), exists & (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def forward_kernel(
    scores, value, value_strides, output, output_strides, saved, height, width, rows, columns,
    heads, tiles, factor, K: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    PLACES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    """Output of some tokens, from all windows that cover them."""
    batch, head, y, x = _split(tiles, heads, width, BLOCK)
    lines = rows * columns * heads * (K * K)
    scores = _image(scores, lines, K * K, batch)
    saved = _image(saved, lines, 1, batch)
    places = tl.arange(0, PLACES)[None, :]
    REACH: tl.constexpr = (K + STRIDE - 1) // STRIDE
    accumulator = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for number in range(REACH * REACH):
        row, column, place, exists = _cover(y, x, number, rows, columns, height, K, STRIDE, PADDING)
        line = _line(row, column, place, columns, heads, head, K, LARGE)
        source = scores + line * (K * K)
        mask = exists[:, None] & (places < K * K)
        powers = tl.load(source[:, None] + places, mask=mask, other=0.0).to(tl.float32) * factor
        powers = tl.where(places < K * K, powers, -float("inf"))
        maximum = tl.max(powers, 1)
        total = maximum + tl.log2(tl.sum(tl.exp2(powers - maximum[:, None]), 1))
        tl.store(saved + line, total, mask=exists)
        for other in range(K * K):
            power = tl.load(source + other, mask=exists, other=0.0).to(tl.float32) * factor
            weight = tl.where(exists, tl.exp2(power - total), 0.0)
            position, inside = _token(row, column, other, exists, height, width, K, STRIDE, PADDING)
            tokens = load_tokens(value, value_strides, batch, head, position, inside, (0, 0, 0),
                                 (1, 1, 1), D, BLOCK_D, LARGE)  # fmt: skip
            accumulator += weight[:, None] * tokens.to(tl.float32)
    store_tokens(output, output_strides, batch, head, (y * 0, y, x), y < height, (0, 0, 0),
                 (1, 1, 1), accumulator, D, BLOCK_D, LARGE)  # fmt: skip


@triton.jit
def value_kernel(
    scores, grad, grad_strides, output, output_strides, saved, height, width, rows, columns,
    heads, tiles, factor, K: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    PLACES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    """Gradient of the values of some tokens: as the forward, with weights transposed."""
    batch, head, y, x = _split(tiles, heads, width, BLOCK)
    lines = rows * columns * heads * (K * K)
    scores = _image(scores, lines, K * K, batch)
    saved = _image(saved, lines, 1, batch)
    REACH: tl.constexpr = (K + STRIDE - 1) // STRIDE
    accumulator = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for number in range(REACH * REACH):
        row, column, place, exists = _cover(y, x, number, rows, columns, height, K, STRIDE, PADDING)
        for other in range(K * K):
            position, inside = _token(row, column, other, exists, height, width, K, STRIDE, PADDING)
            line = _line(row, column, other, columns, heads, head, K, LARGE)
            power = tl.load(scores + line * (K * K) + place, mask=inside, other=0.0)
            total = tl.load(saved + line, mask=inside, other=0.0)
            weight = tl.where(inside, tl.exp2(power.to(tl.float32) * factor - total), 0.0)
            tokens = load_tokens(grad, grad_strides, batch, head, position, inside, (0, 0, 0),
                                 (1, 1, 1), D, BLOCK_D, LARGE)  # fmt: skip
            accumulator += weight[:, None] * tokens.to(tl.float32)
    store_tokens(output, output_strides, batch, head, (y * 0, y, x), y < height, (0, 0, 0),
                 (1, 1, 1), accumulator, D, BLOCK_D, LARGE)  # fmt: skip


@triton.jit
def scores_kernel(
    scores, value, value_strides, grad, grad_strides, output, saved, height, width, rows, columns,
    heads, tiles, factor, scale, K: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    PLACES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores of some windows, row by row."""
    batch, head, row, column = _split(tiles, heads, columns, BLOCK)
    lines = rows * columns * heads * (K * K)
    scores = _image(scores, lines, K * K, batch)
    saved = _image(saved, lines, 1, batch)
    output = _image(output, lines, K * K, batch)
    exists = row < rows
    places = tl.arange(0, PLACES)[None, :]
    for place in range(K * K):
        position, inside = _token(row, column, place, exists, height, width, K, STRIDE, PADDING)
        grads = load_tokens(grad, grad_strides, batch, head, position, inside, (0, 0, 0),
                            (1, 1, 1), D, BLOCK_D, LARGE).to(tl.float32)  # fmt: skip
        inner = tl.zeros((BLOCK, PLACES), tl.float32)
        for other in range(K * K):
            position, there = _token(row, column, other, exists, height, width, K, STRIDE, PADDING)
            tokens = load_tokens(value, value_strides, batch, head, position, there, (0, 0, 0),
                                 (1, 1, 1), D, BLOCK_D, LARGE)  # fmt: skip
            product = tl.sum(grads * tokens.to(tl.float32), 1)
            inner = tl.where(places == other, product[:, None], inner)
        line = _line(row, column, place, columns, heads, head, K, LARGE)
        offsets = (line * (K * K))[:, None] + places
        mask = inside[:, None] & (places < K * K)
        powers = tl.load(scores + offsets, mask=mask, other=0.0).to(tl.float32) * factor
        total = tl.load(saved + line, mask=inside, other=0.0)
        weights = tl.where(mask, tl.exp2(powers - total[:, None]), 0.0)
        mean = tl.sum(weights * inner, 1)
        found = weights * (inner - mean[:, None]) * scale
        tl.store(output + offsets, found.to(output.dtype.element_ty),
                 mask=exists[:, None] & (places < K * K))  # fmt: skip
