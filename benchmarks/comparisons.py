"""Ours beside the floor and the best peer of the same run, one comparison per setting.

Times of one run were taken in turns, so their ratio means something. Whether it is more than noise
is judged by the spread of the samples: where the ranges from the 10th to the 90th percentile
overlap, there is no verdict.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from vitarium.benchmarks.candidates import FLOOR
from vitarium.benchmarks.mixers import OURS
from vitarium.benchmarks.record import Record

OUR_BACKENDS = ("torch", "triton")  # of operators; "natten" is a peer's code
Verdict = Literal["faster", "slower", "within the spread"]


@dataclass(frozen=True)
class Comparison:
    """One setting of an operator, a mixer or a model.

    Attributes:
        ours: our fastest implementation.
        floor: a part of the work that is due in any case, if it was measured.
        peer: the fastest of those that give the same results, if there is one.
    """

    ours: Record
    floor: Record | None
    peer: Record | None

    @property
    def over_floor(self) -> float | None:
        """Our median over the floor's."""
        return None if self.floor is None else self.ours.median / self.floor.median

    @property
    def over_peer(self) -> float | None:
        """Our median over the peer's: less than 1 is faster than the peer."""
        return None if self.peer is None else self.ours.median / self.peer.median

    @property
    def verdict(self) -> Verdict | None:
        """How ours stands to the peer; None without a peer."""
        return None if self.peer is None else _verdict(self.ours, self.peer)

    @property
    def at_floor(self) -> bool:
        """Whether the spread is larger than the difference to the floor."""
        return self.floor is not None and _verdict(self.ours, self.floor) == "within the spread"


def _verdict(ours: Record, other: Record) -> Verdict:
    if ours.p90 < other.p10:
        return "faster"
    return "slower" if ours.p10 > other.p90 else "within the spread"


def compared(records: Iterable[Record]) -> list[Comparison]:
    """A comparison per setting and machine that ours and a floor or a peer were measured in.

    Only records of one commit and the same versions are compared; of several such runs the latest
    counts, and of several records of one implementation in it the last.
    """
    runs: dict[tuple, dict[tuple, dict[str, Record]]] = {}
    for r in records:
        if r.kind != "run" and r.failure is None:
            run = (r.commit, json.dumps(r.versions, sort_keys=True), r.clock)
            setting = runs.setdefault((r.setting, r.machine), {})
            setting.setdefault(run, {})[r.implementation] = r
    latest = (max(of.values(), key=_last_date) for of in runs.values())
    found = (_comparison(list(run.values())) for run in latest)
    return [c for c in found if c is not None]


def _last_date(run: dict[str, Record]) -> str:
    return max(r.date for r in run.values())


def _comparison(run: Sequence[Record]) -> Comparison | None:
    operator = run[0].kind == "operator"
    names = OUR_BACKENDS if operator else (OURS,)
    ours = _fastest(r for r in run if r.implementation in names)
    floor = _fastest(r for r in run if r.implementation == FLOOR)
    # An operator's candidates without an error were not checked: they compute something else.
    peer = _fastest(
        r
        for r in run
        if r.implementation not in (*names, FLOOR) and not (operator and r.error is None)
    )
    if ours is None or floor is peer is None:
        return None
    return Comparison(ours, floor, peer)


def _fastest(records: Iterable[Record]) -> Record | None:
    return min(records, key=lambda r: r.median, default=None)
