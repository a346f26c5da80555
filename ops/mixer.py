"""The base class of token mixers and the table of all of them.

A mixer maps a channels-last feature map to one of the same shape, for any height and width.
Backbones, tests, benchmarks and the README's table find mixers in `MIXERS`, by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

MixerSpec = str | Sequence[Any]  # "neighborhood" or ("neighborhood", {"dilation": 8})

MIXERS: dict[str, type[Mixer]] = {}


class Mixer(nn.Module):
    """A token mixer: `(B, H, W, C) -> (B, H, W, C)` for any H, W >= 1.

    A subclass is declared with its name, `class NeighborhoodAttention(Mixer, name="neighborhood")`,
    takes the number of channels first and everything else by keyword, and pads, crops or clips its
    pattern itself where the map is too small for it. Auxiliary results (attention maps, a balance
    loss) are reached through methods or attributes, never by another return type.

    Class attributes:
        paper: title and arXiv number of the source.
        operator: name of the operator in `vitarium.ops.OPERATORS` that does the work.
        examples: constructor arguments that tests and tables try, each with a `dim`.
        no_weight_decay: names of parameters that weight decay must leave alone (bias tables).
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    operator: ClassVar[str] = ""
    examples: ClassVar[Sequence[Mapping[str, Any]]] = ()
    no_weight_decay: ClassVar[Sequence[str]] = ()

    def __init_subclass__(cls, *, name: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name in MIXERS:
            raise ValueError(f"mixer {name!r} is already registered by {MIXERS[name].__module__}")
        cls.name = name
        MIXERS[name] = cls

    def attention_map(self, x: Tensor, position: tuple[int, int]) -> Tensor:
        """Where the token at `position` (row, column) looks: `(B, num_heads, H, W)`.

        Raises:
            NotImplementedError: the mixer has no attention weights.
        """
        raise NotImplementedError(f"mixer {self.name!r} has no attention weights to show")


def build_mixer(spec: MixerSpec, dim: int, **defaults: Any) -> Mixer:
    """The mixer that `spec` describes: a name, or a name and its arguments.

    Args:
        spec: `"neighborhood"` or `("neighborhood", {"dilation": 8})`.
        dim: number of channels.
        defaults: arguments for every mixer of a model; those in `spec` win.

    Raises:
        ValueError: the name is not in `MIXERS`.
        TypeError: `spec` is neither form, or an argument is none of the mixer's.
    """
    parts = (spec,) if isinstance(spec, str) or not isinstance(spec, Sequence) else tuple(spec)
    name, arguments = (*parts, {})[:2] if parts else ("", None)
    if not isinstance(name, str) or not isinstance(arguments, Mapping) or len(parts) > 2:
        raise TypeError(f"mixer spec {spec!r} is neither a name nor (name, arguments)")
    if name not in MIXERS:
        raise ValueError(f"mixer {name!r} is unknown; allowed are {', '.join(sorted(MIXERS))}")
    return MIXERS[name](dim, **{**defaults, **arguments})
