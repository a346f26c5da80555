"""Agent attention with official weights gives the outputs of the official code."""

from __future__ import annotations

import math
import re
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


# Arguments that have no effect on the official outputs.
IDLE = ("attn_drop", "proj_drop", "qk_scale", "dim_out")


def _form(golden: dict[str, Any]) -> str:
    return re.search(r"agent_([a-z]+)\.py", golden["file"])[1]


def _build(golden: dict[str, Any], form: str, parity: Any) -> torch.nn.Module:
    arguments = {name: x for name, x in golden["constructor"].items() if name not in IDLE}
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
        return module.mix_tokens(x)
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
    golden = parity.load(path)
    form = _form(golden)
    module = _build(golden, form, parity)
    batch, tokens, channels = golden["output"]["shape"]
    x = parity.image(batch, channels, tokens, 1).flatten(2).transpose(1, 2)

    with backend(implementation):
        output = _run(module, form, x, golden["constructor"].get("window_size"))

    parity.close(output, golden)


def test_there_are_goldens_of_every_form(parity):
    assert len(GOLDENS) >= 6
    assert {_form(parity.load(path)) for path in GOLDENS} == set(FORMS)
