"""How the time of models grows with the size and with the number of images.

Two sweeps: one image of growing resolution, and a growing batch of images of the model's own size.
At every point the models take turns. What does not fit in memory or in time is a record without
samples that says so, and larger ones are not tried.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from vitarium.benchmarks import flops, record
from vitarium.benchmarks.models import bench_models
from vitarium.benchmarks.record import Record
from vitarium.benchmarks.scaling import Power, power

RESOLUTIONS = (128, 256, 512, 1024, 2048)
BATCH_SIZES = (1, 4, 16, 64, 256)
RESOLUTION, BATCH = "resolution", "batch size"


def bench_model_scaling(
    names: Sequence[str],
    *,
    resolutions: Sequence[int] = RESOLUTIONS,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    device: str | None = None,
    dtypes: Sequence[str] = ("float32",),
    modes: Sequence[str] = ("forward",),
    threads: int = 1,
    min_rounds: int = 3,
    seconds: float = 2.0,
    limit: float = 60.0,
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Record]:
    """Measure models on images of several sizes, and on batches of several sizes.

    Args:
        names: models registered with timm.
        resolutions: sides of the images, one per call; at least two, or none.
        batch_sizes: images of the model's own size; at least two, or none.
        device, dtypes, modes, threads: as in `bench_models`.
        min_rounds: samples at least per model and size.
        seconds: time given to each model at each size.
        limit: seconds that a call may take; a size at which it would, by what the one before took,
            is not tried.
        output: JSON Lines file that records are appended to.
        progress: called with a line about each size.

    Returns:
        A record per model, dtype, mode and size; `case` names the sweep.

    Raises:
        ValueError: a name is unknown, or a number is impossible.
    """
    for argument, sizes in (("resolutions", resolutions), ("batch_sizes", batch_sizes)):
        if len(set(sizes)) == 1 or any(size < 1 for size in sizes):
            raise ValueError(f"{argument}={tuple(sizes)} must be at least two sizes, or none")
    if not names or not (resolutions or batch_sizes):
        raise ValueError("nothing to measure: give models, and resolutions or batch_sizes")
    for name in names:
        flops.check_name(name)
    found: list[Record] = []
    for dtype, mode in itertools.product(dtypes, modes):
        for sweep, sizes in ((RESOLUTION, resolutions), (BATCH, batch_sizes)):
            last: dict[str, Record] = {}
            for size in sorted(set(sizes)):
                progress(f"{dtype} {mode}: {sweep} {size}")
                batch_size, image_size = (1, size) if sweep == RESOLUTION else (size, None)
                skipped = _not_tried(last, sweep, size, limit)
                due = [name for name in dict.fromkeys(names) if name not in skipped]
                measured = (
                    bench_models(
                        due,
                        modes=[mode],
                        batch_size=batch_size,
                        image_size=image_size,
                        dtype=dtype,
                        device=device,
                        threads=threads,
                        min_rounds=min_rounds,
                        seconds=seconds,
                        limit=limit,
                    )
                    if due
                    else []
                )
                records = [*(replace(r, case=sweep) for r in measured), *skipped.values()]
                last = {r.name: r for r in records}
                if output is not None:
                    record.append(output, records)
                found += records
    return found


def _not_tried(last: dict[str, Record], sweep: str, size: int, limit: float) -> dict[str, Record]:
    """Records of models that fail at this size if the smaller one tells the truth."""
    skipped = {}
    for name, before in last.items():
        channels, *image = before.shapes.get("input", [1, 3])[1:]
        shape = [1, channels, size, size] if sweep == RESOLUTION else [size, channels, *image]
        if before.median is None:
            why = before.failure or ""
            why = why if why.startswith(_SKIPPED) else f"{_SKIPPED}, a smaller one failed: {why}"
        else:
            expected = before.median * math.prod(shape) / math.prod(before.shapes["input"])
            if expected <= limit:
                continue
            why = f"{_SKIPPED}, it would take {expected:.0f} s or more of the {limit:g} s allowed"
        skipped[name] = record.failed(
            failure=why,
            shapes={"input": shape},
            case=sweep,
            **{field: getattr(before, field) for field in _KEPT},
        )
    return skipped


_SKIPPED = "not tried"
_KEPT = ("kind", "name", "implementation", "mode", "dtype", "arguments", "clock", "machine")

Setting = tuple[str, str, str, str]  # name, dtype, mode, sweep


def growth(records: Iterable[Record]) -> dict[Setting, Power]:
    """By model, dtype, mode and sweep: by which power of the pixels of a call its time grows.

    In the sweep over resolutions these are the pixels of the image, in that over batches of all
    images. Of sweeps with two sizes or more that were measured.
    """
    points = defaultdict(list)
    for r in records:
        if r.median is not None:
            setting = r.name, r.dtype, r.mode, str(r.case)
            points[setting].append((math.prod(r.shapes["input"]), r.median))
    return {setting: power(found) for setting, found in points.items() if len(found) > 1}
