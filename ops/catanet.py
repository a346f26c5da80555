"""Mixers of CATANet: aggregation of tokens by content, and attention in overlapping patches.

Liu et al., "CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image
Super-Resolution" (arXiv 2503.06896). Both are gathers around `attention`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import spherical_kmeans
from vitarium.ops.attention import attention
from vitarium.ops.gathering import take
from vitarium.ops.mixer import Mixer, weights_on_values
from vitarium.ops.position import kept
from vitarium.ops.projection import Linear


def _check_widths(owner: str, dim: int, num_heads: int, qk_dim: int | None) -> int:
    """The width of queries and keys.

    Raises:
        ValueError: a width does not divide into heads.
    """
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{owner}: num_heads={num_heads} must divide dim={dim}")
    qk_dim = dim if qk_dim is None else qk_dim
    if qk_dim < 1 or qk_dim % num_heads:
        raise ValueError(f"{owner}: qk_dim={qk_dim} must be a multiple of num_heads={num_heads}")
    return qk_dim


def reflected(place: Tensor, length: int) -> Tensor:
    """Places beyond the end of a sequence as those of the sequence read backwards, and so on."""
    place = place % (2 * length)
    return torch.where(place < length, place, 2 * length - 1 - place)


class TokenAggregationAttention(Mixer, name="token_aggregation"):
    """Attention among tokens of like content, and to the centres of contents (CATANet's TAB).

    Every token belongs to the nearest of `num_tokens` centres by direction. Tokens are sorted by
    their centre, in raster order where it is the same, and cut into groups. With q, k, v of x,

        local = softmax(scale q k^T) v    over the tokens of the own group and of the next
        centre = softmax(scale q to_k(means)^T) to_v(means)    over the centres
        out = conv1x1(proj(local + centre))

    Beyond its end the sorted sequence is read backwards, and forwards again where it is short: the
    official code pads those to a wrong length, and leaves open the order of tokens of one centre,
    on which the result depends. The layer's normalisation, feed-forward part and residuals are left
    to the model around it.

    In training centres are sought by `n_iter` steps of spherical k-means, from those held, or from
    means of runs of tokens in the first forward; what is held is their moving average. Evaluation
    takes what is held; if there has been no training, the means of runs, over all images.

    Cost for N tokens: N (2 C + 2 qk_dim + C) C for the projections, N T C of the assignment to T
    centres, and N (2 group_size + T) (C + qk_dim) of the attention, in multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim` and `qk_dim`.
        qk_dim: width of queries and keys; `dim` if None.
        n_iter: steps of k-means in a forward of training.
        num_tokens: number T of centres.
        group_size: tokens of a group; of a smaller map all.
        ema_decay: how much of the centres stays in a step of training.

    Raises:
        ValueError: a width or number is impossible; the message says which.
    """

    paper = "CATANet (arXiv 2503.06896)"
    linear = True
    operator = "attention"
    routed = True
    cost = "N*C*(3*C + 2*qk_dim) + N*num_tokens*C + N*(2*group_size + num_tokens)*(C + qk_dim)"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 24, "num_heads": 2, "qk_dim": 20, "group_size": 16},
        {"dim": 16, "num_heads": 4, "num_tokens": 3, "group_size": 128},
    )
    official_names: ClassVar[Mapping[str, str | None]] = {
        r"(norm|mlp)\..*": None,
        r"iasa_attn\.(.*)": r"\1",
        r"irca_attn\.to_([kv])\.(.*)": r"centre_to_\1.\2",
    }
    means: Tensor
    initted: Tensor

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        qk_dim: int | None = None,
        n_iter: int = 3,
        num_tokens: int = 8,
        group_size: int = 128,
        ema_decay: float = 0.999,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        qk_dim = _check_widths(owner, dim, num_heads, qk_dim)
        for name, number in (
            ("n_iter", n_iter),
            ("num_tokens", num_tokens),
            ("group_size", group_size),
        ):
            if number < 1:
                raise ValueError(f"{owner}: {name}={number} must be at least 1")
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"{owner}: ema_decay={ema_decay} is a weight; allowed is 0 to 1")
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.n_iter = n_iter
        self.group_size = group_size
        self.ema_decay = ema_decay
        self.to_q = Linear(dim, qk_dim, bias=False, **factory)
        self.to_k = Linear(dim, qk_dim, bias=False, **factory)
        self.to_v = Linear(dim, dim, bias=False, **factory)
        self.centre_to_k = Linear(dim, qk_dim, bias=False, **factory)
        self.centre_to_v = Linear(dim, dim, bias=False, **factory)
        self.proj = Linear(dim, dim, bias=False, **factory)
        self.conv1x1 = Linear(dim, dim, bias=False, **factory)
        self.register_buffer("means", torch.randn(num_tokens, dim, **factory))
        self.register_buffer("initted", torch.tensor(False, device=device))
        self._ready = False  # true only if `initted` is, without a look at a tensor

    def centres(self, tokens: Tensor) -> Tensor:
        """The centres `(num_tokens, C)` that tokens `(B, N, C)` meet; in training, moved ones."""
        wide = torch.promote_types(tokens.dtype, torch.float32)
        held = self._held(tokens.detach().to(wide))
        if not self.training:
            return held
        units = F.normalize(tokens.to(wide), dim=-1).flatten(0, 1)
        means = F.normalize(held, dim=-1)
        with torch.no_grad():
            for _ in range(self.n_iter - 1):
                means = spherical_kmeans.step(units, means)
        means = spherical_kmeans.step(units, means)  # the last one has a gradient
        with torch.no_grad():
            decay = self.ema_decay * self.initted.to(wide)
            self.means.copy_(means + decay * (self.means.to(wide) - means))
            self.initted.fill_(True)
        self._ready = True
        return means

    def _held(self, tokens: Tensor) -> Tensor:
        """The centres held, or if there has been no training the means of runs of these tokens."""
        means = self.means.to(tokens.dtype, copy=True)
        if self._ready:
            return means
        # Not so sure: a copy of a model for averages gets its tensors by other ways than loading.
        return torch.where(self.initted, means, self._means_of_runs(tokens))

    def _means_of_runs(self, tokens: Tensor) -> Tensor:
        """Of as many runs of tokens in raster order as there are centres, of all images."""
        length, count = tokens.shape[1], len(self.means)
        run = length // count + 1  # as official, also where the length divides
        place = torch.arange(run * count, device=tokens.device)
        runs = tokens[:, reflected(place, length)].unflatten(1, (count, run)).transpose(0, 1)
        # In the official order: where a run mirrors another, rounding says which one is nearer.
        return runs.flatten(1, 2).mean(1)

    @staticmethod
    @torch.no_grad()
    def order(tokens: Tensor, means: Tensor) -> Tensor:
        """The tokens of `(B, N, C)` sorted by their centre, `(B, N)`, stable."""
        units = F.normalize(tokens.to(means.dtype), dim=-1)
        index = spherical_kmeans.nearest(units, F.normalize(means, dim=-1))
        return index.argsort(dim=-1, stable=True)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, order: Tensor) -> Tensor:
        """The local part: tokens `(B, N, num_heads, channels)` in their order, `(B, N)`."""
        batch, tokens = order.shape
        size = min(tokens, self.group_size)
        groups = (tokens + size - 1) // size
        own = torch.arange(groups * size, device=order.device)
        both = torch.arange(2 * size, device=order.device) + size * torch.arange(
            groups, device=order.device
        ).view(-1, 1)
        seen = order[:, reflected(both, tokens).flatten()]
        parts = take(query, order[:, reflected(own, tokens)]), take(key, seen), take(value, seen)
        output = attention(*(x.unflatten(1, (groups, -1)).flatten(0, 1) for x in parts))
        output = output.unflatten(0, (batch, groups)).flatten(1, 2)[:, :tokens]
        back = torch.empty_like(order).scatter_(
            1, order, torch.arange(tokens, device=order.device).expand_as(order)
        )
        return take(output, back)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        tokens = x.flatten(1, 2)
        means = self.centres(tokens)
        query, key, value = (
            self._heads(layer(tokens)) for layer in (self.to_q, self.to_k, self.to_v)
        )
        output = self.attend(query, key, value, self.order(tokens, means.detach()))
        means = means.to(self.means.dtype)
        centre_key, centre_value = (
            self._heads(layer(means)).expand(len(x), -1, -1, -1)
            for layer in (self.centre_to_k, self.centre_to_v)
        )
        output = output + attention(query, centre_key, centre_value)
        return self.conv1x1(self.proj(output.flatten(-2))).view(x.shape)

    def _attention_map(self, x: Tensor, row: int, column: int) -> Tensor:
        """Of the local part, and of each image for itself: centres are no positions of the map."""
        maps = []
        for image in x:
            tokens = image[None].flatten(1, 2)
            means = self._held(tokens)
            query, key = self._heads(self.to_q(tokens)), self._heads(self.to_k(tokens))
            order = self.order(tokens, means)

            def attend(value: Tensor, parts: Any = (query, key, order)) -> Tensor:
                query, key, order = parts
                output = self.attend(query, key, value.flatten(1, 2), order)
                return output.unflatten(1, value.shape[1:3])

            maps.append(weights_on_values(attend, image[None], self.num_heads, (row, column)))
        return torch.cat(maps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.initted.is_meta:
            self._ready = bool(self.initted)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, group_size={self.group_size}"


@kept
def _patches(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Patches along an axis: their places `(count, size)`, and a factor per place `(length,)`.

    Patches begin every `size - 2` places, the last at the end. A place where patches overlap has
    the factor 1/2, one in the overlaps of two pairs 1/4, as in the official code.
    """
    step = max(size - 2, 1)
    starts = [min(start, length - size) for start in range(0, length + step - size, step)]
    factor = torch.ones(length)
    for before, start in itertools.pairwise(starts):
        factor[start : before + size] /= 2
    index = torch.tensor(starts).view(-1, 1) + torch.arange(size)
    return index.to(device), factor.to(device)


class OverlappingPatchAttention(Mixer, name="overlapping_patches"):
    """Attention within patches that overlap by two tokens, averaged there (CATANet's LRSA).

        q, k, v = to_q(x), to_k(x), to_v(x)
        out = proj(mean over the patches of a token of softmax(scale q k^T) v)

    The last patch of an axis ends with the map and may overlap by more. Where three patches
    overlap, which then is one row or column, their sum is divided by four, as in the official code.
    A map shorter than a patch is one patch. The layer's normalisation, feed-forward part and
    residuals are left to the model around it. Cost for N tokens: N (2 C + 2 qk_dim) C for the
    projections, once, and about N (p / (p - 2))^2 p^2 (C + qk_dim) for patches of p x p.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim` and `qk_dim`.
        qk_dim: width of queries and keys; `dim` if None.
        patch_size: side of a patch, at least 3.

    Raises:
        ValueError: a width or size is impossible; the message says which.
    """

    paper = "CATANet (arXiv 2503.06896)"
    linear = True
    operator = "attention"
    cost = "2*N*C*(C + qk_dim) + N*patch_size**4/(patch_size - 2)**2*(C + qk_dim)"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 24, "num_heads": 2, "qk_dim": 20, "patch_size": 6},
        {"dim": 16, "num_heads": 1, "patch_size": 16},
    )
    official_names: ClassVar[Mapping[str, str | None]] = {
        r"layer\.0\.fn\.(.*)": r"\1",
        r"layer\..*": None,
    }

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        qk_dim: int | None = None,
        patch_size: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        qk_dim = _check_widths(owner, dim, num_heads, qk_dim)
        if patch_size < 3:
            raise ValueError(f"{owner}: patch_size={patch_size} must be at least 3")
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.to_q = Linear(dim, qk_dim, bias=False, **factory)
        self.to_k = Linear(dim, qk_dim, bias=False, **factory)
        self.to_v = Linear(dim, dim, bias=False, **factory)
        self.proj = Linear(dim, dim, bias=False, **factory)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The averaged outputs of all patches of `(B, H, W, num_heads, channels)`."""
        batch, height, width = query.shape[:3]
        (rows, row_factor), (columns, column_factor) = (
            _patches(length, min(length, self.patch_size), query.device)
            for length in (height, width)
        )
        # (B, patches down, rows of one, patches across, columns of one, heads, channels)
        parts = (
            x[:, rows][:, :, :, columns].transpose(2, 3).flatten(3, 4).flatten(0, 2)
            for x in (query, key, value)
        )
        output = attention(*parts).unflatten(0, (batch, len(rows), len(columns)))
        output = output.unflatten(3, (rows.shape[1], -1)).transpose(2, 3)
        output = output.flatten(3, 4).flatten(1, 2)
        found = output.new_zeros(batch, height, *output.shape[2:])
        found = found.index_add(1, rows.flatten(), output)
        total = found.new_zeros(batch, height, width, *found.shape[3:])
        total = total.index_add(2, columns.flatten(), found)
        return total * (row_factor[:, None] * column_factor).to(total.dtype)[:, :, None, None]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        parts = (self._heads(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.proj(self.attend(*parts).flatten(-2))

    def _attention_map(self, x: Tensor, row: int, column: int) -> Tensor:
        query, key = self._heads(self.to_q(x)), self._heads(self.to_k(x))
        return weights_on_values(
            lambda value: self.attend(query, key, value), x, self.num_heads, (row, column)
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, patch_size={self.patch_size}"
