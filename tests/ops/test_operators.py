"""Every operator, every case, every implementation that can run here, against the reference.

Nothing in this file knows an operator: adding one to the table adds its tests. With
TRITON_INTERPRET=1 the Triton kernels take part on a CPU.
"""

from __future__ import annotations

import inspect
import math
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from vitarium.ops import OPERATORS, Case, backend, dispatch
from vitarium.ops.dispatch import Operator

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _backends(operator: Operator) -> list[str]:
    """The implementations to compare with the reference on this machine."""
    if INTERPRETED:
        return [name for name in operator.implementations if name == "triton"]
    found = ["torch"]
    if DEVICE == "cuda" and "triton" in operator.implementations:
        found.append("triton")
    return found


CALLS = [
    pytest.param(operator, case, name, id=f"{operator.name}-{case.note}-{name}")
    for operator in OPERATORS.values()
    for case in operator.cases
    for name in _backends(operator)
]
FIRST_CALLS = [
    pytest.param(operator, operator.cases[0], name, id=f"{operator.name}-{name}")
    for operator in OPERATORS.values()
    for name in _backends(operator)
]


def draw(case: Case, dtype: torch.dtype = torch.float64, layout: str = "contiguous") -> dict:
    """The case's tensors, the same in every dtype but for rounding."""
    tensors = {}
    for name, values in case.draw(torch.Generator().manual_seed(0)).items():
        if layout == "permuted" and values.dim() > 1:  # not the last dimension in memory
            values = values.mT.contiguous().mT
        elif layout == "fused":  # views of a larger tensor, as of a query-key-value projection
            values = torch.cat([values, values, values], -1)
            values = values[..., values.shape[-1] // 3 : values.shape[-1] // 3 * 2]
        tensors[name] = values.to(DEVICE, dtype if values.is_floating_point() else None)
    return tensors


def images(case: Case) -> int:
    """The first dimension of the first tensor."""
    return next(iter(case.shapes.values()))[0]


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same numbers; integers and booleans stay what they are."""
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}


def run(
    operator: Operator,
    case: Case,
    name: str | None,
    tensors: dict[str, Tensor],
    function: Callable[..., Tensor] | None = None,
) -> dict[str, Tensor]:
    """Output and the gradients of all floating tensors, for a fixed gradient of the output."""
    leaves = {
        key: value.detach().requires_grad_(value.is_floating_point())
        for key, value in tensors.items()
    }
    function = function or operator.function
    output = function(**leaves, **case.kwargs, backend=name)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator).to(output)
    output.backward(grad)
    grads = {f"gradient of {k}": leaf.grad for k, leaf in leaves.items() if leaf.requires_grad}
    assert all(value is not None for value in grads.values())
    return {"output": output.detach(), **grads}


def assert_as_good(
    ours: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """Errors at most twice those of plain PyTorch in the same dtype, and a few roundings."""
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        assert ours[name].shape == expected.shape, name
        assert ours[name].isfinite().all(), name
        if not expected.numel():
            continue
        error = (ours[name].double() - expected).abs().max().item()
        allowed = 2 * (plain[name].double() - expected).abs().max().item()
        allowed += 4 * torch.finfo(torch.float32).eps * max(1.0, expected.abs().max().item())
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "fused"])
@pytest.mark.parametrize(("operator", "case", "name"), CALLS)
def test_forward_and_gradients(
    operator: Operator, case: Case, name: str, layout: str, dtype: torch.dtype
) -> None:
    if INTERPRETED and (dtype, layout) != (torch.float32, "contiguous"):
        pytest.skip("the interpreter is slow, and rounds to bfloat16 in its own way")
    tensors = draw(case, dtype, layout)
    exact = run(operator, case, "reference", cast(tensors, torch.float64))
    plain = run(operator, case, "reference", tensors)
    ours = run(operator, case, name, tensors)
    assert ours["output"].dtype == dtype
    assert ours["output"].is_contiguous()
    assert_as_good(ours, plain, exact)
    if not INTERPRETED:
        again = run(operator, case, name, tensors)
        assert all(torch.equal(ours[key], again[key]) for key in ours), "two runs differ"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody has written to holds NaN."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
                        (Tensor, "new_empty")):  # fmt: skip
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    yield


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("operator", "case", "name"), FIRST_CALLS if INTERPRETED else CALLS)
def test_reads_nothing_unwritten(operator: Operator, case: Case, name: str) -> None:
    assert torch.empty(1).isnan().all()
    found: dict[str, Tensor] = {}
    # In a thread of its own, where no buffer is left over from an earlier call.
    thread = threading.Thread(
        target=lambda: found.update(run(operator, case, name, draw(case, torch.float32)))
    )
    thread.start()
    thread.join()
    assert found
    for key, value in found.items():
        assert value.isfinite().all(), key


@pytest.mark.skipif(INTERPRETED, reason="too slow; the kernels' own tests check their operators")
@pytest.mark.parametrize(("operator", "case", "name"), CALLS)
def test_custom_operators(operator: Operator, case: Case, name: str) -> None:
    """`opcheck` on the operator and its backward, with the arguments that a call hands on."""
    if operator.operation is None:
        pytest.skip("plain ATen")
    if not images(case):
        pytest.skip("opcheck compares samples of non-empty tensors")
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func.namespace == "vitarium":
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Record(), dispatch.recording() as recorded:
        run(operator, case, name, draw(case, torch.float32))
        if all(func._opname != operator.name for func, _, _ in calls):  # the call is too small
            output = operator.operation(*recorded[0].args, fused=name == "triton")
            output.backward(torch.ones_like(output))
    reached = {func._opname for func, _, _ in calls}
    assert {operator.operation.name, f"{operator.operation.name}_backward"} <= reached
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    if case is operator.cases[0]:
        tests += ("test_aot_dispatch_dynamic",)
    for func, args, kwargs in calls:
        args = [arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args]
        differentiable = not func._opname.endswith("_backward")
        for arg in args:
            if isinstance(arg, Tensor) and differentiable and arg.is_floating_point():
                arg.requires_grad_()
        torch.library.opcheck(func, tuple(args), kwargs, test_utils=tests)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not need every case compiled")
@pytest.mark.parametrize(("operator", "case", "name"), CALLS)
def test_compile(operator: Operator, case: Case, name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(operator.function, fullgraph=True, dynamic=True, backend="aot_eager")
    tensors = draw(case, torch.float32)
    expected = run(operator, case, name, tensors)
    for key, value in run(operator, case, name, tensors, compiled).items():
        torch.testing.assert_close(value, expected[key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not need every case compiled")
@pytest.mark.parametrize(("operator", "case", "name"), FIRST_CALLS)
def test_compile_with_inductor(operator: Operator, case: Case, name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(operator.function, fullgraph=True)
    tensors = draw(case, torch.float32)
    expected = run(operator, case, name, tensors)
    for key, value in run(operator, case, name, tensors, compiled).items():
        torch.testing.assert_close(value, expected[key])


@pytest.mark.skipif(INTERPRETED, reason="exports hold no kernels")
@pytest.mark.parametrize(("operator", "case", "name"), CALLS)
def test_export(operator: Operator, case: Case, name: str) -> None:
    """torch.export, non-strict: plain ATen, nothing that only this library knows."""
    if not images(case):
        pytest.skip("exporters specialise on a batch of none")
    names = list(case.shapes)

    class Call(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return operator.function(**dict(zip(names, tensors)), **case.kwargs)

    tensors = tuple(draw(case, torch.float32).values())
    program = torch.export.export(Call(), tensors)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if "vitarium" in target]
    expected = operator.function(**dict(zip(names, tensors)), **case.kwargs, backend="reference")
    torch.testing.assert_close(program.module()(*tensors), expected)


@pytest.mark.skipif(INTERPRETED, reason="transforms take the portable path")
@pytest.mark.parametrize(("operator", "case", "name"), FIRST_CALLS)
def test_function_transforms(operator: Operator, case: Case, name: str) -> None:
    names = list(case.shapes)
    tensors = [torch.stack([tensor, tensor.flip(1)]) for tensor in draw(case).values()]

    def call(*args: Tensor) -> Tensor:
        return operator.function(**dict(zip(names, args)), **case.kwargs)

    mapped = torch.vmap(call)(*tensors)
    expected = torch.stack([call(*(tensor[i] for tensor in tensors)) for i in range(2)])
    torch.testing.assert_close(mapped, expected)
    grad = torch.func.grad(lambda *args: call(*args).square().sum())(*(t[0] for t in tensors))
    leaf = tensors[0][0].clone().requires_grad_()
    call(leaf, *(t[0] for t in tensors[1:])).square().sum().backward()
    torch.testing.assert_close(grad, leaf.grad)


@pytest.mark.skipif(INTERPRETED, reason="forward mode takes the portable path")
@pytest.mark.parametrize(("operator", "case", "name"), FIRST_CALLS)
def test_forward_mode(operator: Operator, case: Case, name: str) -> None:
    tensors = draw(case)
    first = next(iter(tensors))
    tangent = torch.randn_like(tensors[first])
    found = []
    for chosen in ("torch", "reference"):
        with forward_ad.dual_level():
            dual = {**tensors, first: forward_ad.make_dual(tensors[first], tangent)}
            output = operator.function(**dual, **case.kwargs, backend=chosen)
            found.append(forward_ad.unpack_dual(output).tangent)
    assert found[1].any()
    torch.testing.assert_close(*found)


@pytest.mark.skipif(INTERPRETED, reason="not about kernels")
@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_gradcheck(operator: Operator, name: str) -> None:
    case = min(
        (case for case in operator.cases if images(case)),
        # Of those with most tensors the smallest, but larger than a token.
        key=lambda case: (
            -len(case.shapes),
            "one" in case.note,
            math.prod(next(iter(case.shapes.values()))),
        ),
    )
    names = list(case.shapes)
    tensors = list(draw(case).values())
    for tensor in tensors:
        tensor.requires_grad_(tensor.is_floating_point())
    assert torch.autograd.gradcheck(
        lambda *args: operator.function(**dict(zip(names, args)), **case.kwargs, backend=name),
        tensors,
        fast_mode=True,
    )


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds to bfloat16 in its own way")
@pytest.mark.parametrize(("operator", "case", "name"), FIRST_CALLS)
def test_autocast(operator: Operator, case: Case, name: str) -> None:
    tensors = draw(case, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = run(operator, case, name, tensors)
    assert found["output"].dtype == torch.bfloat16
    half = cast(tensors, torch.bfloat16)
    exact = run(operator, case, "reference", cast(half, torch.float64))
    plain = run(operator, case, "reference", half)
    found = cast(found, torch.bfloat16)
    assert_as_good(found, plain, exact)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_meta(operator: Operator) -> None:
    for case in operator.cases:
        tensors = {key: value.to("meta") for key, value in draw(case, torch.float32).items()}
        for name in (None, "reference", "torch"):
            found = run(operator, case, name, tensors)
            expected = run(operator, case, "reference", draw(case))
            assert {key: value.shape for key, value in found.items()} == {
                key: value.shape for key, value in expected.items()
            }
            assert found["output"].device.type == "meta"


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_backend_is_never_silently_another(operator: Operator) -> None:
    case = operator.cases[0]
    tensors = draw(case, torch.float64)
    refusal = r"cannot run this call: dtype"
    if "triton" not in operator.implementations:
        refusal = r"does not exist for this operator"
    with pytest.raises(ValueError, match=rf"backend='triton' {refusal}"):
        operator.function(**tensors, **case.kwargs, backend="triton")
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        operator.function(**tensors, **case.kwargs, backend="cuda")
    with backend("triton"), pytest.raises(ValueError, match=rf"backend='triton' {refusal}"):
        operator.function(**tensors, **case.kwargs)
    with backend("reference"):
        forced = operator.function(**tensors, **case.kwargs)
    named = operator.function(**tensors, **case.kwargs, backend="reference")
    assert torch.equal(forced, named)
    with pytest.raises(ValueError, match="backend='fast' is unknown"), backend("fast"):
        pass


def _plainest(operator: Operator) -> Case:
    """A case with few tensors and without unusual arguments, but more than one token."""
    return min(
        (case for case in operator.cases if images(case) and "one" not in case.note),
        key=lambda case: (len(case.shapes), len(case.kwargs)),
    )


@pytest.mark.parametrize(
    "operator", [o for o in OPERATORS.values() if o.context is not None], ids=lambda o: o.name
)
def test_context_is_of_the_size_it_says(operator: Operator) -> None:
    """Cross attention: keys of other tokens always; of more tokens where the operator says so."""
    case = _plainest(operator)
    tensors = draw(case)
    expected = run(operator, case, None, tensors)["output"]
    other = {**tensors, "key": tensors["key"].flip(1).contiguous(), "value": tensors["value"] + 1}
    assert not torch.allclose(run(operator, case, None, other)["output"], expected)
    longer = {
        name: torch.cat([tensor, tensor], 1) if name in ("key", "value") else tensor
        for name, tensor in tensors.items()
    }
    if operator.context == "any size":
        output = run(operator, case, None, longer)["output"]
        assert output.shape == expected.shape and output.isfinite().all()
    else:
        assert operator.context == "same size"
        with pytest.raises(ValueError, match="key has"):
            run(operator, case, None, longer)


@pytest.mark.parametrize(
    "operator",
    [o for o in OPERATORS.values() if "is_causal" in inspect.signature(o.function).parameters],
    ids=lambda operator: operator.name,
)
def test_causal_outputs_do_not_see_later_tokens(operator: Operator) -> None:
    case = _plainest(operator)
    tensors = draw(case)
    kwargs = {**case.kwargs, "is_causal": True}
    later = {name: tensors[name].clone() for name in ("key", "value")}
    for tensor in later.values():
        tensor[:, -1] += 1
    before = operator.function(**tensors, **kwargs)
    after = operator.function(**{**tensors, **later}, **kwargs)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])
