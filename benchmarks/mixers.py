"""Mixers beside timm's modules with the same weights, projections included, in turns.

Every peer is checked to give the mixer's output before it is timed. Process CPU time on one thread;
on CUDA time between events.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.benchmarks import memory, record, timer
from vitarium.benchmarks.arguments import DTYPES, device_named, known
from vitarium.benchmarks.record import Record
from vitarium.ops import MIXERS, Mixer, build_mixer

OURS = "vitarium"
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
MODES = ("forward", "training")

# From a mixer, a module with its weights that maps (B, H, W, C) as it does, or (B, C, H, W) if the
# peer's name ends in "nchw".
Build = Callable[[Mixer, tuple[int, int]], nn.Module]


@dataclass(frozen=True)
class Contest:
    """A mixer on a map, and who else computes the same.

    The floor is a module that does a part of the work that is due in any case; its output is not
    compared.
    """

    note: str
    mixer: str
    dim: int
    size: tuple[int, int]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    peers: Mapping[str, Build] = field(default_factory=dict)
    floor: Build | None = None


@dataclass(frozen=True)
class Outcome:
    """Records of what was timed, and what was not and why: "contest: peer: reason"."""

    records: list[Record]
    refused: list[str]


def bench_mixers(
    names: Sequence[str] = (),
    *,
    device: str | None = None,
    batch_size: int = 16,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    modes: Sequence[str] = MODES,
    match: str = "",
    threads: int = 1,
    min_rounds: int = 7,
    seconds: float = 5.0,
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Measure mixers beside timm's modules.

    Args:
        names: mixers; all that have peers if empty.
        device: "cpu" or "cuda"; CUDA if there is any, if None.
        batch_size: images. Four of 14 x 14 are so few tokens that calls of small operations count.
        dtypes: of weights and maps.
        modes: of "forward" (in inference mode) and "training" (forward and backward).
        match: only contests whose note contains this.
        threads: threads that torch uses on the CPU.
        min_rounds: samples per module at least.
        seconds: time given to each contest in each dtype and mode.
        output: JSON Lines file that records are appended to.
        progress: called with a line about each contest.

    Raises:
        ValueError: an argument is unknown or out of range.
    """
    from vitarium.benchmarks.mixer_peers import CONTESTS

    target = device_named(device)
    known("mixer", names, MIXERS)
    known("mode", modes, MODES)
    known("dtype", dtypes, DTYPES)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    contests = [c for c in CONTESTS if match in c.note and (not names or c.mixer in names)]
    if not contests:
        raise ValueError(f"no contest of {', '.join(names) or 'any mixer'} matches {match!r}")
    outcome = Outcome([], [])
    with timer.torch_threads(threads):
        for contest in contests:
            for dtype in dtypes:
                for mode in modes:
                    progress(f"{contest.mixer} {contest.note} {dtype} {mode}")
                    found = _measured(
                        contest, dtype, mode, batch_size, target, min_rounds, seconds, outcome
                    )
                    if output is not None:
                        record.append(output, found)
                    outcome.records.extend(found)
    return outcome


def build_contest(
    contest: Contest, dtype: str, device: torch.device
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The mixer and its peers by name, and by name why a peer is none: it fails or differs."""
    torch.manual_seed(0)
    mixer = build_mixer((contest.mixer, dict(contest.arguments)), contest.dim)
    for parameter in mixer.parameters():  # nothing may be without effect
        nn.init.normal_(parameter, std=max(1, parameter.shape[-1]) ** -0.5)
    modules: dict[str, nn.Module] = {OURS: mixer.eval()}
    refused: dict[str, str] = {}
    x = torch.randn(1, *contest.size, contest.dim)
    with torch.no_grad():
        expected = mixer(x)
        for name, build in contest.peers.items():
            try:
                module = build(mixer, contest.size).eval()
                error = (_output(name, module, x) - expected).abs().max() / expected.abs().max()
            except Exception as failure:  # a peer's own failure must not end the comparison
                refused[name] = f"{type(failure).__name__}: {failure}"
                continue
            if not error <= TOLERANCE["float32"]:  # nor is an error that is no number
                refused[name] = f"wrong result: error {error:.2g}"
            else:
                modules[name] = module
    if contest.floor is not None:
        modules["floor"] = contest.floor(mixer, contest.size).eval()
    return {name: m.to(device, DTYPES[dtype]) for name, m in modules.items()}, refused


def _channels_first(name: str) -> bool:
    return name.endswith("nchw")


def _output(name: str, module: nn.Module, x: Tensor) -> Tensor:
    if not _channels_first(name):
        return module(x)
    return module(x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)


def _measured(
    contest: Contest,
    dtype: str,
    mode: str,
    batch_size: int,
    device: torch.device,
    min_rounds: int,
    seconds: float,
    outcome: Outcome,
) -> list[Record]:
    modules, refused = build_contest(contest, dtype, device)
    setting = f"{contest.mixer} {contest.note} {dtype} {mode}"
    outcome.refused.extend(f"{setting}: {name}: {why}" for name, why in refused.items())
    shape = (batch_size, *contest.size, contest.dim)
    x = torch.randn(shape, device=device, dtype=DTYPES[dtype])
    calls = {
        name: call(module, x.permute(0, 3, 1, 2).contiguous() if _channels_first(name) else x, mode)
        for name, module in modules.items()
    }
    samples = timer.interleave(
        calls,
        device=device,
        min_rounds=min_rounds,
        max_rounds=max(min_rounds, 200),
        seconds=seconds,
        flush_cache=True,
        cuda_graphs=False,
    )
    series = record.new_series()
    return [
        record.measured(
            samples=samples[name],
            clock="cuda" if device.type == "cuda" else "cpu",
            machine=record.this_machine(device),
            images=batch_size,
            series=series,
            kind="mixer",
            name=contest.mixer,
            implementation=name,
            mode=mode,
            dtype=dtype,
            shapes={"x": list(shape)},
            arguments=dict(contest.arguments),
            case=contest.note,
            params=sum(p.numel() for p in modules[name].parameters()),
            peak_memory=memory.peak_growth(call, device),
        )
        for name, call in calls.items()
    ]


def call(module: nn.Module, x: Tensor, mode: str) -> Callable[[], object]:
    """A call of the module in a mode of `MODES`."""
    if mode == "forward":

        def forward() -> Tensor:
            with torch.inference_mode():
                return module(x)

        return forward
    x = x.clone().requires_grad_()
    grad = torch.randn_like(x)
    inputs = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x), inputs, grad, allow_unused=True)
