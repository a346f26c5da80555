"""Where something ran: the processor, versions of the libraries, and the commit of this package."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

_VERSIONED = ("torch", "triton", "timm", "natten", "vitarium")


def processor(device: torch.device | str = "cpu") -> str:
    """The name of the processor behind `device`."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name()


@functools.cache
def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        if found:
            return found[1]
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a measurement depends on, where installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["torch"] = torch.__version__  # says which CUDA it was built for
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = _output("nvidia-smi", *query)
    return {name: version for name, version in found.items() if version}


@functools.cache
def commit() -> str | None:
    """The commit of the repository that this package is run from, or None if it is installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    head = _output("git", "-C", str(root), "rev-parse", "HEAD")
    own = (".", ":!benchmarks/results")  # records that are being written change no code
    changed = _output(
        "git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", *own
    )
    return f"{head}+dirty" if head and changed else head


def _output(*command: str) -> str | None:
    """What a command prints, its first line; None if it is absent, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None
