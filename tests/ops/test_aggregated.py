"""Aggregated attention: against loops over tokens, in chunks, its mixers, and wrong calls."""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vitarium.ops import aggregated_attention, aggregated_portable, backend, build_mixer
from vitarium.ops.aggregated_mixers import _logarithm

REQUIRED = ("query", "key", "value", "pooled_key", "pooled_value")
OPTIONAL = ("bias", "pooled_bias", "window_weights")


def draw_call(
    size: tuple[int, int],
    pooled: int,
    window_size: int,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (1, 1),
    dims: tuple[int, int] = (4, 4),
    optional: tuple[str, ...] = OPTIONAL,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    height, width = size
    shapes = {
        "query": (batch, height, width, heads[0], dims[0]),
        "key": (batch, height, width, heads[1], dims[0]),
        "value": (batch, height, width, heads[1], dims[1]),
        "pooled_key": (batch, pooled, heads[1], dims[0]),
        "pooled_value": (batch, pooled, heads[1], dims[1]),
        "bias": (heads[0], window_size**2),
        "pooled_bias": (heads[0], height * width, pooled),
        "window_weights": (batch, height, width, heads[0], window_size**2),
    }
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype)
        for name, shape in shapes.items()
        if name in REQUIRED or name in optional
    }


def by_loops(tensors: dict[str, Tensor], window_size: int, scale: float) -> Tensor:
    """The definition, token by token."""
    query, key, value, pooled_key, pooled_value = (tensors[name] for name in REQUIRED)
    batch, height, width, heads, _ = query.shape
    group, reach = heads // key.shape[-2], window_size // 2
    output = query.new_zeros(*query.shape[:-1], value.shape[-1])
    for b, y, x, h in np.ndindex(batch, height, width, heads):
        q, shared = query[b, y, x, h], h // group
        scores, values, further = [], [], []
        for place, (down, right) in enumerate(np.ndindex(window_size, window_size)):
            row, column = y + down - reach, x + right - reach
            if not (0 <= row < height and 0 <= column < width):
                continue
            score = scale * (q @ key[b, row, column, shared])
            scores.append(score + (tensors["bias"][h, place] if "bias" in tensors else 0))
            values.append(value[b, row, column, shared])
            extra = tensors.get("window_weights")
            further.append(0.0 if extra is None else extra[b, y, x, h, place])
        for m in range(pooled_key.shape[1]):
            score = scale * (q @ pooled_key[b, m, shared])
            if "pooled_bias" in tensors:
                score = score + tensors["pooled_bias"][h, y * width + x, m]
            scores.append(score)
            values.append(pooled_value[b, m, shared])
            further.append(0.0)
        weights = torch.stack(scores).softmax(0) + torch.tensor(further, dtype=q.dtype)
        output[b, y, x, h] = weights @ torch.stack(values)
    return output


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    heads = draw(st.integers(1, 2))
    return {
        "size": (draw(st.integers(1, 6)), draw(st.integers(1, 6))),
        "pooled": draw(st.integers(1, 5)),
        "window_size": draw(st.sampled_from([1, 3, 5, 7])),
        "batch": draw(st.integers(1, 2)),
        "heads": (heads * draw(st.integers(1, 2)), heads),
        "dims": (draw(st.integers(1, 6)), draw(st.integers(1, 6))),
        "optional": tuple(name for name in OPTIONAL if draw(st.booleans())),
    }


@settings(max_examples=60, deadline=None)
@given(calls(), st.sampled_from([None, 0.7, -0.4, 0.0]), st.sampled_from([1, 60, 1 << 19]))
def test_random_calls(call: dict[str, Any], scale: float | None, chunk: int) -> None:
    """Reference and portable path, in chunks of any size, agree with the loops and each other."""
    tensors = {name: t.requires_grad_() for name, t in draw_call(**call).items()}
    window_size = call["window_size"]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregated_portable, "CPU_CHUNK", chunk)
        for name in ("reference", "torch"):
            output = aggregated_attention(
                **tensors, window_size=window_size, scale=scale, backend=name
            )
            grad = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
            grads = torch.autograd.grad(output, list(tensors.values()), grad)
            found[name] = (output.detach(), *grads)
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    factor = call["dims"][0] ** -0.5 if scale is None else scale
    torch.testing.assert_close(found["torch"][0], by_loops(detached, window_size, factor))
    for name, ours, expected in zip(("output", *tensors), found["torch"], found["reference"]):
        torch.testing.assert_close(ours, expected, msg=lambda text, name=name: f"{name}: {text}")


