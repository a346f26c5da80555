"""Figures of a classifier, all of them computed from what it answered for every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CALIBRATION_BINS = 15  # as Guo et al. 2017 (arXiv 1706.04599) and most papers since
_TOP = 5


@dataclass(frozen=True)
class Predictions:
    """What a model answered, an entry per image.

    Attributes:
        index: `(N,)`, the image's place in its data set.
        target: `(N,)`, the index of its class.
        top: `(N, k)`, the `k` most probable classes, most probable first; 5, or all if fewer.
        hits: `(N, k)`, which of them are right.
        confidence: `(N,)`, the probability of the first.
        loss: `(N,)`, cross-entropy in nats; not a number where an image has several right classes.
    """

    index: np.ndarray
    target: np.ndarray
    top: np.ndarray
    hits: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def from_logits(cls, logits: Tensor, target: np.ndarray, index: np.ndarray) -> Predictions:
        """Answers of one batch.

        Args:
            logits: `(B, C)` of any floating type.
            target: `(B,)`, classes.
            index: `(B,)`, places in the data set.
        """
        logits = logits.detach().float()
        target = np.asarray(target, dtype=np.int64)
        targets = torch.as_tensor(target, device=logits.device)
        loss = F.cross_entropy(logits, targets, reduction="none")
        # Not topk, which promises no order of equal logits: the first of them, as argmax has it.
        top = logits.sort(dim=-1, descending=True, stable=True).indices[:, :_TOP]
        confidence = logits.softmax(-1).gather(1, top[:, :1])[:, 0]
        chosen = top.cpu().numpy().astype(np.int32)
        return cls(
            index=np.asarray(index),
            target=target,
            top=chosen,
            hits=chosen == target[:, None],
            confidence=confidence.cpu().numpy(),
            loss=loss.cpu().numpy(),
        )

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """The answers of several batches or processes, in the order of the data set."""
        columns = {f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)}
        order = np.argsort(columns["index"], kind="stable")
        return cls(**{name: column[order] for name, column in columns.items()})

    def with_labels(self, labels: Sequence[Sequence[int]]) -> Predictions:
        """The same where several classes may be right, as in ImageNet-Real.

        The class of an image is then the one that was found, or else the first of its labels; it
        has no cross-entropy.

        Args:
            labels: the right classes of every image of the data set, at least one each.
        """
        own = [labels[i] for i in self.index]
        hits = np.array([np.isin(top, right) for top, right in zip(self.top, own)])
        hits = hits.reshape(self.top.shape)
        first = np.array([right[0] for right in own], dtype=self.target.dtype)
        target = np.where(hits[:, 0], self.top[:, 0], first)
        missing = np.full(len(self), np.nan, dtype=np.float32)
        return Predictions(self.index, target, self.top, hits, self.confidence, missing)


@dataclass(frozen=True)
class Calibration:
    """How far confidence and accuracy agree, by equally wide bins of confidence.

    Bin `i` of `n` holds the images with a confidence above `i / n` and up to `(i + 1) / n`.

    Attributes:
        count: `(n,)`, images per bin.
        accuracy: `(n,)`, their top-1 accuracy; not a number in empty bins.
        confidence: `(n,)`, their mean confidence; not a number in empty bins.
    """

    count: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: mean |accuracy - confidence| of bins, weighted by images."""
        filled = self.count > 0
        gaps = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float((gaps * self.count[filled]).sum() / self.count.sum())


def calibration(predictions: Predictions, bins: int = CALIBRATION_BINS) -> Calibration:
    """Accuracy by confidence (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599)."""
    confidence = predictions.confidence.astype(np.float64)
    edges = np.arange(1, bins) / bins
    place = np.digitize(confidence, edges, right=True)
    count = np.bincount(place, minlength=bins)
    hits = np.bincount(place, predictions.hits[:, 0], bins)
    sums = np.bincount(place, confidence, bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Calibration(count, hits / count, sums / count)


def confusion(predictions: Predictions, num_classes: int) -> np.ndarray:
    """`(C, C)` of counts: rows are the classes of images, columns what they were taken for."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(
        predictions.target, predictions.top[:, 0], labels=np.arange(num_classes)
    )


def class_table(predictions: Predictions, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Figures of every class that has images, in the order of the classes.

    Returns:
        Rows of `class`; `images`; `correct`; `accuracy`, the part of its images that was found
        (recall); `accuracy_top5`; `predicted`, how many images were taken for it; `precision`, the
        part of those that is right (None if there are none); `confidence`, the mean over its
        images; `mistaken_for`, the class that it is most often taken for wrongly.
    """
    matrix = confusion(predictions, len(classes))
    correct, images, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    target, size = predictions.target, len(classes)
    top5 = np.bincount(target, predictions.hits.any(1), size)
    confidence = np.bincount(target, predictions.confidence, size)
    wrong = matrix - np.diag(correct)
    return [
        {
            "class": classes[c],
            "images": int(images[c]),
            "correct": int(correct[c]),
            "accuracy": float(correct[c] / images[c]),
            "accuracy_top5": float(top5[c] / images[c]) if size > _TOP else None,
            "predicted": int(predicted[c]),
            "precision": float(correct[c] / predicted[c]) if predicted[c] else None,
            "confidence": float(confidence[c] / images[c]),
            "mistaken_for": classes[wrong[c].argmax()] if wrong[c].any() else None,
        }
        for c in np.flatnonzero(images)
    ]


@dataclass(frozen=True)
class Evaluation:
    """Figures of one pass over held-out images.

    Attributes:
        predictions: what the model answered.
        num_classes: classes between which it chose.
        broken: images that could not be read; they are in none of the figures.
        images_per_second: of the model alone, over all processes, without reading images; None if
            nothing was timed.
    """

    predictions: Predictions
    num_classes: int
    broken: int = 0
    images_per_second: float | None = None

    @property
    def total(self) -> int:
        """Images seen, which are those that can be read."""
        return len(self.predictions)

    @property
    def correct(self) -> int:
        """Images whose most probable class is right."""
        return int(self.predictions.hits[:, 0].sum())

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy, from 0 to 1."""
        return self.correct / self.total

    @property
    def accuracy_top5(self) -> float | None:
        """Images of which one of the 5 most probable classes is right; None below 6 classes."""
        if self.num_classes <= _TOP:
            return None
        return int(self.predictions.hits.any(1).sum()) / self.total

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats; not a number where images have several right classes."""
        return float(self.predictions.loss.mean(dtype=np.float64))

    @property
    def calibration_error(self) -> float:
        """Expected calibration error, from 0 to 1, in 15 bins of equal width."""
        return calibration(self.predictions).error

    def to_record(self) -> dict[str, Any]:
        """The figures by name, as they are written to files; a loss that is no number as None."""
        return {
            "correct": self.correct,
            "total": self.total,
            "loss": None if np.isnan(self.predictions.loss).all() else self.loss,
            "accuracy": self.accuracy,
            "accuracy_top5": self.accuracy_top5,
            "calibration_error": self.calibration_error,
            "broken": self.broken,
        }
