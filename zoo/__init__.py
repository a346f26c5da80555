"""Backbones as timm models; importing this package registers them all with timm."""

from vitarium.zoo import biformer, flowformer, litv2, nano, nat
from vitarium.zoo.checkpoint import CheckpointReport, load_checkpoint
from vitarium.zoo.pyramid import Pyramid
from vitarium.zoo.registry import Published, list_models, published

__all__ = [
    "CheckpointReport",
    "Published",
    "Pyramid",
    "biformer",
    "flowformer",
    "list_models",
    "litv2",
    "load_checkpoint",
    "nano",
    "nat",
    "published",
]
