"""What the testbed gives each mixer in each stage, and where that is from.

Papers state settings for stages of 56, 28, 14 and 7 tokens a side, those of images of 224 pixels;
what is scaled to the 8, 4 and 2 of the nano testbed keeps its proportion to the map. A mixer that
its paper puts into some stages only is in all of them here: that is the comparison.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

from vitarium.ops import MIXERS


class Place(NamedTuple):
    """Where a mixer stands.

    Attributes:
        stage: index of the stage.
        block: index of the block in its stage.
        layer: index of the block in the network.
        layers: blocks of the network.
        dim: channels.
        num_heads: heads of the testbed's usual width.
        map_size: side of the stage's map, of images of the testbed's own size.
    """

    stage: int
    block: int
    layer: int
    layers: int
    dim: int
    num_heads: int
    map_size: int


@dataclass(frozen=True)
class Settings:
    """A mixer's arguments.

    Attributes:
        kind: what it attends to, for pictures: see `KINDS`.
        source: the model of the paper that the settings are those of.
        arguments: of the mixer. A tuple has one value per stage, a function is called with the
            `Place`, all else is for every block.
        nano: those that differ in the nano testbed.
    """

    kind: str
    source: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    nano: Mapping[str, Any] = field(default_factory=dict)


KINDS = {
    "dense": "all tokens",
    "local": "neighborhood or window",
    "sparse": "grid, stripes, distant tokens",
    "routed": "what content chooses",
    "pooled": "pooled keys or agents",
    "linear": "linear in tokens",
    "channel": "channels, modulation",
}


def arguments_for(name: str, place: Place, nano: bool = False) -> dict[str, Any]:
    """The arguments of the mixer `name` at `place`, `dim` aside.

    Of a mixer without settings, `num_heads` if it takes that.
    """
    settings = SETTINGS.get(name)
    given = {} if settings is None else {**settings.arguments, **(settings.nano if nano else {})}
    if "num_heads" in signature(MIXERS[name].__init__).parameters:
        given.setdefault("num_heads", _heads)
    return {key: _value(value, place) for key, value in given.items()}


def _value(value: Any, place: Place) -> Any:
    if isinstance(value, tuple):
        return value[min(place.stage, len(value) - 1)]
    return value(place) if callable(value) else value


def _map(place: Place) -> int:
    return place.map_size


def _heads(place: Place) -> int:
    return place.num_heads


def _tokens(place: Place) -> int:
    return place.map_size**2


def _every_second(*values: Any) -> Callable[[Place], Any]:
    """0 in the first block of a stage, the stage's value in the second, and so on."""
    return lambda place: place.block % 2 * _value(values, place)


