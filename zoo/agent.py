"""Agent attention in the blocks of Swin and CSWin.

Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention" (arXiv 2312.08874,
ECCV 2024). Code and checkpoints (no licence stated): https://github.com/LeapLabTHU/Agent-Attention
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from vitarium.zoo import cswin, swin
from vitarium.zoo.leaplab import register_host
from vitarium.zoo.pyramid import Pyramid
from vitarium.zoo.registry import Published

AGENTS = (9, 16, 49, 49)  # per stage

# Per model: the last part of of its checkpoint, and the figures of the official repository.
CHECKPOINTS: dict[str, tuple[str, Published]] = {
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


def agent_swin(
    *,
    agent_num: Sequence[int] = AGENTS,
    downstream_agent_shapes: Sequence[Any] = (None, None, None, None),
    **kwargs: Any,
) -> Pyramid:
    """Swin with agent attention.

    The official backbones of detection and segmentation are those of 224 pixels with
    `feature_norm=nn.LayerNorm, always_partition=True` and `downstream_agent_shapes` of their
    configuration, (9, 12, 14, 7) or, of Agent-Swin-S, (9, 12, 7, 7).

    Args:
        agent_num: agents of a window, per stage.
        downstream_agent_shapes: rows and columns of agents per stage where they differ from
            `agent_num`, a number or (H, W); the biases are interpolated. None for no difference.
        kwargs: further arguments of `vitarium.zoo.swin.swin`.
    """

    def mixer(windows: swin.Windows) -> Any:
        shared = {
            "num_heads": windows.num_heads,
            "qkv_bias": kwargs.get("qkv_bias", True),
            "agent_num": agent_num[windows.stage],
        }
        if not windows.whole:
            sizes = {"window_size": windows.window_size, "shift_size": windows.shift_size}
            return ("agent_window", {**shared, **sizes})
        shape = downstream_agent_shapes[windows.stage]
        sizes = {"window": windows.window_size, "downstream_agent_shape": shape}
        return ("agent", {**shared, **sizes})

    return swin.swin(mixer=mixer, **kwargs)


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

_PAPER = {
    "paper_ids": "arXiv:2312.08874",
    "paper_name": "Agent Attention: On the Integration of Softmax and Linear Attention",
    "classifier": "head.fc",
}
_register = partial(
    register_host,
    __name__,
    checkpoints=CHECKPOINTS,
    whole=WHOLE,
    repository="https://github.com/LeapLabTHU/Agent-Attention",
)
_register(
    SWIN,
    checkpoint_filter_fn=swin.checkpoint_filter_fn,
    configuration={**_PAPER, "first_conv": "stem.proj"},
)
_register(
    CSWIN,
    checkpoint_filter_fn=cswin.checkpoint_filter_fn,
    configuration={**_PAPER, "first_conv": "stem.conv"},
)
