"""Linear attention in plain PyTorch: two passes over tokens in chunks that stay in cache.

What queries need of keys and values, the state, are S = sum_j phi(k_j) v_j^T, z = sum_j phi(k_j)
and u = sum_j v_j. The backward keeps it, computes features again, and sums the state's gradient
over queries before it goes over keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops.linear_features import HALF, SLOPE, Focus

CHUNK = 1 << 16  # elements of a chunk of tokens: what is done with it finds it in cache

Chunk = tuple[slice, slice]  # of images, of tokens


def state_shape(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """Of the saved state: S, z and u in a row; none in float64, where it is computed again."""
    if query.dtype == torch.float64:
        return (0,)
    head_dim, value_dim = key.shape[-1], value.shape[-1]
    return (key.shape[0], key.shape[-2], head_dim * value_dim + head_dim + value_dim)


class State:
    """S `(B * heads, head_dim, value_dim)`, z and u `(B * heads, 1, width)` in one tensor.

    Args:
        flat: `(B, heads, head_dim * value_dim + head_dim + value_dim)`.
    """

    def __init__(self, flat: Tensor, head_dim: int, value_dim: int) -> None:
        self.flat = flat
        rows = flat.flatten(0, 1)
        product, z, u = rows.split([head_dim * value_dim, head_dim, value_dim], -1)
        self.product = product.unflatten(-1, (head_dim, value_dim))
        self.z, self.u = z[:, None], u[:, None]


def _chunks(x: Tensor, whole: bool) -> Iterator[Chunk]:
    """Chunks of `(B, N, heads, channels)`: some tokens of one image, or several images.

    Args:
        whole: not to cut images.
    """
    images, tokens = x.shape[:2]
    width = x.shape[2] * x.shape[3]
    if tokens * width > CHUNK:
        length = tokens if whole else max(16, CHUNK // width)
        for image in range(images):
            for token in range(0, tokens, length):
                yield slice(image, image + 1), slice(token, min(token + length, tokens))
        return
    count = CHUNK // (tokens * width)
    for image in range(0, images, count):
        yield slice(image, min(image + count, images)), slice(0, tokens)


def _heads(x: Tensor) -> Tensor:
    """`(images, T, heads, channels)` as `(images * heads, T, channels)`."""
    return x.transpose(1, 2).flatten(0, 1)


def _back(rows: Tensor, target: Tensor) -> None:
    """Writes `(images * heads, T, channels)` to `(images, T, heads, channels)`."""
    target.transpose(1, 2).copy_(rows.unflatten(0, (target.shape[0], target.shape[2])))


class _Map:
    """A feature map on chunks, and its derivative.

    Features of half precision are in float32 where the map needs it, and in the backward.

    Attributes:
        dtype: of features, and of the products that they go into.
    """

    def __init__(
        self,
        name: str,
        focusing_factor: float,
        temperature: Tensor | None,
        dtype: torch.dtype,
        training: bool = False,
    ) -> None:
        self.name, self.factor = name, focusing_factor
        wide = dtype in HALF and (training or name in ("elu", "focused"))
        self.dtype = torch.float32 if wide else dtype
        self.temperature = None if temperature is None else temperature.to(self.dtype)
        self.grad_temperature: Tensor | None = None
        self._focus: Focus | None = None
        self._features: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Features `(images * heads, T, channels)` of a chunk `(images, T, heads, channels)`."""
        x = x.to(self.dtype)
        if self.name == "identity":
            return _heads(x)
        if self.name == "relu":
            found = F.relu(x)
        elif self.name == "leaky_relu":
            found = F.leaky_relu(x, SLOPE)
        elif self.name == "elu":
            found = F.elu(x).add_(1)
        else:
            self._focus = Focus(x, self.factor, self.temperature)
            found = self._focus.power * self._focus.ratio
        self._features = found
        return _heads(found)

    def backward(self, x: Tensor, rows: Tensor, target: Tensor) -> None:
        """Writes the gradient of the last chunk to `target`, from that of its features."""
        if self.name == "identity":
            return _back(rows, target)
        grad = rows.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        found = self._features
        assert found is not None
        if self.name == "focused":
            assert self._focus is not None
            grad, total = self._focus.backward(x, grad.contiguous())
            if total is not None:
                if self.grad_temperature is not None:
                    total += self.grad_temperature
                self.grad_temperature = total
            target.copy_(grad)
        elif self.name == "elu":
            target.copy_(grad.mul_(found.clamp_(max=1)))
        elif self.name == "relu":
            target.copy_(torch.ops.aten.threshold_backward(grad, found, 0))
        else:
            target.copy_(torch.ops.aten.leaky_relu_backward(grad, found, SLOPE, True))


def _tokens(*maps: Tensor) -> list[Tensor]:
    """`(B, N, heads, channels)` of maps."""
    return [x.flatten(1, -3) for x in maps]


def _state(key: Tensor, value: Tensor, map_: _Map, normalization: str) -> State:
    """The state; z and u are zero where the normalisation has no use for them."""
    head_dim, value_dim = key.shape[-1], value.shape[-1]
    dtype = torch.float32 if key.dtype in HALF else key.dtype
    shape = (key.shape[0], key.shape[2], head_dim * value_dim + head_dim + value_dim)
    state = State(key.new_zeros(shape, dtype=dtype), head_dim, value_dim)
    heads = key.shape[2]
    for images, tokens in _chunks(key, map_.name == "identity"):
        rows = slice(images.start * heads, images.stop * heads)
        k = map_(key[images, tokens])
        v = _heads(value[images, tokens]).to(map_.dtype)
        found = [k.mT @ v]
        if normalization != "none":
            found.append(k.sum(1, keepdim=True, dtype=dtype))
        if normalization == "injective":
            found.append(v.sum(1, keepdim=True, dtype=dtype))
        for total, part in zip((state.product, state.z, state.u), found):
            if tokens.start == 0:
                total[rows] = part
            else:
                total[rows] += part
    return state


