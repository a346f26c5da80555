"""Parameters, multiply-adds and activations of a model, counted on `meta`.

Nothing is computed, so a count depends on the model and the image size, never on the machine.
Multiply-adds (MACs) are those of matrix products and convolutions; biases, norms, softmax and
element-wise operations count nothing. 1 MAC = 1 of the FLOPs that papers print. Our operators
count by their own formulas (`vitarium.ops.dispatch.FLOP_FORMULAS`), which say what the definition
needs, not what an implementation computes on top.

Activations are the elements that convolutions and matrix products write (Radosavovic et al.,
"Designing Network Design Spaces", arXiv 2003.13678, section 3.4), as fvcore and timm count them.
`scaled_dot_product_attention` counts as the two products that it stands for; one of our fused
operators writes its output only, and counts so.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from vitarium.ops import dispatch


@dataclass(frozen=True)
class Counts:
    """Of one forward pass of a batch: parameters, multiply-adds, activations (elements)."""

    params: int
    macs: int
    activations: int


def build(name: str, image_size: int | None = None, **arguments: Any) -> nn.Module:
    """A registered model without weights, ready for square images of `image_size`, in eval mode.

    Args:
        name: any model registered with timm.
        image_size: side of the images; the model's own if None.
        arguments: further arguments of `timm.create_model`.

    Raises:
        ValueError: no model has this name; the message offers the nearest ones.
    """
    check_name(name)
    config = timm.get_pretrained_cfg(name)
    if image_size is not None and config is not None and config.fixed_input_size:
        arguments["img_size"] = image_size
    return timm.create_model(name, **arguments).eval()


def check_name(name: str) -> None:
    """Refuse a name that is not registered with timm.

    Raises:
        ValueError: with the nearest registered names.
    """
    if timm.is_model(name.partition(".")[0]):
        return
    nearest = difflib.get_close_matches(name, timm.list_models(), n=4)
    hint = f"; did you mean {', '.join(nearest)}?" if nearest else "; see `vitarium list`"
    raise ValueError(f"model {name!r} is not registered{hint}")


def pretrained_cfg(name: str) -> PretrainedCfg:
    """timm's configuration of "model" or "model.tag".

    Raises:
        ValueError: there is none.
    """
    check_name(name)
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise ValueError(f"model {name!r} has no configuration")
    return config


def input_shape(model: nn.Module, image_size: int | None, batch: int) -> tuple[int, ...]:
    """Shape of the images that a timm model takes, `(batch, channels, height, width)`.

    Raises:
        ValueError: `image_size` or `batch` is below 1.
    """
    for name, value in (("image_size", image_size), ("batch_size", batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    channels, *size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    return (batch, channels, *((image_size, image_size) if image_size else size))


def count(model: str | nn.Module, image_size: int | None = None, batch: int = 1) -> Counts:
    """Parameters, multiply-adds and activations of one forward pass.

    Args:
        model: a name registered with timm, or a model on any device (it is left as it is).
        image_size: side of the images; the model's own if None.
        batch: number of images.

    Raises:
        ValueError: no model has this name.
    """
    if isinstance(model, str):
        model = on_meta(model, image_size)
    x = torch.empty(input_shape(model, image_size, batch), device="meta", dtype=_dtype(model))
    activations: Counter[Any] = Counter()

    def with_activations(packet: Any, formula: Callable[..., int]) -> Callable[..., int]:
        def tally(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            output = out_val[0] if isinstance(out_val, (tuple, list)) else out_val
            activations[packet] += output.numel()
            return formula(*args, out_val=out_val, **kwargs)

        tally._get_raw = True  # type: ignore[attr-defined]  # hand the output on as it is
        return tally

    mapping = {packet: with_activations(packet, f) for packet, f in flop_registry.items()}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        _forward_on_meta(model, x)
    params = sum(p.numel() for p in model.parameters())
    return Counts(params, counter.get_total_flops() // 2, activations.total())


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.float32)


def on_meta(name: str, image_size: int | None = None) -> nn.Module:
    """`build`, on the meta device."""
    try:
        with torch.device("meta"):
            return build(name, image_size)
    except (NotImplementedError, RuntimeError):  # its constructor looks at values
        return build(name, image_size).to("meta")


@torch.no_grad()
def _forward_on_meta(model: nn.Module, x: Tensor) -> None:
    """One forward pass in eval mode, with tensors of the same shapes on `meta` in the model."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    training = model.training
    model.eval()
    try:
        torch.func.functional_call(model, shapes, (x,))
    finally:
        model.train(training)


# --- torch and fvcore ----------------------------------------------------------------------------


