"""The testbeds: every mixer in three sizes, and nothing else that differs."""

import re

import pytest
import timm
import torch
from torch import nn

from vitarium.benchmarks import flops
from vitarium.ops import MIXERS, Mixer
from vitarium.zoo import list_models, testbed
from vitarium.zoo.testbed import SETTINGS, SIZES, name_of
from vitarium.zoo.testbed_settings import KINDS

OURS = sorted(name for name, m in MIXERS.items() if m.__module__.startswith("vitarium.ops."))


def _outside(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a testbed without that of its mixers."""
    return {key: value for key, value in model.state_dict().items() if ".mixer." not in key}


def _mixers(model: nn.Module) -> list[tuple[str, str]]:
    return [(m.name, m.extra_repr()) for m in model.modules() if isinstance(m, Mixer)]


def _images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def shared() -> dict[str, torch.Tensor]:
    """What all nano testbeds of seed 0 have in common."""
    torch.manual_seed(0)
    return _outside(testbed.testbed_nano(mixers="ulsam"))


@pytest.fixture(scope="module")
def shared_shapes() -> dict[str, torch.Size]:
    return {
        key: t.shape
        for key, t in _outside(testbed.testbed_tiny(mixers="ulsam", device="meta")).items()
    }


def test_every_mixer_has_its_testbeds():
    assert set(OURS) == SETTINGS.keys()
    assert {settings.kind for settings in SETTINGS.values()} == KINDS.keys()
    assert all(settings.source for settings in SETTINGS.values())
    names = {name_of(mixer, size) for mixer in OURS for size in SIZES}
    names |= {f"testbed_{size}" for size in SIZES}
    assert set(list_models("testbed_*")) == names
    assert not names & set(list_models())
    assert names | set(list_models()) == set(list_models("*"))
    with pytest.raises(ValueError, match="no testbed of mixer='windows' and size='nano'"):
        name_of("windows", "nano")


@pytest.mark.parametrize("mixer", OURS)
def test_nano(mixer, shared):
    torch.manual_seed(0)
    model = timm.create_model(name_of(mixer, "nano"))
    outside = _outside(model)
    assert outside.keys() == shared.keys()
    for key, value in outside.items():
        assert torch.equal(value, shared[key]), f"{key} depends on the mixer"
    for size in ((2, 3, 32, 32), (2, 3, 45, 27), (3, 3, 5, 70)):
        model.zero_grad()
        logits = model(_images(*size))
        assert logits.shape == (size[0], 1000)
        logits.square().sum().backward()
        for path, module in model.named_modules():
            indirect = module.indirect if isinstance(module, Mixer) else ()
            for key, parameter in module.named_parameters() if isinstance(module, Mixer) else ():
                if not any(re.fullmatch(pattern, key) for pattern in indirect):
                    assert parameter.grad is not None, f"{path}.{key}"
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(grad.isfinite().all() for grad in grads)
    features = model.eval().forward_intermediates(_images(1, 3, 40, 36), intermediates_only=True)
    assert [tuple(f.shape) for f in features] == [(1, 16, 10, 9), (1, 32, 5, 5), (1, 64, 3, 3)]


@pytest.mark.parametrize("mixer", OURS)
def test_tiny(mixer, shared_shapes):
    """The macro design around the mixer, of tiny and of a shallow small."""
    model = timm.create_model(name_of(mixer, "tiny"), device="meta")
    assert {key: t.shape for key, t in _outside(model).items()} == shared_shapes
    assert {m.name for m in model.modules() if isinstance(m, Mixer)} >= {mixer}
    small = timm.create_model(name_of(mixer, "small"), depths=(1, 1, 1, 1), device="meta")
    assert {key: t.shape for key, t in _outside(small).items()}.items() <= shared_shapes.items()


def test_sizes_are_those_of_swin():
    for size, params, gflops in (("tiny", 28.3, 4.5), ("small", 49.6, 8.7)):
        counts = flops.count(name_of("window", size))
        assert counts.params / 1e6 == pytest.approx(params, rel=0.05)
        assert counts.macs / 1e9 == pytest.approx(gflops, rel=0.05)
    assert 50e3 < flops.count(testbed.testbed_nano(mixers="window", num_classes=10)).params < 150e3


@pytest.mark.parametrize(
    ("mixer", "family", "stages"),
    [
        ("neighborhood", "dinat_s_tiny", 4),
        ("bilevel_routing", "biformer_stl", 3),
        ("long_short_distance", "crossformer_small", 4),
    ],
)
def test_settings_are_those_of_the_family(mixer, family, stages):
    """Where this package has the paper's backbone of the same widths and depths."""
    ours = timm.create_model(name_of(mixer, "tiny"), device="meta")
    theirs = timm.create_model(family, device="meta")
    for stage in range(stages):
        assert _mixers(ours.stages[stage]) == _mixers(theirs.stages[stage])


# --- specs of one's own ---------------------------------------------------------------------------


def test_specs_per_stage_and_block():
    model = testbed.testbed_tiny(
        mixers=["window", ["channel", ("window", {"window_size": 4})], "linear", "attention"],
        device="meta",
    )
    names = [[m.name for m in stage.modules() if isinstance(m, Mixer)] for stage in model.stages]
    assert names == [["window"] * 2, ["channel", "window"], ["linear"] * 6, ["attention"] * 2]
    first, second = (block.mixer for block in model.stages[0].blocks)
    assert (first.shift_size, second.shift_size) == ((0, 0), (3, 3))
    given = model.stages[1].blocks[1].mixer
    assert given.window_size == (4, 4) and given.shift_size == (3, 3) and given.num_heads == 6


def test_one_spec_is_for_all_stages():
    for spec in ("window", ["window"], ("window", {"window_size": 5})):
        model = timm.create_model("testbed_nano", mixers=spec)
        assert [name for name, _ in _mixers(model)] == ["window"] * 5
    assert {m.window_size for m in model.modules() if isinstance(m, Mixer)} == {(5, 5)}


@pytest.mark.parametrize(
    ("mixers", "error", "message"),
    [
        (["window", "window"], ValueError, "must be one spec, or have one entry for each of 3"),
        ("windows", ValueError, "mixer 'windows' is unknown"),
        (["window", [], "window"], ValueError, "has an empty list for stage 1"),
        (["window", 7, "window"], TypeError, "is neither a name nor"),
        (("window", {"window": 7}), TypeError, "'window'"),
        (7, TypeError, "is neither a name nor"),
    ],
)
def test_bad_specs_are_refused(mixers, error, message):
    with pytest.raises(error, match=message):
        testbed.testbed_nano(mixers=mixers)


def test_a_mixer_from_elsewhere():
    class Elsewhere(Mixer, name="elsewhere"):
        def __init__(self, dim: int, *, num_heads: int, device=None, dtype=None) -> None:
            super().__init__(dim)
            self.num_heads = num_heads
            self.scale = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

        def mix(self, x, context=None):
            return self.scale * x.mean((1, 2), keepdim=True).expand_as(x)

    try:
        torch.manual_seed(0)
        model = timm.create_model("testbed_nano", mixers=["elsewhere"], proj_drop_rate=0.1)
        heads = [block.mixer.num_heads for stage in model.stages for block in stage.blocks]
        assert heads == [2, 2, 4, 4, 8]
        assert model(_images(2, 3, 33, 31)).isfinite().all()
    finally:
        del MIXERS["elsewhere"]
