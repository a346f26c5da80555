"""Focal modulation: a query is multiplied by what gates gather around it, near to far.

Yang et al., "Focal Modulation Networks" (arXiv 2203.11926, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops.mixer import Mixer
from vitarium.ops.projection import Linear, linear, plain


class FocalModulation(Mixer, name="focal"):
    """Focal modulation, the mixer of FocalNet.

    With q, z_0 and gates g of f(x), for the levels l = 1 ... L:

        z_l = GELU(depthwise convolution_l(z_{l-1})),  z_{L+1} = GELU(mean of z_L over the map)
        out = proj(norm(q * h(sum over l of g_l z_l)))

    Level l has kernels of side `focal_window + focal_factor * (l - 1)`. Cost for N tokens: 4 N C^2
    for the projections and N C times the sum of the squared sides, in multiply-adds. The
    convolutions are PyTorch's, and move each level in and out once: no kernel of ours would move
    less without keeping all levels of a tile and of what is around it.

    Parameters are named as in timm and the official code. `attention_map` has a map for each level
    and one for the mean, in place of heads: the derivative of the gated level at one position,
    summed over channels, with respect to z_0, gates held fixed. Its values may be negative.

    Args:
        dim: number of channels C.
        focal_window: side of the first level's kernel, an odd number.
        focal_level: number L of levels.
        focal_factor: what each level's kernel is wider by, an even number.
        bias: bias of the projections `f` and `h`.
        use_post_norm: normalise before the output projection.
        normalize_modulator: divide the sum over levels by their number, L + 1.
        norm_layer: builds that normalisation from a number of channels, on channels-last maps; a
            layer normalisation with eps 1e-6 unless given.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: a size is impossible; the message says which.
    """

    paper = "Focal Modulation Networks (arXiv 2203.11926)"
    linear = True
    cost = (
        "4*N*C**2 + N*C*(focal_level + 1) + N*C*sum((focal_window "
        "+ focal_factor*range(focal_level))**2)"
    )
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"dim": 32, "focal_window": 3, "focal_level": 2},
        {"dim": 24, "focal_window": 5, "focal_level": 1, "bias": False, "use_post_norm": True,
         "normalize_modulator": True},
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        *,
        focal_window: int,
        focal_level: int,
        focal_factor: int = 2,
        bias: bool = True,
        use_post_norm: bool = False,
        normalize_modulator: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        if focal_window < 1 or focal_window % 2 == 0:
            raise ValueError(f"FocalModulation: focal_window={focal_window} must be odd")
        if focal_factor < 0 or focal_factor % 2:
            raise ValueError(f"FocalModulation: focal_factor={focal_factor} must be even")
        if focal_level < 0:
            raise ValueError(f"FocalModulation: focal_level={focal_level} must be at least 0")
        factory = {"device": device, "dtype": dtype}
        self.focal_window, self.focal_level, self.focal_factor = (
            focal_window,
            focal_level,
            focal_factor,
        )
        self.normalize_modulator = normalize_modulator
        self.f = Linear(dim, 2 * dim + focal_level + 1, bias=bias, **factory)
        self.h = Linear(dim, dim, bias=bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.focal_layers = nn.ModuleList()
        for level in range(focal_level):
            side = focal_window + focal_factor * level
            convolution = nn.Conv2d(
                dim, dim, side, padding=side // 2, groups=dim, bias=False, **factory
            )
            self.focal_layers.append(nn.Sequential(convolution, nn.GELU()))
        self.norm: nn.Module = nn.Identity()
        if use_post_norm:
            self.norm = (norm_layer or _layer_norm)(dim, **factory)

    def mix(self, x: Tensor) -> Tensor:
        query, context, gates = self._projected(x)
        modulator = self._levels(context, gates, torch.addcmul)
        if self.normalize_modulator:
            modulator = modulator / (self.focal_level + 1)
        return self.proj_drop(self.proj(self.norm(query * self.h(modulator))))

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query and context `(B, H, W, C)`, and gates `(B, H, W, focal_level + 1)`."""
        # Apart, so that the context is contiguous, which convolutions would make it.
        widths = (self.dim, self.dim, self.focal_level + 1)
        if not plain(self.f):
            query, context, gates = self.f(x).split(widths, -1)
            return query, context, gates
        biases = (None,) * 3 if self.f.bias is None else self.f.bias.split(widths)
        query, context, gates = map(linear, (x,) * 3, self.f.weight.split(widths), biases)
        return query, context, gates

    def _levels(
        self, context: Tensor, gates: Tensor, join: Callable[[Any, Tensor, Tensor], Any]
    ) -> Any:
        """The gated levels, joined one by one: `join(what was joined or 0, level, gate)`."""
        joined: Any = context.new_zeros(())
        for level, layer in enumerate(self.focal_layers):
            context = layer(context.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            joined = join(joined, context, gates[..., level, None])
        whole = F.gelu(context.mean((1, 2), keepdim=True))
        return join(joined, whole, gates[..., self.focal_level, None])

    def _attention_map(self, x: Tensor, row: int, column: int) -> Tensor:
        _, context, gates = self._projected(x)
        found = []
        with torch.enable_grad():
            context = context.detach().requires_grad_()

            def follow(_: Any, level: Tensor, gate: Tensor) -> None:
                asked = level * gate  # the mean is the same at all positions
                (grad,) = torch.autograd.grad(
                    asked[:, row, column].sum(), context, retain_graph=True
                )
                found.append(grad.sum(-1))

            self._levels(context, gates, follow)
        return torch.stack(found, 1)

    def extra_repr(self) -> str:
        return f"focal_window={self.focal_window}, focal_level={self.focal_level}"


def _layer_norm(dim: int, **factory: Any) -> nn.Module:
    return nn.LayerNorm(dim, eps=1e-6, **factory)
