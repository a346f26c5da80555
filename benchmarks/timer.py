"""The clock: interleaved runs of several candidates in one process, after warm-up until steady.

Neighbouring processes, frequency and temperature drift while a benchmark runs; candidates that
take turns see the same drift, so their ratios are worth more than their times. What is kept is
every sample. On the CPU two clocks run at once: wall time, and process CPU time, which other
processes disturb least but which adds up all threads, so that it compares implementations only
where each runs on one thread. On CUDA there are events.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping

import torch

Candidate = Callable[[], object]
Samples = dict[str, list[float]]

STEADY_RUNS = 3  # warm-up ends when so many runs in a row are no longer faster than the best...
STEADY_GAIN = 0.03  # ... by more than this share of it
WARM_UP_SECONDS = 5.0  # per candidate, if it never gets steady
SAMPLE_SECONDS = 1e-3  # a CPU sample lasts at least so long: short calls are repeated within it
SETTLE_SECONDS = 0.1  # a CPU sample of a call faster than this follows a call that is not timed
# Written before a CUDA run: more than a second-level cache holds, and so much that it takes longer
# than Python needs to launch what follows; a sixteenth of the device's memory at most.
FLUSH_BYTES = 1 << 30


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Torch computes with `count` threads within the block; None leaves their number alone.

    Raises:
        ValueError: `count` is below 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"threads={count} must be at least 1")
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    candidates: Mapping[str, Candidate],
    *,
    device: torch.device | str = "cpu",
    min_rounds: int = 7,
    max_rounds: int = 100,
    seconds: float = 5.0,
    flush_cache: bool = False,
    cuda_graphs: bool = False,
) -> dict[str, Samples]:
    """Time candidates in turn, round after round.

    Args:
        candidates: functions without arguments, by name.
        device: where they work.
        min_rounds: every candidate gets at least so many samples...
        max_rounds: ... and at most so many,
        seconds: between the two, rounds end after so much wall time.
        flush_cache: on CUDA, overwrite the second-level cache before each run, so that inputs
            come from memory as they do within a model.
        cuda_graphs: on CUDA, capture each candidate once and replay it: the time of its kernels
            without the time to launch them. A candidate must be complete: the backward of a graph
            that was recorded outside cannot be captured.

    Returns:
        Seconds per call by candidate and clock: "wall" and "cpu" on the CPU, "cuda" on CUDA.

    Raises:
        ValueError: there are no candidates, or the numbers of rounds contradict each other.
    """
    if not candidates:
        raise ValueError("candidates is empty; there is nothing to time")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"need 1 <= min_rounds={min_rounds} <= max_rounds={max_rounds}")
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _interleave_cuda(
                candidates, min_rounds, max_rounds, seconds, flush_cache, cuda_graphs
            )
    fastest = {name: _warm_up(run, lambda: None) for name, run in candidates.items()}

    def sample(name: str) -> dict[str, float]:
        run = candidates[name]
        if fastest[name] < SETTLE_SECONDS:
            run()  # a short call would pay for what the candidate before it left in the caches
        repeat = max(1, math.ceil(SAMPLE_SECONDS / max(fastest[name], 1e-9)))
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeat):
            run()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return {"wall": wall / repeat, "cpu": cpu / repeat}

    samples: dict[str, Samples] = {name: {"wall": [], "cpu": []} for name in candidates}
    for names in _rounds(list(candidates), min_rounds, max_rounds, seconds):
        for name in names:
            for clock, value in sample(name).items():
                samples[name][clock].append(value)
    return samples


def _rounds(
    names: list[str], min_rounds: int, max_rounds: int, seconds: float
) -> Iterator[list[str]]:
    """The order of every round: each begins one candidate later, so none always follows another.

    The garbage collector rests meanwhile.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for number in range(max_rounds):
            if number >= min_rounds and time.perf_counter() >= end:
                break
            first = number % len(names)
            yield names[first:] + names[:first]
    finally:
        if collecting:
            gc.enable()


def _warm_up(run: Candidate, synchronize: Callable[[], None]) -> float:
    """Run until the runs no longer get faster; seconds of the fastest."""
    fastest, steady, spent = math.inf, 0, 0.0
    while steady < STEADY_RUNS and spent < WARM_UP_SECONDS:
        start = time.perf_counter()
        run()
        synchronize()
        elapsed = time.perf_counter() - start
        spent += elapsed
        steady = steady + 1 if elapsed > fastest * (1 - STEADY_GAIN) else 0
        fastest = min(fastest, elapsed)
    return fastest


def _interleave_cuda(
    candidates: Mapping[str, Candidate],
    min_rounds: int,
    max_rounds: int,
    seconds: float,
    flush_cache: bool,
    cuda_graphs: bool,
) -> dict[str, Samples]:
    """Events around every run. A round's runs are queued together and waited for at its end, so
    that the GPU rarely waits for Python; what it does wait is part of the time of a run.
    """
    for run in candidates.values():
        _warm_up(run, torch.cuda.synchronize)
    if cuda_graphs:
        candidates = {name: _capture(run) for name, run in candidates.items()}
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    size = min(FLUSH_BYTES, memory // 16)
    flush = torch.empty(size, dtype=torch.int8, device="cuda") if flush_cache else None
    samples: dict[str, Samples] = {name: {"cuda": []} for name in candidates}
    for names in _rounds(list(candidates), min_rounds, max_rounds, seconds):
        events = {}
        for name in names:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if flush is not None:
                flush.zero_()
            start.record()
            candidates[name]()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            samples[name]["cuda"].append(start.elapsed_time(end) / 1e3)
    return samples


def _capture(run: Candidate) -> Candidate:
    """A replay of what `run` launches. It is warmed up on a side stream, as capture requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
