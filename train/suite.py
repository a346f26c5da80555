"""Evaluation of a model on one data set or several, at one size or several."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from vitarium.train import imagenet
from vitarium.train.config import SourceConfig, nearest
from vitarium.train.data import InputConfig, Split, ending_workers, load_data
from vitarium.train.evaluate import (
    create_accelerator,
    numbered_loader,
    precision_here,
    score,
    torch_threads,
)
from vitarium.train.imagenet import CorruptionErrors, TestSet
from vitarium.train.images import BrokenImages
from vitarium.train.metrics import Evaluation, Predictions
from vitarium.train.sources import SCHEME_FORMS, SCHEMES, VAL_NAMES, Splits, find_splits
from vitarium.train.task import require_classifier
from vitarium.train.weights import LoadedModel, load_weights
from vitarium.zoo import Published, published

TOLERANCE = 0.1  # points of top-1 accuracy that a figure may differ from the published one


@dataclass(frozen=True)
class Result:
    """A model's figures on one data set at one size.

    Attributes:
        model: its name, with a tag if one was given.
        checkpoint: the file of its weights; None if they were downloaded or drawn.
        data: the source of the images, as it was given.
        name: of the data set, such as "imagenet-a".
        inputs: size, normalisation and crop of the images.
        precision, device: as in `TrainConfig`; the device's type.
        processes: that shared the work.
        evaluation: the figures.
        classes: names of the classes between which the model chose.
        images: the images, or the paths of their files, in the order of the data set.
        whole: whether the data set has all the images that it is published with; None if unknown.
        published: what is published of the model.
        corruptions: errors by corruption, of ImageNet-C.
    """

    model: str
    checkpoint: Path | None
    data: str
    name: str
    inputs: InputConfig
    precision: str
    device: str
    processes: int
    evaluation: Evaluation
    classes: list[str]
    images: Sequence[Any]
    whole: bool | None
    published: Published | None
    corruptions: CorruptionErrors | None = None

    @property
    def published_top1(self) -> float | None:
        """Published top-1 accuracy in percent, where this is ImageNet-1k's validation set."""
        if self.name != "imagenet" or self.published is None:
            return None
        return self.published.top1

    @property
    def difference(self) -> float | None:
        """Top-1 accuracy over the published one in points; None where none is published."""
        if self.published_top1 is None:
            return None
        return 100 * self.evaluation.accuracy - self.published_top1

    @property
    def comparable(self) -> bool:
        """Whether this and the published accuracy are of the same images at the same size."""
        size = self.published.resolution if self.published is not None else None
        return self.whole is True and self.inputs.image_size == (size, size)

    @property
    def differs(self) -> bool:
        """Whether a comparable figure is more than 0.1 points off the published one."""
        gap = self.difference
        return self.comparable and gap is not None and abs(gap) > TOLERANCE + 1e-9

    def to_record(self) -> dict[str, Any]:
        """Everything but the single images, as it is written to files."""
        record = {
            "model": self.model,
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "data": self.data,
            "set": self.name,
            "image_size": list(self.inputs.image_size),
            "crop_pct": self.inputs.crop_pct,
            "interpolation": self.inputs.interpolation,
            "precision": self.precision,
            "device": self.device,
            "processes": self.processes,
            **self.evaluation.to_record(),
            "images_per_second": self.evaluation.images_per_second,
            "published_top1": self.published_top1,
            "difference": self.difference,
            "comparable": self.comparable,
            "differs": self.differs,
        }
        if self.corruptions is not None:
            record["mean_corruption_error"] = self.corruptions.mean_corruption_error
            record["corruption_errors"] = {
                name: self.corruptions.mean(name) for name in self.corruptions.corruptions
            }
        return record


def evaluate(
    model: Path | str,
    *,
    data: str | None = None,
    checkpoint: Path | str | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    real_labels: Path | str | None = None,
) -> Evaluation:
    """Evaluate a model on one data set, by default the images held out in its own training run.

    Args:
        model, checkpoint: as of `vitarium.train.weights.load_weights`.
        data, image_size, crop_pct, batch_size, workers, device, precision, real_labels: as of
            `evaluate_suite`.

    Raises:
        FileNotFoundError, ValueError: as `load_weights` and `evaluate_suite`.
    """
    loaded = load_weights(model, checkpoint)
    (result,) = evaluate_suite(
        loaded,
        None if data is None else [data],
        image_sizes=[image_size],
        crop_pct=crop_pct,
        batch_size=batch_size,
        workers=workers,
        device=device,
        precision=precision,
        real_labels=real_labels,
    )
    return result.evaluation


