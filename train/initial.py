"""The model that a run starts from: drawn, as published, or of an earlier run."""

from __future__ import annotations

from typing import Any

from vitarium.train.checkpoint import build_model, load_described, read_weights
from vitarium.train.config import ConfigError, TrainConfig


def initial_network(config: TrainConfig, num_classes: int) -> Any:
    """The model of a configuration with its first weights, in training mode.

    Raises:
        ValueError: timm knows no such model, or it refuses its arguments.
        FileNotFoundError: there is no such initial checkpoint.
        ConfigError: the initial checkpoint is of another model, or has other layers.
    """
    if config.initial_checkpoint is None:
        return build_model(config.model, num_classes, config.model_kwargs, config.pretrained)
    found, tensors, path = read_weights(config.initial_checkpoint)
    if found.model != config.model:
        raise ConfigError(
            f"initial_checkpoint={config.initial_checkpoint!r} is of model {found.model!r}, not of "
            f"model={config.model!r}"
        )
    try:
        network: Any = load_described(found, tensors, path, config.model_kwargs)
    except ValueError as error:
        raise ConfigError(
            f"{error}; it was trained with model_kwargs={dict(found.model_kwargs)!r}"
        ) from None
    if len(found.classes) != num_classes:
        network.reset_classifier(num_classes)
    return network.train()
