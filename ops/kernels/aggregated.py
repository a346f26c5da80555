"""Launches the kernels of aggregated attention, on arguments that the operator has checked."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vitarium.ops.kernels import aggregated_backward, aggregated_forward
from vitarium.ops.kernels.launch import launch, widths
from vitarium.ops.kernels.rows import LARGEST_OFFSET, view, views

# Sums over queries and over images are split among this many programs, as far as their partial sums
# stay this small, and walks over tiles are no longer than leaves as many programs. Constants, so
# that the result does not depend on a device.
PROGRAMS = 1024
PARTIAL_BYTES = 64 << 20
LONGEST_WALK = 14  # tiles of a program
SMALLEST_SCALE = 1e-3  # by which biases are divided

# Sides of a tile of the map by its number of tokens.
_TILES = {16: (4, 4), 32: (4, 8), 64: (8, 8)}

# (kernel, element size) -> by padded head_dim: tokens of a tile, those around it of a step, pooled
# keys of a block (where the kernel has these), num_warps, num_stages. Read off ahead-of-time
# compilation (`vitarium bench kernels`) for compute capability 8.0, 9.0 and 10.0: the fewest
# instructions without register spills.
_SIZES: dict[tuple[str, int], dict[int, tuple[int, int, int, int, int]]] = {
    ("forward", 2): {
        32: (32, 64, 64, 2, 2),
        64: (32, 64, 32, 2, 1),
        128: (32, 32, 32, 4, 1),
        256: (32, 32, 32, 8, 1),
    },
    ("forward", 4): {
        32: (32, 32, 32, 4, 1),
        64: (32, 32, 32, 8, 1),
        128: (16, 16, 32, 8, 1),
        256: (16, 16, 16, 8, 1),
    },
    ("query", 2): {
        32: (32, 32, 32, 2, 1),
        64: (32, 32, 32, 2, 1),
        128: (32, 16, 32, 8, 1),
        256: (16, 16, 16, 8, 1),
    },
    ("query", 4): {
        32: (32, 16, 16, 4, 1),
        64: (16, 16, 16, 8, 1),
        128: (16, 16, 16, 8, 1),
        256: (16, 16, 16, 8, 1),
    },
    ("key_value", 2): {
        32: (32, 16, 16, 1, 1),
        64: (32, 16, 16, 2, 1),
        128: (32, 32, 16, 8, 1),
        256: (16, 16, 16, 8, 1),
    },
    ("key_value", 4): {
        32: (16, 16, 16, 4, 1),
        64: (16, 16, 16, 4, 1),
        128: (16, 16, 16, 8, 1),
        256: (16, 16, 16, 8, 1),
    },
    # Of these two the first number is queries, in raster order.
    ("pooled", 2): {
        32: (32, 0, 64, 4, 2),
        64: (32, 0, 32, 4, 2),
        128: (32, 0, 64, 8, 2),
        256: (32, 0, 32, 8, 1),
    },
    ("pooled", 4): {
        32: (16, 0, 32, 4, 1),
        64: (32, 0, 32, 8, 1),
        128: (16, 0, 32, 8, 1),
        256: (16, 0, 16, 4, 1),
    },
    ("pooled_bias", 2): {
        32: (64, 0, 64, 4, 2),
        64: (64, 0, 32, 4, 2),
        128: (32, 0, 32, 8, 1),
        256: (16, 0, 16, 4, 1),
    },
    ("pooled_bias", 4): {
        32: (32, 0, 32, 4, 1),
        64: (32, 0, 32, 4, 1),
        128: (32, 0, 32, 8, 1),
        256: (16, 0, 16, 4, 1),
    },
}


def _sizes(
    kernel: str, element_size: int, head_dim: int, pooled: int
) -> tuple[int, int, int, dict[str, Any]]:
    """Tokens of a tile and of a step around it, pooled keys of a block, and launch options."""
    rows = _SIZES[kernel, element_size]
    tokens, step, keys, warps, stages = rows[min(d for d in rows if d >= head_dim)]
    options = {"num_warps": warps, "num_stages": stages, "max_registers": min(255, 2048 // warps)}
    return tokens, step, min(keys, _block(pooled)), options


@functools.cache
def _block(pooled: int) -> int:
    """The largest block of pooled keys, which all others divide."""
    return min(64, max(16, triton.next_power_of_2(pooled)))


@functools.lru_cache(maxsize=1024)
def _shares(
    kernel: str,
    element_size: int,
    head_dim: int,
    pooled: int,
    size: tuple[int, int],
    sequences: int,
    window_size: int,
) -> tuple[int, dict[str, Any]]:
    """Number of programs of a kernel whose programs walk over tiles of a map, and their arguments.

    Args:
        size: height and width of the map.
        sequences: images times heads.
    """
    tokens, step, keys, options = _sizes(kernel, element_size, head_dim, pooled)
    tile = _TILES[tokens]
    around = (tile[0] + window_size - 1) * (tile[1] + window_size - 1)
    tiles = triton.cdiv(size[0], tile[0]) * triton.cdiv(size[1], tile[1])
    walk = min(LONGEST_WALK, max(1, sequences * tiles // PROGRAMS))
    shares = triton.cdiv(tiles, walk)
    return sequences * shares, {
        "shares": shares,
        "walk": triton.cdiv(tiles, shares),
        "TILE": tile,
        "BLOCK_W": min(step, triton.next_power_of_2(around)),
        **({} if kernel == "key_value" else {"BLOCK_N": keys, "ONE": pooled <= keys}),
        **options,
    }


def _positive(query: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """Query, a scale that biases can be divided by, and the factor that moved into the query."""
    if scale >= SMALLEST_SCALE:
        return query, scale, 1.0
    return query * scale, 1.0, scale


def _padded(pooled_bias: Tensor, scale: float) -> Tensor:
    """The bias divided by the scale, its rows padded with -inf to a whole number of blocks."""
    if scale != 1:
        exact = pooled_bias.dtype == torch.bfloat16 and math.frexp(scale)[0] == 0.5
        pooled_bias = (pooled_bias if exact else pooled_bias.float()) / scale
    pooled = pooled_bias.shape[-1]
    missing = -pooled % _block(pooled)
    return F.pad(pooled_bias, (0, missing), value=-math.inf).contiguous()


def _weights(window_weights: Tensor | None) -> dict[str, Any]:
    """The window weights and their strides; their tokens lie at equal distances."""
    if window_weights is None:
        return dict.fromkeys(("window_weights", "weights_token", "weights_head", "weights_place"))
    one = window_weights[..., :1]
    found, token, head = view(one)
    if found is not one:
        return _weights(window_weights.contiguous())
    return {
        "window_weights": window_weights,
        "weights_token": token,
        "weights_head": head,
        "weights_place": window_weights.stride(-1),
    }


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    bias: Tensor | None,
    pooled_bias: Tensor | None,
    window_weights: Tensor | None,
    window_size: int,
    scale: float,
    **maps: Tensor,
) -> dict[str, Any]:
    """Arguments that are the same for all kernels; `_launch` passes those that a kernel takes.

    Args:
        maps: further maps, by name.
    """
    qkv = {"query": query, "key": key, "value": value}
    pooled = {"pooled_key": pooled_key, "pooled_value": pooled_value}
    padded = None if pooled_bias is None else _padded(pooled_bias, scale)
    found = {
        **views(widths(query, value), **qkv, **pooled, **maps),
        **_weights(window_weights),
        "bias": None if bias is None else bias.contiguous(),
        "pooled_bias": padded,
        "height": query.shape[1],
        "width": query.shape[2],
        "heads": query.shape[-2],
        "pooled": pooled_key.shape[1],
        "padded": None if padded is None else padded.shape[-1],
        "scale": scale,
        "K": window_size,
        "GROUP": query.shape[-2] // key.shape[-2],
    }
    tokens = query.shape[1] * query.shape[2]
    if window_weights is not None:
        last = tokens * found["weights_token"] + window_size**2 * found["weights_place"]
        found["LARGE"] |= last >= LARGEST_OFFSET
    if padded is not None:
        found["LARGE"] |= tokens * padded.shape[-1] >= LARGEST_OFFSET
    return found


def _launch(
    kernel: Any, programs: int, device: torch.device, arguments: dict[str, Any], **further: Any
) -> None:
    """Launch with those of the arguments that the kernel takes."""
    taken = {name: value for name, value in arguments.items() if name in kernel.arg_names}
    launch(kernel, programs, device, **{**taken, **further})


def _walk(
    kernel: str, query: Tensor, value: Tensor, heads: int, arguments: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """`_shares` of the maps of `heads` heads."""
    return _shares(
        kernel,
        query.element_size(),
        max(query.shape[-1], value.shape[-1]),
        arguments["pooled"],
        (arguments["height"], arguments["width"]),
        query.shape[0] * heads,
        arguments["K"],
    )


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    bias: Tensor | None,
    pooled_bias: Tensor | None,
    window_weights: Tensor | None,
    window_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Aggregated attention.

    Returns:
        The output `(B, H, W, num_heads, value_dim)`, contiguous, and the base-2 log-sum-exp of the
        scores, `(B, H, W, num_heads)`, float32.
    """
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if output.numel() == 0:
        return output, logsumexp
    query, scale, _ = _positive(query, scale)
    rest = (pooled_key, pooled_value, bias, pooled_bias, window_weights, window_size, scale)
    arguments = _arguments(query, key, value, *rest)
    programs, options = _walk("forward", query, value, query.shape[-2], arguments)
    _launch(
        aggregated_forward.forward_kernel,
        programs,
        query.device,
        arguments,
        output=view(output),
        logsumexp=logsumexp,
        **options,
    )
    return output, logsumexp


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    bias: Tensor | None,
    pooled_bias: Tensor | None,
    window_weights: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    window_size: int,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the eight tensors; of the last three None where `needs` says so.

    Args:
        grad_output: `(B, H, W, num_heads, value_dim)`, any strides.
        output, logsumexp: what `forward` returned; the other arguments are what it got.
        needs: by tensor, whether its gradient is wanted.
    """
    grads = [t.new_empty(t.shape) for t in (query, key, value, pooled_key, pooled_value)]
    # Those of the optional ones whose gradient is wanted.
    for_bias, for_pooled_bias, for_weights = (
        tensor if need else None
        for tensor, need in zip((bias, pooled_bias, window_weights), needs[5:])
    )
    if output.numel() == 0:
        rest = (
            None if tensor is None else torch.zeros_like(tensor)
            for tensor in (for_bias, for_pooled_bias, for_weights)
        )
        return *(grad.zero_() for grad in grads), *rest
    query, scale, factor = _positive(query, scale)
    optional = (bias, pooled_bias, window_weights)
    arguments = {
        **_arguments(
            query,
            key,
            value,
            pooled_key,
            pooled_value,
            *optional,
            window_size,
            scale,
            grad_output=grad_output,
        ),
        "logsumexp": logsumexp,
        "delta": torch.empty_like(logsumexp),
    }
    grad_weights = None if for_weights is None else for_weights.new_empty(for_weights.shape)
    programs, options = _walk("query", query, value, query.shape[-2], arguments)
    _launch(
        aggregated_backward.query_kernel,
        programs,
        query.device,
        arguments,
        grad_query=view(grads[0]),
        grad_window_weights=grad_weights,
        **options,
    )
    if factor != 1:
        grads[0] *= factor
    grad_bias = _grad_key_value(query, key, value, grads[1], grads[2], for_bias, arguments)
    grads[3:] = _grad_pooled(query, pooled_key, pooled_value, arguments)
    grad_pooled_bias = None
    if for_pooled_bias is not None:
        grad_pooled_bias = _grad_pooled_bias(query, value, for_pooled_bias, arguments)
    return *grads, grad_bias, grad_pooled_bias, grad_weights


def _grad_key_value(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    bias: Tensor | None,
    arguments: dict[str, Any],
) -> Tensor | None:
    """Writes the gradients of keys and values, and returns that of the bias."""
    heads, group, places = key.shape[-2], arguments["GROUP"], arguments["K"] ** 2
    programs, options = _walk("key_value", query, value, heads, arguments)
    tokens = math.prod(options["TILE"])
    sums = None
    if bias is not None:
        parts = options["walk"] * group
        sums = query.new_empty((programs, parts, tokens, places), dtype=torch.float32)
    _launch(
        aggregated_backward.key_value_kernel,
        programs,
        query.device,
        arguments,
        grad_key=view(grad_key),
        grad_value=view(grad_value),
        bias_sums=sums,
        heads=heads,
        **options,
    )
    if bias is None or sums is None:
        return None
    sums = sums.view(-1, heads, parts // group, group, tokens, places)
    return sums.sum((0, 2, 4)).view(bias.shape).to(bias.dtype)


def _parts(programs: int, steps: int, bytes_of_part: int) -> int:
    """How many partial sums a sum of `steps` terms is split into, with `programs` for each."""
    return max(1, min(PROGRAMS // programs, steps, PARTIAL_BYTES // bytes_of_part))


def _grad_pooled(
    query: Tensor, pooled_key: Tensor, pooled_value: Tensor, arguments: dict[str, Any]
) -> list[Tensor]:
    """Gradients of pooled keys and values."""
    images, pooled, heads, _ = pooled_key.shape
    head_dim = max(query.shape[-1], pooled_value.shape[-1])
    queries, _, keys, options = _sizes("pooled", query.element_size(), head_dim, pooled)
    programs = images * heads * triton.cdiv(pooled, keys)
    steps = arguments["GROUP"] * triton.cdiv(query.shape[1] * query.shape[2], queries)
    parts = _parts(programs, steps, 4 * max(pooled_key.numel(), pooled_value.numel()))
    dtype = torch.float32 if parts > 1 else query.dtype
    grads = [
        tensor.new_empty((parts * images, *tensor.shape[1:]), dtype=dtype)
        for tensor in (pooled_key, pooled_value)
    ]
    _launch(
        aggregated_backward.pooled_kernel,
        programs * parts,
        query.device,
        arguments,
        grad_pooled_key=view(grads[0]),
        grad_pooled_value=view(grads[1]),
        heads=heads,
        images=images,
        parts=parts,
        BLOCK_M=queries,
        BLOCK_N=keys,
        **options,
    )
    return [grad.unflatten(0, (parts, images)).sum(0).to(query.dtype) for grad in grads]


def _grad_pooled_bias(
    query: Tensor, value: Tensor, pooled_bias: Tensor, arguments: dict[str, Any]
) -> Tensor:
    heads, tokens, pooled = pooled_bias.shape
    head_dim = max(query.shape[-1], value.shape[-1])
    queries, _, keys, options = _sizes("pooled_bias", query.element_size(), head_dim, pooled)
    programs = heads * triton.cdiv(tokens, queries) * triton.cdiv(pooled, keys)
    parts = _parts(programs, query.shape[0], 4 * pooled_bias.numel())
    sums = pooled_bias.new_empty((parts, *pooled_bias.shape), dtype=torch.float32)
    _launch(
        aggregated_backward.pooled_bias_kernel,
        programs * parts,
        query.device,
        arguments,
        sums=sums,
        images=query.shape[0],
        parts=parts,
        BLOCK_M=queries,
        BLOCK_N=keys,
        **options,
    )
    return sums.sum(0).to(pooled_bias.dtype)
