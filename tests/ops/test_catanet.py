"""CATANet's mixers: what is sorted, what training moves, what a short map does."""

import copy

import pytest
import torch
import torch.nn.functional as F

from vitarium.ops import OverlappingPatchAttention, TokenAggregationAttention, spherical_kmeans
from vitarium.ops.catanet import _patches, reflected


def test_sequences_are_read_back_and_forth():
    found = reflected(torch.arange(11), 3)
    assert found.tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1]


def test_order_is_stable():
    """Tokens of one centre keep raster order, however many there are."""
    means = torch.eye(4)
    tokens = means[torch.arange(400) * 7 % 4][None]
    index = tokens.argmax(-1)[0]
    expected = sorted(range(400), key=lambda i: (int(index[i]), i))
    assert TokenAggregationAttention.order(tokens, means)[0].tolist() == expected


@pytest.mark.parametrize(("size", "group"), [((1, 1), 4), ((1, 5), 4), ((3, 3), 16), ((4, 5), 8)])
def test_local_part_by_definition(size, group):
    torch.manual_seed(0)
    mixer = TokenAggregationAttention(8, num_heads=1, group_size=group, dtype=torch.float64)
    count = size[0] * size[1]
    query, key, value = torch.randn(3, 1, count, 1, 8, dtype=torch.float64)
    order = torch.randperm(count)[None]
    found = mixer.attend(query, key, value, order)
    length = min(count, group)
    for rank, token in enumerate(order[0].tolist()):
        start = rank // length * length
        seen = order[0, reflected(torch.arange(start, start + 2 * length), count)]
        weights = (key[0, seen, 0] @ query[0, token, 0] * 8**-0.5).softmax(0)
        torch.testing.assert_close(found[0, token, 0], weights @ value[0, seen, 0])


def test_runs_of_all_images_are_summed_at_once():
    """To the bit: the last run mirrors the one before, and tokens choose between their means."""
    torch.manual_seed(0)
    mixer = TokenAggregationAttention(8, num_heads=1, num_tokens=13, dtype=torch.float64)
    tokens = torch.randn(3, 120, 8, dtype=torch.float64)
    padded = torch.cat([tokens, tokens[:, -10:].flip(1)], 1)
    runs = [padded[:, start : start + 10].flatten(0, 1) for start in range(0, 130, 10)]
    assert torch.equal(mixer._means_of_runs(tokens), torch.stack(runs).mean(1))


def test_training_moves_centres():
    torch.manual_seed(0)
    mixer = TokenAggregationAttention(
        8, num_heads=1, num_tokens=3, n_iter=2, ema_decay=0.9, dtype=torch.float64
    )
    x = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    tokens, runs = x.flatten(1, 2), mixer._means_of_runs(x.flatten(1, 2))
    units = F.normalize(tokens, dim=-1).flatten(0, 1)

    def moved(means):
        means = F.normalize(means, dim=-1)
        return spherical_kmeans.step(units, spherical_kmeans.step(units, means))

    mixer.train()(x)
    assert mixer.initted
    torch.testing.assert_close(mixer.means, moved(runs))
    before = mixer.means.clone()
    mixer(x)
    expected = 0.9 * before + 0.1 * moved(before)
    torch.testing.assert_close(mixer.means, expected, rtol=1e-12, atol=1e-12)
    again = TokenAggregationAttention(8, num_heads=1, num_tokens=3, dtype=torch.float64)
    again.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(again.eval()(x), mixer.eval()(x))


def test_copies_that_get_tensors_one_by_one_meet_the_centres():
    """As averages of a model in training do."""
    mixer = TokenAggregationAttention(8, num_heads=1)
    average = copy.deepcopy(mixer)
    x = torch.randn(2, 4, 5, 8)
    mixer.train()(x)
    for own, other in zip(average.state_dict().values(), mixer.state_dict().values()):
        own.copy_(other)
    torch.testing.assert_close(average.eval()(x), mixer.eval()(x))


@pytest.mark.parametrize(("length", "size"), [(18, 8), (8, 8), (16, 8), (21, 5), (5, 5), (4, 3)])
def test_patches_cover_and_average(length, size):
    index, factor = _patches(length, size, torch.device("cpu"))
    times = torch.bincount(index.flatten(), minlength=length)
    assert times.min() >= 1 and index.max() == length - 1
    # What is divided by is the number of patches, but where three overlap.
    wanted = torch.where(times == 3, 0.25, 1 / times)
    assert torch.equal(factor, wanted)


def test_one_patch_is_dense_attention():
    mixer = OverlappingPatchAttention(8, num_heads=2, patch_size=9, dtype=torch.float64)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    parts = (layer(x).flatten(1, 2).unflatten(-1, (2, -1)).transpose(1, 2) for layer in
             (mixer.to_q, mixer.to_k, mixer.to_v))  # fmt: skip
    expected = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(mixer(x), mixer.proj(expected))
