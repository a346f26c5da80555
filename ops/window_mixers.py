"""Mixers of local windows and of global grids: the modules over `window_attention`.

Windows, shifted windows: Liu et al., "Swin Transformer" (arXiv 2103.14030). The dilated grid: Tu
et al., "MaxViT" (2204.01697).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.mixer import Mixer, qkv_heads
from vitarium.ops.projection import Linear
from vitarium.ops.window import NAME, window_attention

PADDINGS = ("zeros", "zeros_before_shift", "mask")
BIAS_TYPES = ("bias", "bias_tf", "mlp")

Pair = tuple[int, int]


class Layout(NamedTuple):
    """How windows lie on a map of one size; every entry holds a number for rows and for columns.

    Attributes:
        window_size, dilation, shift: as `window_attention` takes them.
        before, after: rows and columns of zeros put around the map.
        roll: tokens that the map is rolled back by while it is padded.
    """

    window_size: Pair
    dilation: Pair = (1, 1)
    shift: Pair = (0, 0)
    before: Pair = (0, 0)
    after: Pair = (0, 0)
    roll: Pair = (0, 0)

    def pad(self, x: Tensor) -> Tensor:
        """The map `(B, H, W, C)` with its zeros."""
        if not any(self.before + self.after):
            return x
        (top, left), (bottom, right) = self.before, self.after
        padded = F.pad(self._rolled(x, -1), (0, 0, left, right, top, bottom))
        return self._rolled(padded, 1)

    def crop(self, x: Tensor) -> Tensor:
        """What `pad` was given, from a tensor `(B, H, W, ...)` of the padded size."""
        if not any(self.before + self.after):
            return x
        (top, left), (bottom, right) = self.before, self.after
        x = self._rolled(x, -1)
        return self._rolled(x[:, top : x.shape[1] - bottom, left : x.shape[2] - right], 1)

    def _rolled(self, x: Tensor, sign: int) -> Tensor:
        if not any(self.roll):
            return x
        return torch.roll(x, (sign * self.roll[0], sign * self.roll[1]), (1, 2))


class WindowAttention(Mixer, name="window"):
    """Attention within windows of the map, plain or shifted, with relative position bias (Swin).

        q, k, v = qkv(x);  out = proj(softmax(scale q k^T + bias) v)  within each window,

    with the bias of the offset between query and key, for each head. A map at most as long as the
    window along a dimension is one window there, without shift and without padding. Cost for N
    tokens: 4 N C^2 for the projections and 2 N w^2 C for windows of w x w, in multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim` unless `head_dim` is given.
        window_size: the window, a length or one per dimension (H, W).
        shift_size: tokens that the windows are shifted by, Swin's cyclic shift with its mask.
        head_dim: width of a head; `dim // num_heads` if None.
        qkv_bias, proj_bias: biases of the projections.
        qk_scale: factor on the scores; `head_dim ** -0.5` if None.
        rel_pos_type: what gives the relative position bias: "bias", a table `((2 * h - 1) * (2 *
            w - 1), num_heads)` over query minus key (Swin); "bias_tf", a table `(num_heads,
            2 * h - 1, 2 * w - 1)` over key minus query (MaxViT); "mlp", a network on logarithmic
            offsets (timm's "rmlp" models, after Swin V2, 2111.09883); None for no bias.
        rel_pos_dim: hidden width of that network.
        head_first: the outputs of `qkv` are ordered (heads, 3, head_dim), as in timm's MaxViT, not
            (3, heads, head_dim).
        padding: what a map gets that windows do not divide. "zeros": the map is shifted, then
            padded with zeros before the projection, which are attended to, as in timm's Swin; of
            shifted windows, rows of opposite borders may meet. "zeros_before_shift": padded first,
            as in Swin's detection code, where they do not. "mask": windows at the border are
            smaller.
        always_partition: shift and pad maps that are smaller than the window, too.
        proj_drop: dropout rate after the output projection.
        dim_out: number of output channels; `dim` if None.

    Raises:
        ValueError: a width, size or choice is impossible; the message says which.
    """

    paper = "Swin Transformer (arXiv 2103.14030)"
    linear = True
    operator = NAME
    cross = True
    no_weight_decay = ("relative_position_bias_table",)
    official_names: ClassVar[dict[str, str | None]] = {
        r"(rel_pos\.)?(relative_position_index|rel_coords_log|(height|width)_lookup)": None,
        r"rel_pos\.(relative_position_bias_table)": r"\1",
    }
    cost = "4*N*C**2 + 2*N*window_size**2*C"
    examples = (
        {"dim": 32, "num_heads": 2, "window_size": 7},
        {"dim": 32, "num_heads": 2, "window_size": (4, 5), "shift_size": (2, 3)},
        {"dim": 32, "num_heads": 4, "window_size": 4, "shift_size": 1, "padding": "mask"},
        {"dim": 24, "num_heads": 2, "head_dim": 16, "window_size": 3, "rel_pos_type": None},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        window_size: int | Pair = 7,
        shift_size: int | Pair = 0,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_scale: float | None = None,
        rel_pos_type: str | None = "bias",
        rel_pos_dim: int = 512,
        head_first: bool = False,
        padding: str = "zeros",
        always_partition: bool = False,
        proj_drop: float = 0.0,
        dim_out: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        owner = type(self).__name__
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(f"{owner}: num_heads={num_heads} must divide dim={dim}")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"{owner}: head_dim={head_dim} must be at least 1")
        if padding not in PADDINGS:
            raise ValueError(f"{owner}: padding={padding!r}; allowed are {', '.join(PADDINGS)}")
        if rel_pos_type not in (None, *BIAS_TYPES):
            raise ValueError(
                f"{owner}: rel_pos_type={rel_pos_type!r}; allowed are None, {', '.join(BIAS_TYPES)}"
            )
        if dim_out is not None and dim_out < 1:
            raise ValueError(f"{owner}: dim_out={dim_out} must be at least 1")
        super().__init__(dim)
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size: Pair = dispatch.per_dimension(owner, "window_size", window_size, 2)
        self.shift_size: Pair = dispatch.per_dimension(owner, "shift_size", shift_size, 2, least=0)
        if any(s >= w for s, w in zip(self.shift_size, self.window_size)):
            raise ValueError(
                f"{owner}: shift_size={shift_size!r} must be less than window_size={window_size!r}"
            )
        self.head_first = head_first
        self.padding = padding
        self.always_partition = always_partition
        self.rel_pos_type = rel_pos_type
        width = num_heads * (head_dim or dim // num_heads)
        self.scale = (width // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.qkv = Linear(dim, 3 * width, bias=qkv_bias, **factory)
        self.proj = Linear(width, dim_out or dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        rows, columns = (2 * size - 1 for size in self.window_size)
        if rel_pos_type == "mlp":
            self.rel_pos = LogOffsetBias(num_heads, rel_pos_dim, **factory)
        elif rel_pos_type is not None:
            table = (rows * columns, num_heads), (num_heads, rows, columns)
            self.relative_position_bias_table = nn.Parameter(
                torch.empty(table[rel_pos_type == "bias_tf"], **factory)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias table anew; the projections have their own `reset_parameters`."""
        if self.rel_pos_type in ("bias", "bias_tf"):
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def layout(self, height: int, width: int) -> Layout:
        """How the windows lie on a map of this size."""
        whole = [
            length <= size and not self.always_partition
            for length, size in zip((height, width), self.window_size)
        ]
        shift = pair(0 if w else s for w, s in zip(whole, self.shift_size))
        if self.padding == "mask":
            return Layout(self.window_size, shift=shift)
        after = pair(
            0 if w else -length % size
            for w, length, size in zip(whole, (height, width), self.window_size)
        )
        roll = pair(s if a else 0 for s, a in zip(shift, after))
        if self.padding == "zeros_before_shift":
            roll = (0, 0)
        return Layout(self.window_size, shift=shift, after=after, roll=roll)

    def position_bias(self, window_size: Pair) -> Tensor | None:
        """The bias `(num_heads, 2 * h - 1, 2 * w - 1)` of every key minus query, or None."""
        if self.rel_pos_type is None:
            return None
        if self.rel_pos_type == "mlp":
            return self.rel_pos(window_size)
        table = self.relative_position_bias_table
        if self.rel_pos_type == "bias_tf":
            return table
        # Swin's rows count from the most negative query minus key, the last key minus query.
        return table.T.unflatten(1, [2 * size - 1 for size in window_size]).flip(1, 2)

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_context(self, x, context)
        layout = self.layout(*x.shape[1:3])
        output = window_attention(
            *self._project(x, context, layout),
            layout.window_size,
            dilation=layout.dilation,
            shift=layout.shift,
            bias=self.position_bias(layout.window_size),
            scale=self.scale,
        )
        return self.proj_drop(self.proj(layout.crop(output).flatten(-2)))

    def _project(
        self, x: Tensor, context: Tensor | None, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the padded map, `(B, H, W, num_heads, head_dim)` each."""
        x, context = layout.pad(x), None if context is None else layout.pad(context)
        if not self.head_first:
            return qkv_heads(self.qkv, x, self.num_heads, context)
        projected = [self.qkv(x).unflatten(-1, (self.num_heads, 3, -1))] * 3
        if context is not None:
            projected[1:] = [self.qkv(context).unflatten(-1, (self.num_heads, 3, -1))] * 2
        query, key, value = (part.select(-2, i) for i, part in enumerate(projected))
        return query, key, value

    def _weights(self, call: dispatch.Call, wanted: Tensor) -> Tensor:
        layout = self.layout(*wanted.shape[-2:])
        wanted = layout.pad(wanted.movedim(1, -1)).movedim(-1, 1)
        return layout.crop(super()._weights(call, wanted).movedim(1, -1)).movedim(-1, 1)

    def extra_repr(self) -> str:
        """The number of heads, the window, and of the rest what is not the default."""
        parts = [f"num_heads={self.num_heads}", f"window_size={self.window_size}"]
        if any(self.shift_size):
            parts.append(f"shift_size={self.shift_size}")
        if self.padding != "zeros":
            parts.append(f"padding={self.padding!r}")
        return ", ".join(parts)


class GridAttention(WindowAttention, name="grid"):
    """Attention among the `grid_size` tokens that lie evenly over the whole map (MaxViT's grid).

    A map of length L is dilated by `ceil(L / grid_size)`, so that every token sees the map from
    border to border. A map at most as long as the grid is attended to as a whole. As in
    `WindowAttention`, out = proj(softmax(scale q k^T + bias) v), among g x g tokens. Cost for N
    tokens: 4 N C^2 + 2 N g^2 C multiply-adds.

    Args:
        dim, num_heads: as in `WindowAttention`, like all the rest but the shift.
        grid_size: tokens of a grid, a number or one per dimension (H, W).
        padding: "zeros": the map is padded with zeros to a multiple of the grid, before the
            projection, and they are attended to. "mask": some grids have fewer tokens.

    Raises:
        ValueError: as in `WindowAttention`.
    """

    paper = "MaxViT (arXiv 2204.01697)"
    cost = "4*N*C**2 + 2*N*grid_size**2*C"
    examples = (
        {"dim": 32, "num_heads": 2, "grid_size": 7},
        {"dim": 32, "num_heads": 4, "grid_size": (3, 4), "rel_pos_type": "bias_tf"},
        {"dim": 32, "num_heads": 2, "grid_size": 5, "head_first": True, "padding": "mask"},
    )

    def __init__(
        self, dim: int, *, num_heads: int, grid_size: int | Pair = 7, **kwargs: Any
    ) -> None:
        grid_size = dispatch.per_dimension(type(self).__name__, "grid_size", grid_size, 2)
        for argument in ("window_size", "shift_size"):
            if argument in kwargs:
                raise TypeError(f"GridAttention: {argument} is no argument; the grid is grid_size")
        super().__init__(dim, num_heads=num_heads, window_size=grid_size, **kwargs)

    def layout(self, height: int, width: int) -> Layout:
        sizes = list(zip((height, width), self.window_size))
        dilation = pair((length + size - 1) // size for length, size in sizes)
        after = (0, 0)
        if self.padding != "mask":
            after = pair(
                0 if length <= size and not self.always_partition else -length % size
                for length, size in sizes
            )
        return Layout(self.window_size, dilation=dilation, after=after)


class LogOffsetBias(nn.Module):
    """Relative position bias as a network's output for logarithmic offsets: timm's `RelPosMlp`.

    An offset d of query minus key enters as `sign(d) * log(1 + |d|)`, one for each dimension.

    Args:
        num_heads: number of outputs, one bias for each head.
        hidden_dim: hidden width of the network.
    """

    def __init__(self, num_heads: int, hidden_dim: int = 512, **factory: Any) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(2, hidden_dim, **factory),
                act=nn.ReLU(),
                drop1=nn.Dropout(0.125),
                fc2=nn.Linear(hidden_dim, num_heads, **factory),
            )
        )

    def forward(self, window_size: Pair) -> Tensor:
        """The bias `(num_heads, 2 * h - 1, 2 * w - 1)` of every key minus query in a window."""
        offsets = query_minus_key(window_size, next(self.parameters()))
        return self.mlp(offsets.sign() * offsets.abs().log1p()).permute(2, 0, 1)


def query_minus_key(window_size: Pair, like: Tensor) -> Tensor:
    """Row and column offset `(2 * h - 1, 2 * w - 1, 2)`, in the order of the operator's bias."""
    axes = [
        torch.arange(size - 1, -size, -1, device=like.device, dtype=like.dtype)
        for size in window_size
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def check_context(mixer: Mixer, x: Tensor, context: Tensor | None) -> None:
    """Raises ValueError if the second map, where there is one, is of another size."""
    if context is not None and context.shape[1:3] != x.shape[1:3]:
        raise ValueError(
            f"{type(mixer).__name__}: context has the map {tuple(context.shape[1:3])}; allowed is "
            f"that of x, {tuple(x.shape[1:3])}, whose windows it shares"
        )


def pair(entries: Iterable[int]) -> Pair:
    """One entry for rows and one for columns."""
    first, second = entries
    return first, second
