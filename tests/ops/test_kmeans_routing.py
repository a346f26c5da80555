"""Routing attention: what k-means finds, what training moves, and what each option hides."""

import copy

import pytest
import torch
import torch.nn.functional as F

from vitarium.ops import KmeansRoutingAttention, spherical_kmeans
from vitarium.ops.kmeans_routing import HIDDEN_SELF


def _clouds(count, points, dim=6):
    centres = F.normalize(torch.randn(count, dim, dtype=torch.float64), dim=-1)
    x = centres.repeat_interleave(points, 0) + 0.01 * torch.randn(count * points, dim).double()
    return centres, F.normalize(x, dim=-1)


def test_steps_find_clouds_and_leave_empty_centres():
    torch.manual_seed(1)
    centres, x = _clouds(3, 20)
    found = spherical_kmeans.initial(x, 3, 10)
    assert (found @ centres.T).amax(1).min() > 0.999
    far = -x.mean(0, keepdim=True)
    moved = spherical_kmeans.step(x, torch.cat([found, far]))
    torch.testing.assert_close(moved[3:], far)
    torch.testing.assert_close(moved[:3].norm(dim=-1), torch.ones(3, dtype=torch.float64))


def test_training_moves_centres_by_a_little():
    torch.manual_seed(0)
    mixer = KmeansRoutingAttention(16, num_heads=2, num_clusters=3, ema_decay=0.75)
    drawn = mixer.router.means.clone()
    mixer.eval()(torch.randn(1, 5, 6, 16))
    assert torch.equal(mixer.router.means, drawn) and not mixer.router.initted
    x = torch.randn(2, 5, 6, 16)
    mixer.train()(x)
    assert mixer.router.initted and not torch.equal(mixer.router.means, drawn)
    loss = mixer.commitment_loss
    loss.backward()
    assert mixer.to_q.weight.grad.abs().sum() > 0
    before = mixer.router.means.clone()
    mixer(x)
    query, key, _ = mixer._project(x, None)
    tokens = F.normalize(torch.cat([query, key], 1).permute(2, 0, 1, 3), dim=-1).flatten(1, 2)
    expected = 0.75 * before + 0.25 * spherical_kmeans.step(tokens, before)
    torch.testing.assert_close(mixer.router.means, expected)
    assert copy.deepcopy(mixer).commitment_loss is None
    again = KmeansRoutingAttention(16, num_heads=2, num_clusters=3, ema_decay=1.0)
    again.load_state_dict(mixer.state_dict())
    again.train()(x)  # what was loaded is not drawn anew
    torch.testing.assert_close(again.router.means, mixer.router.means)


@pytest.mark.parametrize("shared_qk", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_one_cluster_of_all_is_dense_attention(causal, shared_qk):
    torch.manual_seed(0)
    mixer = KmeansRoutingAttention(
        8, num_heads=1, num_clusters=1, causal=causal, shared_qk=shared_qk, dtype=torch.float64
    ).eval()
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    tokens = x.flatten(1, 2)[0]
    query, value = mixer.to_q(tokens), mixer.to_v(tokens)
    key = F.normalize(query, dim=-1) if shared_qk else mixer.to_k(tokens)
    scores = query @ key.T * 8**-0.5
    if shared_qk:
        scores = scores.fill_diagonal_(0) + torch.eye(12).double() * HIDDEN_SELF
    if causal:
        scores = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    if mixer.num_mem_kv:
        scores = torch.cat([query @ mixer.mem_key[0, 0].T * 8**-0.5, scores], 1)
        value = torch.cat([mixer.mem_value[0, 0], value])
    expected = mixer.to_out(scores.softmax(-1) @ value / (1 + 1e-5)).view(x.shape)
    torch.testing.assert_close(mixer(x), expected)


def test_second_map_is_refused_where_undefined():
    x = torch.randn(1, 3, 4, 8)
    for arguments in ({"causal": True}, {"shared_qk": True}):
        mixer = KmeansRoutingAttention(8, num_heads=1, num_clusters=2, **arguments)
        with pytest.raises(ValueError, match="context is defined without causal and shared_qk"):
            mixer(x, x)
    mixer = KmeansRoutingAttention(
        8, num_heads=1, num_clusters=2, window_size=3, context_window_size=5
    )
    index = mixer.route(torch.randn(1, 12, 1, 8), torch.randn(1, 20, 1, 8), x)
    assert [i.shape[-1] for i in index] == [3, 5]
