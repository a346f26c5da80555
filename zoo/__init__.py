"""Backbones as timm models; importing this package registers them all with timm."""

from vitarium.zoo import (
    agent,
    biformer,
    crossformer,
    flowformer,
    inline,
    litv2,
    moh,
    nano,
    nat,
    transnext,
)
from vitarium.zoo.checkpoint import CheckpointReport, load_checkpoint
from vitarium.zoo.convert import from_checkpoint
from vitarium.zoo.detection import BackboneWithFPN
from vitarium.zoo.pyramid import Pyramid
from vitarium.zoo.registry import Published, list_models, published

__all__ = [
    "BackboneWithFPN",
    "CheckpointReport",
    "Published",
    "Pyramid",
    "agent",
    "biformer",
    "crossformer",
    "flowformer",
    "inline",
    "from_checkpoint",
    "list_models",
    "litv2",
    "load_checkpoint",
    "moh",
    "nano",
    "nat",
    "published",
    "transnext",
]
