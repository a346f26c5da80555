"""Structured pruning: hidden units of feed-forward networks, and heads of attention.

What depends on a hidden unit (rows, columns, depthwise filters, norms, the other half of a gate) is
found by torch-pruning's dependency graph of that feed-forward network alone, on what it sees of an
image. A layer is pruned only where a trial shows that the narrower layer computes what the whole
one does with those units silenced; all others are left as they are, and reported with the reason.
So it does not matter what the rest of a model is made of.

Which units go is decided from weights alone. The criterion "dimap" follows He and Zhou,
"Data-Independent Module-Aware Pruning for Hierarchical Vision Transformers" (arXiv 2404.13648):
the weights that make up one unit belong together and so do the units of one module; what counts is
the distortion that the unit's loss adds to its module, so that stages whose weights differ in scale
can be compared. Their code is not public; `distortion` says what is computed here.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from vitarium.zoo.pruned import record_pruned, replace_tensor, widths

CRITERIA = ("dimap", "magnitude", "random")
_TOLERANCE = 1e-4  # of the narrower layer from the silenced one, over the largest output
_FEED_FORWARD = ("mlp", "glu", "ffn", "feedforward")  # in names of classes


@dataclass(frozen=True)
class PruneReport:
    """What was pruned, by path in the model.

    Attributes:
        units: hidden units of each feed-forward layer, before and after.
        heads: heads of each attention module, before and after.
        kept: why a feed-forward network, or attention where heads were asked for, stayed whole.
    """

    units: dict[str, tuple[int, int]]
    heads: dict[str, tuple[int, int]]
    kept: dict[str, str]


_Inputs = tuple[str, tuple[Any, ...], dict[str, Any]]  # a method and its arguments


@dataclass
class _Candidate:
    """Units that can go: `energy` of each, and what removes some of them."""

    path: str
    energy: Tensor
    remove: Callable[[list[int]], None]


def prune_model(
    model: nn.Module,
    images: Tensor,
    ratio: float,
    *,
    heads_ratio: float = 0.0,
    criterion: str = "dimap",
    round_to: int = 1,
    seed: int = 0,
) -> PruneReport:
    """Remove hidden units of feed-forward networks and heads of attention, in place.

    The removed share is that over the whole model: layers that matter less lose more. Every layer
    keeps at least `round_to` units and one head. `vitarium.zoo.pruned.pruned_layers` then says what
    has changed.

    Args:
        model: on the CPU; it is left in evaluation mode.
        images: `(B, in_chans, H, W)` of a size that the model takes; their contents decide nothing.
        ratio: share of all hidden units to remove, at least 0 and below 1.
        heads_ratio: share of all heads to remove, likewise.
        criterion: "dimap", "magnitude" (the same without the comparison within modules) or
            "random".
        round_to: the number of units that a layer keeps is rounded to a multiple of this.
        seed: of the criterion "random".

    Raises:
        ValueError: an argument is out of range, or nothing in the model can be pruned.
        ValueError: torch-pruning is not installed.
    """
    check_ratios(ratio, heads_ratio)
    if criterion not in CRITERIA:
        raise ValueError(f"criterion={criterion!r} is unknown; allowed are {', '.join(CRITERIA)}")
    if not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to={round_to!r} must be an integer of at least 1")
    model.eval()
    before = widths(model)
    kept: dict[str, str] = {}
    generator = torch.Generator().manual_seed(seed)
    hidden: list[_Candidate] = []
    attentive: list[_Candidate] = []
    if ratio:
        networks = _feed_forward_networks(model)
        hidden = _collect(model, images, networks, _hidden_units, kept)
        _refuse_nothing(hidden, "feed-forward network", kept)
    if heads_ratio:
        attentions = {
            path: module
            for path, module in model.named_modules()
            if isinstance(getattr(module, "num_heads", None), int) and path
        }
        attentive = _collect(model, images, attentions, _heads, kept)
        _refuse_nothing(attentive, "attention module", kept)
    units = _prune(hidden, ratio, criterion, round_to, generator)
    heads = _prune(attentive, heads_ratio, criterion, 1, generator)
    record_pruned(model, before)
    return PruneReport(units, heads, kept)


def check_ratios(ratio: float, heads_ratio: float) -> None:
    """Refuse shares that nothing can be pruned by.

    Raises:
        ValueError: one is out of range, or both are 0.
    """
    for name, value in (("ratio", ratio), ("heads_ratio", heads_ratio)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 <= value < 1):
            raise ValueError(f"{name}={value!r} must be a number of at least 0 and below 1")
    if ratio == heads_ratio == 0:
        raise ValueError("ratio=0 and heads_ratio=0 prune nothing; one must be above 0")


def distortion(energy: Tensor) -> Tensor:
    """The criterion "dimap" for the units of one module.

    A unit's energy is the product of the squared norms of its weights on the way in and on the way
    out: it bounds, up to the size of the input, the square of what the unit adds to the output.
    Units go in ascending order of it, and the score of one is its energy over that of all units
    that are left when its turn comes: the relative distortion of the module's output that its
    removal adds. For single weights of a layer that would be LAMP (arXiv 2010.07611).

    Args:
        energy: `(units,)`, of float64, not negative.

    Returns:
        Scores `(units,)` from 0 to 1, comparable between modules.
    """
    order = energy.argsort(stable=True)
    left = energy[order].flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(energy)
    scores[order] = energy[order] / left.clamp_min(torch.finfo(energy.dtype).tiny)
    return scores


def _prune(
    candidates: Sequence[_Candidate],
    ratio: float,
    criterion: str,
    round_to: int,
    generator: torch.Generator,
) -> dict[str, tuple[int, int]]:
    """Remove the units of least score over all candidates; numbers of units before and after."""
    scores = []
    for candidate in candidates:
        if criterion == "dimap":
            scores.append(distortion(candidate.energy))
        elif criterion == "magnitude":
            scores.append(candidate.energy)
        else:
            scores.append(torch.rand(len(candidate.energy), generator=generator))
    if not candidates:
        return {}
    total = sum(map(len, scores))
    order = torch.cat(scores).argsort(stable=True)[: round(ratio * total)]
    going = torch.zeros(total, dtype=torch.bool)
    going[order] = True
    counts = {}
    for candidate, score, part in zip(candidates, scores, going.split([*map(len, scores)])):
        full = len(score)
        left = round((full - int(part.sum())) / round_to) * round_to
        left = min(full, max(left, round_to))
        if left < full:
            candidate.remove(sorted(score.argsort(stable=True)[: full - left].tolist()))
        counts[candidate.path] = (full, left)
    return counts


def _refuse_nothing(candidates: Sequence[_Candidate], kind: str, kept: Mapping[str, str]) -> None:
    if not candidates:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(kept.items())[:3])
        raise ValueError(f"no {kind} of this model can be pruned ({reasons or 'it has none'})")


def _collect(
    model: nn.Module,
    images: Tensor,
    modules: Mapping[str, nn.Module],
    find: Callable[[str, nn.Module, _Inputs], list[_Candidate]],
    kept: dict[str, str],
) -> list[_Candidate]:
    """What `find` finds in modules, given what each of them sees of the images."""
    candidates = []
    inputs = _inputs(model, images, modules)
    for path, module in modules.items():
        if path not in inputs:
            kept[path] = "it does not run for an image"
            continue
        try:
            candidates += find(path, module, inputs[path])
        except _Unfit as reason:
            kept[path] = str(reason)
    return candidates


class _Unfit(Exception):
    """Why a module stays whole."""


def _inputs(
    model: nn.Module, images: Tensor, modules: Mapping[str, nn.Module]
) -> dict[str, _Inputs]:
    """The method and the arguments of the first call of each module in a forward pass."""
    seen: dict[str, _Inputs] = {}

    def watch(path: str, method: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(path, (method, args, kwargs))
            return call(*args, **kwargs)

        return watched

    with contextlib.ExitStack() as stack, torch.no_grad():
        for path, module in modules.items():
            for method in ("forward", "mix_tokens"):  # hosts with class tokens call the latter
                if hasattr(module, method):
                    watched = watch(path, method, getattr(module, method))
                    stack.enter_context(mock.patch.object(module, method, watched))
        model(images)
    return seen


def _same_where_silenced(silenced: nn.Module, narrow: nn.Module, inputs: _Inputs) -> str | None:
    """Why `narrow` does not compute what `silenced` does, or None if it does."""
    method, args, kwargs = inputs
    with torch.no_grad():
        expected = getattr(silenced, method)(*args, **kwargs)
        try:
            found = getattr(narrow, method)(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            return f"narrower, it does not run: {' '.join(str(error).split())[:120]}"
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return "narrower, its output has another shape"
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    if not error <= _TOLERANCE:
        return f"its units depend on each other: without some, others change by {error:.0e}"
    return None


# --- feed-forward networks ---------------------------------------------------------------------


def _feed_forward_networks(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that are feed-forward networks by their name or their class's, outermost first."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        kind, name = type(module).__name__.lower(), path.rpartition(".")[2]
        named = name in ("mlp", "ffn") or any(part in kind for part in _FEED_FORWARD)
        inside = any(path.startswith(f"{outer}.") for outer in found)
        layers = sum(isinstance(part, (nn.Linear, nn.Conv2d)) for part in module.modules())
        if named and "head" not in kind and not inside and layers > 1:
            found[path] = module
    return found


def _hidden_units(path: str, module: nn.Module, inputs: _Inputs) -> list[_Candidate]:
    """The hidden layers of a feed-forward network whose units can go."""
    candidates, reasons = [], []
    layers = _hidden_layers(module, inputs)
    for name in layers:
        silenced, narrow = copy.deepcopy(module), copy.deepcopy(module)
        count = _width_in(module.get_submodule(name))
        trial = list(range(0, count, 3))
        with torch.no_grad():
            silenced.get_submodule(name).weight[:, trial] = 0
        try:
            _group(narrow, name, inputs, trial).prune()
        except Exception as error:  # the library raises nearly anything on what it cannot trace
            reasons.append(f"torch-pruning: {type(error).__name__}: {error}")
            continue
        reason = _same_where_silenced(silenced, narrow, inputs)
        if reason is not None:
            reasons.append(reason)
            continue
        energy = _energy(_group(module, name, inputs, list(range(count))), count)
        full = f"{path}.{name}"

        def remove(units: list[int], name: str = name) -> None:
            _group(module, name, inputs, units).prune()

        candidates.append(_Candidate(full, energy, remove))
    if not candidates:
        raise _Unfit("; ".join(reasons) or "no hidden layer depends on its own units alone")
    return candidates


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise ValueError("pruning needs torch-pruning: pip install 'vitarium[compress]'") from None
    return torch_pruning


def _graph(module: nn.Module, inputs: _Inputs) -> Any:
    _, args, kwargs = inputs
    if any(isinstance(value, Tensor) for value in kwargs.values()):
        raise ValueError("it takes tensors by name")
    with torch.enable_grad():  # the graph is read off the derivative's
        return (
            _torch_pruning()
            .DependencyGraph()
            .build_dependency(
                module, list(args), forward_fn=lambda part, x: part(*x, **kwargs), verbose=False
            )
        )


def _group(module: nn.Module, name: str, inputs: _Inputs, units: list[int]) -> Any:
    """All that goes with some of the channels that layer `name` takes in."""
    layer = module.get_submodule(name)
    graph = _graph(module, inputs)
    pruner = graph.get_pruner_of_module(layer)
    return graph.get_pruning_group(layer, pruner.prune_in_channels, units)


def _hidden_layers(module: nn.Module, inputs: _Inputs) -> list[str]:
    """Names of layers whose inputs are other layers' outputs; of those that share, the first."""
    try:
        graph = _graph(module, inputs)
    except Exception as error:  # as above
        raise _Unfit(f"torch-pruning: {type(error).__name__}: {error}") from None
    names, seen = [], set()
    for name, layer in module.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or getattr(layer, "groups", 1) > 1:
            continue
        pruner = graph.get_pruner_of_module(layer)
        try:
            group = graph.get_pruning_group(layer, pruner.prune_in_channels, [0])
        except (ValueError, KeyError, AttributeError):
            continue
        produced = [
            dependency
            for dependency, _ in group
            if isinstance(dependency.target.module, (nn.Linear, nn.Conv2d))
            and graph.is_out_channel_pruning_fn(dependency.handler)
        ]
        members = frozenset(id(p.target.module) for p in produced)
        if members and not members & seen:
            names.append(name)
            seen |= members
    return names


