"""What GPUs can do at most: warps that one multiprocessor holds, and the roofline of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from vitarium.benchmarks.kernel_compiler import Row

WARP = 32
REGISTER_UNIT = 256  # registers that a warp is given at a time
SHARED_UNIT = 128  # bytes of shared memory that a block is given at a time
SHARED_RESERVED = 1024  # bytes of every block that the system keeps
TENSOR_MEMORY = 512  # columns per multiprocessor, where there is tensor memory


@dataclass(frozen=True)
class Chip:
    """A GPU with a compute capability.

    Attributes:
        gpu: its name.
        shared_block, shared_multiprocessor: bytes of shared memory that a block can have, and that
            the blocks of a multiprocessor share.
        peaks: operations per second of matrix products by what is multiplied (dense), as `Row` has
            it; "f32" is done without tensor cores.
        exponentials: per second.
        bandwidth: of the memory, bytes per second.
        warps, blocks, registers: that one multiprocessor holds.
    """

    gpu: str
    shared_block: int
    shared_multiprocessor: int
    peaks: dict[str, float]
    exponentials: float
    bandwidth: float
    warps: int = 64
    blocks: int = 32
    registers: int = 65536


def _peaks(half: float, tf32: float, single: float) -> dict[str, float]:
    """Peaks from what data sheets give, in teraFLOPS."""
    return {"bf16": half * 1e12, "f16": half * 1e12, "tf32": tf32 * 1e12, "f32": single * 1e12}


# Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
# Exponentials: there, "Arithmetic Instructions", 16 results per cycle and multiprocessor (exp2),
# beside 64 (8.0) or 128 (9.0, 10.0) multiply-adds of float32: 1/8 or 1/16 of the float32 peak.
CHIPS = {
    # NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM.
    80: Chip("A100", 163 << 10, 164 << 10, _peaks(312, 156, 19.5), 19.5e12 / 8, 2.039e12),
    # NVIDIA H100 Tensor Core GPU data sheet, H100 SXM; half of what is printed with sparsity.
    90: Chip("H100", 227 << 10, 228 << 10, _peaks(989.5, 494.5, 67), 67e12 / 16, 3.35e12),
    # NVIDIA Blackwell Architecture Technical Brief, HGX B200, per GPU; half of sparse figures.
    100: Chip("B200", 227 << 10, 228 << 10, _peaks(2250, 1100, 80), 80e12 / 16, 8e12),
}


@dataclass(frozen=True)
class Occupancy:
    """Warps that one multiprocessor holds at most, and what there is no more of."""

    warps: int
    limited_by: str


def occupancy(row: Row) -> Occupancy:
    """An estimate of the occupancy: as many blocks as every resource has room for.

    Blocks = the least of: 32; 64 warps / warps of a block; registers, 65536 of them, of which a
    warp takes its 32 times as many as a thread, rounded up to 256, and warps of all four
    schedulers alike; bytes of shared memory of the multiprocessor / those of a block and 1024 of
    the system, rounded up to 128; and 512 columns of tensor memory / those of a block.
    """
    chip = CHIPS[row.capability]
    per_warp = _round_up(max(1, row.registers) * WARP, REGISTER_UNIT)
    warps = chip.registers // per_warp // 4 * 4
    shared = _round_up(row.shared_memory + SHARED_RESERVED, SHARED_UNIT)
    room = {
        "threads": chip.warps // row.num_warps,
        "blocks": chip.blocks,
        "registers": warps // row.num_warps,
        "shared memory": chip.shared_multiprocessor // shared,
    }
    if row.tensor_memory:
        room["tensor memory"] = TENSOR_MEMORY // row.tensor_memory
    limit = min(room, key=lambda name: room[name])
    return Occupancy(room[limit] * row.num_warps, limit)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@dataclass(frozen=True)
class Bound:
    """The roofline of a kernel on a chip.

    Attributes:
        intensity: operations of matrix products per byte; None if nothing is moved.
        tflops: 10^12 operations of matrix products per second at most; None without any.
        limited_by: "products", "exponentials" or "memory".
        cached_tflops, cached_limited_by: the same if every byte were found in a cache; None if
            there is nothing but bytes.
    """

    intensity: float | None
    tflops: float | None
    limited_by: str | None
    cached_tflops: float | None
    cached_limited_by: str | None


def per_pass(row: Row) -> tuple[int, dict[str, int], int]:
    """Bytes, operations by type and exponentials of a step; of all of a kernel without loops."""
    if row.operations_step or row.bytes_step:
        return row.bytes_step, row.operations_step, row.exponentials_step
    return row.bytes_outside, row.operations_outside, row.exponentials_outside


def roofline(row: Row) -> Bound:
    """What the chip's peaks leave to a step of the kernel (to all of it, if it has no loop).

    Each resource takes work / peak, and the slowest one bounds the rate: matrix products,
    exponentials, and memory as if every byte came from it. Tiles that other blocks have left in a
    cache come faster: what holds for those in any case is the bound without memory. Other
    arithmetic and addresses are not counted.
    """
    chip = CHIPS[row.capability]
    moved, operations, exponentials = per_pass(row)
    seconds = {
        "products": sum(count / chip.peaks[kind] for kind, count in operations.items()),
        "exponentials": exponentials / chip.exponentials,
        "memory": moved / chip.bandwidth,
    }
    total = sum(operations.values())

    def bound(*names: str) -> tuple[float | None, str | None]:
        slowest = max(names, key=lambda name: seconds[name])
        if not seconds[slowest]:
            return None, None
        return (total / seconds[slowest] / 1e12 if total else None), slowest

    return Bound(
        total / moved if moved else None,
        *bound("products", "exponentials", "memory"),
        *bound("products", "exponentials"),
    )
