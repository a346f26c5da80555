"""Which implementation of an operator runs, and the argument checks that operators share.

An operator has several implementations of one definition. `backend=` names one; a named
implementation never gives way to another: it runs, or the call raises and says why not.
Only `None` chooses: Triton for CUDA (and meta) tensors that it supports, else the portable path.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

if TYPE_CHECKING:
    from vitarium.ops.differentiable import Differentiable

Result = TypeVar("Result")

BACKENDS = ("reference", "torch", "triton", "natten")

# Read once, without importing anything: a compiled graph must not depend on a look at the disk.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
NATTEN_INSTALLED = importlib.util.find_spec("natten") is not None
TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

_TORCH_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


@dataclass(frozen=True)
class Case:
    """One call of an operator as data: the shapes of its tensors and its other arguments.

    Tests, benchmarks and tables draw random tensors of these shapes and iterate over the cases.

    Attributes:
        note: what the case is about; unique within an operator.
        shapes: by argument name.
        kwargs: the other arguments.
        values: for tensors that are not standard normal (integer tables, gates), how to draw one:
            a function of a generator and the shape.
    """

    note: str
    shapes: Mapping[str, tuple[int, ...]]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Callable[[torch.Generator, tuple[int, ...]], Tensor]] = field(
        default_factory=dict
    )

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random tensors of the case: float32, or what `values` draws."""
        return {
            name: self.values[name](generator, shape)
            if name in self.values
            else torch.randn(shape, generator=generator)
            for name, shape in self.shapes.items()
        }


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator: `run`, and `refuse`, which says why it cannot (or None).

    `preferred` says whether the automatic choice takes it where it could. All take the arguments
    that the operator's public function has checked and normalised.
    """

    run: Callable[..., Any]
    refuse: Callable[..., str | None] = lambda *args, **kwargs: None
    preferred: Callable[..., bool] = lambda *args, **kwargs: True


@dataclass(frozen=True)
class Operator:
    """An operator's public function, its implementations by backend name, and its test cases.

    Attributes:
        operation: the custom operator behind the implementations, if there is one.
        launches: calls that together reach every launch configuration of its kernels; no value of
            a tensor may matter.
        context: which keys a query may come from elsewhere to meet (cross attention): "any size",
            "same size" as the map of the queries, or None where there is no cross attention.
        always_causal: whether no query ever meets a later key.
    """

    name: str
    function: Callable[..., Any]
    implementations: Mapping[str, Implementation]
    cases: Sequence[Case]
    operation: Differentiable | None = None
    launches: Sequence[Case] = ()
    context: str | None = "same size"
    always_causal: bool = False

    def __post_init__(self) -> None:
        if self.name in OPERATORS:
            raise ValueError(f"operator {self.name!r} is already registered")
        OPERATORS[self.name] = self


OPERATORS: dict[str, Operator] = {}


def _check_backend(origin: str, name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}={name!r} is unknown; allowed are {', '.join(BACKENDS)} or None")
    return name


_forced: str | None = os.environ.get("VITARIUM_BACKEND") or None
if _forced is not None:
    _check_backend("environment variable VITARIUM_BACKEND", _forced)


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Within the block every operator called with `backend=None` runs `name` (process-wide).

    Args:
        name: one of `BACKENDS`, or None for the automatic choice.

    Raises:
        ValueError: `name` is unknown.
    """
    global _forced
    if name is not None:
        _check_backend("backend", name)
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


FLOP_FORMULAS: dict[str, Callable[..., int]] = {}


