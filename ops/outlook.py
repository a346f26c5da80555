"""Outlook attention: every window says from its centre how its tokens are mixed.

Yuan et al., "VOLO: Vision Outlooker for Visual Recognition" (arXiv 2106.13112, section 3.1). Window
n begins at token `stride * n - padding` along both axes. With p(n, i) its i-th token in raster
order, and values of 0 outside of the map,

    A[n] = softmax(scale * scores[n]) over its columns
    output[p] = sum over all (n, i) with p(n, i) = p, and over j, of A[n, i, j] value[p(n, j)]

Cost: k^4 head_dim multiply-adds a window and head, k^4 / stride^2 C for every token.

The portable path unfolds some rows of windows at a time, so that values, weights and products stay
in cache, and computes weights again for the backward. The kernels unfold nothing: with windows of
3 x 3 at every second token and heads of 32 they move 2.6 C numbers a token, the steps of the paper,
one after another, more than 15 C.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.differentiable import Differentiable
from vitarium.ops.dispatch import Case, Operator
from vitarium.ops.mixer import Mixer
from vitarium.ops.projection import Linear
from vitarium.ops.softmax import softmax_of_exponents
from vitarium.ops.workspace import LOG2E, Workspace

NAME = "outlook_attention"


def outlook_attention(
    scores: Tensor,
    value: Tensor,
    kernel_size: int,
    *,
    stride: int = 1,
    padding: int = 0,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """The values of windows, mixed by weights of each window, summed where windows overlap.

    Args:
        scores: `(B, h, w, num_heads, kernel_size ** 2, kernel_size ** 2)`, of h x w windows: row i
            is of the window's token i as an output, column j of token j as a value.
        value: `(B, H, W, num_heads, head_dim)`. Tokens that no window covers have output 0, and
            windows may reach beyond the map.
        kernel_size: side of a window.
        stride: tokens from a window to the next.
        padding: tokens that the first window begins before the map; below kernel_size.
        scale: factor on the scores.
        backend: "reference", "torch", "triton", or None to choose.

    Returns:
        `(B, H, W, num_heads, head_dim)`, contiguous, in the dtype of scores.

    Raises:
        ValueError: shapes, sizes or devices do not fit, or the named backend cannot run this.
        TypeError: an argument is of the wrong type, or dtypes differ.
    """
    dispatch.check_tensors(NAME, scores=scores, value=value)
    (kernel_size,) = dispatch.per_dimension(NAME, "kernel_size", kernel_size, 1)
    (stride,) = dispatch.per_dimension(NAME, "stride", stride, 1)
    (padding,) = dispatch.per_dimension(NAME, "padding", padding, 1, least=0)
    if padding >= kernel_size:
        raise ValueError(f"{NAME}: padding={padding} must be below kernel_size={kernel_size}")
    places = kernel_size**2
    if value.dim() != 5 or min(value.shape[1:]) < 1:
        raise ValueError(
            f"{NAME}: value has shape {tuple(value.shape)}; allowed are 5 dimensions, "
            "(B, H, W, num_heads, head_dim), none of the last four empty"
        )
    whole = (value.shape[0], value.shape[3], places, places)
    if scores.dim() != 6 or (scores.shape[0], *scores.shape[3:]) != whole:
        raise ValueError(
            f"{NAME}: scores has shape {tuple(scores.shape)}; allowed is ({whole[0]}, h, w, "
            f"{whole[1]}, {places}, {places}), (B, h, w, num_heads, kernel_size ** 2, "
            "kernel_size ** 2)"
        )
    if min(scores.shape[1:3]) < 1:
        raise ValueError(f"{NAME}: scores has shape {tuple(scores.shape)}, and no window")
    scale = dispatch.check_scale(NAME, scale, value)
    scores, value = dispatch.autocast(scores, value)
    args = (scores, value, kernel_size, stride, padding, scale)
    return dispatch.choose(NAME, backend, _IMPLEMENTATIONS, scores.device, *args)(*args)


# --- the definition ------------------------------------------------------------------------------


def _margins(
    scores: Sequence[int], value: Sequence[int], kernel_size: int, stride: int, padding: int
) -> tuple[int, int, int, int]:
    """Rows and columns that windows reach over the map: left, right, top, bottom; may be < 0."""
    bottom, right = (
        (windows - 1) * stride + kernel_size - padding - length
        for windows, length in zip(scores[1:3], value[1:3])
    )
    return padding, right, padding, bottom


def _reference(
    scores: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> Tensor:
    """The definition: unfold, mix, fold."""
    heads, dim = value.shape[-2:]
    margins = _margins(scores.shape, value.shape, kernel_size, stride, padding)
    padded = F.pad(value.flatten(-2).permute(0, 3, 1, 2), margins)
    unfolded = F.unfold(padded, kernel_size, stride=stride)  # (B, heads dim places, windows)
    unfolded = unfolded.unflatten(1, (heads, dim, kernel_size**2)).permute(0, 4, 1, 3, 2)
    weights = (scores * scale).softmax(-1).flatten(1, 2)
    mixed = (weights @ unfolded).permute(0, 2, 4, 3, 1).flatten(1, 3)
    folded = F.fold(mixed, padded.shape[-2:], kernel_size, stride=stride)
    folded = F.pad(folded, [-margin for margin in margins]).permute(0, 2, 3, 1)
    return folded.unflatten(-1, (heads, dim)).contiguous()


# --- the portable path ---------------------------------------------------------------------------

MOST_PLACES = 64  # tokens of a window that the kernels take
CPU_CHUNK = 1 << 19  # numbers of the unfolded values of a chunk, which stay in cache


class _Windows:
    """The windows of a call, a chunk at a time: some rows of some images.

    Half precision is computed in float32 on a CPU, which has no fast products for it.
    """

    def __init__(
        self, scores: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int
    ) -> None:
        self.size, self.stride = kernel_size, stride
        self.dtype = scores.dtype
        self.cpu = scores.device.type == "cpu"
        if self.cpu:
            self.dtype = torch.promote_types(scores.dtype, torch.float32)
        self.work = Workspace(scores)
        self.windows = scores.shape[1], scores.shape[2]
        self.margins = _margins(scores.shape, value.shape, kernel_size, stride, padding)
        left, right, top, bottom = self.margins
        self.map = value.shape[1] + top + bottom, value.shape[2] + left + right
        row = math.prod(scores.shape[2:5]) * value.shape[-1]
        images, rows = scores.shape[0], scores.shape[1]
        self.images = max(1, min(images, CPU_CHUNK // (rows * row))) if self.cpu else images
        self.rows = max(1, min(rows, CPU_CHUNK // row)) if self.cpu else rows

    def parts(self, tensor: Tensor) -> Iterator[slice]:
        """Images that are computed together."""
        for first in range(0, tensor.shape[0], self.images):
            yield slice(first, first + self.images)

    def bands(self) -> Iterator[slice]:
        """Rows of windows that are computed together."""
        for first in range(0, self.windows[0], self.rows):
            yield slice(first, min(first + self.rows, self.windows[0]))

    def inside(self) -> tuple[slice, slice, slice, slice]:
        """Where windows and map overlap: rows and columns of the padded map, then of the map."""
        left, right, top, bottom = self.margins
        height, width = self.map
        return (
            slice(top, height - max(bottom, 0)),
            slice(left, width - max(right, 0)),
            slice(0, height - max(bottom, 0) - top),
            slice(0, width - max(right, 0) - left),
        )

    def zeros(self, name: str, like: Tensor) -> Tensor:
        """A padded map of zeros."""
        shape = (like.shape[0], *self.map, *like.shape[3:])
        return self.work.take(name, shape, self.dtype).zero_()

    def padded(self, name: str, x: Tensor) -> Tensor:
        """The images in a padded map."""
        rows, columns, height, width = self.inside()
        result = self.zeros(name, x)
        result[:, rows, columns].copy_(x[:, height, width])
        return result

    def cropped(self, x: Tensor, out: Tensor) -> None:
        """Writes the images of a padded map."""
        rows, columns, height, width = self.inside()
        if out.shape[1:3] != x[:, rows, columns].shape[1:3]:  # there are tokens in no window
            out.zero_()
        out[:, height, width].copy_(x[:, rows, columns])

    def unfolded(self, name: str, x: Tensor, band: slice) -> Tensor:
        """Windows of a padded map, `(windows and heads, kernel_size ** 2, head_dim)`."""
        images, *_, heads, dim = x.shape
        size, rows = self.size, band.stop - band.start
        image, row, column, head, _ = x.stride()
        view = x[:, band.start * self.stride :].as_strided(
            (images, rows, self.windows[1], heads, size, size, dim),
            (image, row * self.stride, column * self.stride, head, row, column, 1),
            x.storage_offset() + band.start * self.stride * row,
        )
        return self.work.take(name, view.shape, self.dtype).copy_(view).view(-1, size**2, dim)

    def fold(self, mixed: Tensor, total: Tensor, band: slice) -> None:
        """Adds windows to a padded map."""
        rows, (_, columns), step = band.stop - band.start, self.windows, self.stride
        mixed = mixed.view(total.shape[0], rows, columns, -1, self.size**2, total.shape[-1])
        for place in range(self.size**2):
            y, x = divmod(place, self.size)
            y += band.start * step
            target = total[:, y : y + (rows - 1) * step + 1 : step]
            target[:, :, x : x + (columns - 1) * step + 1 : step].add_(mixed[..., place, :])

    def weights(self, scores: Tensor, scale: float) -> Tensor:
        """The softmax of scores, `(windows and heads, kernel_size ** 2, kernel_size ** 2)`."""
        weights = self.work.take("weights", tuple(scores.shape), self.dtype)
        torch.mul(scores, scale * LOG2E if self.cpu else scale, out=weights)
        if not self.cpu:
            weights = weights.softmax(-1)
        elif softmax_of_exponents(weights) is None:
            weights.copy_((scores.to(self.dtype) * scale).softmax(-1))
        return weights.view(-1, *scores.shape[-2:])


def _forward(
    scores: Tensor,
    value: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    scale: float,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    if fused:
        from vitarium.ops.kernels import outlook as kernels

        return kernels.forward(scores, value, kernel_size, stride, padding, scale)
    output = value.new_empty(value.shape)
    windows = _Windows(scores, value, kernel_size, stride, padding)
    for images in windows.parts(value):
        values = windows.padded("values", value[images])
        total = windows.zeros("total", value[images])
        for band in windows.bands():
            weights = windows.weights(scores[images, band], scale)
            unfolded = windows.unfolded("unfolded", values, band)
            mixed = windows.work.take("mixed", tuple(unfolded.shape), windows.dtype)
            windows.fold(torch.bmm(weights, unfolded, out=mixed), total, band)
        windows.cropped(total, output[images])
    windows.work.close()
    return output, value.new_empty(0, dtype=torch.float32)


def _backward(
    grad: Tensor,
    scores: Tensor,
    value: Tensor,
    output: Tensor,
    saved: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    scale: float,
    fused: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    if fused:
        from vitarium.ops.kernels import outlook as kernels

        return kernels.backward(grad, scores, value, saved, kernel_size, stride, padding, scale)
    grad_scores, grad_value = scores.new_empty(scores.shape), value.new_empty(value.shape)
    windows = _Windows(scores, value, kernel_size, stride, padding)
    for images in windows.parts(value):
        values = windows.padded("values", value[images])
        grads = windows.padded("grads", grad[images])
        total = windows.zeros("total", value[images])
        for band in windows.bands():
            weights = windows.weights(scores[images, band], scale)
            unfolded = windows.unfolded("unfolded", values, band)
            mixed = windows.unfolded("mixed", grads, band)  # gradients of what windows mixed
            inner = windows.work.take("inner", tuple(weights.shape), windows.dtype)
            torch.bmm(mixed, unfolded.mT, out=inner)
            # The values are not needed any more: their gradients take their place.
            windows.fold(torch.bmm(weights.mT, mixed, out=unfolded), total, band)
            sums = inner.mul_(weights).sum(-1, keepdim=True)
            inner.sub_(weights.mul_(sums))
            target = grad_scores[images, band]
            torch.mul(inner.view(target.shape), scale, out=target)
        windows.cropped(total, grad_value[images])
    windows.work.close()
    return grad_scores, grad_value


# --- the custom operator -------------------------------------------------------------------------


def _flops(scores: Sequence[int], value: Sequence[int], *_: Any) -> int:
    return 2 * math.prod(scores) * value[-1]


_OPERATION = Differentiable(
    NAME,
    tensors="Tensor scores, Tensor value",
    arguments="int kernel_size, int stride, int padding, float scale",
    forward=_forward,
    backward=_backward,
    output_shape=lambda scores, value, *_: value.shape,
    saved_shape=lambda scores, *args: scores.shape[:-1] if args[-1] else (0,),
    flops=_flops,
    backward_flops=lambda *args: 2 * _flops(*args),
)


def _triton_refuses(scores: Tensor, value: Tensor, kernel_size: int, *_: Any) -> str | None:
    if kernel_size**2 > MOST_PLACES:
        return f"windows of {kernel_size**2} tokens exceed {MOST_PLACES}"
    return dispatch.triton_refuses(value, value, value)


_IMPLEMENTATIONS = _OPERATION.implementations(
    reference=_reference, plain=_reference, refuses=_triton_refuses
)


# --- the mixer -----------------------------------------------------------------------------------


class OutlookAttention(Mixer, name="outlook"):
    """Outlook attention, the mixer of VOLO's first stage.

    With h x w windows, one for every cell of `stride` x `stride` tokens,

        out = proj(outlook_attention(attn(pool(x)), v(x)))

    where `pool` averages the cells. Parameters are named as in timm and the official code. Cost for
    N tokens: 2 N C^2 + (N / stride^2) (k^4 C num_heads + k^4 C) multiply-adds for windows of k x k.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`.
        kernel_size: side k of a window.
        padding: tokens that the first window begins before the map; below `kernel_size`.
        stride: tokens from a window to the next.
        qkv_bias: bias of the value projection.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or a size is impossible.
    """

    paper = "VOLO: Vision Outlooker for Visual Recognition (arXiv 2106.13112)"
    linear = True
    operator = NAME
    cost = "2*N*C**2 + N/stride**2*kernel_size**4*C*(num_heads + 1)"
    examples = (
        {"dim": 32, "num_heads": 2, "stride": 2},
        {"dim": 24, "num_heads": 3, "qkv_bias": True},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        kernel_size: int = 3,
        padding: int = 1,
        stride: int = 1,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"OutlookAttention: num_heads={num_heads} must divide dim={dim}")
        for name, size in (("kernel_size", kernel_size), ("stride", stride)):
            if size < 1:
                raise ValueError(f"OutlookAttention: {name}={size} must be at least 1")
        if not 0 <= padding < kernel_size:
            raise ValueError(
                f"OutlookAttention: padding={padding} must be from 0 to below {kernel_size=}"
            )
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.kernel_size, self.padding, self.stride = kernel_size, padding, stride
        self.scale = (dim // num_heads) ** -0.5
        self.v = Linear(dim, dim, bias=qkv_bias, **factory)
        self.attn = Linear(dim, kernel_size**4 * num_heads, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor) -> Tensor:
        cells = x
        if self.stride > 1:
            pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), self.stride, ceil_mode=True)
            cells = pooled.permute(0, 2, 3, 1)
        places = self.kernel_size**2
        output = outlook_attention(
            self.attn(cells).unflatten(-1, (self.num_heads, places, places)),
            self.v(x).unflatten(-1, (self.num_heads, -1)),
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            scale=self.scale,
        )
        return self.proj_drop(self.proj(output.flatten(-2)))

    def _weights(self, call: dispatch.Call, wanted: Tensor) -> Tensor:
        scores, value, *rest = call.args
        with torch.enable_grad():
            value = torch.ones_like(value[..., :1]).requires_grad_()
            output = _reference(scores, value, *rest)
        wanted = wanted.movedim(1, -1)[..., None].expand_as(output)
        (weights,) = torch.autograd.grad(output, value, wanted)
        return weights[..., 0].movedim(-1, 1)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"padding={self.padding}, stride={self.stride}"
        )


# --- test cases ----------------------------------------------------------------------------------


def _case(
    note: str,
    size: tuple[int, int],
    windows: tuple[int, int],
    *,
    batch: int = 2,
    heads: int = 1,
    dim: int = 8,
    **kwargs: Any,
) -> Case:
    places = kwargs["kernel_size"] ** 2
    shapes = {
        "scores": (batch, *windows, heads, places, places),
        "value": (batch, *size, heads, dim),
    }
    return Case(note, shapes, kwargs)


CASES = (
    _case("every second token", (5, 6), (3, 3), batch=1, heads=2, kernel_size=3, stride=2,
          padding=1, scale=0.4),
    _case("every token", (5, 4), (5, 4), batch=1, kernel_size=3, padding=1, dim=6),
    _case("tokens in no window, windows over the border", (6, 2), (2, 2), kernel_size=2, stride=2),
    _case("gaps between windows", (8, 7), (3, 2), kernel_size=2, stride=3, padding=1),
    _case("one token", (1, 1), (1, 1), batch=1, kernel_size=3, padding=1, stride=2),
    _case("no images", (3, 3), (3, 3), batch=0, kernel_size=3, padding=1),
)  # fmt: skip

LAUNCHES = tuple(
    _case(f"width {dim}, windows of {size}", (14, 14), (7, 7), heads=2, dim=dim, kernel_size=size,
          stride=2, padding=1)
    for dim, size in ((32, 3), (64, 3), (256, 3), (32, 5))
)  # fmt: skip

OPERATOR = Operator(
    NAME, outlook_attention, _IMPLEMENTATIONS, CASES, _OPERATION, LAUNCHES, context=None
)
