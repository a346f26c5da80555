"""What a backbone or a mixer gives for what it costs: points of records, in comparable sets."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from timm.models import is_model

from vitarium import zoo
from vitarium.benchmarks import flops, report, table, testbed
from vitarium.benchmarks.mixers import OURS
from vitarium.benchmarks.plot import published_accuracies
from vitarium.benchmarks.record import Record
from vitarium.benchmarks.testbed_views import Row, kind_of


class Axis(NamedTuple):
    """A quantity of points.

    Attributes:
        label: with the unit.
        better: "more" or "less".
    """

    label: str
    better: str = "less"


AXES: Mapping[str, Axis] = {
    "accuracy": Axis("top-1 accuracy, %", "more"),
    "forward": Axis("forward, ms per image"),
    "throughput": Axis("throughput, images/s", "more"),
    "training": Axis("forward and backward, ms per image"),
    "gflops": Axis("GFLOPs"),
    "params": Axis("parameters, millions"),
    "memory": Axis("peak memory of a forward, MiB"),
    "training_memory": Axis("peak memory of forward and backward, MiB"),
}


@dataclass(frozen=True)
class Point:
    """A model, or the testbed with one mixer.

    Attributes:
        name: what it is; with the implementation if it is a peer.
        values: by axis, those that are known.
        groups: by what points can be coloured by, such as {"family": "nat"}.
        note: the input, the number of seeds and the like.
        margin: half the confidence interval of the accuracy, per cent.
        peer: whether it is another's code that ours is compared with.
    """

    name: str
    values: dict[str, float]
    groups: dict[str, str]
    note: str
    margin: float | None = None
    peer: bool = False


@dataclass(frozen=True)
class PointSet:
    """Points that can be compared: one machine, clock, data type and batch size.

    Attributes:
        title: what they share.
        accuracy: what the accuracy is of.
        memory: what the memory counts.
        points: at least two.
        records: that the points are from.
    """

    title: str
    accuracy: str
    memory: str
    points: list[Point]
    records: list[Record] = field(repr=False)

    @property
    def axes(self) -> list[str]:
        """Those that two points or more have a value on."""
        return [key for key in AXES if sum(key in p.values for p in self.points) > 1]

    @property
    def remark(self) -> str:
        """What accuracy and memory mean, if there are any."""
        axes = self.axes
        parts = [f"Accuracy: {self.accuracy}."] if "accuracy" in axes else []
        parts += [f"Memory: {self.memory}."] if any("memory" in axis for axis in axes) else []
        return " ".join(parts)

    @property
    def colours(self) -> list[str]:
        """What tells points apart."""
        keys = dict.fromkeys(key for p in self.points for key in p.groups)
        return [key for key in keys if len({p.groups.get(key) for p in self.points}) > 1]


def point_sets(records: Sequence[Record]) -> list[PointSet]:
    """Sets of models, the most known accuracies first, then of the testbed; last without any."""
    records = [r for r in records if r.failure is None or r.kind == "run"]
    models = sorted(_model_sets(records), key=lambda s: -_known_accuracies(s))
    sets = [*models, *_testbed_sets(records)]
    sets = [s for s in sets if len(s.points) > 1 and len(s.axes) > 1]
    return sorted(sets, key=lambda s: not _known_accuracies(s))


def _known_accuracies(points: PointSet) -> int:
    return sum("accuracy" in p.values for p in points.points)


# --- models --------------------------------------------------------------------------------------


def _model_sets(records: Sequence[Record]) -> list[PointSet]:
    groups: dict[tuple, list[Record]] = {}
    for r in records:
        shape = next(iter(r.shapes.values()), [])
        if r.kind == "model" and len(shape) == 4 and not testbed.is_of_testbed(r):
            alone = r.implementation in ("eager", "compiled")
            loop = bool(r.arguments.get("loop"))
            groups.setdefault((r.machine, r.clock, r.dtype, shape[0], alone, loop), []).append(r)
    accuracies = _accuracies([r for found in groups.values() for r in found])
    sets = []
    for (_, _, dtype, batch, alone, _), found in groups.items():
        sets.append(
            PointSet(
                f"Models, {report.plural(batch, 'image')}, {dtype}, {report.place(found[-1])}",
                "ImageNet-1K, as published",
                "weights, input and what the call adds" if alone else "what the call adds",
                [_model_point(modes, accuracies) for modes in _members(found)],
                found,
            )
        )
    return sets


def _members(records: Iterable[Record]) -> list[dict[str, Record]]:
    """The records of each model by mode, the last ones and those at its own image size first."""
    sizes: dict[tuple, dict[int, dict[str, Record]]] = {}
    for r in records:
        side = next(iter(r.shapes.values()))[-1]
        by_size = sizes.setdefault((r.name, r.implementation, json.dumps(r.arguments)), {})
        by_size.setdefault(side, {})[r.mode] = r
    return [
        by_size.get(_own_side(name)) or list(by_size.values())[-1]
        for (name, *_), by_size in sizes.items()
    ]


def _own_side(name: str) -> int:
    """The side of the images that a model is made for; 0 of an unknown one."""
    return flops.pretrained_cfg(name).input_size[-1] if is_model(name) else 0


def _accuracies(records: Sequence[Record]) -> dict[tuple[str, int], float]:
    """Published top-1 by name and side of the image that it was published for."""
    found = {}
    for name, top1 in published_accuracies(records).items():
        figures = zoo.published(name)
        if figures is not None:
            found[name, figures.resolution] = top1
    return found


def _model_point(modes: Mapping[str, Record], accuracies: Mapping[tuple, float]) -> Point:
    r = modes.get("forward") or next(iter(modes.values()))
    shape = next(iter(r.shapes.values()))
    batch, side = shape[0], shape[-1]
    values = _measures(modes.get("forward"), modes.get("training"), batch)
    params, macs = r.params, r.macs
    if macs is None and is_model(r.name):
        macs = _counted(r.name, side)[0]
    if params is not None:
        values["params"] = params / 1e6
    if macs is not None:
        values["gflops"] = macs / 1e9
    if (r.name, side) in accuracies:
        values["accuracy"] = accuracies[r.name, side]
    ours = r.name in zoo.list_models()
    groups = {
        "mixer": _counted(r.name, side)[1] if ours else "of timm",
        "family": table.family_of(r.name),
        "implementation": r.implementation,
    }
    note = "x".join(map(str, shape)) + (
        ", channels-last" if r.arguments.get("channels_last") else ""
    )
    name = r.name if r.implementation in (OURS, "eager") else f"{r.name} ({r.implementation})"
    return Point(name, values, groups, note, peer=is_peer(r))


@functools.cache
def _counted(name: str, side: int) -> tuple[int, str]:
    """Multiply-adds of a registered model, and its mixers; this takes a part of a second."""
    model = flops.on_meta(name, side)
    return flops.count(model, side).macs, table.mixers_of(model)


def is_peer(r: Record) -> bool:
    """Whether a record of a model is of another's code."""
    return r.implementation not in (OURS, "eager", "compiled")


