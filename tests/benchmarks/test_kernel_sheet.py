"""The kernel sheet: what is counted, what follows from it, and that a worse kernel is found."""

import dataclasses

import pytest
import torch

from vitarium.benchmarks import kernel_sheet
from vitarium.benchmarks.kernel_compiler import Row, count_work
from vitarium.benchmarks.kernel_limits import CHIPS, occupancy, roofline
from vitarium.cli.main import main

ROW = Row(
    operator="window_attention",
    case="map, head_dim 32",
    dtype="bfloat16",
    target="cuda:90",
    kernel="forward_kernel",
    launch=0,
    tiles={"QUERY_TILE": [1, 8, 8], "BLOCK_D": 32},
    num_warps=4,
    num_stages=2,
    registers=128,
    spilled=0,
    shared_memory=16384,
    tensor_memory=0,
    tensor_core={"wgmma": 8},
    bytes_step=4096,
    bytes_outside=8192,
    operations_step={"bf16": 262144},
    operations_outside={},
    exponentials_step=2048,
    exponentials_outside=64,
    triton="3.8.0",
)


def changed(**fields) -> Row:
    return dataclasses.replace(ROW, **fields)


# --- counting ------------------------------------------------------------------------------------

TTIR = """
module {
  tt.func public @kernel(%x: !tt.ptr<f32> {tt.divisibility = 16 : i32}) {
    %one = tt.load %x : !tt.ptr<f32> loc(#loc1)
    scf.if %some {
      %q = tt.load %p, %mask, %zero : tensor<16x32x!tt.ptr<bf16>> loc(#loc2)
    } loc(#loc2)
    %r = scf.for %i = %c0_i32 to %count step %c1_i32 iter_args(%a = %b) -> (tensor<16xf32>)  : i32 {
      %k = tt.load %p, %mask, %zero : tensor<64x32x!tt.ptr<bf16>> loc(#loc3)
      %s = tt.dot %q, %t, %z : tensor<16x32xbf16> * tensor<32x64xbf16> -> tensor<16x64xf32> loc(#l)
      %m = "tt.reduce"(%s) <{axis = 1 : i32}> ({
      ^bb0(%y: f32, %z: f32):
        tt.reduce.return %y : f32 loc(#loc4)
      }) : (tensor<16x64xf32>) -> tensor<16xf32> loc(#loc4)
      %w = math.exp2 %s : tensor<16x64xf32> loc(#loc5)
      scf.for %j = %c0_i32_1 to %c3_i32 step %c2_i32  : i32 {
        tt.store %p, %w, %mask : tensor<16x!tt.ptr<f32>> loc(#loc6)
      } loc(#loc6)
      scf.yield %m : tensor<16xf32> loc(#loc7)
    } loc(#loc7)
    %e = tt.dot %u, %v, %z, inputPrecision = tf32 : tensor<16x16xf32> * tensor<16x8xf32> -> \
tensor<16x8xf32> loc(#loc8)
    tt.return loc(#loc9)
  } loc(#loc)
} loc(#loc)
"""


def test_work_is_counted_in_loops_and_outside() -> None:
    work = count_work(TTIR)
    assert work[False].bytes == 4 + 16 * 32 * 2
    assert work[False].operations == {"tf32": 2 * 16 * 16 * 8}
    assert work[False].exponentials == 0
    assert work[True].bytes == 64 * 32 * 2 + 2 * (16 * 4)  # the inner loop runs twice
    assert work[True].operations == {"bf16": 2 * 16 * 32 * 64}
    assert work[True].exponentials == 16 * 64


def test_what_is_not_understood_is_not_left_out() -> None:
    with pytest.raises(ValueError, match=r"cannot count tt\.atomic_rmw"):
        count_work("%0 = tt.atomic_rmw fadd, relaxed, gpu, %p, %x : tensor<4xf32>")
    with pytest.raises(ValueError, match=r"cannot count tt\.dot"):
        count_work("%0 = tt.dot %a, %b, %c : tensor<2x16x16xf32> * tensor<2x16x16xf32>")


