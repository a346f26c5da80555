"""BiFormer's mixers with official weights give the outputs, and the routing, of official code."""

from pathlib import Path

import pytest
import torch

from vitarium.ops import backend, build_mixer

FOLDER = Path(__file__).parents[1] / "data" / "parity" / "ops"
GOLDENS = sorted(
    path for kind in ("bra", "nchw", "attention_lepe") for path in FOLDER.glob(f"{kind}_*.json.xz")
)

# By the golden's "op": our mixer, arguments besides the constructor's, and where channels are.
MIXER_OF_OP = {
    "BiLevelRoutingAttention": ("bilevel_routing", {}, "last"),
    "nchwBRA": ("bilevel_routing_nchw", {}, "first"),
    "AttentionLePE": ("attention_lepe", {}, "last"),
    "nchwAttentionLePE": ("attention_lepe", {"lepe_on": "value"}, "first"),
}


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name.split(".")[0])
@torch.no_grad()
def test_official_weights_give_official_outputs(path, implementation, parity):
    """In float64, to the ten digits that the golden holds."""
    golden = parity.load(path)
    name, more, channels = MIXER_OF_OP[golden["op"]]
    arguments = {**golden["constructor"], **more}
    mixer = build_mixer((name, arguments), arguments.pop("dim"), dtype=torch.float64).eval()
    mixer.load_state_dict(parity.state_dict(golden["state_dict"]), strict=True)
    batch, *shape = golden["output"]["shape"]
    height, width, dim = shape if channels == "last" else (*shape[1:], shape[0])
    images = parity.image(batch, dim, height, width).permute(0, 2, 3, 1)

    with backend(implementation):
        output = mixer(images)

    output = output if channels == "last" else output.permute(0, 3, 1, 2)
    want = torch.tensor(golden["output"]["full"], dtype=torch.float64).reshape(output.shape)
    torch.testing.assert_close(output, want, rtol=1e-9, atol=1e-9 * golden["output"]["abs_max"])
    if "routing_index" in golden:
        table = mixer.routing(images)
        assert list(table.shape) == golden["routing_index"]["shape"]
        chosen = torch.tensor(golden["routing_index"]["sets"]).view(table.shape)
        assert torch.equal(table.sort(-1).values, chosen)


def test_every_golden_is_of_a_known_operator(parity):
    assert len(GOLDENS) >= 11
    assert {parity.load(path)["op"] for path in GOLDENS} == set(MIXER_OF_OP)
