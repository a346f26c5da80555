"""Measurements: records of operators and models, and their tables and pictures.

`bench_models`, `bench_operators` and `print_table` are what the command line calls.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitarium.benchmarks.flops import Counts, count
    from vitarium.benchmarks.models import bench_models
    from vitarium.benchmarks.operators import bench_operators
    from vitarium.benchmarks.record import Record
    from vitarium.benchmarks.report import print_table

# Imported when first asked for: the command line starts without matplotlib, fvcore and the zoo.
_HOMES = {
    "Counts": "flops",
    "Record": "record",
    "bench_models": "models",
    "bench_operators": "operators",
    "count": "flops",
    "print_table": "report",
}

__all__ = ["Counts", "Record", "bench_models", "bench_operators", "count", "print_table"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
