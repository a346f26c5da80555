"""Arguments that the measurements of models and of operators share, and their checks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def known(kind: str, names: Sequence[str], allowed: Iterable[str]) -> tuple[str, ...]:
    """`names` without repetitions, in order.

    Raises:
        ValueError: one is not among those allowed; the message has the nearest or all of them.
    """
    allowed = list(allowed)
    for name in names:
        if name not in allowed:
            nearest = difflib.get_close_matches(name, allowed, n=3)
            hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
            raise ValueError(f"{kind}={name!r} is unknown; {hint}allowed are {', '.join(allowed)}")
    return tuple(dict.fromkeys(names))


def device_named(name: str | None) -> torch.device:
    """The device of this name; a CUDA device if there is one, if None or "auto".

    Raises:
        ValueError: it is neither the CPU nor a CUDA device, or is not there.
    """
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is unknown; allowed are cpu and cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} cannot be timed; allowed are cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device