class LargestTensor(TorchDispatchMode):
    """Notes the largest storage that any operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, Tensor):
                size = result.untyped_storage().nbytes() // result.element_size()
                self.elements = max(self.elements, size)
        return results


def test_no_copies_of_windows_and_no_scores_of_all_heads() -> None:
    """Nothing is larger than a chunk of scores and the largest of the operator's own tensors."""
    tensors = draw_call((40, 40), 25, 3, batch=2, heads=(4, 4), dims=(8, 8), dtype=torch.float32)
    arguments = [tensors[name] for name in (*REQUIRED, *OPTIONAL)]
    allowed = max(aggregated_portable.CPU_CHUNK, *(t.numel() for t in arguments))
    scores = 2 * 4 * 40 * 40 * (25 + 9)
    windows = 2 * 40 * 40 * 9 * 4 * 8
    seen = []

    def run() -> None:
        with LargestTensor() as largest, pytest.MonkeyPatch.context() as patch:
            patch.setattr(aggregated_portable, "CPU_CHUNK", 1 << 16)
            output = aggregated_portable.attend(*arguments, 3, 1.0)
            aggregated_portable.attend_backward(output, *arguments, 3, 1.0)
        seen.append(largest.elements)

    # In a thread of its own, where no buffer is left over from an earlier call.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    allowed = max(t.numel() for t in arguments)
    assert allowed < min(scores, windows)
    assert (1 << 16) / 2 < seen[0] <= allowed


def test_flops() -> None:
    tensors = draw_call((4, 5), 3, 3, batch=2, heads=(2, 2), dims=(6, 7), optional=())
    on_map = (4 + 2 * 3) * (5 + 2 * 4)  # pairs in each direction, itself among them
    pairs = 2 * 2 * (on_map + 4 * 5 * 3)
    with FlopCounterMode(display=False) as counter:
        output = aggregated_attention(**tensors, window_size=3)
    assert counter.get_total_flops() == 2 * pairs * (6 + 7)
    with FlopCounterMode(display=False) as counter:
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        output = aggregated_attention(**leaves, window_size=3)
        output.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * ((6 + 7) + (3 * 6 + 2 * 7))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"window_size": 2}, ValueError, "window_size=2 is not allowed; odd sizes are"),
        ({"window_size": 3.0}, TypeError, "window_size must be int, got float"),
        ({"query": (1, 20, 1, 4)}, ValueError, "query has shape .* allowed are 5 dimensions"),
        ({"query": (1, 4, 5, 3, 4)}, ValueError, "key has 2 heads, which do not divide .* 3"),
        ({"key": (1, 4, 4, 2, 4)}, ValueError, r"key has shape \(1, 4, 4, 2, 4\)"),
        ({"value": (1, 4, 5, 1, 4)}, ValueError, r"value has shape .* allowed is \(1, 4, 5, 2"),
        ({"pooled_key": (1, 3, 2, 5)}, ValueError, "pooled_key has shape .* allowed is"),
        ({"pooled_key": (1, 0, 2, 4)}, ValueError, "pooled_"),
        ({"pooled_value": (1, 3, 2, 5)}, ValueError, "pooled_value has shape .* allowed is"),
        ({"window_weights": (1, 4, 5, 2, 8)}, ValueError, "window_weights has shape"),
        ({"bias": (2, 8)}, ValueError, r"bias has shape \(2, 8\); allowed is \(2, 9\)"),
        ({"pooled_bias": (2, 3, 20)}, ValueError, r"allowed is \(2, 20, 3\)"),
        ({"scale": math.inf}, ValueError, "scale=inf must be finite"),
        ({"scale": True}, TypeError, "scale must be a number or None, got bool"),
        ({"bias": 3}, TypeError, "bias must be a tensor or None, got int"),
    ],
    ids=str,
)
def test_wrong_calls(change: dict[str, Any], error: type[Exception], match: str) -> None:
    call: dict[str, Any] = {**draw_call((4, 5), 3, 3, heads=(2, 2)), "window_size": 3}
    for name, value in change.items():
        shaped = isinstance(value, tuple)
        call[name] = torch.zeros(value, dtype=torch.float64) if shaped else value
    with pytest.raises(error, match=f"aggregated_attention: .*{match}"):
        aggregated_attention(**call)


