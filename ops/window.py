"""Window attention: tokens attend to the other tokens of their window.

One rule covers local windows and their cyclic shift (Liu et al., "Swin Transformer", arXiv
2103.14030), the dilated grid (Tu et al., "MaxViT", 2204.01697), the long distance groups of
CrossFormer (Wang et al., 2108.00154) and overlapping windows (Vaswani et al., "HaloNet",
2103.12731; Chen et al., "HAT", 2205.04437). It is written out in `vitarium.ops.windows`. Cost:
2 N prod(w + 2 halo) head_dim multiply-adds for N tokens in windows of w, instead of 2 N^2 head_dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitarium.ops import dispatch
from vitarium.ops.dispatch import Case, Operator
from vitarium.ops.local import LocalAttention, check_bias, check_tensors
from vitarium.ops.windows import Block

NAME = "window_attention"


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | tuple[int, ...],
    *,
    dilation: int | tuple[int, ...] = 1,
    shift: int | tuple[int, ...] = 0,
    halo: int | tuple[int, ...] = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every token to its window, on 1-, 2- or 3-dimensional maps of any size.

    Along every axis tokens fall into residue classes modulo `dilation`; token i is position
    i // dilation of class i % dilation. Windows hold `window_size` positions of one class and
    begin at positions congruent to `shift` modulo `window_size`; those at the ends of a class are
    cut off. A token attends to its window and to `halo` positions on either side of it, as far as
    they exist.

    Window 7 with `shift=3` is a shifted window of Swin with its mask; `window_size=g,
    dilation=L // g` the grid of MaxViT; `window_size=ceil(L / I), dilation=I` the long distance
    groups of CrossFormer; `window_size=1, halo=r` a sliding window that ends at the border.

    Args:
        query: `(B, *spatial, num_heads, head_dim)`, spatial of rank 1, 2 or 3; any strides.
        key: `(B, *spatial_kv, num_heads_kv, head_dim)`; num_heads_kv divides num_heads, and query
            head h reads key and value head `h // (num_heads // num_heads_kv)`. The map is as large
            as that of query, or along all axes larger by a border of `halo * dilation` tokens at
            both ends, which are attended to like any.
        value: `(B, *spatial_kv, num_heads_kv, value_dim)`.
        window_size: length of the windows in positions, one int or one per spatial dimension.
        dilation: step between the positions of a class, in tokens.
        shift: where windows begin, below window_size.
        halo: positions that are seen beyond either end of the window.
        bias: relative position bias `(num_heads, 2 * window_size - 1 + 2 * halo, ...)`, added to
            the scaled scores at `key - query + window_size - 1 + halo` per dimension, in positions.
        scale: factor on the scores; `head_dim ** -0.5` if None.
        backend: "reference", "torch", "triton", or None to choose.

    Returns:
        `(B, *spatial, num_heads, value_dim)`, contiguous, in the dtype of query.

    Raises:
        ValueError: shapes, sizes or devices do not fit, or the named backend cannot run this.
        TypeError: an argument is of the wrong type, or dtypes differ.
    """
    windows = _check(query, key, value, bias, window_size, dilation, shift, halo)
    scale = dispatch.check_scale(NAME, scale, query)
    query, key, value = dispatch.autocast(query, key, value)
    args = (query, key, value, bias, *map(list, zip(*windows)), scale)
    return dispatch.choose(NAME, backend, _ATTENTION.backends, query.device, *args)(*args)


@dispatch.remembered
def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Any,
    window_size: Any,
    dilation: Any,
    shift: Any,
    halo: Any,
) -> tuple[Block, ...]:
    """The pattern of every axis; raises what `window_attention` says it raises."""
    rank = check_tensors(NAME, query, key, value)
    window_size = dispatch.per_dimension(NAME, "window_size", window_size, rank)
    dilation = dispatch.per_dimension(NAME, "dilation", dilation, rank)
    shift = dispatch.per_dimension(NAME, "shift", shift, rank, least=0)
    halo = dispatch.per_dimension(NAME, "halo", halo, rank, least=0)
    spatial, spatial_kv = tuple(query.shape[1:-2]), tuple(key.shape[1:-2])
    border = halo
    if spatial_kv == spatial:
        border = (0,) * rank
        # From a dilation as long as the axis on every token is alone, and more classes are empty.
        dilation = tuple(
            min(d, n) if isinstance(d, int) and isinstance(n, int) and n else d
            for d, n in zip(dilation, spatial)
        )
    else:
        larger = tuple(n + 2 * h * d for n, h, d in zip(spatial, halo, dilation))
        if spatial_kv != larger:
            allowed = f"{spatial} of query"
            if larger != spatial:
                allowed += f", or {larger} with a border of halo * dilation tokens all around"
            raise ValueError(f"{NAME}: key has the map {spatial_kv}; allowed is {allowed}")
    windows = tuple(map(Block, window_size, dilation, shift, halo, border))
    for axis, window in zip("DHW"[-rank:], windows):
        window.check(NAME, axis)
    check_bias(NAME, bias, query, windows, "2 * window_size - 1 + 2 * halo")
    return windows


