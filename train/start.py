"""The model that a run starts with: its weights, what of it is frozen, how it computes."""

from __future__ import annotations

import fnmatch
import logging
from pathlib import Path

import torch
from timm.models import group_parameters
from torch import nn

from vitarium.train.checkpoint import build_model, find_checkpoint, pruned_of
from vitarium.train.config import ConfigError, TrainConfig, nearest
from vitarium.zoo import load_checkpoint
from vitarium.zoo.pruned import apply_pruned

_LOG = logging.getLogger("vitarium.train")


def create_network(config: TrainConfig, classes: int) -> nn.Module:
    """The model that the configuration describes, on the CPU, with its first weights.

    Raises:
        ValueError: the name is not registered, or the model refuses an argument or the weights, or
            has no gradient checkpointing.
        FileNotFoundError: there are no such weights.
    """
    network = build_model(config.model, classes, config.model_kwargs, config.pretrained)
    if config.initial_checkpoint is not None:
        _load(network, config.initial_checkpoint)
    if config.grad_checkpointing:
        try:
            network.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError, NotImplementedError, RuntimeError) as error:
            raise ConfigError(
                f"grad_checkpointing=True is not allowed; model={config.model!r} does not support "
                f"it{f' ({error})' if str(error) else ''}"
            ) from None
    if config.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _load(network: nn.Module, checkpoint: str) -> None:
    """All weights; or all but the classifier, if that is of another number of classes."""
    source = find_checkpoint(checkpoint) if Path(checkpoint).is_dir() else checkpoint
    try:
        apply_pruned(network, pruned_of(source))
        report = load_checkpoint(network, source)
    except ValueError as error:
        try:
            report = load_checkpoint(network, source, replace_head=True)
        except ValueError:
            raise error from None
    _LOG.info("%s", report)


def freeze(network: nn.Module, what: int | list[str] | str | None) -> list[nn.Module]:
    """Switch off the gradients of the parameters that `what` names, see `TrainConfig.freeze`.

    Returns:
        The largest modules all of whose parameters are frozen. In training they are to stay in
        evaluation mode: a frozen network has neither dropout nor stochastic depth, and the
        statistics of its BatchNorm are part of what is frozen.

    Raises:
        ConfigError: a name is that of no parameter, or nothing would be left to train.
    """
    if what is None or what == 0:
        return []
    parameters = dict(network.named_parameters())
    names = _frozen_names(network, what, list(parameters))
    if len(names) == len(parameters):
        raise ConfigError(f"freeze={what!r} is not allowed; it must leave something to train")
    for name in names:
        parameters[name].requires_grad_(False)
    return _frozen_modules(network)


def _frozen_names(network: nn.Module, what: int | list[str] | str, names: list[str]) -> set[str]:
    if what == "backbone":
        classifier = network.get_classifier()  # type: ignore[operator]
        heads = classifier if isinstance(classifier, (tuple, list)) else [classifier]
        trained = {id(parameter) for head in heads for parameter in head.parameters()}
        if not trained:
            raise ConfigError("freeze='backbone' is not allowed; the model has no classifier")
        return {name for name, p in network.named_parameters() if id(p) not in trained}
    if isinstance(what, int):
        groups = group_parameters(network, network.group_matcher(coarse=True))  # type: ignore
        ordered = [groups[number] for number in sorted(groups)]
        return {name for group in ordered[:what] for name in group}
    frozen: set[str] = set()
    for pattern in [what] if isinstance(what, str) else what:
        found = fnmatch.filter(names, pattern) + fnmatch.filter(names, f"{pattern}.*")
        if not found:
            modules = [name for name, _ in network.named_modules() if name]
            raise ConfigError(
                f"freeze={pattern!r} names no parameter{nearest(pattern, ['backbone', *modules])}"
            )
        frozen.update(found)
    return frozen


def _frozen_modules(module: nn.Module) -> list[nn.Module]:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [module]
    return [found for child in module.children() for found in _frozen_modules(child)]


def check_sizes(network: nn.Module, name: str, sizes: set[int]) -> None:
    """Refuse a model that does not take square images of every one of `sizes`.

    Raises:
        ConfigError: naming the size.
    """
    network.eval()
    for size in sorted(sizes):
        try:
            with torch.no_grad():
                network(torch.zeros(1, 3, size, size))
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"progressive: model={name!r} refuses images of {size}x{size}: {reason}"
            ) from None
