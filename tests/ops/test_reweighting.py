"""Mixers that weigh positions or channels: by their definitions."""

import math

import pytest
import torch

from vitarium.ops import GaussianAdaptiveAttention, GaussianBlock, SubspaceAttention


def _by_definition(mixer, x):
    """Gaussian after Gaussian, head after head."""
    axis = 1 if mixer.of_tokens else 2
    tokens = x.flatten(1, 2)
    length = tokens.shape[axis]
    heads = min(mixer.num_heads, length)
    size = length // heads
    outputs = []
    for head in range(heads):
        stop = length if head == heads - 1 else (head + 1) * size
        part = tokens.narrow(axis, head * size, stop - head * size)
        counted = part
        if mixer.padding_value is not None:
            counted = torch.where(part == mixer.padding_value, 0.0, part)
        mean = counted.mean(axis, keepdim=True)
        variance = torch.full_like(mean, 1e-8)
        if part.shape[axis] > 1:
            variance = counted.var(axis, keepdim=True) + 1e-8
        product = torch.ones_like(part)
        for offset, width in zip(mixer.mean_offsets[head], mixer.c[head]):
            square = (part - mean - offset) ** 2 / variance
            product = product * torch.exp(-square / (2 * width**2))
            product = product / torch.sqrt(2 * math.pi * width**2)
        output = part * product / product.sum(axis, keepdim=True).clamp(min=1e-8)
        if mixer.padding_value is not None:
            output = torch.where(part == mixer.padding_value, part, output)
        outputs.append(output)
    return torch.cat(outputs, axis).view(x.shape)


@pytest.mark.parametrize("norm_axis", [1, -1])
@pytest.mark.parametrize("size", [(3, 5), (1, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("padding_value", [None, 0.0])
def test_gaussians(size, norm_axis, padding_value):
    torch.manual_seed(0)
    mixer = GaussianAdaptiveAttention(
        11,
        num_heads=4,
        num_gaussians=3,
        norm_axis=norm_axis,
        padding_value=padding_value,
        dtype=torch.float64,
    )
    torch.nn.init.normal_(mixer.mean_offsets, std=0.3)
    x = torch.randn(2, *size, 11, dtype=torch.float64)
    x[0, 0, 0, :3] = 0
    torch.testing.assert_close(mixer(x), _by_definition(mixer, x))


def test_offsets_and_widths_have_gradients():
    mixer = GaussianAdaptiveAttention(8, num_heads=2, num_gaussians=2, dtype=torch.float64)
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)

    def run(offsets, widths):
        parameters = {"mean_offsets": offsets, "c": widths}
        return torch.func.functional_call(mixer, parameters, (x,))

    leaves = [p.detach().clone().requires_grad_() for p in mixer.parameters()]
    assert torch.autograd.gradcheck(run, leaves)


def test_block_is_a_residual_of_layers():
    block = GaussianBlock(8, norm_axes=(1, -1, 1), num_heads=(1, 2, 3), num_gaussians=(2, 1, 4))
    x = torch.randn(2, 3, 3, 8)
    expected = x
    for layer in block.layers:
        expected = expected + layer(expected)
    torch.testing.assert_close(block(x), expected)
    with pytest.raises(ValueError, match="numbers of layers differ"):
        GaussianBlock(8, norm_axes=(1,), num_heads=(1, 2), num_gaussians=(1, 1))


def test_weights_of_a_subspace_sum_to_one():
    mixer = SubspaceAttention(12, num_splits=3).eval()
    x = torch.randn(2, 5, 4, 12)
    weights = mixer.weights(x)
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(2, 3))
    torch.testing.assert_close(mixer(x), x * (1 + weights.repeat_interleave(4, -1)))
    other = x.clone()
    other[..., :4] = 0  # subspaces do not meet
    torch.testing.assert_close(mixer.weights(other)[..., 1:], weights[..., 1:])
