"""MoH-ViT: TransNeXt whose tokens choose among the heads of their attention.

Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842).
Code and checkpoints (Apache-2.0): https://github.com/SkyworkAI/MoH
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from vitarium.ops.mixture_of_head import HeadRouter
from vitarium.zoo.pyramid import Pyramid
from vitarium.zoo.registry import Published, register_family
from vitarium.zoo.transnext import checkpoint_filter_fn, default_cfg, transnext


def moh_transnext(
    *, shared_head: Sequence[int], routed_head: Sequence[int], **kwargs: Any
) -> Pyramid:
    """TransNeXt with a mixture of heads.

    Args:
        shared_head: per stage, the number of heads that every token uses.
        routed_head: per stage, how many of the other heads a token chooses; 0 where there are none.
        kwargs: arguments of `vitarium.zoo.transnext.transnext`.
    """
    heads = [
        {"shared_head": shared, "routed_head": routed}
        for shared, routed in zip(shared_head, routed_head)
    ]
    return transnext(heads=heads, **kwargs)


def load_balance_losses(model: nn.Module) -> list[Tensor]:
    """The load-balance loss of every layer whose heads are chosen, in the order of a forward.

    They are those of the last forward in training: after `model(images)`, the official training
    adds 0.01 times their mean to the loss. Empty in evaluation, and before a forward.
    """
    routers = (module for module in model.modules() if isinstance(module, HeadRouter))
    return [router.balance_loss for router in routers if router.balance_loss is not None]


_small = partial(
    moh_transnext,
    embed_dim=72,
    depths=(5, 5, 22, 5),
    routed_head=(0, 0, 6, 12),
    drop_path_rate=0.45,
)
_base = partial(moh_transnext, embed_dim=96, depths=(5, 5, 23, 5), drop_path_rate=0.6)

# The number is the percentage of heads that a token uses.
VARIANTS = {
    "moh_transnext_small_75": partial(_small, shared_head=(3, 6, 3, 4)),
    "moh_transnext_small_80": partial(_small, shared_head=(3, 6, 3, 8)),
    "moh_transnext_base_50": partial(_base, shared_head=(2, 2, 2, 4), routed_head=(2, 4, 6, 8)),
    "moh_transnext_base_75": partial(_base, shared_head=(4, 8, 4, 5), routed_head=(0, 0, 8, 16)),
}

# Per model: its repository on Hugging Face, and the official figures.
CHECKPOINTS = {
    "moh_transnext_small_75": ("MoH-ViT-S-75", Published(84.6, 50, None, 224)),
    "moh_transnext_small_80": ("MoH-ViT-S-80", Published(84.7, 50, None, 224)),
    "moh_transnext_base_50": ("MoH-ViT-B-50", Published(84.7, 90, None, 224)),
    "moh_transnext_base_75": ("MoH-ViT-B-75", Published(84.9, 90, None, 224)),
}


def _default_cfg(repository: str) -> dict[str, Any]:
    return default_cfg(
        224,
        description=(
            "The published address is a page that does not name its file: download the checkpoint "
            "there and load it with pretrained_cfg_overlay=dict(file=...)."
        ),
        paper_ids="arXiv:2410.11842",
        paper_name="MoH: Multi-Head Attention as Mixture-of-Head Attention",
        origin_url=f"https://huggingface.co/Chat-UniVi/{repository}",
    )


register_family(
    __name__,
    VARIANTS,
    default_cfgs={f"{name}.in1k": _default_cfg(page) for name, (page, _) in CHECKPOINTS.items()},
    published={f"{name}.in1k": figures for name, (_, figures) in CHECKPOINTS.items()},
    checkpoint_filter_fn=checkpoint_filter_fn,
)
