"""Agent attention with official weights gives the outputs of the official code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vitarium.ops import (
    AgentAttention,
    AgentReducedAttention,
    AgentStripes,
    AgentWindowAttention,
    backend,
)

FOLDER = Path(__file__).parents[1] / "data" / "parity" / "ops"
GOLDENS = sorted(FOLDER.glob("agent_attention_*.json.xz"))
FORMS = {
    "deit": AgentAttention,
    "pvt": AgentReducedAttention,
    "swin": AgentWindowAttention,
    "cswin": AgentStripes,
}


def _form(path: Path) -> str:
    return path.name.split("_")[2].split(".")[0]


def _build(golden: dict[str, Any], form: str, parity: Any) -> torch.nn.Module:
    arguments = dict(golden["constructor"])
    if form == "deit":
        arguments["class_token"] = True
    if form == "swin":
        arguments["window_size"] = tuple(arguments["window_size"])
    module = FORMS[form](**arguments, dtype=torch.float64)
    module.load_state_dict(parity.state_dict(golden["state_dict"]), strict=True)
    return module.eval()


def _run(module: torch.nn.Module, form: str, x: Tensor, window: tuple[int, int] | None) -> Tensor:
    """The output for tokens `(B, N, C)`, as tokens."""
    if form == "deit":
        return module.sequence(x)
    size = window if form == "swin" else (math.isqrt(x.shape[1]),) * 2
    if form == "cswin":
        three = (part.unflatten(1, size) for part in (x, x.roll(1, 1), x.roll(2, 1)))
        return module(*three).flatten(1, 2)
    return module(x.unflatten(1, size)).flatten(1, 2)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name.removesuffix(".json.xz"))
@torch.no_grad()
def test_official_weights_give_official_outputs(path, implementation, parity):
    """In float64, to the ten digits that the golden holds; tokens are images without a shape."""
    golden, form = parity.load(path), _form(path)
    module = _build(golden, form, parity)
    batch, tokens, channels = golden["output"]["shape"]
    x = parity.image(batch, channels, tokens, 1).flatten(2).transpose(1, 2)

    with backend(implementation):
        output = _run(module, form, x, golden["constructor"].get("window_size"))

    want = torch.tensor(golden["output"]["full"], dtype=torch.float64).reshape(output.shape)
    torch.testing.assert_close(output, want, rtol=1e-9, atol=1e-9 * golden["output"]["abs_max"])


def test_there_are_goldens_of_every_form():
    assert len(GOLDENS) >= 6
    assert {_form(path) for path in GOLDENS} == set(FORMS)
