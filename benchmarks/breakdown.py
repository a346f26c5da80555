"""Where a model's forward time goes: by stage and by token mixer, channel MLP, convolution, ...

Hooks read the clock around modules, and a mode of torch around functions that only move tensors.
A module counts where it stands outermost: a norm within a token mixer is the mixer's. Mixers are
split once more, into their projections (linear layers and convolutions) and the operator itself.
Mixers of other people's models are told by class name.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitarium.ops import Mixer

OPERATOR = "mixer operator"
PROJECTIONS = "mixer projections"
CHANNEL_MLP = "channel MLP"
CONVOLUTION = "convolution"
NORM = "norm"
MOVES = "memory moves"
REST = "rest"
PARTS = (OPERATOR, PROJECTIONS, CHANNEL_MLP, CONVOLUTION, NORM, MOVES, REST)

Stages = dict[str, dict[str, float]]  # shares of the whole by stage and part

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What these return holds the numbers of what they are given. Some return views if they can; then
# they take next to no time. Within an operator of ours they are the operator's.
_MOVING = {
    *(getattr(Tensor, name) for name in ("contiguous", "clone", "reshape", "flatten", "copy_")),
    *(getattr(Tensor, name) for name in ("repeat", "roll", "to", "gather", "index_select")),
    *(torch.clone, torch.reshape, torch.flatten, torch.cat, torch.concat, torch.stack),
    *(torch.roll, torch.gather, torch.index_select, F.pad, F.unfold, F.pixel_shuffle),
}
_MOST_STAGES = 8  # of a list of more modules these are blocks, and all of them one stage


def forward_parts(model: nn.Module, x: Tensor, *, repeats: int = 10) -> dict[str, float]:
    """Share of the forward time spent in each of `PARTS`; the shares add up to 1.

    Args:
        model, x, repeats: as in `forward_stages`.
    """
    return parts_of(forward_stages(model, x, repeats=repeats))


def parts_of(stages: Stages) -> dict[str, float]:
    """The shares of all stages together, by part."""
    return {part: sum(shares[part] for shares in stages.values()) for part in PARTS}


def forward_stages(model: nn.Module, x: Tensor, *, repeats: int = 10) -> Stages:
    """Share of the forward time by stage and, within it, by part; all shares add up to 1.

    Stages are what the model's own modules are called, such as "stem" and "stages.0", in the order
    they are entered; "" is what is outside of all.

    The clock is process CPU time on the CPU, and elsewhere wall time with the device waited for
    at every reading, which costs small modules more than large ones.

    Args:
        model: in eval mode; not compiled (hooks would be compiled away or break the graph).
        x: its input.
        repeats: forward passes; medians of their shares are returned.
    """
    watch = _Watch(_clock(x.device))
    handles = []
    for module, key in _watched(model):
        handles.append(module.register_forward_pre_hook(watch.entering(key)))
        handles.append(module.register_forward_hook(watch.leaving()))
    passes: list[dict[_Key, float]] = []
    try:
        with torch.inference_mode():
            for _ in range(repeats + 2):
                watch.begin()
                with watch:
                    model(x)
                passes.append(watch.end())
    finally:
        for handle in handles:
            handle.remove()
    passes = passes[2:]  # the first two warm up
    keys = dict.fromkeys(key for shares in passes for key in shares)
    medians = {key: statistics.median(p.get(key, 0.0) for p in passes) for key in keys}
    total = sum(medians.values())
    stages: Stages = {}
    for (stage, part), share in medians.items():
        stages.setdefault(stage, dict.fromkeys(PARTS, 0.0))[part] = share / total
    return stages


class _Key(NamedTuple):
    stage: str
    part: str


class _Watch(TorchFunctionMode):
    """Shares of the time by key: what is entered counts for itself, and not for what is around."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self.clock = clock
        self.stack: list[tuple[_Key, float]] = []
        self.spent: defaultdict[_Key, float] = defaultdict(float)

    def begin(self) -> None:
        self.stack.clear()
        self.spent.clear()
        self._enter(_Key("", REST))

    def end(self) -> dict[_Key, float]:
        self._leave()
        total = sum(self.spent.values())
        return {key: seconds / total for key, seconds in self.spent.items()}

    def entering(self, key: _Key) -> Callable[..., None]:
        return lambda *_: self._enter(key)

    def leaving(self) -> Callable[..., None]:
        return lambda *_: self._leave()

    def _enter(self, key: _Key) -> None:
        self.spent[key] += 0.0  # keys stand in the order they are entered
        self.stack.append((key, self.clock()))

    def _leave(self) -> None:
        key, start = self.stack.pop()
        elapsed = self.clock() - start
        self.spent[key] += elapsed
        if self.stack:
            self.spent[self.stack[-1][0]] -= elapsed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _MOVING:
            return func(*args, **(kwargs or {}))
        self._enter(_Key(self.stack[-1][0].stage, MOVES))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._leave()


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type == "cpu":
        return time.process_time

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def _watched(model: nn.Module) -> Iterator[tuple[nn.Module, _Key]]:
    """Modules to time: every stage, for what is the rest in it, and its parts."""
    for name, module in model.named_children():
        listed = isinstance(module, (nn.ModuleList, nn.Sequential))
        if listed and 1 < len(module) <= _MOST_STAGES:
            for number, child in module.named_children():
                yield child, _Key(f"{name}.{number}", REST)
                yield from _attributed(child, f"{name}.{number}")
            continue
        if not isinstance(module, nn.ModuleList):  # which is not called itself
            yield module, _Key(name, REST)
        yield from _attributed(module, name)


def _attributed(module: nn.Module, stage: str) -> Iterator[tuple[nn.Module, _Key]]:
    part = _part(module)
    if part is None:
        for child in module.children():
            yield from _attributed(child, stage)
        return
    yield module, _Key(stage, part)
    if part == OPERATOR:
        for inner in module.modules():
            if isinstance(inner, (nn.Linear, *_CONVOLUTIONS)):
                yield inner, _Key(stage, PROJECTIONS)


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
