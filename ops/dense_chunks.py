"""How the portable path of dense attention cuts up a call, and the weights of a part of it.

A call is computed in chunks of images and heads, and these in bands of queries, so that the scores
at hand stay in cache. Queries that are not active are left out beforehand: the others are packed,
head by head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vitarium.ops.softmax import softmax_of_exponents
from vitarium.ops.workspace import LOG2E, Workspace

# Scores of a chunk, in half precision and in float32: these should stay near the second-level
# cache, while every product in half precision first rearranges its operands. Devices want few
# large launches.
CPU_SCORES = (1 << 20, 5 << 16)
DEVICE_SCORES = 1 << 26
ROWS = 32  # queries of a chunk, at least: thinner products are slow


class Packing:
    """The active queries of all images and heads, head by head."""

    def __init__(self, active: Tensor, work: Workspace) -> None:
        self.shape = active.flatten(1, -2).shape
        _, count, heads = self.shape
        by_head = active.flatten(1, -2).transpose(1, 2)
        image, head, self.token = by_head.nonzero().unbind(1)
        self.row = (image * count + self.token) * heads + head  # of (B, tokens, heads)
        self.counts: list[list[int]] = by_head.sum(-1).tolist()
        self.work = work

    def pack(self, x: Tensor, name: str) -> Tensor:
        """`(B, heads, tokens, channels)` as `(active queries, channels)`."""
        rows = contiguous(x.transpose(1, 2), self.work, "packing").view(-1, x.shape[3])
        out = self.work.take(name, (len(self.row), x.shape[3]), x.dtype)
        return torch.index_select(rows, 0, self.row, out=out)

    def unpack(self, x: Tensor) -> Tensor:
        """The reverse, `(B, tokens, heads, channels)`, zero where nothing was packed."""
        rows = x.new_zeros((math.prod(self.shape), x.shape[1]))
        return rows.index_copy_(0, self.row, x).view(*self.shape, -1)


def contiguous(x: Tensor, work: Workspace, name: str) -> Tensor:
    """The tensor, or a copy in memory that has been used before: fresh pages cost more."""
    return x if x.is_contiguous() else work.take(name, x.shape, x.dtype).copy_(x)


class Chunk:
    """Some heads of some images, or a part of a `Packing`: the active queries of one head."""

    def __init__(
        self,
        images: range,
        heads: range,
        queries: slice,
        token: Tensor | None,
        whole: bool = False,
    ) -> None:
        self.whole = whole  # all images and heads
        self.images = slice(images.start, images.stop)
        self.heads = slice(heads.start, heads.stop)
        self.pair = len(images), len(heads)
        self.packed = None if token is None else queries
        self.token = token  # of each packed query

    def queries(self, x: Tensor) -> Tensor:
        """Of `(B, heads, tokens, channels)`, or packed, `(images and heads, queries, channels)`."""
        if self.packed is not None:
            return x[self.packed][None]
        return (x if self.whole else x[self.images, self.heads]).flatten(0, 1)

    def keys(self, x: Tensor, group: int = 1) -> Tensor:
        """`(images and heads, keys, channels)` of `(B, heads_kv, keys, channels)`.

        With `group` query heads to a head of `x`, heads repeat (and are copied).
        """
        if group == 1:
            return (x if self.whole else x[self.images, self.heads]).flatten(0, 1)
        heads = [head // group for head in range(self.heads.start, self.heads.stop)]
        return x[self.images, heads].flatten(0, 1)

    def broadcast(self, x: Tensor) -> Tensor:
        """This chunk's of `(B or 1, heads or 1, tokens, channels)`, all tokens."""
        images = self.images if x.shape[0] > 1 else slice(None)
        return x[images, self.heads if x.shape[1] > 1 else slice(None)]

    def band(self, x: Tensor, band: slice) -> Tensor:
        """The band's queries of `(images and heads, queries, channels)`."""
        return x if band.stop - band.start == x.shape[1] else x[:, band]

    def rows(self, x: Tensor, band: slice, out: Tensor | None = None) -> Tensor:
        """The tokens of a band of queries of `broadcast`, copied into `out` if that is given."""
        x = self.broadcast(x)
        if self.token is not None:
            return torch.index_select(x, 2, self.token[band], out=out)
        return x[:, :, band] if out is None else out.copy_(x[:, :, band])