def _width_in(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _energy(group: Any, count: int) -> Tensor:
    """The product, over the layers of a group, of the squared norms of each unit's weights."""
    norms: dict[tuple[int, bool], Tensor] = {}
    for item in group.items:
        layer, name = item.dep.target.module, item.dep.handler.__name__
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue  # what a norm does to the scale of its input follows from the input
        depthwise = getattr(layer, "groups", 1) > 1
        incoming = not depthwise and "in_channels" in name
        squares = _squares(layer, incoming)
        indices = [int(getattr(index, "idx", index)) for index in item.idxs]
        gathered = torch.zeros(count, dtype=torch.float64)
        gathered[torch.tensor(item.root_idxs)] = squares[torch.tensor(indices)]
        # The two rows that a unit has in a gated layer add up; a depthwise layer is in the group
        # from both sides and counts once.
        key = (id(layer), incoming)
        norms[key] = gathered if depthwise or key not in norms else norms[key] + gathered
    return torch.stack(list(norms.values())).log().sum(0).exp()


def _squares(layer: nn.Module, incoming: bool) -> Tensor:
    """Squared norms of the weights of each channel that a layer takes in, or of each it makes."""
    squares = layer.weight.detach().double().square()
    if incoming:
        return squares.transpose(0, 1).flatten(1).sum(1)
    squares = squares.flatten(1).sum(1)
    if layer.bias is not None:
        squares = squares + layer.bias.detach().double().square()
    return squares


# --- heads -------------------------------------------------------------------------------------


def _heads(path: str, module: nn.Module, inputs: _Inputs) -> list[_Candidate]:
    """The heads of an attention module with a fused or separate projections and `proj`."""
    proj, heads = getattr(module, "proj", None), module.num_heads
    if not isinstance(proj, nn.Linear) or heads < 2 or proj.in_features % heads:
        raise _Unfit("it has one head" if heads < 2 else "it has no linear `proj` after its heads")
    inner = proj.in_features
    silenced, narrow = copy.deepcopy(module), copy.deepcopy(module)
    trial = list(range(0, heads, 2))
    with torch.no_grad():
        silenced.proj.weight.unflatten(1, (heads, -1))[:, trial] = 0
    _remove_heads(narrow, trial)
    reason = _same_where_silenced(silenced, narrow, inputs)
    if reason is not None:
        raise _Unfit(reason)
    energy = _squares(proj, True).view(heads, -1).sum(1)
    rows = torch.zeros(heads, dtype=torch.float64)
    for layer in _projections(module, inner):
        rows += _squares(layer, False).view(-1, heads, inner // heads).sum((0, 2))
    return [_Candidate(path, energy * rows, lambda units: _remove_heads(module, units))]


def _projections(module: nn.Module, inner: int) -> list[nn.Linear]:
    return [
        layer
        for layer in module.children()
        if isinstance(layer, nn.Linear) and layer is not module.proj
        if layer.out_features % inner == 0
    ]


def _remove_heads(module: nn.Module, units: list[int]) -> None:
    """Take heads out of projections, tables with a row per head, and depthwise convolutions."""
    tp, heads, inner = _torch_pruning(), module.num_heads, module.proj.in_features
    channels = torch.arange(inner).view(heads, -1)[units].flatten()
    for layer in _projections(module, inner):
        parts = torch.arange(0, layer.out_features, inner)
        tp.prune_linear_out_channels(layer, (parts[:, None] + channels).flatten().tolist())
    tp.prune_linear_in_channels(module.proj, channels.tolist())
    for layer in module.children():
        if isinstance(layer, nn.Conv2d) and layer.groups == layer.out_channels == inner:
            tp.prune_depthwise_conv_out_channels(layer, channels.tolist())
    left = [head for head in range(heads) if head not in units]
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, tensor in tensors:
        if heads in tensor.shape:
            axis = tensor.shape.index(heads)
            replace_tensor(module, name, tensor.detach().index_select(axis, torch.tensor(left)))
    for name in ("num_heads", "num_heads_kv"):
        if vars(module).get(name) == heads:
            setattr(module, name, len(left))
    if isinstance(vars(module).get("attn_dim"), int):
        module.attn_dim = module.proj.in_features
