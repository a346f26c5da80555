"""timm's models with our mixers: the same outputs, gradients and weights, in float64."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed_nhwc
from timm.layers.halo_attn import HaloAttn
from timm.models.davit import DaVit
from timm.models.efficientvit_msra import EfficientVitMsra
from timm.models.focalnet import FocalNet
from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.shvit import SHViT
from timm.models.volo import VOLO
from torch import Tensor, nn

from vitarium.zoo import restore_mixers, swap_mixers
from vitarium.zoo.swap import ADAPTERS

SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
MAXVIT = {"embed_dim": (32, 64), "depths": (1, 1), "stem_width": 16}
COATNET = {
    "embed_dim": (32, 32, 64),
    "depths": (1, 1, 2),
    "stem_width": 16,
    "block_type": ("C", "T", "T"),
}
VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
DAVIT = {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (2, 2)}

# Name in timm (or class), what makes it small, and the size of images that timm takes.
MODELS: list[tuple[Any, dict[str, Any], tuple[int, int]]] = [
    ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": 56}, (56, 56)),
    ("swin_s3_tiny_224", {**SWIN, "img_size": (64, 96), "window_size": (5, 6)}, (64, 96)),
    ("swin_base_patch4_window12_384", {**SWIN, "img_size": 56, "always_partition": True}, (56, 56)),
    ("swinv2_tiny_window8_256", {**SWIN, "img_size": 64}, (64, 64)),
    ("swinv2_base_window12to16_192to256", {**SWIN, "img_size": 80, "window_size": 5}, (80, 80)),
    ("maxvit_tiny_tf_224", {**MAXVIT, "img_size": 128}, (128, 128)),
    ("maxvit_tiny_rw_224", {**MAXVIT, "img_size": 128}, (128, 64)),
    ("maxvit_rmlp_tiny_rw_256", {**MAXVIT, "img_size": 96}, (96, 192)),
    ("maxvit_tiny_pm_256", {**MAXVIT, "img_size": 64}, (64, 64)),
    ("maxxvit_rmlp_nano_rw_256", {**MAXVIT, "img_size": 64}, (64, 64)),
    ("maxxvitv2_nano_rw_256", {**MAXVIT, "img_size": 64}, (64, 64)),
    ("coatnet_0_rw_224", {**COATNET, "img_size": 64}, (64, 64)),
    ("coatnet_rmlp_nano_rw_224", {**COATNET, "img_size": (64, 96)}, (64, 96)),
    ("coatnet_0_224", {**COATNET, "img_size": 64}, (64, 64)),
    ("coatnext_nano_rw_224", {**COATNET, "img_size": 64}, (64, 64)),
    (DaVit, DAVIT, (60, 44)),
    (DaVit, {**DAVIT, "attn_types": ("channel", "spatial"), "channel_attn_v2": True}, (60, 44)),
    ("halonet26t", {}, (256, 256)),
    (FocalNet, {"embed_dim": 16, "depths": (1, 1), "focal_levels": (2, 3)}, (60, 44)),
    (FocalNet, {"embed_dim": 16, "depths": (1, 1), "focal_levels": (3, 1), "focal_windows": (5, 3),
                "use_post_norm": True, "use_post_norm_in_modulation": True,
                "normalize_modulator": True}, (60, 44)),
    (VOLO, {"layers": (1, 1), "embed_dims": (24, 32), "num_heads": (2, 4),
            "mlp_ratio": 3.0, "img_size": 96, "downsamples": (True, False),
            "outlook_attention": (True, False)}, (96, 96)),
    ("shvit_s1", {}, (224, 160)),
    (SHViT, {"embed_dim": (32, 48, 64), "partial_dim": (8, 12, 16), "types": ("s", "s", "s")},
     (128, 128)),
    (EfficientVitMsra, {"embed_dim": (32, 48, 64), "num_heads": (2, 3, 4), "key_dim": (8, 8, 8),
                        "kernels": (5, 3, 3, 5)}, (224, 224)),
    (PyramidVisionTransformerV2, {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2),
                                  "sr_ratios": (4, 1), "mlp_ratios": (2.0, 2.0)}, (68, 44)),
    (PyramidVisionTransformerV2, {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2),
                                  "mlp_ratios": (2.0, 2.0), "linear": True}, (68, 44)),
    ("beit_base_patch16_224", {**VIT, "img_size": (64, 96)}, (64, 96)),
    ("beit_base_patch16_224", {**VIT, "img_size": 64, "use_rel_pos_bias": False,
                               "use_shared_rel_pos_bias": True}, (64, 64)),
    ("beitv2_base_patch16_224", {**VIT, "img_size": 64}, (64, 64)),
    ("vit_relpos_small_patch16_224", {**VIT, "img_size": 64}, (64, 64)),
    ("vit_relpos_base_patch16_clsgap_224", {**VIT, "img_size": 64}, (64, 64)),
    ("vit_srelpos_small_patch16_224", {**VIT, "img_size": 64}, (64, 64)),
]  # fmt: skip


def _id(value: Any) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", "")


def _build(source: Any, arguments: dict[str, Any]) -> nn.Module:
    """A float64 model whose parameters and statistics are all away from what they start with."""
    torch.manual_seed(0)
    create = (lambda **kw: timm.create_model(source, **kw)) if isinstance(source, str) else source
    model = create(num_classes=5, **arguments).double()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.dim() > 1:
            tensor.copy_(0.5 * noise / tensor[0].numel() ** 0.5)
        elif name.endswith("running_var"):
            tensor.copy_(1 + 0.5 * noise.tanh())
        else:
            tensor.copy_(0.1 * noise + name.endswith("weight"))
    return model


def _images(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    count = 1 if min(size) > 224 else 2
    return torch.randn(count, 3, *size, generator=generator, dtype=torch.float64)


def _run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients of images and of all parameters, and statistics, by name."""
    x = x.clone().requires_grad_()
    torch.manual_seed(2)  # of dropout and stochastic depth
    outputs = model(x)
    outputs = [t for t in outputs if isinstance(t, Tensor)] if type(outputs) is tuple else [outputs]
    outputs = outputs[0] if isinstance(outputs[0], list) else outputs
    flat = torch.cat([output.flatten() for output in outputs])
    weights = torch.linspace(-1, 1, len(flat), dtype=flat.dtype)
    (flat * weights).sum().backward()
    found = {"output": flat.detach(), "images": x.grad}
    for name, parameter in model.named_parameters():
        found[name] = torch.zeros(()) if parameter.grad is None else parameter.grad
    return found | {name: buffer for name, buffer in model.named_buffers() if "running" in name}


