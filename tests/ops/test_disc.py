"""Disc attention: which tokens are seen, and with which weights."""

import pytest
import torch

from vitarium.ops import DiscAttention


def _definition(mixer, x):
    """The output by a mask over all pairs of tokens."""
    height, width = x.shape[1:3]
    qkv = mixer.qkv(x).flatten(1, 2).unflatten(-1, (3, mixer.num_heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    place = torch.arange(height * width)
    row, column = place // width, place % width
    down, right = row - row[:, None], column - column[:, None]
    seen = down**2 + right**2 < mixer.radius**2
    scores = query @ key.mT * mixer.scale
    if mixer.rpb is not None:
        reach = mixer.radius - 1
        index = [offset.clamp(-reach, reach) + reach for offset in (down, right)]
        scores = scores + mixer.rpb[:, index[0], index[1]]
    scores = scores.masked_fill(~seen, -torch.inf)
    if mixer.down_factor is not None:
        maps = (tensor.transpose(1, 2).unflatten(1, (height, width)) for tensor in (key, value))
        far_key, far_value = (mixer.pool(tensor).transpose(1, 2) for tensor in maps)
        scores = torch.cat([scores, query @ far_key.mT * mixer.scale], -1)
        value = torch.cat([value, far_value], 2)
    output = (scores.softmax(-1) @ value).transpose(1, 2).reshape(x.shape)
    return mixer.proj(output)


@pytest.mark.parametrize("size", [(9, 11), (5, 3), (1, 6), (23, 17)], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [{"radius": 3, "rel_pos_bias": True}, {"radius": 6}, {"radius": 2, "down_factor": 3}],
    ids=str,
)
def test_is_a_mask_over_all_pairs(size, arguments):
    torch.manual_seed(0)
    mixer = DiscAttention(16, num_heads=2, dtype=torch.float64, **arguments)
    x = torch.randn(2, *size, 16, dtype=torch.float64, requires_grad=True)
    found, expected = mixer(x), _definition(mixer, x)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    inputs = [x, *mixer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_are_finite_where_tiles_are_padded(dtype):
    mixer = DiscAttention(32, num_heads=2, radius=4, dtype=dtype)
    x = torch.randn(2, 23, 17, 32, dtype=dtype, requires_grad=True)
    mixer(x).float().square().sum().backward()
    assert x.grad.isfinite().all()


def test_attention_map_is_a_disc():
    mixer = DiscAttention(16, num_heads=2, radius=4)
    weights = mixer.attention_map(torch.randn(1, 12, 12, 16), (5, 1))
    row, column = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    inside = (row - 5) ** 2 + (column - 1) ** 2 < 16
    assert torch.equal(weights[0] > 0, inside.expand(2, -1, -1))
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(1, 2))


def test_pooling_is_the_mean_at_first():
    mixer = DiscAttention(8, num_heads=1, down_factor=2, dtype=torch.float64)
    x = torch.randn(1, 4, 6, 1, 8, dtype=torch.float64)
    expected = torch.nn.functional.avg_pool2d(x[:, :, :, 0].permute(0, 3, 1, 2), 2)
    torch.testing.assert_close(mixer.pool(x)[:, :, 0].mT, expected.flatten(2))
