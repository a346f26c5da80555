"""Sparsifiner: what is kept, other map sizes, parts of queries, pruned tokens, reconstruction."""

import copy
import math

import pytest
import torch

from vitarium.ops import SparsifinerAttention, attention, indexed_attention, sparsifiner


def _mixer(**arguments):
    torch.manual_seed(0)
    arguments = {"num_heads": 2, "input_resolution": (4, 5), **arguments}
    mixer = SparsifinerAttention(16, dtype=torch.float64, **arguments)
    for parameter in mixer.mask_predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def test_as_many_keys_as_said():
    mixer = _mixer(attn_keep_rate=0.3).eval()
    weights = mixer.attention_map(torch.randn(3, 4, 5, 16, dtype=torch.float64), (2, 1))
    assert ((weights > 0).sum((2, 3)) == math.ceil(0.3 * 20)).all()
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(3, 2, dtype=torch.float64))


def test_all_keys_is_dense_attention():
    mixer = _mixer(attn_keep_rate=1.0).eval()
    x = torch.randn(2, 4, 5, 16, dtype=torch.float64)
    query, key, value = mixer.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
    torch.testing.assert_close(mixer(x), mixer.proj(attention(query, key, value).flatten(-2)))


def test_threshold_of_nothing_kept_is_zero():
    mixer = _mixer(attn_score_threshold=1e9).eval()
    x = torch.randn(1, 4, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), mixer.proj.bias.expand_as(x))


@pytest.mark.parametrize("arguments", [{}, {"attn_score_threshold": 0.4}], ids=str)
def test_queries_in_parts(arguments, monkeypatch):
    mixer = _mixer(**arguments)
    x = torch.randn(2, 7, 6, 16, dtype=torch.float64, requires_grad=True)
    whole = mixer(x)
    (expected,) = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr(sparsifiner, "CHUNK", 5 * 2 * 2 * 42)
    parts = mixer(x)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), x)[0], expected)


def test_basis_of_another_map():
    predictor = _mixer(num_prefix_tokens=1).mask_predictor
    projection = predictor.key_projection((8, 10), 1)
    assert projection.shape == (81, 2)
    torch.testing.assert_close(projection[0] * 4, predictor.proj_n[0])
    constant = torch.ones_like(predictor.proj_n)
    predictor.proj_n.data.copy_(constant)
    for size in ((4, 5), (8, 10), (3, 7), (1, 1)):
        total = predictor.key_projection(size, 0).sum(0)
        torch.testing.assert_close(total, torch.full_like(total, 20))
    torch.testing.assert_close(predictor.basis((4, 5), 1), predictor.proj_back_n.T.abs())


def test_pruned_tokens_neither_count_nor_are_chosen():
    mixer = _mixer(num_prefix_tokens=1, token_keep_rate=0.5, prune_attn_matrix_row=True).eval()
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    _, token_mask = mixer.mix_tokens(x)
    assert token_mask.sum(1).tolist() == [10, 10]
    output, left = mixer.mix_tokens(x, token_mask=token_mask)
    assert torch.equal(left, token_mask)
    other = x.clone()
    other[:, 1:][~token_mask] = torch.randn(20, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer.mix_tokens(other, token_mask=token_mask)[0], output)
    pruned = output[:, 1:][~token_mask]
    torch.testing.assert_close(pruned, mixer.proj.bias.expand_as(pruned))
    with pytest.raises(ValueError, match="x has shape"):
        mixer.mix_tokens(x[:, :19])


def test_prediction_learns_from_its_reconstruction_of_attention():
    mixer = _mixer(attn_recon=True)
    x = torch.randn(2, 4, 5, 16, dtype=torch.float64)
    mixer.train()(x)
    mixer.reconstruction_loss.backward()
    for name, parameter in mixer.mask_predictor.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert copy.deepcopy(mixer).reconstruction_loss is None
    mixer.eval()(x)
    assert mixer.reconstruction_loss is None


def test_one_basis_for_both():
    mixer = _mixer(share_inout_proj=True)
    assert mixer.mask_predictor.proj_n is mixer.mask_predictor.proj_back_n
    again = _mixer(share_inout_proj=True)
    again.load_state_dict(mixer.state_dict())


@pytest.mark.parametrize("count", [2, 40])
def test_a_key_named_twice_counts_twice(count):
    """Gathered (of 160 keys) and not."""
    tensors = torch.randn(3, 1, 160, 1, 8, dtype=torch.float64, requires_grad=True)
    index = torch.randint(4, (1, 1, 160, count))
    found = indexed_attention(*tensors, index)
    expected = indexed_attention(*tensors, index, backend="reference")
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(out.square().sum(), tensors)[0] for out in (found, expected))
    torch.testing.assert_close(*grads)


def test_bad_tables_are_refused():
    query = torch.randn(2, 5, 2, 8)
    for index, error, message in (
        (torch.zeros(2, 2, 5, 3), TypeError, "index must be a tensor of int32 or int64"),
        (torch.zeros(2, 1, 5, 3).long(), ValueError, "index has shape"),
        (torch.zeros(2, 2, 5, 0).long(), ValueError, "K at least 1"),
    ):
        with pytest.raises(error, match=message):
            indexed_attention(query, query, query, index)
    with pytest.raises(ValueError, match="tokens and heads of key and value must agree"):
        indexed_attention(query, query, query[:, 1:], torch.zeros(2, 2, 5, 1).long())