def _assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance=1e-10) -> None:
    assert list(ours) == list(theirs)
    least = 1e-14 * max(t.abs().max() for t in theirs.values())  # rounding of what cancels
    for name, want in theirs.items():
        error = (ours[name] - want).abs().max()
        assert error <= tolerance * want.abs().max() + least, (
            f"{name}: {error} of {want.abs().max()}"
        )


@pytest.mark.parametrize(("source", "arguments", "size"), MODELS, ids=_id)
def test_same_outputs_and_gradients(source: Any, arguments: dict[str, Any], size: Any) -> None:
    theirs = _build(source, arguments)
    ours = copy.deepcopy(theirs)
    tensors = {name: t for name, t in ours.state_dict(keep_vars=True).items()}
    report = swap_mixers(ours)
    assert report.replaced
    reasons = ("none of ours", "mixers beside it take one size only")
    assert not [why for why in report.kept.values() if not any(text in why for text in reasons)]
    after = ours.state_dict(keep_vars=True)
    assert list(after) == list(tensors)
    assert all(after[name] is tensor for name, tensor in tensors.items())
    x = _images(*size)
    for training in (False, True):
        for model in (theirs, ours):
            for module in model.modules():
                module.training = training  # timm's own `train` may return nothing
            model.zero_grad()
        _assert_close(_run(ours, x), _run(theirs, x))


