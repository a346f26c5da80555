"""Test sets around ImageNet in their published layouts; every figure against a recomputation."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, precision_score, recall_score, top_k_accuracy_score
from torch import Tensor, nn

from vitarium.cli.eval import figures_table, remarks
from vitarium.cli.main import main
from vitarium.train import evaluate_suite
from vitarium.train.data import InputConfig, read_image
from vitarium.train.evaluation_files import write_results
from vitarium.train.imagenet import ALEXNET_ERRORS, CorruptionErrors, load_test_sets, synsets
from vitarium.train.metrics import Evaluation, Predictions, calibration, class_table, confusion
from vitarium.train.suite import Result
from vitarium.train.weights import LoadedModel, load_weights

INPUTS = InputConfig((32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic", 1.0)
OPTIONS = {"batch_size": 4, "workers": 0, "device": "cpu"}


class Colours(nn.Module):
    """A linear classifier of an image's coarse colours: fast, and not blind to any pixel."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.randn(num_classes, 48, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) @ self.weight.T


def loaded(num_classes: int = 1000, name: str = "colours", classes=None) -> LoadedModel:
    return LoadedModel(name, Colours(num_classes).eval(), INPUTS, classes, None, None)


def draw(path: Path, number: int) -> Path:
    """An image file of random colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((32, 32)).save(path, format="PNG")
    return path


def logits_of(model: LoadedModel, paths: list[Path]) -> np.ndarray:
    """Logits one image at a time, by other code than the evaluation's."""
    rows = []
    for path in paths:
        pixels = torch.as_tensor(np.array(read_image(path))).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            rows.append(model.model((pixels - 0.5) / 0.25)[0].double().numpy())
    return np.array(rows)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """By the definition, image by image."""
    error = 0.0
    for i in range(15):
        inside = [c > i / 15 and c <= (i + 1) / 15 for c in confidence]
        if any(inside):
            gap = np.mean(right[inside]) - np.mean(confidence[inside])
            error += abs(gap) * sum(inside) / len(confidence)
    return error


def check(result: Result, logits: np.ndarray, targets: list[int]) -> None:
    """Every figure against scikit-learn's, or against the definition."""
    probabilities, classes = softmax(logits), range(logits.shape[1])
    right = logits.argmax(1) == targets
    record = result.to_record()
    assert record["total"] == len(targets) and record["correct"] == right.sum()
    assert record["accuracy"] == pytest.approx(right.mean())
    top5 = top_k_accuracy_score(targets, logits, k=5, labels=classes)
    assert record["accuracy_top5"] == pytest.approx(top5)
    loss = log_loss(targets, probabilities, labels=classes)
    assert record["loss"] == pytest.approx(loss, rel=1e-5)
    error = expected_calibration_error(probabilities.max(1), right)
    assert record["calibration_error"] == pytest.approx(error, abs=1e-5)


def targets_near(model: LoadedModel, paths: list[Path], allowed: list[int]) -> list[int]:
    """Classes that make some answers right, some right in the first five, and some wrong."""
    order = np.argsort(-logits_of(model, paths)[:, allowed], axis=1)
    return [allowed[order[i, (0, 2, 0, 9)[i % 4]]] for i in range(len(paths))]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> list[Path]:
    """Twelve drawn images."""
    folder = tmp_path_factory.mktemp("drawn")
    return [draw(folder / f"{i}.png", i) for i in range(12)]


def laid_out(
    root: Path, drawn: list[Path], targets: list[int], name: Callable[[int], str], suffix: str
) -> list[int]:
    """Copies of the images in folders of their classes; returns their order in the data set."""
    for i, (path, target) in enumerate(zip(drawn, targets)):
        folder = root / name(target)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"image_{i:02}.{suffix}").write_bytes(path.read_bytes())
    return sorted(range(len(drawn)), key=lambda i: (name(targets[i]), i))


