"""Mixers of aggregated attention: TransNeXt's, and its mixture-of-head form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.aggregated import NAME, aggregated_attention
from vitarium.ops.mixer import Mixer
from vitarium.ops.mixture_of_head import HeadRouter
from vitarium.ops.position import Size, continuous_position_bias, kept, pooled_range
from vitarium.ops.projection import Linear

TEMPERATURE = 1 / 0.24  # that training starts with
# Numerator and denominator of a quotient that is log(1 + x), highest power first.
_LOGARITHM = (
    (0.02589979117907922, 0.3808837741388408, 1.4800006335765065, 2.1126775430730532, 1.0, 0.0),
    (0.005875095403124574, 0.15464763749839067, 0.986494295851896, 2.453006071784736,
     2.612677543073109, 1.0),
)  # fmt: skip
_LOG2 = 0.693147182464599609375  # in float32


def _logarithm(x: Tensor) -> Tensor:
    """Natural logarithm in float32 of numbers >= 1, with the rounding of the official code.

    That takes it by NumPy, which rounds a few (7, 37, 47) to the other neighbour of the truth.
    """
    if dispatch.plain_aten() or x.device.type == "mps":  # no frexp in ONNX, no float64 there
        return x.float().log()
    mantissa, exponent = torch.frexp(x.double())
    small = mantissa <= math.sqrt(0.5)
    mantissa = torch.where(small, 2 * mantissa, mantissa) - 1
    polynomials = mantissa.new_zeros(2, *mantissa.shape)
    for pair in zip(*_LOGARITHM):
        coefficients = mantissa.new_tensor(pair).float().double()
        fused = polynomials * mantissa + coefficients.view(-1, *[1] * mantissa.dim())
        polynomials = fused.float().double()
    quotient = (polynomials[0] / polynomials[1]).float()
    return ((exponent - small.int()).double() * _LOG2 + quotient).float()


@kept
def _length_scale(size: Size, pooled: int, window_size: int, device: torch.device) -> Tensor:
    """Logarithm of the number of keys that a token sees, `(H, W, 1, 1)`, float32."""
    seen = []
    for length in size:
        place = torch.arange(length, device=device)
        reach = window_size // 2
        before, after = place.clamp(max=reach), (length - 1 - place).clamp(max=reach)
        seen.append(before + after + 1)
    return _logarithm(seen[0][:, None] * seen[1] + pooled)[:, :, None, None]


@kept
def _averages(length: int, pooled: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Matrix `(pooled, length)` of adaptive average pooling along one axis."""
    start, stop = (bound[:, None] for bound in pooled_range(length, pooled, device))
    place = torch.arange(length, device=device)
    inside = (place >= start) & (place < stop)
    return inside.to(dtype) / (stop - start).to(dtype)


def _pool(x: Tensor, size: Size) -> Tensor:
    """Adaptive average pooling of `(B, H, W, C)`.

    As matrix products, whose gradient is faster, and on CUDA the same in every run; and ONNX pools
    to fixed sizes only.
    """
    rows, columns = (
        _averages(length, pooled, x.device, x.dtype) for length, pooled in zip(x.shape[1:3], size)
    )
    return columns @ (rows @ x.flatten(2)).unflatten(2, x.shape[2:])


