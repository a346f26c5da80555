"""timm's models with our mixers beside the same models with timm's, same weights, in turns.

Both must give the same logits before they are timed. Process CPU time on one thread; on CUDA time
between events.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Sequence

import timm
import torch
from torch import nn

from vitarium.benchmarks import record, timer
from vitarium.benchmarks.arguments import DTYPES, device_named, known
from vitarium.benchmarks.mixers import MODES, OURS, Outcome
from vitarium.benchmarks.official import measured, prepared
from vitarium.zoo import fused, swap_mixers

THEIRS = "timm"
# One of every family, and of those that `swap_mixers` computes in more than one way several.
MODELS = (
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "maxvit_tiny_tf_224",
    "maxvit_rmlp_tiny_rw_256",
    "coatnet_0_rw_224",
    "davit_tiny",
    "halonet26t",
    "halonet50ts",
    "focalnet_tiny_srf",
    "volo_d1_224",
    "shvit_s1",
    "efficientvit_m0",
    "pvt_v2_b0",
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
)


def bench_swap(
    names: Sequence[str] = (),
    *,
    device: str | None = None,
    batch_size: int = 4,
    dtypes: Sequence[str] = ("float32",),
    modes: Sequence[str] = MODES,
    threads: int = 1,
    min_rounds: int = 5,
    seconds: float = 10.0,
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Measure timm's models with our mixers and with timm's, at their native size.

    Weights are random. Drop path is off in training: it would draw other numbers in either model.

    Args:
        names: timm's names, of which there is a `fused_<name>`; those of `MODELS` if empty.
        device: "cpu" or "cuda"; CUDA if there is any, if None.
        batch_size: images.
        dtypes: of weights and images; outputs are compared in float32 only.
        modes: of "forward" (in inference mode) and "training" (forward and backward).
        threads: threads that torch uses on the CPU.
        min_rounds: samples per model at least.
        seconds: time given to each model in each dtype and mode.
        output: JSON Lines file that records are appended to.
        progress: called with a line about each model.

    Returns:
        Records, and what was not timed because outputs differ.

    Raises:
        ValueError: an argument is unknown or out of range.
    """
    target = device_named(device)
    allowed = [name.removeprefix(fused.PREFIX) for name in timm.list_models(f"{fused.PREFIX}*")]
    names = known("model", names, allowed) or MODELS
    known("mode", modes, MODES)
    known("dtype", dtypes, DTYPES)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    outcome = Outcome([], [])
    with timer.torch_threads(threads), torch.random.fork_rng():
        for name in names:
            torch.manual_seed(0)
            theirs = timm.create_model(name)
            for parameter in theirs.parameters():
                if not parameter.any():  # of branches that begin with nothing
                    nn.init.normal_(parameter, std=0.1)
            ours = copy.deepcopy(theirs)
            swap_mixers(ours)
            size = timm.get_pretrained_cfg(name).input_size
            images = torch.randn(batch_size, *size, device=target)
            models = {OURS: ours, THEIRS: theirs}
            problem = prepared(models, images)
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