def test_every_adapter_is_tried() -> None:
    """By the models above, and what refuses sizes."""
    seen = set()
    for source, arguments, _ in MODELS:
        model = _build(source, arguments)
        swap_mixers(model)
        seen |= {type(m).timm_class for m in model.modules() if hasattr(type(m), "timm_class")}
    tried = {f"{kind.__module__}.{kind.__qualname__}" for kind in seen}
    assert set(ADAPTERS) - tried == {"timm.models.maxxvit.PartitionAttention2d"}


def test_channels_first_maxvit() -> None:
    theirs = _build(
        "maxvit_tiny_tf_224", {**MAXVIT, "img_size": 64, "transformer_use_nchw_attn": True}
    )
    ours = copy.deepcopy(theirs)
    assert set(swap_mixers(ours).replaced.values()) == {"PartitionAttention2d by multi_axis"}
    _assert_close(_run(ours, _images(64, 64)), _run(theirs, _images(64, 64)))


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
@pytest.mark.parametrize("size", [(40, 72), (68, 36), (20, 16)], ids=str)
def test_swin_of_any_size_is_timms_of_dynamic_size(name: str, size: Any) -> None:
    arguments = {**SWIN, "img_size": 64}
    ours = _build(name, arguments).eval()
    theirs = _build(name, {**arguments, "strict_img_size": False}).eval()
    with pytest.raises(AssertionError):
        ours(_images(*size))
    assert swap_mixers(ours).lifted == {"patch_embed": "PatchEmbed"}
    _assert_close(_run(ours, _images(*size)), _run(theirs, _images(*size)))
    cut = _images(*size)[..., :-1, :-3]
    torch.testing.assert_close(ours(cut), ours(F.pad(cut, (0, 3, 0, 1))), rtol=0, atol=0)


@pytest.mark.parametrize("partition", ["block", "grid"])
@pytest.mark.parametrize("size", [(9, 10), (3, 13)], ids=str)
def test_maxvit_of_any_size_pads_to_whole_windows(partition: str, size: Any) -> None:
    theirs = PartitionAttentionCl(
        16, partition, MaxxVitTransformerCfg(dim_head=8, window_size=(4, 5))
    )
    theirs = theirs.double().eval()
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, -size[1] % 5, 0, -size[0] % 4))
    expected = theirs._partition_attn(padded)[:, : size[0], : size[1]]
    swap_mixers(theirs)
    torch.testing.assert_close(theirs._partition_attn(x), expected, rtol=1e-10, atol=1e-10)


def test_maxvit_model_of_any_size() -> None:
    model = _build("maxvit_tiny_tf_224", {**MAXVIT, "img_size": 96}).eval()
    with pytest.raises(AssertionError):
        model(_images(100, 60))
    swap_mixers(model)
    assert model(_images(100, 60)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "tolerance"), [("coatnet_rmlp_nano_rw_224", 1e-10), ("coatnet_0_rw_224", 1e-5),
                            ("coatnet_0_224", 1e-5)]
)  # fmt: skip
def test_coatnet_of_any_size_is_timms_of_that_size(name: str, tolerance: float) -> None:
    """Timm interpolates tables in float32."""
    ours = _build(name, {**COATNET, "img_size": 64}).eval()
    theirs = copy.deepcopy(ours)
    if not hasattr(theirs, "set_input_size"):
        pytest.skip("older timm cannot change the size")
    theirs.set_input_size(img_size=(96, 48))
    with pytest.raises(RuntimeError):
        ours(_images(96, 48))
    swap_mixers(ours)
    found, want = ours(_images(96, 48)), theirs(_images(96, 48))
    assert (found - want).abs().max() <= tolerance * want.abs().max()
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


