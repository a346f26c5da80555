"""Maps as rows of tokens: what kernels share whose tiles are addressed by the number of a token.

Tokens of a map count in raster order, and those of all images lie at equal distances, so that two
strides address maps of any size: nothing here is compiled anew for another size. Kernels take a
map `(B, *spatial, heads, channels)` as a triple, a view: tensor, stride of tokens, stride of heads.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

LARGEST_OFFSET = 1 << 31  # that 32 bits do not hold

View = tuple[Tensor, int, int]


@functools.lru_cache(maxsize=4096)
def distances(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int] | None:
    """Strides of tokens and of heads; None if two do not address the map, or channels lie apart."""
    *sizes, heads, channels = shape
    token = step = None
    for size, stride in zip(reversed(sizes), reversed(strides[:-2])):
        if size == 1:
            continue
        if step is not None and stride != step:
            return None
        token = stride if token is None else token
        step = stride * size
    if strides[-1] != 1 and channels != 1:
        return None
    return heads * channels if token is None else token, strides[-2]


def view(tensor: Tensor) -> View:
    """The view of a map.

    Maps whose channels do not lie next to each other, or whose tokens not at equal distances, are
    copied: reading these in place costs a GPU more than the copy.
    """
    found = distances(tensor.shape, tensor.stride())
    if found is not None:
        return tensor, *found
    heads, channels = tensor.shape[-2:]
    return tensor.contiguous(), heads * channels, channels


@functools.lru_cache(maxsize=4096)
def _told(
    head_dim: int, value_dim: int, maps: tuple[tuple[tuple[int, ...], int, int], ...]
) -> tuple[int, bool]:
    """ALIGN and LARGE for maps of these shapes and strides of tokens and heads."""
    align, most = math.gcd(16, head_dim, value_dim), 0
    for shape, token, head in maps:
        align = math.gcd(align, token, head)
        width = shape[-2] * max(head_dim, value_dim)
        most = max(most, math.prod(shape[1:-2]) * max(token, width))
    return align, most >= LARGEST_OFFSET


def views(widths: dict[str, Any], **maps: Tensor) -> dict[str, Any]:
    """Views of maps by name, `widths` of `launch.widths`, and ALIGN and LARGE of `vectors`.

    These hold for contiguous results of the same widths and numbers of tokens and heads, too.
    """
    found: dict[str, Any] = {name: view(tensor) for name, tensor in maps.items()}
    shapes = tuple((tensor.shape, token, head) for tensor, token, head in found.values())
    align, large = _told(widths["D"], widths["VALUE_D"], shapes)
    return {**widths, **found, "ALIGN": align, "LARGE": large}


@triton.jit
def vectors(view, first, head, token, BLOCK: tl.constexpr, LARGE: tl.constexpr,
            ALIGN: tl.constexpr):  # fmt: skip
    """Pointers (tokens, BLOCK) to the vectors of one head.

    `token` counts from the token number `first`, that of an image. LARGE: 32 bits do not hold an
    offset within one image. ALIGN divides both strides, which the compiler would have to know to
    load several channels at once.
    """
    if LARGE:
        token = token.to(tl.int64)
    base = tl.multiple_of(first.to(tl.int64) * view[1] + head * view[2], ALIGN)
    offset = tl.multiple_of(token * view[1], ALIGN)
    return view[0] + base + (offset[:, None] + tl.arange(0, BLOCK)[None, :])


@triton.jit
def vector_mask(present, D: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of vectors exist; `present` is None where all tokens do."""
    channels = (tl.arange(0, BLOCK) < D)[None, :]
    if present is None:
        return channels
    elif D == BLOCK:
        return present[:, None]
    else:
        return present[:, None] & channels


@triton.jit
def load_vectors(view, first, head, token, present, D: tl.constexpr, BLOCK: tl.constexpr,
                 LARGE: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Vectors of tokens, (tokens, BLOCK); zero where `present` is false and beyond D."""
    source = vectors(view, first, head, token, BLOCK, LARGE, ALIGN)
    if present is None and D == BLOCK:
        return tl.load(source)
    else:
        return tl.load(source, mask=vector_mask(present, D, BLOCK), other=0.0)


@triton.jit
def store_vectors(view, first, head, token, present, rows, D: tl.constexpr, BLOCK: tl.constexpr,
                  LARGE: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Writes what `load_vectors` reads, in the tensor's dtype."""
    target = vectors(view, first, head, token, BLOCK, LARGE, ALIGN)
    rows = rows.to(view[0].dtype.element_ty)
    if present is None and D == BLOCK:
        tl.store(target, rows)
    else:
        tl.store(target, rows, mask=vector_mask(present, D, BLOCK))


@triton.jit
def numbers(tensor, first, heads, head, token, LARGE: tl.constexpr):
    """Pointers to one number per token of a contiguous tensor `(B, *spatial, heads)`."""
    if LARGE:
        token = token.to(tl.int64)
    return tensor + (first.to(tl.int64) * heads + head) + token * heads


@triton.jit
def load_numbers(tensor, first, heads, head, token, present, other, LARGE: tl.constexpr):
    """One number per token, `other` where `present` is false."""
    source = numbers(tensor, first, heads, head, token, LARGE)
    if present is None:
        return tl.load(source)
    else:
        return tl.load(source, mask=present, other=other)


@triton.jit
def store_numbers(tensor, first, heads, head, token, present, values, LARGE: tl.constexpr):
    """Writes what `load_numbers` reads."""
    tl.store(numbers(tensor, first, heads, head, token, LARGE), values, mask=present)


@triton.jit
def load_queries(
    query, grad_output, logsumexp, delta, first, heads, head, token, present,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """What the gradient of the scores needs of queries; their weights are 0 where absent.

    Query, gradient of the output, base-2 log-sum-exp of the scores, and delta, the sum of a row's
    weights times their gradients.
    """
    q = load_vectors(query, first, head, token, present, D, BLOCK_D, LARGE, ALIGN)
    grad = load_vectors(
        grad_output, first, head, token, present, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN
    )
    row_logsumexp = load_numbers(logsumexp, first, heads, head, token, present, float("inf"), LARGE)
    row_delta = load_numbers(delta, first, heads, head, token, present, 0.0, LARGE)
    return q, grad, row_logsumexp, row_delta


@triton.jit
def load_pair(
    key, value, first, head, token, present,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr,
    LARGE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Keys and values of tokens."""
    k = load_vectors(key, first, head, token, present, D, BLOCK_D, LARGE, ALIGN)
    v = load_vectors(value, first, head, token, present, VALUE_D, BLOCK_VALUE_D, LARGE, ALIGN)
    return k, v
