"""Mixture-of-head attention: what is skipped, the router, and its balance loss."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vitarium.ops import (
    HeadRouter,
    MixtureOfHeadAttention,
    attention,
    dense,
    mixture_of_head_attention,
)
from vitarium.ops.dispatch import TRITON_INTERPRET

BACKENDS = ["reference", "torch", *(["triton"] if TRITON_INTERPRET else [])]


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call is too small for leaving queries out."""
    monkeypatch.setattr(dense, "PACKING_PAYS", 0)


def _call(heads: int = 3, tokens: int = 21) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, tokens, heads, 8)
    return {"query": query, "key": key, "value": value, "gate": torch.randn(2, tokens, heads)}


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("name", BACKENDS)
def test_skipped_queries(name: str) -> None:
    """Where a head is not active nothing of query, gate or gradient matters, not even NaN."""
    call = _call()
    active = torch.rand(2, 21, 3) < 0.4
    dense_output = attention(call["query"], call["key"], call["value"])
    want = torch.where(active[..., None], dense_output * call["gate"][..., None], 0)
    call["gate"][~active] = float("nan")
    if name == "torch":  # the reference computes what it then leaves out
        call["query"][~active] = float("nan")
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in call.items()}
    output = mixture_of_head_attention(**leaves, active=active, backend=name)
    torch.testing.assert_close(output, want)
    output.square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())
    assert not leaves["query"].grad[~active].any() and not leaves["gate"].grad[~active].any()
    assert leaves["gate"].grad[active].all()


@pytest.mark.skipif(TRITON_INTERPRET, reason="not about kernels")
@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_only_active_queries_are_multiplied(share: float, dtype: torch.dtype) -> None:
    """The products of forward and backward are as large as the active queries are many."""
    call = {key: tensor.to(dtype) for key, tensor in _call(4, 64).items()}
    active = (torch.arange(64) < 64 * share)[None, :, None].expand(2, 64, 4)

    class Products(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._opname
            if name in ("bmm", "baddbmm"):
                a, b = args[-2:]
                self.total += a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
            elif "scaled_dot_product_flash" in name:
                query, key = args[1:3] if "backward" in name else args[:2]
                factor = 5 if "backward" in name else 2
                self.total += factor * query.numel() * key.shape[2]
            return func(*args, **(kwargs or {}))

    operands = [call[key] for key in ("query", "key", "value")]
    with Products() as products:
        output, saved = dense.forward(*operands, None, active, False, 0.3, True)
        dense.backward(output, *operands, None, active, output, saved, False, 0.3, True, False)
    pairs = 2 * 4 * int(64 * share) * 64
    # Scores and output; then both again or kept, and the gradients of the three operands.
    assert products.total in (7 * pairs * 8, 6 * pairs * 8)


@pytest.mark.parametrize("name", BACKENDS)
def test_without_a_choice_it_is_attention_times_the_gate(name: str) -> None:
    call = _call()
    want = attention(call["query"], call["key"], call["value"]) * call["gate"][..., None]
    torch.testing.assert_close(mixture_of_head_attention(**call, backend=name), want)
    everything = torch.ones(2, 21, 3, dtype=torch.bool)
    found = mixture_of_head_attention(**call, active=everything, backend=name)
    torch.testing.assert_close(found, want)


def test_flops_count_all_heads() -> None:
    call = {key: tensor.to("meta") for key, tensor in _call().items()}
    with FlopCounterMode(display=False) as counter:
        mixture_of_head_attention(**call, active=torch.ones(2, 21, 3, device="meta").bool())
    assert counter.get_total_flops() == 2 * 2 * 3 * 21 * 21 * (8 + 8)


def test_bad_calls() -> None:
    call = _call()
    for change, message in (
        ({"gate": call["gate"][:1]}, "gate has shape"),
        ({"active": torch.ones(2, 21, 1, dtype=torch.bool)}, "active has shape"),
        ({"key": call["key"][..., :5]}, "mixture_of_head_attention: key has head_dim 5"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture_of_head_attention(**{**call, **change})
    for change, message in (
        ({"gate": None}, "gate must be a tensor, got NoneType"),
        ({"gate": torch.ones(2, 21, 3, dtype=torch.int)}, "gate must be floating-point"),
        ({"active": torch.ones(2, 21, 3)}, "active must be bool"),
        ({"active": "all"}, "active must be a tensor, got str"),
    ):
        with pytest.raises(TypeError, match=message):
            mixture_of_head_attention(**{**call, **change})


# --- the router ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("shared", "routed"), [(0, 3), (1, 2), (3, 2), (8, 0), (2, 6)])
def test_router(shared: int, routed: int) -> None:
    torch.manual_seed(0)
    router = HeadRouter(16, 8, shared, routed, dtype=torch.float64)
    gate, active = router(torch.randn(2, 5, 7, 16, dtype=torch.float64))
    assert gate.shape == (2, 5, 7, 8)
    if active is None:
        assert routed in (0, 8 - shared)
    else:
        assert active.shape == gate.shape and active.dtype == torch.bool
        assert active[..., :shared].all()
        assert (active[..., shared:].sum(-1) == routed).all()
        assert torch.equal(active, gate > 0)
    # Weights add up to the number of heads of either kind, weighed against each other.
    sums = gate[..., :shared].sum(-1), gate[..., shared:].sum(-1)
    if shared and routed:
        torch.testing.assert_close(sums[0] / shared + sums[1] / routed, torch.full_like(sums[0], 2))
    else:
        torch.testing.assert_close(sums[0] + sums[1], torch.full_like(sums[0], shared + routed))


def test_balance_loss_is_least_when_heads_are_used_alike() -> None:
    scores = torch.full((16, 4), 0.25)
    even = torch.eye(4, dtype=torch.bool).repeat(4, 1)
    one = torch.zeros(16, 4, dtype=torch.bool)
    one[:, 0] = True
    skewed = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(16, 4)
    assert HeadRouter._balance_loss(scores, even) == 1
    assert HeadRouter._balance_loss(skewed, one) > HeadRouter._balance_loss(skewed, even)


def test_a_loss_does_not_stand_in_the_way_of_copies() -> None:
    mixer = MixtureOfHeadAttention(16, num_heads=4, shared_head=1, routed_head=2)
    x = torch.randn(2, 4, 5, 16)
    mixer(x)
    assert mixer.balance_loss is not None and mixer.balance_loss.requires_grad
    for other in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert other.balance_loss is None
        torch.testing.assert_close(other(x), mixer(x))
        assert other.balance_loss is not None


def test_impossible_numbers_of_heads() -> None:
    for shared, routed, message in (
        (9, 0, "shared_head=9"),
        (-1, 4, "shared_head=-1"),
        (2, 0, "routed_head=0"),
        (2, 7, "routed_head=7"),
        (8, 1, "routed_head=1"),
    ):
        with pytest.raises(ValueError, match=message):
            HeadRouter(16, 8, shared, routed)
