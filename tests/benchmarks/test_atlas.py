"""The atlas: formulas against counted operations, and what positions are read."""

import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from vitarium.benchmarks import atlas, atlas_picture, flops, record
from vitarium.benchmarks.scaling import bench_scaling
from vitarium.ops import MIXERS, Mixer
from vitarium.zoo.testbed_settings import SETTINGS


class OnImage(nn.Module):
    """A mixer as a model of images whose pixels are the tokens of its map."""

    def __init__(self, mixer: Mixer, side: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.pretrained_cfg = {"input_size": (mixer.dim, side, side)}

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x.permute(0, 2, 3, 1))


def _sides(name: str) -> list[int]:
    """Two that all windows divide, so that nothing is padded."""
    sizes = [v for v in MIXERS[name].examples[0].values() if isinstance(v, int) and 1 < v < 9]
    unit = math.lcm(*sizes)
    return [unit * -(-48 // unit), 2 * unit * -(-48 // unit)]


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_formulas_are_what_is_counted(name):
    example = dict(MIXERS[name].examples[0])
    for side in _sides(name):
        mixer = MIXERS[name](**example).eval()
        counted = flops.count(OnImage(mixer, side)).macs
        assert atlas.multiply_adds(name, example, (side, side)) == pytest.approx(counted, rel=0.04)


def test_formulas_are_written_with_letters():
    assert atlas.formula("neighborhood") == "4NC² + 2Nk²C"
    assert atlas.formula("ulsam") == "no matrix products"
    assert atlas.letters_of(["neighborhood", "window"]) == {
        "w": ["window_size"],
        "k": ["kernel_size"],
    }
    for name in SETTINGS:
        assert len(atlas.formula(name)) < 90 and "_" not in atlas.formula(name), name


def _reads(name: str) -> tuple[int, int]:
    reads, reached = atlas.what_is_read(name)
    assert reads.shape == reached.shape == (atlas.SIDE, atlas.SIDE) and reads.max() == 1
    return int((reads > 0).sum()), int(reached.sum())


@pytest.mark.parametrize(
    ("name", "attended", "reached"),
    [
        ("attention", 256, 256),
        ("neighborhood", 9, 9),  # a window of 3
        ("window", 16, 16),  # a window of 4
        ("grid", 16, 16),  # a grid of 4
        ("cross_shaped", 31, 31),  # a row and a column
        ("channel", 1, 256),  # its own values, by weights of all tokens
        ("lightning", 6 * 16 + 10, 6 * 16 + 10),  # all before it
    ],
)
def test_what_is_read_is_what_the_definition_says(name, attended, reached):
    assert _reads(name) == (attended, reached)


def test_the_window_of_a_position_lies_around_it():
    reads, _ = atlas.what_is_read("neighborhood")
    row, column = atlas.QUERY
    assert (reads[row - 1 : row + 2, column - 1 : column + 2] > 0).all()
    reads, _ = atlas.what_is_read("grid")
    assert (reads[row % 4 :: 4, column % 4 :: 4] > 0).all()


def test_without_an_attention_map_the_gradient_stands(monkeypatch):
    def refuse(self, x, row, column):
        raise NotImplementedError

    monkeypatch.setattr(MIXERS["window"], "_attention_map", refuse)
    assert _reads("window") == (16, 16)


def test_drawing_changes_no_random_state():
    before = torch.get_rng_state()
    atlas.what_is_read("ulsam")
    assert torch.equal(before, torch.get_rng_state())


def test_the_picture_has_a_panel_per_mixer_with_its_exponent(tmp_path, monkeypatch):
    monkeypatch.setattr(atlas, "SEEDS", 1)
    records = bench_scaling(["window"], device="cpu", sides=(8, 16), seconds=0.0)
    other = record.read("benchmarks/results/amd-epyc/mixers.jsonl")[:3]
    assert atlas.scaling_records([*other, *records]) == records
    entries = atlas.entries(["window", "channel"], records)
    assert [e.kind for e in entries] == ["local", "channel"]
    assert entries[0].exponent is not None and entries[1].exponent is None
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: drawn.append(f) or save(f, *a, **k))
    atlas_picture.draw(entries, tmp_path / "atlas.svg", records)
    assert (tmp_path / "atlas.svg").stat().st_size > 10_000
    (figure,) = drawn
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["window", "channel"]
    texts = [ax.texts[0].get_text() for ax in figure.axes]
    assert "attends to 16 of 256\n4NC² + 2Nw²C\nmeasured: time ~ N" in texts[0]
    assert "attends to channels, reaches all" in texts[1] and "measured" not in texts[1]
    with pytest.raises(ValueError, match="at least one"):
        atlas_picture.draw([], tmp_path / "none.png")
