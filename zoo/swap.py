"""timm's models with the token mixers of this package, and back.

A module of timm becomes one of ours by its class alone: a subclass of timm's, whose `forward` (or
the method of it that mixes tokens) computes with the operators of `vitarium.ops`. The object stays,
and with it parameters, buffers, hooks, mode, device, dtype and the keys of state dicts.

What is known of timm's classes is a table, `ADAPTERS`, by qualified name: nothing of timm is
imported for it, and a class that a release moves, renames or changes is reported and left alone.
Tried with timm 1.0.26 and 1.0.31.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from timm.layers import register_notrace_module
from torch import nn


@dataclass(frozen=True)
class Adapter:
    """What replaces the forward of one class of timm.

    Attributes:
        methods: by name, the functions that stand in for the class's methods.
        mixer: name of the mixer in `vitarium.ops.MIXERS` that computes the same; empty for what is
            no mixer and only refuses sizes of images.
        needs: attributes that the functions read, `a.b` of a part; none may be missing.
        dropout: the part with the dropout of attention weights: training with it is timm's.
        unfit: why a module cannot be replaced, or None.
        fixed_size: whether it takes maps of one size only, like timm's.
    """

    methods: Mapping[str, Callable[..., Any]]
    mixer: str
    needs: Sequence[str] = ()
    dropout: str | None = None
    unfit: Callable[[Any], str | None] = lambda module: None
    fixed_size: bool = False


ADAPTERS: dict[str, Adapter] = {}


def adapt(name: str, *, mixer: str, method: str = "forward", **rest: Any) -> Callable[..., Any]:
    """Decorator: the function replaces `method` of timm's class of this qualified name."""

    def register(compute: Callable[..., Any]) -> Callable[..., Any]:
        known = ADAPTERS.get(name)
        methods = {**(known.methods if known else {}), method: compute}
        ADAPTERS[name] = Adapter(methods, mixer, **rest)
        return compute

    return register


