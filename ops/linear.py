"""Linear attention: keys and values are summed first, so that cost grows with tokens, not pairs.

Katharopoulos et al., "Transformers are RNNs" (arXiv 2006.16236). With features phi, the weight of
key j for query i before normalisation is s_ij = scale phi(q_i) phi(k_j), and over N keys

    output_i = sum_j w_ij v_j
    "sum":        w_ij = s_ij / N / (mean_j s_ij + eps)
    "injective":  w_ij = (1 + s_ij - mean_j s_ij) / N, InLine attention, Han et al. (2412.06590)
    "none":       w_ij = s_ij

No pair is ever looked at: all that queries need of keys and values is the state S = sum_j phi(k_j)
v_j^T, z = sum_j phi(k_j) and u = sum_j v_j. Cost: 2 N head_dim value_dim multiply-adds a head, in
one pass over keys and values and one over queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitarium.ops import dispatch
from vitarium.ops import linear_portable as portable
from vitarium.ops.differentiable import Differentiable
from vitarium.ops.dispatch import Case, Implementation, Operator
from vitarium.ops.linear_features import FEATURE_MAPS, features

NAME = "linear_attention"
NORMALIZATIONS = ("sum", "injective", "none")

FeatureMap = str | Callable[[Tensor], Tensor]


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMap = "elu",
    normalization: str = "sum",
    focusing_factor: float = 3.0,
    temperature: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query to all keys, by features, in time that grows with their number.

    Args:
        query: `(B, *spatial, num_heads, head_dim)`, any strides.
        key: `(B, *spatial_kv, num_heads_kv, head_dim)`; num_heads_kv divides num_heads, and query
            head h reads key and value head `h // (num_heads // num_heads_kv)`.
        value: `(B, *spatial_kv, num_heads_kv, value_dim)`.
        feature_map: one of `linear_features.FEATURE_MAPS`, "elu" (elu(x) + 1), "relu",
            "leaky_relu", "identity" and "focused", or a function that maps query and key to
            features of any width.
        normalization: "sum" divides the weights of a query by their sum; "injective" subtracts
            their mean and adds one, so that they sum to one and different queries get different
            weights; "none" leaves them.
        focusing_factor: the power of "focused".
        temperature: positive numbers `(num_heads, head_dim)` that "focused" divides by before it
            takes the power; may require a gradient.
        scale: factor on the products of features; `head_dim ** -0.5` if None.
        eps: added to the mean of a query's weights, for "sum".
        backend: "reference", "torch", "triton", or None to choose.

    Returns:
        `(B, *spatial, num_heads, value_dim)`, contiguous, in the dtype of query.

    Raises:
        ValueError: shapes, sizes or devices do not fit, a name is unknown, or the named backend
            cannot run this.
        TypeError: an argument is of the wrong type, or dtypes differ.
    """
    _check(query, key, value)
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"{NAME}: normalization={normalization!r} is unknown; allowed are "
            f"{', '.join(map(repr, NORMALIZATIONS))}"
        )
    focusing_factor = _positive("focusing_factor", focusing_factor)
    scale = dispatch.check_scale(NAME, scale, query)
    eps = _positive("eps", eps, zero=True)
    query, key, value = dispatch.autocast(query, key, value)
    if callable(feature_map):
        query, key = (_own_features(feature_map, x) for x in (query, key))
        feature_map = "identity"
    elif feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"{NAME}: feature_map={feature_map!r} is unknown; allowed are "
            f"{', '.join(map(repr, FEATURE_MAPS))} or a function"
        )
    _check_temperature(temperature, query, key, feature_map)
    args = (
        query, key, value, temperature, feature_map, normalization, focusing_factor, scale, eps
    )  # fmt: skip
    return dispatch.choose(NAME, backend, _IMPLEMENTATIONS, query.device, *args)(*args)


@dispatch.remembered
def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    dispatch.check_tensors(NAME, query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        shape = tuple(tensor.shape)
        if len(shape) < 4:
            raise ValueError(
                f"{NAME}: {name} has shape {shape}; allowed is (B, *spatial, num_heads, head_dim)"
            )
        if shape[0] != query.shape[0]:
            raise ValueError(
                f"{NAME}: {name} has batch size {shape[0]}, query {query.shape[0]}; they must agree"
            )
        if min(shape[1:]) < 1:
            raise ValueError(f"{NAME}: {name} has shape {shape}; only the batch may be empty")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"{NAME}: key has head_dim {key.shape[-1]}, query {query.shape[-1]}; they must agree"
        )
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"{NAME}: value has shape {tuple(value.shape)}, key {tuple(key.shape)}; all dimensions "
            "but the last must agree"
        )
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"{NAME}: key has {key.shape[-2]} heads, which do not divide the query's "
            f"{query.shape[-2]}"
        )


