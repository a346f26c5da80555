"""Peak memory of a call, as PyTorch's allocator sees it.

The same quantity on every device: the largest sum of tensors alive at once, counted by the
allocator. What libraries take by other ways (cuBLAS workspaces of the driver, MKL buffers, the
interpreter) and the allocator's own slack are not in it, so it is a little below what a process
shows in `top` or `nvidia-smi`, but it neither depends on what ran before nor on other processes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def peak_growth(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes by which `run` raises the allocator's total at most, above where it stood before."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The CPU allocator keeps no statistics; the profiler records each of its steps. Its library
    # reads this variable at its first use, and would announce every start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    steps = [event for event in events if event.get("name") == "[memory]"]
    total = peak = 0
    for step in sorted(steps, key=lambda event: event["ts"]):
        total += step["args"]["Bytes"]
        peak = max(peak, total)
    return peak


def resident(reset_peak: bool = False) -> tuple[int, int] | None:
    """Bytes of this process that are in memory now, and their peak; None but on Linux.

    Args:
        reset_peak: let the peak begin anew with this moment.
    """
    try:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS:", "VmHWM:")))
    if len(found) < 2:
        return None
    return int(found["VmRSS"].split()[0]) << 10, int(found["VmHWM"].split()[0]) << 10


def state_size(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
