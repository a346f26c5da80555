"""Our backbones as encoders of segmentation_models_pytorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vitarium.zoo  # noqa: F401

smp = pytest.importorskip(
    "segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed"
)

ENCODERS = {
    "nat_mini": {"embed_dim": 32, "depths": (1, 1, 1, 1)},
    "biformer_tiny": {"embed_dim": 32, "depths": (1, 1, 1, 1)},
    "transnext_micro": {"embed_dim": 24, "depths": (1, 1, 1, 1)},
    "crossformer_tiny": {"embed_dim": 32, "depths": (1, 1, 1, 1)},
    "litv2_small": {"embed_dim": 32, "depths": (1, 1, 1, 1)},
    "inline_pvt_tiny": {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1)},
}


def _discs(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Two noisy images `(2, 3, H, W)` of a bright disc, and where it is, `(2, H, W)`."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    masks = torch.stack(
        [(rows - r) ** 2 + (columns - c) ** 2 < (height / 4) ** 2 for r, c in ((20, 30), (40, 60))]
    )
    noise = torch.randn(2, 3, height, width, generator=generator)
    return masks[:, None] * 2.0 + 0.3 * noise, masks.long()


def _train(model: torch.nn.Module, steps: int) -> list[float]:
    images, masks = _discs(64, 96)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(F.cross_entropy(model(images), masks).item())
    return losses


@pytest.mark.parametrize("name", ENCODERS)
def test_unet_learns_with_our_encoder(name):
    torch.manual_seed(0)
    model = smp.Unet(
        f"tu-{name}",
        encoder_weights=None,
        classes=2,
        decoder_channels=(32, 16, 16, 8, 8),
        **ENCODERS[name],
    )
    assert model.encoder.out_channels[:2] == [3, 0]  # maps start at a stride of 4
    before = {n: p.detach().clone() for n, p in model.encoder.named_parameters()}
    losses = _train(model, 2)
    assert losses[-1] < losses[0]
    for path, parameter in model.encoder.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        if ".stem." in path:
            assert parameter.grad.abs().sum() > 0, path
    changed = [n for n, p in model.encoder.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) == len(before)


def test_isotropic_encoders_serve_dense_prediction_transformers():
    torch.manual_seed(0)
    model = smp.DPT(
        "tu-agent_deit_tiny", encoder_weights=None, classes=2, decoder_fusion_channels=16
    )
    losses = _train(model, 2)
    assert losses[-1] < losses[0]
    stem = list(model.encoder.model.patch_embed.parameters())
    assert all(p.grad.abs().sum() > 0 for p in stem)
