"""The candidates of one setting: built, given the same tensors, checked before they are timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitarium.benchmarks import (
    agent,
    aggregated,
    attention,
    bilevel_routing,
    causal_linear,
    channel,
    indexed,
    linear,
    mixture_of_head,
    neighborhood,
    outlook,
    window,
)
from vitarium.benchmarks.arguments import DTYPES
from vitarium.benchmarks.suite import Setting, Suite
from vitarium.ops import OPERATORS

SUITES: Mapping[str, Suite] = {
    "neighborhood_attention": neighborhood.SUITE,
    "window_attention": window.SUITE,
    "bilevel_routing_attention": bilevel_routing.SUITE,
    "attention": attention.SUITE,
    "mixture_of_head_attention": mixture_of_head.SUITE,
    "aggregated_attention": aggregated.SUITE,
    "causal_linear_attention": causal_linear.SUITE,
    "linear_attention": linear.SUITE,
    "agent_attention": agent.SUITE,
    "indexed_attention": indexed.SUITE,
    "outlook_attention": outlook.SUITE,
    "channel_attention": channel.SUITE,
}
FLOOR = "floor"

# Largest error allowed, relative to the largest element of the reference's tensor.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Candidate:
    """What is timed, and how wrong it is (None for the floor and for another function)."""

    run: Callable[[], object]
    error: float | None = None
    error_of: str | None = None


def build_candidates(
    setting: Setting, device: torch.device, peers: Sequence[str] | None
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Everything that can compute a setting here, and the floor.

    Args:
        setting: what to compute.
        device: where.
        peers: names of peers; those meant for the device if None.

    Returns:
        Candidates by name, and by name why another is none: it failed or its result is wrong.
        Backends that refuse the call, and peers that it is too large for, are in neither.
    """
    inputs = _Inputs(setting, device)
    functions, refused = _functions(setting, device, peers)
    candidates = {}
    for name, (function, same_function) in functions.items():
        error = None
        try:
            if same_function:
                error = inputs.error(function)
            candidate = Candidate(
                inputs.run(function), error, inputs.error_of if same_function else None
            )
        except Exception as failure:  # a peer's own failure must not end the comparison
            refused[name] = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
            continue
        # "not <=" rather than ">": an error that is no number is too large, too.
        if error is not None and not error <= TOLERANCE[setting.dtype]:
            refused[name] = f"wrong result: error {error:.2g} exceeds {TOLERANCE[setting.dtype]}"
        else:
            candidates[name] = candidate
    suite = SUITES.get(setting.operator)
    if suite is not None and suite.floor is not None:
        run = suite.floor(setting.case, setting.mode, DTYPES[setting.dtype], device)
        candidates[FLOOR] = Candidate(run)
    return candidates, refused


def _functions(
    setting: Setting, device: torch.device, peers: Sequence[str] | None
) -> tuple[dict[str, tuple[Function, bool]], dict[str, str]]:
    """By name: functions of the case's tensors and whether they compute the operator itself."""
    functions: dict[str, tuple[Function, bool]] = {}
    refused: dict[str, str] = {}
    operator, case = OPERATORS[setting.operator], setting.case
    for backend in operator.implementations:
        if backend != "reference" and why_not(setting, backend, device) is None:
            functions[backend] = (_backend(setting, backend), True)
    suite = SUITES.get(setting.operator)
    for name, peer in suite.peers.items() if suite is not None else ():
        if name in peers if peers is not None else device.type in peer.devices:
            try:
                function = peer.build(case, device)
            except Exception as failure:  # as above
                refused[name] = f"{type(failure).__name__}: {failure}"
                continue
            if function is not None:
                functions[name] = (_positional(function), peer.same_function)
    return functions, refused


def _backend(setting: Setting, backend: str) -> Function:
    operator = OPERATORS[setting.operator]
    return lambda **tensors: operator.function(**tensors, **setting.case.kwargs, backend=backend)


