"""Window attention against formulations of its own: partitions, rolls, unfolding, loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitarium.ops import window_attention
from vitarium.ops.tiles import cut
from vitarium.ops.windows import Block, axis_pattern, plain_axis, tiles_for

CPU = torch.device("cpu")


def rule(length: int, block: Block, token: int) -> set[int]:
    """The keys that a token sees, counted in tokens from the first token of the map."""
    w, d, shift, halo, border = block
    group, position = token % d, token // d
    first = position - (position - shift) % w
    found = set()
    for other in range(first - halo, first + w + halo):
        key = other * d + group
        if -border * d <= key < length + border * d:
            found.add(key)
    return found


@st.composite
def blocks(draw: Any, longest: int = 40, widest: int = 9, sparsest: int = 5) -> tuple[int, Block]:
    w = draw(st.integers(1, widest))
    halo = draw(st.integers(0, 4))
    border = draw(st.sampled_from((0, halo)))
    block = Block(w, draw(st.integers(1, sparsest)), draw(st.integers(0, w - 1)), halo, border)
    return draw(st.integers(1, longest)), block


@settings(max_examples=200, deadline=None)
@given(blocks())
def test_windows(axis: tuple[int, Block]) -> None:
    """Definition, tiles and exportable tiles show every query the keys of the rule."""
    length, block = axis
    d, border = block.dilation, block.border
    expected = [rule(length, block, token) for token in range(length)]
    seen, offset = axis_pattern(length, block, CPU)
    for token in range(length):
        found = seen[token].nonzero().flatten() - border * d
        assert set(found.tolist()) == expected[token]
        for key in found.tolist():
            assert offset[token, key + border * d] == (key - token) // d
            assert abs(offset[token, key + border * d]) <= block.reach
    (tiles,) = tiles_for((length,), (block,))
    plain = plain_axis(length, block, CPU)
    places = [tiles.lead % tiles.queries + p for p in range(-(-length // d))]
    for token in range(length):
        group, position = token % d, token // d
        place = places[position] % tiles.queries
        t, row = divmod(place, tiles.tile)
        start, stop = tiles.patterns[tiles.which[group][t]][row]
        assert 0 <= start < stop <= tiles.halo
        first = position - row - tiles.before
        assert {(first + key) * d + group for key in range(start, stop)} == expected[token]
        t, row = divmod(position + plain.lead, plain.tile)
        bounds = range(int(plain.start[group, t, row]), int(plain.stop[group, t, row]))
        assert {key * d + group for key in bounds} == expected[token]
        origin = t * plain.tile - plain.lead - plain.before
        assert origin <= bounds.start and bounds.stop <= origin + plain.halo


def test_shifted_windows_share_a_tile() -> None:
    """A map of whole windows has no more tiles when they are shifted."""
    axis = tiles_for((56,), (Block(7, 1, 3, 0, 0),))[0]
    assert (axis.tile, axis.tiles, axis.halo) == (7, 8, 7)
    ragged = tiles_for((58,), (Block(7, 1, 3, 0, 0),))[0]
    assert ragged.tiles == 9


def test_tiles_are_cut_where_they_begin() -> None:
    block = Block(4, 1, 1, 0, 0)
    ranges = [[block.keys_seen(p, 9) for p in range(9)]]
    axis = cut(9, 1, 4, ranges, lead=3)
    assert axis.tiles == 3
    assert [axis.patterns[i][0] for i in axis.which[0]] == [(0, 1), (0, 4), (0, 4)]


# --- formulations of papers ----------------------------------------------------------------------


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attend(query: Tensor, key: Tensor, value: Tensor, added: Tensor | None = None) -> Tensor:
    """Dense attention within `(..., tokens, heads, channels)`."""
    query, key, value = (t.transpose(-2, -3) for t in (query, key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if added is not None:
        scores = scores + added
    return (scores.softmax(-1) @ value).transpose(-2, -3)


def dense_bias(table: Tensor, queries: range, keys: range) -> Tensor:
    """`(heads, queries ** 2, keys ** 2)` from a table that begins at the smallest offset."""
    offset = torch.tensor([[k - q for k in keys] for q in queries]) - (keys[0] - queries[-1])
    found = table[:, offset[:, None, :, None], offset[None, :, None, :]]
    return found.flatten(3).flatten(1, 2)


def partition(x: Tensor, w: int) -> Tensor:
    """`(B, H, W, heads, channels)` to `(windows, tokens, heads, channels)`."""
    height, width = x.shape[1:3]
    x = x.unflatten(2, (width // w, w)).unflatten(1, (height // w, w))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def reverse(windows: Tensor, w: int, height: int, width: int) -> Tensor:
    x = windows.unflatten(1, (w, w)).unflatten(0, (-1, height // w, width // w))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def both(
    ours: Any, theirs: Any, tensors: list[Tensor]
) -> None:  # the same output and the same gradients
    found = []
    for function in (ours, theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = function(*leaves)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
        found.append([output, *torch.autograd.grad((output * weights).sum(), leaves)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("shift", [0, 2])
def test_swin(backend: str, shift: int) -> None:
    """Roll, partition, mask of regions (Swin Transformer, section 3.2), and roll back."""
    w, height, width, heads = 5, 10, 15, 2
    shape = (2, height, width, heads, 8)
    tensors = draw(shape, shape, shape, (heads, 2 * w - 1, 2 * w - 1))
    region = torch.zeros(height, width)
    bounds = (slice(0, -w), slice(-w, -shift or None), slice(-shift, None) if shift else slice(0))
    for number, (rows, columns) in enumerate(itertools.product(bounds, bounds)):
        region[rows, columns] = number
    ids = partition(region[None, :, :, None, None], w).flatten(1)
    hidden = torch.where(ids[:, :, None] == ids[:, None], 0.0, -math.inf)[:, None].double()

    def swin(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        parts = [partition(t.roll((-shift, -shift), (1, 2)), w) for t in (query, key, value)]
        added = dense_bias(table, range(w), range(w)) + hidden.repeat(2, 1, 1, 1)
        return reverse(attend(*parts, added), w, height, width).roll((shift, shift), (1, 2))

    def ours(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        return window_attention(query, key, value, w, shift=shift, bias=table, backend=backend)

    both(ours, swin, tensors)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_maxvit_grid(backend: str) -> None:
    """A grid of 3 x 4 tokens spread over the map (MaxViT, section 3.2)."""
    grid, steps, heads = (3, 4), (4, 2), 2
    shape = (2, grid[0] * steps[0], grid[1] * steps[1], heads, 8)

    def maxvit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = []
        for x in (query, key, value):
            x = x.unflatten(2, (grid[1], steps[1])).unflatten(1, (grid[0], steps[0]))
            parts.append(x.permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 4).flatten(0, 2))
        x = attend(*parts).unflatten(1, grid).unflatten(0, (-1, *steps))
        return x.permute(0, 3, 1, 4, 2, 5, 6).flatten(3, 4).flatten(1, 2)

    def ours(*tensors: Tensor) -> Tensor:
        return window_attention(*tensors, grid, dilation=steps, backend=backend)

    both(ours, maxvit, draw(shape, shape, shape))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("explicit", [False, True])
def test_halo(backend: str, explicit: bool) -> None:
    """Unfolded overlapping blocks (HaloNet, section 2.2): zero padding seen, or masked."""
    w, halo, height, width, heads = 4, 2, 8, 12, 2
    shape = (2, height, width, heads, 8)
    size = w + 2 * halo
    tensors = draw(shape, shape, shape, (heads, w + size - 1, w + size - 1))

    def unfold(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, halo, halo, halo, halo))
        x = x.unfold(1, size, w).unfold(2, size, w)  # (B, rows, columns, heads, D, size, size)
        return x.permute(0, 1, 2, 5, 6, 3, 4).flatten(3, 4).flatten(0, 2)

    outside = unfold(torch.ones(2, height, width, 1, 1))[..., 0, 0] == 0
    hidden = torch.zeros(outside.shape, dtype=torch.float64)
    if not explicit:
        hidden = hidden.masked_fill(outside, -math.inf)

    def halonet(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        added = dense_bias(table, range(halo, halo + w), range(size)) + hidden[:, None, None]
        blocks = attend(partition(query, w), unfold(key), unfold(value), added)
        return reverse(blocks, w, height, width)

    def ours(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        if explicit:
            key, value = (F.pad(t, (0, 0, 0, 0, halo, halo, halo, halo)) for t in (key, value))
        return window_attention(query, key, value, w, halo=halo, bias=table, backend=backend)

    both(ours, halonet, tensors)


# --- drawn calls ---------------------------------------------------------------------------------


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    rank = draw(st.integers(1, 3))
    limits = ((40, 9, 5), (9, 5, 3), (4, 3, 2))[rank - 1]
    pairs = [draw(blocks(*limits)) for _ in range(rank)]
    explicit = draw(st.booleans())
    heads_kv = draw(st.integers(1, 2))
    return {
        "spatial": tuple(length for length, _ in pairs),
        "blocks": tuple(block._replace(border=block.halo if explicit else 0) for _, block in pairs),
        "batch": draw(st.integers(1, 3)),
        "heads": (heads_kv * draw(st.integers(1, 2)), heads_kv),
        "dims": (draw(st.integers(1, 20)), draw(st.integers(1, 20))),
        "bias": draw(st.booleans()),
    }


def by_loops(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, blocks: tuple[Block, ...]
) -> Tensor:
    """One query after the other."""
    spatial, group = query.shape[1:-2], query.shape[-2] // key.shape[-2]
    output = query.new_zeros(*query.shape[:-1], value.shape[-1])
    for token in itertools.product(*map(range, spatial)):
        seen = [sorted(rule(*args)) for args in zip(spatial, blocks, token)]
        cells = list(itertools.product(*seen))
        at = [
            tuple(i + b.border * b.dilation for i, b in zip(cell, blocks)) for cell in cells
        ]  # in the key tensor
        k = torch.stack([key[(slice(None), *place)] for place in at], 1)
        v = torch.stack([value[(slice(None), *place)] for place in at], 1)
        k, v = (t.repeat_interleave(group, 2) for t in (k, v))
        q = query[(slice(None), *token)]
        scores = torch.einsum("bhc,bnhc->bhn", q, k) * q.shape[-1] ** -0.5
        if bias is not None:
            offsets = [
                tuple((i - t) // b.dilation + b.reach for i, t, b in zip(cell, token, blocks))
                for cell in cells
            ]
            scores = scores + torch.stack([bias[(slice(None), *o)] for o in offsets], 1)
        mixed = torch.einsum("bhn,bnhc->bhc", scores.softmax(-1), v)
        output[(slice(None), *token)] = mixed
    return output


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(calls(), st.sampled_from([1, 1 << 12, 1 << 20]))
def test_drawn_calls(monkeypatch: pytest.MonkeyPatch, call: dict[str, Any], chunk: int) -> None:
    """Whatever the shape, and however the work is cut into chunks, all paths agree."""
    monkeypatch.setattr("vitarium.ops.plan.CPU_CHUNK", chunk)
    spatial, blocks = call["spatial"], call["blocks"]
    keys = tuple(n + 2 * b.border * b.dilation for n, b in zip(spatial, blocks))
    (heads, heads_kv), (head_dim, value_dim) = call["heads"], call["dims"]
    batch = call["batch"]
    shapes = [
        (batch, *spatial, heads, head_dim),
        (batch, *keys, heads_kv, head_dim),
        (batch, *keys, heads_kv, value_dim),
    ]
    if call["bias"]:
        shapes.append((heads, *(2 * block.reach + 1 for block in blocks)))
    tensors = draw(*shapes)
    window_size, dilation, shift, halo, _ = zip(*blocks)

    def run(backend: str) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = window_attention(
            *leaves[:3],
            window_size,
            dilation=dilation,
            shift=shift,
            halo=halo,
            bias=leaves[3] if call["bias"] else None,
            backend=backend,
        )
        grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
        return [output, *torch.autograd.grad(output, leaves, grad)]

    expected = run("reference")
    looped = by_loops(*tensors[:3], tensors[3] if call["bias"] else None, blocks)
    torch.testing.assert_close(expected[0], looped, rtol=1e-9, atol=1e-9)
    for found, wanted in zip(run("torch"), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    with monkeypatch.context() as patch:
        patch.setattr("vitarium.ops.dispatch.plain_aten", lambda: True)
        for found, wanted in zip(run("torch"), expected):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [30.0, 3000.0])
def test_extreme_scores(dtype: torch.dtype, size: float) -> None:
    """Scores that no power of two holds: the maximum of each query is taken off first."""
    query, key, value = (t.to(dtype) for t in draw(*[(1, 8, 8, 2, 16)] * 3))
    key = key * size
    exact = window_attention(query.double(), key.double(), value.double(), 4, backend="reference")
    plain = window_attention(query, key, value, 4, backend="reference")
    found = window_attention(query, key, value, 4, backend="torch")
    assert found.isfinite().all()
    error = (found.double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max() + 1e-6


def test_not_a_number_goes_no_further_than_its_window() -> None:
    query, key, value = draw(*[(1, 8, 8, 1, 16)] * 3)
    key[0, 0, 0, 0, 0] = math.nan
    bad = window_attention(query, key, value, 4).isnan().any(-1)[0, :, :, 0]
    assert bad[:4, :4].all()
    assert not bad[4:].any() and not bad[:, 4:].any()


def test_operations_are_those_of_the_mask() -> None:
    """The formula equals what the definition's mask lets through, and counts no tile's waste."""
    cases = [
        ((9, 11), (Block(4, 1, 3, 0, 0), Block(4, 2, 0, 1, 0))),
        ((37,), (Block(7, 3, 2, 2, 2),)),
        ((4, 6, 7), (Block(2, 1, 1, 1, 1), Block(4, 3, 0, 0, 0), Block(3, 1, 1, 2, 2))),
    ]
    for spatial, blocks in cases:
        keys = tuple(n + 2 * b.border * b.dilation for n, b in zip(spatial, blocks))
        pairs = math.prod(
            int(axis_pattern(length, block, CPU)[0].sum()) for length, block in zip(spatial, blocks)
        )
        query = torch.empty(2, *spatial, 3, 16, device="meta")
        key = torch.empty(2, *keys, 1, 16, device="meta")
        window_size, dilation, shift, halo, _ = zip(*blocks)
        with FlopCounterMode(display=False) as counter:
            window_attention(
                query, key, key[..., :8], window_size, dilation=dilation, shift=shift, halo=halo
            )
        assert counter.get_total_flops() == 2 * 2 * 3 * pairs * (16 + 8)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": tensor(8, 8, 16)}, ValueError, r"query has shape \(8, 8, 16\)"),
        ({"window_size": 0}, ValueError, "window_size=0 must be at least 1"),
        ({"window_size": 2.0}, TypeError, "window_size=2.0 must hold int"),
        ({"window_size": (2, 2, 2)}, ValueError, "has 3 entries"),
        ({"dilation": 0}, ValueError, "dilation=0 must be at least 1"),
        ({"shift": -1}, ValueError, "shift=-1 must be at least 0"),
        ({"shift": (0, 4)}, ValueError, "shift=4 along W must be below window_size=4"),
        ({"halo": -2}, ValueError, "halo=-2 must be at least 0"),
        (
            {"key": tensor(1, 9, 8, 2, 16), "value": tensor(1, 9, 8, 2, 16)},
            ValueError,
            r"key has the map \(9, 8\); allowed is \(8, 8\) of query",
        ),
        (
            {"key": tensor(1, 9, 8, 2, 16), "value": tensor(1, 9, 8, 2, 16), "halo": (1, 2)},
            ValueError,
            r"or \(10, 12\) with a border of halo \* dilation tokens",
        ),
        ({"value": tensor(1, 8, 9, 2, 16)}, ValueError, r"value has shape \(1, 8, 9, 2, 16\)"),
        ({"key": tensor(1, 8, 8, 2, 8)}, ValueError, "key has head_dim 8, query 16"),
        ({"value": tensor(1, 8, 8, 1, 16)}, ValueError, "value has 1 heads, key 2"),
        (
            {"key": tensor(1, 8, 8, 3, 16), "value": tensor(1, 8, 8, 3, 16)},
            ValueError,
            "key has 3 heads",
        ),
        ({"key": tensor(1, 8, 8, 2, 16).half()}, TypeError, "key has dtype torch.float16"),
        ({"bias": tensor(2, 7, 9)}, ValueError, r"bias has shape \(2, 7, 9\).*\(2, 7, 7\)"),
        ({"bias": tensor(2, 7, 7), "halo": 1}, ValueError, r"allowed is \(2, 9, 9\)"),
        ({"bias": "table"}, TypeError, "bias must be a tensor or None, got str"),
        ({"scale": math.inf}, ValueError, "scale=inf must be finite"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"backend": "natten"}, ValueError, "backend='natten' does not exist for this operator"),
    ],
)
def test_wrong_calls(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    shape = (1, 8, 8, 2, 16)
    call = {"query": tensor(*shape), "key": tensor(*shape), "value": tensor(*shape)}
    call |= {"window_size": 4, **arguments}
    with pytest.raises(error, match=f"window_attention: .*{message}"):
        window_attention(**call)


def test_a_dilation_beyond_the_map_leaves_every_token_alone() -> None:
    query, key, value = torch.randn(3, 2, 5, 4, 1, 8, dtype=torch.float64).unbind(0)
    for backend in ("reference", "torch"):
        output = window_attention(query, key, value, 3, dilation=10**9, shift=1, backend=backend)
        torch.testing.assert_close(output, value)