_ATTENTION = LocalAttention(NAME, Block)


def _case(
    note: str,
    spatial: tuple[int, ...],
    window_size: int | tuple[int, ...],
    *,
    batch: int = 1,
    heads: tuple[int, int] = (1, 1),
    dims: tuple[int, int] = (16, 16),
    bias: bool = True,
    border: bool = False,
    dilation: int | tuple[int, ...] = 1,
    halo: int | tuple[int, ...] = 0,
    **kwargs: Any,
) -> Case:
    """A call with (query, key) heads and (query, value) widths; drawn tensors need shapes only."""
    rank = len(spatial)
    sizes = dispatch.per_dimension(NAME, "window_size", window_size, rank)
    steps = dispatch.per_dimension(NAME, "dilation", dilation, rank)
    halos = dispatch.per_dimension(NAME, "halo", halo, rank, least=0)
    keys = spatial
    if border:
        keys = tuple(n + 2 * h * d for n, h, d in zip(spatial, halos, steps))
    shapes: dict[str, tuple[int, ...]] = {
        "query": (batch, *spatial, heads[0], dims[0]),
        "key": (batch, *keys, heads[1], dims[0]),
        "value": (batch, *keys, heads[1], dims[1]),
    }
    if bias:
        shapes["bias"] = (heads[0], *(2 * (w + h) - 1 for w, h in zip(sizes, halos)))
    return Case(
        note, shapes, {"window_size": window_size, "dilation": dilation, "halo": halo, **kwargs}
    )


CASES = (
    _case("ragged windows, shifted", (9, 11), 4, shift=(3, 1), heads=(2, 2)),
    _case("whole windows", (8, 4), 4, heads=(2, 1), dims=(24, 40)),
    _case("shifted whole windows", (14, 7), 7, shift=3, batch=2),
    _case("grid whose dilation divides neither side", (11, 7), 3, dilation=(4, 3)),
    _case("dilated and shifted", (13, 10), (3, 2), dilation=(2, 3), shift=(1, 1)),
    _case("halo, masked", (9, 10), 4, halo=(1, 2), heads=(4, 2)),
    _case("halo with a border of keys", (8, 6), 4, halo=2, border=True, batch=2),
    _case("dilated halo with a border of keys", (7, 5), (3, 2), halo=(1, 0), dilation=2,
          shift=(2, 0), border=True, dims=(16, 20)),
    _case("sliding window that ends at the border", (7, 9), 1, halo=(1, 2)),
    _case("one dimension, halo wider than the map", (5,), 2, halo=7, bias=False),
    _case("three dimensions", (3, 5, 4), (2, 4, 2), shift=(1, 0, 1), heads=(2, 1)),
    _case("map smaller than the window", (3, 5), 7, shift=(2, 4), dilation=(2, 1), scale=-0.5),
    _case("one token", (1, 1), 7, dilation=3),
    _case("patches of tiny windows", (10, 11), 2, shift=(1, 0), batch=2),
    _case("windows of more than 64 tokens", (9, 10), 9, shift=2),
    _case("no images", (7, 7), 3, batch=0),
)  # fmt: skip


def _launches() -> list[Case]:
    """Maps of every rank; in three dimensions, with everything, the call of most registers."""
    found = []
    extra: dict[str, Any]
    for dim in (32, 64, 128, 256):
        for note, spatial, window_size, extra in (
            ("map", (56, 56), 7, {"shift": 3}),
            ("volume", (16,) * 3, (2, 7, 7), {"dilation": 2, "shift": 1, "halo": 3}),
            ("row", (64,), 16, {"bias": False}),
            ("large windows", (36, 36), 12, {"shift": 6}),
        ):
            note = f"{note}, head_dim {dim}"
            found.append(_case(note, spatial, window_size, batch=2, dims=(dim, dim), **extra))
    found.append(_case("tiny windows", (56, 56), 2, batch=2, dims=(32, 32)))
    return found


OPERATOR = Operator(
    NAME,
    window_attention,
    _ATTENTION.backends,
    CASES,
    _ATTENTION,
    _launches(),
)
