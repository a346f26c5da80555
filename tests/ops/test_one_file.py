"""A mixer is one file: the one in CONTRIBUTING.md, put into a module that nothing else knows of."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which the example can be imported as `row_mixer`."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- example: a mixer -->\s+```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "row_mixer.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    return environment


def _run(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_its_tests_appear(environment: dict[str, str]) -> None:
    tests = ("tests/ops/test_operators.py", "tests/ops/test_mixers.py")
    select = ("-k", "row_attention or row-", "-p", "row_mixer", "--import-mode=importlib")
    report = _run(environment, "-m", "pytest", "-q", *select, *tests)
    passed = int(re.search(r"(\d+) passed", report)[1])
    assert passed > 40, report


def test_its_table_rows_benchmark_and_place_in_models_appear(environment: dict[str, str]) -> None:
    program = """
import torch, row_mixer
from vitarium.benchmarks import bench_operators, table
from vitarium.ops import build_mixer
from vitarium.cli.main import main
assert "`row` | `row_attention` | reference, torch | same size | CCNet" in table.mixers_table()
assert "| `row_attention` | yes | no | same size | no |" in table.patterns_table()
assert main(["list", "row", "--mixers"]) == 0
outcome = bench_operators(["row_attention"], device="cpu", min_rounds=1, seconds=0.0)
assert {r.implementation for r in outcome.records} == {"torch"} and not outcome.refused
mixer = build_mixer(("row", {"num_heads": 2}), 16)
weights = mixer.attention_map(torch.randn(1, 4, 6, 16), query=(2, 3))
assert torch.allclose(weights[:, :, 2].sum(-1), torch.ones(1, 2))
assert not weights[:, :, [0, 1, 3]].any()
"""
    assert "row_attention" in _run(environment, "-c", program)
