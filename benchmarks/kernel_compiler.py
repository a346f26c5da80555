"""What the compiler makes of every launch configuration of the kernels, without a GPU.

The launchers run on `meta` tensors while Triton believes in a device of a given compute capability;
each kernel is compiled as a real launch would compile it, and its code is read.
"""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitarium.ops import dispatch
from vitarium.ops.dispatch import Case, Operator

# Instructions that multiply matrices on tensor cores, the slowest kind first: synchronous ones,
# and those that only capability 9.0 and 10.0 have.
TENSOR_CORE = {"mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}
_BYTES = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "f16": 2, "bf16": 2, "i16": 2, "i8": 1, "i1": 1}


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    What is counted per step is counted in one pass through the loops of the kernel, each body once
    (as often as it runs, where that is constant); `outside` is what lies before and after them. A
    kernel without loops has everything outside. Masked elements count.

    Attributes:
        operator, case: what was called; the note of the case.
        dtype: of the tensors, such as "bfloat16".
        target: such as "cuda:80" for compute capability 8.0.
        kernel: name of the kernel function.
        launch: number of the launch in the call, forward and backward, from 0.
        tiles: compile-time sizes of tiles and blocks, by name.
        registers: per thread.
        spilled: bytes of local memory per thread; spilled registers live there.
        shared_memory: bytes per block.
        tensor_memory: columns of tensor memory per block; capability 10.0 has 512.
        tensor_core: instructions in the PTX by kind, a key of `TENSOR_CORE`; empty if none.
        bytes_step, bytes_outside: that are loaded and stored.
        operations_step, operations_outside: of matrix products, 2 per multiply-add, by what is
            multiplied: "bf16", "f16", "tf32", or "f32" for products without tensor cores.
        exponentials_step, exponentials_outside: elements of which a power of 2 is taken.
        triton: version of Triton.
    """

    operator: str
    case: str
    dtype: str
    target: str
    kernel: str
    launch: int
    tiles: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int
    spilled: int
    shared_memory: int
    tensor_memory: int
    tensor_core: dict[str, int]
    bytes_step: int
    bytes_outside: int
    operations_step: dict[str, int]
    operations_outside: dict[str, int]
    exponentials_step: int
    exponentials_outside: int
    triton: str

    @property
    def capability(self) -> int:
        """Compute capability, 80 for 8.0."""
        return int(self.target.partition(":")[2])

    @property
    def products(self) -> bool:
        """Whether the kernel multiplies matrices at all."""
        return bool(self.operations_step or self.operations_outside)

    @property
    def key(self) -> tuple[str, str, str, str, str, int]:
        """What is compiled, whatever comes out of it; unique in a sheet."""
        return self.operator, self.case, self.dtype, self.target, self.kernel, self.launch

    def __str__(self) -> str:
        tiles = " ".join(f"{name}={value}" for name, value in self.tiles.items())
        return (
            f"{self.operator} ({self.case}, {self.dtype}) {self.kernel} "
            f"(launch {self.launch}) on {self.target} with {tiles}"
        )


class _Device:
    """Stands in for Triton's driver: a device that compiles and cannot launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> str:
        return f"sheet of {self.capability}"  # Triton caches kernels by device

    def get_current_stream(self, device: Any = None) -> int:
        return 0


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[tuple[dict[str, Any], dict[str, Any], Any]]]:
    """Within the block launches compile: yields the list of (arguments, options, kernel)."""
    import triton
    from triton.runtime.jit import JITFunction

    from vitarium.ops.kernels import launch

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