@dataclass(frozen=True)
class SwapReport:
    """What `swap_mixers` did, by path in the model; `print` shows it.

    Attributes:
        replaced: timm's class and the mixer that computes it now.
        lifted: parts that are no mixers, and take images of any size now.
        kept: why a module of attention was left as it was.
        already: paths of what earlier calls had replaced.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    lifted: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    already: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = []
        for title, paths in (
            ("replaced", self.replaced),
            ("takes any size", self.lifted),
            ("kept", self.kept),
            ("replaced before", dict.fromkeys(self.already, "")),
        ):
            by_reason: dict[str, list[str]] = {}
            for path, reason in paths.items():
                by_reason.setdefault(reason, []).append(path or "the model itself")
            lines.append(f"{title}: {len(paths)}")
            for reason, found in by_reason.items():
                more = f" and {len(found) - 3} more" if len(found) > 3 else ""
                lines.append(f"  {reason}: {', '.join(found[:3])}{more}".replace("  : ", "  "))
        return "\n".join(lines)


def swap_mixers(model: nn.Module) -> SwapReport:
    """Replace the token mixers of timm's models by ours, in place.

    Swin and Swin V2, MaxViT, MaxxViT and CoAtNet, DaViT, HaloNet, FocalNet, VOLO, SHViT,
    EfficientViT (MSRA), PVT v2, BEiT and ViT with relative position bias. Parameters stay the same
    objects under the same names, and so does the output, also in training. Attention dropout, where
    it is on, is computed in training by timm's own code.

    Images may have any size afterwards, but of BEiT and of ViT with relative position bias: maps
    are padded with zeros to whole windows, as in timm's models of dynamic size, and tables of
    positions are interpolated, as in timm's `set_input_size`.

    Swin's shift hides other windows' tokens entirely, where timm subtracts 100 from their scores.

    Args:
        model: a model of timm, a part of one, or a module with one inside.

    Returns:
        What was replaced, and what was not and why.

    Raises:
        TypeError: `model` is no module.
    """
    _check(model)
    replaced: dict[str, str] = {}
    kept: dict[str, str] = {}
    already = tuple(_ours(model))
    known = {path: _adapter(model.get_submodule(path)) for path in already}
    done = [path for path, adapter in known.items() if adapter.mixer]
    fixed = [path for path, adapter in known.items() if adapter.fixed_size]  # refuse sizes
    for path, module in model.named_modules():
        kind = type(module)
        if any(_within(path, other) for other in done):
            continue
        adapter = ADAPTERS.get(_qualified(kind))
        if adapter is None:
            if kind.__module__.startswith("timm.") and "Att" in kind.__name__:
                kept[path] = f"{kind.__name__}: none of ours computes it"
        elif adapter.mixer:
            reason = _misfit(kind, module, adapter)
            if reason is None:
                module.__class__ = fused_class(kind)
                replaced[path] = f"{kind.__name__} by {adapter.mixer}"
                done.append(path)
            else:
                kept[path] = f"{kind.__name__}: {reason}"
            if reason is not None or adapter.fixed_size:
                fixed.append(path)
    lifted = _lift_sizes(model, done, fixed, kept)
    kept = {p: why for p, why in kept.items() if not any(_within(other, p) for other in done)}
    return SwapReport(replaced, lifted, kept, already)


def _lift_sizes(
    model: nn.Module, done: Sequence[str], fixed: Sequence[str], kept: dict[str, str]
) -> dict[str, str]:
    """Replaces what refuses sizes of images beside mixers of ours that take them all."""
    lifted = {}
    for path, module in model.named_modules():
        kind = type(module)
        adapter = ADAPTERS.get(_qualified(kind))
        if adapter is None or adapter.mixer:
            continue
        parent = path.rpartition(".")[0]
        if not any(_within(other, parent) for other in done):
            continue
        reason = _misfit(kind, module, adapter)
        if any(_within(other, parent) for other in fixed):
            reason = "mixers beside it take one size only"
        if reason is None:
            module.__class__ = fused_class(kind)
            lifted[path] = kind.__name__
        else:
            kept[path] = f"{kind.__name__}: {reason}"
    return lifted


def _within(path: str, other: str) -> bool:
    """Whether a module is the other or a part of it."""
    return not other or path == other or path.startswith(f"{other}.")


def restore_mixers(model: nn.Module) -> tuple[str, ...]:
    """Undo `swap_mixers`: every module is again what timm made of it, with its weights as they are.

    Returns:
        The paths of the modules.

    Raises:
        TypeError: `model` is no module.
    """
    _check(model)
    paths = tuple(_ours(model))
    for path in paths:
        module = model.get_submodule(path)
        module.__class__ = _timm_class(module)
    return paths


def _timm_class(module: Any) -> type[nn.Module]:
    """What a module that is ours was before."""
    return type(module).timm_class


def _adapter(module: Any) -> Adapter:
    """What a module that is ours was replaced by."""
    return ADAPTERS[_qualified(_timm_class(module))]


def _ours(model: nn.Module) -> list[str]:
    """Paths of the modules that are ours by `swap_mixers`."""
    return [path for path, module in model.named_modules() if hasattr(type(module), "timm_class")]


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _misfit(kind: type, module: nn.Module, adapter: Adapter) -> str | None:
    """Why the module is not as its adapter expects it to be, or None."""
    for name, compute in adapter.methods.items():
        theirs = getattr(kind, name, None)
        if theirs is None:
            return f"timm's class has no method {name}"
        asked, given = (list(inspect.signature(f).parameters)[1:] for f in (theirs, compute))
        if asked != given:
            return f"timm's {name} takes {', '.join(asked)}, and not {', '.join(given)}"
    for name in (*adapter.needs, *filter(None, [adapter.dropout])):
        try:
            operator.attrgetter(name)(module)
        except AttributeError:
            return f"timm's class has no {name}"
    return adapter.unfit(module)


@functools.cache
def fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a class of timm that computes with operators of this package."""
    adapter = ADAPTERS[_qualified(kind)]
    methods = {
        name: _method(getattr(kind, name), compute, adapter.dropout)
        for name, compute in adapter.methods.items()
    }
    # Made at need, the class has no address of its own: pickles name timm's.
    methods["__reduce_ex__"] = lambda module, _: (_blank, (kind,), module.__dict__)
    fused = type(f"Fused{kind.__name__}", (kind,), {**methods, "timm_class": kind})
    fused.__module__ = __name__
    if adapter.mixer or "forward" in adapter.methods:
        register_notrace_module(fused)  # one node to torch.fx: it looks at sizes in Python
    return fused


def _blank(kind: type[nn.Module]) -> nn.Module:
    fused = fused_class(kind)
    return fused.__new__(fused)


def _method(
    theirs: Callable[..., Any], compute: Callable[..., Any], dropout: str | None
) -> Callable[..., Any]:
    if dropout is None:
        return compute
    find = operator.attrgetter(dropout)

    @functools.wraps(compute)
    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module.training and find(module).p > 0:
            return theirs(module, *args, **kwargs)
        return compute(module, *args, **kwargs)

    return run
