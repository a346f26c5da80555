"""Runs the tests of kernels in Triton's interpreter, chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitarium.ops import OPERATORS

pytest.importorskip("triton")


# By file and, as operators take long, by operator; neighborhoods have a whole file of their own.
PARTS = [
    ("test_kernels.py", ""),
    ("test_kernels_window.py", ""),
    ("test_bilevel_routing.py", ""),
    ("test_aggregated_kernels.py", ""),
    ("test_bilevel_kernels.py", ""),
    ("test_causal_linear_kernels.py", ""),
    ("test_agent_kernels.py", ""),
    ("test_attention.py", ""),
    ("test_mixture_of_head.py", ""),
    *(
        ("test_operators.py", f"{name}-")
        for name, operator in OPERATORS.items()
        if "triton" in operator.implementations and name != "neighborhood_attention"
    ),
]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter")
@pytest.mark.parametrize(("name", "select"), PARTS)
def test_in_the_interpreter(name: str, select: str) -> None:
    tests = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--import-mode=importlib", str(tests)]
    # "[" begins an operator's name: "attention-" is the end of others.
    command += ["-k", f"[{select}"] if select else []
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        command, cwd=tests.parents[2], env=environment, capture_output=True, text=True
    )
    report = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, report
    assert " passed" in report, report
