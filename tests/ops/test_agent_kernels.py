"""The Triton kernels of agent attention: walks of several tiles, and calls that they leave alone.

On a CUDA device these run as they are. Without one they are skipped here, and
`test_kernels_interpreter.py` runs them in Triton's interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")

from vitarium.ops import agent_attention  # noqa: E402
from vitarium.ops.kernels import agent as launcher  # noqa: E402
from vitarium.ops.kernels import agent_kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs CUDA or TRITON_INTERPRET=1"),
    *([pytest.mark.gpu] if CUDA else []),
]


@pytest.mark.parametrize(
    ("agents", "width", "programs", "fused"),
    [(9, 16, 1, True), (9, 16, 2, True), (65, 16, 1, False), (4, 80, 1, False)],
)
def test_walks(
    agents: int, width: int, programs: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program or two for each head: they walk over the map in several steps."""
    monkeypatch.setattr(launcher, "PROGRAMS", dict.fromkeys(launcher.PROGRAMS, programs))
    started = []
    launch = launcher.launch
    monkeypatch.setattr(
        launcher,
        "launch",
        lambda kernel, *args, **kwargs: (started.append(kernel), launch(kernel, *args, **kwargs)),
    )
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 9, 11, 1, width),) * 3
    shapes += ((1, agents, 1, width), (1, agents, 99), (1, 99, agents), (1, 9, 11, 1, width))
    *tensors, grad = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    found = {}
    for backend in ("reference", "triton"):
        dtype = torch.float64 if backend == "reference" else torch.float32
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        output = agent_attention(
            *leaves[:4], agent_bias=leaves[4], query_bias=leaves[5], backend=backend
        )
        found[backend] = [output, *torch.autograd.grad(output, leaves, grad.to(dtype))]
    for ours, exact in zip(found["triton"], found["reference"]):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
    kernels = [
        agent_kernels.gather_kernel,
        agent_kernels.read_kernel,
        agent_kernels.read_backward_kernel,
        agent_kernels.gather_backward_kernel,
    ]
    assert started == (kernels if fused else [])