def test_dtypes_must_agree() -> None:
    call = draw_call((2, 2), 1, 3)
    with pytest.raises(TypeError, match=r"pooled_key has dtype torch\.float32, query has"):
        aggregated_attention(**{**call, "pooled_key": call["pooled_key"].float()}, window_size=3)
    with pytest.raises(TypeError, match=r"pooled_bias must be floating-point, got torch\.int64"):
        aggregated_attention(**{**call, "pooled_bias": call["pooled_bias"].long()}, window_size=3)


# --- mixers --------------------------------------------------------------------------------------


def mixer_of(name: str = "aggregated", dim: int = 12, **arguments: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"num_heads": 3, "sr_ratio": 2, **arguments}
    return build_mixer((name, arguments), dim, dtype=torch.float64)


def test_logarithm_rounds_as_the_official_code() -> None:
    numbers = torch.arange(1, 5000)
    expected = np.log(numbers.numpy().astype(np.float32))
    assert np.abs(_logarithm(numbers).numpy() / np.maximum(expected, 1e-9) - 1)[1:].max() < 1.2e-7
    exact = numbers.double().log().float()
    assert (_logarithm(numbers) != exact).double().mean() < 0.05
    # Where float32 logarithms of 7, 37 and 47 lie on the other side of the truth.
    other = torch.tensor([7, 37, 47])
    assert (_logarithm(other) != other.double().log().float()).all()


def test_convolution_weights_of_official_checkpoints() -> None:
    mixer = mixer_of()
    state = mixer.state_dict()
    state["sr.weight"] = 2 * state["sr.weight"][:, :, None, None]
    other = mixer_of()
    other.load_state_dict(state)
    assert torch.equal(other.sr.weight, 2 * mixer.sr.weight)


def test_pooled_sizes() -> None:
    x = torch.randn(1, 5, 9, 12, dtype=torch.float64)
    fixed, small = mixer_of(fixed_pool_size=(2, 4)), mixer_of(sr_ratio=4)
    halves = mixer_of(sr_ratio=2)
    for mixer in (fixed, small):
        mixer.load_state_dict(halves.state_dict())
    torch.testing.assert_close(fixed(x), halves(x))  # 5 x 9 pooled to 2 x 4 either way
    assert not torch.allclose(small(x), halves(x))
    assert mixer_of(fixed_pool_size=8)(x).shape == x.shape  # clipped to the map
    assert mixer_of(sr_ratio=8)(x).isfinite().all()


def test_distances_are_relative_to_the_map_of_pretraining() -> None:
    x = torch.randn(1, 6, 6, 12, dtype=torch.float64)
    expected = mixer_of()(x)
    torch.testing.assert_close(mixer_of(pretrain_size=6)(x), expected)
    torch.testing.assert_close(mixer_of(input_resolution=(6, 6))(x), expected)
    other = mixer_of(pretrain_size=12, input_resolution=6)(x)
    assert not torch.allclose(other, expected)


