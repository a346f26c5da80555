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
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops.workspace import Workspace

CHUNK = 64  # tokens of a chunk, at most
CHUNK_BFLOAT16 = 100  # the same in bfloat16, whose products want to be large
CHUNKS = 32  # chunks of a segment, at most: states cost a product with that many rows
# Tokens of a segment, at most, those of all heads and images counted.
CPU_SEGMENT = 1 << 12
DEVICE_SEGMENT = 1 << 20


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of states and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def powers(decays: Sequence[float], exponents: Tensor) -> Tensor:
    """`(heads, *exponents.shape)`, computed in the dtype of `exponents`; 0^0 = 1."""
    base = torch.tensor(decays, dtype=exponents.dtype, device=exponents.device)
    return base.view(-1, *(1,) * exponents.dim()) ** exponents


def _to(dtype: torch.dtype, numbers: Tensor) -> Tensor:
    """In another dtype, without subnormal numbers, which processors are slow with."""
    return numbers.masked_fill(numbers < torch.finfo(working_dtype(dtype)).tiny, 0).to(dtype)


def count(tokens: int, device: torch.device, first: int = 0) -> Tensor:
    """Numbers of tokens, in float64 where the device has it."""
    precise = torch.float32 if device.type == "mps" else torch.float64
    return torch.arange(first, first + tokens, dtype=precise, device=device)


def decay_matrix(decays: Sequence[float], tokens: int, *, like: Tensor) -> Tensor:
    """`(heads, tokens, tokens)`: r^(i - j) for j <= i, else 0."""
    places = count(tokens, like.device)
    distance = places[:, None] - places
    return _to(like.dtype, powers(decays, distance.clamp(min=0)).tril())


def _chunk(tokens: int, dtype: torch.dtype) -> int:
    """Tokens of each chunk but the last, which may be shorter; all nearly equal."""
    most = CHUNK_BFLOAT16 if dtype == torch.bfloat16 else CHUNK
    return -(-tokens // -(-tokens // most))


# --- whole sequences at once, as plain ATen ------------------------------------------------------


def attend_plain(
    query: Tensor, key: Tensor, value: Tensor, decays: list[float], scale: float
) -> Tensor:
    """One segment, padded to whole chunks: differentiable, and without loops."""
    dtype, device, tokens = query.dtype, query.device, query.shape[1]
    chunk = CHUNK if tokens > CHUNK else tokens
    padding = -tokens % chunk
    query, key, value = (
        F.pad(tensor.to(working_dtype(dtype)), (0, 0, 0, 0, 0, padding))
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
            _to(query.dtype, powers(decays, exponents)[:, None, :, None])
            for exponents in (places + 1, chunk - 1 - places)
        )
        states = ((key * after).mT @ value).flatten(-2)
        chained = decay_matrix([decay**chunk for decay in decays], chunks - 1, like=query)
        states = (chained @ states[:, :, :-1]).unflatten(-1, (key.shape[-1], -1))
        states = F.pad(states, (0, 0, 0, 0, 1, 0))
        output = output + query * before @ states
    output = output.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens]
    return output.to(dtype).contiguous()


