"""Key-driven allocation: who gets how many queries, when, and that it is frozen."""

import pytest
import torch

from vitarium.ops import GroupedQueryAttention, KeyDrivenGroupedQueryAttention
from vitarium.ops.grouped_query import allocate, even_allocation


def _mixer(**arguments):
    torch.manual_seed(0)
    return KeyDrivenGroupedQueryAttention(
        24, num_heads=6, num_kv_heads=3, dtype=torch.float64, **arguments
    ).eval()


@pytest.mark.parametrize(
    ("shares", "heads", "expected"),
    [
        ([1.0, 0.0, 0.2], 6, [5, 0, 1]),
        ([0.5, 0.5, 0.0], 6, [3, 3, 0]),  # halves are rounded to even, and nothing is left over
        ([1.0, 1.0, 1.0, 1.0], 6, [1, 1, 2, 2]),  # 2 each is too many: from the first largest
        ([3.0, 3.0, 3.0, 1.0], 5, [1, 2, 2, 0]),
        ([0.0, 0.0, 0.0], 6, [2, 2, 2]),  # the official formula: NaN
    ],
)
def test_allocation(shares, heads, expected):
    found = allocate(torch.tensor(shares, dtype=torch.float64), heads)
    assert found.sum() == heads
    assert found.tolist() == expected


def test_allocations_add_up():
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 9):
        for heads in range(count, 17):
            assert even_allocation(heads, count).sum() == heads
            found = allocate(torch.rand(count, generator=generator), heads)
            assert found.sum() == heads and found.min() >= 0


def test_even_allocation_is_grouped_query_attention():
    mixer = _mixer()
    grouped = GroupedQueryAttention(24, num_heads=6, num_kv_heads=3, dtype=torch.float64)
    state = mixer.state_dict()
    assert state.pop("allocation").tolist() == [2, 2, 2]
    grouped.load_state_dict(state)
    x = torch.randn(2, 4, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), grouped(x))


@pytest.mark.parametrize("kind", ["key", "diff", "ema"])
def test_calibrated_is_frozen_and_stored(kind):
    mixer, dynamic = _mixer(kind=kind), _mixer(kind=kind, dynamic=True)
    with torch.no_grad():
        mixer.k.weight[:8] *= 3
    dynamic.load_state_dict(mixer.state_dict())
    x = 3 * torch.randn(4, 5, 5, 24, dtype=torch.float64)
    before = mixer(x)
    allocation = mixer.calibrate(x)
    assert allocation.sum() == 6 and allocation.tolist() != [2, 2, 2]
    assert not torch.allclose(mixer(x), before)
    torch.testing.assert_close(mixer(x), dynamic(x))
    images = torch.cat([mixer(image[None]) for image in x])
    torch.testing.assert_close(images, mixer(x))
    again = _mixer(kind=kind)
    again.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(again(x), mixer(x))
    official = {key: t for key, t in mixer.state_dict().items() if key != "allocation"}
    again.load_state_dict(official, strict=True)
    assert torch.equal(again.allocation, allocation)


def test_calibration_adds_up_maps():
    mixer = _mixer()
    maps = torch.randn(3, 2, 4, 5, 24, dtype=torch.float64)
    together = mixer.calibrate(maps.flatten(0, 1))
    assert torch.equal(mixer.calibrate(*maps), together)
    with pytest.raises(ValueError, match="allowed is at least one"):
        mixer.calibrate()


def test_dynamic_training_allocates_every_few_steps():
    mixer = _mixer(kind="ema", dynamic=True, window_size=2).train()
    x = torch.randn(2, 4, 5, 24, dtype=torch.float64)
    norms = mixer._norms(mixer.k(x).unflatten(-1, (3, -1)))
    for expected in (norms / 2, norms / 2, (norms / 2 + norms) / 2):
        mixer(x)
        torch.testing.assert_close(mixer.cache, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_exports(dynamic):
    mixer = _mixer(dynamic=dynamic)
    x = torch.randn(2, 4, 5, 24, dtype=torch.float64)
    exported = torch.export.export(mixer, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), mixer(x))
