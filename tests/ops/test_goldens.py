"""Mixers with official weights give the outputs of the official operators."""

from pathlib import Path

import pytest
import torch

from vitarium.ops import backend, build_mixer

GOLDENS = sorted((Path(__file__).parents[1] / "data" / "parity" / "ops").glob("na2d_*.json.xz"))

# By the golden's "op": our mixer. Its arguments and parameters have the official names.
MIXER_OF_OP = {"NeighborhoodAttention2D": "neighborhood"}


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name.split(".")[0])
@torch.no_grad()
def test_official_weights_give_official_outputs(path, implementation, parity):
    """In float64, to the ten digits that the golden holds."""
    golden = parity.load(path)
    arguments = dict(golden["constructor"])
    mixer = build_mixer(
        (MIXER_OF_OP[golden["op"]], arguments), arguments.pop("dim"), dtype=torch.float64
    )
    mixer.load_state_dict(parity.state_dict(golden["state_dict"]), strict=True)
    batch, height, width, channels = golden["output"]["shape"]
    images = parity.image(batch, channels, height, width).permute(0, 2, 3, 1)

    with backend(implementation):
        output = mixer.eval()(images)

    want = torch.tensor(golden["output"]["full"], dtype=torch.float64).reshape(output.shape)
    torch.testing.assert_close(output, want, rtol=1e-9, atol=1e-9 * golden["output"]["abs_max"])


def test_every_golden_is_of_a_known_operator(parity):
    assert len(GOLDENS) >= 7
    assert {parity.load(path)["op"] for path in GOLDENS} <= set(MIXER_OF_OP)
