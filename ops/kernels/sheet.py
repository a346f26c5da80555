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
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vitarium.ops import dispatch
from vitarium.ops.dispatch import Case, Operator
from vitarium.ops.kernels import launch

CAPABILITIES = (80, 90, 100)
# Bytes of shared memory one block can have (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORE = {"mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    Attributes:
        operator, case: what was called; the note of the case.
        kernel: name of the kernel function.
        capability: compute capability, 80 for 8.0.
        tiles: compile-time sizes of tiles and blocks, by name.
        registers: per thread.
        stack: bytes of local memory per thread; spilled registers live there.
        shared_memory: bytes per block.
        tensor_core: instructions that multiply matrices on tensor cores; empty if none.
        products: whether the kernel multiplies matrices at all.
    """

    operator: str
    case: str
    dtype: torch.dtype
    kernel: str
    capability: int
    tiles: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    shared_memory: int
    tensor_core: tuple[str, ...]
    products: bool

    @property
    def faults(self) -> list[str]:
        """What is wrong with the configuration; empty if nothing is."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of registers are spilled")
        limit = SHARED_MEMORY[self.capability]
        if self.shared_memory > limit:
            found.append(f"{self.shared_memory} bytes of shared memory exceed {limit}")
        if self.dtype != torch.float32 and self.products and not self.tensor_core:
            found.append("no tensor-core instructions")
        return found

    def __str__(self) -> str:
        tiles = " ".join(f"{name}={value}" for name, value in self.tiles.items())
        return (
            f"{self.operator} ({self.case}, {self.dtype}) {self.kernel} sm_{self.capability} "
            f"{tiles}: {self.registers} registers, {self.shared_memory} bytes shared"
        )


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


def compile_case(operator: Operator, case: Case, dtype: torch.dtype, capability: int) -> list[Row]:
    """Compiles the kernels of a call, forward and backward, and reads their binaries."""
    tensors = {}
    for name, shape in case.shapes.items():
        tensor = torch.empty(shape, device="meta")
        if name in case.values:
            tensor = case.values[name](torch.Generator(), shape).to("meta")
        tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    # What the operator's implementations are called with.
    with dispatch.recording() as calls, torch.no_grad():
        operator.function(**tensors, **case.kwargs, backend="triton")
    operation, args = operator.operation, calls[0].args
    count = operation.count
    with _compiling(capability) as compiled:
        output, saved = operation.forward(*args, True)
        needs = tuple(isinstance(t, Tensor) and t.is_floating_point() for t in args[:count])
        operation.backward(output, *args[:count], output, saved, *args[count:], True, needs)
    rows = []
    for arguments, options, binary in compiled:
        used = _resources(binary.asm["cubin"])
        ptx = binary.asm["ptx"]
        rows.append(
            Row(
                operator=operator.name,
                case=case.note,
                dtype=dtype,
                kernel=binary.metadata.name,
                capability=capability,
                tiles={k: v for k, v in arguments.items() if re.search("TILE|BLOCK", k)},
                num_warps=options["num_warps"],
                num_stages=options["num_stages"],
                registers=used["REG"],
                stack=used["STACK"] + used["LOCAL"],
                shared_memory=binary.metadata.shared,
                tensor_core=tuple(n for n, code in TENSOR_CORE.items() if re.search(code, ptx)),
                products="tt.dot" in binary.asm["ttir"],
            )
        )
    return rows


def sheet(
    operators: Iterable[Operator],
    capabilities: Sequence[int] = CAPABILITIES,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
) -> Iterator[Row]:
    """Compiles the operators' launch cases for each compute capability and data type."""
    for operator in operators:
        for capability, dtype, case in itertools.product(capabilities, dtypes, operator.launches):
            yield from compile_case(operator, case, dtype, capability)
