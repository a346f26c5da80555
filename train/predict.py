"""Labels and probabilities of image files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitarium.train.checkpoint import load_model
from vitarium.train.data import read_image
from vitarium.train.evaluate import create_accelerator, precision_here
from vitarium.train.task import require_classifier


@dataclass(frozen=True)
class Prediction:
    """What a model takes an image for.

    Args:
        path: the image.
        labels: names of the most probable classes, most probable first.
        probabilities: their probabilities.
    """

    path: Path
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


@torch.no_grad()
def predict(
    checkpoint: Path | str,
    images: Sequence[Path | str],
    *,
    top: int = 3,
    device: str = "auto",
    batch_size: int = 64,
) -> list[Prediction]:
    """Classify image files.

    Args:
        checkpoint: a `.safetensors` file that training wrote, or a run's folder (its best one).
        images: paths of image files.
        top: how many labels to give per image.
        device: "auto" or "cpu".
        batch_size: images per batch.

    Raises:
        FileNotFoundError: the checkpoint or an image does not exist.
        ValueError: the checkpoint is damaged, or no classifier was trained, or a file holds no
            image.
    """
    model, description = load_model(checkpoint)
    require_classifier(description.config, checkpoint)
    precision = precision_here(device, description.config.precision)
    accelerator = create_accelerator(device, precision)
    model.to(accelerator.device)
    inputs, transform = description.input, description.input.transform()
    paths = [Path(image) for image in images]
    predictions = []
    for start in range(0, len(paths), batch_size):
        chunk = paths[start : start + batch_size]
        batch = torch.stack([torch.as_tensor(transform(read_image(path))) for path in chunk])
        with accelerator.autocast():
            logits: Tensor = model(inputs.normalize(batch.to(accelerator.device)))
        probabilities, classes = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
        for path, values, indices in zip(chunk, probabilities.tolist(), classes.tolist()):
            labels = tuple(description.classes[index] for index in indices)
            predictions.append(Prediction(path, labels, tuple(values)))
    return predictions
