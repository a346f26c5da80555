"""The base class of token mixers and the table of all of them.

A mixer maps a channels-last feature map to one of the same shape, for any height and width.
Backbones, tests, benchmarks and the README's table find mixers in `MIXERS`, by name.
"""

from __future__ import annotations

import inspect
import numbers
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitarium.ops import dispatch
from vitarium.ops.packed import joint
from vitarium.ops.projection import linear, plain

MixerSpec = str | Sequence[Any]  # "neighborhood" or ("neighborhood", {"dilation": 8})

MIXERS: dict[str, type[Mixer]] = {}


class Mixer(nn.Module):
    """A token mixer: `(B, H, W, C) -> (B, H, W, C)` for any H, W >= 1.

    A subclass is declared with its name, `class NeighborhoodAttention(Mixer, name="neighborhood")`,
    takes the number of channels first and everything else by keyword, and defines `mix`. It pads,
    crops or clips its pattern itself where the map is too small for it. Auxiliary results (a
    balance loss, a routing table) are reached through attributes or methods, never by another
    return type.

    Class attributes:
        paper: title and arXiv number of the source.
        operator: name of the operator in `vitarium.ops.OPERATORS` that does the work; empty where
            ordinary operations do, and the mixer defines `_attention_map`.
        examples: constructor arguments that tests and tables try, each with a `dim`.
        cost: multiply-adds on a map, as an expression of H, W, N = H W, C = `dim` and arguments by
            their names, others being at their defaults; of the mixer as its first example has it.
            What makes less than 3% is left out; "0" where there are no matrix products.
        cross: whether keys and values may come from a second map, `mix(x, context)`.
        routed: whether tokens choose what they attend to, so that rounding can change the choice.
        linear: whether cost grows with the number of tokens, no faster.
        no_weight_decay: names of parameters that weight decay must leave alone (bias tables).
        indirect: patterns of names of parameters that the output has no gradient for: only an
            auxiliary loss reaches them.
        official_names: patterns of names in official state dicts, and what they are called here
            (None: not wanted). `load_state_dict` takes either; a 1x1 convolution's weight serves as
            a linear layer's.

    Attributes:
        attention_diversification: threshold of `attention_diversification_loss`, which the mixer
            then asks to be trained with (see `auxiliary_losses`); None for no such loss.

    Args:
        dim: number of channels C.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    operator: ClassVar[str] = ""
    examples: ClassVar[Sequence[Mapping[str, Any]]] = ()
    cost: ClassVar[str] = ""
    cross: ClassVar[bool] = False
    routed: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    no_weight_decay: ClassVar[Sequence[str]] = ()
    indirect: ClassVar[Sequence[str]] = ()
    official_names: ClassVar[Mapping[str, str | None]] = {}

    attention_diversification: float | None = None

    def __init_subclass__(cls, *, name: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name in MIXERS:
            raise ValueError(f"mixer {name!r} is already registered by {MIXERS[name].__module__}")
        cls.name = name
        MIXERS[name] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Mixer:
        # Before any __init__ computes with what it was given, for every subclass alike.
        _check_arguments(cls, args, kwargs)
        return super().__new__(cls)

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"{type(self).__name__}: dim={dim} must be at least 1")
        self.dim = dim

    def mix(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """What the mixer does with a checked map; `context` only where `cross` is true."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The mixed map.

        Args:
            x: `(B, H, W, C)`, channels last.
            context: a second map, whose tokens are attended to in place of x's; only where the
                mixer defines it (`cross`).

        Raises:
            ValueError: a map is not `(B, H, W, C)`, or the mixer defines no cross attention.
        """
        self._check_map("x", x)
        if context is None:
            if self.attention_diversification is not None and self.training:
                return self._mix_diversified(x, self.attention_diversification)
            return self.mix(x)
        if not self.cross:
            raise ValueError(
                f"{type(self).__name__}: context is not defined for mixer {self.name!r}; mixers "
                f"that take it are {', '.join(n for n, m in MIXERS.items() if m.cross)}"
            )
        self._check_map("context", context)
        return self.mix(x, context)

    def _mix_diversified(self, x: Tensor, threshold: float) -> Tensor:
        from vitarium.ops.tap import attention_diversification_loss, attention_matrix

        with dispatch.recording() as calls:
            output = self.mix(x)
        maps = [attention_matrix(call) for call in calls]
        self.auxiliary_loss = attention_diversification_loss(maps, threshold)
        return output

    def __getstate__(self) -> dict[str, Any]:
        """Without the loss of the last step, whose graph can neither be copied nor stored."""
        state = dict(self.__dict__)
        state.pop("auxiliary_loss", None)
        return state

    def _check_map(self, name: str, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(
                f"{type(self).__name__}: {name} has shape {tuple(x.shape)}; allowed is "
                f"(B, H, W, {self.dim})"
            )

    @torch.no_grad()
    def attention_map(self, x: Tensor, query: tuple[int, int]) -> Tensor:
        """The weights that the output at one position puts on every position of the input.

        They are the derivative of the operator's definition with respect to its values, so any
        mixer whose output is linear in the values has them. Where a mixer attends twice in a row,
        they are followed through both, averaged over the heads of the second (attention rollout,
        Abnar and Zuidema, arXiv 2005.00928).

        Args:
            x: `(B, H, W, C)`.
            query: row and column of the output.

        Returns:
            `(B, num_heads, H, W)`.

        Raises:
            ValueError: `query` lies outside of the map.
            NotImplementedError: keys are pooled, and no positions of the map.
        """
        height, width = x.shape[1:3]
        row, column = query
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"query={tuple(query)} is outside the map ({height}, {width})")
        return self._attention_map(x, row, column)

    @torch.no_grad()
    def token_attention_map(
        self, x: Tensor, size: tuple[int, int], query: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """`attention_map` of a mixer with `mix_tokens`, whose map follows a class token.

        Args:
            x: `(B, N, C)`, of which the last H * W tokens are a map.
            size: H and W.
            query: row and column of the output.

        Returns:
            `(B, num_heads, H, W)`, and the weights on the tokens before the map,
            `(B, num_heads, N - H * W)`.

        Raises:
            ValueError: `query` lies outside of the map.
        """
        height, width = size
        row, column = query
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"query={tuple(query)} is outside the map ({height}, {width})")
        with dispatch.recording() as calls:
            self.mix_tokens(x, size)
        before = x.shape[1] - height * width
        wanted = x.new_zeros(x.shape[0], 1, 1, x.shape[1])  # a map of one row
        wanted[..., before + row * width + column] = 1
        weights = self._followed(calls, wanted)[:, :, 0]
        return weights[..., before:].unflatten(-1, size), weights[..., :before]

    def _attention_map(self, x: Tensor, row: int, column: int) -> Tensor:
        """What `attention_map` returns, followed through the operator calls of a forward."""
        with dispatch.recording() as calls:
            self(x)
        wanted = x.new_zeros(x.shape[0], 1, *x.shape[1:3])
        wanted[:, :, row, column] = 1
        return self._followed(calls, wanted)

    def _followed(self, calls: Sequence[dispatch.Call], wanted: Tensor) -> Tensor:
        """Weights on the positions of the map, `(B, num_heads, H, W)`, of all operator calls.

        Each call is taken to attend to what the one before it gave.

        Args:
            calls: of a forward, in order.
            wanted: `(B, 1, H, W)`, how much of each position of the output is asked for.
        """
        for call in reversed(calls):
            weights = self._weights(call, wanted)
            wanted = weights.mean(1, keepdim=True)
        return weights

    def _weights(self, call: dispatch.Call, wanted: Tensor) -> Tensor:
        """Weights on the positions of the map, `(B, num_heads, H, W)`, of one operator call.

        Args:
            call: of an operator with query, key and value as its first arguments.
            wanted: `(B, 1, H, W)`, how much of each position of the output is asked for.
        """
        size, places = wanted.shape[-2:], call.args[0].shape[1:-2]
        weights = self._key_weights(call, wanted)
        if len(places) == 2:
            border = [(k - q) // 2 for k, q in zip(weights.shape[1:3], places)]  # explicit keys
            weights = _resized(weights[:, border[0] :, border[1] :], size)
        else:
            weights = weights.unflatten(1, size)
        return weights.movedim(-1, 1)

    @staticmethod
    def _key_weights(call: dispatch.Call, wanted: Tensor) -> Tensor:
        """Weights on the keys of one operator call, `(B, *spatial_kv, num_heads)`.

        The arguments are those of `_weights`.
        """
        query, key, value, *rest = call.args
        group = query.shape[-2] // key.shape[-2]
        with torch.enable_grad():
            # One channel stands for all: they have the same weights.
            value = torch.ones_like(value[..., :1]).repeat_interleave(group, -2).requires_grad_()
            key = key.repeat_interleave(group, -2)
            output = call.implementations["reference"].run(query, key, value, *rest)
        places = output.shape[1:-2]
        wanted = wanted.movedim(1, -1)
        # Maps are padded at the bottom and right; a row of tokens is a map without its shape.
        wanted = _resized(wanted, places) if len(places) == 2 else wanted.flatten(1, 2)
        (weights,) = torch.autograd.grad(output, value, wanted[..., None].expand_as(output))
        return weights[..., 0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            for pattern, name in self.official_names.items():
                match = re.fullmatch(pattern, key.removeprefix(prefix))
                if match:
                    tensor = state_dict.pop(key)
                    if name is not None:
                        state_dict[prefix + match.expand(name)] = tensor
                    break
        for name, parameter in self.named_parameters():
            found = state_dict.get(prefix + name)
            if found is not None and tuple(found.shape) == (*parameter.shape, 1, 1):
                state_dict[prefix + name] = found.flatten(-3)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_arguments(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Arguments of `cls.__init__` are of their annotated types, and rates are rates.

    Raises:
        TypeError, ValueError: one is not.
    """
    hints = typing.get_type_hints(cls.__init__)
    try:
        given = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs).arguments
    except TypeError:
        return  # __init__ itself says what it does not take
    for name, value in given.items():
        hint = hints.get(name, Any)
        if name not in ("self", "device", "dtype") and not _fits(value, hint):
            allowed = getattr(hint, "__name__", str(hint))
            raise TypeError(f"{cls.__name__}: {name}={value!r} must be {allowed}")
        if name.endswith(("_drop", "drop_path")) and not 0 <= value <= 1:
            raise ValueError(f"{cls.__name__}: {name}={value!r} is a rate; allowed is 0 to 1")


