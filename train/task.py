"""What a run trains: the model, the loss of a batch, and the figures of the evaluation.

The loop (`vitarium.train.loop`) steps, evaluates, saves and resumes; it knows nothing but `Task`.
`TrainConfig.task` names one of `vitarium.train.config.TASKS`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitarium.train import setup
from vitarium.train.config import TASKS, TrainConfig
from vitarium.train.data import ImageData, InputConfig
from vitarium.train.evaluate import score
from vitarium.train.metrics import Evaluation
from vitarium.train.start import check_sizes, create_network, freeze


class Task:
    """The base of tasks: a model of timm's registry with one output per class, and its input.

    A task is made right after the run's seed was set, so that weights are a function of it; it may
    raise whatever the configuration does not allow. Random numbers of `prepare` and `loss` are a
    function of the seed and the step: the loop sets every generator before.

    Attributes:
        network: the model that the weights file of the run holds.
        module: what is trained, which the optimizer, the moving average and the training state
            are about: `network`, or a module that has it beside further ones with parameters.
            Its forward pass is what `loss` is given, and all that may use parameters.
        inputs: size and normalisation of the images.
        of_classes: whether the evaluation is of the images' classes.
        progress: part of all steps that is done; the loop sets it before every step.
        frozen: parts of `network` that are not trained.
        sizes: height and width of the training images, for every epoch.
    """

    of_classes = True
    progress = 0.0

    network: nn.Module
    module: nn.Module
    inputs: InputConfig

    def __init__(self, config: TrainConfig, data: ImageData, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.network = create_network(config, len(data.classes))
        self.inputs = setup.input_config(self.network, config)
        self.module = self.network
        self.frozen = freeze(self.network, config.freeze)
        size = self.inputs.image_size[0]
        epochs = config.epochs + config.schedule.cooldown_epochs
        self.sizes = config.progressive.sizes(size, epochs)
        if set(self.sizes) != {size}:
            check_sizes(self.network, config.model, set(self.sizes))

    def network_of(self, module: nn.Module) -> nn.Module:
        """The model within `module`, which is `self.module` or a moving average of it."""
        return module

    def start_epoch(self, epoch: int) -> None:
        """Before the first step of an epoch (from 0), or the first after resuming.

        `module` has just been put in training mode: what is frozen goes back.
        """
        for module in self.frozen:
            module.eval()

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """From a batch as loaded, uint8 `(B, 3, H, W)` and `(B,)`, to what `loss` takes."""
        raise NotImplementedError

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar.

        Args:
            model: `self.module`, perhaps wrapped for several processes; called at most once.
            images, targets: what `prepare` made.
        """
        raise NotImplementedError

    def evaluate(
        self,
        module: nn.Module,
        loader: DataLoader[Any],
        accelerator: Accelerator,
        before_batch: Callable[[], None],
    ) -> Evaluation:
        """Figures of `module` on the held-out images, the same in every process."""
        return score(self.network_of(module), loader, self.inputs, accelerator, before_batch)

    def rank(self, record: Mapping[str, Any]) -> tuple[float, ...]:
        """How good an epoch's record is: the largest is that of the best checkpoint."""
        return (record["correct"], -record["loss"])


class Classification(Task):
    """One class per image: cross-entropy, with Mixup and CutMix."""

    def __init__(self, config: TrainConfig, data: ImageData, device: torch.device) -> None:
        super().__init__(config, data, device)
        self._prepare = setup.BatchPreparation(config, len(data.classes), self.inputs, device)
        self.criterion = setup.create_loss(config)

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        self._prepare.start_epoch(epoch, self.sizes[epoch])

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self._prepare(images, targets)

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(model(images), targets)


def create_task(config: TrainConfig, data: ImageData, device: torch.device) -> Task:
    """The task that the configuration names, its modules not yet on `device`.

    Raises:
        ValueError, FileNotFoundError: the model or whatever else it needs cannot be had.
    """
    return pkgutil.resolve_name(TASKS[config.task])(config, data, device)


def require_classifier(config: TrainConfig, origin: object) -> None:
    """Refuse the weights of a run whose task trains no classifier.

    Args:
        config: of the run.
        origin: where the weights are from, for the message.

    Raises:
        ValueError: its outputs are not classes of images.
    """
    if not pkgutil.resolve_name(TASKS[config.task]).of_classes:
        raise ValueError(
            f"{origin} holds the weights of a pre-training (task={config.task!r}), which has "
            f"trained no classifier; vitarium train --initial_checkpoint {origin} does"
        )