def evaluate_suite(
    loaded: LoadedModel,
    data: Sequence[str] | None = None,
    *,
    image_sizes: Sequence[int | None] = (None,),
    crop_pct: float | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    real_labels: Path | str | None = None,
) -> Iterator[Result]:
    """Evaluate a model on data sets, at every size on each; results come as they are found.

    With several processes each image is counted once.

    Args:
        loaded: the model.
        data: sources, one of `vitarium.train.imagenet` or as in `TrainConfig`; the run's own if
            None. Of a run, the images that it would hold out; of any other model, the whole folder
            (its `val/` if it has one).
        image_sizes: sides of the square images; None is the model's own.
        crop_pct: part of the image's shorter side that is seen; the model's own if None.
        batch_size, workers, device, precision: as in `TrainConfig`; those of the run if None.
        real_labels: the JSON of ImageNet-Real; timm's copy if None.

    Raises:
        FileNotFoundError: the data are missing.
        ValueError: there are no data, or the classes are none of the model's, or it refuses a size,
            or its classifier was not trained.
    """
    run = loaded.config
    if run is not None:
        require_classifier(run, loaded.path)
    if data is None:
        if run is None:
            raise ValueError(
                f"model {loaded.name} is of no run that held images out: give data, such as "
                "imagenet:PATH or folder:PATH"
            )
        data = [run.data]
    for source in data:
        _check_scheme(source)
    device = device or (run.device if run is not None else "auto")
    if precision is None:
        precision = precision_here(device, run.precision) if run is not None else "no"
    accelerator = create_accelerator(device, precision)
    options = {
        "batch_size": batch_size or (run.batch_size if run is not None else 128),
        "workers": workers if workers is not None else (run.workers if run is not None else 4),
    }
    with torch_threads(run.threads if run is not None else None):
        for size in image_sizes:
            sized = loaded.at(size, crop_pct)
            network = sized.model.to(accelerator.device)
            for source in data:
                parts = [
                    _evaluate_set(sized, network, test_set, accelerator, **options)
                    for test_set in _test_sets(source, loaded, real_labels)
                ]
                yield _joined(source, sized, parts, accelerator)
            loaded.model.cpu()


def _check_scheme(source: str) -> None:
    scheme = source.partition(":")[0]
    known = [*imagenet.NAMES, *SCHEMES]
    if scheme not in known:
        forms = [*(f"{name}:PATH" for name in imagenet.NAMES), *SCHEME_FORMS]
        raise ValueError(
            f"data={source!r} has the unknown scheme {scheme!r}{nearest(scheme, known)}; allowed "
            f"are {', '.join(forms)}"
        )


def _test_sets(
    source: str, loaded: LoadedModel, real_labels: Path | str | None
) -> Iterator[TestSet]:
    scheme = source.partition(":")[0]
    if imagenet.is_imagenet(source):
        yield from imagenet.load_test_sets(source, real_labels)
    elif loaded.config is None:
        yield _whole(source, find_splits(source, SourceConfig()))
    else:
        run = loaded.config
        images = load_data(source, run.source if source == run.data else None)
        yield TestSet(scheme, images.held_out, images.classes, broken=images.broken)


def _whole(source: str, splits: Splits) -> TestSet:
    """All images of a source: a model that was not trained on it needs none held out."""
    name = next((name for name in VAL_NAMES if name in splits), None)
    if name is None and len(splits) > 1:
        raise ValueError(
            f"data={source!r} has the splits {', '.join(splits)}, but none that is called "
            f"{', '.join(VAL_NAMES)}"
        )
    images, labels, classes, *_ = splits[next(iter(splits)) if name is None else name]()
    if len(images) == 0:
        raise FileNotFoundError(f"{source} holds no image")
    return TestSet(source.partition(":")[0], Split(images, labels.tolist()), classes)


@dataclass(frozen=True)
class _Part:
    """The answers on one test set, and between which classes they were chosen."""

    test_set: TestSet
    evaluation: Evaluation
    classes: list[str]