def _dilated(place: Place, kernel_size: int) -> int:
    """DiNAT's: every second window spans the map."""
    return max(1, place.map_size // kernel_size) if place.block % 2 else 1


def _position_aware(place: Place) -> dict[str, Any]:
    return {"num_heads": place.num_heads, "mask_size": min(place.map_size, 14), "qkv_bias": True}


_LAST = (False, False, False, True)
_NANO_LAST = (False, False, True)
# Heads of 24 channels in stages of 96, 192, 384 and 768: BiFormer's, CSwin-B's and TransNeXt-B's.
_FOUR = {"num_heads": (4, 8, 16, 32)}
_TWO = {"num_heads": (2, 4, 8)}
_AGENTS, _NANO_AGENTS = {"agent_num": (9, 16, 49, 49)}, {"agent_num": 4}
_BIAS = {"qkv_bias": True}
_MOH = {"shared_head": (4, 8, 4, 5), "routed_head": (0, 0, 8, 16), **_FOUR}
_NANO_MOH = {"shared_head": (2, 1, 2), "routed_head": (0, 2, 4), **_TWO}
_ROUTING = {"n_win": 7, "topk": (1, 4, 16, 49), "side_dwconv": 5}
_NANO_ROUTING = {"n_win": (4, 4, 2), "topk": (1, 4, 4)}

SETTINGS: dict[str, Settings] = {
    "agent": Settings(
        "pooled", "Agent-DeiT, agents of Agent-PVT",
        {"window": _map, **_AGENTS, **_BIAS}, _NANO_AGENTS,
    ),
    "agent_cswin": Settings(
        "pooled", "Agent-CSwin-B: one stripe as wide as the map",
        {"resolution": _map, "split_size": _map, "last_stage": _LAST, **_FOUR, **_AGENTS, **_BIAS},
        {"last_stage": _NANO_LAST, **_TWO, **_NANO_AGENTS},
    ),
    "agent_pvt": Settings(
        "pooled", "Agent-PVT: no spatial reduction",
        {"num_patches": _tokens, **_AGENTS, **_BIAS}, _NANO_AGENTS,
    ),
    "agent_window": Settings(
        "pooled", "Agent-Swin-T: one window of 56, the map", {"window_size": _map, **_AGENTS},
        _NANO_AGENTS,
    ),
    "aggregated": Settings(
        "pooled", "TransNeXt-B, its last stage too",
        {"sr_ratio": (8, 4, 2, 1), "window_size": 3, "pretrain_size": _map, **_FOUR},
        {"sr_ratio": (4, 2, 1), **_TWO},
    ),
    "aggregated_mixture_of_head": Settings(
        "pooled", "MoH-ViT-B-75, its last stage too",
        {"sr_ratio": (8, 4, 2, 1), "window_size": 3, "pretrain_size": _map, **_MOH},
        {"sr_ratio": (4, 2, 1), **_NANO_MOH},
    ),
    "attention": Settings("dense", "ViT"),
    "attention_lepe": Settings("dense", "BiFormer's last stage", {"side_dwconv": 5}),
    "bilevel_routing": Settings("routed", "BiFormer-STL", _ROUTING, _NANO_ROUTING),
    "bilevel_routing_nchw": Settings("routed", "BiFormer-STL-nchw", _ROUTING, _NANO_ROUTING),
    "cascaded_group": Settings(
        "local", "EfficientViT-M4",
        {
            "num_heads": 4,
            "key_dim": 16,
            "attn_ratio": lambda place: place.dim / (4 * 16),
            "resolution": _map,
            "window_resolution": 7,
            "kernels": lambda place: (7, 5, 3, 3),
        },
        {"window_resolution": (4, 4, 2)},
    ),
    "channel": Settings("channel", "DaViT-T's channel blocks", _BIAS),
    "channel_v2": Settings("channel", "DaViT of Florence-2, its channel blocks"),
    "cross_shaped": Settings(
        "sparse", "CSWin-B",
        {"resolution": _map, "split_size": (1, 2, 7, 7), "last_stage": _LAST, **_FOUR, **_BIAS},
        {"split_size": (1, 2, 2), "last_stage": _NANO_LAST, **_TWO},
    ),
    "disc": Settings("local", "CLEAR of radius 8", {"radius": 8}, {"radius": 3}),
    "flow": Settings("linear", "Flowformer's vision models"),
    "flow_causal": Settings("linear", "Flowformer's library", {"n_heads": _heads}),
    "focal": Settings(
        "channel", "FocalNet-T (LRF)", {"focal_window": 3, "focal_level": 3}, {"focal_level": 2}
    ),
    "focused_linear": Settings(
        "linear", "FLatten-PVT: no spatial reduction",
        {"num_patches": _tokens, "focusing_factor": 3, "kernel_size": 5, **_BIAS},
    ),
    "focused_linear_window": Settings(
        "linear", "FLatten-Swin-T: one window of 56, the map",
        {"window_size": _map, "focusing_factor": 3, "kernel_size": 5},
    ),
    "gaussian_adaptive": Settings(
        "channel", "GAAM along tokens", {"norm_axis": 1, "num_heads": 4, "num_gaussians": 4}
    ),
    "gaussian_block": Settings("channel", "GAAM's block", {"num_heads": lambda place: (2, 4)}),
    "global": Settings("dense", "ViT-rpb of DiNAT", {"map_size": _map}),
    "grid": Settings("sparse", "MaxViT-T's grid", {"grid_size": 7}, {"grid_size": 4}),
    "grouped_query": Settings(
        "dense", "Key-Driven GQA's baseline: half as many key heads",
        {"num_kv_heads": (2, 4, 8, 16), **_FOUR}, {"num_kv_heads": (1, 2, 4), **_TWO},
    ),
    "halo": Settings(
        "local", "HaloNet-H1", {"block_size": 8, "halo_size": 3}, {"block_size": 4, "halo_size": 1}
    ),
    "hilo": Settings(
        "pooled", "LITv2-S, its first stages too",
        {"alpha": 0.9, "window_size": (2, 2, 2, 1), **_BIAS}, {"window_size": (2, 2, 1)},
    ),
    "inline": Settings("linear", "InLine-PVT", _BIAS),
    "inline_cross_shaped": Settings(
        "linear", "InLine-CSwin-B: one stripe as wide as the map",
        {"resolution": _map, "split_size": _map, "last_stage": _LAST, **_FOUR, **_BIAS},
        {"last_stage": _NANO_LAST, **_TWO},
    ),
    "inline_window": Settings(
        "linear", "InLine-Swin-T: one window of 56, the map", {"window_size": _map}
    ),
    "key_driven_grouped_query": Settings(
        "dense",
        "KDGQA: heads allocated in every forward, by the norms of keys",
        {"num_kv_heads": (2, 4, 8, 16), "dynamic": True, **_FOUR},
        {"num_kv_heads": (1, 2, 4), **_TWO},
    ),
    "kmeans_routing": Settings(
        "routed", "Routing Transformer, section 4: sqrt(N) clusters", {"num_clusters": _map}
    ),
    "length_scaled_cosine": Settings(
        "dense", "TransNeXt-B's last stage", {"pretrain_size": _map, **_FOUR}, _TWO
    ),
    "lightning": Settings(
        "linear", "TransNormerLLM's decays by layer",
        {"layer_idx": lambda place: place.layer, "num_layers": lambda place: place.layers},
    ),
    "linear": Settings("linear", "elu + 1, as in the paper"),
    "long_short_distance": Settings(
        "sparse", "CrossFormer-S",
        {"group_size": 7, "interval": (8, 4, 2, 1), "lsda_flag": _every_second(1)},
        {"group_size": 4, "interval": (2, 1, 1)},
    ),
    "mixture_of_head": Settings(
        "dense", "MoH-ViT-B-75, all stages", {"pretrain_size": _map, **_MOH}, _NANO_MOH
    ),
    "mixture_of_head_dot_product": Settings(
        "dense", "MoH-DiT's attention, heads of MoH-ViT-B-75", _MOH, _NANO_MOH
    ),
    "multi_axis": Settings(
        "sparse", "MaxViT-T: a window and a grid, with two networks of its own",
        {"window_size": 7, "grid_size": 7}, {"window_size": 4, "grid_size": 4},
    ),
    "neighborhood": Settings(
        "local", "DiNAT-T: every second window dilated over the map",
        {"kernel_size": 7, "dilation": lambda place: _dilated(place, 7)},
        {"kernel_size": 3, "dilation": lambda place: _dilated(place, 3)},
    ),
    "outlook": Settings(
        "local", "VOLO-D1's first stage", {"kernel_size": 3, "padding": 1, "stride": 2}
    ),
    "overlapping_cross": Settings(
        "local", "HAT; windows of 8 in a last stage of 7",
        {"window_size": (16, 16, 16, 8), "overlap_ratio": 0.5}, {"window_size": 4},
    ),
    "overlapping_patches": Settings(
        "local", "CATANet's first layer", {"num_heads": 4, "patch_size": 16}, {"patch_size": 4}
    ),
    "position_aware": Settings(
        "dense", "RVT: tables of 14 x 14 tokens, interpolated",
        {
            key: lambda place, key=key: _position_aware(place)[key]
            for key in ("num_heads", "mask_size", "qkv_bias")
        },
    ),
    "retention": Settings("linear", "RetNet: values of twice the width"),
    "single_head": Settings("dense", "SHViT: 16 channels of keys, 3/14 of values", {"qk_dim": 16}),
    "sparsifiner": Settings(
        "routed", "Sparsifiner-S: a quarter of the keys",
        {"input_resolution": _map, "attn_keep_rate": 0.25, "reduce_n_factor": 8},
    ),
    "tap": Settings(
        "dense", "TAP around RVT's attention",
        {"mixer": lambda place: ("position_aware", _position_aware(place))},
    ),
    "token_aggregation": Settings(
        "routed", "CATANet: groups of its first four layers, 16 centres",
        {"num_heads": 4, "num_tokens": 16, "group_size": (256, 128, 64, 32)},
        {"num_tokens": 8, "group_size": (16, 8, 4)},
    ),
    "ulsam": Settings("channel", "ULSAM with 4 subspaces", {"num_splits": 4}),
    "window": Settings(
        "local", "Swin-T", {"window_size": 7, "shift_size": _every_second(3)},
        {"window_size": 4, "shift_size": _every_second(2)},
    ),
}  # fmt: skip
