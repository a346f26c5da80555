"""The training loop: evaluate, save, stop or step, in one place.

A run can be stopped between any two steps and goes on exactly: its state is the step number, the
weights and what the optimizer keeps. Data order and random numbers are functions of the seed and
the step (`vitarium.train.data`), so no generator's state has to be saved.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate.utils import gather_object
from rich.console import Console
from timm.utils import ModelEmaV3
from torch import Tensor

from vitarium.ops import auxiliary_losses
from vitarium.train import checkpoint as files
from vitarium.train import setup
from vitarium.train.config import TrainConfig
from vitarium.train.data import STEP, EpochBatches, batches, load_data, seed_all
from vitarium.train.evaluate import create_accelerator, score, torch_threads
from vitarium.train.images import BrokenDataError
from vitarium.train.interrupt import Interrupted, StopRequest, stop_on_signal
from vitarium.train.metrics import Evaluation
from vitarium.train.progress import Progress
from vitarium.train.run_page import RunFacts
from vitarium.train.tracking import Tracker, import_wandb

_LOG = logging.getLogger("vitarium.train")
# The message of these alone says what happened.
_EXPECTED = (Interrupted, KeyboardInterrupt, OSError, FloatingPointError, BrokenDataError)


@dataclass(frozen=True)
class RunResult:
    """What a finished run left.

    Args:
        folder: the run's folder; `vitarium.train.checkpoint` says what is in it.
        last: figures after the last epoch.
        best: figures of the best epoch.
        seconds: time spent, over all resumptions.
    """

    folder: Path
    last: dict[str, Any]
    best: dict[str, Any]
    seconds: float


def train(
    config: TrainConfig,
    *,
    output: Path | str | None = None,
    console: Console | None = None,
) -> RunResult:
    """Train a model and write the run to a folder of its own.

    Args:
        config: what to train, on what, and how.
        output: the run's folder; `runs/<data>-<model>` (or the next free number) if None.
        console: where progress is shown; None shows nothing.

    Raises:
        ValueError, FileNotFoundError: the model or the data cannot be used; nothing is written.
        FileExistsError: `output` holds a run already.
        Interrupted: SIGINT or SIGTERM; `resume(folder)` goes on.
        BrokenDataError: more images than `source.max_broken` allows cannot be read.
        FloatingPointError: the loss is not finite; checkpoints hold what was before.
    """
    run = _Run(config)
    run.folder = files.claim_folder(output, f"{config.data.partition(':')[0]}-{config.model}")
    files.write_text(run.folder / "config.yaml", config.to_yaml())
    return run.go(console)


def resume(folder: Path | str, *, console: Console | None = None) -> RunResult:
    """Go on with an interrupted run, as if nothing had happened.

    On the CPU the weights at the end are bit-equal to those of an uninterrupted run.

    Raises:
        FileNotFoundError: `folder` holds no run.
        ValueError: what it holds is damaged, or the data have changed.
        Interrupted, FloatingPointError: as `train`.
    """
    folder = Path(folder)
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run to resume (no config.yaml)")
    run = _Run(TrainConfig.from_yaml(path.read_text(encoding="utf-8"), str(path)))
    run.folder = folder
    if (folder / f"last{files.TRAINING}").exists():  # else it was stopped before the first one
        run.load(folder / f"last{files.TRAINING}")
    return run.go(console)


class _Run:
    """A model in training: everything between the configuration and the files."""

    folder: Path

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        if config.tracking == "wandb":
            import_wandb()  # before anything is written
        self.accelerator = create_accelerator(config.device, config.precision)
        self.data = load_data(config.data, config.source)
        seed_all(config.seed)
        classes = len(self.data.classes)
        kwargs = config.model_kwargs
        self.network = files.build_model(config.model, classes, kwargs, config.pretrained)
        self.inputs = setup.input_config(self.network, config)
        self.loader, self.held_out = setup.create_loaders(
            config, self.data, self.inputs, self.accelerator
        )
        self.order: EpochBatches = self.loader.batch_sampler  # type: ignore[assignment]
        self.steps_per_epoch = len(self.order)
        self.epochs = config.epochs + config.schedule.cooldown_epochs
        self.prepare = setup.create_batch_preparation(
            config, classes, self.inputs, self.accelerator.device
        )
        self.loss_function = setup.create_loss(config)
        self.network.to(self.accelerator.device)
        optimizer = setup.create_optimizer(self.network, config)
        self.scheduler = setup.create_scheduler(optimizer, config, self.steps_per_epoch)
        decay = config.ema_decay
        self.ema = ModelEmaV3(self.network, decay, use_warmup=True) if decay is not None else None
        self.model, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        self.step, self.evaluated_step = 0, 0
        self.loss_sum = 0.0  # over the steps of this epoch
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []

    # --- the loop --------------------------------------------------------------------------------

    def go(self, console: Console | None) -> RunResult:
        """Train from the present step to the last one."""
        self.history = self._read_history()
        handler = logging.FileHandler(self.folder / "train.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        _LOG.addHandler(handler)
        _LOG.setLevel(logging.INFO)
        self.started = time.monotonic() - self.seconds
        try:
            with (
                torch_threads(self.config.threads),
                Progress(console, self.epochs, self.steps_per_epoch) as progress,
                stop_on_signal() as request,
                self._tracker() as self.tracker,
            ):
                self._log_start()
                self.data.broken.record_in(
                    self.folder / "broken.jsonl", write=self.accelerator.is_main_process
                )
                self._loop(progress, request)
        except BaseException as error:
            _LOG.error("%s: %s", type(error).__name__, error, exc_info=not _expected(error))
            raise
        finally:
            _LOG.removeHandler(handler)
            handler.close()
        return RunResult(self.folder, self.history[-1], self._best(), self.seconds)

    def _loop(self, progress: Progress, request: StopRequest) -> None:
        def stop_if_asked() -> None:
            if request.signum is not None:
                self.save("last", {})
                raise Interrupted(request.signum, self.folder, self.step)

        while True:
            if self.step % self.steps_per_epoch == 0 and self.step > self.evaluated_step:
                network = self.ema.module if self.ema is not None else self.network
                evaluation = score(
                    network, self.held_out, self.inputs, self.accelerator, stop_if_asked
                )
                self.data.broken.share(gather_object)
                self._record(evaluation, progress)
            if self.step == self.epochs * self.steps_per_epoch:
                return
            self.order.epoch, self.order.first = divmod(self.step, self.steps_per_epoch)
            self.model.train()
            for images, targets in batches(self.loader, self.accelerator.device):
                stop_if_asked()
                loss = self._train_step(images, targets)
                progress.step(self.step, loss)

    def _train_step(self, images: Tensor, targets: Tensor) -> float:
        seed_all(self.config.seed, STEP, self.step, self.accelerator.process_index)
        images, targets = self.prepare(images, targets)
        loss = self.loss_function(self.model(images), targets)
        auxiliary = auxiliary_losses(self.network)
        if auxiliary:
            loss = loss + self.config.auxiliary_loss * torch.stack(auxiliary).mean()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {self.step} (epoch {self._epoch()}); a lower "
                "optimizer.lr, optimizer.clip_grad or precision 'no' may help"
            )
        self.accelerator.backward(loss)
        if self.config.optimizer.clip_grad is not None:
            self.accelerator.clip_grad_norm_(
                self.model.parameters(), self.config.optimizer.clip_grad
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.scheduler.step_update(self.step)
        if self.ema is not None:
            self.ema.update(self.network, step=self.step)
        self.loss_sum += value
        return value

    # --- records ---------------------------------------------------------------------------------

    def _tracker(self) -> Tracker:
        facts = RunFacts(
            folder=self.folder,
            config=self.config,
            data=self.data,
            inputs=self.inputs,
            parameters=sum(p.numel() for p in self.network.parameters()),
            device=self.accelerator.device.type,
            processes=self.accelerator.num_processes,
        )
        return Tracker(facts, self.history, enabled=self.accelerator.is_main_process)

    def _epoch(self) -> int:
        """Number of the epoch that the next step belongs to, from 1."""
        return self.step // self.steps_per_epoch + 1

    def _record(self, evaluation: Evaluation, progress: Progress) -> None:
        """Write down the end of an epoch: metrics, log, checkpoints."""
        self.seconds = time.monotonic() - self.started
        record = {
            "epoch": self.step // self.steps_per_epoch,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": self.loss_sum / self.steps_per_epoch,
            **evaluation.to_record(),
            "seconds": round(self.seconds, 3),
        }
        self.loss_sum = 0.0
        self.evaluated_step = self.step
        self.history.append(record)
        progress.epoch(record)
        if not self.accelerator.is_main_process:
            return
        _LOG.info(json.dumps(record))
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.save("last", record)
        if self._best() is record:
            self.save("best", record)
        self.tracker.epoch(record, evaluation)

    def _best(self) -> dict[str, Any]:
        return max(self.history, key=lambda record: (record["correct"], -record["loss"]))

    def _read_history(self) -> list[dict[str, Any]]:
        """The records up to the present step; later ones, of steps to be repeated, are dropped."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= self.evaluated_step]
        files.write_text(path, "".join(f"{line}\n" for line in kept))
        return [json.loads(line) for line in kept]

    def _log_start(self) -> None:
        _LOG.info(
            "%s with Python %s, torch %s, timm %s on %s (%d process(es)), %d threads",
            "resuming" if self.step else "starting",
            platform.python_version(),
            torch.__version__,
            timm.__version__,
            self.accelerator.device,
            self.accelerator.num_processes,
            torch.get_num_threads(),
        )
        _LOG.info(
            "%s: %d training and %d held-out images in %d classes; %s: %d parameters; "
            "%d epochs of %d steps, from step %d",
            self.config.data,
            len(self.data.train.targets),
            len(self.data.held_out.targets),
            len(self.data.classes),
            self.config.model,
            sum(p.numel() for p in self.network.parameters()),
            self.epochs,
            self.steps_per_epoch,
            self.step,
        )

    # --- checkpoints -----------------------------------------------------------------------------

    def save(self, name: str, metrics: dict[str, Any]) -> None:
        """Write the checkpoint `name`: weights for use, and the state to go on from."""
        self.seconds = time.monotonic() - self.started
        if not self.accelerator.is_main_process:
            return
        network = self.ema.module if self.ema is not None else self.network
        config = self.config
        description = files.Description(
            config.model,
            config.model_kwargs,
            self.data.classes,
            self.inputs,
            config,
            metrics,
        )
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
            "data": self._data_identity(),
            "model": self.network.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        files.save_training_state(self.folder / f"{name}{files.TRAINING}", state)
        files.save_weights(self.folder / f"{name}{files.WEIGHTS}", network, description)

    def load(self, path: Path) -> None:
        """Take over the state that `save` wrote."""
        state = files.load_training_state(path)
        try:
            if state["data"] != self._data_identity():
                raise ValueError(
                    f"the run was trained on {state['data']}, but {self.config.data} now has "
                    f"{self._data_identity()}"
                )
            self.network.load_state_dict(state["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            for name in ("step", "evaluated_step", "loss_sum", "seconds"):
                setattr(self, name, state[name])
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"training state {path} does not fit the run: {reason}") from None
        self.scheduler.step_update(self.step)

    def _data_identity(self) -> dict[str, Any]:
        return {"train_images": len(self.data.train.targets), "classes": self.data.classes}


def _expected(error: BaseException) -> bool:
    """Whether the message alone says what happened; of anything else the log keeps the trace."""
    return isinstance(error, _EXPECTED)