LAYOUTS = {  # the folder below the path, how folders are called, the files' suffix
    "imagenet": ("val", lambda c: synsets()[c], "JPEG"),
    "imagenet-v2": ("", str, "jpeg"),
    "imagenet-a": ("imagenet-a", lambda c: synsets()[c], "jpg"),
    "imagenet-r": ("", lambda c: synsets()[c], "jpg"),
    "imagenet-sketch": ("sketch", lambda c: synsets()[c], "JPEG"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, drawn: list[Path], tmp_path: Path) -> None:
    model = loaded()
    subset = {"imagenet-a": "imagenet_a", "imagenet-r": "imagenet_r"}.get(name, "imagenet")
    allowed = [synsets().index(synset) for synset in synsets(subset)]
    targets = targets_near(model, drawn, allowed)
    folder, naming, suffix = LAYOUTS[name]
    order = laid_out(tmp_path / folder, drawn, targets, naming, suffix)
    (tmp_path / folder / "README.txt").write_text("not an image")
    (result,) = evaluate_suite(model, [f"{name}:{tmp_path}"], **OPTIONS)
    logits = logits_of(model, drawn)[order][:, allowed]
    check(result, logits, [allowed.index(targets[i]) for i in order])
    assert 0 < result.evaluation.accuracy < result.evaluation.accuracy_top5 < 1
    assert result.classes == synsets(subset) and result.whole is False


def test_maps_of_subsets_are_the_published_ones() -> None:
    """Classes that a person can look up: timm's index lists, and names of the papers' examples."""
    for name, number in (("imagenet_a", 200), ("imagenet_r", 200)):
        assert len(synsets(name)) == number and set(synsets(name)) <= set(synsets())
    assert synsets()[:2] == ["n01440764", "n01443537"]  # tench, goldfish
    assert synsets("imagenet_a")[0] == "n01498041"  # stingray, index 6
    assert synsets().index("n01498041") == 6
    assert synsets("imagenet_r")[0] == "n01443537"  # goldfish, index 1


def test_real_labels(drawn: list[Path], tmp_path: Path) -> None:
    model = loaded()
    logits = logits_of(model, drawn)
    order = np.argsort(-logits, axis=1)
    labels = [[int(order[i, 1]), int(order[i, 0])] for i in range(4)]  # right: it is among them
    labels += [[int(order[i, 4])] for i in range(4, 8)]  # among the first five
    labels += [[int(order[i, 40])] for i in range(8, 11)] + [
        []
    ]  # wrong; and one that does not count
    for i, path in enumerate(drawn):
        target = tmp_path / "val" / synsets()[i] / f"ILSVRC2012_val_{i + 1:08}.JPEG"
        target.parent.mkdir(parents=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / "real.json").write_text(json.dumps(labels))
    (result,) = evaluate_suite(
        model, [f"imagenet-real:{tmp_path}"], real_labels=tmp_path / "real.json", **OPTIONS
    )
    record = result.to_record()
    assert (record["correct"], record["total"], record["loss"]) == (4, 11, None)
    assert record["accuracy_top5"] == pytest.approx(8 / 11)
    confidence = softmax(logits).max(1)[:11]
    error = expected_calibration_error(confidence, np.arange(11) < 4)
    assert record["calibration_error"] == pytest.approx(error, abs=1e-5)
    rows = class_table(result.evaluation.predictions, result.classes)
    assert sum(row["correct"] for row in rows) == 4 and sum(row["images"] for row in rows) == 11
    # timm's own labels, flat: image 2 is 970 or 795, image 1 is of no class
    flat = tmp_path / "flat"
    for i in (1, 2, 3):
        draw(flat / f"ILSVRC2012_val_{i:08}.JPEG", i)
    (test_set,) = load_test_sets(f"imagenet-real:{flat}")
    assert test_set.labels == [[970, 795], [230, 231]]


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory) -> tuple[Path, dict[tuple[str, int], tuple[list[Path], list[int]]]]:
    """The 15 corruptions and a further one, 2 images at each severity, in groups as published."""
    root = tmp_path_factory.mktemp("imagenet-c")
    model, sets, number = loaded(), {}, 0
    for corruption in [*ALEXNET_ERRORS, "speckle_noise"]:
        group = "noise" if corruption.endswith("noise") else "other"
        for severity in range(1, 6):
            paths = [draw(root.parent / "c" / f"{number + i}.png", number + i) for i in range(2)]
            best = logits_of(model, paths).argmax(1)
            targets = [int(best[0]), int(best[1]) if number % 3 else int(best[1] + 1) % 1000]
            number += 2
            folder = root / group / corruption / str(severity)
            laid_out(folder, paths, targets, lambda c: synsets()[c], "JPEG")
            sets[corruption, severity] = (paths, targets)
    return root, sets