def _evaluate_set(
    loaded: LoadedModel,
    network: nn.Module,
    test_set: TestSet,
    accelerator: Accelerator,
    batch_size: int,
    workers: int,
) -> _Part:
    split, classes, columns = _matched(loaded, test_set)
    broken = test_set.broken
    if broken is None:
        broken = BrokenImages(len(split.targets), SourceConfig().max_broken)
    loader = numbered_loader(split, broken, loaded.inputs, batch_size, workers, accelerator)
    with ending_workers(loader):
        evaluation = score(network, loader, loaded.inputs, accelerator, columns=columns)
    if test_set.labels is not None:
        predictions = evaluation.predictions.with_labels(test_set.labels)
        evaluation = dataclasses.replace(evaluation, predictions=predictions)
    return _Part(test_set, evaluation, classes)


def _matched(loaded: LoadedModel, test_set: TestSet) -> tuple[Split, list[str], list[int] | None]:
    """The images with their classes as the model numbers them; the classes; the logits to keep."""
    known = _class_names(loaded, test_set.classes)
    if known == test_set.classes:
        return test_set.split, known, None
    place = {name: i for i, name in enumerate(known)}
    missing = [name for name in test_set.classes if name not in place]
    if missing:
        others = f" and {len(known) - 10} more" if len(known) > 10 else ""
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{test_set.name} has the classes {', '.join(missing[:3])}{more}, which are none of "
            f"those of {loaded.path or loaded.name}: {', '.join(known[:10])}{others}"
            f"{nearest(missing[0], known)}"
        )
    columns = [place[name] for name in test_set.classes]
    if test_set.restrict:
        return test_set.split, test_set.classes, columns
    images, targets = test_set.split
    return Split(images, [columns[target] for target in targets]), known, None


def _class_names(loaded: LoadedModel, wanted: Sequence[str]) -> list[str]:
    """The names of the model's classes: its own, ImageNet's by their number, or as the folder's."""
    if loaded.classes is not None:
        return loaded.classes
    number = loaded.model.num_classes
    subset = infer_imagenet_subset(loaded.model)
    if subset is not None:
        names = ImageNetInfo(subset).label_names()
        if number != len(wanted) or set(wanted) <= set(names):
            return names
    if number == len(wanted):  # as timm's validation has it: sorted folders are in their order
        return list(wanted)
    raise ValueError(
        f"model {loaded.name} has {number} classes of unknown names, the data have {len(wanted)}"
    )


def _joined(
    source: str, loaded: LoadedModel, parts: Sequence[_Part], accelerator: Accelerator
) -> Result:
    """One result of all the sets of a source."""
    first = parts[0]
    corruptions = None
    evaluation, images = first.evaluation, first.test_set.split.images
    if first.test_set.corruption is not None:
        errors = {p.test_set.corruption: 1 - p.evaluation.accuracy for p in parts}
        corruptions = CorruptionErrors(errors)  # type: ignore[arg-type]
        evaluation, images = _concatenated(parts)
    sizes = {part.test_set.images for part in parts}
    whole = None
    if sizes != {None}:
        whole = all(p.evaluation.total == p.test_set.images for p in parts)
    try:
        figures = published(loaded.name)
    except ValueError:  # registered with timm, but without a configuration
        figures = None
    return Result(
        model=loaded.name,
        checkpoint=loaded.path,
        data=source,
        name=first.test_set.name,
        inputs=loaded.inputs,
        precision=accelerator.mixed_precision,
        device=accelerator.device.type,
        processes=accelerator.num_processes,
        evaluation=evaluation,
        classes=first.classes,
        images=images,
        whole=whole,
        published=figures,
        corruptions=corruptions,
    )


def _concatenated(parts: Sequence[_Part]) -> tuple[Evaluation, list[Any]]:
    images: list[Any] = []
    predictions = []
    for part in parts:
        own = part.evaluation.predictions
        predictions.append(dataclasses.replace(own, index=own.index + len(images)))
        images += part.test_set.split.images
    rates = [p.evaluation.images_per_second for p in parts if p.evaluation.images_per_second]
    rate = float(np.mean(rates)) if rates else None
    num_classes = parts[0].evaluation.num_classes
    broken = sum(p.evaluation.broken for p in parts)
    return Evaluation(Predictions.joined(predictions), num_classes, broken, rate), images


def record_evaluation(result: Result) -> Path | None:
    """Append the figures to `evaluations.jsonl` beside the checkpoint of a run; returns its path.

    A model that is of no run has no such place: nothing is written, and None returned.
    """
    if result.checkpoint is None or not (result.checkpoint.parent / "config.yaml").is_file():
        return None
    log = result.checkpoint.parent / "evaluations.jsonl"
    record = {**result.to_record(), "checkpoint": result.checkpoint.name}
    with open(log, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return log