def _fits(value: Any, hint: Any) -> bool:
    """Whether the value is of the annotated type; an int does for a float, a list for a tuple."""
    origin, entries = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, entry) for entry in entries)
    if origin is typing.Literal:
        return value in entries
    if origin is tuple:
        sequence = isinstance(value, Sequence) and not isinstance(value, str)
        return sequence and all(_fits(entry, entries[0]) for entry in value)
    if hint in (int, float):
        number = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """`(B, H, W, heads)` cropped, or padded with zeros, at the bottom and right."""
    return F.pad(x, (0, 0, 0, size[1] - x.shape[2], 0, size[0] - x.shape[1]))


def pad_map(x: Tensor, lack: Sequence[int]) -> Tensor:
    """`(B, H, W, C)` with `lack` rows and columns of zeros more, at the bottom and right."""
    # Whether a size that an exporter leaves free lacks anything must not be asked: the answer
    # would hold for the exported program.
    free = dispatch.exporting() and any(isinstance(length, torch.SymInt) for length in lack)
    return F.pad(x, (0, 0, 0, lack[1], 0, lack[0])) if free or any(lack) else x


def weights_on_values(
    attend: Callable[[Tensor], Tensor], x: Tensor, num_heads: int, query: tuple[int, int]
) -> Tensor:
    """What `attend`, linear in values, puts on every position at one: `(B, num_heads, H, W)`.

    Args:
        attend: of values `(B, H, W, num_heads, 1)` to outputs of that shape.
        x: the map `(B, H, W, C)`.
        num_heads: number of heads.
        query: row and column of the output.
    """
    with torch.enable_grad():
        value = x.new_ones((*x.shape[:3], num_heads, 1), requires_grad=True)
        output = attend(value)[:, query[0], query[1]]
        (weights,) = torch.autograd.grad(output.sum(), value)
    return weights[..., 0].movedim(-1, 1)


