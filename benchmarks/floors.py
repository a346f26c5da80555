"""What no implementation of attention can beat: its matrix products, or the memory it must move."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def attention_floor(
    products: int,
    queries: int,
    keys: int,
    head_dim: int,
    value_dim: int,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    elements: Sequence[int],
) -> Callable[[], object]:
    """The floor of attention that falls apart into dense products: on CUDA the bytes, else these.

    Args:
        products: number of independent blocks, images and heads among them.
        queries, keys: of a block.
        head_dim, value_dim: widths of a head.
        mode: "forward", "backward" or "training".
        elements: sizes of query, key and value (and of other tensors of that size that are read).
    """
    if device.type == "cuda":
        output = elements[0] // head_dim * value_dim
        return byte_floor(sum(elements), output, mode, dtype, device)
    return product_floor(products, queries, keys, head_dim, value_dim, mode, dtype, device)


def product_floor(
    products: int,
    queries: int,
    keys: int,
    head_dim: int,
    value_dim: int,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[], object]:
    """The two matrix products of the forward, the four of the backward, or all six, alone.

    Exactly the multiply-adds that the definition needs, into outputs that are allocated before.
    """

    def tensor(*shape: int) -> Tensor:
        return torch.randn(products, *shape, dtype=dtype, device=device)

    q, grad_q = tensor(queries, head_dim), tensor(queries, head_dim)
    k, grad_k = tensor(keys, head_dim), tensor(keys, head_dim)
    v, grad_v = tensor(keys, value_dim), tensor(keys, value_dim)
    output, grad = tensor(queries, value_dim), tensor(queries, value_dim)
    weights, scores = tensor(queries, keys), tensor(queries, keys)

    def forward() -> None:
        torch.bmm(q, k.mT, out=scores)
        torch.bmm(weights, v, out=output)

    def backward() -> None:
        torch.bmm(weights.mT, grad, out=grad_v)
        torch.bmm(grad, v.mT, out=scores)
        torch.bmm(weights, k, out=grad_q)
        torch.bmm(weights.mT, q, out=grad_k)

    def training() -> None:
        forward()
        backward()

    return {"forward": forward, "backward": backward, "training": training}[mode]


def byte_floor(
    inputs: int, outputs: int, mode: str, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """A copy that reads and writes as many bytes as the operator must read and write once.

    Forward: inputs read, output written. Backward: both and the output's gradient read, the inputs'
    gradients written.
    """
    moved = {"forward": inputs + outputs, "backward": 2 * inputs + 2 * outputs}
    moved["training"] = moved["forward"] + moved["backward"]
    source = torch.zeros(moved[mode] // 2, dtype=dtype, device=device)  # half is read
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
