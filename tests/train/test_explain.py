"""Where models look, and which heads matter."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import vitarium.zoo  # noqa: F401
from vitarium.cli.main import main
from vitarium.ops import NeighborhoodAttention, build_mixer
from vitarium.train.explain import attention_views, evenly, head_importance, last_of_stages
from vitarium.train.plots import PanelRow, draw_attention, explain_picture, most_contrast

# Of every host and way to call a mixer one.
MODELS = {
    "dinat_nano": {},
    "transnext_micro": {"depths": (1, 2, 1, 1), "embed_dim": 24},
    "litv2_small": {"depths": (1, 1, 1, 2), "embed_dim": 32},
    "inline_cswin_tiny": {"depths": (1, 1, 1, 1), "embed_dim": 32},
    "agent_cswin_tiny": {"depths": (1, 1, 1, 1), "embed_dim": 32},
    "agent_deit_tiny": {},
    "inline_deit_tiny": {},
}


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **MODELS[name]).eval()


@pytest.mark.parametrize("name", MODELS)
def test_every_mixer_of_every_host_is_seen(name):
    model = _model(name)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    logits, views = attention_views(model, image, (0.3, 0.8))
    with torch.no_grad():
        assert torch.equal(logits, model(image))
    assert [view.name for view in views] == [
        path for path, _ in model.named_modules() if path.endswith(".mixer")
    ]
    for view in views:
        height, width = view.size
        assert view.query == (int(0.3 * height), int(0.8 * width))
        assert view.weights.shape[1:] == (height, width)
        assert view.weights.isfinite().all()
    stages = last_of_stages(model, views)
    assert 1 < len(stages) <= 4 and stages[-1] is views[-1]
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["agent_deit_tiny", "inline_deit_tiny"])
def test_weights_beside_a_class_token_are_those_of_the_values(name):
    """Pushed through the mixer, a change of one token's value arrives with the weight shown."""
    mixer = _model(name).double().blocks[3].mixer
    for part in mixer.modules():  # what is added beside attention is no attention
        if isinstance(part, nn.Conv1d | nn.Conv2d):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
    x = torch.randn(1, 1 + 12, 192, dtype=torch.float64)
    weights, others = mixer.token_attention_map(x, (3, 4), (1, 2))
    assert weights.shape == (1, mixer.num_heads, 3, 4) and others.shape[-1] == 1
    total = weights.sum((-1, -2)) + others.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    value = mixer.qkv(x).unflatten(-1, (3, mixer.num_heads, -1))[0, :, 2]
    everything = torch.cat([others, weights.flatten(-2)], -1)[0]
    want = mixer.proj(torch.einsum("hn,nhd->hd", everything, value).flatten())
    torch.testing.assert_close(mixer.mix_tokens(x, (3, 4))[0, 1 + 1 * 4 + 2], want)
    with pytest.raises(ValueError, match="outside the map"):
        mixer.token_attention_map(x, (3, 4), (3, 0))


def test_importance_is_the_derivative_by_a_gate_on_the_head():
    """Against finite differences of the loss, heads scaled in the projection's own weights."""
    model = _model("dinat_nano").double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    targets = torch.tensor([0, 3, 4])
    found = {entry.name: entry.sensitivity for entry in head_importance(model, images, targets)}
    mixers = {n: m for n, m in model.named_modules() if isinstance(m, NeighborhoodAttention)}
    assert list(found) == list(mixers)
    name, mixer = list(mixers.items())[2]
    width = mixer.proj.in_features // mixer.num_heads

    @torch.no_grad()
    def losses(head: int, gate: float) -> torch.Tensor:
        columns = slice(head * width, (head + 1) * width)
        mixer.proj.weight[:, columns] *= gate
        loss = F.cross_entropy(model(images), targets, reduction="none")
        mixer.proj.weight[:, columns] /= gate
        return loss

    for head in range(mixer.num_heads):
        slope = (losses(head, 1 + 1e-4) - losses(head, 1 - 1e-4)) / 2e-4
        assert found[name][head].item() == pytest.approx(slope.abs().mean().item(), rel=1e-4)
    (own,) = [e for e in head_importance(model, images) if e.name == name]
    answers = model(images).argmax(-1)
    (same,) = [e for e in head_importance(model, images, answers) if e.name == name]
    assert torch.equal(own.sensitivity, same.sensitivity)
    assert own.relative.norm().item() == pytest.approx(1)


