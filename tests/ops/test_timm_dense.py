"""Our mixers with timm's weights give the outputs of timm's modules, in training too."""

from functools import partial

import pytest
import torch
from timm.layers import Attention
from timm.models.shvit import SHSA
from torch import nn

from vitarium.ops import MultiHeadAttention, SingleHeadAttention


def _draw(module: nn.Module) -> nn.Module:
    """Weights and statistics away from what they start with."""
    generator = torch.Generator().manual_seed(0)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)
            if tensor.dim() > 1:
                tensor.sub_(0.7).div_(tensor[0].numel() ** 0.5)
    return module.double()


def _compare(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, call) -> None:
    """Outputs, gradients and updated statistics; `call` gives timm's module its layout."""
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for training in (True, False):
        results = []
        for module, run in ((ours, ours), (theirs, call)):
            module.train(training).zero_grad()
            leaf = x.clone().requires_grad_()
            output = run(leaf)
            output.square().sum().backward()
            gradients = [p.grad.flatten() for p in module.parameters()]
            statistics = [t.double().flatten() for t in module.state_dict().values()]
            results.append([output, leaf.grad, *gradients, *statistics])
        for found, want in zip(*results, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(14, 14), (5, 3), (1, 4)], ids=str)
@pytest.mark.parametrize("arguments", [{"dim": 32, "pdim": 12}, {"dim": 20, "pdim": 20}], ids=str)
def test_single_head_attention(arguments, size):
    theirs = _draw(SHSA(qk_dim=16, **arguments))
    ours = SingleHeadAttention(**arguments, dtype=torch.float64)
    x = torch.randn(2, *size, arguments["dim"], dtype=torch.float64)
    _compare(ours, theirs, x, lambda x: theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def test_partial_channels_are_those_of_the_published_models():
    for dim, pdim in ((224, 48), (320, 68), (308, 66), (448, 96), (352, 75), (336, 72)):
        assert SingleHeadAttention(dim, device="meta").widths[-1] == pdim


def test_single_head_attention_starts_as_a_residual_branch():
    mixer = SingleHeadAttention(32)
    assert not mixer(torch.randn(2, 7, 7, 32)).any()
    assert SingleHeadAttention(32, zero_init_last=False)(torch.randn(2, 7, 7, 32)).any()


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_heads": 3},
        {"num_heads": 4, "qkv_bias": True, "qk_norm": True},
        {"num_heads": 2, "qkv_bias": True, "proj_bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_multi_head_attention(arguments, is_causal):
    norm_layer = partial(nn.LayerNorm, eps=1e-6)
    theirs = _draw(Attention(24, norm_layer=norm_layer, **arguments))
    arguments = {"qkv_bias": False, **arguments}
    ours = MultiHeadAttention(24, is_causal=is_causal, **arguments, dtype=torch.float64)
    x = torch.randn(2, 4, 7, 24, dtype=torch.float64)
    mask = torch.ones(28, 28, dtype=torch.bool).tril() if is_causal else None
    _compare(ours, theirs, x, lambda x: theirs(x.flatten(1, 2), mask).unflatten(1, (4, 7)))
