"""Structured pruning: what is left computes what the whole computed without the units that went."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import vitarium.zoo  # noqa: F401  registers our models
from vitarium.cli.main import main
from vitarium.train import TrainConfig, train
from vitarium.train.checkpoint import Description, load_model, save_weights
from vitarium.train.config import AugmentConfig, OptimizerConfig, ScheduleConfig
from vitarium.train.data import InputConfig
from vitarium.train.prune import distortion, prune_model
from vitarium.zoo.export import trace
from vitarium.zoo.pruned import apply_pruned, pruned_layers

INPUTS = InputConfig((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
# One per kind of feed-forward network and of block: two layers, a depthwise convolution between,
# a gate, two attentions per block, tokens beside a class token, and timm's own.
MODELS = {
    "dinat_nano": {},
    "litv2_small": {"embed_dim": 32, "depths": (1, 1, 1, 1)},
    "transnext_micro": {"embed_dim": 24, "depths": (1, 1, 1, 1)},
    "agent_deit_tiny": {},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
}


def images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def drawn(name: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs).eval()


@pytest.mark.parametrize("name", ["dinat_nano", "transnext_micro", "vit_tiny_patch16_224"])
def test_the_rest_computes_as_with_units_silenced(name: str) -> None:
    kwargs = MODELS[name]
    whole, pruned = drawn(name, **kwargs), drawn(name, **kwargs)
    prune_model(pruned, images(64), 0.4)
    silenced = 0
    for path, layer in whole.named_modules():
        if not path.endswith("fc2"):
            continue
        # A unit is left if its column is; equal columns of drawn weights do not occur.
        left = pruned.get_submodule(path).weight
        same = (layer.weight.T[:, None] == left.T[None]).all(-1)
        assert torch.equal(same.sum(0), torch.ones(left.shape[1]))
        with torch.no_grad():
            layer.weight[:, ~same.any(1)] = 0
        silenced += int((~same.any(1)).sum())
    assert silenced > 0
    with torch.no_grad():
        torch.testing.assert_close(pruned(images(64)), whole(images(64)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["dinat_nano", "agent_deit_tiny", "testbed_window_nano"])
def test_heads_go_with_all_that_is_theirs(name: str) -> None:
    model = drawn(name)
    report = prune_model(model, images(32), 0.0, heads_ratio=0.4)
    assert report.heads and not report.units
    for path, (before, after) in report.heads.items():
        mixer = model.get_submodule(path)
        assert 1 <= after <= before
        assert mixer.num_heads == after
        assert mixer.qkv.out_features == 3 * mixer.proj.in_features
    total = [sum(pair[i] for pair in report.heads.values()) for i in (0, 1)]
    assert total[1] == total[0] - round(0.4 * total[0]) or total[1] >= len(report.heads)
    assert model(images(32)).shape == (2, 5)


def test_layers_that_do_not_allow_it_stay_whole() -> None:
    """GRN normalises every hidden unit by all of them."""
    model = drawn("convnextv2_atto")
    for layer in model.modules():
        if hasattr(layer, "grn"):
            nn.init.normal_(layer.grn.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="depend on each other"):
        prune_model(model, images(32), 0.3)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_distortion_compares_modules_of_any_scale() -> None:
    energy = torch.tensor([4.0, 1.0, 3.0], dtype=torch.float64)
    assert distortion(energy).tolist() == pytest.approx([4 / 4, 1 / 8, 3 / 7])
    assert torch.equal(distortion(energy), distortion(1024 * energy))


def test_criteria_differ_where_stages_differ_in_scale() -> None:
    """Magnitude alone empties the stage of small weights; relative distortion does not."""
    left = {}
    for criterion in ("dimap", "magnitude"):
        model = drawn("dinat_nano")
        with torch.no_grad():
            model.stages[0].blocks[0].mlp.fc2.weight.mul_(1e-3)
        report = prune_model(model, images(32), 0.3, criterion=criterion)
        assert sum(after for _, after in report.units.values()) == pytest.approx(
            0.7 * sum(before for before, _ in report.units.values()), abs=64
        )
        left[criterion] = report.units["stages.0.blocks.0.mlp.fc2"][1]
    assert left["magnitude"] == 1
    assert left["dimap"] > 30


def test_widths_are_rounded() -> None:
    report = prune_model(drawn("dinat_nano"), images(32), 0.3, round_to=8)
    assert all(after % 8 == 0 and after >= 8 for _, after in report.units.values())


@pytest.mark.parametrize("name", MODELS)
def test_pruned_models_are_rebuilt_without_the_library(name: str, tmp_path) -> None:
    size = 64
    kwargs = MODELS[name]
    model = drawn(name, **kwargs)
    prune_model(model, images(size), 0.3)
    config = TrainConfig(model=name, model_kwargs=kwargs, image_size=size)
    description = Description(name, kwargs, list("abcde"), INPUTS, config, {}, pruned_layers(model))
    save_weights(tmp_path / "last.safetensors", model, description)
    again, found = load_model(tmp_path)
    assert found.pruned == pruned_layers(again) == json.loads(json.dumps(pruned_layers(model)))
    with torch.no_grad():
        assert torch.equal(again(images(size)), model(images(size)))
    for path, sizes in found.pruned.items():
        layer = again.get_submodule(path)
        assert all(getattr(layer, k) == v for k, v in sizes.items() if isinstance(v, int))


def test_a_pruned_model_exports_and_learns(tmp_path) -> None:
    model = drawn("dinat_nano")
    prune_model(model, images(32), 0.3, heads_ratio=0.3)
    report = trace(model, (32, 32)).write(tmp_path / "model.pt2", "torch")
    assert report.error < 1e-4
    F.cross_entropy(model.train()(images(32)), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


# --- from the command line ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, digit_folders):
    folder = tmp_path_factory.mktemp("post") / "run"
    train(small(digit_folders), output=folder)
    return folder


def small(digit_folders, **changes) -> TrainConfig:
    values = {
        "data": f"folder:{digit_folders}", "model": "dinat_nano", "image_size": 32,
        "crop_pct": 1.0, "epochs": 1, "batch_size": 16, "workers": 0, "threads": 1,
        "device": "cpu", "optimizer": OptimizerConfig(lr=1e-3),
        "schedule": ScheduleConfig(warmup_epochs=0), "augment": AugmentConfig(hflip=0.0),
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def test_prune_eval_finetune(run_folder, digit_folders, tmp_path, capsys) -> None:
    output = tmp_path / "pruned"
    assert main(["prune", str(run_folder), "--ratio", "0.5", "--output", str(output)]) == 0
    report = json.loads((output / "pruning.json").read_text())
    before, after = report["before"], report["after"]
    assert after["parameters"] < before["parameters"]
    assert after["multiply-adds"] < before["multiply-adds"]
    assert after["images"] == before["images"] == 12
    assert "multiply-adds" in capsys.readouterr().out
    assert main(["eval", str(output)]) == 0
    assert f"accuracy {after['accuracy']:.2%}" in capsys.readouterr().out
    config = small(digit_folders, initial_checkpoint=str(output))
    result = train(config, output=tmp_path / "finetuned")
    tuned, description = load_model(result.folder)
    start, _ = load_model(output)
    shapes = [p.shape for p in start.parameters()]
    assert [p.shape for p in tuned.parameters()] == shapes
    assert description.pruned
    assert any(not torch.equal(a, b) for a, b in zip(tuned.parameters(), start.parameters()))


def test_start_from_a_checkpoint_with_other_classes(run_folder, tmp_path) -> None:
    config = small("", data="digits", initial_checkpoint=str(run_folder))
    from vitarium.train.start import create_network

    start, _ = load_model(run_folder)
    network = create_network(config, 10)
    assert network.training
    assert network.head.fc.out_features == 10
    assert torch.equal(network.stem.conv1.weight, start.stem.conv1.weight)


WRONG_CALLS = {
    "ratio 1": (["prune", "RUN", "--ratio", "1", "--output", "NEW"], 2, "ratio=1.0"),
    "ratio below 0": (["prune", "RUN", "--ratio=-0.1", "--output", "NEW"], 2, "ratio=-0.1"),
    "nothing to do": (["prune", "RUN", "--ratio", "0", "--output", "NEW"], 2, "prune nothing"),
    "ratio a word": (["prune", "RUN", "--ratio", "much", "--output", "NEW"], 2, "ratio"),
    "no output": (["prune", "RUN"], 2, "output"),
    "output taken": (["prune", "RUN", "--output", "RUN"], 2, "already"),
    "output a file": (["prune", "RUN", "--output", "FILE"], 2, "is a file"),
    "criterion": (["prune", "RUN", "--criterion", "size", "--output", "NEW"], 2, "criterion"),
    "round_to": (["prune", "RUN", "--round_to", "0", "--output", "NEW"], 2, "round_to"),
    "no checkpoint": (["prune", "nowhere", "--output", "NEW"], 1, "does not exist"),
    "damaged": (["prune", "FILE", "--output", "NEW"], 1, "cannot be read"),
    "other data": (["prune", "RUN", "--data", "digits", "--output", "NEW"], 1, "classes"),
    "mode": (["quantize", "RUN", "--mode", "int4", "--output", "NEW"], 2, "mode"),
    "calibration": (
        ["quantize", "RUN", "--calibration_images", "0", "--output", "NEW"], 2, "calibration",
    ),
    "quantize output taken": (["quantize", "RUN", "--output", "RUN"], 2, "already"),
    "quantize nothing": (["quantize", "nowhere", "--output", "NEW"], 1, "does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_calls(case, run_folder, tmp_path, capsys) -> None:
    arguments, status, message = WRONG_CALLS[case]
    file = tmp_path / "file.safetensors"
    file.write_text("no checkpoint")
    places = {"RUN": run_folder, "NEW": tmp_path / "new", "FILE": file}
    before = {path: path.read_bytes() for path in run_folder.iterdir() if path.is_file()}
    assert main([str(places.get(word, word)) for word in arguments]) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("vitarium: error: ") and "Traceback" not in error
    assert len(error.splitlines()) == 1
    assert not list((tmp_path / "new").glob("*.safetensors"))
    assert before == {path: path.read_bytes() for path in run_folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("pruned", "message"),
    [
        ({"stages.9.blocks": {"out_features": 4}}, "not in the model"),
        ({"stages.0.blocks.0.mlp.fc1": {"out_features": 10**6}}, "must be from 1 to"),
        ({"stages.0.blocks.0.mlp.fc1": {"out_features": 0}}, "must be from 1 to"),
        ({"stages.0.blocks.0.mlp.fc1": {"weight": [4]}}, "must be a shape"),
        ({"stages.0.blocks.0.mlp.fc1": {"forward": 4}}, "no width and no tensor"),
        ({"stages.0.blocks.0.mlp.fc1": {"weight": [2, "x"]}}, "must be a shape"),
    ],
)
def test_malformed_headers(pruned, message) -> None:
    with pytest.raises(ValueError, match=message):
        apply_pruned(drawn("dinat_nano"), pruned)


def test_initial_checkpoints_that_do_not_fit(run_folder, digit_folders, tmp_path) -> None:
    start = {"initial_checkpoint": str(run_folder)}
    for changes, message in (
        ({"model": "testbed_window_nano", **start}, "does not fit|missing|lacks"),
        ({"model_kwargs": {"depths": (1, 1, 1)}, **start}, "does not fit|missing|lacks|shape"),
    ):
        with pytest.raises(ValueError, match=message):
            train(small(digit_folders, **changes), output=tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        train(small(digit_folders, initial_checkpoint="nowhere"), output=tmp_path / "new")
    with pytest.raises(ValueError, match="pretrained"):
        small(digit_folders, pretrained=True, **start)
    assert not (tmp_path / "new").exists()
