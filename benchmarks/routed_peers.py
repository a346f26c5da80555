"""Mixers that route tokens as their papers' codes write them, with the weights of ours."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.benchmarks.indexed import masked_attention
from vitarium.benchmarks.mixers import Build, Contest
from vitarium.ops import Mixer

Function = Callable[[Mixer, Tensor], Tensor]


class _Written(nn.Module):
    """What a function makes of a mixer's weights and a map."""

    def __init__(self, mixer: Mixer, function: Function) -> None:
        super().__init__()
        self.mixer = mixer
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.mixer, x)


def _written(function: Function) -> Build:
    return lambda mixer, size: _Written(mixer, function)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """`(B, heads, N, channels)` of `(B, N, C)`."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _sparsifiner(mixer: Mixer, x: Tensor) -> Tensor:
    """Masks of all pairs, after which all scores are computed."""
    predictor, heads = mixer.mask_predictor, mixer.num_heads
    q, k, v = (_heads(part, heads) for part in mixer.qkv(x.flatten(1, 2)).chunk(3, -1))
    with torch.no_grad():
        reduced = predictor.proj_c_k(k).transpose(-2, -1) @ predictor.proj_n
        coefficients = (predictor.proj_c_q(q) @ reduced * predictor.scale).softmax(-1)
        scores = coefficients @ F.threshold(predictor.proj_back_n.T.abs(), 0.0, 0.0)
        budget = math.ceil(mixer.attn_keep_rate * scores.shape[-1])
        index = torch.topk(scores, budget, sorted=False)[1]
    output = masked_attention(q, k, v, index).transpose(1, 2).reshape(x.shape)
    return mixer.proj(output)


def _token_aggregation(mixer: Mixer, x: Tensor) -> Tensor:
    """Projections gathered, windows of keys unfolded, centres met group by group; a stable sort."""
    tokens, heads = x.flatten(1, 2), mixer.num_heads
    batch, count, _ = tokens.shape
    means = mixer.means
    if not mixer.initted:
        runs = len(means) - count % len(means)
        padded = torch.cat([tokens, tokens[:, count - runs :].flip(1)], 1)
        means = padded.unflatten(1, (len(means), -1)).transpose(0, 1).flatten(1, 2).mean(1)
    units = F.normalize(tokens, dim=-1)
    index = (units @ F.normalize(means, dim=-1).T).argmax(-1)
    order = index.argsort(dim=-1, stable=True)[..., None]
    q, k, v = (
        projected.gather(1, order.expand_as(projected))
        for projected in (mixer.to_q(tokens), mixer.to_k(tokens), mixer.to_v(tokens))
    )
    size = min(count, mixer.group_size)
    groups = -(-count // size)
    rest = groups * size - count
    q = torch.cat([q, q[:, count - rest :].flip(1)], 1).unflatten(1, (groups, size))
    k, v = (
        torch.cat([y, y[:, count - rest - size :].flip(1)], 1).unfold(1, 2 * size, size).mT
        for y in (k, v)
    )
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(2, 3) for y in (q, k, v))
    local = F.scaled_dot_product_attention(q, k, v)
    centre = (
        layer(means).unflatten(-1, (heads, -1)).transpose(0, 1).expand(batch, groups, -1, -1, -1)
        for layer in (mixer.centre_to_k, mixer.centre_to_v)
    )
    output = local + F.scaled_dot_product_attention(q, *centre)
    output = output.transpose(2, 3).flatten(1, 2).flatten(-2)[:, :count]
    output = output.scatter(1, order.expand_as(output), output)
    return mixer.conv1x1(mixer.proj(output)).view(x.shape)


def _kmeans_routing(mixer: Mixer, x: Tensor) -> Tensor:
    """Clusters gathered, eager attention, and a mean whose counts are as wide as the values."""
    tokens, heads = x.flatten(1, 2), mixer.num_heads
    q, k, v = (_heads(layer(tokens), heads) for layer in (mixer.to_q, mixer.to_k, mixer.to_v))
    count, clusters = q.shape[2], mixer.num_clusters
    both = F.normalize(torch.cat([q, k], 2), dim=-1)
    distances = torch.einsum("bhld,hcd->bhlc", both, mixer.router.means)
    window = -(-count // clusters)
    indices = [
        part.topk(window, dim=-2)[1].transpose(-2, -1).flatten(2)[..., None]
        for part in distances.split(count, 2)
    ]
    indices = [index.expand(-1, -1, -1, q.shape[-1]) for index in indices]
    gathered = (
        y.gather(2, index).unflatten(2, (clusters, window))
        for y, index in zip((q, k, v), (indices[0], indices[1], indices[1]))
    )
    q, k, v = gathered
    weights = (torch.einsum("bhnid,bhnjd->bhnij", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    output = torch.einsum("bhcij,bhcjd->bhcid", weights, v).flatten(2, 3)
    zeros = output.new_zeros(*output.shape[:2], count, output.shape[-1])
    total = zeros.scatter_add(2, indices[0], output)
    times = zeros.scatter_add(2, indices[0], torch.ones_like(output))
    output = (total / (times + 1e-5)).transpose(1, 2).flatten(2)
    return mixer.to_out(output).view(x.shape)


def _grouped(mixer: Mixer, x: Tensor) -> Tensor:
    """A group of query heads after the other."""
    tokens = x.flatten(1, 2)
    q = _heads(mixer.q(tokens), mixer.num_heads) * (x.shape[-1] // mixer.num_heads) ** -0.5
    k, v = (_heads(layer(tokens), mixer.num_kv_heads) for layer in (mixer.k, mixer.v))
    group = mixer.num_heads // mixer.num_kv_heads
    outputs = [
        (part @ key.transpose(-2, -1)).softmax(-1) @ value
        for part, key, value in zip(q.split(group, 1), k.split(1, 1), v.split(1, 1))
    ]
    return mixer.proj(torch.cat(outputs, 1).transpose(1, 2).reshape(x.shape))


def _gaussians(mixer: Mixer, x: Tensor) -> Tensor:
    """A Gaussian after the other, of a head after the other, along the channels."""
    outputs = []
    for part, offsets, widths in zip(x.chunk(mixer.num_heads, -1), mixer.mean_offsets, mixer.c):
        mean = part.mean(-1, keepdim=True)
        variance = part.var(-1, keepdim=True) + 1e-8
        product = torch.ones_like(part)
        for offset, width in zip(offsets, widths):
            normed = (part - mean - offset) / variance.sqrt()
            height = torch.sqrt(2 * math.pi * width**2)
            product = product * torch.exp(-(normed**2 / (2.0 * width**2))) / height
        outputs.append(part * product / product.sum(-1, keepdim=True).clamp(min=1e-8))
    return torch.cat(outputs, -1)


CONTESTS: list[Contest] = [
    Contest("14x14 C 384 keeps a quarter", "sparsifiner", 384, (14, 14), {"num_heads": 6},
            {"written": _written(_sparsifiner)}),
    Contest("28x28 C 192 keeps a 64th", "sparsifiner", 192, (28, 28),
            {"num_heads": 6, "input_resolution": 28, "attn_keep_rate": 1 / 64,
             "reduce_n_factor": 32},
            {"written": _written(_sparsifiner)}),
    *(
        Contest(f"{side}x{side} C 40 groups of 128", "token_aggregation", 40, (side, side),
                {"num_heads": 4, "qk_dim": 36, "num_tokens": 32},
                {"written": _written(_token_aggregation)})
        for side in (28, 64)
    ),
    *(
        Contest(f"{side}x{side} C {dim} clusters {count}", "kmeans_routing", dim, (side, side),
                {"num_heads": dim // 32, "num_clusters": count},
                {"written": _written(_kmeans_routing)})
        for side, dim, count in ((14, 256, 4), (56, 64, 64))
    ),
    Contest("14x14 C 384 heads 6, 3", "grouped_query", 384, (14, 14), {"num_heads": 6},
            {"written": _written(_grouped)}),
    Contest("28x28 C 192 of channels", "gaussian_adaptive", 192, (28, 28),
            {"num_heads": 4, "num_gaussians": 4}, {"written": _written(_gaussians)}),
]  # fmt: skip
