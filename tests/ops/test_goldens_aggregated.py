"""Aggregated attention with official weights gives the outputs of the official code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vitarium.ops import backend, build_mixer

FOLDER = Path(__file__).parents[1] / "data" / "parity" / "ops"
GOLDENS = sorted([*FOLDER.glob("aggregated_*.xz"), *FOLDER.glob("moh_aggregated_*.xz")])

# By the golden's "op": our mixer. Its arguments and parameters have the official names.
MIXER_OF_OP = {
    "AggregatedAttention": "aggregated",
    "AggregatedAttention with mixture-of-head gates": "aggregated_mixture_of_head",
}


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
    (entry,) = golden["inputs"]
    x = np.random.default_rng(entry["seed"]).standard_normal(entry["shape"])
    x = torch.from_numpy(x * entry.get("scale", 1.0)).unflatten(1, arguments["input_resolution"])

    with backend(implementation):
        output = mixer.eval()(x)

    want = torch.tensor(golden["output"]["values"], dtype=torch.float64).view(output.shape)
    torch.testing.assert_close(output, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


def test_every_golden_is_of_a_known_operator(parity):
    assert len(GOLDENS) >= 3
    assert {parity.load(path)["op"] for path in GOLDENS} == set(MIXER_OF_OP)