# --- what follows --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "warps", "limit"),
    [
        ({"registers": 32, "shared_memory": 0}, 64, "threads"),
        ({"registers": 16, "num_warps": 1, "shared_memory": 0}, 32, "blocks"),
        ({}, 16, "registers"),  # 65536 / (128 x 32)
        ({"registers": 129}, 12, "registers"),  # each of 4 schedulers: 16384 / 4352 is 3
        ({"registers": 32, "shared_memory": 113 << 10}, 8, "shared memory"),  # 228 / (113 + 1)
        ({"registers": 32, "shared_memory": (113 << 10) + 1}, 4, "shared memory"),
        ({"target": "cuda:80", "registers": 32, "shared_memory": 81 << 10}, 8, "shared memory"),
        ({"target": "cuda:100", "tensor_memory": 256}, 8, "tensor memory"),
    ],
)
def test_occupancy(fields: dict, warps: int, limit: str) -> None:
    found = occupancy(changed(**fields))
    assert (found.warps, found.limited_by) == (warps, limit)


def test_roofline() -> None:
    chip = CHIPS[90]
    bound = roofline(ROW)
    assert bound.intensity == 64
    assert bound.limited_by == "memory"
    assert bound.tflops == pytest.approx(64 * chip.bandwidth / 1e12)
    assert bound.cached_limited_by == "exponentials"  # 128 operations to hide each
    assert bound.cached_tflops == pytest.approx(128 * chip.exponentials / 1e12)
    wide = roofline(changed(operations_step={"bf16": 1 << 30}))
    assert wide.limited_by == wide.cached_limited_by == "products"
    assert wide.tflops == pytest.approx(chip.peaks["bf16"] / 1e12)
    # Products of two types take the sum of their times.
    mixed = roofline(changed(operations_step={"bf16": 1 << 30, "f32": 1 << 30}))
    slow = 1 / (1 / chip.peaks["bf16"] + 1 / chip.peaks["f32"])
    assert mixed.tflops == pytest.approx(2 * slow / 1e12)


def test_roofline_without_loops_and_without_products() -> None:
    whole = changed(
        bytes_step=0, operations_step={}, exponentials_step=0, operations_outside={"bf16": 8192}
    )
    assert roofline(whole).intensity == 1
    bound = roofline(dataclasses.replace(whole, operations_outside={}, exponentials_outside=0))
    assert (bound.limited_by, bound.tflops) == ("memory", None)
    assert (bound.cached_limited_by, bound.cached_tflops) == (None, None)


# --- comparison ----------------------------------------------------------------------------------

WORSE = [
    ({"registers": 137}, "registers: 128 -> 137"),
    ({"registers": 137}, "warps per multiprocessor: 16 -> 12"),
    ({"spilled": 8}, "spilled bytes: 0 -> 8"),
    ({"shared_memory": 240_000}, "bytes of shared memory: 16384 -> 240000, with a limit of 232448"),
    ({"tensor_core": {}}, "tensor-core instructions: wgmma -> none"),
    ({"tensor_core": {"mma": 64}}, "tensor-core instructions: wgmma -> mma"),
]
ALWAYS = WORSE[2:]


@pytest.mark.parametrize(("fields", "expected"), WORSE)
def test_a_worse_kernel_is_found(fields: dict, expected: str) -> None:
    complaints = kernel_sheet.compare([changed(**fields)], [ROW])
    name = "window_attention (map, head_dim 32, bfloat16) forward_kernel (launch 0) on cuda:90 with"
    assert any(
        line.startswith(name) and "QUERY_TILE=[1, 8, 8]" in line and line.endswith(expected)
        for line in complaints
    ), complaints


@pytest.mark.parametrize(("fields", "expected"), ALWAYS)
def test_what_is_compared_with_another_triton(fields: dict, expected: str) -> None:
    now = changed(**fields, triton="3.9.0")
    assert any(line.endswith(expected) for line in kernel_sheet.compare([now], [ROW]))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"registers": 64, "tensor_core": {"wgmma": 2}, "shared_memory": 0},
        {"registers": 200, "triton": "3.9.0"},
        {"target": "cuda:100", "tensor_core": {"tcgen05": 1}},
    ],
)
def test_what_is_not_worse(fields: dict) -> None:
    before = changed(target=fields.get("target", ROW.target))
    assert kernel_sheet.compare([changed(**fields)], [before]) == []


def test_a_few_more_registers_are_noise() -> None:
    before = changed(registers=97)  # 16 warps, as with 98 to 104 and up to 128
    assert kernel_sheet.compare([dataclasses.replace(before, registers=105)], [before]) == []
    assert kernel_sheet.compare([dataclasses.replace(before, registers=106)], [before])


