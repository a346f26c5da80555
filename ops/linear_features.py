"""Feature maps of linear attention, with their derivatives.

A map replaces exp(q k) by phi(q) phi(k), so that keys and values can be summed before a query is
known. Maps work on tokens `(..., heads, channels)`. All but one act on every number by itself:

    elu:         elu(x) + 1, Katharopoulos et al., arXiv 2006.16236
    relu:        max(x, 0)
    leaky_relu:  max(x, x / 100)
    identity:    x
    focused:     |x'| x'^p / |x'^p| with x' = (max(x, 0) + 1e-6) / temperature, Han et al., FLatten
                 Transformer, arXiv 2308.00442; norms are those of a token, all heads together, as
                 in the paper's code
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS = ("elu", "relu", "leaky_relu", "identity", "focused")
SLOPE = 0.01  # of leaky_relu below zero
SMALLEST = 1e-6  # what "focused" adds, so that no norm is zero
HALF = (torch.float16, torch.bfloat16)


def features(
    x: Tensor, feature_map: str, focusing_factor: float, temperature: Tensor | None
) -> Tensor:
    """The features of tokens, in plain operations and in the dtype of x.

    Args:
        x: `(..., heads, channels)`.
        feature_map: one of `FEATURE_MAPS`.
        focusing_factor, temperature: p, and a positive `(heads, channels)` or None, of "focused".
    """
    if feature_map == "elu":
        return F.elu(x) + 1
    if feature_map == "relu":
        return F.relu(x)
    if feature_map == "leaky_relu":
        return F.leaky_relu(x, SLOPE)
    if feature_map == "identity":
        return x
    wide = x.float() if x.dtype in HALF else x  # powers of small numbers are no half ones
    wide = F.relu(wide) + SMALLEST
    if temperature is not None:
        wide = wide / temperature.to(wide.dtype)
    # The power's norm does not matter: one that neither overflows nor vanishes will do.
    power = (wide / wide.detach().amax((-2, -1), keepdim=True)) ** focusing_factor
    ratio = _norm(wide) / _norm(power)
    return (power * ratio).to(x.dtype)


def _norm(x: Tensor) -> Tensor:
    return x.square().sum((-2, -1), keepdim=True).sqrt()


class Focus:
    """Focused features of a chunk of tokens, kept for their derivative.

    Args:
        x: `(..., heads, channels)`, of float32 or float64.
        focusing_factor, temperature: as in `features`.

    Attributes:
        power: x'^p up to a factor that all channels of a token share.
        ratio: what `power` has to be multiplied by, `(..., 1, 1)`.
    """

    def __init__(self, x: Tensor, focusing_factor: float, temperature: Tensor | None) -> None:
        self.factor, self.temperature = focusing_factor, temperature
        self.positive = x.clamp(min=0).add_(SMALLEST)
        if temperature is not None:
            self.positive.div_(temperature)
        square = self.positive.square()
        self.norm = square.sum((-2, -1), keepdim=True).sqrt_()
        if focusing_factor == 3:
            self.power = square.mul_(self.positive)
        elif focusing_factor == 2:
            self.power = square
        else:
            largest = self.positive.amax((-2, -1), keepdim=True)
            self.power = (self.positive / largest).pow_(focusing_factor)
        self.power_norm = torch.linalg.vector_norm(self.power, dim=(-2, -1), keepdim=True)
        self.ratio = self.norm / self.power_norm

    def backward(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of x and of the temperature, from that of `power * ratio`, which is used up."""
        inner = torch.linalg.vecdot(grad.flatten(-2), self.power.flatten(-2))[..., None, None]
        grad.mul_(self.ratio).addcmul_(
            inner * self.ratio / self.power_norm**2, self.power, value=-1
        )
        if self.factor == 3 or self.factor == 2:
            slope = self.positive if self.factor == 2 else self.positive.square()
            grad.mul_(slope).mul_(self.factor)
        else:
            grad.mul_(self.power).div_(self.positive).mul_(self.factor)
        grad.addcmul_(inner / (self.norm * self.power_norm), self.positive)
        grad_temperature = None
        if self.temperature is not None:
            # x' = x / temperature
            total = (grad * self.positive).flatten(0, -3).sum(0)
            grad_temperature = total.div_(self.temperature).neg_()
            grad.div_(self.temperature)
        return torch.where(x > 0, grad, 0), grad_temperature