class AggregatedAttention(Mixer, name="aggregated"):
    """Aggregated attention with its projections, as in TransNeXt.

    With `x` the map, `P = LayerNorm(pool(GELU(sr(x))))` its pooled form and unit queries and keys,

        q = query(x) / |query(x)|,  k = key(x) / |key(x)|,  k_P = key(P) / |key(P)|
        score = (q + query_embedding) softplus(temperature) log(number of keys seen)
        out = proj(aggregated_attention(score, k, value(x), k_P, value(P)))

    with a learned bias of the window, the continuous position bias of `vitarium.ops.position` for
    pooled keys, and window weights `q learnable_tokens + learnable_bias`.

    The map is pooled to `(H // sr_ratio, W // sr_ratio)`, at least (1, 1). With `fixed_pool_size`
    it is pooled to that size at any resolution (the paper's linear inference mode). Cost for N
    tokens and M pooled ones: (4 N + 2 M) C^2 for the projections and `sr`, and 2 N C (M + 1.5
    window_size^2) of the attention with its window weights, in multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads; divides `dim`.
        window_size: side of the window, odd.
        qkv_bias: biases of the query, key and value projections.
        sr_ratio: how many times smaller the pooled map is.
        fixed_pool_size: size of the pooled map, an int or (H, W), in place of `sr_ratio`; at most
            the map's.
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
    operator = NAME
    no_weight_decay: Sequence[str] = (
        "query_embedding",
        "relative_pos_bias_local",
        "temperature",
        "cpb_fc1.weight",
        "cpb_fc1.bias",
        "cpb_fc2.weight",
        "cpb_fc2.bias",
    )
    cost = (
        "(4*N + 2*N/sr_ratio**2)*C**2 + 2*N*C*(N/sr_ratio**2 + 1.5*window_size**2) "
        "+ 512*(num_heads + 2)*(2*H - sr_ratio)*(2*W - sr_ratio)"
    )
    examples = (
        {"dim": 24, "num_heads": 2, "sr_ratio": 2},
        {"dim": 32, "num_heads": 4, "window_size": 5, "sr_ratio": 4, "pretrain_size": (14, 14)},
        {"dim": 24, "num_heads": 3, "fixed_pool_size": 2, "qkv_bias": False},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        window_size: int = 3,
        qkv_bias: bool = True,
        sr_ratio: int = 1,
        fixed_pool_size: int | Size | None = None,
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
        if window_size < 1 or window_size % 2 == 0:
            raise ValueError(f"{owner}: window_size={window_size} is not allowed; odd sizes are")
        if sr_ratio < 1:
            raise ValueError(f"{owner}: sr_ratio={sr_ratio} must be at least 1")

        def pair(name: str, size: int | Size | None) -> Size | None:
            return None if size is None else dispatch.per_dimension(owner, name, size, 2)

        self.num_heads = num_heads
        self.window_size = window_size
        self.sr_ratio = sr_ratio
        self.fixed_pool_size = pair("fixed_pool_size", fixed_pool_size)
        input_size = pair("input_resolution", input_resolution)
        self.pretrain_size = pair("pretrain_size", pretrain_size) or input_size
        if input_size is None and not is_extrapolation:
            raise ValueError(f"{owner}: is_extrapolation=False needs input_resolution")
        self.bias_size = None if is_extrapolation else input_size
        head_dim, window = dim // num_heads, window_size**2
        factory = {"device": device, "dtype": dtype}
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **factory))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, head_dim, **factory))
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, window, **factory))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, head_dim, window, **factory))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, 1, window, **factory))
        self.q = Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.sr = Linear(dim, dim, **factory)
        self.norm = nn.LayerNorm(dim, **factory)
        self.cpb_fc1 = nn.Linear(2, 512, **factory)
        self.cpb_fc2 = nn.Linear(512, num_heads, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bare parameters anew; the layers have their own `reset_parameters`."""
        nn.init.constant_(self.temperature, math.log(math.expm1(TEMPERATURE)))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        nn.init.trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)
        nn.init.normal_(self.sr.weight, std=math.sqrt(2 / self.dim))  # a convolution's, by fan-out
        nn.init.zeros_(self.sr.bias)

    def _pooled_size(self, height: int, width: int) -> Size:
        if self.fixed_pool_size is not None:
            rows, columns = self.fixed_pool_size
            return min(rows, height), min(columns, width)
        return max(1, height // self.sr_ratio), max(1, width // self.sr_ratio)

    def _key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unit keys, and values, `(..., num_heads, head_dim)`."""
        key, value = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        return F.normalize(key, dim=-1), value

    def _window_weights(self, query: Tensor) -> Tensor:
        """Products with the learnable tokens, `(B, H, W, num_heads, window_size^2)`.

        Tokens of the map come last in memory: products with so few columns as places are slow.
        """
        by_head = query.flatten(0, 2).permute(1, 2, 0)
        weights = self.learnable_tokens.mT @ by_head + self.learnable_bias.mT
        return weights.unflatten(-1, query.shape[:3]).permute(2, 3, 4, 0, 1)

    def _heads(self, x: Tensor) -> Tensor:
        """The outputs of all heads, `(B, H, W, num_heads, head_dim)`."""
        height, width = x.shape[1:3]
        pooled_size = self._pooled_size(height, width)
        query = F.normalize(self.q(x).unflatten(-1, (self.num_heads, -1)), dim=-1)
        window_weights = self._window_weights(query)
        length_scale = _length_scale(
            (height, width), pooled_size[0] * pooled_size[1], self.window_size, x.device
        )
        factor = F.softplus(self.temperature).squeeze(-1) * length_scale.to(query.dtype)
        query = (query + self.query_embedding.squeeze(1)) * factor
        key, value = self._key_value(x)
        pooled = _pool(F.gelu(self.sr(x)), pooled_size).flatten(1, 2)
        pooled_key, pooled_value = self._key_value(self.norm(pooled))
        dtype = value.dtype
        return aggregated_attention(
            query.to(dtype),
            key.to(dtype),
            value,
            pooled_key.to(dtype),
            pooled_value,
            self.window_size,
            bias=self.relative_pos_bias_local,
            pooled_bias=continuous_position_bias(
                self.cpb_fc1,
                self.cpb_fc2,
                (height, width),
                pooled_size,
                self.pretrain_size,
                of=self.bias_size and (self.bias_size, self._pooled_size(*self.bias_size)),
            ),
            window_weights=window_weights.to(dtype),
            scale=1.0,
        )

    def mix(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(self._heads(x).flatten(-2)))

    def _weights(self, call: dispatch.Call, wanted: Tensor) -> Tensor:
        """The window's weights, and the pooled keys' spread over what was pooled."""
        query, key, value, pooled_key, pooled_value, *rest = call.args
        pooled_size = self._pooled_size(*wanted.shape[-2:])
        with torch.enable_grad():
            value, pooled_value, positions = (
                torch.ones_like(x).requires_grad_()
                for x in (value[..., :1], pooled_value[..., :1], value[..., 0])
            )
            run = call.implementations["reference"].run
            output = run(query, key, value, pooled_key, pooled_value, *rest)
            pooled = _pool(positions, pooled_size)
        wanted = wanted.movedim(1, -1)[..., None].expand_as(output)
        near, far = torch.autograd.grad(output, (value, pooled_value), wanted)
        (spread,) = torch.autograd.grad(pooled, positions, far[..., 0].view(pooled.shape))
        return (near[..., 0] + spread).movedim(-1, 1)

    def extra_repr(self) -> str:
        """What the parameters' shapes do not say."""
        pool = f"sr_ratio={self.sr_ratio}"
        if self.fixed_pool_size is not None:
            pool = f"fixed_pool_size={self.fixed_pool_size}"
        return f"num_heads={self.num_heads}, window_size={self.window_size}, {pool}"


class AggregatedMixtureOfHeadAttention(AggregatedAttention, name="aggregated_mixture_of_head"):
    """Aggregated attention whose heads a router weighs for every token, as in MoH's TransNeXt.

        gate, _ = router(x);  out = proj(gate_h aggregated_attention_h(...) for every head h)

    The output of each head is multiplied with the weight that `HeadRouter` gives it. Cost is that
    of `AggregatedAttention` and N C (num_heads + 2) of the router. Heads that a
    token does not use are computed all the same: a window's places are taken for all tokens at
    once, which leaves nothing to skip one by one.

    Args:
        dim, num_heads: as in `AggregatedAttention`, and so are all further arguments.
        shared_head: heads that every token uses.
        routed_head: heads that a token chooses of the others; 0 if all are shared.

    Attributes:
        balance_loss: that of the router, after a forward in training.

    Raises:
        ValueError: the numbers of heads do not fit; and as `AggregatedAttention`.
    """

    paper = "MoH: Multi-Head Attention as Mixture-of-Head Attention (arXiv 2410.11842), TransNeXt"
    routed = True
    official_names: ClassVar[Mapping[str, str | None]] = {r"(wg(?:_[01])?\.weight)": r"router.\1"}
    cost = (
        "(4*N + 2*N/sr_ratio**2)*C**2 + 2*N*C*(N/sr_ratio**2 + 1.5*window_size**2) "
        "+ N*C*(num_heads + 2) + 512*(num_heads + 2)*(2*H - sr_ratio)*(2*W - sr_ratio)"
    )
    examples = (
        {"dim": 24, "num_heads": 4, "sr_ratio": 2, "shared_head": 1, "routed_head": 2},
        {"dim": 24, "num_heads": 3, "sr_ratio": 2, "shared_head": 3},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        shared_head: int = 0,
        routed_head: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads=num_heads, **factory, **kwargs)
        self.router = HeadRouter(dim, num_heads, shared_head, routed_head, **factory)

    @property
    def balance_loss(self) -> Tensor | None:
        return self.router.balance_loss

    def _heads(self, x: Tensor) -> Tensor:
        gate, _ = self.router(x)
        return super()._heads(x) * gate[..., None]

    @torch.no_grad()
    def attention_map(self, x: Tensor, query: tuple[int, int]) -> Tensor:
        weights = super().attention_map(x, query)
        gate, _ = self.router(x)
        return weights * gate[:, query[0], query[1], :, None, None]