def test_attention_map_is_window_and_pooled_map() -> None:
    mixer = mixer_of(num_heads=2, sr_ratio=3)
    x = torch.randn(2, 9, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        mixer.learnable_tokens.zero_()  # no window weights: what remains are softmax weights
    weights = mixer.attention_map(x, query=(4, 3))
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, 2, dtype=torch.float64))
    outside = weights.clone()
    outside[:, :, 3:6, 2:5] = 0
    for rows in (slice(0, 3), slice(6, 9)):  # all that is pooled together has the same weight
        torch.testing.assert_close(outside[:, :, rows, 0], outside[:, :, rows.start, :1].expand(
            -1, -1, 3
        ))  # fmt: skip
    with torch.no_grad():
        mixer.learnable_bias.fill_(0.5)
    more = mixer.attention_map(x, query=(4, 3)) - weights
    assert more[:, :, 3:6, 2:5].allclose(torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(more.sum((2, 3)), torch.full((2, 2), 4.5, dtype=torch.float64))


def test_what_is_kept_serves_every_mode() -> None:
    """Constants that were made in inference mode, or not by a fake tensor, serve training."""
    x = torch.randn(1, 17, 19, 12, dtype=torch.float64)  # a size that no other test has
    mixer = mixer_of(sr_ratio=5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert mixer(mode.from_tensor(x)).shape == x.shape
    with torch.inference_mode():
        expected = mixer(x)
    found = mixer(x.requires_grad_())
    found.sum().backward()
    torch.testing.assert_close(found, expected.clone())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert mixer(mode.from_tensor(x.detach())).shape == x.shape


def test_autocast() -> None:
    mixer = mixer_of().float()
    x = torch.randn(2, 8, 9, 12, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixer(x)
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    torch.testing.assert_close(found.float(), mixer(x), rtol=0.1, atol=0.05)


def test_onnx_at_any_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    mixer = mixer_of("aggregated_mixture_of_head", shared_head=1, routed_head=1).float().eval()
    sizes = {
        0: torch.export.Dim("batch", min=1, max=64),
        1: torch.export.Dim("height", min=2, max=200),
        2: torch.export.Dim("width", min=2, max=200),
    }
    path = str(tmp_path / "mixer.onnx")
    x = torch.randn(2, 12, 14, 12)
    torch.onnx.export(mixer, (x,), path, dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    for size in ((2, 12, 14), (1, 9, 11), (3, 7, 7), (1, 3, 20)):  # divisible by 2 and not
        x = torch.randn(*size, 12)
        (found,) = session.run(None, {name: x.numpy()})
        expected = mixer(x).detach()
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_heads": 5}, "num_heads=5 must divide dim=12"),
        ({"window_size": 4}, "window_size=4 is not allowed; odd sizes are"),
        ({"sr_ratio": 0}, "sr_ratio=0 must be at least 1"),
        ({"fixed_pool_size": 0}, "fixed_pool_size=0 must be at least 1"),
        ({"pretrain_size": (7, 7, 7)}, "pretrain_size=.* has 3 entries"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"AggregatedAttention: {match}"):
        mixer_of(**arguments)


def test_heads_are_weighed_by_the_router() -> None:
    plain = mixer_of()
    mixer = mixer_of("aggregated_mixture_of_head", shared_head=1, routed_head=1)
    mixer.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 5, 6, 12, dtype=torch.float64)
    gate, active = mixer.router(x)
    assert active is not None and active.sum(-1).eq(2).all()
    heads = []
    for head in range(3):  # the output is linear in those of the heads
        only = mixer_of()
        only.load_state_dict(plain.state_dict())
        with torch.no_grad():
            keep = torch.zeros(3, 4, dtype=torch.float64)
            keep[head] = 1
            only.proj.weight.mul_(keep.flatten())
            only.proj.bias.zero_()
        heads.append(only(x))
    expected = torch.einsum("byxh,hbyxc->byxc", gate, torch.stack(heads)) + plain.proj.bias
    torch.testing.assert_close(mixer(x), expected)
    weights = mixer.attention_map(x, query=(2, 3))
    unused = ~active[:, 2, 3]
    assert unused.any()
    assert (weights[unused] == 0).all() and (weights[~unused].flatten(1).amax(1) > 0).all()


def test_balance_loss() -> None:
    mixer = mixer_of("aggregated_mixture_of_head", shared_head=1, routed_head=1)
    x = torch.randn(2, 5, 6, 12, dtype=torch.float64)
    mixer.eval()(x)
    assert mixer.balance_loss is None
    mixer.train()(x)
    loss = mixer.balance_loss
    assert loss is not None and loss > 0
    loss.backward()
    assert mixer.router.wg.weight.grad.abs().sum() > 0
    assert copy.deepcopy(mixer).balance_loss is None


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_gradients_of_all_parameters(implementation: str) -> None:
    """Either implementation sends the same gradient through the whole mixer."""
    x = torch.randn(2, 6, 7, 12, dtype=torch.float64)
    grads = []
    for name in ("reference", implementation):
        mixer = mixer_of(window_size=5)
        with backend(name):
            mixer(x).square().sum().backward()
        grads.append([p.grad for p in mixer.parameters()])
    assert all(grad.abs().sum() > 0 for grad in grads[0])
    torch.testing.assert_close(*grads)