# --- segment by segment --------------------------------------------------------------------------


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of matrix products: CPUs have fast ones for bfloat16, not for float16."""
    return dtype if dtype == torch.bfloat16 else working_dtype(dtype)


class _Tables:
    """Powers of the decays for segments of some chunks of some tokens.

    Attributes:
        within: `(heads, 1, chunk, chunk)`, of a chunk's tokens for each other.
        read, write: `(heads, 1, chunk, 1)`, of the state at a chunk's start for its tokens, and of
            these for the state that the chunk adds to.
        states, carried: `(heads, chunks, chunks)` and `(heads, chunks, 1)`, of what chunks add, and
            of the state at the segment's start, for the states at the chunks' starts.
        state, carry: `(heads, 1, chunks)` and `(heads, 1, 1)`, for the state at the segment's end.
        forgets: whether any decay is not 1.
    """

    def __init__(
        self,
        decays: tuple[float, ...],
        chunks: int,
        chunk: int,
        reverse: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        like = torch.empty(0, dtype=working_dtype(dtype), device=device)
        steps = [decay**chunk for decay in decays]
        places = count(chunk, device)
        within = decay_matrix(decays, chunk, like=like)
        read, write = powers(decays, places + 1), powers(decays, chunk - 1 - places)
        # One more row than chunks: the state that the segment leaves.
        states = F.pad(decay_matrix(steps, chunks, like=like), (0, 0, 1, 0))
        carried = _to(like.dtype, powers(steps, count(chunks + 1, device)))
        if reverse:
            within, states = within.mT, states.flip(1, 2)
            read, write, carried = read.flip(1), write.flip(1), carried.flip(1)
        first = 1 if reverse else 0
        last = 0 if reverse else chunks
        product = _product_dtype(dtype)
        self.within = within[:, None].to(product).contiguous()
        self.states = states[:, first : first + chunks].contiguous()
        self.carried = carried[:, first : first + chunks, None].contiguous()
        self.state = states[:, last : last + 1].contiguous()
        self.carry = carried[:, last : last + 1, None].contiguous()
        self.forgets = any(decay != 1 for decay in decays)
        self.read, self.write = (_to(product, x[:, None, :, None]) for x in (read, write))


_tables = functools.lru_cache(maxsize=64)(_Tables)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decays: Sequence[float],
    scale: float,
    *,
    reverse: bool = False,
    swapped: Tensor | None = None,
) -> list[Tensor]:
    """Causal linear attention of `(B, N, heads, channels)`.

    Args:
        reverse: to later tokens instead of earlier ones.
        swapped: `(B, N, heads, value_dim)`: other queries, which attend to the values as if they
            were keys and get keys; its states are the same but for a transposition.

    Returns:
        The output, and that for `swapped` if it is given.
    """
    batch, tokens, heads, _ = query.shape
    askers = [query] if swapped is None else [query, swapped]
    outputs = [
        query.new_empty(batch, tokens, heads, given.shape[-1])
        for given in (value, key)[: len(askers)]
    ]
    work = Workspace(query)
    chunk = _chunk(tokens, query.dtype)
    whole = tokens // chunk
    limit = (CPU_SEGMENT if query.is_cpu else DEVICE_SEGMENT) // (heads * chunk)
    each = max(1, min(whole, CHUNKS, limit))  # chunks of a segment
    images = max(1, limit // each)
    segments = [(i * chunk, min(each, whole - i), chunk) for i in range(0, whole, each)]
    if tokens % chunk:
        segments.append((whole * chunk, 1, tokens % chunk))
    if reverse:
        segments.reverse()
    for image in range(0, batch, images):
        here = slice(image, image + images)
        state: Tensor | None = None
        for i, (start, chunks, length) in enumerate(segments):
            tables = _tables(tuple(decays), chunks, length, reverse, query.dtype, query.device)
            place = here, slice(start, start + chunks * length)
            state = _segment(
                [asker[place] for asker in askers], key[place], value[place],
                [output[place] for output in outputs], state, scale, tables, chunks, work,
                i + 1 < len(segments),
            )  # fmt: skip
    work.close()
    return outputs


def _segment(
    askers: Sequence[Tensor],
    key: Tensor,
    value: Tensor,
    outputs: Sequence[Tensor],
    state: Tensor | None,
    scale: float,
    tables: _Tables,
    chunks: int,
    work: Workspace,
    goes_on: bool,
) -> Tensor | None:
    """Writes the outputs of one segment; the state after it, if it `goes_on`.

    `state`: `(B, heads, 1, head_dim * value_dim)`, None at the beginning. Products have `out`, for
    autocast then leaves them in the dtype that they are in.
    """
    batch, tokens, heads, head_dim = key.shape
    value_dim, chunk = value.shape[-1], tokens // chunks

    def take(name: str, width: int) -> Tensor:
        return work.take(name, (batch, heads, chunks, chunk, width), tables.within.dtype)

    def load(name: str, tensor: Tensor) -> Tensor:
        found = take(name, tensor.shape[-1])
        return found.copy_(_chunked(tensor, chunks))

    k, v = load("key", key), load("value", value)
    queries = [load(f"query {i}", asker) for i, asker in enumerate(askers)]
    found = [take(f"output {i}", output.shape[-1]) for i, output in enumerate(outputs)]
    weights = take("weights", chunk)
    for query, output, met, taken in zip(queries, found, (k, v), (v, k)):
        if scale != 1:
            query.mul_(scale)
        torch.bmm(_rows(query), _rows(met).mT, out=_rows(weights))
        weights.mul_(tables.within)
        torch.bmm(_rows(weights), _rows(taken), out=_rows(output))
    update = None
    if chunks > 1 or goes_on:
        if tables.forgets:
            k.mul_(tables.write)
        shape = (batch * heads * chunks, head_dim, value_dim)
        product = work.take("update", shape, k.dtype)
        torch.bmm(_rows(k).mT, _rows(v), out=product)
        update = product.to(tables.states.dtype).view(batch, heads, chunks, -1)
    if chunks > 1 or state is not None:
        shape = (batch, heads, chunks, head_dim * value_dim)
        states = work.take("states", shape, tables.states.dtype)
        if chunks > 1:
            torch.matmul(tables.states, update, out=states)
        else:
            states.zero_()
        if state is not None:
            states.addcmul_(tables.carried, state)
        read = states.to(k.dtype).view(-1, head_dim, value_dim)
        for query, output, taken in zip(queries, map(_rows, found), (read, read.mT)):
            if tables.forgets:
                query.mul_(tables.read)
            torch.baddbmm(output, _rows(query), taken, out=output)
    for output, rows in zip(outputs, found):
        _chunked(output, chunks).copy_(rows)
    if not goes_on:
        return None
    after = key.new_empty(batch, heads, 1, head_dim * value_dim, dtype=tables.states.dtype)
    torch.matmul(tables.state, update, out=after)
    return after if state is None else after.addcmul_(tables.carry, state)


def _chunked(tensor: Tensor, chunks: int) -> Tensor:
    """`(B, N, heads, channels)` as `(B, heads, chunks, chunk, channels)`, a view."""
    return tensor.unflatten(1, (chunks, -1)).permute(0, 3, 1, 2, 4)


def _rows(tensor: Tensor) -> Tensor:
    """`(B, heads, chunks, chunk, channels)` as `(B * heads * chunks, chunk, channels)`, a view."""
    return tensor.flatten(0, 2)
