"""Runs the tests of kernels in Triton's interpreter, chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter")
@pytest.mark.parametrize(
    "name", ["test_kernels.py", "test_operators.py", "test_bilevel_routing.py"]
)
def test_in_the_interpreter(name: str) -> None:
    tests = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--import-mode=importlib", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        command, cwd=tests.parents[2], env=environment, capture_output=True, text=True
    )
    report = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, report
    assert " passed" in report, report