def test_corruptions(corrupted, tmp_path: Path) -> None:
    root, sets = corrupted
    model = loaded()
    (result,) = evaluate_suite(model, [f"imagenet-c:{root}"], **OPTIONS)
    errors = {
        key: np.mean(logits_of(model, paths).argmax(1) != targets)
        for key, (paths, targets) in sets.items()
    }
    assert result.corruptions is not None and result.corruptions.errors == errors
    assert result.evaluation.total == 160
    assert result.evaluation.accuracy == pytest.approx(1 - np.mean(list(errors.values())))
    relative = [
        np.mean([errors[name, s] for s in range(1, 6)]) / alexnet
        for name, alexnet in ALEXNET_ERRORS.items()
    ]
    assert result.corruptions.mean_corruption_error == pytest.approx(np.mean(relative))
    write_results([result], tmp_path)
    folder = tmp_path / "imagenet-c-32"
    assert Image.open(folder / "corruptions.png").format == "PNG"
    with open(folder / "corruptions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["corruption"] for row in rows] == [*ALEXNET_ERRORS, "speckle_noise"]
    assert rows[-1]["relative"] == ""  # AlexNet's error is not published
    with open(folder / "predictions.csv") as file:
        assert len({row["image"] for row in csv.DictReader(file)}) == 160


def test_mean_corruption_error_needs_everything() -> None:
    whole = {(name, s): error for name, error in ALEXNET_ERRORS.items() for s in range(1, 6)}
    assert CorruptionErrors(whole).mean_corruption_error == pytest.approx(1)  # AlexNet's own
    part = {key: error for key, error in whole.items() if key != ("fog", 5)}
    assert CorruptionErrors(part).mean_corruption_error is None
    assert CorruptionErrors(part).mean("fog") == pytest.approx(ALEXNET_ERRORS["fog"])


def test_any_folder(drawn: list[Path], tmp_path: Path) -> None:
    """Classes are found by name: a few synsets, all logits; or one's own, in the order of names."""
    model = loaded()
    targets = targets_near(model, drawn, list(range(1000)))
    order = laid_out(tmp_path, drawn, targets, lambda c: synsets()[c], "png")
    (result,) = evaluate_suite(model, [f"folder:{tmp_path}"], **OPTIONS)
    check(result, logits_of(model, drawn)[order], [targets[i] for i in order])
    own = tmp_path / "own"
    names = ["bird", "cat", "dog", "eel", "fox", "gnu", "hen"]
    order = laid_out(own / "val", drawn, [i % 7 for i in range(12)], lambda c: names[c], "png")
    shuffled = names[::-1]  # the checkpoint's order, which is not that of the folders
    for classes, expected in ((shuffled, shuffled), (None, names)):
        model = loaded(7, classes=classes)
        (result,) = evaluate_suite(model, [f"folder:{own}"], **OPTIONS)
        assert result.classes == expected
        check(result, logits_of(model, drawn)[order], [expected.index(names[i % 7]) for i in order])


def test_sizes_crops_and_precisions(drawn: list[Path], tmp_path: Path) -> None:
    laid_out(tmp_path, drawn, list(range(12)), str, "png")
    sizes = [32, 48]
    results = list(
        evaluate_suite(
            loaded(), [f"imagenet-v2:{tmp_path}"] * 2, image_sizes=sizes, crop_pct=0.5,
            precision="bf16", **OPTIONS,
        )
    )  # fmt: skip
    assert [r.inputs.image_size[0] for r in results] == [32, 32, 48, 48]
    assert all(r.inputs.crop_pct == 0.5 and r.precision == "bf16" for r in results)
    assert results[0].evaluation.loss == results[1].evaluation.loss
    assert results[0].evaluation.loss != results[2].evaluation.loss
    for number in range(1, 5):
        write_results(results[:number], tmp_path)
    assert {p.name for p in tmp_path.glob("imagenet-v2-*")} == {
        "imagenet-v2-32", "imagenet-v2-32-2", "imagenet-v2-48", "imagenet-v2-48-2",
    }  # fmt: skip
    content = json.loads((tmp_path / "results.json").read_text())
    assert [r["image_size"][0] for r in content["results"]] == [32, 32, 48, 48]
    assert content["versions"]["torch"] == torch.__version__
    with open(tmp_path / "results.csv") as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [
            r.evaluation.accuracy for r in results
        ]


def test_models_of_one_size_are_interpolated() -> None:
    """timm's `set_input_size` from the original weights; the original stays as it was."""
    model = load_weights("deit_tiny_patch16_224", random=True)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    larger = model.at(256, None)
    assert larger.inputs.image_size == (256, 256)
    assert larger.model.pos_embed.shape[1] == 257
    assert all(torch.equal(value, before[n]) for n, value in model.model.state_dict().items())


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_shares_of_processes_join_to_the_same_figures(processes: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, targets, index = (
        torch.randn(23, 7, generator=generator),
        np.arange(23) % 7,
        np.arange(23),
    )
    shares = [slice(i, None, processes) for i in range(processes)]
    joined = Predictions.joined(
        [Predictions.from_logits(logits[s], targets[s], index[s]) for s in shares]
    )
    whole = Predictions.from_logits(logits, targets, index)
    for field in dataclasses.fields(Predictions):
        assert np.array_equal(getattr(joined, field.name), getattr(whole, field.name))


def test_figures_of_classes_and_bins() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(400, 6, generator=generator)
    targets = np.arange(400) % 5  # the last class has no image
    predictions = Predictions.from_logits(logits, targets, np.arange(400))
    answers = logits.argmax(1).numpy()
    rows = class_table(predictions, list("abcdef"))
    assert [row["class"] for row in rows] == list("abcde")
    for name, score in (("accuracy", recall_score), ("precision", precision_score)):
        expected = score(targets, answers, labels=range(5), average=None, zero_division=0)
        assert [row[name] for row in rows] == pytest.approx(expected.tolist())
    matrix = confusion(predictions, 6)
    assert matrix.sum() == 400 and matrix[2, 3] == ((targets == 2) & (answers == 3)).sum()
    for i, row in enumerate(rows):
        wrong = np.bincount(answers[(targets == i) & (answers != i)])
        assert row["mistaken_for"] == "abcdef"[int(wrong.argmax())]
    bins = calibration(predictions)
    confidence = logits.double().softmax(1).max(1).values.numpy()
    accuracy, mean = calibration_curve(answers == targets, confidence, n_bins=15)
    assert bins.accuracy[bins.count > 0] == pytest.approx(accuracy)
    assert bins.confidence[bins.count > 0] == pytest.approx(mean, abs=1e-6)
    assert bins.error == pytest.approx(
        expected_calibration_error(confidence, answers == targets), abs=1e-6
    )


def test_equal_logits_count_as_argmax_has_them() -> None:
    predictions = Predictions.from_logits(torch.zeros(3, 8), np.array([0, 1, 5]), np.arange(3))
    assert predictions.hits[:, 0].tolist() == [True, False, False]
    assert predictions.hits.any(1).tolist() == [True, True, False]


def published_result(top1: float, size: int = 224, total: int = 50_000) -> Result:
    """A result of `nat_mini`, of which 81.8 % at 224 pixels is published."""
    right = np.arange(total) < round(total * top1 / 100)
    top = np.where(right, 0, 1)[:, None]
    predictions = Predictions(
        np.arange(total), np.zeros(total, int), top, right[:, None], right * 0.5, right * 1.0
    )
    return Result(
        model="nat_mini", checkpoint=None, data="imagenet:x", name="imagenet",
        inputs=dataclasses.replace(INPUTS, image_size=(size, size)), precision="no", device="cpu",
        processes=1, evaluation=Evaluation(predictions, 1000), classes=synsets(), images=[],
        whole=total == 50_000, published=load_published("nat_mini"),
    )  # fmt: skip


def load_published(name: str):
    from vitarium.zoo import published

    return published(name)


@pytest.mark.parametrize(
    ("result", "comparable", "differs"),
    [
        ((81.82,), True, False),
        ((81.7,), True, False),  # exactly a tenth off
        ((81.69,), True, True),
        ((81.91,), True, True),
        ((80.0, 256), False, False),  # another size
        ((80.0, 224, 1000), False, False),  # a part of the images
    ],
)
def test_published_figures_and_their_flag(result, comparable: bool, differs: bool) -> None:
    found = published_result(*result)
    assert found.published_top1 == 81.8
    assert found.difference == pytest.approx(result[0] - 81.8)
    assert (found.comparable, found.differs) == (comparable, differs)
    cells = [list(column.cells) for column in figures_table([found]).columns][-2:]
    assert cells[0] == ["81.8"] and ("!" in cells[1][0]) == differs
    text = " ".join(remarks(found))
    assert ("differs from the published 81.8 %" in text) == differs
    assert ("says little" in text) == (not comparable)


def test_command(drawn: list[Path], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    laid_out(tmp_path / "v2", drawn, list(range(12)), str, "jpeg")
    arguments = ["testbed_attention_nano", "--random", "--workers", "0", "--device", "cpu"]
    output = tmp_path / "out"
    data = ["--data", f"imagenet:{tmp_path / 'v2'}", f"imagenet-v2:{tmp_path / 'v2'}"]
    arguments += ["--image-size", "32", *data, "--output", str(output)]
    assert main(["eval", *arguments]) == 0
    text = capsys.readouterr().out
    assert "imagenet at 32: accuracy" in text and "imagenet-v2 at 32: accuracy" in text
    assert "12 images are a part of the set" in text and f"recorded in {output}" in text
    for name in ("imagenet-32", "imagenet-v2-32"):
        with open(output / name / "predictions.csv") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 12 and all(Path(row["image"]).is_file() for row in rows)
        with open(output / name / "classes.csv") as file:
            assert next(csv.DictReader(file))["words"] == "tench, Tinca tinca"
        for picture in ("confusion.png", "reliability.png"):
            assert Image.open(output / name / picture).format == "PNG"
    record = json.loads((output / "results.json").read_text())["results"][0]
    assert record["total"] == 12 and math.isfinite(record["loss"])
    assert main(["eval", *arguments]) == 1  # nothing is written over
    assert "holds an evaluation already" in capsys.readouterr().err
