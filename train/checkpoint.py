"""Checkpoints: what is in a run's folder, written so that a crash never harms what was there.

    RUN/config.yaml           the resolved configuration; `--config RUN/config.yaml` repeats the run
    RUN/metrics.jsonl         one record per epoch
    RUN/curves.png            the same as a picture
    RUN/tensorboard/          the same for TensorBoard
    RUN/report.html           all about the run on one page
    RUN/README.md             the model card
    RUN/train.log             what happened, with versions
    RUN/last.safetensors      weights for use, after the last epoch or at an interruption
    RUN/best.safetensors      weights for use, of the epoch that did best on the held-out images
    RUN/checkpoints/step-NNNNNNNN.training.pt
                              everything that going on exactly needs; the newest few are kept
    RUN/evaluations.jsonl     one record per `vitarium eval`

A `.safetensors` file is a plain state dict in the names of the model, so timm's `checkpoint_path`
and `vitarium.zoo.load_checkpoint` take it; its header holds the strings "model" (name in timm's
registry) and, as JSON, "model_kwargs", "classes", "input" (`InputConfig`), "config" (YAML),
"metrics" and, of a pruned model, "pruned" (`vitarium.zoo.pruned`). The weights are the moving
average where the run keeps one.

A `.training.pt` file is self-sufficient: it does not need the other files of its checkpoint, so
there is no moment at which a pair of files disagrees, and it is the same whether one process wrote
it or many. It is written last and checked as a whole before anything of it is used. It is read with
`weights_only=True`; neither kind of file can execute code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import vitarium.zoo  # noqa: F401  registers our models
from vitarium.train.config import TrainConfig, nearest
from vitarium.train.data import InputConfig
from vitarium.zoo.pruned import Pruned, apply_pruned
from vitarium.zoo.robust import ROBUST, make_robust

WEIGHTS = ".safetensors"
TRAINING = ".training.pt"
STATES = "checkpoints"  # the folder of states within a run's


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file and put it at `path` once it is safely on disk.

    Whatever happens, `path` holds the old content or the new one, whole.

    Raises:
        OSError: the file cannot be written (a full disk, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name, too, must survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """`write_atomic` for a text."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Description:
    """What a weights file says about its model: enough to build it and to feed it.

    Args:
        model: name in timm's registry.
        model_kwargs: arguments of `timm.create_model`.
        classes: names of the classes, in the order of the logits.
        input: size and normalisation of the input.
        config: configuration of the run.
        metrics: figures of the evaluation at saving, if there was one.
        pruned: layers that are narrower than in the model of that name.
    """

    model: str
    model_kwargs: dict[str, Any]
    classes: list[str]
    input: InputConfig
    config: TrainConfig
    metrics: dict[str, Any]
    pruned: Pruned = dataclasses.field(default_factory=dict)

    def to_header(self) -> dict[str, str]:
        """The description as strings, as the header of a safetensors file holds them."""
        header = {
            "format": "pt",
            "model": self.model,
            "model_kwargs": json.dumps(self.model_kwargs),
            "classes": json.dumps(self.classes),
            "input": json.dumps(dataclasses.asdict(self.input)),
            "config": self.config.to_yaml(),
            "metrics": json.dumps(self.metrics),
        }
        return header | ({"pruned": json.dumps(self.pruned)} if self.pruned else {})

    @classmethod
    def from_header(cls, header: Mapping[str, str], origin: Path) -> Description:
        """The description in a header.

        Raises:
            ValueError: an entry is missing or malformed.
        """
        try:
            values = json.loads(header["input"])
            return cls(
                model=header["model"],
                model_kwargs=json.loads(header["model_kwargs"]),
                classes=json.loads(header["classes"]),
                input=InputConfig(**{k: _tuple(v) for k, v in values.items()}),
                config=TrainConfig.from_yaml(header["config"], f"configuration in {origin}"),
                metrics=json.loads(header["metrics"]),
                pruned=json.loads(header.get("pruned", "{}")),
            )
        except KeyError as error:
            raise ValueError(
                f"checkpoint {origin} does not say what model it holds (no {error} in its header); "
                "it was not written by vitarium train"
            ) from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"checkpoint {origin} has a malformed header: {error}") from None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def copy(source: Path, target: Path) -> None:
    """Copy a file, atomically."""
    write_atomic(target, lambda temporary: shutil.copyfile(source, temporary))


def contiguous_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict as safetensors wants it: on the CPU, contiguous, nothing shared."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }


def save_weights(path: Path, model: nn.Module, description: Description) -> None:
    """Write the model's state dict and its description as a safetensors file, atomically."""
    tensors = contiguous_state_dict(model)
    header = description.to_header()
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def load_model(checkpoint: Path | str) -> tuple[nn.Module, Description]:
    """The model that a checkpoint holds, in evaluation mode on the CPU, and its description.

    Args:
        checkpoint: a `.safetensors` file, or a run's folder, which means its best checkpoint.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the file is damaged, or not one of ours, or does not fit the model it names.
    """
    path = find_checkpoint(checkpoint)
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from None
    description = Description.from_header(header, path)
    model = build_model(description.model, len(description.classes), description.model_kwargs)
    try:
        apply_pruned(model, description.pruned)
        model.load_state_dict(tensors)
    except (RuntimeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"checkpoint {path} does not fit its model: {reason}") from None
    return model.eval(), description


