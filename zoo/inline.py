"""InLine attention, linear and injective, in the blocks of DeiT, PVT, Swin and CSwin.

Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention" (arXiv 2412.06590,
NeurIPS 2024). Code and checkpoints (no licence stated): https://github.com/LeapLabTHU/InLine
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import register_notrace_module
from torch import Tensor

from vitarium.zoo import cswin, deit, pvt, swin
from vitarium.zoo.leaplab import register_paper
from vitarium.zoo.parts import Block
from vitarium.zoo.pyramid import Pyramid
from vitarium.zoo.registry import Published

# Per model: the last part of the checkpoint's address, and the figures of the official repository.
CHECKPOINTS: dict[str, tuple[str, Published]] = {
    "inline_deit_tiny": ("1d6b8191ad6d4114b291", Published(74.5, 6.5, 1.1, 224)),
    "inline_deit_small": ("2f3898b07e9247f3beb3", Published(80.2, 16.7, 5.0, 288)),
    "inline_deit_base": ("10bdd726d4b0435eb34e", Published(82.3, 23.8, 17.2, 448)),
    "inline_pvt_tiny": ("90ac52b1555b401eb5e6", Published(78.2, 12.0, 2.0, 224)),
    "inline_pvt_small": ("1ab953b2479d433080a3", Published(82.0, 21.6, 3.9, 224)),
    "inline_pvt_medium": ("a72aec31e6084bc0a280", Published(83.2, 37.6, 6.9, 224)),
    "inline_pvt_large": ("efd91318ba964f01b288", Published(83.6, 50.2, 10.2, 224)),
    "inline_swin_tiny": ("32810869fcc34410966b", Published(82.4, 30.0, 4.5, 224)),
    "inline_swin_small": ("e9657fd247c04c7cb1a1", Published(83.6, 50.0, 8.7, 224)),
    "inline_swin_base": ("bf23564bb64c420aafe1", Published(84.1, 88.0, 15.4, 224)),
    "inline_cswin_tiny": ("49fa2ecc543647c4b970", Published(83.2, 25.0, 4.3, 224)),
    "inline_cswin_small": ("59f4e65f776f4052b93c", Published(83.8, 43.0, 6.8, 224)),
    "inline_cswin_base": ("91e17121df284ae38521", Published(84.5, 96.0, 14.9, 224)),
}


def inline_deit(*, embed_dim: int, num_heads: int, depth: int = 12, **kwargs: Any) -> deit.DeiT:
    """InLine-DeiT: InLine attention with a class token.

    Args:
        embed_dim: channels.
        num_heads: attention heads; divides `embed_dim`.
        depth: number of blocks.
        kwargs: further arguments of `vitarium.zoo.deit.DeiT`, which win over those set here.
    """
    mixers = [("inline", {"num_heads": num_heads, "qkv_bias": True})] * depth
    return deit.DeiT(**{"mixers": mixers, "embed_dim": embed_dim, **kwargs})


def inline_pvt(
    *, depths: Sequence[int], num_heads: Sequence[int] = (2, 4, 10, 16), **kwargs: Any
) -> Pyramid:
    """InLine-PVT: InLine attention in every stage, without spatial reduction.

    Args:
        depths: blocks per stage.
        num_heads: attention heads per stage.
        kwargs: further arguments of `vitarium.zoo.pvt.pvt`, which win over those set here.
    """
    mixers = [("inline", {"num_heads": heads, "qkv_bias": True}) for heads in num_heads]
    return pvt.pvt(**{"mixers": mixers, "depths": depths, **kwargs})


def inline_swin(*, kernel_func: str = "identity", **kwargs: Any) -> Pyramid:
    """Swin with InLine attention.

    Args:
        kernel_func: feature map of queries and keys, as of the mixer "inline".
        kwargs: further arguments of `vitarium.zoo.swin.swin`.
    """

    def mixer(windows: swin.Windows) -> Any:
        shared = {
            "num_heads": windows.num_heads,
            "qkv_bias": kwargs.get("qkv_bias", True),
            "kernel_func": kernel_func,
        }
        if windows.whole:
            return ("inline", shared)
        sizes = {"window_size": windows.window_size, "shift_size": windows.shift_size}
        return ("inline_window", {**shared, **sizes})

    return swin.swin(mixer=mixer, **kwargs)


@register_notrace_module  # one node to torch.fx
class MeanBlock(Block):
    """`Block` whose mixer makes weights of the mean token, that of the map before its norm.

    Args: as of `Block`; the mixer's `mix` takes the mean.
    """

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer.mix(self.norm1(x), mean=x.mean((1, 2)))
        return self.fed(x + self.drop_path1(self.ls1(mixed)))


def inline_cswin(
    *,
    num_heads: Sequence[int] = (2, 4, 8, 16),
    replaced: Sequence[bool] = (True, True, False, False),
    img_size: int = 224,
    split_size: Sequence[int] = (1, 2, 7, 7),
    **kwargs: Any,
) -> Pyramid:
    """CSWin with InLine attention of whole maps in the first two stages.

    Args:
        num_heads: per stage, number of heads.
        replaced: per stage, whether it has InLine attention; the others have CSWin's.
        img_size: side of the image that the network is made for; images of other sizes are taken
            too.
        split_size: per stage, width of the stripes of CSWin's attention.
        kwargs: further arguments of `vitarium.zoo.cswin.cswin`.
    """
    mixers = cswin.stripes(
        mixer="inline_cross_shaped",
        replaced=replaced,
        num_heads=num_heads,
        further=[{}] * len(num_heads),
        img_size=img_size,
        split_size=split_size,
    )
    block = [MeanBlock if own else Block for own in replaced]
    return cswin.cswin(mixers=mixers, block=block, **kwargs)


DEIT: dict[str, Callable[..., deit.DeiT]] = {
    "inline_deit_tiny": partial(inline_deit, embed_dim=192, num_heads=6, drop_path_rate=0.1),
    "inline_deit_small": partial(
        inline_deit, embed_dim=320, num_heads=10, img_size=288, drop_path_rate=0.1
    ),
    "inline_deit_base": partial(
        inline_deit, embed_dim=384, num_heads=12, img_size=448, drop_path_rate=0.1
    ),
}

PVT: dict[str, Callable[..., Pyramid]] = {
    "inline_pvt_tiny": partial(inline_pvt, depths=(2, 2, 2, 2), drop_path_rate=0.1),
    "inline_pvt_small": partial(inline_pvt, depths=(3, 4, 6, 3), drop_path_rate=0.1),
    "inline_pvt_medium": partial(inline_pvt, depths=(3, 4, 18, 3), drop_path_rate=0.3),
    "inline_pvt_large": partial(inline_pvt, depths=(3, 8, 27, 3), drop_path_rate=0.3),
}

_swin_base = partial(
    inline_swin, embed_dim=128, depths=(2, 2, 18, 2), replaced=(2, 2, 2, 0), drop_path_rate=0.5
)
SWIN: dict[str, Callable[..., Pyramid]] = {
    "inline_swin_tiny": partial(
        inline_swin, embed_dim=96, depths=(2, 2, 6, 2), replaced=(2, 2, 6, 0), drop_path_rate=0.2
    ),
    "inline_swin_small": partial(
        inline_swin, embed_dim=96, depths=(2, 2, 18, 2), replaced=(2, 2, 0, 0), drop_path_rate=0.3
    ),
    "inline_swin_base": _swin_base,
    "inline_swin_base_384": partial(_swin_base, img_size=384),
}

_cswin_small = partial(inline_cswin, embed_dim=64, depths=(3, 6, 29, 2), drop_path_rate=0.4)
_cswin_base = partial(_cswin_small, embed_dim=96, num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
CSWIN: dict[str, Callable[..., Pyramid]] = {
    "inline_cswin_tiny": partial(
        inline_cswin, embed_dim=64, depths=(2, 4, 18, 1), drop_path_rate=0.2
    ),
    "inline_cswin_small": _cswin_small,
    "inline_cswin_base": _cswin_base,
    "inline_cswin_base_384": partial(
        _cswin_base, img_size=384, split_size=(1, 2, 12, 12), drop_path_rate=0.7
    ),
}

WHOLE = frozenset({"inline_swin_base_384"})  # evaluated without crop

register_paper(
    __name__,
    {"deit": DEIT, "pvt": PVT, "swin": SWIN, "cswin": CSWIN},
    checkpoints=CHECKPOINTS,
    whole=WHOLE,
    repository="https://github.com/LeapLabTHU/InLine",
    paper={
        "paper_ids": "arXiv:2412.06590",
        "paper_name": "Bridging the Divide: Reconsidering Softmax and Linear Attention",
    },
)
