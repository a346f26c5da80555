"""What mixers read and what they cost: the data of the atlas (`vitarium explain --mixers`).

A mixer's formula is its class's `cost`; its exponent is measured (`vitarium.benchmarks.scaling`).
What a position reads comes from the mixer's own attention map. Where it has none, keys being
pooled or there being none, it is the size of the output's gradient by every position of the input.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitarium.benchmarks.arguments import known
from vitarium.benchmarks.record import Record
from vitarium.benchmarks.scaling import exponents
from vitarium.benchmarks.testbed_views import kind_of
from vitarium.ops import MIXERS, Mixer, build_mixer
from vitarium.zoo.testbed_settings import Place, arguments_for

SIDE = 16  # of the map, in tokens
QUERY = (6, 9)  # off the middle, where no window, stripe or region is symmetric
DIM = 48
SEEDS = 4  # draws of weights and map; of what content chooses one is shown, or all would blur

# Arguments in formulas by the letters that papers have for them, in the order of the legend.
LETTERS = {
    "num_heads": "h",
    "n_heads": "h",
    "num_kv_heads": "g",
    "window_size": "w",
    "window_resolution": "w",
    "kernel_size": "k",
    "side_dwconv": "k",
    "kernels": "k",
    "split_size": "s",
    "sr_ratio": "s",
    "stride": "s",
    "agent_num": "n",
    "num_clusters": "n",
    "num_tokens": "n",
    "n_win": "r",
    "topk": "t",
    "group_size": "G",
    "grid_size": "G",
    "key_dim": "d",
    "qk_dim": "d",
    "pdim": "p",
    "patch_size": "p",
    "attn_ratio": "e",
    "expand_ratio": "e",
    "overlap_ratio": "e",
    "block_size": "b",
    "halo_size": "o",
    "radius": "R",
    "alpha": "α",
    "num_scales": "S",
    "focal_level": "L",
    "focal_window": "k",
    "focal_factor": "f",
    "input_resolution": "m",
    "reduce_n_factor": "u",
    "attn_keep_rate": "v",
}


@dataclass(frozen=True)
class Entry:
    """What the atlas says of a mixer.

    Attributes:
        mixer: its name.
        kind: what it attends to, a key of `testbed_views.COLOURS`.
        reads: `(SIDE, SIDE)`, how much the output at `QUERY` depends on every position; the largest
            is 1, and 0 what it does not depend on.
        from_attention: whether `reads` are attention weights, and no gradients.
        exponent: p such that the measured time grows with tokens to the power of p.
    """

    mixer: str
    kind: str
    reads: Tensor
    from_attention: bool
    exponent: float | None = None


def entries(names: Sequence[str] = (), records: Sequence[Record] = ()) -> list[Entry]:
    """An entry per mixer, as the small testbed has it on a map of 16 x 16 tokens.

    Args:
        names: mixers; all, if empty.
        records: of `bench_scaling`; other kinds are passed over.

    Raises:
        ValueError: a name is unknown.
    """
    known("mixer", names, MIXERS)
    growth = {
        name: exponent
        for (name, _, mode), exponent in exponents(_scaling(records)).items()
        if mode == "forward"
    }
    found = []
    for name in names or MIXERS:
        reads, from_attention = what_is_read(name)
        found.append(Entry(name, kind_of(name), reads, from_attention, growth.get(name)))
    return found


def _scaling(records: Sequence[Record]) -> list[Record]:
    """Of mixers by themselves, float32, on maps of several sizes of one width."""
    return [
        r
        for r in records
        if r.kind == "mixer" and r.dtype == "float32" and r.case == "x".join(map(str, _map(r)))
    ]


def _map(r: Record) -> list[int]:
    return next(iter(r.shapes.values()))[1:-1]


def what_is_read(name: str) -> tuple[Tensor, bool]:
    """How much an output depends on every position, and whether that is the mixer's attention.

    Returns:
        `(SIDE, SIDE)`, at most 1, the mean over heads or channels and over draws of weights and
        map; one draw, if the mixer is `routed`.
    """
    place = Place(0, 0, 0, 2, DIM, 2, SIDE)
    arguments = arguments_for(name, place, nano=True) or dict(MIXERS[name].examples[0])
    arguments.pop("dim", None)
    total, from_attention = torch.zeros(SIDE, SIDE), True
    with torch.random.fork_rng(devices=[]):
        for seed in range(1 if MIXERS[name].routed else SEEDS):
            torch.manual_seed(seed)
            mixer = build_mixer((name, arguments), DIM).eval()
            for parameter in mixer.parameters():  # nothing may be without effect
                torch.nn.init.normal_(parameter, std=max(1, parameter.shape[-1]) ** -0.5)
            x = torch.randn(1, SIDE, SIDE, DIM)
            try:
                weights = mixer.attention_map(x, QUERY)[0].abs().mean(0)
            except NotImplementedError:
                weights, from_attention = _sensitivity(mixer, x), False
            total += weights / weights.max()
    return total / total.max(), from_attention


def _sensitivity(mixer: Mixer, x: Tensor) -> Tensor:
    """Size of the gradient of random combinations of the output's channels, per position."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        output = mixer(x)[0, QUERY[0], QUERY[1]]
        (grad,) = torch.autograd.grad(output @ torch.randn(output.shape[0]), x)
    return grad[0].abs().mean(-1)


# --- cost -----------------------------------------------------------------------------------------


def multiply_adds(name: str, arguments: Mapping[str, Any], size: tuple[int, int]) -> float:
    """What the formula of a mixer says of a map.

    Args:
        name: mixer.
        arguments: of its constructor, `dim` among them.
        size: height and width of the map.
    """
    height, width = size
    mixer = build_mixer((name, {k: v for k, v in arguments.items() if k != "dim"}), arguments["dim"])
    parameters = inspect.signature(type(mixer).__init__).parameters
    values = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    values |= arguments
    for key, value in values.items():
        if value is None:  # what it is by default, the mixer knows
            values[key] = getattr(mixer, key, None)
        if isinstance(value, tuple):
            values[key] = np.array(value)
    names = {"H": height, "W": width, "N": height * width, "C": arguments["dim"]}
    functions = {"min": min, "sum": np.sum, "range": np.arange, "__builtins__": {}}
    return float(eval(type(mixer).cost, functions, {**values, **names}))


def formula(name: str) -> str:
    """A mixer's cost as a line of text, with the letters of `LETTERS`."""
    text = MIXERS[name].cost
    if text == "0":
        return "no matrix products"
    for argument, letter in sorted(LETTERS.items(), key=lambda item: -len(item[0])):
        text = re.sub(rf"\b{argument}\b", letter, text)
    text = text.replace("**2", "²").replace("**4", "⁴").replace("//", "/").replace("sum", "Σ")
    text = re.sub(r"(?<=\d)\*(?=\d)", " · ", text)
    return text.replace("*", "")


def letters_of(names: Sequence[str]) -> dict[str, list[str]]:
    """By letter, the arguments that it stands for in the formulas of these mixers."""
    found: dict[str, list[str]] = {}
    for argument, letter in LETTERS.items():
        if any(re.search(rf"\b{argument}\b", MIXERS[name].cost) for name in names):
            found.setdefault(letter, []).append(argument)
    return found
