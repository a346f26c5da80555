"""Agent attention in the blocks of DeiT, PVT, Swin and CSWin.

Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention" (arXiv 2312.08874,
ECCV 2024). Code and checkpoints (no licence stated): https://github.com/LeapLabTHU/Agent-Attention
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from vitarium.zoo import cswin, deit, pvt, swin
from vitarium.zoo.leaplab import register_paper
from vitarium.zoo.pyramid import Pyramid
from vitarium.zoo.registry import Published

AGENTS = (9, 16, 49, 49)  # per stage

# Per model: the last part of the checkpoint's address, and the figures of the official repository.
CHECKPOINTS: dict[str, tuple[str, Published]] = {
    "agent_deit_tiny": ("57e0904221824ee7b7af", Published(74.9, 6.0, 1.2, 224)),
    "agent_deit_small": ("fdd43304372541db8ea7", Published(80.5, 22.7, 4.4, 224)),
    "agent_deit_small_448": ("a228f86241c445f1969b", Published(83.1, 23.1, 17.7, 448)),
    "agent_deit_base": ("5115f15fdd7e4ab58fbc", Published(82.0, 87.2, 17.6, 224)),
    "agent_pvt_tiny": ("13fdf0e0a7c5498c934f", Published(78.4, 11.6, 2.0, 224)),
    "agent_pvt_small": ("36b8be9a8863456685a3", Published(82.2, 20.6, 4.0, 224)),
    "agent_pvt_medium": ("4d00ecacf18b45f9b88c", Published(83.4, 35.9, 7.0, 224)),
    "agent_pvt_medium_256": ("654df734121643b19c52", Published(83.8, 36.1, 9.2, 256)),
    "agent_pvt_large": ("040cfe0cfbbe4762ad09", Published(83.7, 48.7, 10.4, 224)),
    "agent_swin_tiny": ("a2ddc1190c224f768a41", Published(82.6, 29.0, 4.5, 224)),
    "agent_swin_small": ("f607172c9fea4d6e99bb", Published(83.7, 50.0, 8.7, 224)),
    "agent_swin_small_288": ("09760394e93b4046a25e", Published(84.1, 50.0, 14.6, 288)),
    "agent_swin_base": ("4fcd2d0114bb490483c3", Published(84.0, 88.0, 15.4, 224)),
    "agent_swin_base_384": ("bb84ee9058954706a557", Published(84.9, 88.0, 46.3, 384)),
    "agent_cswin_tiny": ("8c562a74441e46d5902b", Published(83.1, 21.0, 4.3, 224)),
    "agent_cswin_small": ("30eb8af675bc4b7a8747", Published(83.9, 33.0, 6.8, 224)),
    "agent_cswin_base": ("c8035b0839b2410c8c9f", Published(84.7, 73.0, 14.9, 224)),
    "agent_cswin_base_384": ("1239be0df44b47719432", Published(85.8, 73.0, 46.3, 384)),
}


def agent_deit(
    *,
    embed_dim: int,
    num_heads: int,
    depth: int = 12,
    agent_num: int = 49,
    agent_depth: int | None = None,
    img_size: int = 224,
    patch_size: int = 16,
    **kwargs: Any,
) -> deit.DeiT:
    """Agent-DeiT: agent attention with a class token, then softmax attention.

    Args:
        embed_dim: channels.
        num_heads: attention heads; divides `embed_dim`.
        depth: number of blocks.
        agent_num: agents of a block, a square.
        agent_depth: how many blocks have agent attention; all if None.
        img_size: side of the square image that biases and position embedding belong to; images of
            other sizes are taken too.
        patch_size: pixels per patch along each axis.
        kwargs: further arguments of `vitarium.zoo.deit.DeiT`, which win over those set here.
    """
    shared = {"num_heads": num_heads, "qkv_bias": True}
    window = img_size // patch_size
    agent = {**shared, "agent_num": agent_num, "window": window, "class_token": True}
    first = depth if agent_depth is None else agent_depth
    mixers = [("agent", agent)] * first + [("attention", shared)] * (depth - first)
    sizes = {"embed_dim": embed_dim, "img_size": img_size, "patch_size": patch_size}
    return deit.DeiT(**{"mixers": mixers, **sizes, **kwargs})


def agent_pvt(
    *,
    depths: Sequence[int],
    num_heads: Sequence[int] = (1, 2, 5, 8),
    agent_num: Sequence[int] = AGENTS,
    downstream_agent_shapes: Sequence[tuple[int, int] | None] = (None, None, None, None),
    img_size: int = 224,
    **kwargs: Any,
) -> Pyramid:
    """Agent-PVT: agent attention in every stage, without spatial reduction.

    Args:
        depths: blocks per stage.
        num_heads: attention heads per stage.
        agent_num: agents per stage, squares.
        downstream_agent_shapes: per stage, rows and columns of agents where they are others than
            the biases are for; the official detectors and segmenters have (12, 12), (16, 16),
            (28, 28) and (28, 28).
        img_size: side of the square image that biases and position embeddings belong to; images of
            other sizes are taken too.
        kwargs: further arguments of `vitarium.zoo.pvt.pvt`, which win over those set here.
    """
    stages = zip(num_heads, agent_num, downstream_agent_shapes, pvt.map_sizes(img_size))
    mixers = [
        (
            "agent_pvt",
            {
                "num_heads": heads,
                "agent_num": agents,
                "downstream_agent_shape": shape,
                "num_patches": size**2,
                "qkv_bias": True,
            },
        )
        for heads, agents, shape, size in stages
    ]
    return pvt.pvt(**{"mixers": mixers, "depths": depths, "img_size": img_size, **kwargs})


def agent_swin(
    *,
    agent_num: Sequence[int] = AGENTS,
    downstream_agent_shapes: Sequence[Any] | None = None,
    **kwargs: Any,
) -> Pyramid:
    """Swin with agent attention.

    The official backbones of detection and segmentation are those of 224 pixels with
    `feature_norm=nn.LayerNorm, downstream_agent_shapes=(9, 12, 14, 7)`.

    Args:
        agent_num: agents of a window, per stage.
        downstream_agent_shapes: rows and columns of agents per stage, a number or (H, W), where
            they may differ from `agent_num`; the biases are interpolated. With them
            `always_partition` is true unless given, as in the official code.
        kwargs: further arguments of `vitarium.zoo.swin.swin`.
    """

    dense = downstream_agent_shapes is not None

    def mixer(windows: swin.Windows) -> Any:
        shared = {
            "num_heads": windows.num_heads,
            "qkv_bias": kwargs.get("qkv_bias", True),
            "agent_num": agent_num[windows.stage],
        }
        if not windows.whole:
            sizes = {"window_size": windows.window_size, "shift_size": windows.shift_size}
            return ("agent_window", {**shared, **sizes})
        arguments = {**shared, "window": windows.window_size}
        if dense:
            arguments["downstream_agent_shape"] = downstream_agent_shapes[windows.stage]
        return ("agent", arguments)

    return swin.swin(**{"mixer": mixer, "always_partition": dense, **kwargs})


def agent_cswin(
    *,
    num_heads: Sequence[int] = (2, 4, 8, 16),
    replaced: Sequence[bool] = (True, True, False, False),
    img_size: int = 224,
    split_size: Sequence[int] = (1, 2, 7, 7),
    agent_num: Sequence[int] = AGENTS,
    **kwargs: Any,
) -> Pyramid:
    """CSWin with agent attention of whole maps in the first two stages.

    Args:
        num_heads: per stage, number of heads.
        replaced: per stage, whether it has agent attention; the others have CSWin's.
        img_size: side of the image that biases belong to; images of other sizes are taken too.
        split_size: per stage, width of the stripes of CSWin's attention.
        agent_num: agents of a map, per stage.
        kwargs: further arguments of `vitarium.zoo.cswin.cswin`.
    """
    mixers = cswin.stripes(
        mixer="agent_cswin",
        replaced=replaced,
        num_heads=num_heads,
        further=[{"agent_num": number} for number in agent_num],
        img_size=img_size,
        split_size=split_size,
    )
    return cswin.cswin(mixers=mixers, **kwargs)


_deit_small = partial(agent_deit, embed_dim=384, num_heads=6, drop_path_rate=0.1)
DEIT: dict[str, Callable[..., deit.DeiT]] = {
    "agent_deit_tiny": partial(agent_deit, embed_dim=192, num_heads=3),
    "agent_deit_small": _deit_small,
    "agent_deit_small_448": partial(_deit_small, img_size=448),
    "agent_deit_base": partial(
        agent_deit, embed_dim=768, num_heads=12, agent_num=81, agent_depth=4, drop_path_rate=0.3
    ),
}

_pvt_medium = partial(agent_pvt, depths=(3, 4, 18, 3), drop_path_rate=0.3)
PVT: dict[str, Callable[..., Pyramid]] = {
    "agent_pvt_tiny": partial(agent_pvt, depths=(2, 2, 2, 2), drop_path_rate=0.1),
    "agent_pvt_small": partial(agent_pvt, depths=(3, 4, 6, 3), drop_path_rate=0.1),
    "agent_pvt_medium": _pvt_medium,
    "agent_pvt_medium_256": partial(_pvt_medium, img_size=256),
    "agent_pvt_large": partial(agent_pvt, depths=(3, 8, 27, 3), drop_path_rate=0.3),
}

_swin_tiny = partial(
    agent_swin, embed_dim=96, depths=(2, 2, 6, 2), replaced=(2, 2, 6, 0), drop_path_rate=0.2
)
_swin_small = partial(
    agent_swin, embed_dim=96, depths=(2, 2, 18, 2), replaced=(2, 2, 0, 0), drop_path_rate=0.3
)
_swin_base = partial(
    agent_swin, embed_dim=128, depths=(2, 2, 18, 2), replaced=(2, 2, 2, 0), drop_path_rate=0.5
)
SWIN: dict[str, Callable[..., Pyramid]] = {
    "agent_swin_tiny": _swin_tiny,
    "agent_swin_small": _swin_small,
    "agent_swin_small_288": partial(_swin_small, img_size=288),
    "agent_swin_base": _swin_base,
    "agent_swin_base_384": partial(_swin_base, img_size=384),
}

_cswin_tiny = partial(agent_cswin, embed_dim=64, depths=(2, 4, 18, 1), drop_path_rate=0.2)
_cswin_small = partial(agent_cswin, embed_dim=64, depths=(3, 6, 29, 2), drop_path_rate=0.4)
_cswin_base = partial(_cswin_small, embed_dim=96, num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
CSWIN: dict[str, Callable[..., Pyramid]] = {
    "agent_cswin_tiny": _cswin_tiny,
    "agent_cswin_small": _cswin_small,
    "agent_cswin_base": _cswin_base,
    "agent_cswin_base_384": partial(
        _cswin_base, img_size=384, split_size=(1, 2, 12, 12), drop_path_rate=0.7
    ),
}

WHOLE = frozenset({"agent_swin_small_288", "agent_swin_base_384"})  # evaluated without crop

register_paper(
    __name__,
    {"deit": DEIT, "pvt": PVT, "swin": SWIN, "cswin": CSWIN},
    checkpoints=CHECKPOINTS,
    whole=WHOLE,
    repository="https://github.com/LeapLabTHU/Agent-Attention",
    paper={
        "paper_ids": "arXiv:2312.08874",
        "paper_name": "Agent Attention: On the Integration of Softmax and Linear Attention",
    },
)
