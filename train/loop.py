"""The training loop: evaluate, save, stop or step, in one place.

A run can be stopped at any instant and goes on exactly: its state is the step number, the weights
and what the optimizer keeps. Data order and random numbers are functions of the seed and the step
(`vitarium.train.data`), so no generator's state has to be saved, and what was done after the last
saving is done again, the same.

With several processes, each does every step with its part of the batch. They stop and save in the
same step (`vitarium.train.watch`), and the main one alone writes.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import platform
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate.utils import gather_object
from rich.console import Console
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vitarium.ops import auxiliary_parts
from vitarium.train import checkpoint as files
from vitarium.train import distribution, setup
from vitarium.train.bad_batch import BadBatch, save_bad_batch
from vitarium.train.config import TrainConfig
from vitarium.train.data import STEP, EpochBatches, batches, ending_workers, load_data, seed_all
from vitarium.train.evaluate import create_accelerator, precision_here, torch_threads
from vitarium.train.images import BrokenDataError
from vitarium.train.interrupt import Interrupted, StopRequest, stop_on_signal
from vitarium.train.meter import Meter
from vitarium.train.metrics import Evaluation
from vitarium.train.progress import Progress
from vitarium.train.run_page import RunFacts
from vitarium.train.task import create_task
from vitarium.train.tracking import Tracker, import_wandb
from vitarium.train.watch import Noted, StepWatch
from vitarium.zoo.pruned import pruned_layers

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
        FloatingPointError: the loss is not finite; checkpoints hold what was before, and
            `vitarium.train.bad_batch` reads the batch.
    """
    run = _Run(config)

    def claim() -> Path:
        name = f"{config.data.partition(':')[0]}-{config.model}"
        folder = files.claim_folder(output, name)
        files.write_text(folder / "config.yaml", run.config.to_yaml())
        return folder

    run.folder = distribution.on_main(run.accelerator, claim)
    return run.go(console)


def resume(folder: Path | str, *, console: Console | None = None) -> RunResult:
    """Go on with an interrupted run, as if nothing had happened.

    On the CPU, and with as many processes as before, the weights at the end are bit-equal to those
    of an uninterrupted run. With another number of processes the batch of all of them together
    stays as it was. Where the newest saved state is damaged, the one before it is taken, and the
    log and the console say so.

    Raises:
        FileNotFoundError: `folder` holds no run.
        ValueError: what it holds is damaged, or the data have changed, or the batch cannot be
            shared among so many processes.
        Interrupted, FloatingPointError, BrokenDataError: as `train`.
    """
    folder = Path(folder)
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run to resume (no config.yaml)")
    config = TrainConfig.from_yaml(path.read_text(encoding="utf-8"), str(path))
    state, damaged = files.load_newest_state(folder)
    run = _Run(config, state)
    run.folder = folder
    run.warnings += [f"{message}; going on from the state before it" for message in damaged]
    if state is not None:  # else it was stopped before the first one
        run.load(state)
    distribution.on_main(run.accelerator, lambda: files.remove_temporary(folder))
    return run.go(console)


