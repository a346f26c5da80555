"""What mixers read and what they cost: the data of the atlas (`vitarium explain --mixers`).

A mixer's formula is its class's `cost`; its exponent is measured (`vitarium.benchmarks.scaling`).
What a position reads is the mixer's own attention map, or where it has none the size of the
output's gradient by every position of the input. The gradient also tells what is reached otherwise:
through statistics of the map, through convolutions, or through what weights are made of.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
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
SEEDS = 12  # draws of weights and map; of what content chooses one is shown, or all would blur

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
    "alpha": "a",
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
        reads: `(SIDE, SIDE)`, how much the output at `QUERY` attends to every position, 1 at most.
        reached: `(SIDE, SIDE)`, whether it depends on that position in any way.
        exponent: p such that the measured time grows with tokens to the power of p.
    """

    mixer: str
    kind: str
    reads: Tensor
    reached: Tensor
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
        name: power.exponent
        for (name, _, mode), power in exponents(scaling_records(records)).items()
        if mode == "forward"
    }
    return [
        Entry(name, kind_of(name), *what_is_read(name), growth.get(name))
        for name in names or sorted(MIXERS)
    ]


def scaling_records(records: Iterable[Record]) -> list[Record]:
    """Those of `bench_scaling` in float32: of mixers whose case is the size of their map."""
    return [
        r
        for r in records
        if r.kind == "mixer"
        and r.dtype == "float32"
        and r.case == "x".join(map(str, next(iter(r.shapes.values()))[1:-1]))
    ]


def what_is_read(name: str) -> tuple[Tensor, Tensor]:
    """How much an output attends to every position, and whether it depends on it in any way.

    Returns:
        `(SIDE, SIDE)` in float64, at most 1, the mean over heads or channels and over draws of
        weights and map (one draw, if the mixer is `routed`); and `(SIDE, SIDE)` in bool.
    """
    place = Place(0, 0, 0, 2, DIM, 2, SIDE)
    arguments = arguments_for(name, place, nano=True) or dict(MIXERS[name].examples[0])
    arguments.pop("dim", None)
    reads = reached = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        for seed in range(1 if MIXERS[name].routed else SEEDS):
            torch.manual_seed(seed)
            mixer = build_mixer((name, arguments), DIM).eval()
            for parameter in mixer.parameters():  # nothing may be without effect
                torch.nn.init.normal_(parameter, std=max(1, parameter.shape[-1]) ** -0.5)
            mixer = mixer.double()
            x = torch.randn(1, SIDE, SIDE, DIM, dtype=torch.float64)
            gradient = _sensitivity(mixer, x)
            try:
                weights = mixer.attention_map(x, QUERY)[0].abs().mean(0)
            except NotImplementedError:
                weights = gradient
            reads = reads + weights / weights.max()
            reached = reached + gradient / gradient.max()
    return reads / reads.max(), (reached > 1e-12) | (reads > 0)


def _sensitivity(mixer: Mixer, x: Tensor) -> Tensor:
    """Size of the gradient of a random combination of the output's channels, per position."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        output = mixer(x)[0, QUERY[0], QUERY[1]]
        (grad,) = torch.autograd.grad(output @ torch.randn_like(output), x)
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
    mixer = MIXERS[name](**arguments)
    parameters = inspect.signature(type(mixer).__init__).parameters
    values: dict[str, Any] = {"min": min, "sum": np.sum, "range": np.arange}
    for key in re.findall(r"[a-z_]+", mixer.cost):
        value = arguments.get(key, parameters[key].default if key in parameters else None)
        if key not in values:  # what None stands for, the mixer knows
            value = getattr(mixer, key) if value is None else value
            values[key] = np.array(value) if isinstance(value, tuple) else value
    values |= {"H": height, "W": width, "N": height * width, "C": arguments["dim"]}
    return float(eval(mixer.cost, {"__builtins__": {}}, values))


def formula(name: str) -> str:
    """A mixer's cost as a line of text, with the letters of `LETTERS`."""
    text = MIXERS[name].cost
    if text == "0":
        return "no matrix products"
    for argument, letter in sorted(LETTERS.items(), key=lambda item: -len(item[0])):
        text = re.sub(rf"\b{argument}\b", letter, text)
    text = text.replace("**2", "²").replace("**4", "⁴").replace("//", "/").replace("sum", "Σ")
    text = text.replace("f*range(L)", "f*l")
    text = re.sub(r"(?<=\d)\*(?=\d)", " · ", text)
    return text.replace("*", "")


def letters_of(names: Sequence[str]) -> dict[str, list[str]]:
    """By letter, the arguments that it stands for in the formulas of these mixers."""
    found: dict[str, list[str]] = {}
    for argument, letter in LETTERS.items():
        if any(re.search(rf"\b{argument}\b", MIXERS[name].cost) for name in names):
            found.setdefault(letter, []).append(argument)
    return found