def _positional(function: Function) -> Function:
    return lambda **tensors: function(*tensors.values())


def why_not(setting: Setting, backend: str, device: torch.device) -> str | None:
    """Why a backend refuses a setting, or None; it is tried."""
    tensors = draw(setting, device)
    try:
        with torch.no_grad():
            _backend(setting, backend)(**tensors)
    except ValueError as refusal:
        return str(refusal)
    return None


def draw(setting: Setting, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a setting, always the same."""
    drawn = setting.case.draw(torch.Generator().manual_seed(0))
    return {
        name: tensor.to(device, DTYPES[setting.dtype] if tensor.is_floating_point() else None)
        for name, tensor in drawn.items()
    }


class _Inputs:
    """The random tensors of a setting, and what the float64 reference makes of them."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.forward_only = setting.mode == "forward"
        self.backward_only = setting.mode == "backward"
        self.tensors = draw(setting, device)
        reference = _backend(setting, "reference")
        on_meta = {name: tensor.to("meta") for name, tensor in self.tensors.items()}
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(reference(**on_meta).shape, generator=generator)
        self.grad = grad.to(device, DTYPES[setting.dtype])
        suite = SUITES.get(setting.operator)
        shared = self.tensors.keys() if suite is None else suite.shared
        self.expected = self._reference(reference, [n for n in shared if n in self.tensors])
        self.error_of = "output" if self.forward_only else "output and gradients"
        self.error_of += " against the float64 reference, in its largest element"

    def _reference(self, reference: Function, shared: Sequence[str]) -> list[Tensor]:
        """The definition is dense, and takes large maps image by image, unless all are shared."""
        batch = self.grad.shape[0]
        size = batch if len(shared) == len(self.tensors) else 1
        results = []
        for first in range(0, batch, size):
            part = {
                name: t if name in shared else t[first : first + size]
                for name, t in self.tensors.items()
            }
            part = {n: t.double() if t.is_floating_point() else t for n, t in part.items()}
            results.append(self._results(reference, part, self.grad[first : first + size].double()))
        # A shared tensor's gradient is the sum of those of the images.
        names = ["output", *self._differentiable(self.tensors)]
        return [
            sum(parts) if name in shared else torch.cat(parts)
            for name, parts in zip(names, zip(*results))
        ]

    @staticmethod
    def _differentiable(tensors: Mapping[str, Tensor]) -> list[str]:
        return [name for name, tensor in tensors.items() if tensor.is_floating_point()]

    def _leaves(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The tensors as leaves of a graph, and those of them that have gradients."""
        leaves = {name: tensor.detach() for name, tensor in tensors.items()}
        return leaves, [leaves[name].requires_grad_() for name in self._differentiable(tensors)]

    def _results(
        self, function: Function, tensors: Mapping[str, Tensor], grad: Tensor
    ) -> list[Tensor | None]:
        """The output and, unless only the forward is wanted, the gradient of every tensor."""
        if self.forward_only:
            with torch.no_grad():
                return [function(**tensors)]
        leaves, inputs = self._leaves(tensors)
        output = function(**leaves)
        # A peer that computes another function may have no use for a tensor.
        return [output.detach(), *torch.autograd.grad(output, inputs, grad, allow_unused=True)]

    def error(self, function: Function) -> float:
        """Largest error over all results, each relative to its reference's largest element."""
        results = self._results(function, self.tensors, self.grad)
        return max(
            math.inf
            if result is None
            else ((result.double() - expected).abs().max() / expected.abs().max()).item()
            for result, expected in zip(results, self.expected)
        )

    def run(self, function: Function) -> Callable[[], object]:
        """What the clock is put to: the mode of the setting, with these tensors."""
        if self.backward_only:
            leaves, inputs = self._leaves(self.tensors)
            output = function(**leaves)
            return lambda: torch.autograd.grad(
                output, inputs, self.grad, retain_graph=True, allow_unused=True
            )
        return lambda: self._results(function, self.tensors, self.grad)
