"""Token-aware average pooling before any mixer, and attention diversification.

Guo et al., "Robustifying Token Attention for Vision Transformers" (arXiv 2303.11126, sections 3.1
and 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.mixer import Mixer, MixerSpec, build_mixer

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class TokenAwarePooling(Mixer, name="tap"):
    """Token-aware average pooling in front of another mixer.

    Every token is first averaged with its neighbors, at scales that the token chooses:

        scales = softmax(dilation_predictor(x) / temperature)
        tokens = sum over i of scales_i pool_i(x),  out = mixer(norm(tokens))

    where pool_0 leaves the map as it is and pool_i averages 3 x 3 tokens that are i apart, zeros
    outside of the map among them. x is the input of the block, not normalised: the normalisation
    that a block has in front of its mixer is inside, after the pooling. Cost for N tokens and K
    scales: N (9 C K + 9 K^2 + 10 C K) multiply-adds, and those of the mixer.

    State dicts of the official blocks load as they are, where the names of what is not here (the
    second half of the block) are left out. `attention_map` follows the mixer's map through the
    pooling.

    Args:
        dim: number of channels C.
        mixer: what mixes the pooled tokens, a name or (name, arguments) as for `build_mixer`.
        num_scales: number K of scales.
        temperature: what the scores of the scales are divided by.
        norm_layer: builds the normalisation from a number of channels; a layer normalisation with
            eps 1e-6 unless given, none if None.

    Raises:
        ValueError: `mixer` is unknown, or a number is out of range.
        TypeError: `mixer` or `norm_layer` is none.
    """

    paper = "Robustifying Token Attention for Vision Transformers (arXiv 2303.11126)"
    official_names: ClassVar[Mapping[str, str | None]] = {
        r"norm1\.(\w+)": r"norm.\1",
        r"attn\.(.*)": r"mixer.\1",
    }
    cost = "4*N*C**2 + 2*N**2*C + 9*N*num_scales*(C + num_scales) + 9*N*C*(num_scales - 1)"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"dim": 32, "mixer": ("attention", {"num_heads": 2})},
        {"dim": 24, "mixer": ("window", {"num_heads": 2, "window_size": 4}), "num_scales": 3,
         "temperature": 0.5, "norm_layer": None},
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        *,
        mixer: MixerSpec = "attention",
        num_scales: int = 4,
        temperature: float = 1.0,
        norm_layer: Callable[..., nn.Module] | None = LAYER_NORM,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        if num_scales < 1:
            raise ValueError(f"TokenAwarePooling: num_scales={num_scales} must be at least 1")
        if not temperature > 0:
            raise ValueError(f"TokenAwarePooling: temperature={temperature} must be positive")
        if norm_layer is not None and not callable(norm_layer):
            raise TypeError(
                f"TokenAwarePooling: norm_layer={norm_layer!r} must be callable or None"
            )
        factory = {"device": device, "dtype": dtype}
        self.num_scales = num_scales
        self.temperature = temperature
        self.dilation_predictor = ScalePredictor(dim, num_scales, **factory)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(dim, **factory)
        self.mixer = build_mixer(mixer, dim, **factory)

    def mix(self, x: Tensor) -> Tensor:
        return self.mixer(self.norm(pool_scales(x, self.scales(x))))

    def scales(self, x: Tensor) -> Tensor:
        """The share of each scale at every token, `(B, H, W, num_scales)`."""
        return (self.dilation_predictor(x) / self.temperature).softmax(-1)

    def _attention_map(self, x: Tensor, row: int, column: int) -> Tensor:
        scales = self.scales(x)
        tokens = self.norm(pool_scales(x, scales))
        weights = self.mixer.attention_map(tokens, (row, column)).movedim(1, -1)
        with torch.enable_grad():  # pooling is linear, and the same for all heads
            positions = torch.zeros_like(weights).requires_grad_()
            pooled = pool_scales(positions, scales.to(weights.dtype))
        (found,) = torch.autograd.grad(pooled, positions, weights)
        return found.movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"num_scales={self.num_scales}, temperature={self.temperature}"


def pool_scales(x: Tensor, scales: Tensor) -> Tensor:
    """A map averaged around every token, at the scales that the token chooses.

    Args:
        x: `(B, H, W, C)`.
        scales: the share of each scale, `(B, H, W, num_scales)`.

    Returns:
        `(B, H, W, C)`.
    """
    channels = x.shape[-1]
    kernel = x.new_full((channels, 1, 3, 3), 1 / 9)
    tokens = x * scales[..., :1]
    for i in range(1, scales.shape[-1]):
        pooled = F.conv2d(
            x.permute(0, 3, 1, 2), kernel, padding=i, dilation=i, groups=channels
        ).permute(0, 2, 3, 1)
        tokens = torch.addcmul(tokens, pooled, scales[..., i, None])
    return tokens


class ScalePredictor(nn.Module):
    """Scores of scales at every token: a 3 x 3 convolution, batch normalisation, another one.

    Args:
        dim: number of channels.
        num_scales: number of scores.
    """

    def __init__(self, dim: int, num_scales: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(dim, num_scales, 3, padding=1, bias=False, **factory),
            nn.BatchNorm2d(num_scales, **factory),
            nn.Conv2d(num_scales, num_scales, 3, padding=1, bias=False, **factory),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores `(B, H, W, num_scales)` of a map `(B, H, W, C)`."""
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def attention_diversification_loss(
    attention_maps: Sequence[Tensor], threshold: float = 2.0
) -> Tensor:
    """How alike the tokens of each layer attend: a loss that makes them attend apart.

    For every layer with N keys, A the mean of its map over heads and m the mean of A over queries,
    both without what does not exceed `threshold / N`, the loss is the cosine of m and each row of
    A, averaged over rows, images and layers. Where nothing of m is left it is 0. As in the official
    code, 1e-6 is added to the number of layers; unlike there, a batch of one image is no exception.

    Args:
        attention_maps: of each layer, `(B, num_heads, queries, keys)`, such as
            `with_attention_maps` returns.
        threshold: in units of the mean weight of a key.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: there is no map, or one is not of this shape, or `threshold` is negative.
    """
    if not attention_maps:
        raise ValueError("attention_diversification_loss: attention_maps is empty")
    if not threshold >= 0:
        raise ValueError(
            f"attention_diversification_loss: threshold={threshold} must be at least 0"
        )
    losses = []
    for weights in attention_maps:
        if weights.dim() != 4:
            raise ValueError(
                "attention_diversification_loss: a map of attention_maps has shape "
                f"{tuple(weights.shape)}; allowed is (B, num_heads, queries, keys)"
            )
        rows = weights.mean(1)
        mean = rows.mean(1, keepdim=True)
        least = threshold / weights.shape[-1]
        rows, mean = (part.where(part > least, 0) for part in (rows, mean))
        losses.append(F.cosine_similarity(mean, rows, dim=-1).mean())
    return torch.stack(losses).sum() / (len(losses) + 1e-6)


