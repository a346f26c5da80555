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
from vitarium.ops.workspace import LOG2E, Workspace

CHUNK = 1 << 19  # elements of a chunk of tokens: what is done with it finds it in cache
SMALL = 1 << 18  # elements of an image below which several make a chunk
LONG = 128  # tokens of a chunk from which on products read heads that lie side by side

Chunk = tuple[slice, slice]  # of images, of tokens


def state_shape(query: Tensor, key: Tensor, value: Tensor) -> tuple[int]:
    """Of the saved state; none in float64, where it is computed again."""
    if query.dtype == torch.float64:
        return (0,)
    head_dim, value_dim = key.shape[-1], value.shape[-1]
    return (key.shape[0] * key.shape[-2] * (head_dim * value_dim + head_dim + value_dim),)


class State:
    """S `(images, heads, head_dim, value_dim)`, z and u `(images, heads, 1, width)`, in a row.

    Args:
        flat: all S, then all z, then all u.
        shape: images, heads, head_dim, value_dim.
    """

    def __init__(self, flat: Tensor, *shape: int) -> None:
        images, heads, head_dim, value_dim = shape
        self.flat = flat
        count = images * heads
        parts = flat.split([count * x for x in (head_dim * value_dim, head_dim, value_dim)])
        self.product = parts[0].view(shape)
        self.z = parts[1].view(images, heads, 1, head_dim)
        self.u = parts[2].view(images, heads, 1, value_dim)

    @classmethod
    def zeros(cls, like: Tensor, dtype: torch.dtype, *shape: int) -> State:
        """Of so many images, heads, and widths of features and values."""
        images, heads, head_dim, value_dim = shape
        count = images * heads * (head_dim * value_dim + head_dim + value_dim)
        return cls(like.new_zeros(count, dtype=dtype), *shape)

    def add(self, images: slice, features: Tensor, values: Tensor) -> None:
        """Adds products of features and values `(images, heads, tokens, width)` to S."""
        product = self.product[images]
        if features.dtype != product.dtype:
            product += features.mT @ values
        elif features.is_contiguous() and values.is_contiguous():
            product.flatten(0, 1).baddbmm_(features.flatten(0, 1).mT, values.flatten(0, 1))
        else:  # heads of several images are not a stride apart
            for total, left, right in zip(product, features, values):
                total.baddbmm_(left.mT, right)


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
    """Chunks of tokens by heads, `(images, heads, T, channels)`, and what maps make of them.

    Products read tokens whose heads lie side by side, unless they are few, which are copied so that
    one call multiplies them all, or read twice, or not in cache. What they write is contiguous:
    products that write heads side by side take longer than a copy. Features of half precision are
    in float32 where the map needs it, and in the backward.

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
        self.reads_views = like.device.type == "cpu" and self.dtype not in HALF
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

    def heads(self, name: str, x: Tensor) -> Tensor:
        """Tokens `(images, T, heads, channels)` by heads, copied."""
        x = x.transpose(1, 2)
        return self.take(name, *x.shape).copy_(x)

    def view(self, name: str, x: Tensor) -> Tensor:
        """The same as a view, if that will do."""
        if self.reads_views and x.dtype == self.dtype and x.shape[1] >= LONG:
            return x.transpose(1, 2)
        return self.heads(name, x)

    def product(self, left: Tensor, right: Tensor, name: str) -> Tensor:
        """`left @ right` by heads, of `(images, heads, T, channels)` and matrices for them."""
        found = self.take(name, *left.shape[:-1], right.shape[-1])
        if left.is_contiguous():
            torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=found.flatten(0, 1))
        else:
            for x, matrix, out in zip(left, right, found):
                torch.bmm(x, matrix, out=out)
        return found

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """Sums of x y over channels, by heads, `(images, heads, T, 1)`."""
        return row_sums(torch.mul(x, y, out=self.take("product", *x.shape)))

    def features(self, x: Tensor, scaled: bool = True, once: bool = False) -> Tensor:
        """Features by heads of tokens `(images, T, heads, channels)`.

        Args:
            scaled: whether focused ones have the factor `focus.ratio`.
            once: whether one product reads them, not several.
        """
        if self.map == "identity":
            return self.view("features", x) if once else self.heads("features", x)
        found = self.take("features", *x.shape)
        source = x if x.dtype == found.dtype else found.copy_(x)
        if self.map in ("relu", "focused"):
            torch.clamp(source, min=0, out=found)
        elif self.map == "leaky_relu":
            torch.ops.aten.leaky_relu.out(source, SLOPE, out=found)
        else:
            # exp(min(x, 0)) + max(x, 0), more precise than elu(x) + 1 and less than half the time.
            positive = torch.clamp(source, min=0, out=self.take("positive", *x.shape))
            torch.clamp(source, max=0, out=found).mul_(LOG2E).exp2_().add_(positive)
        if self.map == "focused":
            tokens = found.view(x.shape[0] * x.shape[1], -1)
            if self.temperature is None:
                tokens.add_(SMALLEST)
            else:
                torch.addcmul(self.smallest, tokens, self.coldness, out=tokens)
            power = self.take("power", *tokens.shape) if self.training else tokens
            focus = self.focus = Focus(tokens, self.factor, power)
            found = power
            if scaled:
                found = self.take("scaled", *tokens.shape) if self.training else tokens
                torch.mul(power, focus.ratio, out=found)
            found = found.view(x.shape)
        self._features = found
        return self.view("heads", found)

    def backward(self, x: Tensor, grad: Tensor, target: Tensor, scaled: bool = True) -> None:
        """Writes the gradient of the last tokens to `target`.

        Args:
            x: what `features` got.
            grad: of the features, or of those that it returned, times `focus.ratio`, by heads.
            target: as x.
            scaled: as `features` got it.
        """
        if self.map == "identity":
            target.copy_(grad.transpose(1, 2))
            return
        found = self._features
        assert found is not None
        grad = self.take("grad of tokens", *x.shape).copy_(grad.transpose(1, 2))
        if self.map == "focused":
            assert self.focus is not None
            found, tokens = x, grad.view(self.focus.positive.shape)
            scratch = self.take("scaled", *tokens.shape)
            self.focus.backward(tokens, scaled, scratch)
            if self.temperature is not None:
                product = torch.mul(tokens, self.focus.positive, out=scratch)
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


def _tokens(*maps: Tensor) -> list[Tensor]:
    """`(B, N, heads, channels)` of maps."""
    return [x.flatten(1, -3) for x in maps]


def _state(key: Tensor, value: Tensor, chunks: _Chunks, normalization: str) -> State:
    """The state; z and u are zero where the normalisation has no use for them."""
    images, _, heads, head_dim = key.shape
    dtype = torch.float32 if key.dtype in HALF else key.dtype
    state = State.zeros(key, dtype, images, heads, head_dim, value.shape[-1])
    for images, tokens in _chunks(key):
        k = chunks.features(key[images, tokens], once=True)
        v = chunks.view("value", value[images, tokens])
        # Sums first: they read in order, and products find it in cache.
        if normalization != "none":
            state.z[images] += k.sum(2, keepdim=True)
        if normalization == "injective":
            state.u[images] += v.sum(2, keepdim=True)
        state.add(images, k, v)
    return state


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
        group = self.heads // key.shape[2]
        self.total = self.mean = None
        matrix = state.product * self.share
        if normalization == "injective":
            mean = state.u / self.count
            matrix.addcmul_(state.z.mT, mean, value=-self.share)
            self.mean = _group(mean.to(dtype), group)
        elif normalization == "sum":
            self.total = _group((state.z * self.share).to(dtype), group)
        self.matrix = _group(matrix.to(dtype), group)
        # A factor on all features of a query cancels out, but for eps.
        self.scaled = normalization != "sum"

    def weight(self, images: slice, features: Tensor, chunks: _Chunks) -> Tensor:
        """The mean weights of queries plus eps, `(images, heads, T, 1)`, over `focus.ratio`."""
        assert self.total is not None
        weight = chunks.inner(features, self.total[images])
        if chunks.focus is None:
            return weight.add_(self.eps)
        return weight.add_(self.eps / chunks.focus.ratio.view(len(weight), 1, -1, 1))


def _group(x: Tensor, group: int) -> Tensor:
    """What queries' heads read, of what keys' heads hold."""
    return x if group == 1 else x.repeat_interleave(group, 1)


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
        phi = chunks.features(q[images, tokens], reader.scaled)
        found = chunks.product(phi, reader.matrix[images], "found").transpose(1, 2)
        target = out[images, tokens]
        if reader.total is not None:
            torch.div(found, reader.weight(images, phi, chunks).transpose(1, 2), out=target)
        elif reader.mean is not None:
            torch.add(found, reader.mean[images].transpose(1, 2), out=target)
        else:
            target.copy_(found)
    chunks.workspace.close()
    return output, state.flat if state_shape(query, key, value)[0] else query.new_empty(0).float()


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
    if state_shape(query, key, value)[0]:
        state = State(saved, len(k), k.shape[2], *widths)
    else:
        state = _state(k, v, chunks, normalization)
    reader = _Reader(state, q, k, chunks.dtype, normalization, scale, eps)
    gradient = State.zeros(k, state.z.dtype, len(q), reader.heads, *widths)
    for images, tokens in _chunks(q):
        x = q[images, tokens]
        phi = chunks.features(x, reader.scaled)
        grad, matrix = chunks.heads("grad", grad_out[images, tokens]), reader.matrix[images].mT
        if reader.total is None:
            grad_phi = chunks.product(grad, matrix, "grad features")
            if reader.mean is not None:
                gradient.u[images] += grad.sum(2, keepdim=True)
        else:
            grad.div_(reader.weight(images, phi, chunks))
            grad_phi = chunks.product(grad, matrix, "grad features")
            inner = chunks.inner(grad, out[images, tokens].transpose(1, 2)).neg_()
            grad_phi.addcmul_(inner, reader.total[images])
            product = torch.mul(phi, inner, out=chunks.take("product", *phi.shape))
            gradient.z[images] += product.sum(2, keepdim=True)
        gradient.add(images, phi, grad)
        chunks.backward(x, grad_phi, grad_q[images, tokens], reader.scaled)

    grad_product, grad_z, grad_u = _of_state(gradient, state, reader, normalization, k.shape[2])
    for images, tokens in _chunks(k):
        x, matrix = k[images, tokens], grad_product[images]
        phi = chunks.features(x)
        values = chunks.view("value", v[images, tokens])
        found = chunks.product(phi, matrix, "found")
        if normalization == "injective":
            found.add_(grad_u[images])
        grad_v[images, tokens] = found.transpose(1, 2)
        grad_phi = chunks.product(values, matrix.mT, "grad features")
        if normalization != "none":
            grad_phi.add_(grad_z[images])
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of S, z and u of key heads, from that of what heads of queries read."""
    product, z, u = gradient.product, gradient.z, gradient.u
    group = reader.heads // heads
    if group > 1:
        product, z, u = (x.unflatten(1, (heads, group)).sum(2) for x in (product, z, u))
    product = product * reader.share
    if normalization == "sum":
        z = z * reader.share
    elif normalization == "injective":
        z = (state.u @ product.mT) / -reader.count
        u = (u - state.z @ product) / reader.count
    return product, z, u
