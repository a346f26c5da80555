"""The testbed: one macro design, any mixer. Nothing but the mixer differs between two testbeds.

Stem and downsampling are the overlapping convolutions of NAT (arXiv 2204.07143), whose zero padding
tells positions apart (Islam et al., arXiv 2001.08248), so that mixers need no position embedding;
widths, depths and rates are those of Swin-T and Swin-S (arXiv 2103.14030), with networks of 3.5
instead of 4 times the width, which pays for the convolutions. `testbed_nano` is for images of 32
pixels. `SETTINGS` says what each mixer is given in each stage, and where that is from.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.ops import MIXERS, Mixer
from vitarium.zoo.nano import NANO_CFG
from vitarium.zoo.parts import Block, ConvDownsample, ConvStem
from vitarium.zoo.pyramid import Pyramid, init_module, is_mixer_spec
from vitarium.zoo.registry import imagenet_cfg, register_family
from vitarium.zoo.testbed_settings import SETTINGS, Place, arguments_for


def testbed(
    *,
    mixers: Any,
    embed_dim: int,
    depths: Sequence[int],
    head_dim: int = 32,
    mlp_ratio: float = 3.5,
    img_size: int = 224,
    nano: bool = False,
    init_std: float = 0.02,
    **kwargs: Any,
) -> Pyramid:
    """The macro design around mixers.

    Under one seed, on the CPU, everything outside of the mixers is drawn alike whatever they are.

    Args:
        mixers: a mixer spec for the network, or a list with one per stage: `"window"`, or
            `("window", {"window_size": 8})`, or a list of specs that the blocks of the stage take
            in turn. What a spec leaves open is as in `SETTINGS`; for a mixer that is not in it,
            `num_heads` if it takes that.
        embed_dim: channels of the first stage, a multiple of `head_dim`; they double per stage.
        depths: blocks per stage.
        head_dim: channels per attention head, where the mixer's paper has none of its own.
        mlp_ratio: hidden width of the feed-forward networks over the stage's channels.
        img_size: side of the images that tables of the mixers are made for; any size is taken.
        nano: take the settings for images of 32 pixels.
        init_std: standard deviation of the initial weights of linear layers. The papers' 0.02
            leaves layers of few channels so small that comparisons of tokens are learned late.
        kwargs: further arguments of `Pyramid`, which win over those set here.

    Raises:
        ValueError: a mixer is unknown, or specs are not one or one per stage.
        TypeError: a spec is malformed, or an argument is unknown.
    """
    stages = len(depths)
    dims = [embed_dim * 2**i for i in range(stages)]
    maps = [max(1, img_size // (4 * 2**i)) for i in range(stages)]
    specs = _per_stage(mixers, stages)
    first = [sum(depths[:i]) for i in range(stages)]
    filled = []
    for stage, depth in enumerate(depths):
        in_turn = specs[stage] if isinstance(specs[stage], list) else [specs[stage]]
        if not in_turn:
            raise ValueError(f"testbed: mixers={mixers!r} has an empty list for stage {stage}")
        places = (
            Place(
                stage, block, first[stage] + block, sum(depths), dims[stage],
                dims[stage] // head_dim, maps[stage],
            )
            for block in range(depth)
        )  # fmt: skip
        filled.append([_filled(in_turn[p.block % len(in_turn)], p, nano) for p in places])
    arguments = {
        "stem": ConvStem,
        "downsample": ConvDownsample,
        "block": partial(Block, mlp_ratio=mlp_ratio),
        "dims": dims,
        "depths": depths,
        "mixers": filled,
    }
    with torch.random.fork_rng(devices=[]):  # layers of mixers draw when they are made
        model = Pyramid(**{**arguments, **kwargs})
    with torch.no_grad():
        _draw_outside_first(model, init_std / 0.02)
    return model


def _per_stage(mixers: Any, stages: int) -> list[Any]:
    """One entry per stage: `mixers` for all, or its entries.

    Raises:
        ValueError: their number is not that of the stages.
    """
    single = isinstance(mixers, str) or is_mixer_spec(mixers)
    if single or not isinstance(mixers, Sequence):
        return [mixers] * stages
    if len(mixers) == 1:
        return [mixers[0]] * stages
    if len(mixers) != stages:
        raise ValueError(
            f"testbed: mixers={mixers!r} must be one spec, or have one entry for each of "
            f"{stages} stages"
        )
    return list(mixers)


def _filled(spec: Any, place: Place, nano: bool) -> Any:
    """`spec` with the settings of its place, where it leaves them open."""
    if isinstance(spec, str):
        name, given = spec, {}
    elif is_mixer_spec(spec):
        name, given = spec
    else:
        return spec  # the pyramid says what is wrong
    if name not in MIXERS:
        return spec
    return (name, {**arguments_for(name, place, nano), **given})


def _draw_outside_first(model: nn.Module, gain: float) -> None:
    """Draw all parameters anew, those of mixers last: how many they are changes no other.

    The weights of linear layers are drawn as ever, and multiplied by the gain.
    """
    inside = {
        id(part)
        for mixer in model.modules()
        if isinstance(mixer, Mixer)
        for part in mixer.modules()
    }
    for wanted in (False, True):
        for module in _leaves_first(model):
            if (id(module) in inside) == wanted:
                init_module(module)
                if gain != 1 and isinstance(module, nn.Linear):
                    module.weight.mul_(gain)


def _leaves_first(module: nn.Module) -> Iterator[nn.Module]:
    """The order of `nn.Module.apply`."""
    for child in module.children():
        yield from _leaves_first(child)
    yield module


_BUILDERS = {
    "nano": partial(
        testbed, embed_dim=16, depths=(2, 2, 1), head_dim=8, mlp_ratio=2.0, img_size=32, nano=True
    ),
    "tiny": partial(testbed, embed_dim=96, depths=(2, 2, 6, 2), drop_path_rate=0.2),
    "small": partial(testbed, embed_dim=96, depths=(2, 2, 18, 2), drop_path_rate=0.3),
}
SIZES = tuple(_BUILDERS)


def name_of(mixer: str, size: str) -> str:
    """The registered name of a mixer's testbed.

    Raises:
        ValueError: there is none.
    """
    if mixer not in SETTINGS or size not in SIZES:
        raise ValueError(
            f"there is no testbed of mixer={mixer!r} and size={size!r}; sizes are "
            f"{', '.join(SIZES)}, mixers {', '.join(sorted(SETTINGS))}"
        )
    return f"testbed_{mixer}_{size}"


def _checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """There are no official names."""
    return state_dict


_CFG = imagenet_cfg(224, first_conv="stem.conv1", license="apache-2.0")

for _size in SIZES:
    # `testbed_tiny` by itself is that of plain attention, to be given other mixers.
    _variants = {f"testbed_{_size}": partial(_BUILDERS[_size], mixers="attention")}
    for _mixer in sorted(SETTINGS):
        _variants[name_of(_mixer, _size)] = partial(_BUILDERS[_size], mixers=_mixer)
    register_family(
        __name__,
        _variants,
        default_cfgs=dict.fromkeys(_variants, NANO_CFG if _size == "nano" else _CFG),
        published={},
        checkpoint_filter_fn=_checkpoint_filter_fn,
        out_indices=(0, 1, 2) if _size == "nano" else (0, 1, 2, 3),
        listed=False,
    )