def compile_case(operator: Operator, case: Case, dtype: torch.dtype, capability: int) -> list[Row]:
    """Compiles the kernels of a call, forward and backward, and reads their code."""
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
    if operation is None:
        raise ValueError(f"operator {operator.name!r} has no kernels")
    count = operation.count
    with compiling(capability) as compiled:
        output, saved = operation.forward(*args, True)
        needs = tuple(isinstance(t, Tensor) and t.is_floating_point() for t in args[:count])
        operation.backward(output, *args[:count], output, saved, *args[count:], True, needs)
    rows = []
    for number, (arguments, options, binary) in enumerate(compiled):
        used = _resources(binary.asm["cubin"])
        found = {n: len(re.findall(code, binary.asm["ptx"])) for n, code in TENSOR_CORE.items()}
        work = count_work(binary.asm["ttir"])
        rows.append(
            Row(
                operator=operator.name,
                case=case.note,
                dtype=str(dtype).removeprefix("torch."),
                target=f"cuda:{capability}",
                kernel=binary.metadata.name,
                launch=number,
                tiles={k: _plain(v) for k, v in arguments.items() if re.search("TILE|BLOCK", k)},
                num_warps=options["num_warps"],
                num_stages=options["num_stages"],
                registers=used["REG"],
                spilled=used["STACK"] + used["LOCAL"],
                shared_memory=binary.metadata.shared,
                tensor_memory=binary.metadata.tmem_size,
                tensor_core={name: n for name, n in found.items() if n},
                bytes_step=work[True].bytes,
                bytes_outside=work[False].bytes,
                operations_step=dict(work[True].operations),
                operations_outside=dict(work[False].operations),
                exponentials_step=work[True].exponentials,
                exponentials_outside=work[False].exponentials,
                triton=binary.metadata.triton_version,
            )
        )
    return rows


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and local memory of a binary, as cuobjdump prints them."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


# --- bytes and operations ------------------------------------------------------------------------


@dataclass
class Work:
    """Bytes that are moved, operations of matrix products by type, and exponentials."""

    bytes: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    exponentials: int = 0


_LOOP = re.compile(r"\bscf\.(for|while)\b|} do {")
_CONSTANT_LOOP = re.compile(r"scf\.for \S+ = %c(\d+)_i32\S* to %c(\d+)_i32\S* step %c(\d+)_i32")
_POINTER = r"(?:tensor<((?:\d+x)+)!tt\.ptr<(\w+)>>|!tt\.ptr<(\w+)>)"
_MOVE = re.compile(rf"\btt\.(?:load|store)\b.* : {_POINTER}")
_PRODUCT = re.compile(
    r"\btt\.dot\b(.*) : tensor<(\d+)x(\d+)x([a-z]\w*)> \* tensor<\d+x(\d+)x[a-z]\w*>"
)
_UNKNOWN = re.compile(r"\btt\.(load|store|dot|dot_scaled|atomic\w*|descriptor\w*|gather)\b")
_EXPONENTIAL = re.compile(r"\bmath\.exp2? .* : (?:tensor<((?:\d+x)+)\w+>|\w+)")


def count_work(ttir: str) -> dict[bool, Work]:
    """The work in the loops of a kernel (True) and outside of them (False), see `Row`.

    Args:
        ttir: the kernel in Triton's first intermediate language, in which shapes of tiles are
            known, constants are folded and nothing is distributed to threads yet.

    Raises:
        ValueError: it moves or multiplies something in a way that is not known here.
    """
    found = {True: Work(), False: Work()}
    blocks: list[int | None] = []  # of the blocks around a line: passes of a loop, None if no loop
    for line in ttir.splitlines():
        line = re.sub(r"\s*loc\(.*\)$", "", line).strip()
        if line.startswith("}"):
            blocks.pop()
        passes = math.prod(count for count in blocks if count)
        work = found[any(blocks)]
        if move := _MOVE.search(line):
            shape, element, scalar = move.groups()
            work.bytes += passes * _elements(shape) * _BYTES[element or scalar]
        elif product := _PRODUCT.search(line):
            options, m, k, element, n = product.groups()
            if element == "f32" and "inputPrecision = tf32" in options:
                element = "tf32"
            work.operations[element] += passes * 2 * int(m) * int(k) * int(n)
        elif exponential := _EXPONENTIAL.search(line):
            work.exponentials += passes * _elements(exponential[1])
        elif unknown := _UNKNOWN.search(line):
            raise ValueError(f"the kernel sheet cannot count {unknown[0]}: {line}")
        if line.endswith("{"):
            blocks.append(_passes(line))
    return found


def _elements(shape: str | None) -> int:
    """Elements of a shape such as "32x64x"; a scalar has none."""
    return math.prod(map(int, (shape or "1x").split("x")[:-1]))


def _passes(line: str) -> int | None:
    """Passes of a loop that begins with this line, 1 if their number is not constant."""
    if not _LOOP.search(line):
        return None
    if constant := _CONSTANT_LOOP.search(line):
        start, stop, step = map(int, constant.groups())
        return max(1, -(-(stop - start) // step))
    return 1
