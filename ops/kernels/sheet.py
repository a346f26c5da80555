"""The kernel sheet: what the compiler makes of every launch configuration, without a GPU.

The launchers run on `meta` tensors while Triton believes in a device of a given compute capability;
each kernel is compiled as a real launch would compile it, and its binary is read.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vitarium.ops.kernels import launch, neighborhood
from vitarium.ops.kernels.tiles import HEAD_DIMS

NARROW = 8  # side of a map on which square tiles are visited least

CAPABILITIES = (80, 90, 100)
# Bytes of shared memory one block can have (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORE = {"mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}


@dataclass(frozen=True)
class Call:
    """A call of the operator, as far as it decides what is compiled."""

    rank: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    has_bias: bool = False
    kernel_size: int = 7
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False
    length: int = 64  # of every spatial dimension


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    Attributes:
        kernel: name of the kernel function.
        capability: compute capability, 80 for 8.0.
        query_tile, key_tile: tokens of a tile along (z, y, x).
        registers: per thread.
        stack: bytes of local memory per thread; spilled registers live there.
        shared_memory: bytes per block.
        tensor_core: instructions that multiply matrices on tensor cores; empty if none.
    """

    kernel: str
    capability: int
    call: Call
    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    shared_memory: int
    tensor_core: tuple[str, ...]

    @property
    def faults(self) -> list[str]:
        """What is wrong with the configuration; empty if nothing is."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of registers are spilled")
        limit = SHARED_MEMORY[self.capability]
        if self.shared_memory > limit:
            found.append(f"{self.shared_memory} bytes of shared memory exceed {limit}")
        if self.call.dtype != torch.float32 and not self.tensor_core:
            found.append("no tensor-core instructions")
        return found


def calls() -> list[Call]:
    """Calls that together reach every entry of the launch table.

    Per head_dim and element size: maps of one to three dimensions, a narrow map, and with a bias
    the call that needs most registers, in three dimensions, dilated and strided.
    """
    found = []
    for head_dim, dtype in itertools.product(HEAD_DIMS, (torch.bfloat16, torch.float32)):
        found += [
            Call(2, head_dim, dtype),
            Call(3, head_dim, dtype, has_bias=True, kernel_size=3, stride=2, dilation=2),
            Call(1, head_dim, dtype),
            Call(2, head_dim, dtype, length=NARROW),
        ]
    return found


class _Device:
    """Stands in for Triton's driver: a device that compiles and cannot launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> str:
        return f"sheet of {self.capability}"  # Triton caches kernels by device

    def get_current_stream(self, device: Any = None) -> int:
        return 0


@contextlib.contextmanager
def _compiling(capability: int) -> Iterator[list[tuple[dict[str, Any], dict[str, Any], Any]]]:
    """Within the block launches compile: yields the list of (arguments, options, kernel)."""
    compiled: list[tuple[dict[str, Any], dict[str, Any], Any]] = []

    def record(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        if not isinstance(kernel, JITFunction):
            raise RuntimeError("the kernel sheet needs the compiler; unset TRITON_INTERPRET")
        binary = kernel.warmup(**arguments, **options, grid=(1,))
        compiled.append((arguments, options, binary))

    launch.recorder = record
    triton.runtime.driver.set_active(_Device(capability))
    try:
        yield compiled
    finally:
        launch.recorder = None
        triton.runtime.driver.set_active(None)  # the real driver is found again when needed


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and local memory of a binary, as cuobjdump prints them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def _meta(call: Call, heads: int) -> list[torch.Tensor]:
    """Query, key and value of the call, as views of one projection."""
    spatial = (call.length,) * call.rank
    shape = (2, *spatial, 3, heads, call.head_dim)
    return list(torch.empty(shape, dtype=call.dtype, device="meta").unbind(-3))


def compile_call(call: Call, capability: int, *, heads: int = 2) -> list[Row]:
    """Compiles the kernels of a call, forward and backward, and reads their binaries."""
    query, key, value = _meta(call, heads)
    windows = ((call.kernel_size, call.stride, call.dilation, call.is_causal),) * call.rank
    bias = None
    if call.has_bias:
        table = (2 * call.kernel_size - 1,) * call.rank
        bias = torch.empty(heads, *table, device="meta")
    with _compiling(capability) as compiled:
        output, logsumexp = neighborhood.forward(query, key, value, bias, windows, 1.0)
        neighborhood.backward(
            output, query, key, value, bias, output, logsumexp, windows, 1.0, call.has_bias
        )
    rows = []
    for arguments, options, binary in compiled:
        used = _resources(binary.asm["cubin"])
        ptx = binary.asm["ptx"]
        rows.append(
            Row(
                kernel=binary.metadata.name,
                capability=capability,
                call=call,
                query_tile=arguments["QUERY_TILE"],
                key_tile=arguments["KEY_TILE"],
                num_warps=options["num_warps"],
                num_stages=options["num_stages"],
                registers=used["REG"],
                stack=used["STACK"] + used["LOCAL"],
                shared_memory=binary.metadata.shared,
                tensor_core=tuple(n for n, code in TENSOR_CORE.items() if re.search(code, ptx)),
            )
        )
    return rows


def sheet(
    which: Iterable[Call] | None = None, capabilities: Sequence[int] = CAPABILITIES
) -> list[Row]:
    """Compiles calls, all of `calls()` if None, for each compute capability."""
    which = calls() if which is None else list(which)
    return [
        row for capability in capabilities for c in which for row in compile_call(c, capability)
    ]
