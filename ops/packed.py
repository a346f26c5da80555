"""Query, key and value that lie side by side in memory, as a joint projection leaves them."""

from __future__ import annotations

from torch import Tensor


def joint(*maps: Tensor) -> Tensor | None:
    """Maps that lie side by side as one `(B, *spatial, 1, maps * heads * channels)`, or None."""
    first = maps[0]
    heads, channels = first.shape[-2:]
    strides, size = first.stride(), heads * channels
    if heads < 2 or strides[-2:] != (channels, 1) or not first.numel():
        return None
    storage = first.untyped_storage()._cdata
    for number, x in enumerate(maps):
        alike = x.shape == first.shape and x.stride() == strides
        place = first.storage_offset() + number * size
        if not alike or x.storage_offset() != place or x.untyped_storage()._cdata != storage:
            return None
    shape = (*first.shape[:-2], 1, len(maps) * size)
    return first.as_strided(shape, (*strides[:-2], 0, 1))


def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """Views of one projection as one view `(3, B, heads, *spatial, channels)` of it, or None."""
    if joint(query, key, value) is None:
        return None
    batch, *spatial, heads, channels = query.shape
    first, *steps, head, channel = query.stride()
    return query.as_strided(
        (3, batch, heads, *spatial, channels), (heads * head, first, head, *steps, channel)
    )


def unpacked(x: Tensor) -> Tensor:
    """`(B, *spatial, 3, heads, channels)` as `(3, B, heads, *spatial, channels)`."""
    return x.movedim(-3, 0).movedim(-2, 2)
