"""Where a model's forward time goes: token mixer, channel MLP, convolution, norm, the rest.

Hooks read the clock around modules. A module counts where it stands outermost: a norm within a
token mixer is the mixer's. Mixers are split once more, into their projections (linear layers and
convolutions) and the operator itself. Mixers of other people's models are told by class name.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from vitarium.ops import Mixer

OPERATOR = "mixer operator"
PROJECTIONS = "mixer projections"
CHANNEL_MLP = "channel MLP"
CONVOLUTION = "convolution"
NORM = "norm"
REST = "rest"
PARTS = (OPERATOR, PROJECTIONS, CHANNEL_MLP, CONVOLUTION, NORM, REST)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def forward_parts(model: nn.Module, x: Tensor, *, repeats: int = 10) -> dict[str, float]:
    """Share of the forward time spent in each of `PARTS`; the shares add up to 1.

    The clock is process CPU time on the CPU, and elsewhere wall time with the device waited for
    at every reading, which costs small modules more than large ones.

    Args:
        model: in eval mode; not compiled (hooks would be compiled away or break the graph).
        x: its input.
        repeats: forward passes; medians of their shares are returned.
    """
    clock = _clock(x.device)
    spent: defaultdict[str, float] = defaultdict(float)
    handles = []
    for module, part, outer in _attributed(model):
        handles += _time(module, part, outer, clock, spent)
    shares: dict[str, list[float]] = {part: [] for part in PARTS}
    try:
        with torch.inference_mode():
            for number in range(repeats + 2):
                spent.clear()
                start = clock()
                model(x)
                total = clock() - start
                if number >= 2:  # the first two warm up
                    spent[REST] = total - sum(spent.values())
                    for part in PARTS:
                        shares[part].append(spent[part] / total)
    finally:
        for handle in handles:
            handle.remove()
    medians = {part: statistics.median(values) for part, values in shares.items()}
    scale = sum(medians.values())
    return {part: share / scale for part, share in medians.items()}


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type == "cpu":
        return time.process_time

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def _time(
    module: nn.Module,
    part: str,
    outer: str | None,
    clock: Callable[[], float],
    spent: dict[str, float],
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that add a module's time to `part`, and take it from the part around it, if any."""
    start = 0.0

    def before(*_: object) -> None:
        nonlocal start
        start = clock()

    def after(*_: object) -> None:
        elapsed = clock() - start
        spent[part] += elapsed
        if outer is not None:
            spent[outer] -= elapsed

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _attributed(module: nn.Module) -> Iterator[tuple[nn.Module, str, str | None]]:
    """Modules to time: the module, its part, and the part that it is within."""
    part = _part(module)
    if part is None:
        for child in module.children():
            yield from _attributed(child)
        return
    yield module, part, None
    if part == OPERATOR:
        for inner in module.modules():
            if isinstance(inner, (nn.Linear, *_CONVOLUTIONS)):
                yield inner, PROJECTIONS, OPERATOR


def _part(module: nn.Module) -> str | None:
    name = type(module).__name__
    if isinstance(module, Mixer):
        return OPERATOR
    if re.search("Mlp|MLP|FeedForward|FFN", name):
        return CHANNEL_MLP
    if re.search("Attention|Attn", name):
        # A class that is called attention and holds an MLP is a whole block.
        holds_mlp = any(_part(inner) == CHANNEL_MLP for inner in module.children())
        return None if holds_mlp else OPERATOR
    if isinstance(module, _CONVOLUTIONS):
        return CONVOLUTION
    if "Norm" in name:
        return NORM
    return None
