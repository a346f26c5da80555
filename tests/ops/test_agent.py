"""What is particular to agent attention and its mixers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitarium.ops import (
    AgentAttention,
    AgentCrossShapedAttention,
    AgentReducedAttention,
    AgentStripes,
    AgentWindowAttention,
    Mixer,
    agent_attention,
    agent_portable,
)

NONE, ALL = ((0, 0), (0, 0)), ((1 << 40, 1 << 40), (1 << 40, 1 << 40))


def test_as_many_agents_as_tokens_with_biases_that_single_them_out() -> None:
    """Agents that attend to one key each, and queries that all read from one agent."""
    query, key, value = torch.randn(3, 2, 2, 3, 2, 8, dtype=torch.float64)
    agent = torch.randn(2, 6, 2, 8, dtype=torch.float64)
    alone = torch.full((6, 6), -torch.inf).fill_diagonal_(0).expand(2, 6, 6)
    bias = torch.full((2, 6, 6), -torch.inf)
    bias[:, :, 4] = 0
    output = agent_attention(query, key, value, agent, agent_bias=alone, query_bias=bias)
    torch.testing.assert_close(output, value[:, 1:, 1:2].expand_as(value))


@pytest.mark.parametrize("kept", [0, 1 << 25])
def test_weights_are_kept_or_computed_again(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of queries, several images at once or one at a time: the same gradients."""
    monkeypatch.setattr(agent_portable, "KEPT_BYTES", kept)
    monkeypatch.setattr("vitarium.ops.agent.SMALL_TRAINING", NONE)
    shapes = [(3, 130, 2, 8)] * 3 + [(3, 4, 2, 8), (2, 4, 130), (2, 130, 4)]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    def run(backend: str) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in drawn]
        output = agent_attention(
            *leaves[:4], agent_bias=leaves[4], query_bias=leaves[5], backend=backend
        )
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    expected = run("reference")
    for scores in (1, 2200, 1 << 20):  # bands of 64 queries; two images; all
        monkeypatch.setattr(agent_portable, "CPU_SCORES", (scores, scores))
        for ours, exact in zip(run("torch"), expected):
            torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("small", [NONE, ALL], ids=["piece by piece", "at once"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("value_dim", [8, 5])
def test_inference_takes_either_way(small, dtype, error, value_dim, monkeypatch) -> None:
    monkeypatch.setattr("vitarium.ops.agent.SMALL", small)
    query, key, agent = (torch.randn(3, n, 2, 8, dtype=torch.float64) for n in (35, 20, 6))
    value = torch.randn(3, 20, 2, value_dim, dtype=torch.float64)
    hidden = torch.rand(2, 6, 20).ge(0.7).index_fill(2, torch.tensor(3), False)
    agent_bias = torch.randn(2, 6, 20, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    query_bias = torch.randn(2, 35, 6, dtype=torch.float64)
    biases = {"agent_bias": agent_bias, "query_bias": query_bias}
    expected = agent_attention(query, key, value, agent, **biases, backend="reference")
    given = [tensor.to(dtype) for tensor in (query, key, value, agent)]
    found = agent_attention(*given, **biases)
    assert found.dtype == dtype and found.is_contiguous()
    assert (found.double() - expected).abs().max() <= error * expected.abs().max()


def test_errors() -> None:
    query = torch.randn(2, 3, 4, 2, 8)
    agent = torch.randn(2, 4, 2, 8)
    for wrong in (agent[:1], agent[:, :0], agent[:, :, :1], agent[..., :4], agent[0]):
        with pytest.raises(ValueError, match="agent has shape"):
            agent_attention(query, query, query, wrong)
    with pytest.raises(ValueError, match="grouped heads are not defined"):
        agent_attention(query, query[..., :1, :], query[..., :1, :], agent)
    with pytest.raises(ValueError, match=r"query_bias has shape \(2, 4, 12\)"):
        agent_attention(query, query, query, agent, query_bias=torch.zeros(2, 4, 12))
    with pytest.raises(TypeError, match="agent_bias must be a tensor"):
        agent_attention(query, query, query, agent, agent_bias=1.0)


def test_pooling() -> None:
    """That of PyTorch, also where bins overlap; before the projection as after it."""
    mixer = AgentAttention(8, num_heads=2, agent_num=16, window=7, dtype=torch.float64)
    x = torch.randn(2, 10, 7, 8, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 4).flatten(2).mT
    torch.testing.assert_close(mixer.pooled(x), expected)
    for agent_num in (1, 9):  # on either side of what is less work
        mixer = AgentAttention(8, num_heads=2, agent_num=agent_num, dtype=torch.float64)
        query = mixer.qkv(x)[..., :8]
        agents = mixer.agents(x, query.unflatten(-1, (2, 4)), mixer.qkv)
        torch.testing.assert_close(agents, mixer.pooled(query))


def test_biases_of_another_map_are_interpolated() -> None:
    mixer = AgentAttention(8, num_heads=2, agent_num=4, window=6, dtype=torch.float64)
    native = mixer._query_bias((6, 6))
    ours = mixer._query_bias((9, 5))
    sides = (mixer.ha_bias + mixer.wa_bias).permute(0, 3, 1, 2)
    expected = F.interpolate(mixer.na_bias, size=(9, 5), mode="bilinear")
    expected = expected + F.interpolate(sides, size=(9, 5), mode="bilinear")
    assert native.shape == (2, 6, 6, 4)
    torch.testing.assert_close(ours, expected.permute(0, 2, 3, 1))
    torch.testing.assert_close(mixer._agent_bias((6, 6)).shape, torch.Size((2, 4, 6, 6)))


def test_biases_of_other_agents_are_interpolated() -> None:
    """Tables of 3 x 3 agents serve 4 x 5, as in the official code for detection."""
    mixer = AgentReducedAttention(
        8, num_patches=36, num_heads=2, agent_num=9, downstream_agent_shape=(4, 5)
    ).double()
    sides = (mixer.ah_bias + mixer.aw_bias), (mixer.ha_bias + mixer.wa_bias)
    for table, side, ours in (
        (mixer.an_bias, sides[0], mixer._agent_bias((7, 6))),
        (mixer.na_bias, sides[1].permute(0, 3, 1, 2), mixer._query_bias((7, 6)).movedim(-1, 1)),
    ):
        maps = [F.interpolate(bias, size=(7, 6), mode="bilinear") for bias in (table, side)]
        agents = sum(maps).flatten(2).transpose(1, 2).unflatten(2, (3, 3))
        agents = F.interpolate(agents, size=(4, 5), mode="bilinear")
        expected = agents.flatten(2).transpose(1, 2).unflatten(2, (7, 6))
        torch.testing.assert_close(ours, expected)
    x = torch.randn(2, 7, 6, 8, dtype=torch.float64)
    pooled = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (4, 5)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(mixer.pooled(x), pooled)
    assert mixer(x).shape == x.shape


def test_sequence_with_a_class_token() -> None:
    mixer = AgentAttention(8, num_heads=2, agent_num=4, window=3, class_token=True)
    x = torch.randn(2, 13, 8, requires_grad=True)
    output = mixer.mix_tokens(x, (3, 4))
    assert output.shape == x.shape
    output.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    with pytest.raises(ValueError, match=r"size=\(3, 3\) is not that of 12 tokens"):
        mixer.mix_tokens(x)
    with pytest.raises(ValueError, match="x has shape"):
        mixer.mix_tokens(x[..., :4], (3, 4))
    with pytest.raises(ValueError, match="class_token=True"):
        AgentAttention(8, num_heads=2, agent_num=4).mix_tokens(x, (3, 4))


@pytest.mark.parametrize(
    "mixer",
    [
        AgentAttention(8, num_heads=2, agent_num=4),
        AgentReducedAttention(8, num_patches=49, num_heads=2, agent_num=4, sr_ratio=2),
        AgentWindowAttention(8, window_size=4, num_heads=2, agent_num=4, shift_size=1),
        AgentCrossShapedAttention(8, resolution=8, num_heads=2, split_size=2, agent_num=4),
    ],
    ids=lambda mixer: mixer.name,
)
def test_attention_maps_are_distributions(mixer: Mixer) -> None:
    """The product of both stages sums to 1, within what the query can see."""
    weights = mixer.double().attention_map(torch.randn(2, 8, 8, 8, dtype=torch.float64), (5, 2))
    assert weights.shape == (2, 2, 8, 8)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, 2, dtype=torch.float64))
    seen = (weights > 0).all(0)
    if mixer.name == "agent_window":  # the window of rows 5 to 8 and columns 1 to 4
        assert seen.sum((1, 2)).tolist() == [16, 16]
        assert seen[:, 5:, 1:5].all() and seen[:, 0, 1:5].all()
    elif mixer.name == "agent_cswin":
        assert seen[0].sum() == 16 and seen[0, :, 2:4].all()
        assert seen[1].sum() == 16 and seen[1, 4:6].all()
    else:
        assert seen.all()


def test_stripes_do_not_meet() -> None:
    stripes = AgentStripes(8, resolution=6, idx=1, split_size=2, num_heads=2, agent_num=4)
    tensors = [torch.randn(1, 6, 5, 8) for _ in range(3)]
    changed = [torch.cat([x[:, :2], torch.randn(1, 4, 5, 8)], 1) for x in tensors]
    torch.testing.assert_close(stripes(*changed)[:, :2], stripes(*tensors)[:, :2])
    for arguments, match in (({"idx": 2}, "idx=2"), ({"split_size": 0}, "split_size=0")):
        with pytest.raises(ValueError, match=match):
            AgentStripes(8, **{"resolution": 6, "idx": 0, "num_heads": 2, **arguments})