def count_with_torch(model: nn.Module, image_size: int | None = None, batch: int = 1) -> int:
    """Multiply-adds by torch's own `FlopCounterMode`, as anyone would use it.

    It knows our operators by what they register with torch. On `meta`, whose operators are opaque:
    run on the CPU it would count what their portable paths compute instead.

    Args:
        model: a model on `meta`, in eval mode.
        image_size, batch: as in `count`.
    """
    x = torch.empty(input_shape(model, image_size, batch), device="meta", dtype=_dtype(model))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def count_with_fvcore(model: nn.Module, image_size: int | None = None, batch: int = 1) -> Counts:
    """The same as `count`, by fvcore on a traced graph: an independent check.

    By itself fvcore counts nothing for attention, for `baddbmm` and for our operators, and adds a
    few FLOPs per element for norms and pooling; it is given formulas for the first and none for
    the others. It computes the forward pass, with garbage in place of what our operators return.

    Args:
        model: a model on the CPU, in eval mode.
        image_size, batch: as in `count`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about what fvcore imports
        from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

    x = torch.zeros(input_shape(model, image_size, batch), dtype=_dtype(model))
    flops, activations = FlopCountAnalysis(model, x), ActivationCountAnalysis(model, x)
    for name in _FVCORE_DROPPED:
        flops.set_op_handle(name, lambda inputs, outputs: 0)  # None would not replace a handle
    for name, formula in _formulas().items():
        flops.set_op_handle(name, _flop_handle(formula))
        activations.set_op_handle(name, _activation_handle)
    activations.set_op_handle(_SDPA, _sdpa_activation_handle)
    totals = []
    with torch.no_grad(), warnings.catch_warnings(), _opaque_operators():
        warnings.simplefilter("ignore")  # the tracer's, about values that it makes constant
        for analysis in (flops, activations):
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            totals.append(round(analysis.total()))
    return Counts(sum(p.numel() for p in model.parameters()), *totals)


_SDPA = "aten::scaled_dot_product_attention"
_FVCORE_DROPPED = (
    "aten::batch_norm",
    "aten::group_norm",
    "aten::layer_norm",
    "aten::instance_norm",
    "aten::adaptive_avg_pool2d",
    "aten::upsample_nearest2d",
    "aten::upsample_bilinear2d",
    "aten::grid_sampler",
)


def _formulas() -> Mapping[str, Callable[..., int]]:
    """By qualified name: what fvcore lacks, as formulas of shapes that give 2 x multiply-adds."""
    return {
        _SDPA: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
        "aten::baddbmm": lambda _, a, b, *__, **___: 2 * math.prod(a) * b[-1],
        "aten::einsum": _einsum_flops,  # fvcore has one that rounds
        "aten::matmul": _matmul_flops,  # and one that forgets what the second operand repeats
        **dispatch.FLOP_FORMULAS,
    }


def _matmul_flops(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """With broadcasting over all dimensions but the last two."""
    columns = b[-1] if len(b) > 1 else 1
    return 2 * math.prod(torch.broadcast_shapes(a[:-2], b[:-2])) * math.prod(a[-2:]) * columns


def _einsum_flops(equation: str, shapes: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    """Of two operands: the sizes of all labels."""
    labels = equation.replace(" ", "").partition("->")[0].split(",")
    if len(labels) != 2 or "." in equation:
        raise ValueError(f"einsum {equation!r}: only two operands without an ellipsis are counted")
    sizes = {name: n for term, shape in zip(labels, shapes) for name, n in zip(term, shape)}
    return 2 * math.prod(sizes.values())


def _flop_handle(formula: Callable[..., int]) -> Callable[[list[Any], list[Any]], int]:
    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        out_shape = [_argument(value) for value in outputs]
        return formula(*map(_argument, inputs), out_shape=out_shape) // 2

    return handle


def _activation_handle(inputs: list[Any], outputs: list[Any]) -> int:
    return math.prod(_argument(outputs[0]))


def _sdpa_activation_handle(inputs: list[Any], outputs: list[Any]) -> int:
    query, key = _argument(inputs[0]), _argument(inputs[1])
    return math.prod(query[:-1]) * key[-2] + math.prod(_argument(outputs[0]))


def _argument(value: Any) -> Any:
    """A value of the traced graph as a formula takes it: a tensor's shape, or a constant."""
    if value.isCompleteTensor():
        return tuple(value.type().sizes())
    if value.node().kind() == "prim::ListConstruct":
        return [_argument(item) for item in value.node().inputs()]
    return value.toIValue()


@contextlib.contextmanager
def _opaque_operators() -> Iterator[None]:
    """Within the block our fused operators run on the CPU as one node of a traced graph each.

    Tracing would otherwise take the portable path, which computes more than the definition needs.
    The nodes return uninitialised tensors of the right shapes.
    """

    def register(library: torch.library.Library, operator: Any) -> None:
        def run(*args: Any) -> Any:
            on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
            return tree_map(lambda out: torch.empty_like(out, device="cpu"), operator(*on_meta))

        library.impl(operator, run, "CPU")

    libraries = []
    try:
        for name in dispatch.FLOP_FORMULAS:
            namespace, operator = name.split("::")
            libraries.append(torch.library.Library(namespace, "IMPL"))
            register(libraries[-1], getattr(getattr(torch.ops, namespace), operator).default)
        # What makes Triton's operators accept tensors on the CPU.
        with (
            mock.patch.object(dispatch, "TRITON_INSTALLED", True),
            # What mixers do otherwise for exporters is not what runs.
            mock.patch.object(dispatch, "plain_aten", lambda: False),
            mock.patch.object(dispatch, "TRITON_INTERPRET", True),
            dispatch.backend("triton"),
            contextlib.ExitStack() as stack,
        ):
            for declared in dispatch.OPERATORS.values():
                found = declared.implementations
                if "triton" not in found:  # the portable path is the same custom operator
                    stack.enter_context(mock.patch.dict(found, triton=found["torch"]))
            yield
    finally:
        for library in libraries:
            library._destroy()
