"""Loading checkpoints: official and own names, wrappers, and files that must be refused."""

import argparse
import http.server
import pickle
import random
import re
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models import create_model

from vitarium.zoo import CheckpointReport, load_checkpoint

SMALL = {"embed_dim": 32, "depths": (1, 2), "num_classes": 6}


def _model(name: str = "nat_small", **arguments) -> torch.nn.Module:
    return create_model(name, **{**SMALL, **arguments}).eval()


def _official(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a small NAT in the official names, written out by hand."""
    ours = model.state_dict()
    names = {
        "stem.conv1": "patch_embed.proj.0",
        "stem.conv2": "patch_embed.proj.1",
        "stem.norm": "patch_embed.norm",
        "stages.1.downsample.conv": "levels.0.downsample.reduction",
        "stages.1.downsample.norm": "levels.0.downsample.norm",
        "norm": "norm",
        "head.fc": "head",
    }
    for stage, block in ((0, 0), (1, 0), (1, 1)):
        for part, official in {
            "norm1": "norm1",
            "mixer": "attn",
            "mixer.qkv": "attn.qkv",
            "mixer.proj": "attn.proj",
            "norm2": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }.items():
            names[f"stages.{stage}.blocks.{block}.{part}"] = (
                f"levels.{stage}.blocks.{block}.{official}"
            )
    official = {}
    for key, value in ours.items():
        layer, _, parameter = key.rpartition(".")
        if parameter == "gamma":  # layer scale: blocks.0.ls1.gamma is blocks.0.gamma1
            prefix, number = layer.rsplit(".ls", 1)
            official[f"{prefix.replace('stages', 'levels')}.gamma{number}"] = value
        else:
            official[f"{names[layer]}.{parameter}"] = value
    return official


def _assert_equal(model: torch.nn.Module, other: torch.nn.Module) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


# --- what loads ----------------------------------------------------------------------------------


def test_official_names_from_a_state_dict():
    source, model = _model(), _model()
    report = load_checkpoint(model, _official(source))
    _assert_equal(model, source)
    tensors = len(model.state_dict())
    assert report == CheckpointReport("state dict", None, tensors, tensors - 2, False)
    assert str(report) == (
        f"state dict: loaded {tensors} tensors, {tensors - 2} of them renamed from the official "
        "names"
    )


def test_own_names_from_safetensors(tmp_path):
    source, model = _model(), _model()
    file = tmp_path / "own.safetensors"
    save_file(source.state_dict(), file)
    report = load_checkpoint(model, file)
    _assert_equal(model, source)
    assert report == CheckpointReport(str(file), None, len(model.state_dict()), 0, False)


@pytest.mark.parametrize("wrapper", ["state_dict_ema", "model_ema", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_wrappers_of_training_scripts(wrapper, prefix, tmp_path):
    source, model = _model(), _model()
    content = {
        wrapper: {prefix + key: value for key, value in _official(source).items()},
        "optimizer": {"state": {}},
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1),
    }
    file = tmp_path / "last.pth.tar"
    torch.save(content, file)
    report = load_checkpoint(model, str(file))
    _assert_equal(model, source)
    assert report.wrapper == wrapper
    assert f"from its entry '{wrapper}'" in str(report)


def test_averaged_weights_come_first(tmp_path):
    averaged, last, model = _model(), _model(), _model()
    load_checkpoint(
        model, {"state_dict": last.state_dict(), "state_dict_ema": averaged.state_dict()}
    )
    _assert_equal(model, averaged)


def test_the_index_table_of_vit_rpb_is_dropped():
    arguments = {
        "embed_dim": 64,
        "depth": 1,
        "mixers": [("global", {"num_heads": 2, "map_size": 4})],
    }
    source, model = (create_model("vitrpb_small", **arguments) for _ in range(2))
    official = {}
    for key, value in source.state_dict().items():
        key = key.replace("stages.0.blocks.0.", "layers.0.").replace(".mixer.", ".attn.")
        official[key.replace("stem.", "patch_embed.").replace("head.fc.", "head.")] = value
    official["layers.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    load_checkpoint(model, official)
    _assert_equal(model, source)


@pytest.mark.parametrize("official", [True, False])
def test_timms_own_loading_path(official, tmp_path):
    """`pretrained=True` with a file, strictly; in `safetensors` and in `torch.save`'s format."""
    source = _model()
    state_dict = _official(source) if official else source.state_dict()
    files = [tmp_path / "weights.pth", tmp_path / "weights.safetensors"]
    torch.save(state_dict, files[0])
    save_file(state_dict, files[1])
    for file in files:
        overlay = {"file": str(file), "num_classes": 6}
        model = _model(pretrained=True, pretrained_cfg_overlay=overlay)
        _assert_equal(model, source)
    del state_dict[next(iter(state_dict))]
    torch.save(state_dict, files[0])
    with pytest.raises(RuntimeError, match="Missing key"):
        _model(pretrained=True, pretrained_cfg_overlay={"file": str(files[0]), "num_classes": 6})


@torch.no_grad()
def test_timm_adapts_official_weights_to_other_channels_and_classes(tmp_path):
    source = _model()
    file = tmp_path / "weights.pth"
    torch.save(_official(source), file)
    overlay = {"file": str(file), "num_classes": 6}
    grey = _model(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)
    want = source.stem.conv1.weight.sum(1, keepdim=True)
    torch.testing.assert_close(grey.stem.conv1.weight, want)
    other = _model(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=2)
    assert torch.equal(other.stages[1].blocks[1].mixer.rpb, source.stages[1].blocks[1].mixer.rpb)
    assert other.head.fc.out_features == 2
    features = _model(pretrained=True, pretrained_cfg_overlay=overlay, features_only=True,
                      out_indices=(0, 1))  # fmt: skip
    images = torch.randn(1, 3, 64, 64)
    taps = source.forward_intermediates(images, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(features.eval()(images), taps, strict=True))


def test_a_model_of_timm_loads_through_its_own_filter():
    source, model = (create_model("swin_s3_tiny_224", depths=(1, 1, 1, 1)) for _ in range(2))
    load_checkpoint(model, {"model": source.state_dict()})
    _assert_equal(model, source)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Address of a local server of `tmp_path`, and an empty download cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as instance:
        threading.Thread(target=instance.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{instance.server_port}"
        instance.shutdown()


def test_an_address(server, tmp_path):
    source, model = _model(), _model()
    torch.save(_official(source), tmp_path / "nat.pth")
    report = load_checkpoint(model, f"{server}/nat.pth")
    _assert_equal(model, source)
    assert report.source == f"{server}/nat.pth"
    with pytest.raises(ValueError, match=f"{server}/none.pth: cannot be downloaded: .*404"):
        load_checkpoint(model, f"{server}/none.pth")


# --- what does not fit ---------------------------------------------------------------------------


@pytest.fixture
def untouched():
    """A model that must come out of the test as it went in."""
    model = _model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    yield model
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_another_number_of_classes_is_explained(untouched):
    other = _official(_model(num_classes=9))
    with pytest.raises(ValueError) as caught:
        load_checkpoint(untouched, other)
    message = str(caught.value)
    assert "head.fc.weight is (9, 64) in the checkpoint and (6, 64) in the model" in message
    assert "create the model with num_classes=9, or pass replace_head=True" in message


def test_a_missing_classifier_is_explained(untouched):
    headless = {k: v for k, v in _model().state_dict().items() if not k.startswith("head.")}
    with pytest.raises(ValueError, match=r"head\.fc\.weight is missing.* pass replace_head=True"):
        load_checkpoint(untouched, headless)
    with pytest.raises(ValueError, match=r"head\.fc\.weight is not in the model"):
        load_checkpoint(_model(num_classes=0), untouched.state_dict())


@pytest.mark.parametrize("classes", [9, 6, 0])
def test_the_models_own_classifier_can_stay(classes):
    source, model = _model(num_classes=9), _model(num_classes=classes)
    head = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("head.")}
    report = load_checkpoint(model, _official(source), replace_head=True)
    assert report.head_replaced
    assert str(report).endswith("the classifier left as the model had it")
    state_dict = model.state_dict()
    assert all(torch.equal(state_dict[k], v) for k, v in head.items())
    own = source.state_dict()
    assert all(torch.equal(state_dict[k], own[k]) for k in state_dict if k not in head)


def test_misshapen_missing_and_unexpected_names_are_listed(untouched):
    state_dict = _official(_model())
    state_dict["norm.weight"] = torch.zeros(3)
    del state_dict["patch_embed.norm.bias"]
    state_dict["extra.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(untouched, state_dict)
    assert str(caught.value) == (
        "state dict: does not fit the model: "
        "norm.weight is (3,) in the checkpoint and (64,) in the model; "
        "stem.norm.bias is missing from the checkpoint; extra.weight is not in the model"
    )


def test_a_checkpoint_of_another_model_is_recognised(untouched):
    with pytest.raises(ValueError, match=r"none of the model's names, but .*'layer1\.0\.conv1"):
        state_dict = create_model("resnet10t").state_dict()
        load_checkpoint(untouched, {k: v for k, v in state_dict.items() if "layer" in k})


# --- files that are no checkpoints ---------------------------------------------------------------


class _Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_file_is_never_run(untouched, tmp_path):
    victim = tmp_path / "victim"
    wrapped, plain = tmp_path / "wrapped.pth", tmp_path / "plain.pkl"
    torch.save({"state_dict": {"norm.weight": _Bomb(victim)}}, wrapped)
    plain.write_bytes(pickle.dumps(_Bomb(victim)))
    for file in (wrapped, plain):
        with pytest.raises(ValueError, match=f"{re.escape(str(file))}: refused") as caught:
            load_checkpoint(untouched, file)
        assert "nothing in it was run" in str(caught.value)
        with pytest.raises(Exception, match=r"(?i)weights.only"):
            _model(pretrained=True, pretrained_cfg_overlay={"file": str(file)})
        assert not victim.exists()
    torch.load(wrapped, weights_only=False)  # what the refusal prevents
    assert victim.exists()


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty.pth", "is empty"),
        ("empty.safetensors", "is empty"),
        ("truncated.pth", "truncated, or not a PyTorch checkpoint"),
        ("truncated.safetensors", "truncated, or not a safetensors file"),
        ("text.pth", "no PyTorch checkpoint"),
        ("text.safetensors", "truncated, or not a safetensors file"),
        ("image.png", "no PyTorch checkpoint|not a PyTorch checkpoint"),
        ("list.pth", "holds no state dict .*, but list"),
        ("tensor.pth", "holds no state dict .*, but Tensor"),
        ("no_tensors.pth", "holds no state dict .*, but nothing"),
        ("optimizer.pth", "is no state dict: its entry 'epoch' is int, not a tensor"),
        ("numbers.pth", "is no state dict: its entry 3 is Tensor"),
        ("folder", "is a folder, not a checkpoint file"),
    ],
)
def test_broken_files_are_named(name, message, untouched, tmp_path):
    path = tmp_path / name
    state_dict = _model().state_dict()
    kind = path.stem
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("<html><body>Not found</body></html>")
    elif kind == "image":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    elif path.suffix == ".safetensors":
        save_file(state_dict, path)
        _truncated(path)
    else:
        contents = {
            "truncated": state_dict,
            "list": [1, 2],
            "tensor": torch.zeros(3),
            "no_tensors": {"model": {}},
            "optimizer": {"epoch": 3, "weight": torch.zeros(3)},
            "numbers": {3: torch.zeros(3)},
        }
        torch.save(contents[kind], path)
        if kind == "truncated":
            _truncated(path)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(untouched, path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("suffix", [".pth", ".legacy.pth", ".safetensors"])
def test_damaged_files_load_or_are_named(suffix, tmp_path):
    """Bytes overwritten anywhere: whatever the parsers raise becomes an error with the name."""
    model, file = _model(), tmp_path / f"damaged{suffix}"
    if suffix == ".safetensors":
        save_file(model.state_dict(), file)
    else:
        torch.save(model.state_dict(), file, _use_new_zipfile_serialization="legacy" not in suffix)
    intact, draw = file.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(intact)
        for _ in range(20):
            # Where the structure is: the head of the file, and the directory of a zip at its end.
            position = draw.choice([draw.randrange(3000), -draw.randrange(1, 9000)])
            damaged[position] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            load_checkpoint(model, file)
        except ValueError as error:
            assert str(error).startswith(str(file))
            refused += 1
    assert refused > 20


def test_wrong_arguments_are_named(untouched, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such checkpoint file"):
        load_checkpoint(untouched, tmp_path / "none.pth")
    with pytest.raises(TypeError, match=r"source must be a path, an address or .*, got int"):
        load_checkpoint(untouched, 7)
    with pytest.raises(TypeError, match="model must be a module, got str"):
        load_checkpoint("nat_mini", untouched.state_dict())
    with pytest.raises(ValueError, match=r"state dict: holds no state dict .*, but nothing"):
        load_checkpoint(untouched, {})


def test_where_nothing_can_be_downloaded_the_error_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"agent_deit_tiny: no weights .*'file'"):
        create_model("agent_deit_tiny", pretrained=True)
