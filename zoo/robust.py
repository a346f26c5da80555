"""Token-aware average pooling and attention diversification for models that attend.

Guo et al., "Robustifying Token Attention for Vision Transformers" (arXiv 2303.11126, ICCV 2023).
The paper has both in RVT and FAN, networks whose attention is of every token to every other; here
they can be switched on for any network of such blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitarium.ops import TokenAwarePooling, attention_diversification_loss
from vitarium.ops.mixer import Mixer
from vitarium.ops.tap import ScalePredictor, pool_scales
from vitarium.zoo.deit import DeiT
from vitarium.zoo.parts import Block
from vitarium.zoo.pyramid import Pyramid, init_module

ROBUST = ("token_aware_pooling", "attention_diversification")
_ATTENTIVE = ("attention", "position_aware", "neighborhood", "global", "window", "grid", "tap")
# The loss compares tokens with their mean: where they attend to different windows there is none.
_DENSE = ("attention", "position_aware")


def make_robust(
    model: nn.Module,
    *,
    token_aware_pooling: bool | int = False,
    attention_diversification: bool | float = False,
) -> nn.Module:
    """Switch on either technique, in place; returns the model.

    Args:
        model: its blocks have `norm1` before `mixer` (ours) or `attn` (timm's).
        token_aware_pooling: average tokens before every attention over neighbourhoods that they
            choose, of so many scales; True for 4, as in the paper.
        attention_diversification: train every attention with the loss that makes tokens attend
            apart, with this threshold in units of the mean weight; True for 2, as in the official
            code. The training loop adds it, times `auxiliary_loss`, which is 1 in the paper.

    Raises:
        ValueError: an argument is out of range, or the model defines no such thing.
    """
    scales = _number("token_aware_pooling", token_aware_pooling, 4, least=2)
    threshold = _number("attention_diversification", attention_diversification, 2.0, least=0)
    if scales is not None and scales != int(scales):
        raise ValueError(f"token_aware_pooling={token_aware_pooling!r} must be a whole number")
    if threshold is not None:
        for block in _blocks(model, "attention_diversification", _DENSE):
            _diversify(block, threshold)
    if scales is not None:
        for block in _blocks(model, "token_aware_pooling", _ATTENTIVE):
            _pool(model, block, int(scales))
    return model


def _number(name: str, value: Any, default: float, least: float) -> float | None:
    if value is False or value is None:
        return None
    if value is True:
        return default
    if not isinstance(value, (int, float)) or not least <= value < float("inf"):
        raise ValueError(f"{name}={value!r} must be true, false or a number of at least {least}")
    return value


def _blocks(model: nn.Module, technique: str, mixers: Sequence[str]) -> list[Any]:
    """The blocks of a model, all of whose mixers are of these."""
    plain = isinstance(model, VisionTransformer) and not isinstance(model, DeiT)
    blocks: list[Any] = []
    if plain:
        blocks = list(model.blocks)
    elif isinstance(model, Pyramid):
        blocks = [block for stage in model.stages for block in stage.blocks]
    if blocks and all(_attention(block, mixers) is not None for block in blocks):
        return blocks
    raise ValueError(
        f"{technique} is defined for timm's VisionTransformer (vit_*, deit_*) and for pyramids "
        f"whose mixers are {' or '.join(mixers)}, such as testbed_position_aware_*; not for this "
        f"{type(model).__name__}"
    )


def _attention(block: Any, mixers: Sequence[str]) -> nn.Module | None:
    """The attention of a block, if it is of the kinds that are served."""
    mixer = getattr(block, "mixer", None)
    if isinstance(mixer, Mixer):
        inner = mixer.mixer if isinstance(mixer, TokenAwarePooling) else mixer
        return inner if inner.name in mixers and isinstance(block, Block) else None
    attention = getattr(block, "attn", None)
    served = hasattr(attention, "fused_attn") and isinstance(attention.attn_drop, nn.Dropout)
    return attention if served and hasattr(block, "norm1") else None


# --- attention diversification -----------------------------------------------------------------


class DiversifiedDropout(nn.Dropout):
    """Dropout of attention weights, which asks to be trained with their diversification loss.

    Args:
        p: rate of dropout.
        threshold: of `vitarium.ops.attention_diversification_loss`.
    """

    auxiliary_loss: Tensor | None = None

    def __init__(self, p: float, threshold: float) -> None:
        super().__init__(p)
        self.threshold = threshold

    def forward(self, input: Tensor) -> Tensor:
        """Weights `(B, num_heads, queries, keys)`, and such."""
        if self.training:
            self.auxiliary_loss = attention_diversification_loss([input.float()], self.threshold)
        return super().forward(input)

    def __getstate__(self) -> dict[str, Any]:
        """Without the loss of the last step, whose graph can neither be copied nor stored."""
        return {**self.__dict__, "auxiliary_loss": None}


def _diversify(block: Any, threshold: float) -> None:
    attention: Any = _attention(block, _DENSE)
    if isinstance(attention, Mixer):
        attention.attention_diversification = threshold
    else:
        attention.fused_attn = False  # only then timm has the weights
        attention.attn_drop = DiversifiedDropout(attention.attn_drop.p, threshold)


# --- token-aware pooling -----------------------------------------------------------------------


class PooledNorm(nn.Module):
    """A block's first norm, of tokens that are averaged over neighbourhoods which they choose.

    Args:
        norm: the norm.
        dim: channels.
        num_scales: the token itself, and means over 3 x 3 tokens 1, 2, ... apart.
        prefix: number of tokens in front of a sequence that are no part of a map.
    """

    def __init__(self, norm: nn.Module, dim: int, num_scales: int, prefix: int) -> None:
        super().__init__()
        self.norm = norm
        self.prefix = prefix
        self.dilation_predictor = ScalePredictor(dim, num_scales)

    def forward(self, x: Tensor) -> Tensor:
        """A map `(B, H, W, C)`, or a sequence `(B, prefix + H * H, C)` of a square one."""
        if x.dim() == 4:
            return self.norm(self._pooled(x))
        prefix, tokens = x.split((self.prefix, x.shape[1] - self.prefix), 1)
        side = round(tokens.shape[1] ** 0.5)
        if side * side != tokens.shape[1]:
            raise ValueError(
                f"token_aware_pooling: {tokens.shape[1]} tokens are no square map; images must be "
                "square"
            )
        pooled = self._pooled(tokens.unflatten(1, (side, side))).flatten(1, 2)
        return self.norm(torch.cat([prefix, pooled], 1))

    def _pooled(self, x: Tensor) -> Tensor:
        return pool_scales(x, self.dilation_predictor(x).softmax(-1))


def _pool(model: Any, block: Any, num_scales: int) -> None:
    if isinstance(getattr(block, "mixer", None), TokenAwarePooling):
        raise ValueError("token_aware_pooling: this model's mixers have it already (tap)")
    weight = next(block.norm1.parameters())
    pooled = PooledNorm(
        block.norm1, len(weight), num_scales, getattr(model, "num_prefix_tokens", 0)
    )
    pooled.dilation_predictor.apply(init_module)
    block.norm1 = pooled.to(device=weight.device, dtype=weight.dtype)