def _bands(count: int, keys: int, limit: int) -> list[slice]:
    """Queries in even bands of about `limit` scores."""
    bands = max(1, min(-(-count * keys // limit), count // ROWS))
    band = -(-count // bands)
    return [slice(first, min(first + band, count)) for first in range(0, count, band)]


def chunks(
    query: Tensor, key: Tensor, packing: Packing | None
) -> Iterator[tuple[Chunk, list[slice]]]:
    """Chunks and bands of their queries, for `(B, heads, tokens, channels)` or packed queries."""
    on_cpu = query.device.type == "cpu"
    limit = CPU_SCORES[query.element_size() > 2] if on_cpu else DEVICE_SCORES
    keys = key.shape[2]
    if packing is not None:
        first = 0
        for image, counts in enumerate(packing.counts):
            for head, count in enumerate(counts):
                if count:
                    part = slice(first, first + count)
                    chosen = range(image, image + 1), range(head, head + 1)
                    yield Chunk(*chosen, part, packing.token[part]), _bands(count, keys, limit)
                    first += count
        return
    batch, heads, count, _ = query.shape
    bands = _bands(count, keys, limit)
    some = min(heads, max(1, limit // (count * keys)))
    images = max(1, limit // (count * keys * heads)) if some == heads else 1
    for image in range(0, batch, images):
        for head in range(0, heads, some):
            chosen = range(image, min(image + images, batch)), range(head, min(head + some, heads))
            yield Chunk(*chosen, slice(None), None, some * images >= heads * batch), bands


# --- weights -------------------------------------------------------------------------------------


def has_infinities(bias: Tensor) -> bool:
    """Whether a bias may hide keys; on devices that would have to wait for the answer, it may."""
    return bias.device.type != "cpu" or not math.isfinite(bias.detach().sum())


def hidden_queries(bias: Tensor, is_causal: bool) -> Tensor:
    """The queries that see no key, `(..., N, 1)`: the softmax of their scores would be NaN."""
    if is_causal:
        later = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
        bias = bias.masked_fill(later, -math.inf)
    return bias.amax(-1, keepdim=True) == -math.inf


class Scores:
    """Scores of a call: their scale, and what is added to them."""

    def __init__(
        self,
        bias: Tensor | None,
        is_causal: bool,
        scale: float,
        like: Tensor,
        work: Workspace,
    ) -> None:
        self.is_causal = is_causal
        self.scale = scale
        self.work = work
        self.wide = torch.promote_types(like.dtype, torch.float32)
        self.bias = four_dimensions(bias, like.dtype)
        self.hidden = None
        if self.bias is not None and has_infinities(self.bias):
            self.hidden = hidden_queries(self.bias, is_causal)
        # Whether powers of two seem to serve; to know it on a device would be to wait.
        self.powers = like.device.type == "cpu" and self.hidden is None

    def weights(self, chunk: Chunk, band: slice, q: Tensor, k: Tensor, out: Tensor) -> Tensor:
        """Softmax of a band's scores into `out`, `(images and heads, queries, keys)`."""
        split = (*chunk.pair, *out.shape[1:])
        # Scores are exponents of two, unless that could leave the range of float16.
        exact = out.dtype != torch.float16
        factor = LOG2E if self.powers and exact else 1.0
        if self.bias is not None:
            chunk.rows(self.bias, band, out.view(split))
        beta = 0.0 if self.bias is None else factor
        torch.baddbmm(out, q, k.mT, beta=beta, alpha=self.scale * factor, out=out)
        if self.is_causal:
            key = torch.arange(out.shape[2], device=out.device)
            if chunk.token is None:
                query = torch.arange(band.start, band.stop, device=out.device)
            else:
                query = chunk.token[band]
            out.masked_fill_(key > query[:, None], -math.inf)
        if self.powers:
            exponents = out
            if out.dtype != self.wide:
                exponents = self.work.take("powers", out.shape, self.wide).copy_(out)
                if not exact:
                    exponents.mul_(LOG2E)
            if softmax_of_exponents(exponents) is not None:
                return out if exponents is out else out.copy_(exponents)
            self.powers = False
            return self.weights(chunk, band, q, k, out)
        torch._softmax(out, -1, False, out=out)
        if self.hidden is not None:
            out.view(split).masked_fill_(chunk.rows(self.hidden, band), 0)
        return out


def four_dimensions(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if bias is None:
        return None
    return bias.to(dtype) if bias.dim() == 4 else bias.to(dtype)[None]


def kept_weights(saved: Tensor, query: Tensor, key: Tensor, packing: Packing | None) -> Tensor:
    """The kept weights, a view of `saved`: `(B, heads, queries, keys)`, or packed."""
    shape = (*query.shape[:3], key.shape[2])
    kept = saved.view(query.dtype)[: math.prod(shape)].view(shape)
    return kept if packing is None else kept.flatten(0, 2)
