"""Backbones as timm models; importing this package registers them all with timm."""

from vitarium.zoo import (
    agent,
    biformer,
    crossformer,
    flowformer,
    fused,
    inline,
    litv2,
    moh,
    nano,
    nat,
    swap_dense,  # noqa: F401 - adapters
    swap_maps,  # noqa: F401
    swap_sizes,  # noqa: F401
    swap_windows,  # noqa: F401
    testbed,
    transnext,
)
from vitarium.zoo.checkpoint import CheckpointReport, load_checkpoint
from vitarium.zoo.convert import from_checkpoint
from vitarium.zoo.detection import BackboneWithFPN
from vitarium.zoo.pyramid import Pyramid
from vitarium.zoo.registry import Published, list_models, published
from vitarium.zoo.swap import SwapReport, restore_mixers, swap_mixers

__all__ = [
    "BackboneWithFPN",
    "CheckpointReport",
    "Published",
    "Pyramid",
    "SwapReport",
    "agent",
    "biformer",
    "crossformer",
    "flowformer",
    "fused",
    "inline",
    "from_checkpoint",
    "list_models",
    "litv2",
    "load_checkpoint",
    "moh",
    "nano",
    "nat",
    "published",
    "restore_mixers",
    "swap_mixers",
    "testbed",
    "transnext",
]
