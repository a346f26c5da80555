"""Models some of whose layers are narrower than their names in timm's registry say.

What structured pruning changes in a module is a handful of integers (`out_features`, `num_heads`,
...) and the shapes of its tensors. Both are written down by path, as plain data that a checkpoint's
header holds, so that a pruned model is built again without the library that pruned it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Pruned = dict[str, dict[str, Any]]  # by path of a module: integers, and shapes of tensors

WIDTHS = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "groups",
    "num_features",
    "num_heads",
    "num_heads_kv",
    "attn_dim",
)


def widths(model: nn.Module) -> Pruned:
    """The present widths of every module of a model: attributes of `WIDTHS`, and shapes."""
    found: Pruned = {}
    for path, module in model.named_modules():
        sizes: dict[str, Any] = {
            name: value
            for name in WIDTHS
            if isinstance(value := getattr(module, name, None), int) and name in vars(module)
        }
        for name, tensor in _own_tensors(module).items():
            if tensor.dim():
                sizes[name] = list(tensor.shape)
        if sizes:
            found[path] = sizes
    return found


def record_pruned(model: nn.Module, before: Pruned) -> None:
    """Note on a model what of its `widths` has changed, beside what was noted earlier."""
    noted = {path: dict(sizes) for path, sizes in pruned_layers(model).items()}
    for path, sizes in widths(model).items():
        changed = {k: v for k, v in sizes.items() if before.get(path, {}).get(k) != v}
        if changed:
            noted.setdefault(path, {}).update(changed)
    model.pruned_layers = noted  # type: ignore[assignment]


def pruned_layers(model: nn.Module) -> Pruned:
    """What pruning has changed in a model: for `apply_pruned`, as plain data; empty if nothing."""
    return getattr(model, "pruned_layers", {})


def apply_pruned(model: nn.Module, pruned: Mapping[str, Mapping[str, Any]]) -> None:
    """Make the layers of a whole model as narrow as those of a pruned one; values are lost.

    Args:
        model: as built, before its weights are loaded.
        pruned: what `pruned_layers` returned for the pruned model.

    Raises:
        ValueError: a module or an entry is not the model's, or would grow.
    """
    modules = dict(model.named_modules())
    for path, sizes in pruned.items():
        if path not in modules:
            raise ValueError(f"pruned layer {path!r} is not in the model")
        module, tensors = modules[path], _own_tensors(modules[path])
        for name, size in sizes.items():
            where = f"pruned layer {path!r}: {name}={size!r}"
            if name in WIDTHS:
                full = vars(module).get(name)
                if not isinstance(full, int) or type(size) is not int or not 1 <= size <= full:
                    raise ValueError(f"{where} must be from 1 to {full}")
                setattr(module, name, size)
            elif name in tensors:
                full = list(tensors[name].shape)
                fits = isinstance(size, list) and len(size) == len(full)
                if not fits or not all(
                    type(n) is int and 1 <= n <= most for n, most in zip(size, full)
                ):
                    raise ValueError(f"{where} must be a shape of at most {full}")
                replace_tensor(module, name, tensors[name].new_empty(size))
            else:
                raise ValueError(f"{where} is no width and no tensor of that layer")
    model.pruned_layers = {k: dict(v) for k, v in pruned.items()}  # type: ignore[assignment]


def replace_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Put another tensor in the place of a parameter or a buffer, as what that one was."""
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value.detach(), requires_grad=old.requires_grad)
    setattr(module, name, value)


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of a module itself, by name."""
    hidden = module._non_persistent_buffers_set
    own = dict(module.named_parameters(recurse=False))
    return own | {k: v for k, v in module.named_buffers(recurse=False) if k not in hidden}