def with_attention_maps(module: nn.Module, *inputs: Any) -> tuple[Any, list[Tensor]]:
    """What a module makes of its inputs, and the attention maps of all operator calls in it.

    A map is the operator's definition applied to one-hot values, so that it may be differentiated,
    for `attention_diversification_loss`; it is computed beside the forward, and takes memory for
    all pairs of query and key. The module must not be compiled.

    Args:
        module: of which every operator attends, with query, key and value as its first arguments.
        inputs: its arguments.

    Returns:
        `module(*inputs)`, and in order of the calls maps `(B, num_heads, queries, keys)`.
    """
    with dispatch.recording() as calls:
        output = module(*inputs)
    return output, [attention_matrix(call) for call in calls]


def attention_matrix(call: dispatch.Call) -> Tensor:
    """The map `(B, num_heads, queries, keys)` of a recorded call; see `with_attention_maps`."""
    query, key, value, *rest = call.args
    spatial = value.shape[1:-2]
    one_hot = torch.eye(spatial.numel(), dtype=value.dtype, device=value.device)
    one_hot = one_hot.view(*spatial, 1, -1).expand(*value.shape[:-1], -1)
    output = call.implementations["reference"].run(query, key, one_hot, *rest)
    return output.flatten(1, -3).transpose(1, 2)
