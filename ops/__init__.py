"""Token mixers: stateless operators, their Triton kernels, and modules."""

from vitarium.ops.agent import agent_attention
from vitarium.ops.agent_mixers import AgentAttention, AgentReducedAttention
from vitarium.ops.agent_windows import (
    AgentCrossShapedAttention,
    AgentStripes,
    AgentWindowAttention,
)
from vitarium.ops.aggregated import aggregated_attention
from vitarium.ops.aggregated_mixers import AggregatedAttention, AggregatedMixtureOfHeadAttention
from vitarium.ops.attention import attention
from vitarium.ops.bilevel_mixers import (
    AttentionLePE,
    BiLevelRoutingAttention,
    BiLevelRoutingAttentionNCHW,
)
from vitarium.ops.bilevel_routing import bilevel_routing_attention, route
from vitarium.ops.cascaded_group import CascadedGroupAttention
from vitarium.ops.catanet import OverlappingPatchAttention, TokenAggregationAttention
from vitarium.ops.causal_linear import causal_linear_attention, causal_linear_step
from vitarium.ops.channel import ChannelAttention, ChannelAttentionV2, channel_attention
from vitarium.ops.cross_shaped import CrossShapedAttention
from vitarium.ops.crossformer import DynamicPositionBias, LongShortDistanceAttention
from vitarium.ops.dense_mixers import (
    LengthScaledCosineAttention,
    MixtureOfHeadAttention,
    MixtureOfHeadDotProductAttention,
    MultiHeadAttention,
    SingleHeadAttention,
)
from vitarium.ops.disc import DiscAttention
from vitarium.ops.dispatch import BACKENDS, OPERATORS, Case, backend
from vitarium.ops.flow import FlowAttention, flow_attention
from vitarium.ops.flow_causal import FlowAttentionCausal, flow_attention_causal
from vitarium.ops.focal import FocalModulation
from vitarium.ops.gaussian_adaptive import GaussianAdaptiveAttention, GaussianBlock
from vitarium.ops.grouped_query import GroupedQueryAttention, KeyDrivenGroupedQueryAttention
from vitarium.ops.halo import HaloAttention, OverlappingCrossAttention
from vitarium.ops.hilo import HiLoAttention
from vitarium.ops.indexed import indexed_attention
from vitarium.ops.inline_mixers import (
    CrossShapedInLineAttention,
    InLineAttention,
    InLineWindowAttention,
)
from vitarium.ops.kmeans_routing import KmeansRoutingAttention
from vitarium.ops.lightning import LightningAttention, SimpleRMSNorm, lightning_slopes
from vitarium.ops.linear import linear_attention
from vitarium.ops.linear_mixers import (
    FocusedLinearAttention,
    FocusedLinearWindowAttention,
    LinearAttention,
)
from vitarium.ops.mixer import (
    MIXERS,
    Mixer,
    auxiliary_losses,
    auxiliary_parts,
    build_mixer,
    qkv_heads,
)
from vitarium.ops.mixture_of_head import HeadRouter, mixture_of_head_attention
from vitarium.ops.multi_axis import MultiAxisAttention
from vitarium.ops.neighborhood import (
    GlobalAttention,
    NeighborhoodAttention,
    neighborhood_attention,
)
from vitarium.ops.outlook import OutlookAttention, outlook_attention
from vitarium.ops.position_aware import PositionAwareAttention
from vitarium.ops.retention import RetentionAttention, RetentionState
from vitarium.ops.sparsifiner import SparsifinerAttention
from vitarium.ops.tap import TokenAwarePooling, attention_diversification_loss, with_attention_maps
from vitarium.ops.ulsam import SubspaceAttention
from vitarium.ops.window import window_attention
from vitarium.ops.window_mixers import GridAttention, WindowAttention

__all__ = [
    "BACKENDS",
    "MIXERS",
    "OPERATORS",
    "AgentAttention",
    "AgentCrossShapedAttention",
    "AgentReducedAttention",
    "AgentStripes",
    "AgentWindowAttention",
    "AggregatedAttention",
    "AggregatedMixtureOfHeadAttention",
    "AttentionLePE",
    "BiLevelRoutingAttention",
    "BiLevelRoutingAttentionNCHW",
    "CascadedGroupAttention",
    "Case",
    "ChannelAttention",
    "ChannelAttentionV2",
    "CrossShapedAttention",
    "CrossShapedInLineAttention",
    "DiscAttention",
    "DynamicPositionBias",
    "FlowAttention",
    "FlowAttentionCausal",
    "FocalModulation",
    "FocusedLinearAttention",
    "FocusedLinearWindowAttention",
    "GaussianAdaptiveAttention",
    "GaussianBlock",
    "GlobalAttention",
    "GridAttention",
    "GroupedQueryAttention",
    "HaloAttention",
    "HeadRouter",
    "HiLoAttention",
    "InLineAttention",
    "InLineWindowAttention",
    "KeyDrivenGroupedQueryAttention",
    "KmeansRoutingAttention",
    "LengthScaledCosineAttention",
    "LightningAttention",
    "LinearAttention",
    "LongShortDistanceAttention",
    "Mixer",
    "MixtureOfHeadAttention",
    "MixtureOfHeadDotProductAttention",
    "MultiAxisAttention",
    "MultiHeadAttention",
    "NeighborhoodAttention",
    "OutlookAttention",
    "OverlappingCrossAttention",
    "OverlappingPatchAttention",
    "PositionAwareAttention",
    "RetentionAttention",
    "RetentionState",
    "SimpleRMSNorm",
    "SingleHeadAttention",
    "SparsifinerAttention",
    "SubspaceAttention",
    "TokenAggregationAttention",
    "TokenAwarePooling",
    "WindowAttention",
    "agent_attention",
    "aggregated_attention",
    "attention",
    "attention_diversification_loss",
    "auxiliary_losses",
    "auxiliary_parts",
    "backend",
    "bilevel_routing_attention",
    "build_mixer",
    "causal_linear_attention",
    "causal_linear_step",
    "channel_attention",
    "flow_attention",
    "flow_attention_causal",
    "indexed_attention",
    "lightning_slopes",
    "linear_attention",
    "mixture_of_head_attention",
    "neighborhood_attention",
    "outlook_attention",
    "qkv_heads",
    "route",
    "window_attention",
    "with_attention_maps",
]