class _Run:
    """A model in training: everything between the configuration and the files."""

    folder: Path

    def __init__(self, config: TrainConfig, state: dict[str, Any] | None = None) -> None:
        if config.tracking == "wandb":
            import_wandb()  # before anything is written
        self.warnings: list[str] = []
        precision = precision_here(config.device, config.precision)
        if precision != config.precision:
            self.warnings.append("precision fp16 needs a GPU; on this CPU it is float32")
            config = replace(config, precision=precision)
        self.accelerator = create_accelerator(config.device, precision)
        self.sharded = config.distributed == "fsdp2" and self.accelerator.num_processes > 1
        if state is not None:
            config = setup.share_batch(config, state, self.accelerator.num_processes)
        self.config = config
        self.data = load_data(config.data, config.source)
        seed_all(config.seed)
        self.task = create_task(config, self.data, self.accelerator.device)
        self.network, self.inputs = self.task.network, self.task.inputs
        self.parameters = sum(p.numel() for p in self.network.parameters())
        self.loader, self.held_out = setup.create_loaders(
            config, self.data, self.inputs, self.accelerator
        )
        self.order: EpochBatches = self.loader.batch_sampler  # type: ignore[assignment]
        self.accumulate = config.accumulate_steps
        self.steps_per_epoch = setup.steps_per_epoch(config, len(self.order))
        self.epochs = config.epochs + config.schedule.cooldown_epochs
        module = self.task.module.to(self.accelerator.device)
        decay = config.ema_decay
        self.ema = ModelEmaV3(module, decay, use_warmup=True) if decay is not None else None
        # Evaluation takes no turns with other processes, so sharded weights are gathered for it.
        self.gathered = copy.deepcopy(module) if self.sharded else None
        if self.sharded:
            for part in (module, *([self.ema.module] if self.ema is not None else [])):
                distribution.shard(part, self.accelerator)
        optimizer = setup.create_optimizer(module, config)
        self.scheduler = setup.create_scheduler(optimizer, config, self.steps_per_epoch)
        if config.compile:
            module.compile()  # in place: the names of the state dict stay as they are
        self.model = module if self.sharded else self.accelerator.prepare(module)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.auxiliary_parts: list[nn.Module] | None = None  # known after the first forward
        self.step, self.evaluated_step = 0, 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.request = StopRequest()
        self.watch = StepWatch(self.accelerator.num_processes, self._refuse)
        self.meter = Meter(self.accelerator.device, self.accelerator.num_processes)
        self.started = self.saved = time.monotonic()

    # --- the loop --------------------------------------------------------------------------------

    def go(self, console: Console | None) -> RunResult:
        """Train from the present step to the last one."""
        main = self.accelerator.is_main_process
        if main:
            lines = "".join(json.dumps(record) + "\n" for record in self.history)
            if lines or (self.folder / "metrics.jsonl").exists():  # of steps that are done again
                files.write_text(self.folder / "metrics.jsonl", lines)
        handler = logging.FileHandler(self.folder / "train.log", encoding="utf-8")
        process = "" if main else f" process {self.accelerator.process_index}"
        handler.setFormatter(logging.Formatter(f"%(asctime)s{process} %(levelname)s %(message)s"))
        handler.setLevel(logging.INFO if main else logging.ERROR)
        _LOG.addHandler(handler)
        _LOG.setLevel(logging.INFO)
        console = console if main else None
        for warning in self.warnings:
            _LOG.warning(warning)
            if console is not None:
                console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
        self.started = time.monotonic() - self.seconds
        try:
            with (
                torch_threads(self.config.threads),
                Progress(console, self.epochs, self.steps_per_epoch) as progress,
                stop_on_signal() as self.request,
                self._tracker() as self.tracker,
                ending_workers(self.loader, self.held_out),
            ):
                self._log_start()
                self.data.broken.record_in(
                    self.folder / "broken.jsonl", write=self.accelerator.is_main_process
                )
                self._loop(progress)
        except BaseException as error:
            _LOG.error("%s: %s", type(error).__name__, error, exc_info=not _expected(error))
            raise
        finally:
            _LOG.removeHandler(handler)
            handler.close()
        return RunResult(self.folder, self.history[-1], self._best(), self.seconds)

    def _loop(self, progress: Progress) -> None:
        alone = self.accelerator.num_processes == 1

        def stop_if_asked() -> None:
            if alone and self.request.signum is not None:  # else after the next step, together
                self._stop()

        while True:
            if self.step % self.steps_per_epoch == 0 and self.step > self.evaluated_step:
                stop_if_asked()
                evaluation = self.task.evaluate(
                    self._averaged(), self.held_out, self.accelerator, stop_if_asked
                )
                self.data.broken.share(gather_object)
                self._record(evaluation, progress)
            if self.step == self.epochs * self.steps_per_epoch:
                return
            self.order.epoch, within = divmod(self.step, self.steps_per_epoch)
            self.order.first = within * self.accumulate
            self.model.train()
            self.task.start_epoch(self.order.epoch)
            parts: list[tuple[Tensor, Tensor]] = []
            loaded = batches(self.loader, self.accelerator.device)
            for part in self.meter.timed(loaded):
                stop_if_asked()
                parts.append(part)
                if len(parts) < self.accumulate:
                    continue
                self._train_step(*(part if self.accumulate == 1 else map(torch.cat, zip(*parts))))
                parts = []
                progress.step(self.step, self.watch.loss)
                if self.watch.stop:
                    self._stop()
                if self.watch.save:
                    self.save_state()
            self.watch.flush()

    def _train_step(self, images: Tensor, targets: Tensor) -> None:
        """One step of the optimizer, with one forward and backward pass for every part."""
        loss: Tensor | float = 0.0
        self.task.progress = self.step / (self.epochs * self.steps_per_epoch)
        parts = zip(images.chunk(self.accumulate), targets.chunk(self.accumulate))
        for number, part in enumerate(parts, self.step * self.accumulate):
            seed_all(self.config.seed, STEP, number, self.accelerator.process_index)
            last = (number + 1) % self.accumulate == 0
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = loss + self._add_gradients(*part)
        stop = self.request.signum is not None and self.accelerator.num_processes > 1
        self.watch.note(self.step, loss, images, targets, stop, self._saving_is_due())
        if self.config.optimizer.clip_grad is not None:
            self.accelerator.clip_grad_norm_(
                self.model.parameters(), self.config.optimizer.clip_grad
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        setup.set_learning_rate(self.scheduler, self.step, self.steps_per_epoch)
        if self.ema is not None:
            self.ema.update(self.task.module, step=self.step)

    def _saving_is_due(self) -> bool:
        """Whether the state is saved after the step that is being made."""
        when = self.config.checkpoint
        if when.every_steps is not None and (self.step + 1) % when.every_steps == 0:
            return True
        if when.every_minutes is None or not self.accelerator.is_main_process:
            return False
        return time.monotonic() - self.saved > 60 * when.every_minutes

    def _stop(self) -> None:
        """Save, and leave."""
        self.watch.flush()
        self.save_weights({})
        self.save_state()
        raise Interrupted(self.request.signum or signal.SIGTERM, self.folder, self.step)

    def _refuse(self, noted: Noted, loss: float) -> None:
        """Stop at a loss that is not finite; the process that has it keeps the batch."""
        epoch = noted.step // self.steps_per_epoch + 1
        message = f"the loss is {loss} at step {noted.step} (epoch {epoch})"
        if math.isfinite(loss):
            raise FloatingPointError(f"the loss of another process is not finite; here, {message}")
        process, seed = self.accelerator.process_index, self.config.seed
        batch = BadBatch(noted.images, noted.targets, noted.step, process, seed, loss)
        try:
            where = f"its batch is kept in {save_bad_batch(self.folder, batch)}"
        except OSError as error:
            where = f"its batch could not be kept ({error})"
        raise FloatingPointError(
            f"{message}; a lower optimizer.lr, optimizer.clip_grad or precision 'no' may help; "
            f"{where}"
        )

    def _add_gradients(self, images: Tensor, targets: Tensor) -> Tensor:
        """Add those of one part of a step's images; its share of the mean loss."""
        with self.accelerator.autocast():
            loss = self.task.loss(self.model, *self.task.prepare(images, targets))
            if self.auxiliary_parts is None:  # looked for once: a walk costs as much as a layer
                self.auxiliary_parts = auxiliary_parts(self.task.module)
            found = (part.auxiliary_loss for part in self.auxiliary_parts)
            auxiliary = [value for value in found if value is not None]
            if auxiliary:
                loss = loss + self.config.auxiliary_loss * torch.stack(auxiliary).mean()
        loss = loss / self.accumulate
        self.accelerator.backward(loss)
        return loss.detach()

    # --- records ---------------------------------------------------------------------------------

    def _tracker(self) -> Tracker:
        facts = RunFacts(
            folder=self.folder,
            config=self.config,
            data=self.data,
            inputs=self.inputs,
            parameters=self.parameters,
            device=self.accelerator.device.type,
            processes=self.accelerator.num_processes,
        )
        return Tracker(facts, self.history, enabled=self.accelerator.is_main_process)

    def _averaged(self) -> nn.Module:
        """What is evaluated and saved for use: the moving average where the run keeps one."""
        module = self.ema.module if self.ema is not None else self.task.module
        if self.gathered is None:
            return module
        self.gathered.load_state_dict(distribution.whole(module.state_dict()))
        return self.gathered

    def _record(self, evaluation: Evaluation, progress: Progress) -> None:
        """Write down the end of an epoch: metrics, log, checkpoints."""
        self.seconds = time.monotonic() - self.started
        record = {
            "epoch": self.step // self.steps_per_epoch,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": self.watch.loss_sum / self.steps_per_epoch,
            **evaluation.to_record(),
            **self.meter.epoch(),
            "seconds": round(self.seconds, 3),
        }
        self.watch.loss_sum = 0.0
        self.evaluated_step = self.step
        self.history.append(record)
        progress.epoch(record)
        self.save_weights(record)
        if self.accelerator.is_main_process:
            if self._best() is record:
                files.copy(*(self.folder / f"{name}{files.WEIGHTS}" for name in ("last", "best")))
            _LOG.info(json.dumps(record))
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        self.save_state()  # the last: until it is there, all of this is done again
        self.tracker.epoch(record, evaluation if self.task.of_classes else None)

    def _best(self) -> dict[str, Any]:
        return max(self.history, key=self.task.rank)

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
            self.parameters,
            self.epochs,
            self.steps_per_epoch,
            self.step,
        )

    # --- checkpoints -----------------------------------------------------------------------------

    def save_weights(self, metrics: dict[str, Any]) -> None:
        """Write the weights for use as the last ones; called in every process."""
        network = self.task.network_of(self._averaged())
        if not self.accelerator.is_main_process:
            return
        config = self.config
        description = files.Description(
            config.model,
            config.model_kwargs,
            self.data.classes,
            self.inputs,
            config,
            metrics,
            pruned_layers(network),
        )
        files.save_weights(self.folder / f"last{files.WEIGHTS}", network, description)

    def save_state(self) -> None:
        """Write the state to go on from; called in every process."""
        self.watch.flush()
        self.saved = time.monotonic()
        self.seconds = self.saved - self.started
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "loss_sum": self.watch.loss_sum,
            "seconds": self.seconds,
            "history": self.history,
            "total_batch": self.config.batch_size * self.accelerator.num_processes,
            "data": self._data_identity(),
            "model": distribution.whole(self.task.module.state_dict()),
            "ema": distribution.whole(self.ema.module.state_dict()) if self.ema else None,
            "optimizer": distribution.whole(self.optimizer.state_dict()),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        if self.accelerator.is_main_process:
            path = files.state_path(self.folder, self.step)
            path.parent.mkdir(exist_ok=True)
            files.save_training_state(path, state)
            files.keep_states(self.folder, self.step, self.config.checkpoint.keep)

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `save_state` wrote.

        Raises:
            ValueError: it is of another model or of other data.
        """
        try:
            if state["data"] != self._data_identity():
                raise ValueError(
                    f"the run was trained on {state['data']}, but {self.config.data} now has "
                    f"{self._data_identity()}"
                )
            distribution.load_module(self.task.module, state["model"])
            if self.ema is not None:
                distribution.load_module(self.ema.module, state["ema"])
            distribution.load_optimizer(self.optimizer, state["optimizer"])
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            for name in ("step", "evaluated_step", "seconds", "history"):
                setattr(self, name, state[name])
            self.watch.loss_sum = state["loss_sum"]
        except (KeyError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the saved state does not fit the run: {reason}") from None
        setup.set_learning_rate(self.scheduler, self.step, self.steps_per_epoch)

    def _data_identity(self) -> dict[str, Any]:
        return {"train_images": len(self.data.train.targets), "classes": self.data.classes}


def _expected(error: BaseException) -> bool:
    """Whether the message alone says what happened; of anything else the log keeps the trace."""
    return isinstance(error, _EXPECTED)
