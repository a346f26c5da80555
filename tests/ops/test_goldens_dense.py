"""Length-scaled cosine and mixture-of-head attention give the outputs of the official code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vitarium.ops import backend, build_mixer
from vitarium.ops.position import relative_coordinates

FOLDER = Path(__file__).parents[1] / "data" / "parity" / "ops"
MIXER_OF_KIND = {"moh_attention": "mixture_of_head", "transnext_attention": "length_scaled_cosine"}
GOLDENS = [
    pytest.param(path, name, id=path.name.split(".")[0])
    for kind, name in MIXER_OF_KIND.items()
    for path in sorted(FOLDER.glob(f"{kind}*.json.xz"))
]
TABLES = sorted(FOLDER.glob("transnext_relative_coords*.json.xz"))


def _build(golden, name, parity):
    """The mixer with the golden's weights, and the golden's input as a map."""
    arguments = dict(golden["constructor"])
    size = arguments["input_resolution"]
    mixer = build_mixer((name, arguments), arguments.pop("dim"), dtype=torch.float64)
    mixer.load_state_dict(parity.state_dict(golden["state_dict"]), strict=True)
    (spec,) = golden["inputs"]
    values = np.random.Generator(np.random.PCG64(spec["seed"])).standard_normal(spec["shape"])
    return mixer, torch.from_numpy(values * spec.get("scale", 1)).unflatten(1, size)


def _close(found, want):
    want = torch.tensor(want, dtype=torch.float64).reshape(found.shape)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize(("path", "name"), GOLDENS)
@torch.no_grad()
def test_official_weights_give_official_outputs(path, name, implementation, parity):
    """In float64, to the ten digits that the golden holds."""
    golden = parity.load(path)
    mixer, x = _build(golden, name, parity)
    with backend(implementation):
        output = mixer.eval()(x)
    _close(output, golden["output"]["values"])


@pytest.mark.parametrize(("path", "name"), GOLDENS)
def test_balance_loss(path, name, parity):
    """In training as official, with a gradient; in evaluation there is none."""
    golden = parity.load(path)
    if "load_balance_losses" not in golden:
        pytest.skip("a mixer without a router")
    mixer, x = _build(golden, name, parity)
    assert mixer.balance_loss is None
    mixer.train()(x)
    losses = [] if mixer.balance_loss is None else [mixer.balance_loss]
    assert len(losses) == len(golden["load_balance_losses"])
    for found, want in zip(losses, golden["load_balance_losses"]):
        _close(found.detach(), want)
        found.backward()
        assert mixer.router.wg.weight.grad.abs().sum() > 0
    mixer.eval()(x)
    assert mixer.balance_loss is None


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name.split(".")[0])
def test_relative_coordinates(path, parity):
    golden = parity.load(path)
    index, table = relative_coordinates(**golden["constructor"])
    assert index.flatten().tolist() == golden["index"]
    assert table.dtype == torch.float32
    _close(table.double(), golden["output"]["values"])


def test_every_kind_has_goldens():
    assert len(GOLDENS) >= 5
    assert {param.values[1] for param in GOLDENS} == set(MIXER_OF_KIND.values())
    assert TABLES