def test_heads_of_two_projections_count_together():
    model = _model("litv2_small")
    found = head_importance(model, torch.randn(1, 3, 64, 64))
    for entry in found:
        mixer = model.get_submodule(entry.name)
        assert len(entry.sensitivity) == mixer.h_heads + mixer.l_heads
        assert (entry.sensitivity > 0).all()


class _Pooled(nn.Module):
    """A mixer whose keys are no positions, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = build_mixer(("focused_linear", {"num_heads": 2, "sr_ratio": 2}), 32)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.mixer(x.permute(0, 2, 3, 1)).mean((1, 2)))


def test_pooled_keys_are_said_to_be_pooled(tmp_path):
    model = _Pooled().eval()
    image = torch.randn(1, 32, 8, 8)
    _, (view,) = attention_views(model, image, (0.5, 0.5))
    assert view.weights is None and "keys are no positions" in view.note
    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    explain_picture("pooled", model, pixels, image, (0.5, 0.5), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 400


def test_models_of_others_are_refused():
    with pytest.raises(ValueError, match="no token mixer"):
        attention_views(timm.create_model("resnet10t").eval(), torch.randn(1, 3, 32, 32), (0, 0))


def test_few_of_many():
    assert evenly(range(3), 4) == [0, 1, 2]
    assert evenly(range(12), 4) == [0, 4, 7, 11]


def _image(path: Path, width: int = 60, height: int = 40) -> Path:
    image = Image.new("RGB", (width, height), "black")
    image.paste((255, 255, 255), (40, 10, 50, 20))
    image.save(path)
    return path


def test_command_draws_and_prints(tmp_path, capsys, monkeypatch):
    drawn: list[PanelRow] = []

    def keep(rows, title, path):
        drawn.extend(rows)
        draw_attention(rows, title, path)

    monkeypatch.setattr("vitarium.train.plots.draw_attention", keep)
    image, output = str(_image(tmp_path / "i.png")), str(tmp_path / "e.png")
    # The model sees the middle 40 x 40 of the 60 x 40 pixels.
    arguments = ["explain", "dinat_nano", image, "--random", "--output", output]
    assert main([*arguments, "--position", "15", "45"]) == 0
    said = capsys.readouterr().out
    assert "stages.1.blocks.0.mixer" in said and "e-heads.png" in said
    assert drawn[0].point == pytest.approx((15.5 / 40, (45.5 - 10) / 40), abs=0.03)
    assert len(drawn) == 5 and drawn[0].panels[0].weights.shape == (8, 8)
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("e.png", "e-heads.png"))


def test_most_contrast_is_where_the_image_differs():
    pixels = torch.zeros(3, 40, 40, dtype=torch.uint8)
    pixels[:, 10:20, 30:40] = 255
    assert most_contrast(pixels) == pytest.approx((15 / 40, 35 / 40), abs=0.07)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--position", "15", "2"], "crops this part"),
        (["--position", "0.5", "60"], "COLUMN='60' is not in the image; allowed are 0 to 59"),
        (["--position", "x", "0.5"], "ROW='x' is not in the image"),
        (["--output", "e.jpg"], "must end in .png"),
        (["--output", "none/e.png"], "there is no folder"),
    ],
)
def test_command_says_what_it_does_not_take(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = str(_image(tmp_path / "i.png"))
    assert main(["explain", "dinat_nano", image, "--random", *arguments]) == 1
    assert message in capsys.readouterr().err
