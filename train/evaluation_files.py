"""Files of an evaluation: figures as JSON and CSV, every class, every image, and pictures."""

from __future__ import annotations

import csv
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitarium.train import environment
from vitarium.train.checkpoint import write_atomic, write_text
from vitarium.train.evaluation_plots import (
    confusion_picture,
    corruption_picture,
    reliability_diagram,
)
from vitarium.train.imagenet import SEVERITIES, lemmas
from vitarium.train.images import image_name
from vitarium.train.metrics import calibration, class_table, confusion
from vitarium.train.suite import Result

RESULTS = "results.json"


def claim_output(folder: Path | str) -> Path:
    """A folder for an evaluation's files, which no other evaluation has.

    Raises:
        FileExistsError: it holds an evaluation already, or is a file.
    """
    path = Path(folder)
    if (path / RESULTS).exists():
        raise FileExistsError(f"{path} holds an evaluation already; choose another --output")
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_results(results: Sequence[Result], folder: Path) -> None:
    """Write `results.json`, `results.csv`, and a folder of `write_details` for the latest result.

    To be called after every result.
    """
    write_details(results[-1], folder / _slug(results, len(results) - 1))
    records = [result.to_record() for result in results]
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "processor": environment.processor(results[0].device),
        "results": records,
    }
    write_text(folder / RESULTS, json.dumps(content, indent=2) + "\n")
    flat = [{k: v for k, v in r.items() if not isinstance(v, Mapping)} for r in records]
    columns = dict.fromkeys(key for row in flat for key in row)
    write_csv(folder / "results.csv", list(columns), flat)


def _slug(results: Sequence[Result], place: int) -> str:
    """A folder's name for a result: its set and size, and a number where that is not enough."""
    names = ["-".join(map(str, (r.name, *sorted(set(r.inputs.image_size))))) for r in results]
    before = names[:place].count(names[place])
    return f"{names[place]}-{before + 1}" if before else names[place]


def write_details(result: Result, folder: Path) -> None:
    """Write `classes.csv`, `predictions.csv`, `confusion.png` and `reliability.png` of one result.

    Of ImageNet-C also `corruptions.csv` and `corruptions.png`.
    """
    folder.mkdir(exist_ok=True)
    predictions, classes = result.evaluation.predictions, result.classes
    title = f"{result.model} on {result.name} at {_size(result)}"
    rows = class_table(predictions, classes)
    if any(row["class"] in lemmas() for row in rows):
        rows = [{"class": row["class"], "words": lemmas().get(row["class"]), **row} for row in rows]
    write_csv(folder / "classes.csv", list(rows[0]), rows)
    _write_predictions(result, folder / "predictions.csv")
    confusion_picture(
        confusion(predictions, len(classes)),
        classes,
        folder / "confusion.png",
        f"{title}: {result.evaluation.accuracy:.2%} of {result.evaluation.total:,} images right",
    )
    reliability_diagram(calibration(predictions), folder / "reliability.png", title)
    if result.corruptions is not None:
        errors = result.corruptions
        levels = [
            {
                "corruption": name,
                **{f"severity_{s}": errors.errors.get((name, s)) for s in SEVERITIES},
                "error": errors.mean(name),
                "relative": errors.relative(name),
            }
            for name in errors.corruptions
        ]
        write_csv(folder / "corruptions.csv", list(levels[0]), levels)
        corruption_picture(errors, folder / "corruptions.png", result.model)


def _size(result: Result) -> str:
    height, width = result.inputs.image_size
    return f"{height}x{width}"


def _write_predictions(result: Result, path: Path) -> None:
    predictions, classes = result.evaluation.predictions, result.classes
    columns = ("index", "image", "class", "predicted", "confidence", "right", "loss")
    rows = (
        {
            "index": int(index),
            "image": image_name(result.images[index], int(index)),
            "class": classes[target],
            "predicted": classes[top[0]],
            "confidence": f"{confidence:.6f}",
            "right": int(hits[0]),
            "loss": f"{loss:.6f}",
        }
        for index, target, top, hits, confidence, loss in zip(
            predictions.index, predictions.target, predictions.top, predictions.hits,
            predictions.confidence, predictions.loss,
        )
    )  # fmt: skip
    write_csv(path, columns, rows)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a CSV file, atomically; None is an empty cell."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_atomic(path, write)
