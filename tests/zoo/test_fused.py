"""Registered names of timm's models with our mixers."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from vitarium import zoo
from vitarium.zoo import swap_mixers
from vitarium.zoo.swap import ADAPTERS


def test_fused_models_are_timms_with_our_mixers(tmp_path: Path) -> None:
    fused = timm.list_models("fused_*")
    assert not set(fused) & set(zoo.list_models())
    names = {name.removeprefix("fused_") for name in fused}
    assert {"swin_tiny_patch4_window7_224", "maxvit_tiny_tf_224", "davit_tiny", "halonet26t",
            "focalnet_tiny_srf", "volo_d1_224", "shvit_s1", "efficientvit_m0", "pvt_v2_b0",
            "beit_base_patch16_224", "coatnet_0_rw_224", "vit_relpos_small_patch16_224",
            "swinv2_tiny_window8_256", "maxxvit_rmlp_nano_rw_256"} <= names  # fmt: skip
    name = "swin_tiny_patch4_window7_224"
    tags = [cfg.split(".")[1] for cfg in timm.list_pretrained(name)]
    assert [cfg.split(".")[1] for cfg in timm.list_pretrained(f"fused_{name}")] == tags
    for tag in tags:
        have, want = (timm.get_pretrained_cfg(f"{n}.{tag}") for n in (f"fused_{name}", name))
        assert have.hf_hub_id == want.hf_hub_id and have.mean == want.mean
    small = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "img_size": 56}
    theirs = timm.create_model(name, num_classes=5, **small).double()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = timm.create_model(
        f"fused_{name}.{tags[-1]}",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth"), "num_classes": 5},
        num_classes=5,
        **small,
    )
    assert ours.pretrained_cfg["tag"] == tags[-1]
    assert swap_mixers(ours).already
    x = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    torch.testing.assert_close(ours.double().eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", timm.list_models("fused_*"))
def test_a_fused_model_is_of_a_known_family(name: str) -> None:
    """Every name has a module of timm whose classes adapters know."""
    module = timm.models.model_entrypoint(name.removeprefix("fused_")).__module__
    known = {adapter.rpartition(".")[0] for adapter in ADAPTERS}
    assert module in known or module in ("timm.models.byobnet", "timm.models.byoanet")
