"""Backbones for torchvision's detectors: a feature pyramid over the maps of any timm model."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool


class BackboneWithFPN(nn.Module):
    """torchvision's `BackboneWithFPN` for a timm model made with `features_only=True`.

    torchvision's own cuts a model into its direct children and feeds each the output of the one
    before, which a model that is not a chain of such children, or keeps its maps channels-last
    between them, does not survive. This one asks the model for its features.
    Lin et al., "Feature Pyramid Networks for Object Detection" (arXiv 1612.03144).

    Args:
        body: `timm.create_model(name, features_only=True, out_indices=...)`.
        out_channels: channels of every map of the pyramid.
        extra_blocks: what adds coarser maps; by default a pooled one, under the name "pool".
        norm_layer: `norm_layer(channels)`, a norm after every convolution; None for none.

    Raises:
        TypeError: `body` has no `feature_info` of feature maps.
    """

    def __init__(
        self,
        body: nn.Module,
        out_channels: int = 256,
        *,
        extra_blocks: nn.Module | None = None,
        norm_layer: type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        channels = getattr(getattr(body, "feature_info", None), "channels", None)
        if channels is None:
            raise TypeError(
                f"BackboneWithFPN: body is a {type(body).__name__} without feature_info; "
                "timm.create_model(name, features_only=True) makes one that has it"
            )
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            channels(), out_channels, extra_blocks or LastLevelMaxPool(), norm_layer
        )
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Maps `(B, out_channels, H', W')`, "0" the finest, of images `(B, C, H, W)`."""
        return self.fpn(OrderedDict((str(i), f) for i, f in enumerate(self.body(x))))