def _group(x: Tensor, heads: int, group: int) -> Tensor:
    """Rows of key heads as rows of query heads."""
    if group == 1:
        return x
    return x.unflatten(0, (-1, heads)).repeat_interleave(group, 1).flatten(0, 1)


class _Reader:
    """How a normalisation reads a state: out = q `matrix`, over q `total` + eps, or plus `mean`."""

    def __init__(
        self,
        state: State,
        query: Tensor,
        key: Tensor,
        dtype: torch.dtype,
        normalization: str,
        scale: float,
    ) -> None:
        self.normalization = normalization
        self.count = key.shape[1]
        self.share = scale if normalization == "none" else scale / self.count
        heads, group = key.shape[2], query.shape[2] // key.shape[2]
        self.total = self.mean = None
        matrix = state.product * self.share
        if normalization == "injective":
            mean = state.u / self.count
            matrix.baddbmm_(state.z.mT, mean, alpha=-self.share)
            self.mean = _group(mean.to(dtype), heads, group)
        elif normalization == "sum":
            self.total = _group((state.z * self.share).to(dtype), heads, group)
        self.matrix = _group(matrix.to(dtype), heads, group)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: Tensor | None,
    feature_map: str,
    normalization: str,
    focusing_factor: float,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Output and state, see `state_shape`."""
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    saved = state_shape(query, key, value)
    q, k, v, out = _tokens(query, key, value, output)
    map_ = _Map(feature_map, focusing_factor, temperature, query.dtype)
    state = _state(k, v, map_, normalization)
    reader = _Reader(state, q, k, map_.dtype, normalization, scale)
    for images, tokens in _chunks(q, feature_map == "identity"):
        rows = slice(images.start * q.shape[2], images.stop * q.shape[2])
        phi = map_(q[images, tokens])
        found = phi @ reader.matrix[rows]
        if reader.total is not None:
            found.div_((phi @ reader.total[rows].mT).add_(eps))
        elif reader.mean is not None:
            found.add_(reader.mean[rows])
        _back(found, out[images, tokens])
    return output, state.flat if len(saved) > 1 else query.new_empty(saved, dtype=torch.float32)


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: Tensor | None,
    output: Tensor,
    saved: Tensor,
    feature_map: str,
    normalization: str,
    focusing_factor: float,
    scale: float,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value and temperature."""
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    q, k, v, out, grad_out = _tokens(query, key, value, output, grad_output)
    grad_q, grad_k, grad_v = _tokens(grad_query, grad_key, grad_value)
    map_ = _Map(feature_map, focusing_factor, temperature, query.dtype, training=True)
    if saved.dim() == 3:
        state = State(saved, k.shape[-1], v.shape[-1])
    else:
        state = _state(k, v, map_, normalization)
    reader = _Reader(state, q, k, map_.dtype, normalization, scale)
    heads, key_heads = q.shape[2], k.shape[2]
    gradient = State(
        state.flat.new_zeros((k.shape[0], heads, state.flat.shape[-1])), k.shape[-1], v.shape[-1]
    )
    for images, tokens in _chunks(q, False):
        rows = slice(images.start * heads, images.stop * heads)
        x, grad = q[images, tokens], _heads(grad_out[images, tokens]).to(map_.dtype)
        phi = map_(x)
        if reader.total is None:
            grad_phi = grad @ reader.matrix[rows].mT
            if reader.mean is not None:
                gradient.u[rows] += grad.sum(1, keepdim=True, dtype=gradient.u.dtype)
        else:
            weight = (phi @ reader.total[rows].mT).add_(eps)
            grad = grad / weight
            inner = (grad * _heads(out[images, tokens])).sum(-1, keepdim=True).neg_()
            grad_phi = grad @ reader.matrix[rows].mT
            grad_phi.addcmul_(inner, reader.total[rows])
            gradient.z[rows] += inner.mT @ phi
        gradient.product[rows] += phi.mT @ grad
        map_.backward(x, grad_phi, grad_q[images, tokens])

    # From the gradient of what queries read to that of the state.
    if heads != key_heads:
        folded = gradient.flat.unflatten(1, (key_heads, -1)).sum(2)
        gradient = State(folded, k.shape[-1], v.shape[-1])
    gradient.product.mul_(reader.share)
    grad_z = grad_u = None
    if normalization == "sum":
        grad_z = gradient.z.mul_(reader.share).to(map_.dtype)
    elif normalization == "injective":
        count = reader.count
        grad_z = (state.u @ gradient.product.mT).div_(-count).to(map_.dtype)
        grad_u = (gradient.u - state.z @ gradient.product).div_(count).to(map_.dtype)
    matrix = gradient.product.to(map_.dtype)
    for images, tokens in _chunks(k, False):
        rows = slice(images.start * key_heads, images.stop * key_heads)
        x, values = k[images, tokens], _heads(v[images, tokens]).to(map_.dtype)
        phi = map_(x)
        grad_phi, found = values @ matrix[rows].mT, phi @ matrix[rows]
        if grad_z is not None:
            grad_phi.add_(grad_z[rows])
        if grad_u is not None:
            found.add_(grad_u[rows])
        map_.backward(x, grad_phi, grad_k[images, tokens])
        _back(found, grad_v[images, tokens])
    grad_temperature = None
    if temperature is not None and needs[3]:
        total = map_.grad_temperature
        grad_temperature = torch.zeros_like(temperature) if total is None else total
        grad_temperature = grad_temperature.to(temperature.dtype)
    return grad_query, grad_key, grad_value, grad_temperature
