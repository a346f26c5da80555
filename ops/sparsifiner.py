"""Sparsifiner: attention to the keys that a cheap prediction of the scores says matter.

Wei et al., "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision
Transformers" (arXiv 2303.13755). The prediction is of low rank; the attention to what it chooses is
`indexed_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.attention import attention
from vitarium.ops.indexed import indexed_attention
from vitarium.ops.mixer import Mixer, qkv_heads, weights_on_values
from vitarium.ops.position import Size
from vitarium.ops.projection import Linear

CHUNK = 1 << 25  # predicted scores of a call: of more, queries are taken a part at a time


class MaskPredictor(nn.Module):
    """A prediction of attention from few channels and a learned basis over tokens.

    Args:
        head_dim: channels of a head.
        num_heads: their number.
        input_resolution: map (H, W) that the basis is of.
        num_prefix_tokens: tokens before those of the map.
        reduced_n: number n of basis vectors.
        reduced_c: channels that scores are predicted from.
        share_inout_proj: the basis is also what keys are projected with.
        basis_threshold: entries of the basis up to it are zeros.
        basis_coef_topk: how many coefficients of a query are kept, all if None.
        basis_coef_threshold: coefficients up to it are zeros.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        input_resolution: Size,
        num_prefix_tokens: int,
        reduced_n: int,
        reduced_c: int,
        share_inout_proj: bool,
        basis_threshold: float,
        basis_coef_topk: int | None,
        basis_coef_threshold: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.input_resolution = input_resolution
        self.num_prefix_tokens = num_prefix_tokens
        self.scale = num_heads**-0.5
        self.basis_threshold = basis_threshold
        self.basis_coef_topk = basis_coef_topk
        self.basis_coef_threshold = basis_coef_threshold
        self.proj_c_q = Linear(head_dim, reduced_c, **factory)
        self.proj_c_k = Linear(head_dim, reduced_c, **factory)
        tokens = math.prod(input_resolution) + num_prefix_tokens
        self.proj_n = nn.Parameter(torch.empty(tokens, reduced_n, **factory))
        self.proj_back_n = self.proj_n
        if not share_inout_proj:
            self.proj_back_n = nn.Parameter(torch.empty(tokens, reduced_n, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bare parameters anew; the layers have their own `reset_parameters`."""
        nn.init.trunc_normal_(self.proj_n, std=0.02)
        if self.proj_back_n is not self.proj_n:
            nn.init.trunc_normal_(self.proj_back_n, std=0.02)

    def _resized(self, x: Tensor, size: Size, prefix: int) -> Tensor:
        """Rows of x for a map of this size and so many tokens before it."""
        first = x.shape[0] - math.prod(self.input_resolution)
        before, rows = x[first - prefix : first], x[first:]
        if tuple(size) != tuple(self.input_resolution):
            grid = rows.T.unflatten(1, self.input_resolution)[None]
            grid = F.interpolate(grid, size=size, mode="bilinear", align_corners=False)
            rows = grid[0].flatten(1).T
        return torch.cat([before, rows])

    def key_projection(self, size: Size, prefix: int) -> Tensor:
        """`(tokens, n)`; a sum over more tokens is as large as that over those of training."""
        factor = math.prod(self.input_resolution) / math.prod(size)
        return self._resized(self.proj_n, size, prefix) * factor

    def basis(self, size: Size, prefix: int, exact: bool = False) -> Tensor:
        """`(n, tokens)`, thresholded unless `exact`."""
        basis = self._resized(self.proj_back_n, size, prefix).T
        return basis if exact else F.threshold(basis.abs(), self.basis_threshold, 0.0)

    def coefficients(self, query: Tensor, projected_key: Tensor, exact: bool = False) -> Tensor:
        """Coefficients `(B, heads, queries, n)` of reduced queries and projected keys."""
        found = (query @ projected_key * self.scale).softmax(-1)
        if exact:
            return found
        if self.basis_coef_topk is not None:
            kept, index = found.topk(min(self.basis_coef_topk, found.shape[-1]), sorted=False)
            return torch.zeros_like(found).scatter(-1, index, kept)
        if self.basis_coef_threshold > 0:
            return F.threshold(found, self.basis_coef_threshold, 0.0)
        return found


class SparsifinerAttention(Mixer, name="sparsifiner"):
    """Attention to those keys of every query that a low-rank prediction ranks first.

    With q, k, v of qkv(x), reduced to c channels (q', k') and a learned P, P_back `(N, n)`,

        S = softmax(num_heads^-0.5 q' k'^T P);  score = S |P_back|^T
        out = proj(softmax(scale q k^T over the keys with the largest scores) v)

    for each head. `ceil(attn_keep_rate N)` keys are kept, or those whose score exceeds
    `attn_score_threshold`. With a fixed number of keys no product with others enters softmax or
    values, and with few of them it is not computed (see `indexed_attention`); thresholds mask.

    P has a row for every token of the map that the mixer is built for. On other maps its rows are
    interpolated (bilinear), those of P by the ratio of the numbers of tokens smaller.

    What is chosen has no gradient. The prediction learns from `reconstruction_loss`, in training
    with `attn_recon`, in which attention is dense. Cost for N tokens: 4 N C^2 for the projections,
    N n (N num_heads + 2 C / reduce_c_factor) of the prediction, 2 N K C of the attention to K keys.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`.
        input_resolution: map that P is of, a side or (H, W).
        num_prefix_tokens: rows of P before those of the map, for `mix_tokens`; 1 for a class token.
        attn_keep_rate: share of the keys that a query keeps, above 0.
        reduce_n_factor: tokens for one of the n basis vectors.
        reduce_c_factor: channels of a head for one of those that scores are predicted from.
        share_inout_proj: P is P_back.
        basis_threshold: entries of |P_back| up to it are zeros.
        basis_coef_topk: how many entries of a row of S are kept, all if None.
        basis_coef_threshold: entries of S up to it are zeros, where `basis_coef_topk` is None.
        attn_score_threshold: keep the keys whose score exceeds it, in place of a fixed number.
        token_keep_rate: share of the tokens that `mix_tokens` keeps, by the attention of the first
            token to them; 1 for all.
        prune_attn_matrix_row: tokens that were pruned before attend to nothing.
        attn_recon: in training, dense attention and `reconstruction_loss`.
        qkv_bias: bias of the query, key and value projection.
        qk_scale: factor on the scores; `head_dim ** -0.5` if None.
        proj_drop: dropout rate after the output projection.

    Attributes:
        reconstruction_loss: mean squared distance of the prediction S P_back^T from the attention,
            of the last forward in training with `attn_recon`; else None.

    Raises:
        ValueError: a width, number or rate is impossible; the message says which.
    """

    paper = "Sparsifiner (arXiv 2303.13755)"
    operator = "indexed_attention"
    routed = True
    indirect = (r"mask_predictor\..*",)
    cost = (
        "4*N*C**2 + 2*attn_keep_rate*N**2*C "
        "+ input_resolution**2//reduce_n_factor*N*(N*num_heads + 3*C)"
    )
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 24, "num_heads": 2, "input_resolution": 7},
        {"dim": 24, "num_heads": 2, "input_resolution": (5, 6), "attn_score_threshold": 0.01,
         "num_prefix_tokens": 1},
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        input_resolution: int | Size = 14,
        num_prefix_tokens: int = 0,
        attn_keep_rate: float = 0.25,
        reduce_n_factor: int = 8,
        reduce_c_factor: int = 2,
        share_inout_proj: bool = False,
        basis_threshold: float = 0.0,
        basis_coef_topk: int | None = None,
        basis_coef_threshold: float = 0.0,
        attn_score_threshold: float | None = None,
        token_keep_rate: float = 1.0,
        prune_attn_matrix_row: bool = False,
        attn_recon: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{owner}: num_heads={num_heads} must divide dim={dim}")
        size = dispatch.per_dimension(owner, "input_resolution", input_resolution, 2)
        for name, rate in (
            ("attn_keep_rate", attn_keep_rate),
            ("token_keep_rate", token_keep_rate),
        ):
            if not 0 < rate <= 1:
                raise ValueError(f"{owner}: {name}={rate}; allowed is above 0, up to 1")
        for name, number in (
            ("reduce_n_factor", reduce_n_factor),
            ("reduce_c_factor", reduce_c_factor),
            ("basis_coef_topk", basis_coef_topk),
        ):
            if number is not None and number < 1:
                raise ValueError(f"{owner}: {name}={number} must be at least 1")
        if num_prefix_tokens < 0:
            raise ValueError(f"{owner}: num_prefix_tokens={num_prefix_tokens} must be at least 0")
        factory = {"device": device, "dtype": dtype}
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.scale = head_dim**-0.5 if qk_scale is None else qk_scale
        self.input_resolution = size
        self.num_prefix_tokens = num_prefix_tokens
        self.attn_keep_rate = attn_keep_rate
        self.attn_score_threshold = attn_score_threshold
        self.token_keep_rate = token_keep_rate
        self.prune_attn_matrix_row = prune_attn_matrix_row
        self.attn_recon = attn_recon
        self.reconstruction_loss: Tensor | None = None
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.mask_predictor = MaskPredictor(
            head_dim,
            num_heads,
            size,
            num_prefix_tokens,
            max((math.prod(size) + num_prefix_tokens) // reduce_n_factor, 1),
            max(head_dim // reduce_c_factor, 1),
            share_inout_proj,
            basis_threshold,
            basis_coef_topk,
            basis_coef_threshold,
            **factory,
        )

    def predict(
        self,
        query: Tensor,
        key: Tensor,
        size: Size,
        token_mask: Tensor | None = None,
        exact: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The two factors of the predicted attention of the map's tokens to all.

        Args:
            query, key: `(B, tokens, num_heads, head_dim)`, those of a map of this size last.
            size: (H, W) of the map.
            token_mask: `(B, H * W)`, false for tokens that were pruned.
            exact: without thresholds, as the prediction is trained.

        Returns:
            `(B, num_heads, H * W, n)` and `(n, tokens)`.
        """
        predictor = self.mask_predictor
        prefix = query.shape[1] - math.prod(size)
        query = predictor.proj_c_q(query[:, prefix:]).transpose(1, 2)
        key = predictor.proj_c_k(key).transpose(1, 2)
        if token_mask is not None:
            kept = token_mask[:, None, :, None]
            query, key = query * kept, key * F.pad(kept, (0, 0, prefix, 0), value=True)
        projected = key.mT @ predictor.key_projection(size, prefix)
        coefficients = predictor.coefficients(query, projected, exact)
        return coefficients, predictor.basis(size, prefix, exact)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        factors: tuple[Tensor, Tensor],
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """The attention `(B, H * W, num_heads, channels)` of the map's queries to what they chose.

        Args:
            query: `(B, H * W, num_heads, head_dim)`.
            key: `(B, tokens, num_heads, head_dim)`.
            value: `(B, tokens, num_heads, channels)`.
            factors: of the prediction, see `predict`.
            token_mask: as there.
        """
        coefficients, basis = factors
        tokens = basis.shape[1]
        step = max(1, CHUNK // max(query.shape[0] * self.num_heads * tokens, 1))
        if torch.compiler.is_compiling() or dispatch.plain_aten() or step >= query.shape[1]:
            return self._choose_and_attend(query, key, value, coefficients, basis, token_mask)
        parts = zip(query.split(step, 1), coefficients.split(step, 2))
        return torch.cat(
            [self._choose_and_attend(q, key, value, c, basis, token_mask) for q, c in parts], 1
        )

    def _choose_and_attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        coefficients: Tensor,
        basis: Tensor,
        token_mask: Tensor | None,
    ) -> Tensor:
        tokens = basis.shape[1]
        budget = math.ceil(self.attn_keep_rate * tokens)
        with torch.no_grad():
            scores = coefficients @ basis
            if token_mask is not None:
                prefix = tokens - token_mask.shape[1]
                budget = min(budget, int(token_mask[0].sum()))
                hidden = F.pad(~token_mask, (prefix, 0))[:, None, None]
                scores = scores.masked_fill(hidden, -torch.inf)
        if self.attn_score_threshold is None:
            index = scores.topk(max(budget, 1), sorted=False).indices
            return indexed_attention(query, key, value, index, scale=self.scale)
        bias = torch.zeros_like(scores, dtype=query.dtype)
        bias = bias.masked_fill(scores <= self.attn_score_threshold, -torch.inf)
        return attention(query, key, value, bias=bias, scale=self.scale)

    def mix_tokens(
        self, x: Tensor, size: Size | None = None, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The mixed tokens of a map and of some before it, such as a class token, which see all.

        Args:
            x: `(B, prefix + H * W, C)`, prefix at most `num_prefix_tokens`.
            size: (H, W) of the map; `input_resolution` if None.
            token_mask: `(B, H * W)`, false for tokens that were pruned: they count as zeros, and
                are not chosen. All images keep as many.

        Returns:
            The output, as x, and the tokens of the map that are left: `token_mask`, or with a
            `token_keep_rate` below 1 those that the first token attends to most.

        Raises:
            ValueError: x has no such shape.
        """
        size = self.input_resolution if size is None else size
        prefix = x.shape[1] - math.prod(size) if x.dim() == 3 else -1
        if not 0 <= prefix <= self.num_prefix_tokens or x.shape[-1] != self.dim:
            raise ValueError(
                f"SparsifinerAttention: x has shape {tuple(x.shape)}; allowed is (B, up to "
                f"{self.num_prefix_tokens} + {math.prod(size)}, {self.dim})"
            )
        query, key, value = qkv_heads(self.qkv, x, self.num_heads)
        self.reconstruction_loss = None
        if self.attn_recon and self.training:
            coefficients, basis = self.predict(query, key, size, exact=True)
            weights = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * self.scale).softmax(-1)
            target = weights.detach()[:, :, prefix:]
            self.reconstruction_loss = F.mse_loss(coefficients @ basis, target)
            output = attention(query, key, value, scale=self.scale)
            return self.proj_drop(self.proj(output.flatten(-2))), token_mask
        if token_mask is not None:
            kept = F.pad(token_mask, (prefix, 0), value=True)[:, :, None, None]
            query, key, value = query * kept, key * kept, value * kept
        with torch.no_grad():
            factors = self.predict(query, key, size, token_mask)
        output = self.attend(query[:, prefix:], key, value, factors, token_mask)
        if token_mask is not None and self.prune_attn_matrix_row:
            output = output * token_mask[:, :, None, None]
        if prefix:
            first = attention(query[:, :prefix], key, value, scale=self.scale)
            output = torch.cat([first, output], 1)
            if self.token_keep_rate < 1:
                token_mask = self._keep(query[:, 0], key, prefix, token_mask)
        return self.proj_drop(self.proj(output.flatten(-2))), token_mask

    @torch.no_grad()
    def _keep(self, query: Tensor, key: Tensor, prefix: int, token_mask: Tensor | None) -> Tensor:
        """The tokens of the map that one query `(B, num_heads, head_dim)` attends to most."""
        weights = torch.einsum("bhd,bnhd->bhn", query * self.scale, key).softmax(-1)
        scores = weights[:, :, prefix:].mean(1)
        if token_mask is not None:
            scores = scores.masked_fill(~token_mask, -torch.inf)
        index = scores.topk(math.ceil(self.token_keep_rate * scores.shape[1])).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, index, True)

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        height, width = x.shape[1:3]
        return self.mix_tokens(x.flatten(1, 2), (height, width))[0].view(x.shape)

    def _attention_map(self, x: Tensor, row: int, column: int) -> Tensor:
        height, width = x.shape[1:3]
        query, key, _ = qkv_heads(self.qkv, x.flatten(1, 2), self.num_heads)
        factors = self.predict(query, key, (height, width))

        def attend(value: Tensor) -> Tensor:
            output = self.attend(query, key, value.flatten(1, 2), factors)
            return output.unflatten(1, (height, width))

        return weights_on_values(attend, x, self.num_heads, (row, column))

    def __getstate__(self) -> dict[str, Any]:
        """Without the loss of the last step, whose graph can neither be copied nor stored."""
        return {**self.__dict__, "reconstruction_loss": None}

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, attn_keep_rate={self.attn_keep_rate}"
