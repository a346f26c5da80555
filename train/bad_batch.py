"""A batch whose loss was not finite, kept to be looked at.

    RUN/nonfinite-step-NNNNNNNN-process-P.safetensors   images and targets as they were loaded
    RUN/nonfinite-step-NNNNNNNN-process-P.png           the images, in the order of the targets

The header of the first holds, as strings, "step", "process", "seed" (of the run) and "loss".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.utils import save_image

from vitarium.train.checkpoint import WEIGHTS, write_atomic


@dataclass(frozen=True)
class BadBatch:
    """A batch and where in the run it was.

    Args:
        images: `(B, 3, H, W)` of uint8, as loaded: before normalisation, erasing and Mixup.
        targets: `(B,)`, as loaded.
        step: number of the step, from 0.
        process: number of the process.
        seed: of the run; `seed_all(seed, STEP, step, process)` sets the generators as they were.
        loss: of the batch.
    """

    images: Tensor
    targets: Tensor
    step: int
    process: int
    seed: int
    loss: float


def save_bad_batch(folder: Path, batch: BadBatch) -> Path:
    """Write the batch and its picture; returns the path of the former."""
    path = folder / f"nonfinite-step-{batch.step:08}-process-{batch.process}{WEIGHTS}"
    tensors = {"images": batch.images.cpu().contiguous(), "targets": batch.targets.cpu()}
    header = {name: str(getattr(batch, name)) for name in ("step", "process", "seed", "loss")}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=header))
    columns = max(1, round(len(batch.images) ** 0.5))
    save_image(tensors["images"].float() / 255, path.with_suffix(".png"), nrow=columns)
    return path


def load_bad_batch(path: Path | str) -> BadBatch:
    """The batch that a run left when its loss was not finite.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no such batch.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            return BadBatch(
                images=file.get_tensor("images"),
                targets=file.get_tensor("targets"),
                step=int(header["step"]),
                process=int(header["process"]),
                seed=int(header["seed"]),
                loss=float(header["loss"]),
            )
    except FileNotFoundError:
        raise FileNotFoundError(f"batch {path} does not exist") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no batch of a run that stopped: {error}") from None
