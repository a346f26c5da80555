"""Mixers of grouped-query attention, with as many queries per key head as its keys are long.

Grouped heads: Ainslie et al., "GQA" (arXiv 2305.13245). Allocation by the norms of keys: Khan et
al., "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention" (2408.08454). Both are
modules over `attention`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitarium.ops.attention import attention
from vitarium.ops.mixer import Mixer
from vitarium.ops.projection import Linear

KINDS = ("key", "diff", "ema")


def even_allocation(num_heads: int, num_kv_heads: int) -> Tensor:
    """Query heads of every key head, int64, where all get the same; the first get what is over."""
    heads = torch.arange(num_kv_heads)
    return num_heads // num_kv_heads + (heads < num_heads % num_kv_heads).long()


def allocate(shares: Tensor, num_heads: int) -> Tensor:
    """Numbers of query heads, int64, in proportion to `shares`, with the sum `num_heads`.

    Rounded half to even; then one at a time is taken from the largest or given to the smallest, the
    first of several, until the sum is right. Shares whose sum is zero are taken as equal. There is
    no look at the values, so that the function can be traced.

    Args:
        shares: `(num_kv_heads,)`, not negative.
        num_heads: number of query heads.
    """
    places = torch.arange(len(shares), device=shares.device)
    even = torch.full_like(shares, 1 / len(shares))
    total = shares.sum()
    found = (torch.where(total > 0, shares / total, even) * num_heads).round().long()
    for _ in range(len(shares) // 2 + 1):  # rounding is off by half a head at most, for each
        left = num_heads - found.sum()
        found = found - ((places == found.argmax()) & (left < 0)).long()
        found = found + ((places == found.argmin()) & (left > 0)).long()
    return found


class GroupedQueryAttention(Mixer, name="grouped_query"):
    """Grouped-query attention: several query heads share a head of keys and values.

        query, key, value = q(x), k(x), v(x);  out = proj(softmax(scale query key^T) value)

    with `num_heads` heads of queries and `num_kv_heads` of keys and values. Query head i sees key
    head `i // (num_heads // num_kv_heads)`. Cost for N tokens: (2 + 2 num_kv_heads / num_heads)
    N C^2 for the projections and 2 N^2 C multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of query heads; divides `dim`.
        qkv_bias: biases of the query, key and value projections.
        num_kv_heads: number of key and value heads, which divides `num_heads`; half of them if
            None.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: numbers of heads do not divide what they must.
    """

    paper = "GQA (arXiv 2305.13245)"
    operator = "attention"
    cross = True
    cost = "(2 + 2*num_kv_heads/num_heads)*N*C**2 + 2*N**2*C"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 24, "num_heads": 4, "qkv_bias": True},
        {"dim": 24, "num_heads": 6, "num_kv_heads": 2},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = False,
        num_kv_heads: int | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{owner}: num_heads={num_heads} must divide dim={dim}")
        num_kv_heads = max(num_heads // 2, 1) if num_kv_heads is None else num_kv_heads
        self._check_kv_heads(num_heads, num_kv_heads)
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        width = dim // num_heads * num_kv_heads
        self.q = Linear(dim, dim, bias=qkv_bias, **factory)
        self.k = Linear(dim, width, bias=qkv_bias, **factory)
        self.v = Linear(dim, width, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def _check_kv_heads(self, num_heads: int, num_kv_heads: int) -> None:
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"{type(self).__name__}: num_kv_heads={num_kv_heads} must divide {num_heads=}"
            )

    def _shared(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The heads of keys and values as the operator gets them."""
        return key, value

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        query = self.q(x).unflatten(-1, (self.num_heads, -1))
        key = self.k(source).unflatten(-1, (self.num_kv_heads, -1))
        value = self.v(source).unflatten(-1, (self.num_kv_heads, -1))
        output = attention(query, *self._shared(key, value))
        return self.proj_drop(self.proj(output.flatten(-2)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"


class KeyDrivenGroupedQueryAttention(GroupedQueryAttention, name="key_driven_grouped_query"):
    """Grouped-query attention whose key heads serve as many query heads as their keys are long.

    With the norm n_j of key head j over tokens and channels, summed over images, and query heads
    shared out in order, a_j of them to key head j:

        a = allocate(share(n));  out = proj(softmax(scale query key^T) value)

    where share(n) is (n - min n) / (max n - min n) for `kind="key"` (KDGQA), |n - cache| for "diff"
    and beta n + (1 - beta) cache for "ema" (DGQA), with the norms of an earlier map as cache. The
    key head of the smallest norm gets none by "key" but what rounding leaves over. Equal shares
    are an even allocation, where the official formula gives NaN.

    The allocation is frozen unless `dynamic`: even at first, then what `calibrate` finds, part of
    the state dict. So outputs depend on no other image, and the module can be compiled and
    exported. Cost: that of `GroupedQueryAttention`.

    Args:
        dim: number of channels C.
        num_heads: number of query heads; divides `dim`.
        qkv_bias: biases of the query, key and value projections.
        num_kv_heads: number of key and value heads, at most `num_heads`; half of them if None.
        kind: what shares are made of: "key", "diff" or "ema".
        window_size: of "diff" and "ema" when dynamic: training steps between two allocations.
        beta: of "ema", the weight of the present norms.
        dynamic: allocate anew in every forward, as the official code does: with the batch at hand,
            "diff" and "ema" with the cache of the forward before, which each of them overwrites.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: a number or a choice is impossible; the message says which.
    """

    paper = "Key-Driven Grouped Query Attention (arXiv 2408.08454)"
    cost = "(2 + 2*num_kv_heads/num_heads)*N*C**2 + 2*N**2*C"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 24, "num_heads": 6, "num_kv_heads": 4, "qkv_bias": True},
        {"dim": 24, "num_heads": 4, "kind": "ema"},
    )
    allocation: Tensor
    cache: Tensor

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = False,
        num_kv_heads: int | None = None,
        kind: str = "key",
        window_size: int = 1,
        beta: float = 0.9,
        dynamic: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        owner = type(self).__name__
        if kind not in KINDS:
            raise ValueError(f"{owner}: kind={kind!r}; allowed are {', '.join(KINDS)}")
        if window_size < 1:
            raise ValueError(f"{owner}: window_size={window_size} must be at least 1")
        if not 0 <= beta <= 1:
            raise ValueError(f"{owner}: beta={beta} is a weight; allowed is 0 to 1")
        super().__init__(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            num_kv_heads=num_kv_heads,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )
        self.kind = kind
        self.window_size = window_size
        self.beta = beta
        self.dynamic = dynamic
        self._steps = 0
        allocation = even_allocation(num_heads, self.num_kv_heads).to(device)
        self.register_buffer("allocation", allocation)
        if kind != "key":
            cache = torch.zeros(self.num_kv_heads, device=device, dtype=dtype)
            self.register_buffer("cache", cache)

    def _check_kv_heads(self, num_heads: int, num_kv_heads: int) -> None:
        if not 1 <= num_kv_heads <= num_heads:
            raise ValueError(
                f"{type(self).__name__}: num_kv_heads={num_kv_heads}; allowed are 1 to {num_heads}"
            )

    @torch.no_grad()
    def calibrate(self, *maps: Tensor) -> Tensor:
        """Allocate query heads by the keys of these maps, and freeze that.

        Args:
            maps: `(B, H, W, C)` each, of any sizes: inputs of this mixer. "key" adds up the norms
                of all of them; "diff" and "ema" take one after the other.

        Returns:
            Query heads of every key head, `(num_kv_heads,)`, int64.

        Raises:
            ValueError: there is no map, or one is not `(B, H, W, C)`.
        """
        if not maps:
            raise ValueError(f"{type(self).__name__}: maps={maps!r}; allowed is at least one")
        for x in maps:
            self._check_map("maps", x)
        norms = [self._norms(self.k(x).unflatten(-1, (self.num_kv_heads, -1))) for x in maps]
        for norm in [torch.stack(norms).sum(0)] if self.kind == "key" else norms:
            self.allocation.copy_(allocate(self._shares(norm), self.num_heads))
            if self.kind != "key":
                self.cache.copy_(norm)
        return self.allocation.clone()

    @staticmethod
    def _norms(key: Tensor) -> Tensor:
        """Norm of every head over tokens and channels, summed over images: `(num_kv_heads,)`."""
        wide = torch.promote_types(key.dtype, torch.float32)
        return torch.linalg.vector_norm(key, dim=(1, 2, 4), dtype=wide).sum(0)

    def _shares(self, norms: Tensor) -> Tensor:
        if self.kind == "key":
            least, most = norms.aminmax()
            return ((norms - least) / (most - least)).nan_to_num()
        if self.kind == "diff":
            return (self.cache - norms).abs()
        return self.beta * norms + (1 - self.beta) * self.cache

    @torch.no_grad()
    def _present(self, key: Tensor) -> Tensor:
        """The allocation for these keys when dynamic; as official, caches are of the last call."""
        norms = self._norms(key)
        if self.kind == "key":
            return allocate(self._shares(norms), self.num_heads)
        if self._due():
            self.allocation.copy_(allocate(self._shares(norms), self.num_heads))
            kept = (self.cache + norms) / self.window_size if self.training else norms
            self.cache.copy_(kept)
        return self.allocation

    def _due(self) -> bool:
        """Whether this forward allocates; counts those of training."""
        if not self.training:
            return True
        self._steps += 1
        return (self._steps - 1) % self.window_size == 0

    def _shared(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        allocation = self._present(key) if self.dynamic else self.allocation
        heads = torch.arange(self.num_heads, device=key.device)
        # Key heads whose queries all come before query head i.
        index = (allocation.cumsum(0)[:, None] <= heads).sum(0)
        return key.index_select(-2, index), value.index_select(-2, index)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + "allocation", self.allocation)  # official ones have none
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind!r}" + ", dynamic=True" * self.dynamic
