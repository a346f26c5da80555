"""What an operator is measured on and against, beyond its own implementations and test cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitarium.ops import Case

MODES = ("forward", "backward", "training")


@dataclass(frozen=True)
class Peer:
    """Somebody else's way to compute an operator, or what one would use instead of it.

    Attributes:
        build: from a case and a device, a function of the case's tensors; or None if the case is
            too large for it.
        devices: where it runs unless peers are chosen by name.
        same_function: whether its results must equal the operator's.
    """

    build: Callable[[Case, torch.device], Callable[..., Tensor] | None]
    devices: Sequence[str]
    same_function: bool = True


@dataclass(frozen=True)
class Suite:
    """Standard settings, peers and floor of an operator.

    Attributes:
        cases: by batch size; the first dimension of a tensor counts the images.
        shared: tensors that all images have in common, such as a bias.
        peers: by name.
        floor: from a case, a mode of `MODES`, a data type and a device: a call that takes at
            least as long as any implementation must.
    """

    cases: Callable[[int], Sequence[Case]]
    peers: Mapping[str, Peer] = field(default_factory=dict)
    floor: Callable[[Case, str, torch.dtype, torch.device], Callable[[], object]] | None = None
    shared: Sequence[str] = ("bias",)


@dataclass(frozen=True)
class Setting:
    """What candidates are compared in: an operator's case, a data type and a mode of `MODES`.

    `cuda_graphs` says whether kernels are replayed, without the time to launch them.
    """

    operator: str
    case: Case
    dtype: str
    mode: str
    cuda_graphs: bool = False

    def __str__(self) -> str:
        return f"{self.operator} {self.case.note} {self.dtype} {self.mode}"
