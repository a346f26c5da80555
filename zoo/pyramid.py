"""The one hierarchical backbone: owns timm's model contract, families fill it with classes.

A family passes callables (stem, downsample, block) and, per stage, the token mixers as plain data.
There are no boolean flags and no subclasses: what a family does differently is another class.
Maps are channels-last, `(B, H, W, C)`, from the stem to the head, of any height and width.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from timm.layers import ClassifierHead, register_notrace_module, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from vitarium.ops import MIXERS, Mixer, build_mixer

StageMixers = Any  # a mixer spec, or a list of them that the blocks of the stage take in turn


class Stage(nn.Module):
    """A downsampler, a sequence of blocks and a norm: `(B, H, W, C_in) -> (B, H', W', C)`.

    There may be no downsampler and no norm.
    """

    def __init__(
        self,
        downsample: nn.Module | None,
        blocks: Sequence[nn.Module],
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.norm(x)


class Pyramid(nn.Module):
    """A stem, stages of blocks with a downsampler before all but the first, a norm and a head.

    Feature extraction sees one map per stage, taken after its blocks and norm and before the next
    downsampler. An isotropic network is a pyramid whose stages are single blocks of one width.

    Args:
        stem: `stem(in_chans, dim)`, a module `(B, in_chans, H, W) -> (B, H', W', dim)`.
        downsample: `downsample(dim_in, dim_out)`, a module that halves a channels-last map; one
            for the network, or a list with one per stage, of which the first is not used. None if
            no stage changes width or size.
        block: `block(dim, mixer, drop_path=rate, proj_drop=rate)`, a module that keeps the shape.
            One for the network, or per stage one or a list that its blocks take in turn.
        dims, depths: channels and number of blocks per stage.
        mixers: per stage a mixer spec, `"neighborhood"` or `("neighborhood", {"dilation": 8})`
            or None (the block gets no mixer), or a list of specs that its blocks take in turn.
        in_chans, num_classes: channels of the image; classes, 0 for pooled features.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for the unpooled map.
        stem_stride: pixels of the image per pixel of the stem's map, along each axis.
        norm_layer: `norm_layer(dim)`, the norm before the head.
        stage_norm: `stage_norm(dim)`, a norm at the end of every stage, on the way to the next;
            None for none.
        feature_norm: `feature_norm(dim)`, a norm of every stage's map where it is taken as a
            feature, not on the way to the next stage, as detectors have it; one for the network,
            or a list with one per stage. None for none.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the projections of feed-forward networks and of those mixers
            that have it.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        device, dtype: where and in which floating-point type the parameters are made.

    Raises:
        ValueError: arguments per stage differ in number, or a stage is empty.
        TypeError: an argument is unknown, or a mixer spec is malformed.
    """

    def __init__(
        self,
        *,
        stem: Callable[[int, int], nn.Module],
        downsample: Any,
        block: Any,
        dims: Sequence[int],
        depths: Sequence[int],
        mixers: Sequence[StageMixers],
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_stride: int = 4,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        stage_norm: Callable[[int], nn.Module] | None = None,
        feature_norm: Any = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        blocks_of_stages = [block] * len(dims) if callable(block) else block
        several = isinstance(downsample, Sequence)
        downsamples = downsample if several else [downsample] * len(dims)
        several = isinstance(feature_norm, Sequence)
        feature_norms = feature_norm if several else [feature_norm] * len(dims)
        for name, value in (
            ("depths", depths),
            ("mixers", mixers),
            ("block", blocks_of_stages),
            ("downsample", downsamples),
            ("feature_norm", feature_norms),
        ):
            if isinstance(value, str) or len(value) != len(dims):
                raise ValueError(
                    f"Pyramid: {name}={value!r} must have one entry per stage, "
                    f"as dims={tuple(dims)} does"
                )
        if not dims or min(depths) < 1:
            raise ValueError(f"Pyramid: depths={tuple(depths)} must be at least 1 in every stage")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.output_fmt = "NHWC"
        self.num_features = dims[-1]
        self.feature_info = []

        total = sum(depths)
        drop_path = iter(torch.linspace(0, drop_path_rate, total, device="cpu").tolist())
        reduction = stem_stride
        # Inside the context every layer is made on `device`, also those of timm versions whose
        # layers take no device argument.
        with factory_device(device):
            self.stem = stem(in_chans, dims[0])
            stages = []
            for i, dim in enumerate(dims):
                between = None
                make_downsample = downsamples[i]
                if i > 0 and make_downsample is not None:
                    between = make_downsample(dims[i - 1], dim)
                    reduction *= 2
                stage_blocks = [
                    make_block(
                        dim,
                        _make_mixer(spec, dim, proj_drop_rate),
                        drop_path=next(drop_path),
                        proj_drop=proj_drop_rate,
                    )
                    for make_block, spec in zip(
                        _in_turn(blocks_of_stages[i], depths[i]), _in_turn(mixers[i], depths[i])
                    )
                ]
                stages.append(
                    Stage(between, stage_blocks, None if stage_norm is None else stage_norm(dim))
                )
                self.feature_info.append(
                    {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
                )
            self.stages = nn.Sequential(*stages)
            self.feature_norms = nn.ModuleList(
                nn.Identity() if make_norm is None else make_norm(dim)
                for make_norm, dim in zip(feature_norms, dims)
            )
            self.norm = norm_layer(self.num_features)
            self.head = self._make_head(num_classes, global_pool)
            self.init_weights()
        if dtype is not None:
            self.to(dtype)
        self.head_hidden_size = self._pooled_features()

    def _make_head(self, num_classes: int, global_pool: str) -> ClassifierHead:
        return ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=self.drop_rate,
            input_fmt=self.output_fmt,
        )

    def _pooled_features(self) -> int:
        return self.num_features * self.head.global_pool.feat_mult()

    def init_weights(self) -> None:
        """Draw all parameters anew (as after `model.to_empty(device=...)` of a meta model).

        Linear layers: truncated normal of standard deviation 0.02 and zero bias, as in the papers
        of the families here. Every other module: its own `reset_parameters`.
        """
        self.apply(init_module)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone.

        They are those that mixers and other parts name in an attribute `no_weight_decay`.
        """
        return {
            f"{path}.{name}"
            for path, module in self.named_modules()
            if path
            for name, parameter in module.named_parameters()
            if name in getattr(module, "no_weight_decay", ())
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = (
            r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99999,)),
                (r"^norm|^feature_norms", (99999,)),
            ]
        )
        return {"stem": r"^stem", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block's activations in the backward pass instead of keeping them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; `global_pool=None` keeps the pooling."""
        if global_pool is None:
            global_pool = self.head.global_pool.pool_type
        like = next(self.parameters())
        self.num_classes = num_classes
        with factory_device(like.device):
            head = self._make_head(num_classes, global_pool)
            head.apply(init_module)
        self.head = head.to(like.dtype).train(self.training)
        self.head_hidden_size = self._pooled_features()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The final features and the maps after the stages that `indices` selects.

        Args:
            x: images, `(B, in_chans, H, W)`.
            indices: the last n stages if an int, all if None, else indices of stages.
            norm: apply the final norm to the last stage's map.
            stop_early: run no stage after the last selected one.
            output_fmt: layout of the maps, "NCHW" or "NHWC".
            intermediates_only: return the list of maps alone.

        Raises:
            ValueError: `output_fmt` is neither layout.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r} is unknown; allowed are 'NCHW', 'NHWC'")
        last = len(self.stages) - 1
        take, stop = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: stop + 1] if stop_early else self.stages
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take:
                tap = self.norm(x) if norm and i == last else self.feature_norms[i](x)
                intermediates.append(tap.permute(0, 3, 1, 2) if output_fmt == "NCHW" else tap)
        if intermediates_only:
            return intermediates
        return self.norm(x) if len(stages) > last else x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the selected stages' maps do not need; returns their indices."""
        take, stop = feature_take_indices(len(self.stages), indices)
        shorter = stop < len(self.stages) - 1
        if prune_norm or shorter:
            self.norm = nn.Identity()  # it is made for the last stage's width
        self.stages = self.stages[: stop + 1]
        self.feature_norms = nn.ModuleList(
            feature_norm if i in take else nn.Identity()
            for i, feature_norm in enumerate(self.feature_norms[: stop + 1])
        )
        if shorter:
            self.num_features = self.feature_info[stop]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalised map of the last stage, `(B, H', W', C)`."""
        x = self.stem(x)
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `(B, num_classes)` of a map `(B, H', W', C)`; pooled features if `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def factory_device(device: torch.device | str | None) -> contextlib.AbstractContextManager[Any]:
    """Within it, layers of timm versions without a `device` argument are made on `device` too."""
    return contextlib.nullcontext() if device is None else torch.device(device)


def _in_turn(spec: Any, depth: int) -> list[Any]:
    """One entry per block: `spec` itself, or the entries of the list that it is, in turn."""
    if isinstance(spec, str) or not isinstance(spec, Sequence) or is_mixer_spec(spec):
        return [spec] * depth
    if not spec:
        raise ValueError("Pyramid: the list of a stage's mixers or blocks is empty")
    return [spec[i % len(spec)] for i in range(depth)]


def is_mixer_spec(spec: Any) -> bool:
    """Whether `spec` is `(name, arguments)`: one mixer, not one per block."""
    return (
        isinstance(spec, Sequence)
        and len(spec) == 2
        and isinstance(spec[0], str)
        and isinstance(spec[1], Mapping)
    )


def _make_mixer(spec: Any, dim: int, proj_drop: float) -> Mixer | None:
    if spec is None:
        return None
    name = spec if isinstance(spec, str) else spec[0] if is_mixer_spec(spec) else None
    takes = signature(MIXERS[name].__init__).parameters if name in MIXERS else ("proj_drop",)
    defaults = {"proj_drop": proj_drop} if {"proj_drop", "kwargs"} & set(takes) else {}
    mixer = build_mixer(spec, dim, **defaults)
    register_notrace_module(type(mixer))  # one node to torch.fx: its size arithmetic is Python
    return mixer


def init_module(module: nn.Module) -> None:
    """Draw a module's own parameters anew, see `Pyramid.init_weights`."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif hasattr(module, "reset_parameters"):
        module.reset_parameters()
