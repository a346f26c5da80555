"""Our backbones beside the models of the official repositories, with the same weights, in turns.

Both run in plain PyTorch in the same process, from the same state dict, and must give the same
logits before they are timed. Process CPU time on one thread; on CUDA time between events.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from vitarium.benchmarks import memory, record, timer
from vitarium.benchmarks.arguments import DTYPES, device_named, known
from vitarium.benchmarks.mixers import MODES, OURS, TOLERANCE, Outcome
from vitarium.benchmarks.official_code import OFFICIAL
from vitarium.zoo import load_checkpoint

THEIRS = "official"


def bench_official(
    names: Sequence[str] = (),
    *,
    clones: str | os.PathLike[str],
    device: str | None = None,
    batch_size: int = 4,
    image_size: int = 224,
    dtypes: Sequence[str] = ("float32",),
    modes: Sequence[str] = MODES,
    threads: int = 1,
    min_rounds: int = 5,
    seconds: float = 10.0,
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Measure backbones beside the official ones.

    Drop path and dropout are off in training: they would draw other numbers in either model.

    Args:
        names: backbones of `OFFICIAL`; all if empty.
        clones: a folder with clones of the official repositories.
        device: "cpu" or "cuda"; CUDA if there is any, if None.
        batch_size: images.
        image_size: side of the images; most official models take 224 only.
        dtypes: of weights and images; outputs are compared in float32 only.
        modes: of "forward" (in inference mode) and "training" (forward and backward).
        threads: threads that torch uses on the CPU.
        min_rounds: samples per model at least.
        seconds: time given to each backbone in each dtype and mode.
        output: JSON Lines file that records are appended to.
        progress: called with a line about each backbone.

    Returns:
        Records, and what was not timed because models differ or the official one fails.

    Raises:
        ValueError: an argument is unknown or out of range, or a repository is missing.
    """
    target = device_named(device)
    names = known("model", names, OFFICIAL) or tuple(OFFICIAL)
    known("mode", modes, MODES)
    known("dtype", dtypes, DTYPES)
    for argument, value in (("batch_size", batch_size), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"{argument}={value} must be at least 1")
    outcome = Outcome([], [])
    with timer.torch_threads(threads), torch.random.fork_rng():
        for name in names:
            torch.manual_seed(0)
            images = torch.randn(batch_size, 3, image_size, image_size, device=target)
            models, problem = _built(name, Path(clones), images)
            if problem:
                outcome.refused.append(f"{name}: {problem}")
                continue
            for dtype, mode in itertools.product(dtypes, modes):
                progress(f"{name} {dtype} {mode}")
                found = measured(name, models, images, dtype, mode, min_rounds, seconds)
                if output is not None:
                    record.append(output, found)
                outcome.records.extend(found)
    return outcome


def _built(name: str, clones: Path, images: Tensor) -> tuple[Mapping[str, nn.Module], str | None]:
    """Both models with the same weights, and why they cannot be compared."""
    try:
        theirs = OFFICIAL[name].build(clones)
    except ImportError as error:  # a package that its code needs
        return {}, f"{type(error).__name__}: {error}"
    ours = timm.create_model(name)
    try:
        load_checkpoint(ours, theirs.state_dict())
    except ValueError as error:
        return {}, str(error)
    models = {OURS: ours, THEIRS: theirs}
    return models, prepared(models, images)


def prepared(models: Mapping[str, nn.Module], images: Tensor) -> str | None:
    """Puts models in evaluation where the images are, without drop path; why they differ, or None.

    Args:
        models: ours, then the other one.
        images: the first is tried.
    """
    for model in models.values():
        model.eval().to(images.device)
        for module in model.modules():
            if isinstance(getattr(module, "drop_prob", None), float):
                module.drop_prob = 0.0
    try:
        with torch.inference_mode():
            have, want = (model(images[:1]) for model in models.values())
    except Exception as error:  # of either's own code: the other models are compared all the same
        return f"{type(error).__name__}: {error}"
    error = float((have - want).abs().max() / want.abs().max())
    return None if error <= TOLERANCE["float32"] else f"outputs differ: error {error:.2g}"


def measured(
    name: str,
    models: Mapping[str, nn.Module],
    images: Tensor,
    dtype: str,
    mode: str,
    min_rounds: int,
    seconds: float,
) -> list[record.Record]:
    """Records of models that take turns on the same images."""
    images = images.to(DTYPES[dtype])
    for model in models.values():
        model.to(images.dtype).train(mode == "training")
    calls = {key: _call(model, images, mode) for key, model in models.items()}
    samples = timer.interleave(
        calls,
        device=images.device,
        min_rounds=min_rounds,
        max_rounds=max(min_rounds, 100),
        seconds=seconds,
        flush_cache=True,
    )
    series = record.new_series()
    return [
        record.measured(
            samples=samples[key],
            clock="cuda" if images.device.type == "cuda" else "cpu",
            machine=record.this_machine(images.device),
            images=len(images),
            series=series,
            kind="model",
            name=name,
            implementation=key,
            mode=mode,
            dtype=dtype,
            shapes={"x": list(images.shape)},
            arguments={},
            case=f"{images.shape[2]}x{images.shape[3]} batch {len(images)}",
            params=sum(p.numel() for p in models[key].parameters()),
            peak_memory=memory.peak_growth(run, images.device),
        )
        for key, run in calls.items()
    ]


def _call(model: nn.Module, images: Tensor, mode: str) -> Callable[[], object]:
    if mode == "forward":

        def forward() -> Tensor:
            with torch.inference_mode():
                return model(images)

        return forward
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> object:
        logits = model(images)
        if isinstance(logits, tuple):  # of VOLO in training, with those of all tokens
            logits = logits[0]
        grad = torch.ones_like(logits)
        return torch.autograd.grad(logits, parameters, grad, allow_unused=True)

    return step
