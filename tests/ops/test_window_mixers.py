"""Mixers of windows, grids and halos: what their papers' code does on maps of awkward sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from vitarium.ops import (
    DynamicPositionBias,
    GridAttention,
    HaloAttention,
    LongShortDistanceAttention,
    Mixer,
    MultiAxisAttention,
    OverlappingCrossAttention,
    WindowAttention,
    build_mixer,
)

SIZES = [(9, 13), (8, 12), (5, 3), (1, 10), (3, 17)]


def _drawn(mixer: Mixer) -> Mixer:
    """The mixer in float64 with parameters of which none is without effect."""
    torch.manual_seed(0)
    mixer = mixer.double().eval()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer


def _map(*size: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *size, generator=generator, dtype=torch.float64)


def _dense(mixer: Any, x: Tensor, group: Tensor, place: Tensor, bias: Tensor) -> Tensor:
    """Attention among tokens of one group, with a bias `(heads, N, N)`, over flattened maps."""
    tokens = x.flatten(1, 2)
    query, key, value = (
        mixer.qkv(tokens).unflatten(-1, (3, mixer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    )
    scores = query @ key.mT * mixer.scale + bias
    seen = (group[:, None] == group) & (place[:, None] == place)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    output = (weights @ value).transpose(1, 2).flatten(-2)
    return mixer.proj(output).unflatten(1, x.shape[1:3])


def _swin_bias(mixer: WindowAttention, offsets: list[Tensor]) -> Tensor:
    """The official lookup: query minus key, row by row through the table."""
    rows, columns = (
        (offset + size - 1).clamp(0, 2 * size - 2)
        for offset, size in zip(offsets, mixer.window_size)
    )
    index = rows * (2 * mixer.window_size[1] - 1) + columns
    return mixer.relative_position_bias_table[index].permute(2, 0, 1)


def _axes(height: int, width: int) -> list[Tensor]:
    return [part.flatten() for part in torch.meshgrid(torch.arange(height), torch.arange(width),
                                                      indexing="ij")]  # fmt: skip


def _swin(mixer: WindowAttention, x: Tensor) -> Tensor:
    """Shifted windows as masks over all pairs of tokens."""
    group, offsets = torch.zeros(x.shape[1] * x.shape[2], dtype=torch.long), []
    for axis, length, size, shift in zip(
        _axes(*x.shape[1:3]), x.shape[1:3], mixer.window_size, mixer.shift_size
    ):
        window = (axis - (shift if length > size else 0)).div(size, rounding_mode="floor")
        group = group * 1000 + window + 1
        offsets.append(axis[:, None] - axis)
    return _dense(mixer, x, group, torch.zeros_like(group), _swin_bias(mixer, offsets))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shift_size", [0, 1, (3, 2)])
@torch.no_grad()
def test_windows_of_a_padded_map(shift_size: Any, size: tuple[int, int]) -> None:
    arguments: dict[str, Any] = {"num_heads": 2, "window_size": (4, 3), "shift_size": shift_size}
    mixer = _drawn(WindowAttention(16, padding="mask", **arguments))
    x = _map(*size, 16)
    torch.testing.assert_close(mixer(x), _swin(mixer, x))
    # Padding first is the same attention over a map that has the zeros.
    other = _drawn(WindowAttention(16, padding="zeros_before_shift", **arguments))
    after = [-n % w if n > w else 0 for n, w in zip(size, (4, 3))]
    padded = F.pad(x, (0, 0, 0, after[1], 0, after[0]))
    expected = _swin(mixer, padded)[:, : size[0], : size[1]]
    torch.testing.assert_close(other(x), expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("padding", ["zeros", "mask"])
@torch.no_grad()
def test_grid_of_any_map(padding: str, size: tuple[int, int]) -> None:
    mixer = _drawn(GridAttention(16, num_heads=2, grid_size=(4, 3), padding=padding))
    x = padded = _map(*size, 16)
    if padding == "zeros":
        after = [-n % g if n > g else 0 for n, g in zip(size, (4, 3))]
        padded = F.pad(x, (0, 0, 0, after[1], 0, after[0]))
    group, offsets = torch.zeros(padded.shape[1] * padded.shape[2], dtype=torch.long), []
    for axis, length, grid in zip(_axes(*padded.shape[1:3]), size, (4, 3)):
        step = -(-length // grid)
        group = group * 1000 + axis % step
        offsets.append(axis[:, None] // step - axis // step)
    expected = _dense(mixer, padded, group, torch.zeros_like(group), _swin_bias(mixer, offsets))
    torch.testing.assert_close(mixer(x), expected[:, : size[0], : size[1]])


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_halo_of_any_map(size: tuple[int, int]) -> None:
    """A map that blocks do not divide goes on with zeros, as in timm's of the padded map."""
    arguments = {"num_heads": 2, "block_size": 4, "halo_size": 2}
    mixer = _drawn(HaloAttention(16, **arguments))
    theirs = HaloAttn(16, **arguments).double().eval()
    state = {k: v[..., None, None] if k.endswith("weight") else v
             for k, v in mixer.state_dict().items()}  # fmt: skip
    theirs.load_state_dict(state)
    x = _map(*size, 16)
    padded = F.pad(x, (0, 0, 0, -size[1] % 4, 0, -size[0] % 4))
    expected = theirs(padded.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(mixer(x), expected[:, : size[0], : size[1]])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("window_size", "overlap_ratio"), [(4, 0.5), (3, 0.7), (2, 3.0), (4, 0.0)])
