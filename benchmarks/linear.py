"""What linear attention is measured on, and against.

The settings are the stages of Swin at 224 pixels with whole maps for windows, as InLine-Swin and
FLatten-Swin have them: the classical form, the focused one, and the injective one. The peer
"written" is each as its paper's code writes it; the floor is the two matrix products alone, of
tensors that lie as they like it, and four more in the backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.benchmarks.floors import byte_floor
from vitarium.benchmarks.suite import Peer, Suite
from vitarium.ops import Case

HEAD_DIM = 32
FORMS: Mapping[str, dict[str, Any]] = {
    "elu": {"feature_map": "elu", "scale": 1.0},
    "focused": {"feature_map": "focused", "scale": 1.0},
    "injective": {"feature_map": "identity", "normalization": "injective"},
}


def cases(batch_size: int) -> list[Case]:
    """Forms, maps and heads."""
    return [
        _case(form, (batch_size, side, side, heads, HEAD_DIM))
        for form in FORMS
        for side, heads in ((14, 12), (28, 6), (56, 3))
    ]


def _case(form: str, shape: tuple[int, ...]) -> Case:
    shapes: dict[str, tuple[int, ...]] = {name: shape for name in ("query", "key", "value")}
    values = {}
    if form == "focused":  # softplus of a parameter that begins at zero
        shapes["temperature"] = shape[-2:]
        values["temperature"] = lambda generator, shape: torch.full(shape, math.log(2))
    note = f"{form} {shape[1]}x{shape[2]} heads {shape[3]}"
    return Case(note, shapes, FORMS[form], values)


# --- peers ---------------------------------------------------------------------------------------


def _heads(x: Tensor) -> Tensor:
    """`(B, heads, N, head_dim)` of `(B, N, heads * head_dim)`."""
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def _elu(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> Tensor:
    q, k, v = map(_heads, (F.elu(q) + 1, F.elu(k) + 1, v))
    weight = q @ k.sum(-2, keepdim=True).transpose(-1, -2) + 1e-6 * k.shape[-2]
    return q @ (k.transpose(-1, -2) @ v) / weight


def _focused(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None) -> Tensor:
    assert temperature is not None
    divisor = temperature.flatten()

    def focus(x: Tensor) -> Tensor:
        x = (F.relu(x) + 1e-6) / divisor
        norm = x.norm(dim=-1, keepdim=True)
        x = x**3
        return x / x.norm(dim=-1, keepdim=True) * norm

    count = k.shape[-2]
    q, k, v = map(_heads, (focus(q), focus(k), v))
    weight = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
    state = (k.transpose(-2, -1) * count**-0.5) @ (v * count**-0.5)
    return q @ state * weight


def _injective(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> Tensor:
    q, k, v = map(_heads, (q, k, v))
    scale, count = HEAD_DIM**-0.5, k.shape[-2]
    share = (scale / count) ** 0.5
    state = (k.transpose(-2, -1) * share) @ (v * share)
    rest = 1 - q @ k.mean(dim=2, keepdim=True).transpose(-2, -1) * scale
    return q @ state + rest * v.mean(dim=2, keepdim=True)


WRITTEN: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "elu": _elu,
    "focused": _focused,
    "injective": _injective,
}


def _written(case: Case, device: torch.device) -> Callable[..., Tensor]:
    attend = WRITTEN[case.note.split()[0]]

    def run(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor | None = None) -> Tensor:
        tokens = (x.flatten(3).flatten(1, 2) for x in (query, key, value))
        return attend(*tokens, temperature).transpose(1, 2).reshape(query.shape)

    return run


def _sdpa(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """Softmax attention of the same tokens: what linear attention stands in for."""

    def run(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor | None = None) -> Tensor:
        heads = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(query.shape)

    return run


def _products(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """The two matrix products of the tensors as they lie, heads side by side, and nothing else."""

    def run(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor | None = None) -> Tensor:
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
        return (q @ (k.transpose(-1, -2) @ v)).transpose(1, 2).reshape(query.shape)

    return run


def floor(case: Case, mode: str, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The bare matrix products on the CPU, the bytes that must move on CUDA.

    Two in the forward, k^T v and its product with q; four in the backward.
    """
    batch, height, width, heads, dim = case.shapes["query"]
    elements = math.prod(case.shapes["query"])
    if device.type == "cuda":
        return byte_floor(3 * elements, elements, mode, dtype, device)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(batch * heads, *shape, dtype=dtype, device=device)

    tokens = height * width
    q, k, v, output, grad, grad_q, grad_k, grad_v = (tensor(tokens, dim) for _ in range(8))
    state, grad_state = tensor(dim, dim), tensor(dim, dim)

    def forward() -> None:
        torch.bmm(k.mT, v, out=state)
        torch.bmm(q, state, out=output)

    def backward() -> None:
        torch.bmm(grad, state.mT, out=grad_q)
        torch.bmm(q.mT, grad, out=grad_state)
        torch.bmm(v, grad_state.mT, out=grad_k)
        torch.bmm(k, grad_state, out=grad_v)

    def training() -> None:
        forward()
        backward()

    return {"forward": forward, "backward": backward, "training": training}[mode]


PEERS: Mapping[str, Peer] = {
    "written": Peer(_written, devices=("cpu", "cuda")),
    "products": Peer(_products, devices=("cpu", "cuda"), same_function=False),
    "sdpa": Peer(_sdpa, devices=("cpu", "cuda"), same_function=False),
}

SUITE = Suite(cases, PEERS, floor, shared=("temperature",))
