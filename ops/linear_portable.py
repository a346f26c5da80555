"""Linear attention in plain PyTorch: two passes over tokens in chunks that stay in cache.

What queries need of keys and values, the state, are S = sum_j phi(k_j) v_j^T, z = sum_j phi(k_j)
and u = sum_j v_j. The backward keeps it, computes features again, and sums the state's gradient
over queries before it goes over keys. Features of a chunk lie as its tokens do, all heads side by
side, and matrix products put a head after the other: what is done with either wants its own order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vitarium.ops.linear_features import HALF, SLOPE, SMALLEST, Focus, row_sums
from vitarium.ops.workspace import Workspace

CHUNK = 1 << 19  # elements of a chunk of tokens: what is done with it finds it in cache
SMALL = 1 << 18  # elements of an image below which several make a chunk

Chunk = tuple[slice, slice]  # of images, of tokens


def state_shape(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """Of the saved state: S, z and u in a row; none in float64, where it is computed again."""
    if query.dtype == torch.float64:
        return (0,)
    head_dim, value_dim = key.shape[-1], value.shape[-1]
    return (key.shape[0], key.shape[-2], head_dim * value_dim + head_dim + value_dim)


class State:
    """S `(rows, head_dim, value_dim)`, z and u `(rows, 1, width)`: a row is a head of an image."""

    def __init__(self, product: Tensor, z: Tensor, u: Tensor) -> None:
        self.product, self.z, self.u = product, z, u

    @classmethod
    def zeros(cls, like: Tensor, dtype: torch.dtype, rows: int, *widths: int) -> State:
        """Of `rows` heads whose features and values have these widths."""
        shapes = (widths, (1, widths[0]), (1, widths[1]))
        return cls(*(like.new_zeros((rows, *shape), dtype=dtype) for shape in shapes))

    @classmethod
    def unpacked(cls, flat: Tensor, head_dim: int, value_dim: int) -> State:
        """What `packed` returned."""
        parts = flat.flatten(0, 1).split([head_dim * value_dim, head_dim, value_dim], -1)
        product, z, u = (part.contiguous() for part in parts)
        return cls(product.unflatten(-1, (head_dim, value_dim)), z[:, None], u[:, None])

    def packed(self, images: int) -> Tensor:
        """`(images, heads, head_dim * value_dim + head_dim + value_dim)`."""
        parts = (self.product.flatten(1), self.z.flatten(1), self.u.flatten(1))
        return torch.cat(parts, -1).unflatten(0, (images, -1))

    def add(self, rows: slice, features: Tensor, values: Tensor) -> None:
        """Adds products of features and values `(rows, tokens, width)` to S."""
        if features.dtype == self.product.dtype:
            self.product[rows].baddbmm_(features.mT, values)
        else:
            self.product[rows] += features.mT @ values


def _chunks(x: Tensor) -> Iterator[Chunk]:
    """Chunks of `(B, N, heads, channels)`: some tokens of one image, or several images."""
    images, tokens = x.shape[:2]
    width = x.shape[2] * x.shape[3]
    if x.device.type != "cpu":  # whose caches are no matter, but calls are
        if images:
            yield slice(0, images), slice(0, tokens)
    elif tokens * width > SMALL:
        length = _length(x, CHUNK)
        for image in range(images):
            for token in range(0, tokens, length):
                yield slice(image, image + 1), slice(token, min(token + length, tokens))
    else:
        count = CHUNK // (tokens * width)
        for image in range(0, images, count):
            yield slice(image, min(image + count, images)), slice(0, tokens)


def _length(x: Tensor, elements: int) -> int:
    """Tokens of an image in a chunk of about so many elements; all are nearly as long."""
    tokens, width = x.shape[1], x.shape[2] * x.shape[3]
    return -(-tokens // -(-tokens * width // elements))


class _Chunks:
    """Chunks of tokens as matrices, one for a head of an image, and what maps make of them.

    Features of half precision are in float32 where the map needs it, and in the backward.

    Attributes:
        dtype: of features, and of the products that they go into.
        focus: what the last chunk's focused features were made of.
    """

    def __init__(
        self,
        feature_map: str,
        focusing_factor: float,
        temperature: Tensor | None,
        like: Tensor,
        training: bool,
    ) -> None:
        self.map, self.factor, self.training = feature_map, focusing_factor, training
        wide = like.dtype in HALF and (training or feature_map in ("elu", "focused"))
        self.dtype = torch.float32 if wide else like.dtype
        self.workspace = Workspace(like)
        self.temperature = temperature
        if temperature is not None:
            self.coldness = temperature.detach().to(self.dtype).flatten().reciprocal()
            self.smallest = SMALLEST * self.coldness
        self.grad_temperature: Tensor | None = None
        self.focus: Focus | None = None
        self._features: Tensor | None = None

    def take(self, name: str, *shape: int) -> Tensor:
        """A buffer, see `Workspace.take`."""
        return self.workspace.take(f"linear {name}", shape, self.dtype)

    def rows(self, name: str, x: Tensor) -> Tensor:
        """Tokens `(images, T, heads, channels)` as `(images * heads, T, channels)`."""
        # In order, which is faster than to read head by head what is not in the cache.
        x = x.transpose(1, 2)
        return self.take(name, *x.shape).copy_(x).flatten(0, 1)

    def features(self, x: Tensor, scaled: bool = True) -> Tensor:
        """Features `(images * heads, T, channels)` of tokens `(images, T, heads, channels)`.

        Unless `scaled`, focused ones lack the factor `focus.ratio`.
        """
        if self.map == "identity":
            return self.rows("features", x)
        found = self.take("features", *x.shape)
        source = x if x.dtype == found.dtype else found.copy_(x)
        if self.map in ("relu", "focused"):
            torch.clamp(source, min=0, out=found)
        elif self.map == "leaky_relu":
            torch.ops.aten.leaky_relu.out(source, SLOPE, out=found)
        else:
            torch.ops.aten.elu.out(source, out=found).add_(1)
        if self.map == "focused":
            tokens = found.view(x.shape[0] * x.shape[1], -1)
            if self.temperature is None:
                tokens.add_(SMALLEST)
            else:
                torch.addcmul(self.smallest, tokens, self.coldness, out=tokens)
            power, scratch = (self.take(name, *tokens.shape) for name in ("power", "scratch"))
            focus = self.focus = Focus(tokens, self.factor, power, scratch)
            found = power.view(x.shape)
            if scaled:
                power = torch.mul(power, focus.ratio, out=scratch if self.training else power)
                found = power.view(x.shape)
        self._features = found
        return found[0].transpose(0, 1) if len(found) == 1 else self.rows("heads", found)

    def backward(self, x: Tensor, grad: Tensor, target: Tensor, scaled: bool = True) -> None:
        """Writes the gradient of the last tokens to `target`.

        Args:
            x: what `features` got.
            grad: of the features, or of those that it returned, times `focus.ratio`.
            target: as x.
            scaled: as `features` got it.
        """
        if self.map == "identity":
            _place(grad, target)
            return
        found = self._features
        assert found is not None
        grad = _place(grad, self.take("grad of tokens", *x.shape))
        if self.map == "focused":
            assert self.focus is not None
            found, tokens = x, grad.view(self.focus.positive.shape)
            self.focus.backward(tokens, scaled)
            if self.temperature is not None:
                product = torch.mul(tokens, self.focus.positive, out=self.focus.scratch)
                total = product.sum(0).mul_(-self.coldness)
                if self.grad_temperature is not None:
                    total += self.grad_temperature
                self.grad_temperature = total
                tokens.mul_(self.coldness)
        if self.map == "elu":
            torch.mul(grad, found.clamp_(max=1), out=target)
        elif self.map == "leaky_relu":
            target.copy_(torch.ops.aten.leaky_relu_backward(grad, found, SLOPE, True))
        elif target.dtype == grad.dtype:
            torch.ops.aten.threshold_backward.grad_input(grad, found, 0, grad_input=target)
        else:
            target.copy_(torch.ops.aten.threshold_backward(grad, found.to(grad.dtype), 0))


def _place(rows: Tensor, target: Tensor) -> Tensor:
    """Copies `(images * heads, T, channels)` to `(images, T, heads, channels)`."""
    return target.copy_(rows.unflatten(0, (len(target), -1)).transpose(1, 2))


def _tokens(*maps: Tensor) -> list[Tensor]:
    """`(B, N, heads, channels)` of maps."""
    return [x.flatten(1, -3) for x in maps]


def _state(key: Tensor, value: Tensor, chunks: _Chunks, normalization: str) -> State:
    """The state; z and u are zero where the normalisation has no use for them."""
    heads = key.shape[2]
    dtype = torch.float32 if key.dtype in HALF else key.dtype
    widths = (key.shape[-1], value.shape[-1])
    state = State.zeros(key, dtype, key.shape[0] * heads, *widths)
    for images, tokens in _chunks(key):
        rows = slice(images.start * heads, images.stop * heads)
        k = chunks.features(key[images, tokens])
        v = chunks.rows("value", value[images, tokens])
        if normalization != "none":
            state.z[rows] += k.sum(1, keepdim=True, dtype=dtype)
        if normalization == "injective":
            state.u[rows] += v.sum(1, keepdim=True, dtype=dtype)
        state.add(rows, k, v)
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
        eps: float,
    ) -> None:
        self.count, self.eps = key.shape[1], eps
        self.share = scale if normalization == "none" else scale / self.count
        self.heads = query.shape[2]
        heads, group = key.shape[2], self.heads // key.shape[2]
        self.total = self.mean = None
        matrix = state.product * self.share
        if normalization == "injective":
            mean = state.u / self.count
            matrix.baddbmm_(state.z.mT, mean, alpha=-self.share)
            self.mean = _group(mean.to(dtype), heads, group)
        elif normalization == "sum":
            self.total = _group((state.z * self.share).to(dtype), heads, group)
        self.matrix = _group(matrix.to(dtype), heads, group)
        # A factor on all features of a query cancels out, but for eps.
        self.scaled = normalization != "sum"

    def rows(self, images: slice) -> slice:
        """The rows of the heads of images."""
        return slice(images.start * self.heads, images.stop * self.heads)

    def weight(self, rows: slice, features: Tensor, focus: Focus | None) -> Tensor:
        """The mean weights of queries plus eps, `(rows, tokens, 1)`, over `focus.ratio`."""
        assert self.total is not None
        weight = features @ self.total[rows].mT
        if focus is None:
            return weight.add_(self.eps)
        ratio = focus.ratio.view(-1, 1, weight.shape[1], 1)
        return weight.unflatten(0, (len(ratio), -1)).add_(self.eps / ratio).flatten(0, 1)


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
    q, k, v, out = _tokens(query, key, value, output)
    chunks = _Chunks(feature_map, focusing_factor, temperature, query, False)
    state = _state(k, v, chunks, normalization)
    reader = _Reader(state, q, k, chunks.dtype, normalization, scale, eps)
    for images, tokens in _chunks(q):
        rows, target = reader.rows(images), out[images, tokens]
        phi = chunks.features(q[images, tokens], reader.scaled)
        found = chunks.take("found", *phi.shape[:2], v.shape[-1])
        torch.bmm(phi, reader.matrix[rows], out=found)
        if reader.total is not None:
            found.div_(reader.weight(rows, phi, chunks.focus))
        elif reader.mean is not None:
            found.add_(reader.mean[rows])
        _place(found, target)
    chunks.workspace.close()
    saved = state_shape(query, key, value)
    if len(saved) == 1:
        return output, query.new_empty(saved, dtype=torch.float32)
    return output, state.packed(len(k)) if len(k) else query.new_empty(saved, dtype=torch.float32)


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
    widths = (k.shape[-1], v.shape[-1])
    chunks = _Chunks(feature_map, focusing_factor, temperature, query, True)
    if saved.dim() == 3:
        state = State.unpacked(saved, *widths)
    else:
        state = _state(k, v, chunks, normalization)
    reader = _Reader(state, q, k, chunks.dtype, normalization, scale, eps)
    gradient = State.zeros(k, state.z.dtype, len(q) * reader.heads, *widths)
    for images, tokens in _chunks(q):
        rows, x = reader.rows(images), q[images, tokens]
        phi = chunks.features(x, reader.scaled)
        grad = chunks.rows("grad", grad_out[images, tokens])
        grad_phi = chunks.take("grad features", *phi.shape)
        if reader.total is None:
            torch.bmm(grad, reader.matrix[rows].mT, out=grad_phi)
            if reader.mean is not None:
                gradient.u[rows] += grad.sum(1, keepdim=True)
        else:
            weight = reader.weight(rows, phi, chunks.focus)
            grad = torch.div(grad, weight, out=chunks.take("divided", *grad.shape))
            torch.bmm(grad, reader.matrix[rows].mT, out=grad_phi)
            result = out[images, tokens].transpose(1, 2)
            product = chunks.take("product", *result.shape)
            torch.mul(grad.view(result.shape), result, out=product)
            inner = row_sums(product).flatten(0, 1).neg_()
            grad_phi.addcmul_(inner, reader.total[rows])
            gradient.z[rows] += inner.mT @ phi
        gradient.add(rows, phi, grad)
        chunks.backward(x, grad_phi, grad_q[images, tokens], reader.scaled)

    gradient = _of_state(gradient, state, reader, normalization, k.shape[2])
    matrix = gradient.product
    for images, tokens in _chunks(k):
        rows = slice(images.start * k.shape[2], images.stop * k.shape[2])
        x, target = k[images, tokens], grad_v[images, tokens]
        phi = chunks.features(x)
        values = chunks.rows("value", v[images, tokens])
        found = chunks.take("found", *values.shape)
        torch.bmm(phi, matrix[rows], out=found)
        if normalization == "injective":
            found.add_(gradient.u[rows])
        _place(found, target)
        grad_phi = chunks.take("grad features", *phi.shape)
        torch.bmm(values, matrix[rows].mT, out=grad_phi)
        if normalization != "none":
            grad_phi.add_(gradient.z[rows])
        chunks.backward(x, grad_phi, grad_k[images, tokens])
    chunks.workspace.close()
    grad_temperature = None
    if temperature is not None and needs[3]:
        total = chunks.grad_temperature
        total = temperature.new_zeros(temperature.numel()) if total is None else total
        grad_temperature = total.view(temperature.shape).to(temperature.dtype)
    return grad_query, grad_key, grad_value, grad_temperature


def _of_state(
    gradient: State, state: State, reader: _Reader, normalization: str, heads: int
) -> State:
    """The gradient of S, z and u of key heads, from that of what heads of queries read."""
    product, z, u = gradient.product, gradient.z, gradient.u
    group = reader.heads // heads
    if group > 1:
        product, z, u = (
            x.unflatten(0, (-1, heads, group)).sum(2).flatten(0, 1) for x in (product, z, u)
        )
    product = product * reader.share
    if normalization == "sum":
        z = z * reader.share
    elif normalization == "injective":
        z = (state.u @ product.mT) / -reader.count
        u = (u - state.z @ product) / reader.count
    return State(product, z, u)
