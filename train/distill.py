"""Knowledge distillation: a student learns the labels and a teacher's answers to the same images.

The teacher sees the images that the student sees, varied and mixed, as in DeiT (arXiv 2012.12877,
section 4), but at its own size and with its own normalisation. It is in evaluation mode, has no
gradients, and is no part of the training state: its weights are found again by its name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.train.config import ConfigError, TrainConfig
from vitarium.train.data import ImageData, InputConfig
from vitarium.train.options import DistillationConfig
from vitarium.train.task import Classification, require_classifier
from vitarium.train.weights import load_weights


class Teacher:
    """A model that answers images which are normalised for another one.

    Args:
        options: which model, and the size of its images.
        classes: number of classes that it must have.
        student: how the images come.
        device: where they are.

    Raises:
        ConfigError: it has other classes.
        FileNotFoundError, ValueError: there is no such model, or its weights cannot be had.
    """

    def __init__(
        self, options: DistillationConfig, classes: int, student: InputConfig, device: torch.device
    ) -> None:
        assert options.teacher is not None  # the configuration has seen to it
        loaded = load_weights(options.teacher, options.checkpoint)
        if loaded.config is not None:
            require_classifier(loaded.config, loaded.path)
        loaded = loaded.at(options.image_size, None)
        self.model = loaded.model.to(device).eval().requires_grad_(False)
        self.inputs, self.student = loaded.inputs, student
        with torch.no_grad():
            size = self.inputs.image_size
            answers = self.model(torch.zeros(1, 3, *size, device=device)).shape[-1]
        if answers != classes:
            raise ConfigError(
                f"distillation.teacher={options.teacher!r} is not allowed; it has {answers} "
                f"classes, and the data have {classes}"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits `(B, classes)` for images `(B, 3, H, W)` normalised for the student."""
        teacher, student = self.inputs, self.student
        if (teacher.mean, teacher.std) != (student.mean, student.std):
            values = (student.mean, student.std, teacher.mean, teacher.std)
            of, by, mean, std = (images.new_tensor(v)[:, None, None] for v in values)
            images = (images * by + of - mean) / std
        if images.shape[-2:] != teacher.image_size:
            images = F.interpolate(images, teacher.image_size, mode="bicubic", antialias=True)
        return self.model(images)


def distillation_loss(student: Tensor, teacher: Tensor, options: DistillationConfig) -> Tensor:
    """The loss of the student's logits `(B, classes)` against the teacher's, a scalar.

    "soft": the Kullback-Leibler divergence of the probabilities at a temperature T, times T**2,
    so that its gradients do not shrink with T (arXiv 1503.02531, section 2). "hard": cross-entropy
    with the teacher's most probable class.
    """
    student, teacher = student.float(), teacher.float()
    if options.kind == "hard":
        return F.cross_entropy(student, teacher.argmax(-1))
    temperature = options.temperature
    logs = [(logits / temperature).log_softmax(-1) for logits in (student, teacher)]
    return F.kl_div(*logs, reduction="batchmean", log_target=True) * temperature**2


class Distillation(Classification):
    """Classification with a teacher."""

    def __init__(self, config: TrainConfig, data: ImageData, device: torch.device) -> None:
        super().__init__(config, data, device)
        self.teacher = Teacher(config.distillation, len(data.classes), self.inputs, device)

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        options = self.config.distillation
        logits = model(images)
        half = torch.float16 if self.config.precision == "fp16" else torch.bfloat16
        mixed = self.config.precision != "no"
        with torch.autocast(images.device.type, half, enabled=mixed):
            answers = self.teacher(images)
        taught = distillation_loss(logits, answers, options)
        return (1 - options.weight) * self.criterion(logits, targets) + options.weight * taught