def pruned_of(checkpoint: Path | str) -> Pruned:
    """What is pruned in the model of a weights file; nothing, for any other kind of file.

    Raises:
        ValueError: the header is malformed.
    """
    path = Path(checkpoint)
    if path.suffix != WEIGHTS or not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("pruned", "{}"))
    except (SafetensorError, OSError):
        return {}  # whoever loads it says what is wrong
    except ValueError as error:
        raise ValueError(f"checkpoint {path} has a malformed header: {error}") from None


def find_checkpoint(checkpoint: Path | str) -> Path:
    """The weights file that `checkpoint` means: itself, or the best (else last) of a run's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(checkpoint)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    for name in ("best", "last"):
        if (path / f"{name}{WEIGHTS}").is_file():
            return path / f"{name}{WEIGHTS}"
    raise FileNotFoundError(f"folder {path} holds no checkpoint (best{WEIGHTS} or last{WEIGHTS})")


def build_model(
    name: str, num_classes: int, model_kwargs: Mapping[str, Any], pretrained: bool = False
) -> nn.Module:
    """A model of timm's registry, made more robust where `model_kwargs` asks for it.

    Beside the model's own arguments there are those of `vitarium.zoo.robust.make_robust`.

    Raises:
        ValueError: the name is not registered, or the model refuses an argument.
    """
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"model={name!r} is not registered{nearest(name, timm.list_models())}")
    robust = {key: model_kwargs[key] for key in ROBUST if key in model_kwargs}
    own = {key: value for key, value in model_kwargs.items() if key not in ROBUST}
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **own)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise ValueError(f"model {name!r} refuses model_kwargs={model_kwargs}: {error}") from None
    return make_robust(model, **robust) if robust else model


def save_training_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write everything that going on needs, atomically; tensors, numbers and containers only."""
    write_atomic(path, lambda temporary: torch.save(dict(state), temporary))


def load_training_state(path: Path) -> dict[str, Any]:
    """What `save_training_state` wrote, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: nothing to resume from")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have errors of their own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"training state {path} cannot be read: {reason}") from None
    if not isinstance(state, dict):
        raise ValueError(f"training state {path} holds no training state")
    return state


def state_path(folder: Path, step: int) -> Path:
    """Where the state of a run after `step` steps is saved."""
    return folder / STATES / f"step-{step:08}{TRAINING}"


def state_paths(folder: Path) -> list[Path]:
    """The states in a run's folder, the newest first."""
    found = {path: _step_of(path) for path in (folder / STATES).glob(f"*{TRAINING}")}
    return sorted((path for path in found if found[path] >= 0), key=found.get, reverse=True)  # type: ignore[arg-type]


def _step_of(path: Path) -> int:
    match = re.fullmatch(rf"step-(\d+){re.escape(TRAINING)}", path.name)
    return int(match[1]) if match else -1


def load_newest_state(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest state in a run's folder that is whole, and what is wrong with newer ones.

    Returns:
        The state, None if the run was stopped before the first one; and a message for every
        newer one that is damaged.

    Raises:
        ValueError: there are states, but all are damaged.
    """
    messages: list[str] = []
    for path in state_paths(folder):
        try:
            return load_training_state(path), messages
        except ValueError as error:
            messages.append(str(error))
    if messages:
        raise ValueError(f"{folder} holds no state that can be read: {'; '.join(messages)}")
    return None, messages


def keep_states(folder: Path, step: int, keep: int) -> None:
    """Remove states but the `keep` newest ones up to `step`; later ones are of a damaged past."""
    paths = state_paths(folder)
    kept = [path for path in paths if _step_of(path) <= step][:keep]
    for path in paths:
        if path not in kept:
            path.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Remove what `write_atomic` left behind in a run's folder when its process was killed."""
    for path in (*folder.glob(".*.tmp"), *(folder / STATES).glob(".*.tmp")):
        path.unlink(missing_ok=True)


def claim_folder(output: Path | str | None, default: str) -> Path:
    """A folder for a new run, which no other run has.

    Args:
        output: the folder; None takes `runs/<default>`, or the first free `runs/<default>-2`, ...
        default: name of the folder if `output` is None.

    Raises:
        FileExistsError: `output` holds a run already.
        OSError: the folder cannot be made.
    """
    if output is not None:
        folder = Path(output)
        if (folder / "config.yaml").exists() or state_paths(folder):
            raise FileExistsError(
                f"{folder} holds a run already; go on with --resume {folder}, "
                "or choose another --output"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".config.yaml.*.tmp"):  # of one killed while it claimed the folder
            path.unlink(missing_ok=True)
        return folder
    number = 1
    while True:
        folder = Path("runs") / (default if number == 1 else f"{default}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        number += 1