def _positive(name: str, value: Any, *, zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{NAME}: {name} must be a number, got {type(value).__name__}")
    if not (value >= 0 if zero else value > 0) or value == math.inf:
        least = "at least 0" if zero else "positive"
        raise ValueError(f"{NAME}: {name}={value} must be {least} and finite")
    return float(value)


def _own_features(feature_map: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    mapped = feature_map(x)
    if not isinstance(mapped, Tensor) or mapped.shape[:-1] != x.shape[:-1]:
        found = tuple(mapped.shape) if isinstance(mapped, Tensor) else type(mapped).__name__
        raise ValueError(
            f"{NAME}: feature_map returned {found}; allowed is (*{tuple(x.shape[:-1])}, width)"
        )
    return mapped.to(x.dtype)


def _check_temperature(temperature: Any, query: Tensor, key: Tensor, feature_map: str) -> None:
    if temperature is None:
        return
    if not isinstance(temperature, Tensor):
        kind = type(temperature).__name__
        raise TypeError(f"{NAME}: temperature must be a tensor or None, got {kind}")
    if feature_map != "focused":
        raise ValueError(f"{NAME}: temperature is of feature_map='focused', not of {feature_map!r}")
    if tuple(temperature.shape) != tuple(key.shape[-2:]) or key.shape[-2] != query.shape[-2]:
        raise ValueError(
            f"{NAME}: temperature has shape {tuple(temperature.shape)}; allowed is (num_heads, "
            f"head_dim) = {tuple(query.shape[-2:])}, with as many heads of keys"
        )
    if not temperature.is_floating_point():
        raise TypeError(f"{NAME}: temperature must be floating-point, got {temperature.dtype}")
    if temperature.device != query.device:
        raise ValueError(f"{NAME}: temperature is on {temperature.device}, query on {query.device}")


# --- the definition ------------------------------------------------------------------------------


def _feature_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: Tensor | None,
    feature_map: str,
    focusing_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of queries and keys, and values, `(B, num_heads, tokens, channels)`."""
    group = query.shape[-2] // key.shape[-2]
    query, key = (features(x, feature_map, focusing_factor, temperature) for x in (query, key))
    key, value = (x.repeat_interleave(group, -2) if group > 1 else x for x in (key, value))
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value))
    return q, k, v


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: Tensor | None,
    feature_map: str,
    normalization: str,
    focusing_factor: float,
    scale: float,
    eps: float,
) -> Tensor:
    """All pairs, as the equations say."""
    q, k, v = _feature_heads(query, key, value, temperature, feature_map, focusing_factor)
    count = k.shape[-2]
    weights = q @ k.transpose(-1, -2) * scale
    mean = weights.mean(-1, keepdim=True)
    if normalization == "sum":
        weights = weights / (mean + eps) / count
    elif normalization == "injective":
        weights = (1 + weights - mean) / count
    output = (weights @ v).transpose(1, 2)
    return output.reshape(*query.shape[:-1], value.shape[-1]).contiguous()


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: Tensor | None,
    feature_map: str,
    normalization: str,
    focusing_factor: float,
    scale: float,
    eps: float,
) -> Tensor:
    """The sums first, in operations that every exporter and transform knows."""
    q, k, v = _feature_heads(query, key, value, temperature, feature_map, focusing_factor)
    count = k.shape[-2]
    share = scale if normalization == "none" else scale / count
    state = k.transpose(-1, -2) @ (v * share)
    if normalization == "none":
        output = q @ state
    else:
        total = k.sum(-2, keepdim=True) * share
        if normalization == "sum":
            output = q @ state / (q @ total.transpose(-1, -2) + eps)
        else:
            mean = v.mean(-2, keepdim=True)
            output = q @ (state - total.transpose(-1, -2) @ mean) + mean
    output = output.transpose(1, 2)
    return output.reshape(*query.shape[:-1], value.shape[-1]).contiguous()


# --- the custom operator -------------------------------------------------------------------------


def _triton_refuses(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> str | None:
    return dispatch.triton_refuses(query, key, value)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *call, fused = args
    if fused:
        from vitarium.ops.kernels import linear as kernels

        return kernels.forward(*call)
    return portable.forward(*call)


def _backward(grad: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    *call, fused, needs = args
    if fused:
        from vitarium.ops.kernels import linear as kernels

        return kernels.backward(grad, *call, needs)
    return portable.backward(grad, *call, needs)


def _saved_shape(query, key, value, *_) -> tuple[int, ...]:
    return portable.state_shape(query, key, value)


def _flops(query, key, value, *_) -> int:
    """Two products: of keys and values, and of queries and the state."""
    products = math.prod(key[:-1]) + math.prod(query[:-1])
    return 2 * products * query[-1] * value[-1]


def _backward_flops(query, key, value, *_) -> int:
    """Two products for every one of the forward."""
    return 2 * _flops(query, key, value)


_OPERATION = Differentiable(
    NAME,
    tensors="Tensor query, Tensor key, Tensor value, Tensor? temperature",
    arguments="str feature_map, str normalization, float focusing_factor, float scale, float eps",
    forward=_forward,
    backward=_backward,
    output_shape=lambda query, key, value, *_: (*query.shape[:-1], value.shape[-1]),
    saved_shape=_saved_shape,
    flops=_flops,
    backward_flops=_backward_flops,
)


def _few(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether pairs cost less than the state, as they do for fewer tokens than channels."""
    queries, keys = (math.prod(x.shape[1:-2]) for x in (query, key))
    head_dim, value_dim = key.shape[-1], value.shape[-1]
    return queries * keys * (head_dim + value_dim) < (queries + keys) * head_dim * value_dim


def _portable(*args: Any) -> Tensor:
    return _reference(*args) if _few(*args[:3]) else _FORMS["torch"].run(*args)


_FORMS = _OPERATION.implementations(reference=_reference, plain=_plain, refuses=_triton_refuses)
_IMPLEMENTATIONS = {**_FORMS, "torch": Implementation(_portable)}


# --- test cases ----------------------------------------------------------------------------------


def _case(
    note: str,
    spatial: tuple[int, ...],
    *,
    spatial_kv: tuple[int, ...] | None = None,
    batch: int = 2,
    heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (8, 8),
    temperature: bool = False,
    **kwargs: Any,
) -> Case:
    """A call with (query, key) heads and (query, value) widths."""
    spatial_kv = spatial if spatial_kv is None else spatial_kv
    shapes: dict[str, tuple[int, ...]] = {
        "query": (batch, *spatial, heads[0], dims[0]),
        "key": (batch, *spatial_kv, heads[1], dims[0]),
        "value": (batch, *spatial_kv, heads[1], dims[1]),
    }
    values = {}
    if temperature:
        shapes["temperature"] = (heads[0], dims[0])
        values["temperature"] = _temperature
    return Case(note, shapes, kwargs, values)


def _temperature(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return 0.5 + torch.rand(shape, generator=generator)


CASES = (
    _case("elu", (3, 5)),
    _case("relu, grouped heads", (3, 6), heads=(4, 2), feature_map="relu", eps=0.1),
    _case(
        "injective, unequal widths",
        (17,),
        spatial_kv=(3, 5),
        dims=(12, 20),
        feature_map="identity",
        normalization="injective",
    ),
    _case("not normalised", (4, 5), batch=1, feature_map="leaky_relu", normalization="none"),
    _case("focused", (3, 5), feature_map="focused", temperature=True, scale=1.0),
    _case("one token", (1, 1), normalization="none", feature_map="focused", focusing_factor=4),
    _case("no images", (2, 2), batch=0, feature_map="relu"),
)

LAUNCHES = [
    _case(
        f"{normalization}, head_dim {dim}",
        (64, 64),
        dims=(dim, dim),
        feature_map="elu",
        normalization=normalization,
    )
    for dim, normalization in ((32, "injective"), (64, "sum"), (256, "sum"))
]

OPERATOR = Operator(
    NAME, linear_attention, _IMPLEMENTATIONS, CASES, _OPERATION, LAUNCHES, context="any size"
)
