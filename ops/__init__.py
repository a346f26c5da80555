"""Token mixers: stateless operators, their Triton kernels, and modules."""

from vitarium.ops.dispatch import BACKENDS, OPERATORS, Case, backend
from vitarium.ops.mixer import MIXERS, Mixer, build_mixer
from vitarium.ops.neighborhood import (
    GlobalAttention,
    NeighborhoodAttention,
    neighborhood_attention,
)
from vitarium.ops.window import window_attention

__all__ = [
    "BACKENDS",
    "MIXERS",
    "OPERATORS",
    "Case",
    "GlobalAttention",
    "Mixer",
    "NeighborhoodAttention",
    "backend",
    "build_mixer",
    "neighborhood_attention",
    "window_attention",
]
