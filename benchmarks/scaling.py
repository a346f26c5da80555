"""How the time of mixers grows with the number of tokens.

A mixer claims by `Mixer.linear` that its cost grows no faster than the number of tokens. Here that
is measured: the same mixer on maps of 14 x 14 to 256 x 256, in turns.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import linregress, t

from vitarium.benchmarks import memory, record, timer
from vitarium.benchmarks.arguments import DTYPES, device_named, known
from vitarium.benchmarks.mixers import MODES, OURS, call
from vitarium.benchmarks.record import Record
from vitarium.ops import MIXERS, build_mixer

SIDES = (14, 28, 56, 112, 256)  # 196 to 65,536 tokens


def bench_scaling(
    names: Sequence[str] = (),
    *,
    device: str | None = None,
    batch_size: int = 1,
    dtypes: Sequence[str] = ("float32",),
    modes: Sequence[str] = ("forward",),
    sides: Sequence[int] = SIDES,
    threads: int = 1,
    seconds: float = 5.0,
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Record]:
    """Measure mixers, as their first example has them, on square maps of several sizes.

    Args:
        names: mixers; all that claim to be linear if empty.
        device: "cpu" or "cuda"; CUDA if there is any, if None.
        batch_size: images.
        dtypes: of weights and maps.
        modes: of "forward" (in inference mode) and "training" (forward and backward).
        sides: of the maps, in tokens; at least two.
        threads: threads that torch uses on the CPU.
        seconds: time given to each mixer in each dtype and mode.
        output: JSON Lines file that records are appended to.
        progress: called with a line about each mixer.

    Raises:
        ValueError: a name is unknown, or a number is impossible.
    """
    target = device_named(device)
    known("mixer", names, MIXERS)
    known("mode", modes, MODES)
    known("dtype", dtypes, DTYPES)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if len(set(sides)) < 2 or min(sides) < 1:
        raise ValueError(f"sides={tuple(sides)} must be at least two sizes of 1 or more")
    found: list[Record] = []
    with timer.torch_threads(threads):
        for name in names or [name for name, mixer in MIXERS.items() if mixer.linear]:
            for dtype in dtypes:
                for mode in modes:
                    progress(f"{name} {dtype} {mode}")
                    records = _measured(name, dtype, mode, batch_size, sides, target, seconds)
                    if output is not None:
                        record.append(output, records)
                    found += records
    return found


def _measured(
    name: str,
    dtype: str,
    mode: str,
    batch_size: int,
    sides: Sequence[int],
    device: torch.device,
    seconds: float,
) -> list[Record]:
    torch.manual_seed(0)
    arguments = dict(MIXERS[name].examples[0])
    dim = arguments.pop("dim")
    mixer = build_mixer((name, arguments), dim).eval().to(device, DTYPES[dtype])
    shapes = {f"{side}x{side}": (batch_size, side, side, dim) for side in sides}
    calls = {
        case: call(mixer, torch.randn(shape, device=device, dtype=DTYPES[dtype]), mode)
        for case, shape in shapes.items()
    }
    samples = timer.interleave(
        calls, device=device, min_rounds=5, seconds=seconds, flush_cache=True, cuda_graphs=False
    )
    series = record.new_series()
    return [
        record.measured(
            samples=samples[case],
            series=series,
            clock="cuda" if device.type == "cuda" else "cpu",
            machine=record.this_machine(device),
            images=batch_size,
            kind="mixer",
            name=name,
            implementation=OURS,
            mode=mode,
            dtype=dtype,
            shapes={"x": list(shape)},
            arguments=arguments,
            case=case,
            params=sum(p.numel() for p in mixer.parameters()),
            peak_memory=memory.peak_growth(calls[case], device),
        )
        for case, shape in shapes.items()
    ]


class Power(NamedTuple):
    """A power law's exponent, and half of its 95 % interval; no interval of two points."""

    exponent: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.exponent:.2f}" + ("" if self.error is None else f" ± {self.error:.2f}")


def power(points: Sequence[tuple[float, float]]) -> Power:
    """By which power of x y grows: the slope of the least-squares line through the logarithms.

    The interval is of that line, as if its residuals were independent: what it tells is how far
    the growth is from a power law, more than how exact the times are.

    Args:
        points: (x, y) of two different x at least, all above 0.
    """
    x, y = np.log(np.asarray(points, dtype=np.float64).T)
    line = linregress(x, y)
    if len(points) < 3:
        return Power(float(line.slope), None)
    return Power(float(line.slope), float(line.stderr * t.ppf(0.975, len(points) - 2)))


def exponents(records: Iterable[Record]) -> dict[tuple[str, str, str], Power]:
    """By mixer, data type and mode: by which power of the number of tokens the time grows."""
    points = defaultdict(list)
    for r in records:
        if r.median is not None:
            tokens = math.prod(r.shapes["x"][:-1])
            points[r.name, r.dtype, r.mode].append((tokens, r.median))
    return {setting: power(found) for setting, found in points.items()}