@pytest.mark.parametrize("size", [(9, 17), (8, 5)], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"stride": 2}, {"stride": 2, "avg_down": True}], ids=str)
def test_halo_of_any_size_goes_on_with_zeros(size: Any, arguments: dict[str, Any]) -> None:
    attn = HaloAttn(32, num_heads=2, block_size=4, halo_size=2, **arguments).double()
    x = torch.randn(2, 32, *size, dtype=torch.float64)
    stride = arguments.get("stride", 1)
    rows, columns = (-(-length // stride) for length in size)
    padded = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
    expected = attn(padded)[:, :, :rows, :columns]
    assert swap_mixers(attn).replaced == {"": "HaloAttn by halo"}
    torch.testing.assert_close(attn(x), expected, rtol=1e-10, atol=1e-10)


def test_halonet_of_any_size() -> None:
    model = timm.create_model("halonet26t", num_classes=5, features_only=True).eval()
    swap_mixers(model)
    shapes = [tuple(x.shape[2:]) for x in model(torch.randn(1, 3, 100, 132))]
    assert shapes == [(50, 66), (25, 33), (13, 17), (7, 9), (4, 5)]


@pytest.mark.parametrize("size", [(64, 128), (80, 48)], ids=str)
def test_volo_of_any_size_has_its_positions_interpolated(size: Any) -> None:
    arguments = next(kw for source, kw, _ in MODELS if source is VOLO)
    ours = _build(VOLO, arguments).eval()
    theirs = _build(VOLO, {**arguments, "img_size": size}).eval()
    state = ours.state_dict()
    places = [size[0] // 16, size[1] // 16]
    # float32, as timm computes it
    state["pos_embed"] = resample_abs_pos_embed_nhwc(state["pos_embed"], places)
    theirs.load_state_dict(state)
    with pytest.raises(RuntimeError):
        ours(_images(*size))
    assert swap_mixers(ours).lifted == {"": "VOLO"}
    x = _images(*size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    for settings in ({}, {"norm": True}, {"stop_early": True, "indices": [0]}):
        settings = {**settings, "intermediates_only": "indices" in settings}
        found, want = (model.forward_intermediates(x, **settings) for model in (ours, theirs))
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


# --- what a swapped model is ---------------------------------------------------------------------


def _swin(**arguments: Any) -> nn.Module:
    return _build("swin_tiny_patch4_window7_224", {**SWIN, "img_size": 56, **arguments})


def test_restoring_brings_every_module_back() -> None:
    model = _swin()
    before = {path: (module, type(module)) for path, module in model.named_modules()}
    x = _images(56, 56)
    expected = model.eval()(x)
    report = swap_mixers(model)
    swapped = {
        path for path, module in model.named_modules() if type(module) is not before[path][1]
    }
    assert swapped == {*report.replaced, *report.lifted}
    assert set(restore_mixers(model)) == swapped
    for path, module in model.named_modules():
        assert module is before[path][0] and type(module) is before[path][1]
    assert torch.equal(model(x), expected)
    assert restore_mixers(model) == ()


def test_swapping_again_changes_nothing_and_takes_what_is_new() -> None:
    model = _swin()
    first = swap_mixers(model)
    again = swap_mixers(model)
    assert not again.replaced and not again.lifted
    assert set(again.already) == {*first.replaced, *first.lifted}
    restore_mixers(model.layers[1])
    third = swap_mixers(model)
    assert set(third.replaced) == {path for path in first.replaced if path.startswith("layers.1.")}


def test_what_takes_one_size_only_stays_so() -> None:
    model = _build("beit_base_patch16_224", {**VIT, "img_size": 64})
    for _ in range(2):
        report = swap_mixers(model)
        assert not report.lifted and "patch_embed" in report.kept
    with pytest.raises(AssertionError):
        model(_images(80, 64))


def test_part_of_a_model_and_model_within_a_module() -> None:
    model = _swin()
    assert set(swap_mixers(model.layers[0]).replaced) == {"blocks.0", "blocks.1"}
    wrapped = nn.Sequential(nn.Identity(), _swin())
    report = swap_mixers(wrapped)
    assert "1.layers.0.blocks.1" in report.replaced and "1.patch_embed" in report.lifted
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        swap_mixers("swin")  # type: ignore[arg-type]


@pytest.mark.parametrize(("source", "arguments", "size"), [MODELS[0], MODELS[5]], ids=_id)
def test_features(source: str, arguments: dict[str, Any], size: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model(source, features_only=True, out_indices=(0, 1), **arguments)
    model = model.double().eval()
    expected = model(_images(*size))
    assert swap_mixers(model).replaced
    torch.testing.assert_close(model(_images(*size)), expected, rtol=1e-10, atol=1e-10)


def test_weights_go_both_ways() -> None:
    theirs, ours = _swin(), _swin(drop_path_rate=0.0)
    swap_mixers(ours)
    for parameter in ours.parameters():
        parameter.data.zero_()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = _images(56, 56)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-10, atol=1e-10)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_copies_and_pickles_stay_swapped() -> None:
    model = _swin().eval()
    report = swap_mixers(model)
    x = _images(56, 56)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert set(swap_mixers(other).already) == {*report.replaced, *report.lifted}
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


def test_mode_type_and_gradients_are_kept() -> None:
    model = _swin()
    model.eval()
    model.layers[0].blocks[0].attn.qkv.weight.requires_grad_(False)
    swap_mixers(model)
    assert not any(module.training for module in model.modules())
    assert not model.layers[0].blocks[0].attn.qkv.weight.requires_grad
    model.train().bfloat16()
    model(_images(56, 56).bfloat16()).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert (parameter.grad is None) == (name == "layers.0.blocks.0.attn.qkv.weight")


def test_attention_dropout_is_timms() -> None:
    theirs = _swin(attn_drop_rate=0.3).train()
    ours = copy.deepcopy(theirs)
    swap_mixers(ours)
    _assert_close(_run(ours, _images(56, 56)), _run(theirs, _images(56, 56)))
    quiet = copy.deepcopy(ours)
    for module in quiet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert not torch.equal(
        _run(quiet, _images(56, 56))["output"], _run(ours, _images(56, 56))["output"]
    )


def test_layers_in_place_of_linear_ones_are_called() -> None:
    """As of low-rank adaptation; and hooks."""

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    theirs = _swin().eval()
    attn = theirs.layers[0].blocks[0].attn
    doubled = Doubled(attn.qkv.in_features, attn.qkv.out_features).double()
    doubled.load_state_dict(attn.qkv.state_dict())
    attn.qkv = doubled
    ours = copy.deepcopy(theirs)
    seen: list[Tensor] = []
    for model in (theirs, ours):
        model.layers[0].blocks[1].attn.proj.register_forward_hook(
            lambda *args: seen.append(args[2])
        )
    swap_mixers(ours)
    x = _images(56, 56)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    assert len(seen) == 2 and seen[0].numel() == seen[1].numel()


def test_changing_the_size_works_after_swapping() -> None:
    theirs = _swin().eval()
    ours = copy.deepcopy(theirs)
    swap_mixers(ours)
    for model in (theirs, ours):
        model.set_input_size(img_size=(64, 80), window_size=(4, 5))
    x = _images(64, 80)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_what_is_not_as_expected_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _swin()
    block = model.layers[0].blocks[0]
    del block.attn.proj_drop
    report = swap_mixers(model)
    assert (
        report.kept["layers.0.blocks.0"]
        == "SwinTransformerBlock: timm's class has no attn.proj_drop"
    )
    assert "mixers beside it" in report.kept["patch_embed"]
    assert "layers.0.blocks.1" in report.replaced

    def other(self: Any, x: Tensor, mask: Any) -> Tensor:
        return x

    model = _swin()
    monkeypatch.setattr(type(model.layers[0].blocks[0]), "_attn", other)
    report = swap_mixers(model)
    assert not report.replaced
    assert report.kept["layers.0.blocks.0"] == (
        "SwinTransformerBlock: timm's _attn takes x, mask, and not x"
    )


def test_other_attention_is_named() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    report = swap_mixers(model)
    assert not report.replaced and not report.lifted
    assert report.kept == {"blocks.0.attn": "Attention: none of ours computes it"}
    text = str(report)
    assert "replaced: 0" in text and "Attention: none of ours computes it: blocks.0.attn" in text


def test_compile_and_export() -> None:
    arguments = {**SWIN, "depths": (2,), "num_heads": (2,), "img_size": 32}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **arguments).eval()
    swap_mixers(model)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)


def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- example: swap_mixers -->\s+```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"timm": timm, "torch": torch}
    exec(code, names)
    assert names["logits"].shape == (1, 1000)
    assert "SwinTransformerBlock by window" in capsys.readouterr().out
    assert not swap_mixers(names["model"]).already
