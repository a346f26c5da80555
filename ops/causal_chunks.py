"""Causal linear attention in chunks: the portable path, see `vitarium.ops.causal_linear`.

Tokens come in segments of a few chunks, so that what a segment needs stays in cache. Within a
chunk of C tokens weights are made as in the parallel form. Chunk c meets what came before through
the state at its start, which follows from the chunks t before it in the segment and from the state
S at the segment's start:

    S_c = r^(C c) S + sum_(t < c) r^(C (c - 1 - t)) kv_t,   kv_t = sum_b r^(C - 1 - b) k_b v_b^T

with b counted in chunk t: a matrix of powers times all kv at once. Exponents are never negative.
The reversed form, in which tokens attend to themselves and later ones, serves gradients: chunks
count from the end.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from vitarium.ops.workspace import Workspace

CHUNK = 64  # tokens of a chunk, at most
SEGMENT = 2048  # tokens of a segment, at most, those of all heads and images counted


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of states and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def powers(decays: Sequence[float], exponents: Tensor) -> Tensor:
    """`(heads, *exponents.shape)`, computed in the dtype of `exponents`; 0^0 = 1."""
    base = torch.tensor(decays, dtype=exponents.dtype, device=exponents.device)
    return base.view(-1, *(1,) * exponents.dim()) ** exponents


def count(tokens: int, device: torch.device, first: int = 0) -> Tensor:
    """Numbers of tokens, in float64 where the device has it."""
    precise = torch.float32 if device.type == "mps" else torch.float64
    return torch.arange(first, first + tokens, dtype=precise, device=device)


def decay_matrix(decays: Sequence[float], tokens: int, *, like: Tensor) -> Tensor:
    """`(heads, tokens, tokens)`: r^(i - j) for j <= i, else 0."""
    places = count(tokens, like.device)
    distance = places[:, None] - places
    return powers(decays, distance.clamp(min=0)).tril().to(like.dtype)


def _chunk(tokens: int) -> int:
    """Tokens of each chunk but the last, which may be shorter; all nearly equal."""
    return -(-tokens // -(-tokens // CHUNK))


# --- whole sequences at once, as plain ATen ------------------------------------------------------


def attend_plain(
    query: Tensor, key: Tensor, value: Tensor, decays: list[float], scale: float
) -> Tensor:
    """One segment, padded to whole chunks: differentiable, and without loops."""
    dtype, device, tokens = query.dtype, query.device, query.shape[1]
    chunk = CHUNK if tokens > CHUNK else tokens
    padding = -tokens % chunk
    query, key, value = (
        torch.nn.functional.pad(tensor.to(working_dtype(dtype)), (0, 0, 0, 0, 0, padding))
        .unflatten(1, (-1, chunk))
        .permute(0, 3, 1, 2, 4)
        for tensor in (query * scale, key, value)
    )  # (B, heads, chunks, chunk, channels)
    chunks = query.shape[2]
    weights = query @ key.mT * decay_matrix(decays, chunk, like=query)[:, None]
    output = weights @ value
    if chunks > 1:
        places = count(chunk, device)
        before, after = (
            powers(decays, exponents)[:, None, :, None].to(query.dtype)
            for exponents in (places + 1, chunk - 1 - places)
        )
        states = ((key * after).mT @ value).flatten(-2)
        chained = decay_matrix([decay**chunk for decay in decays], chunks - 1, like=query)
        states = (chained @ states[:, :, :-1]).unflatten(-1, (key.shape[-1], -1))
        states = torch.nn.functional.pad(states, (0, 0, 0, 0, 1, 0))
        output = output + query * before @ states
    output = output.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens]
    return output.to(dtype).contiguous()


# --- segment by segment --------------------------------------------------------------------------


class _Tables:
    """Powers of the decays for segments of some chunks of some tokens."""

    def __init__(
        self,
        decays: tuple[float, ...],
        chunks: int,
        chunk: int,
        reverse: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        like = torch.empty(0, dtype=dtype, device=device)
        steps = [decay**chunk for decay in decays]
        places = count(chunk, device)
        within = decay_matrix(decays, chunk, like=like)
        read, write = powers(decays, places + 1), powers(decays, chunk - 1 - places)
        # One more row than chunks: the state that the segment leaves.
        states = torch.nn.functional.pad(decay_matrix(steps, chunks, like=like), (0, 0, 1, 0))
        carried = powers(steps, count(chunks + 1, device)).to(dtype)
        if reverse:
            within, states = within.mT, states.flip(1, 2)
            read, write, carried = read.flip(1), write.flip(1), carried.flip(1)
        first = 1 if reverse else 0
        last = 0 if reverse else chunks
        self.within = within[:, None].contiguous()
        self.states = states[:, first : first + chunks].contiguous()
        self.carried = carried[:, first : first + chunks, None].contiguous()
        self.state = states[:, last : last + 1].contiguous()
        self.carry = carried[:, last : last + 1, None].contiguous()
        self.forgets = any(decay != 1 for decay in decays)
        self.read, self.write = (x[:, None, :, None].to(dtype) for x in (read, write))


_tables = functools.lru_cache(maxsize=64)(_Tables)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decays: list[float],
    scale: float,
    reverse: bool = False,
) -> Tensor:
    """Causal linear attention of `(B, N, heads, channels)`; `reverse`: to later tokens instead."""
    batch, tokens, heads, _ = query.shape
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    work = Workspace(query)
    chunk = _chunk(tokens)
    whole = tokens // chunk
    each = max(1, min(whole, SEGMENT // (heads * chunk)))  # chunks of a segment
    images = max(1, SEGMENT // (heads * chunk * each))
    segments = [(i * chunk, min(each, whole - i), chunk) for i in range(0, whole, each)]
    if tokens % chunk:
        segments.append((whole * chunk, 1, tokens % chunk))
    if reverse:
        segments.reverse()
    for image in range(0, batch, images):
        here = slice(image, image + images)
        state: Tensor | None = None
        for i, (start, chunks, length) in enumerate(segments):
            tables = _tables(
                tuple(decays), chunks, length, reverse, working_dtype(query.dtype), query.device
            )
            place = here, slice(start, start + chunks * length)
            state = _segment(
                query[place], key[place], value[place], output[place], state, scale, tables,
                chunks, work, i + 1 < len(segments),
            )  # fmt: skip
    work.close()
    return output


def _segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    state: Tensor | None,
    scale: float,
    tables: _Tables,
    chunks: int,
    work: Workspace,
    goes_on: bool,
) -> Tensor | None:
    """Writes the output of one segment; the state after it, if it `goes_on`.

    `state`: `(B, heads, 1, head_dim * value_dim)`, None at the beginning.
    """
    batch, tokens, heads, head_dim = query.shape
    value_dim, chunk = value.shape[-1], tokens // chunks
    dtype = tables.within.dtype

    def take(name: str, width: int) -> Tensor:
        return work.take(name, (batch, heads, chunks, chunk, width), dtype)

    def chunked(tensor: Tensor) -> Tensor:
        return tensor.unflatten(1, (chunks, chunk)).permute(0, 3, 1, 2, 4)

    q, k, v = take("query", head_dim), take("key", head_dim), take("value", value_dim)
    q.copy_(chunked(query))
    if scale != 1:
        q.mul_(scale)
    k.copy_(chunked(key))
    v.copy_(chunked(value))
    weights = take("weights", chunk)
    rows = [tensor.flatten(0, 2) for tensor in (q, k, v, weights)]
    torch.bmm(rows[0], rows[1].mT, out=rows[3])
    weights.mul_(tables.within)
    out = take("output", value_dim)
    out_rows = out.flatten(0, 2)
    torch.bmm(rows[3], rows[2], out=out_rows)
    if chunks > 1 or goes_on:
        if tables.forgets:
            k.mul_(tables.write)
        update = work.take("update", (batch * heads * chunks, head_dim, value_dim), dtype)
        torch.bmm(rows[1].mT, rows[2], out=update)
        update = update.view(batch, heads, chunks, head_dim * value_dim)
    # With `out` autocast leaves products in the dtype that they are in.
    if chunks > 1 or state is not None:
        states = work.take("states", (batch, heads, chunks, head_dim * value_dim), dtype)
        if chunks > 1:
            torch.matmul(tables.states, update, out=states)
        else:
            states.zero_()
        if state is not None:
            states.addcmul_(tables.carried, state)
        if tables.forgets:
            q.mul_(tables.read)
        torch.baddbmm(out_rows, rows[0], states.view(-1, head_dim, value_dim), out=out_rows)
    chunked(output).copy_(out)
    if not goes_on:
        return None
    following = query.new_empty(batch, heads, 1, head_dim * value_dim, dtype=dtype)
    torch.matmul(tables.state, update, out=following)
    return following if state is None else following.addcmul_(tables.carry, state)
