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
    """Focused features of tokens, kept for their derivative.

    Args:
        positive: x' = (max(x, 0) + 1e-6) / temperature, `(tokens, all channels)`, contiguous.
        focusing_factor: as in `features`.
        power: where to put x'^p, up to a factor that all channels of a token share; `positive`
            itself if there is no derivative to come.

    Attributes:
        ratio: what `power` has to be multiplied by for the features, `(tokens, 1)`.
    """

    def __init__(self, positive: Tensor, focusing_factor: float, power: Tensor) -> None:
        self.positive, self.factor, self.power = positive, focusing_factor, power
        self.norm = torch.linalg.vector_norm(positive, dim=1, keepdim=True)
        source = positive
        if focusing_factor not in (2, 3):
            source = torch.div(positive, positive.amax(1, keepdim=True), out=power)
        torch.pow(source, focusing_factor, out=power)
        self.power_norm = torch.linalg.vector_norm(power, dim=1, keepdim=True)
        self.ratio = self.norm / self.power_norm

    def backward(self, grad: Tensor, scaled: bool, scratch: Tensor) -> None:
        """Makes the gradient of the features that of x', in place.

        Args:
            grad: of `power * ratio`, or, unless `scaled`, ratio times that.
            scaled: which of them.
            scratch: of the same shape, for whatever.
        """
        inner = row_sums(torch.mul(grad, self.power, out=scratch))
        grad.addcmul_(inner / self.power_norm.square(), self.power, value=-1)
        inner = inner / self.norm.square()
        slope = grad.new_full((1, 1), self.factor)
        if scaled:
            inner, slope = inner * self.ratio, self.factor * self.ratio
        if self.factor == 3:
            torch.addcmul(inner, slope, grad.mul_(self.positive), out=grad).mul_(self.positive)
        elif self.factor == 2:
            torch.addcmul(inner, slope, grad, out=grad).mul_(self.positive)
        else:
            grad.mul_(self.power).div_(self.positive).mul_(slope).addcmul_(inner, self.positive)


def row_sums(x: Tensor) -> Tensor:
    """`x.sum(-1, keepdim=True)` of a contiguous tensor, several times faster for short rows."""
    rows = x.view(-1, x.shape[-1])
    return torch.mv(rows, rows.new_ones(rows.shape[1])).view(*x.shape[:-1], 1)
