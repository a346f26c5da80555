"""Token mixers: stateless operators, their Triton kernels, and modules."""

from vitarium.ops.aggregated import aggregated_attention
from vitarium.ops.aggregated_mixers import AggregatedAttention
from vitarium.ops.crossformer import DynamicPositionBias, LongShortDistanceAttention
from vitarium.ops.dispatch import BACKENDS, OPERATORS, Case, backend
from vitarium.ops.halo import HaloAttention, OverlappingCrossAttention
from vitarium.ops.mixer import MIXERS, Mixer, build_mixer
from vitarium.ops.multi_axis import MultiAxisAttention
from vitarium.ops.neighborhood import (
    GlobalAttention,
    NeighborhoodAttention,
    neighborhood_attention,
)
from vitarium.ops.window import window_attention
from vitarium.ops.window_mixers import GridAttention, WindowAttention

__all__ = [
    "BACKENDS",
    "MIXERS",
    "OPERATORS",
    "AggregatedAttention",
    "Case",
    "DynamicPositionBias",
    "GlobalAttention",
    "GridAttention",
    "HaloAttention",
    "LongShortDistanceAttention",
    "Mixer",
    "MultiAxisAttention",
    "NeighborhoodAttention",
    "OverlappingCrossAttention",
    "WindowAttention",
    "aggregated_attention",
    "backend",
    "build_mixer",
    "neighborhood_attention",
    "window_attention",
]
