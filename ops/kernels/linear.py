"""Launches the kernels of linear attention.

Arguments are those that `vitarium.ops.linear_attention` has checked.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitarium.ops.kernels import linear_kernels as kernels
from vitarium.ops.kernels.launch import launch, widths
from vitarium.ops.kernels.rows import view, views
from vitarium.ops.linear_features import HALF, SMALLEST, Focus

MAPS = {"identity": 0, "relu": 1, "leaky_relu": 2, "elu": 3}  # as the kernels number them
MODES = {"none": 0, "sum": 1, "injective": 2}
PLUS = 3

STEPS = {2: 64, 4: 32}  # channels of a block at most, by the bytes of an element
PROGRAMS = 1024  # that a device can be kept busy with
MOST_TILES = 8  # of a part: more tokens for every time that a state is read


def _tokens(x: Tensor) -> int:
    return x[0, ..., 0, 0].numel() if len(x) else 0


@functools.lru_cache(maxsize=1024)
def plan(
    kernel: str, element_size: int, tokens: int, programs: int, most: int
) -> tuple[int, int, dict[str, Any]]:
    """How tokens are parted.

    Args:
        kernel: "state", "read" or "gradient".
        element_size: bytes of an element.
        tokens: of an image.
        programs: images times heads times blocks of channels.
        most: tiles of a part at most, 0 for any number.

    Returns:
        Parts, tokens of a part, and options of the launch.
    """
    block = 64 if element_size == 2 else 32
    tiles = -(-tokens // block)
    parts = min(tiles, max(1, -(-PROGRAMS // max(1, programs))))
    each = -(-tiles // parts)
    each = min(each, most) if most else each
    options = {
        "BLOCK": block,
        "num_warps": 4,
        "num_stages": 3 if kernel == "state" else 2,
        "max_registers": 255,  # without it the assembler spills a few
    }
    return -(-tiles // each), each * block, options


def _steps(common: dict[str, Any], element_size: int) -> dict[str, int]:
    step = STEPS[element_size]
    return {
        "STEP_D": min(step, common["BLOCK_D"]),
        "STEP_VALUE": min(step, common["BLOCK_VALUE_D"]),
    }


def _state(
    key: Tensor,
    value: Tensor,
    feature_map: str,
    inverse: Tensor | None = None,
    inner: Tensor | None = None,
) -> Tensor:
    """`(B, heads, D * VALUE_D + D + VALUE_D)`, see `state_kernel`."""
    images, heads, tokens = key.shape[0], key.shape[-2], _tokens(key)
    common = views(widths(key, value), key=key, value=value)
    steps = _steps(common, key.element_size())
    blocks = common["BLOCK_D"] // steps["STEP_D"] * common["BLOCK_VALUE_D"] // steps["STEP_VALUE"]
    programs = images * heads * blocks
    parts, length, options = plan("state", key.element_size(), tokens, programs, 0)
    size = common["D"] * common["VALUE_D"] + common["D"] + common["VALUE_D"]
    state = key.new_empty((parts, images, heads, size), dtype=torch.float32)
    launch(
        kernels.state_kernel,
        programs * parts,
        key.device,
        state=state,
        inverse=inverse,
        inner=inner,
        tokens=tokens,
        length=length,
        parts=parts,
        heads=heads,
        images=images,
        MAP=MAPS[feature_map],
        **common,
        **steps,
        **options,
    )
    return state[0] if parts == 1 else state.sum(0)


def _read(
    query: Tensor,
    output: Tensor,
    state: Tensor,
    feature_map: str,
    mode: int,
    count: int,
    share: float,
    eps: float,
) -> None:
    """Writes what the features of `query` read from a state, see `read_kernel`."""
    images, heads, tokens = query.shape[0], query.shape[-2], _tokens(query)
    common = views(widths(query, output), query=query, output=output)
    steps = _steps(common, query.element_size())
    programs = images * heads * (common["BLOCK_VALUE_D"] // steps["STEP_VALUE"])
    parts, length, options = plan("read", query.element_size(), tokens, programs, MOST_TILES)
    launch(
        kernels.read_kernel,
        programs * parts,
        query.device,
        state=state,
        tokens=tokens,
        length=length,
        parts=parts,
        heads=heads,
        state_heads=state.shape[1],
        count=count,
        share=share,
        eps=eps,
        MODE=mode,
        MAP=MAPS[feature_map],
        **common,
        **steps,
        **options,
    )


def _gradient(
    query: Tensor,
    rows: Tensor,
    output: Tensor,
    grad: Tensor,
    state: Tensor,
    feature_map: str,
    mode: int,
    count: int,
    share: float,
    eps: float,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes the gradient of `query`, see `gradient_kernel`; returns `inverse` and `inner`."""
    images, heads, tokens = query.shape[0], query.shape[-2], _tokens(query)
    common = views(widths(query, rows), query=query, rows=rows, output=output)
    steps = _steps(common, query.element_size())
    programs = images * heads * (common["BLOCK_D"] // steps["STEP_D"])
    parts, length, options = plan("gradient", query.element_size(), tokens, programs, MOST_TILES)
    inverse = inner = None
    if mode == MODES["sum"]:
        inverse, inner = query.new_empty((2, images, tokens, heads), dtype=torch.float32)
    launch(
        kernels.gradient_kernel,
        programs * parts,
        query.device,
        grad=view(grad),
        inverse=inverse,
        inner=inner,
        state=state,
        tokens=tokens,
        length=length,
        parts=parts,
        heads=heads,
        state_heads=state.shape[1],
        count=count,
        share=share,
        eps=eps,
        MODE=mode,
        MAP=MAPS[feature_map],
        **common,
        **steps,
        **options,
    )
    return inverse, inner


class _Focused:
    """Focused features of whole maps, in PyTorch: their norms are of all heads together."""

    def __init__(self, x: Tensor, focusing_factor: float, temperature: Tensor | None) -> None:
        self.x, self.temperature = x, temperature
        wide = x.float() if x.dtype in HALF else x
        positive = wide.clamp(min=0).add_(SMALLEST).flatten(0, -3).flatten(1)
        if temperature is not None:
            positive = positive.div_(temperature.flatten())
        self.focus = Focus(positive, focusing_factor, torch.empty_like(positive))
        self.features = (self.focus.power * self.focus.ratio).view(x.shape).to(x.dtype)

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of x and of the temperature, from that of the features."""
        rows, total = grad.view(self.focus.positive.shape).to(torch.float32, copy=True), None
        self.focus.backward(rows, True, torch.empty_like(rows))
        if self.temperature is not None:
            divisor = self.temperature.flatten()
            total = (rows * self.focus.positive).sum(0).div_(-divisor).view(self.temperature.shape)
            rows.div_(divisor)
        return torch.where(self.x > 0, rows.view(self.x.shape), 0).to(grad.dtype), total


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: Tensor | None,
    feature_map: str,
    normalization: str,
    focusing_factor: float,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Linear attention, and its state.

    Returns:
        The output `(B, *spatial, num_heads, value_dim)`, contiguous, and the state in a row,
        `(B, num_heads_kv, head_dim * value_dim + head_dim + value_dim)`, float32.
    """
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    if not output.numel():
        return output, query.new_empty(0, dtype=torch.float32)
    if feature_map == "focused":
        query, key = (_Focused(x, focusing_factor, temperature).features for x in (query, key))
        feature_map = "identity"
    count = _tokens(key)
    share = scale if normalization == "none" else scale / count
    state = _state(key, value, feature_map)
    _read(query, output, state, feature_map, MODES[normalization], count, share, eps)
    return output, state.view(-1)


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: Tensor | None,
    output: Tensor,
    state: Tensor,
    feature_map: str,
    normalization: str,
    focusing_factor: float,
    scale: float,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value and temperature (None where not needed), contiguous.

    A query's output is (features times what is read from the state) * inverse, where inverse is one
    over the sum of its weights, for "sum"; inner is the gradient of that sum.
    """
    grads = [x.new_empty(x.shape) for x in (query, key, value)]
    grad_query, grad_key, grad_value = grads
    if not output.numel():
        total = None if temperature is None else torch.zeros_like(temperature)
        return *(grad.zero_() for grad in grads), total
    state = state.view(*key.shape[:1], key.shape[-2], -1)
    focused = None
    if feature_map == "focused":
        focused = [_Focused(x, focusing_factor, temperature) for x in (query, key)]
        query, key = (found.features for found in focused)
        feature_map = "identity"
    count = _tokens(key)
    share = scale if normalization == "none" else scale / count
    mode = MODES[normalization]
    inverse, inner = _gradient(
        query, grad_output, output, grad_query, state, feature_map, mode, count, share, eps
    )
    gradient = _state(query, grad_output, feature_map, inverse, inner)
    if query.shape[-2] != key.shape[-2]:
        gradient = gradient.unflatten(1, (key.shape[-2], -1)).sum(2)
    gradient = _of_state(gradient, state, key.shape[-1], value.shape[-1], mode, count, share)
    plus = PLUS if normalization != "none" else MODES["none"]
    _read(key, grad_value, gradient, feature_map, plus, count, 1.0, 0.0)
    _gradient(key, value, grad_value, grad_key, gradient, feature_map, plus, count, 1.0, 0.0)
    total = None
    if focused is not None:
        (grad_query, first), (grad_key, second) = (
            part.backward(grad) for part, grad in zip(focused, (grad_query, grad_key))
        )
        if temperature is not None and first is not None and second is not None:
            total = (first + second).to(temperature.dtype)
    return grad_query, grad_key, grad_value, total


def _of_state(
    gradient: Tensor,
    state: Tensor,
    head_dim: int,
    value_dim: int,
    mode: int,
    count: int,
    share: float,
) -> Tensor:
    """The gradient of S, z and u in a row, from that of what queries read."""
    sizes = [head_dim * value_dim, head_dim, value_dim]
    product, z, u = gradient.split(sizes, -1)
    product = product * share
    if mode == MODES["sum"]:
        return torch.cat([product, z * share, torch.zeros_like(u)], -1)
    if mode == MODES["none"]:
        return torch.cat([product, torch.zeros_like(z), torch.zeros_like(u)], -1)
    matrix = product.unflatten(-1, (head_dim, value_dim))
    _, key_sum, value_sum = state.split(sizes, -1)
    z = (matrix @ value_sum[..., None]).squeeze(-1) / -count
    u = (u - (key_sum[..., None, :] @ matrix).squeeze(-2)) / count
    return torch.cat([product, z, u], -1)