def register_flops(custom_op: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator: the floating-point operations of one call of a custom operator.

    The formula takes the operator's arguments, tensors replaced by their shapes, and `out_shape`,
    and returns 2 x multiply-adds. It serves `torch.utils.flop_counter` and, through
    `FLOP_FORMULAS` (by qualified name such as "vitarium::neighborhood_attention"), any other
    counter.
    """
    packet = custom_op._opoverload.overloadpacket

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        register_flop_formula(packet)(formula)
        FLOP_FORMULAS[custom_op._qualname] = formula
        return formula

    return register


def exporting() -> bool:
    """True while a graph is recorded that must hold plain ATen (torch.export, ONNX, jit.trace)."""
    if torch.jit.is_tracing():
        return True
    if not torch.compiler.is_exporting():
        return False
    # Before 2.13 is_exporting() is also true inside plain torch.compile.
    return _TORCH_VERSION >= (2, 13) or not torch.compiler.is_dynamo_compiling()


def plain_aten() -> bool:
    """True where an opaque operator will not do.

    That is in an exporter, under a function transform and in forward-mode differentiation.
    """
    if exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def choose(
    operator: str,
    requested: str | None,
    implementations: Mapping[str, Implementation],
    device: torch.device,
    *args: Any,
) -> Callable[..., Any]:
    """The implementation that runs this call.

    Args:
        operator: the operator's name, for messages.
        requested: the caller's `backend=` argument.
        implementations: by backend name.
        device: where the call's tensors live.
        args: what `refuse` of every implementation is asked with.

    Raises:
        ValueError: the named backend is unknown, absent from this operator, or cannot run it.
    """
    if _recorded is not None:
        _recorded.append(Call(operator, implementations, args))
    name = requested if requested is not None else _forced
    if name is None:
        if device.type in ("cuda", "meta") and not plain_aten():
            fused = implementations.get("triton")
            if fused is not None and fused.refuse(*args) is None and fused.preferred(*args):
                return fused.run
        return implementations["torch"].run
    _check_backend(f"{operator}: backend", name)
    if name not in implementations:
        raise ValueError(
            f"{operator}: backend={name!r} does not exist for this operator; "
            f"allowed are {', '.join(implementations)} or None"
        )
    reason = implementations[name].refuse(*args)
    if reason is not None:
        raise ValueError(f"{operator}: backend={name!r} cannot run this call: {reason}")
    return implementations[name].run


@dataclass(frozen=True)
class Call:
    """A call of an operator: its implementations and the arguments that they take."""

    operator: str
    implementations: Mapping[str, Implementation]
    args: tuple[Any, ...]


_recorded: list[Call] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """Within the block all calls of operators are noted in the list that it yields."""
    global _recorded
    previous, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = previous


TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


WIDEST = 256  # channels of a head that the kernels take


def triton_refuses(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> str | None:
    """Why no Triton kernel can run a call with these widths of heads, device and dtype, or None."""
    for name, width in (("head_dim", query.shape[-1]), ("value_dim", value.shape[-1])):
        if width > WIDEST:
            return f"{name} {width} exceeds {WIDEST}"
    if query.dtype not in TRITON_DTYPES:
        return f"dtype {query.dtype} is not one of float32, float16, bfloat16"
    if query.device.type == "meta":
        return None  # shapes only: nothing is launched
    if not TRITON_INSTALLED:
        return "triton is not installed (it exists for Linux only)"
    if query.device.type != "cuda" and not TRITON_INTERPRET:
        return f"it needs a CUDA tensor (or TRITON_INTERPRET=1), got one on {query.device.type!r}"
    return None


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype, if autocast is on for their device (as SDPA does)."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def remembered(check: Callable[..., Result]) -> Callable[..., Result]:
    """Decorator: what a check found for one call serves every call that is like it.

    The check may look at shapes, dtypes and devices of tensors, and at plain values. On small maps
    checks take as long as a matrix product, right after one has filled the cache with its own.
    """
    known: dict[Any, tuple[Result]] = {}

    @functools.wraps(check)
    def checked(*args: Any) -> Result:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return check(*args)
        try:
            like = tuple([_likeness(arg) for arg in args])
            found = known.get(like)
        except TypeError:  # a list, or a symbolic size
            return check(*args)
        if found is None:
            if len(known) >= 1024:
                known.clear()
            found = known[like] = (check(*args),)
        return found[0]

    return checked


def _likeness(arg: Any) -> tuple[Any, ...]:
    if isinstance(arg, Tensor):
        return type(arg), arg.shape, arg.dtype, arg.device
    if type(arg) is tuple:
        return arg, *map(type, arg)  # True and 1.0 equal 1
    return arg, type(arg)


def check_tensors(operator: str, **tensors: Tensor) -> None:
    """All are floating-point tensors of one dtype on one device.

    Raises:
        TypeError: one is no tensor, or not of a floating-point dtype, or of another dtype.
        ValueError: one is on another device.
    """
    first = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{operator}: {name} must be floating-point, got {tensor.dtype}")
        if first is None:
            first, first_name = tensor, name
            continue
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{operator}: {name} has dtype {tensor.dtype}, {first_name} has {first.dtype}; "
                "they must agree"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{operator}: {name} is on {tensor.device}, {first_name} on {first.device}; "
                "they must agree"
            )


def check_scale(name: str, scale: Any, query: Tensor) -> float:
    """The factor on the scores, `head_dim ** -0.5` for None.

    Raises:
        ValueError: it is not finite.
        TypeError: it is no number.
    """
    if scale is None:
        return float(query.shape[-1] ** -0.5)
    if torch.jit.is_tracing() and isinstance(scale, Tensor):  # made of sizes
        scale = float(scale)
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: scale must be a number or None, got {type(scale).__name__}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{name}: scale={scale} must be finite")
    return float(scale)


def per_dimension(
    operator: str,
    name: str,
    value: Any,
    dimensions: int,
    kind: type[int] | type[bool] = int,
    *,
    least: int = 1,
) -> tuple[Any, ...]:
    """`value` as one entry per spatial dimension; integers must be at least `least`.

    Raises:
        TypeError: an entry is not of `kind`.
        ValueError: the number of entries is not `dimensions`, or an integer is below `least`.
    """
    plain = type(value) is tuple and len(value) == dimensions and {*map(type, value)} == {kind}
    if plain and (kind is bool or min(value) >= least):
        return value  # most calls, quickly
    several = isinstance(value, Sequence) and not isinstance(value, str)
    entries = tuple(value) if several else (value,) * dimensions
    if torch.jit.is_tracing():  # which makes sizes of tensors, and what follows from them, tensors
        entries = tuple(int(e) if isinstance(e, Tensor) else e for e in entries)
    if len(entries) != dimensions:
        raise ValueError(
            f"{operator}: {name}={value!r} has {len(entries)} entries; allowed are one "
            f"{kind.__name__} or {dimensions}, one per spatial dimension"
        )
    for entry in entries:
        if kind is bool:
            fits = isinstance(entry, bool)
        else:
            fits = isinstance(entry, (int, torch.SymInt)) and not isinstance(entry, bool)
        if not fits:
            raise TypeError(
                f"{operator}: {name}={value!r} must hold {kind.__name__}, "
                f"got {type(entry).__name__}"
            )
        if kind is int and entry < least:
            raise ValueError(f"{operator}: {name}={value!r} must be at least {least}")
    return entries