def test_a_sheet_out_of_date_is_found() -> None:
    command = "if it is meant, run `vitarium bench kernels window_attention --fresh`"
    (lacking,) = kernel_sheet.compare([ROW], [])
    assert lacking.endswith(f"the sheet lacks it; {command}")
    (gone,) = kernel_sheet.compare([ROW], [ROW, changed(launch=1)])
    assert "launch 1" in gone and gone.endswith(f"not launched any more; {command}")
    (other,) = kernel_sheet.compare([changed(num_warps=8)], [ROW])
    assert "num_warps=4" in other and "num_warps=8" in other and other.endswith(command)
    assert kernel_sheet.compare([ROW], [ROW, changed(case="another")]) == []


def test_faults() -> None:
    assert kernel_sheet.faults(ROW) == []
    assert len(kernel_sheet.faults(changed(spilled=8, shared_memory=1 << 20, tensor_core={}))) == 3
    single = changed(dtype="float32", tensor_core={}, operations_step={"f32": 1})
    assert kernel_sheet.faults(single) == []


# --- the file and the command --------------------------------------------------------------------


def test_a_sheet_is_read_as_it_was_written(tmp_path) -> None:
    path = tmp_path / "kernels.json"
    kernel_sheet.write(path, [changed(launch=1), changed(target="cuda:100"), ROW])
    assert kernel_sheet.rows(path) == [ROW, changed(launch=1), changed(target="cuda:100")]
    entry = kernel_sheet.read(path)[0]
    assert all(isinstance(value, (str, int, float)) for value in entry.values())
    assert entry["gpu"] == "H100" and entry["tiles"] == "QUERY_TILE=1x8x8 BLOCK_D=32"
    assert entry["occupancy"] == 0.25 and entry["operations_per_byte"] == 64
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ValueError, match=r"no kernel sheet: schema=2"):
        kernel_sheet.read(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"no kernel sheet: it lacks"):
        kernel_sheet.read(path)


@pytest.fixture
def compiled(monkeypatch) -> list:
    """What is compiled; one row each, that is made up."""
    found = []

    def compile_case(operator, case, dtype, capability) -> list[Row]:
        found.append((operator.name, case.note, dtype, capability))
        target, name = f"cuda:{capability}", str(dtype).removeprefix("torch.")
        return [
            changed(operator=operator.name, case=case.note, dtype=name, target=target, spilled=4)
        ]

    monkeypatch.setattr(kernel_sheet, "compile_case", compile_case)
    monkeypatch.setattr(kernel_sheet, "_triton_version", lambda: "3.8.0")
    return found


def test_what_is_in_the_sheet_is_not_compiled_again(tmp_path, compiled, monkeypatch) -> None:
    path = tmp_path / "kernels.json"
    found, remaining = kernel_sheet.bench_kernels(["outlook_attention"], output=path, minutes=1e-9)
    assert found == [] and remaining == 4 * 2 * 3
    targets = ["cuda:80", "cuda:100"]
    found, remaining = kernel_sheet.bench_kernels(
        ["outlook_attention"], targets=targets, output=path
    )
    assert remaining == 0 and len(found) == len(compiled) == 4 * 2 * 2
    assert {dtype for *_, dtype, _ in compiled} == {torch.bfloat16, torch.float32}
    kernel_sheet.write(path, [*found, changed(case="no such case")])
    compiled.clear()
    again, _ = kernel_sheet.bench_kernels(["outlook_attention"], output=path)
    assert {capability for *_, capability in compiled} == {90}
    assert len(kernel_sheet.rows(path)) == len(again) == 4 * 2 * 3
    compiled.clear()
    kernel_sheet.bench_kernels(["outlook_attention"], output=path, fresh=True)
    assert len(compiled) == 4 * 2 * 3
    compiled.clear()
    monkeypatch.setattr(kernel_sheet, "_triton_version", lambda: "3.9.0")
    kernel_sheet.bench_kernels(["outlook_attention"], targets=["cuda:80"], output=path)
    assert len(compiled) == 4 * 2


def test_command(tmp_path, compiled, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "kernels.json"
    command = ["bench", "kernels", "linear_attention", "--targets", "cuda:90", "-o", str(path)]
    assert main(command) == 1  # something is wrong with the kernels
    text = capsys.readouterr().out
    assert "wgmma 8" in text and "registers are spilled" in text and str(path) in text
    assert main(["bench", "kernels", "channel_attention", "-o", str(path)]) == 1
    assert "channel_attention" in capsys.readouterr().err
    assert main(["bench", "kernels", "--targets", "cuda:70"]) == 2
