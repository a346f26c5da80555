"""Mixers of dense attention: multi-head, single-head, length-scaled cosine and mixture-of-head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.attention import attention
from vitarium.ops.mixer import Mixer, qkv_heads
from vitarium.ops.mixture_of_head import HeadRouter, mixture_of_head_attention
from vitarium.ops.position import Size, continuous_position_bias
from vitarium.ops.projection import Linear, linear, plain

TEMPERATURE = 1 / 0.24  # of cosine attention, that training starts with
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)  # of a ViT


class MultiHeadAttention(Mixer, name="attention"):
    """Multi-head attention as in ViT, with keys and values of the map or of a second one.

        query, key, value = norm(q), norm(k), v of qkv(x);  out = proj(attention(query, key, value))

    Cost: 4 N C^2 for the projections and 2 N^2 C for N tokens. Parameters are named as in timm.

    Args:
        dim: number of channels C.
        num_heads: number of heads.
        num_heads_kv: number of key and value heads, which divides `num_heads`, all if None.
        head_dim: channels of a head; `dim // num_heads` if None.
        qkv_bias: bias of the query, key and value projection.
        qk_norm: normalise queries and keys over the channels of a head.
        norm_layer: builds that normalisation from a number of channels; a layer normalisation with
            eps 1e-6 unless given.
        proj_bias: bias of the output projection.
        is_causal: whether a token sees nothing after itself, in raster order.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: numbers of heads do not divide what they must.
    """

    paper = "An Image is Worth 16x16 Words (arXiv 2010.11929)"
    operator = "attention"
    cross = True
    cost = "4*N*C**2 + 2*N**2*C"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 32, "num_heads": 2},
        {"dim": 24, "num_heads": 3, "qkv_bias": False, "qk_norm": True},
        {"dim": 32, "num_heads": 4, "num_heads_kv": 2, "head_dim": 12, "is_causal": True},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        proj_bias: bool = True,
        is_causal: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(f"{owner}: num_heads={num_heads} must divide dim={dim}")
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads_kv < 1 or num_heads % num_heads_kv:
            raise ValueError(f"{owner}: num_heads_kv={num_heads_kv} must divide {num_heads=}")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"{owner}: head_dim={head_dim} must be at least 1")
        head_dim = head_dim or dim // num_heads
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.num_heads_kv = num_heads_kv
        self.head_dim = head_dim
        self.is_causal = is_causal
        width = (num_heads + 2 * num_heads_kv) * head_dim
        self.qkv = Linear(dim, width, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(head_dim, **factory) if qk_norm else nn.Identity()
        self.proj = Linear(num_heads * head_dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def _project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        heads, heads_kv = self.num_heads, self.num_heads_kv
        if heads == heads_kv:
            return qkv_heads(self.qkv, x, heads, context)
        widths = (heads * self.head_dim, 2 * heads_kv * self.head_dim)
        if context is None:
            query, key_value = self.qkv(x).split(widths, -1)
        elif not plain(self.qkv):
            query, key_value = self.qkv(x)[..., : widths[0]], self.qkv(context)[..., widths[0] :]
        else:
            weights = self.qkv.weight.split(widths)
            biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split(widths)
            query, key_value = map(linear, (x, context), weights, biases)
        key, value = key_value.unflatten(-1, (2, heads_kv, -1)).unbind(-3)
        return query.unflatten(-1, (heads, -1)), key, value

    def _attend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
    ) -> Tensor:
        """The outputs of all heads; `x` is what the queries were made of."""
        return attention(query, key, value, **kwargs)

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        query, key, value = self._project(x, context)
        query, key = self.q_norm(query), self.k_norm(key)
        output = self._attend(x, query, key, value, is_causal=self.is_causal)
        return self.proj_drop(self.proj(output.flatten(-2)))

    def mix_tokens(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """As `forward`, for tokens `(B, N, C)`; the size of their map does not matter."""
        return self(x[:, None])[:, 0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Some official code has queries apart from keys and values.
        for kind in ("weight", "bias"):
            parts = [f"{prefix}{name}.{kind}" for name in ("q", "kv")]
            if all(part in state_dict for part in parts):
                joined = torch.cat([state_dict.pop(part) for part in parts])
                state_dict[f"{prefix}qkv.{kind}"] = joined
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        parts = [f"num_heads={self.num_heads}"]
        if self.num_heads_kv != self.num_heads:
            parts.append(f"num_heads_kv={self.num_heads_kv}")
        return ", ".join(parts + ["is_causal=True"] * self.is_causal)


class LengthScaledCosineAttention(Mixer, name="length_scaled_cosine"):
    """Length-scaled cosine attention, the mixer of TransNeXt's last stage.

    With q, k, v of qkv(x), for N tokens:

        query = (q / |q| + query_embedding) softplus(temperature) log N,  key = k / |k|
        out = proj(softmax(query key^T + bias) v)

    with the continuous position bias of `vitarium.ops.position`. Cost: that of multi-head
    attention. A map of one token has log N = 0, and one weight of 1.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`.
        qkv_bias: bias of the query, key and value projection.
        pretrain_size: map that distances are relative to, an int or (H, W): the one that the
            weights were trained on. `input_resolution` if None, else the map at hand.
        input_resolution: map that the official code is built for; any map is taken.
        is_extrapolation: compute the bias of every map; if false, that of other maps is
            interpolated from the one of `input_resolution`, as in the official code for detection.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or a size is impossible.
    """

    paper = "TransNeXt: Robust Foveal Visual Perception for Vision Transformers (arXiv 2311.17132)"
    operator = "attention"
    no_weight_decay: ClassVar[Sequence[str]] = (
        "query_embedding",
        "temperature",
        "cpb_fc1.weight",
        "cpb_fc1.bias",
        "cpb_fc2.weight",
        "cpb_fc2.bias",
    )
    cost = "4*N*C**2 + 2*N**2*C + 512*(num_heads + 2)*(2*H - 1)*(2*W - 1)"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 24, "num_heads": 2},
        {"dim": 32, "num_heads": 4, "qkv_bias": False, "pretrain_size": (7, 9)},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = True,
        pretrain_size: int | Size | None = None,
        input_resolution: int | Size | None = None,
        is_extrapolation: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{owner}: num_heads={num_heads} must divide dim={dim}")
        sizes = (("pretrain_size", pretrain_size), ("input_resolution", input_resolution))
        given = [
            dispatch.per_dimension(owner, name, size, 2) for name, size in sizes if size is not None
        ]
        self.pretrain_size: Size | None = given[0] if given else None
        if input_resolution is None and not is_extrapolation:
            raise ValueError(f"{owner}: is_extrapolation=False needs input_resolution")
        self.bias_size: Size | None = None if is_extrapolation else given[-1]
        self.num_heads = num_heads
        factory = {"device": device, "dtype": dtype}
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **factory))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads, **factory))
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.cpb_fc1 = nn.Linear(2, 512, **factory)
        self.cpb_fc2 = nn.Linear(512, num_heads, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bare parameters anew; the layers have their own `reset_parameters`."""
        nn.init.constant_(self.temperature, math.log(math.expm1(TEMPERATURE)))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)

    def _attend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
    ) -> Tensor:
        """The outputs of all heads; `x` is what the queries were made of."""
        return attention(query, key, value, **kwargs)

    def mix(self, x: Tensor) -> Tensor:
        size = x.shape[1], x.shape[2]
        query, key, value = qkv_heads(self.qkv, x, self.num_heads)
        length_scale = F.softplus(self.temperature) * math.log(size[0] * size[1])
        query = (F.normalize(query, dim=-1) + self.query_embedding[:, 0]) * length_scale[:, 0]
        key = F.normalize(key, dim=-1)
        bias = continuous_position_bias(
            self.cpb_fc1,
            self.cpb_fc2,
            size,
            size,
            self.pretrain_size,
            of=self.bias_size and (self.bias_size, self.bias_size),
        )
        output = self._attend(x, query.to(key.dtype), key, value, bias=bias, scale=1.0)
        return self.proj_drop(self.proj(output.flatten(-2)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, pretrain_size={self.pretrain_size}"


class _Routed:
    """Makes a mixer of dense attention one of mixture-of-head attention."""

    operator = "mixture_of_head_attention"
    cross = False
    routed = True
    official_names: ClassVar[Mapping[str, str | None]] = {
        r"(wg|wg_0|wg_1)\.weight": r"router.\1.weight"
    }
    router: HeadRouter

    def __init__(
        self, dim: int, *, num_heads: int = 8, shared_head: int, routed_head: int, **kwargs: Any
    ) -> None:
        super().__init__(dim, num_heads=num_heads, **kwargs)  # type: ignore[call-arg]
        factory = {name: kwargs.get(name) for name in ("device", "dtype")}
        self.router = HeadRouter(dim, num_heads, shared_head, routed_head, **factory)

    @property
    def balance_loss(self) -> Tensor | None:
        """See `HeadRouter`."""
        return self.router.balance_loss

    def _attend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
    ) -> Tensor:
        gate, active = self.router(x)
        return mixture_of_head_attention(query, key, value, gate, active, **kwargs)


class MixtureOfHeadAttention(_Routed, LengthScaledCosineAttention, name="mixture_of_head"):
    """Mixture-of-head attention of MoH-ViT: length-scaled cosine attention, heads by choice.

        gate, active = router(x);  out = proj(gate_h attention_h(q, k, v) for every active head h)

    Cost for N tokens that use a share s of the heads: 4 N C^2 for the projections and s 2 N^2 C of
    the attention, in multiply-adds.

    Args:
        dim, num_heads, qkv_bias, pretrain_size, input_resolution, is_extrapolation, proj_drop: as
            in `LengthScaledCosineAttention`.
        shared_head, routed_head: as in `HeadRouter`.

    Attributes:
        balance_loss: load-balance loss of the last forward in training, see `HeadRouter`.

    Raises:
        ValueError: numbers of heads do not fit.
    """

    paper = "MoH: Multi-Head Attention as Mixture-of-Head Attention (arXiv 2410.11842)"
    cost = "4*N*C**2 + 2*N**2*C + N*C*(num_heads + 2) + 512*(num_heads + 2)*(2*H - 1)*(2*W - 1)"
    examples = (
        {"dim": 32, "num_heads": 4, "shared_head": 1, "routed_head": 1},
        {"dim": 32, "num_heads": 8, "shared_head": 3, "routed_head": 2, "pretrain_size": 7},
        {"dim": 32, "num_heads": 4, "shared_head": 0, "routed_head": 3},
        {"dim": 32, "num_heads": 4, "shared_head": 4, "routed_head": 0},
    )


class MixtureOfHeadDotProductAttention(
    _Routed, MultiHeadAttention, name="mixture_of_head_dot_product"
):
    """Mixture-of-head attention of MoH-DiT: multi-head attention, heads by choice.

        gate, active = router(x);  out = proj(gate_h attention_h(q, k, v) for every active head h)

    Cost for N tokens that use a share s of the heads: 4 N C^2 for the projections and s 2 N^2 C of
    the attention, in multiply-adds.

    Args:
        dim, num_heads, num_heads_kv, head_dim, qkv_bias, qk_norm, norm_layer, proj_bias, is_causal,
            proj_drop: as in `MultiHeadAttention`.
        shared_head, routed_head: as in `HeadRouter`.

    Attributes:
        balance_loss: load-balance loss of the last forward in training, see `HeadRouter`.

    Raises:
        ValueError: numbers of heads do not fit.
    """

    paper = "MoH: Multi-Head Attention as Mixture-of-Head Attention (arXiv 2410.11842)"
    cost = "4*N*C**2 + 2*N**2*C + N*C*(num_heads + 2)"
    examples = (
        {"dim": 32, "num_heads": 4, "shared_head": 2, "routed_head": 1, "qk_norm": True},
        {"dim": 32, "num_heads": 4, "shared_head": 0, "routed_head": 2, "is_causal": True},
    )


class LinearNorm(nn.Sequential):
    """1x1 convolution `c` without bias and batch normalisation `bn`, on channels-last maps.

    In evaluation the two are one linear layer.
    """

    c: nn.Linear
    bn: nn.BatchNorm1d

    def __init__(self, inputs: int, outputs: int, weight: float = 1.0, **factory: Any) -> None:
        super().__init__()
        self.add_module("c", Linear(inputs, outputs, bias=False, **factory))
        self.add_module("bn", nn.BatchNorm1d(outputs, **factory))
        nn.init.constant_(self.bn.weight, weight)

    def forward(self, input: Tensor) -> Tensor:
        norm = self.bn
        several = self.training or norm.running_mean is None or norm.running_var is None
        if several or not plain(self.c) or not plain(norm, nn.BatchNorm1d):
            return norm(self.c(input).flatten(0, -2)).unflatten(0, input.shape[:-1])
        factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * factor
        return linear(input, self.c.weight * factor[:, None], bias)


class SingleHeadAttention(Mixer, name="single_head"):
    """Single-head attention on a part of the channels, the mixer of SHViT.

    With x_1 the first `pdim` channels of x, x_2 the others, and q, k of width `qk_dim`:

        q, k, v = qkv(pre_norm(x_1));  out = proj(ReLU([attention(q, k, v), x_2]))

    `pre_norm` is a group normalisation with one group; `qkv` and `proj` are 1x1 convolutions with
    batch normalisation. Parameters are named as in timm and the official code. Cost for N tokens:
    N (pdim (2 qk_dim + pdim) + C^2) + N^2 (qk_dim + pdim) multiply-adds.

    Args:
        dim: number of channels C.
        qk_dim: width of query and key.
        pdim: channels that take part; 3 / 14 of `dim`, as in the paper, if None.
        zero_init_last: start the last normalisation at weight 0, for a residual branch.

    Raises:
        ValueError: a width is impossible.
    """

    paper = "SHViT: Single-Head Vision Transformer (arXiv 2401.16456)"
    operator = "attention"
    cost = "N*(pdim*(2*qk_dim + pdim) + C**2) + N**2*(qk_dim + pdim)"
    examples = (
        {"dim": 32, "pdim": 12, "zero_init_last": False},
        {"dim": 56, "qk_dim": 8, "zero_init_last": False},
        {"dim": 24, "pdim": 24, "zero_init_last": False},
    )

    def __init__(
        self,
        dim: int,
        *,
        qk_dim: int = 16,
        pdim: int | None = None,
        zero_init_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        pdim = max(1, 3 * dim // 14) if pdim is None else pdim
        if not 1 <= pdim <= dim:
            raise ValueError(f"SingleHeadAttention: pdim={pdim} must be between 1 and dim={dim}")
        if qk_dim < 1:
            raise ValueError(f"SingleHeadAttention: qk_dim={qk_dim} must be at least 1")
        factory = {"device": device, "dtype": dtype}
        self.widths = (qk_dim, qk_dim, pdim)
        self.pre_norm = nn.GroupNorm(1, pdim, **factory)
        self.qkv = LinearNorm(pdim, 2 * qk_dim + pdim, **factory)
        last = LinearNorm(dim, dim, 0.0 if zero_init_last else 1.0, **factory)
        self.proj = nn.Sequential(nn.ReLU(), last)

    def mix(self, x: Tensor) -> Tensor:
        pdim = self.widths[-1]
        part, rest = x.split((pdim, self.dim - pdim), -1)
        # One group: every image is normalised as a whole, whatever the order of its dimensions.
        norm = self.pre_norm
        if plain(norm, nn.GroupNorm):
            part = F.layer_norm(part, part.shape[1:], eps=norm.eps) * norm.weight + norm.bias
        else:
            part = norm(part.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        query, key, value = self.qkv(part).unsqueeze(-2).split(self.widths, -1)
        output = attention(query, key, value).squeeze(-2)
        return self.proj(torch.cat([output, rest], -1))

    def extra_repr(self) -> str:
        return f"qk_dim={self.widths[0]}, pdim={self.widths[-1]}"