def spread(cells: Tensor, side: int, size: Sequence[int]) -> Tensor:
    """Weights of cells of the map, `(B, H', W', heads)`, in equal shares on their tokens.

    Returns:
        `(B, heads, H, W)` for a map of `size`, which cells of `side` x `side` tokens cover.
    """
    tokens = cells.repeat_interleave(side, 1).repeat_interleave(side, 2) / side**2
    return tokens[:, : size[0], : size[1]].movedim(-1, 1)


def auxiliary_parts(model: nn.Module) -> list[nn.Module]:
    """Parts of a model that have an attribute `auxiliary_loss`, in order.

    It holds the loss of a part's last forward in training, or None; a part has it from its first
    forward in training on.
    """
    return [module for module in model.modules() if hasattr(module, "auxiliary_loss")]


def auxiliary_losses(model: nn.Module) -> list[Tensor]:
    """Losses that parts of a model ask to be trained with, in the order of the parts."""
    losses = (part.auxiliary_loss for part in auxiliary_parts(model))
    return [loss for loss in losses if loss is not None]


def qkv_heads(
    qkv: nn.Linear, x: Tensor, num_heads: int, context: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `(..., num_heads, head_dim)` of a fused projection, as views of it.

    With `context` keys and values are those of its tokens.
    """
    if context is None:
        parts = qkv(x).unflatten(-1, (3, num_heads, -1))
        if parts.requires_grad and not torch.compiler.is_compiling() and not dispatch.plain_aten():
            return _Parts.apply(parts)
        query, key, value = parts.unbind(-3)
        return query, key, value
    dim = qkv.out_features // 3
    if not plain(qkv):
        key, value = qkv(context)[..., dim:].unflatten(-1, (2, num_heads, -1)).unbind(-3)
        return qkv(x)[..., :dim].unflatten(-1, (num_heads, -1)), key, value
    bias = (None, None) if qkv.bias is None else (qkv.bias[:dim], qkv.bias[dim:])
    query = linear(x, qkv.weight[:dim], bias[0]).unflatten(-1, (num_heads, -1))
    key, value = (
        linear(context, qkv.weight[dim:], bias[1]).unflatten(-1, (2, num_heads, -1)).unbind(-3)
    )
    return query, key, value


class _Parts(torch.autograd.Function):
    """`x.unbind(-3)`, whose gradient is not put together where it lies together already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        return x.unbind(-3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        whole = None if torch.is_grad_enabled() else joint(*grads)
        if whole is None:
            return torch.stack(grads, -3)
        return whole.view(*grads[0].shape[:-2], len(grads), *grads[0].shape[-2:])


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