@torch.no_grad()
def test_overlapping_windows(window_size: int, overlap_ratio: float, size: tuple[int, int]) -> None:
    """The paper's formulas: unfolded keys, and the index that wraps around the table."""
    mixer = _drawn(
        OverlappingCrossAttention(
            24, num_heads=3, window_size=window_size, overlap_ratio=overlap_ratio
        )
    )
    x = _map(*size, 24)
    longer = window_size + int(window_size * overlap_ratio)
    after = [-n % window_size for n in size]
    query, key, value = (
        F.pad(part, (0, after[1], 0, after[0]))
        for part in mixer.qkv(x).permute(0, 3, 1, 2).chunk(3, dim=1)
    )

    def windows(part: Tensor, side: int) -> Tensor:
        part = F.unfold(part, side, stride=window_size, padding=(side - window_size) // 2)
        return part.unflatten(1, (3, -1, side * side)).permute(0, 4, 1, 3, 2)

    near = torch.cartesian_prod(torch.arange(window_size), torch.arange(window_size))
    far = torch.cartesian_prod(torch.arange(longer), torch.arange(longer))
    offset = far - near[:, None] + window_size - longer + 1
    index = offset[..., 0] * (window_size + longer - 1) + offset[..., 1]
    bias = mixer.relative_position_bias_table[index].permute(2, 0, 1)
    scores = windows(query, window_size) @ windows(key, longer).mT * mixer.scale + bias
    output = scores.softmax(-1) @ windows(value, longer)
    output = output.permute(0, 2, 4, 3, 1).flatten(1, 3)
    output = F.fold(output, query.shape[-2:], window_size, stride=window_size)
    expected = mixer.proj(output.permute(0, 2, 3, 1)[:, : size[0], : size[1]])
    torch.testing.assert_close(mixer(x), expected)


def test_small_maps_that_are_not_square_are_one_group_in_dense_prediction() -> None:
    """As the official code for detection: the map is padded to a square, which is not seen."""
    arguments = {"num_heads": 2, "group_size": 6, "adaptive_interval": True, "lsda_flag": 1}
    mixer = _drawn(LongShortDistanceAttention(32, dense_prediction=True, **arguments))
    square = _drawn(LongShortDistanceAttention(32, num_heads=2, group_size=(9, 9)))
    square.load_state_dict(mixer.state_dict())
    x = _map(5, 9, 32)
    torch.testing.assert_close(mixer(x), square(x))
    assert mixer.layout(13, 30).dilation == (5, 5)  # the longer side in groups of 6
    assert LongShortDistanceAttention(32, **arguments).layout(13, 30).dilation == (3, 3)


MAPS_OF = [
    (WindowAttention, {"window_size": 4, "shift_size": 3}),
    (WindowAttention, {"window_size": 4, "shift_size": 3, "padding": "mask"}),
    (GridAttention, {"grid_size": 3, "head_first": True}),
    (LongShortDistanceAttention, {"group_size": 3, "interval": 2, "lsda_flag": 1, "pad_type": 1}),
    (LongShortDistanceAttention, {"group_size": 4, "pad_type": 1, "no_mask": True}),
    (HaloAttention, {"block_size": 4, "halo_size": 2}),
    (OverlappingCrossAttention, {"window_size": 4}),
    (MultiAxisAttention, {"window_size": 2, "grid_size": 3}),
    (MultiAxisAttention, {"window_size": 2, "grid_size": 3, "parallel": True}),
]


@pytest.mark.parametrize(("mixer", "arguments"), MAPS_OF)
@pytest.mark.parametrize("query", [(0, 0), (10, 3), (6, 12)], ids=str)
def test_attention_map_shows_what_the_output_depends_on(
    mixer: type[Mixer], arguments: dict[str, Any], query: tuple[int, int]
) -> None:
    model = _drawn(mixer(32, num_heads=2, **arguments))
    x = _map(11, 13, 32).requires_grad_()
    row, column = query
    output = model(x)[:, row, column]
    (gradient,) = torch.autograd.grad(output, x, torch.randn_like(output))
    weights = model.attention_map(x, query)
    assert weights.shape == (2, 4 if arguments.get("parallel") else 2, 11, 13)
    torch.testing.assert_close((weights > 0).any(1), (gradient != 0).any(-1))
    assert (weights.sum((-1, -2)) <= 1 + 1e-9).all()


def test_context_has_the_windows_of_the_map() -> None:
    """Keys and values are the second map's: what it is at a place is not seen from elsewhere."""
    mixer = _drawn(WindowAttention(16, num_heads=2, window_size=4, shift_size=2, head_first=True))
    x, context = _map(8, 12, 16), _map(8, 12, 16, seed=2)
    output = mixer(x, context)
    torch.testing.assert_close(mixer(x, x), mixer(x))
    changed = context.clone()
    changed[:, 2:6, 2:6] += 1
    differs = (mixer(x, changed) != output).any(-1).any(0)
    assert differs[2:6, 2:6].all() and differs.sum() == 16
    with pytest.raises(ValueError, match=r"context has the map \(8, 11\)"):
        mixer(x, context[:, :, 1:])


def test_onnx_of_any_size(tmp_path: Path) -> None:
    """Size arithmetic means the same there, where integer division rounds towards zero."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    module = GridAttention(16, num_heads=2, grid_size=3).eval()
    path = tmp_path / "mixer.onnx"
    auto = torch.export.Dim.AUTO
    torch.onnx.export(
        module,
        (torch.randn(1, 11, 13, 16),),
        path,
        dynamo=True,
        dynamic_shapes=({1: auto, 2: auto},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path)
    for size in ((11, 13), (14, 19)):
        x = torch.randn(1, *size, 16)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), module(x).detach())


def test_index_buffers_of_older_state_dicts() -> None:
    mixer = WindowAttention(16, num_heads=2, window_size=4)
    state = mixer.state_dict()
    assert state["relative_position_bias_table"].shape == (49, 2)
    state["relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    mixer.load_state_dict(state)
    block = MultiAxisAttention(32, window_size=4, rel_pos_type="bias_tf")
    state = block.state_dict()
    table = state.pop("attn_grid.attn.relative_position_bias_table").clone()
    assert table.shape == (1, 7, 7)
    state["attn_grid.attn.rel_pos.relative_position_bias_table"] = table + 1
    state["attn_grid.attn.rel_pos.height_lookup"] = torch.zeros(4, 4, 7)
    block.load_state_dict(state)
    torch.testing.assert_close(block.attn_grid.attn.relative_position_bias_table, table + 1)


def test_dynamic_position_bias_with_residuals() -> None:
    torch.manual_seed(0)
    plain = DynamicPositionBias(16, 3)
    residual = DynamicPositionBias(16, 3, residual=True)
    residual.load_state_dict(plain.state_dict())
    offsets = torch.randn(5, 2)
    x = residual.pos_proj(offsets)
    x = x + residual.pos1(x)
    x = x + residual.pos2(x)
    torch.testing.assert_close(residual(offsets), residual.pos3(x))
    assert not torch.allclose(plain(offsets), residual(offsets))


def test_dropped_paths() -> None:
    """In training a branch is left out of a sample, or weighted by what is kept."""
    torch.manual_seed(0)
    block = MultiAxisAttention(32, window_size=4, drop_path=0.5, no_block_attn=True)
    for part in (block.attn_grid.attn.proj, block.attn_grid.mlp.fc2):
        nn.init.zeros_(part.weight)
        nn.init.ones_(part.bias)
    x = torch.randn(64, 4, 4, 32)
    difference = block(x) - x
    assert set(difference.round(decimals=3).unique().tolist()) == {0.0, 2.0, 4.0}
    torch.testing.assert_close(block.eval()(x), x + 2)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("window", {"num_heads": 5}, "num_heads=5 must divide dim=32"),
        ("window", {"num_heads": 2, "head_dim": 0}, "head_dim=0 must be at least 1"),
        (
            "window",
            {"num_heads": 2, "window_size": 4, "shift_size": 4},
            "shift_size=4 must be less",
        ),
        ("window", {"num_heads": 2, "window_size": 0}, "window_size=0 must be at least 1"),
        ("window", {"num_heads": 2, "padding": "edge"}, "padding='edge'; allowed are zeros"),
        ("window", {"num_heads": 2, "rel_pos_type": "rope"}, "rel_pos_type='rope'; allowed are"),
        ("grid", {"num_heads": 2, "grid_size": (3, 0)}, r"grid_size=\(3, 0\) must be at least 1"),
        ("multi_axis", {"dim_head": 12}, "dim_head=12 must divide dim=32"),
        ("multi_axis", {"parallel": True, "no_block_attn": True}, "parallel=True needs"),
        ("multi_axis", {"act_layer": "relu"}, "act_layer='relu'; allowed are gelu"),
        ("long_short_distance", {"num_heads": 2, "lsda_flag": 2}, "lsda_flag=2; allowed are 0"),
        ("long_short_distance", {"num_heads": 2, "group_size": 0}, "group_size=0 must be"),
        ("long_short_distance", {"num_heads": 2, "interval": 0}, "interval=0 must be"),
        ("halo", {"num_heads": 3}, "num_heads=3 must divide dim=32"),
        ("halo", {"num_heads": 2, "halo_size": -1}, "halo_size=-1 must be at least 0"),
        ("halo", {"num_heads": 32, "qk_ratio": 0.5}, "dim_head=0 must be at least 1"),
        ("overlapping_cross", {"num_heads": 2, "window_size": 6}, "allowed are even numbers"),
        ("overlapping_cross", {"num_heads": 2, "overlap_ratio": -1.0}, "allowed are even numbers"),
    ],
)
def test_errors(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer((name, arguments), 32)


def test_arguments_of_the_grid() -> None:
    for argument in ("window_size", "shift_size"):
        with pytest.raises(TypeError, match=f"{argument} is no argument"):
            GridAttention(32, num_heads=2, **{argument: 3})
    with pytest.raises(ValueError, match="position_bias needs dim >= 16, got dim=8"):
        LongShortDistanceAttention(8, num_heads=2)
    with pytest.raises(ValueError, match="dim=3 must be at least 4"):
        DynamicPositionBias(3, 2)
