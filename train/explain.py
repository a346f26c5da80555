"""What a model does with an image: where its mixers look, and which of their heads matter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import Mixer
from vitarium.zoo.deit import TokenBlock
from vitarium.zoo.inline import MeanBlock


@dataclass(frozen=True)
class MixerView:
    """Where one mixer looks from one position.

    Attributes:
        name: of the mixer within the model.
        size: height and width of its map.
        query: row and column of the position.
        weights: `(num_heads, H, W)` on the positions of the map, or None.
        note: what the weights leave out; without weights, why there are none.
    """

    name: str
    size: tuple[int, int]
    query: tuple[int, int]
    weights: Tensor | None
    note: str = ""


@torch.no_grad()
def attention_views(
    model: nn.Module, image: Tensor, point: tuple[float, float]
) -> tuple[Tensor, list[MixerView]]:
    """Where each mixer of a model looks from one point of an image.

    Args:
        model: any model with mixers of ours.
        image: `(1, in_chans, H, W)`, normalised.
        point: row and column as parts of height and width, from 0 up to 1.

    Returns:
        The logits `(1, num_classes)`, and a view per mixer, in the order of their use.

    Raises:
        ValueError: the model has no mixer of ours.
    """
    seen: dict[str, tuple[Mixer, Tensor, tuple[int, int] | None]] = {}
    with ExitStack() as hooks:
        for name, module in _outermost(model):

            def keep(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                if isinstance(module, Mixer):
                    seen[name] = module, inputs[0], None
                else:  # a map, or tokens and the size of the map among them
                    size = inputs[1] if isinstance(module, TokenBlock) else None
                    seen[f"{name}.mixer"] = module.mixer, module.norm1(inputs[0]), size

            hooks.callback(module.register_forward_pre_hook(keep).remove)
        logits = model(image)
    if not seen:
        raise ValueError(f"{type(model).__name__} has no token mixer of this package to look at")
    return logits, [_view(name, *found, point) for name, found in seen.items()]


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Mixers that lie in no other one; for those whose `forward` is not used, their blocks."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, Mixer | TokenBlock | MeanBlock) and not name.startswith(
            inside or ("\0",)
        ):
            inside += (f"{name}.",)
            yield name, module


def _view(
    name: str, mixer: Mixer, x: Tensor, size: tuple[int, int] | None, point: tuple[float, float]
) -> MixerView:
    height, width = size or x.shape[1:3]
    query = int(point[0] * height), int(point[1] * width)
    note = ""
    try:
        if size is None:
            weights = mixer.attention_map(x, query)[0]
        else:
            weights, others = mixer.token_attention_map(x, size, query)
            weights = weights[0]
            note = f"class token {others[0].sum(-1).mean():.0%}"
    except NotImplementedError as error:
        return MixerView(name, (height, width), query, None, str(error))
    return MixerView(name, (height, width), query, weights.float(), note)


def last_of_stages(model: nn.Module, views: Sequence[MixerView], most: int = 4) -> list[MixerView]:
    """Of every stage of a model the last view, with weights if any of the stage has them.

    Stages are those that features are taken after; where there are more than `most`, they are
    evenly chosen, the first and the last among them.
    """
    information = getattr(model, "feature_info", ())
    stages: dict[str, list[MixerView]] = {}
    for view in views:
        places = (str(stage["module"]) for stage in information)
        place = next((p for p in places if view.name.startswith(f"{p}.")), view.name)
        stages.setdefault(place, []).append(view)
    last = [
        [view for view in stage if view.weights is not None] or stage for stage in stages.values()
    ]
    return evenly([stage[-1] for stage in last], most)


def evenly(entries: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the entries, the first and the last among them."""
    if len(entries) <= most:
        return list(entries)
    return [entries[round(i * (len(entries) - 1) / (most - 1))] for i in range(most)]


@dataclass(frozen=True)
class HeadImportance:
    """How much the loss depends on every head of a mixer.

    Attributes:
        name: of the mixer within the model.
        sensitivity: `(num_heads,)`, expected size of the loss's derivative by a head's gate.
    """

    name: str
    sensitivity: Tensor

    @property
    def relative(self) -> Tensor:
        """The sensitivity over its Euclidean norm among the heads of the mixer."""
        return self.sensitivity / self.sensitivity.norm().clamp_min(1e-30)


def head_importance(
    model: nn.Module, images: Tensor, targets: Tensor | None = None
) -> list[HeadImportance]:
    """The importance of every head of every mixer with several.

    A head's output, where it enters the mixer's output projection, is multiplied by a gate of one;
    its importance is the mean over images of |d loss / d gate|. Michel, Levy, Neubig, "Are Sixteen
    Heads Really Better than One?" (arXiv 1905.10650), section 4.1, equation 2, where they are
    compared after division by their Euclidean norm within a layer (`HeadImportance.relative`).
    Where a mixer adds a local encoding of the values before its projection, a head's share of it
    counts as the head's.

    Args:
        model: in evaluation mode; its output is `(B, num_classes)`.
        images: `(B, in_chans, H, W)`, normalised.
        targets: `(B,)`, the classes of the images; the model's own answers if None.

    Returns:
        In the order of the modules; mixers of one head, or without a projection of the heads, are
        left out.
    """
    totals: dict[str, Tensor] = {}
    with _gated(model) as gates:
        for i, image in enumerate(images):
            with torch.enable_grad():
                logits = model(image[None])
                target = logits.argmax(-1) if targets is None else targets[i : i + 1]
                loss = F.cross_entropy(logits.float(), target)
                grads = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
            for name, grad in zip(gates, grads):
                if grad is not None:  # None: the mixer was not used
                    totals[name] = totals.get(name, 0) + grad.abs() / len(images)
    return [HeadImportance(name, total) for name, total in totals.items()]


@contextmanager
def _gated(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Gates of one on the heads of every mixer with several, by the mixer's name."""
    gates: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, mixer in model.named_modules():
            parts = _projections(mixer) if isinstance(mixer, Mixer) else []
            if sum(heads for _, heads in parts) < 2:
                continue
            like = parts[0][0].weight
            gates[name] = like.new_ones(sum(heads for _, heads in parts), requires_grad=True)
            first = 0
            for projection, heads in parts:

                def multiply(
                    module: nn.Module,
                    inputs: tuple[Tensor],
                    gate: Tensor = gates[name][first : first + heads],
                ) -> tuple[Tensor]:
                    return ((inputs[0].unflatten(-1, (len(gate), -1)) * gate[:, None]).flatten(-2),)

                hooks.callback(projection.register_forward_pre_hook(multiply).remove)
                first += heads
        yield gates


def _projections(mixer: Mixer) -> list[tuple[nn.Linear, int]]:
    """The output projections of a mixer and how many heads lie side by side before each."""
    pairs = [("proj", "num_heads"), ("h_proj", "h_heads"), ("l_proj", "l_heads")]  # HiLo has two
    found = [(getattr(mixer, a, None), getattr(mixer, b, None)) for a, b in pairs]
    return [
        (projection, heads)
        for projection, heads in found
        if isinstance(projection, nn.Linear)
        and isinstance(heads, int)
        and heads > 0
        and projection.in_features % heads == 0
    ]
