"""Linear attention's relatives with official weights give the outputs of official code."""

import math
import re
from pathlib import Path

import pytest
import torch

from vitarium.ops import backend, build_mixer
from vitarium.ops.inline_mixers import InLineStripes

FOLDER = Path(__file__).parents[1] / "data" / "parity" / "ops"
INLINE = sorted(FOLDER.glob("inline_attention_*.json.xz"))
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "torch"])


def _name(path):
    return path.name.split(".")[0]


def _close(output, golden):
    values = golden["output"].get("full") or golden["output"]["values"]
    want = torch.tensor(values, dtype=torch.float64).reshape(golden["output"]["shape"])
    torch.testing.assert_close(output, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


@IMPLEMENTATIONS
@pytest.mark.parametrize("path", INLINE, ids=_name)
@torch.no_grad()
def test_inline(path, implementation, parity):
    """In float64, to the ten digits that the golden holds; tokens of a map in raster order."""
    golden = parity.load(path)
    form = re.search(r"inline_(\w+)\.py", golden["file"])[1]
    arguments = dict(golden["constructor"])
    size = [int(n) for n in re.findall(r"\d+", golden["inputs"].split("#")[0])][:4]
    batch, height, width, channels = size
    images = parity.image(batch, channels, height, width).permute(0, 2, 3, 1)
    dim = arguments.pop("dim")
    if form == "cswin":
        mixer = InLineStripes(dim, **arguments, dtype=torch.float64)
    else:
        name = "inline_window" if form == "swin" else "inline"
        mixer = build_mixer((name, arguments), dim, dtype=torch.float64)
    mixer.eval().load_state_dict(parity.state_dict(golden["state_dict"]), strict=True)

    with backend(implementation):
        if form == "deit":
            tokens = images.flatten(1, 2)
            side = math.isqrt(tokens.shape[1] - 1)
            output = mixer.mix_tokens(tokens, (side, side))
        elif form == "cswin":
            tokens = images.flatten(1, 2)
            rolled = [tokens.roll(n, 1).unflatten(1, (height, width)) for n in range(3)]
            output = mixer(*rolled, tokens.mean(1)).flatten(1, 2)
        else:
            output = mixer(images).flatten(1, 2)
    _close(output, golden)


def test_every_form_has_goldens():
    forms = {re.match(r"inline_attention_([a-z]+)", path.name)[1] for path in INLINE}
    assert forms == {"deit", "pvt", "swin", "cswin"}