def _measures(forward: Record | None, training: Record | None, batch: int) -> dict[str, float]:
    """What two records say of one thing, per image."""
    values = {}
    if forward is not None:
        values["forward"] = 1e3 * forward.median / batch
        values["throughput"] = batch / forward.median
        if forward.peak_memory is not None:
            values["memory"] = forward.peak_memory / 2**20
    if training is not None:
        values["training"] = 1e3 * training.median / batch
        if training.peak_memory is not None:
            values["training_memory"] = training.peak_memory / 2**20
    return values


# --- the testbed ---------------------------------------------------------------------------------


def _testbed_sets(records: Sequence[Record]) -> list[PointSet]:
    sets = []
    machines = dict.fromkeys(r.machine for r in records)
    for machine in machines:
        found = [r for r in records if r.machine == machine and testbed.is_of_testbed(r)]
        for rows in testbed.rows_by_recipe(found):
            measured = [r for row in rows for r in (row.forward, row.training) if r is not None]
            if not measured:
                continue
            batch = measured[0].shapes["input"][0]
            arguments = measured[0].arguments
            sets.append(
                PointSet(
                    f"Testbed: every mixer in {arguments['model']}, trained on "
                    f"{arguments['data']}; batch {batch}, {report.place(measured[0])}",
                    f"held-out images of {arguments['data']}, mean over seeds",
                    "weights and what the call adds",
                    [_testbed_point(row, batch) for row in rows if row.forward is not None],
                    measured,
                )
            )
    return sets


def _testbed_point(row: Row, batch: int) -> Point:
    values = _measures(row.forward, row.training, batch)
    forward = row.forward
    if forward is not None and forward.params is not None:
        values["params"] = forward.params / 1e6
    if forward is not None and forward.macs is not None:
        values["gflops"] = forward.macs / 1e9
    if row.accuracy is not None:
        values["accuracy"] = 100 * row.accuracy
    margin = None if row.margin is None else 100 * row.margin
    note = f"accuracy of {report.plural(len(row.accuracies), 'seed')}"
    return Point(row.mixer, values, {"attends to": kind_of(row.mixer)}, note, margin)
