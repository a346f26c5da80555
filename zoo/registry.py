"""Registration of backbones with timm, and what their papers publish about them."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

CheckpointFilter = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]

_PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Published:
    """What a paper or its repository states of one checkpoint, rounded as stated there.

    Attributes:
        top1: ImageNet-1K validation accuracy in percent; None if not stated.
        params_M: parameters in millions.
        gflops: billions of multiply-adds of one image; None if not stated.
        resolution: height and width of that image.
    """

    top1: float | None
    params_M: float
    gflops: float | None
    resolution: int


_PUBLISHED: dict[str, Published] = {}  # by "model.tag"
_FILTERS: dict[str, CheckpointFilter] = {}  # by model
_UNLISTED: set[str] = set()  # models of no paper


def imagenet_cfg(size: int, *, stride: int | None = 32, **further: Any) -> dict[str, Any]:
    """timm's configuration of a checkpoint of ImageNet-1K, with timm's own evaluation.

    Args:
        size: pixels of the square images.
        stride: pixels per token of the last map, along each axis; None for models of sequences.
        further: entries that are added, or stand instead.
    """
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // stride, size // stride) if stride else None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head.fc",
        **further,
    }


def register_family(
    module: str,
    variants: Mapping[str, Callable[..., nn.Module]],
    *,
    default_cfgs: Mapping[str, Mapping[str, Any]],
    published: Mapping[str, Published],
    checkpoint_filter_fn: CheckpointFilter,
    out_indices: Sequence[int] = (0, 1, 2, 3),
    listed: bool = True,
) -> None:
    """Register one timm entry point per variant of a family, or of a part of it: call it per part.

    Args:
        module: name of the module that defines the family; its last part is timm's module name.
        variants: by registered name, what makes the model; an entry point's caller may override
            any of its keyword arguments.
        default_cfgs: timm's pretrained configurations, by "name.tag".
        published: figures by "name.tag".
        checkpoint_filter_fn: maps official state-dict keys to ours.
        out_indices: stages that `features_only=True` returns unless told otherwise.
        listed: whether `list_models()` has them without a pattern.
    """
    namespace = sys.modules[module]
    configurations = generate_default_cfgs({k: dict(v) for k, v in default_cfgs.items()})
    namespace.default_cfgs = {**getattr(namespace, "default_cfgs", {}), **configurations}
    _PUBLISHED.update(published)
    _FILTERS.update(dict.fromkeys(variants, checkpoint_filter_fn))
    if not listed:
        _UNLISTED.update(variants)

    def entry_point(name: str, build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
            try:
                return build_model_with_cfg(
                    build,
                    name,
                    pretrained,
                    pretrained_filter_fn=checkpoint_filter_fn,
                    feature_cfg={"out_indices": tuple(out_indices), "feature_cls": "getter"},
                    **kwargs,
                )
            except RuntimeError as error:
                if "No pretrained weights exist" not in str(error):
                    raise
                raise RuntimeError(_no_download(name)) from error

        create.__name__ = create.__qualname__ = name
        create.__module__ = module
        return create

    for name, build in variants.items():
        setattr(namespace, name, register_model(entry_point(name, build)))


def _no_download(name: str) -> str:
    """Why there is nothing to download, and what to do instead."""
    cfg = timm.get_pretrained_cfg(name)
    return (
        f"{name}: no weights can be downloaded. {cfg.description or ''} "
        f"Published at {cfg.origin_url}. pretrained_cfg_overlay={{'file': PATH}} loads a file; "
        "pretrained=False draws weights"
    )


def checkpoint_filter(model_name: str) -> CheckpointFilter | None:
    """What maps official state-dict keys of a backbone to ours; None for models not of ours."""
    return _FILTERS.get(model_name)


def list_models(pattern: str = "") -> list[str]:
    """Names of the backbones of this package that timm knows; `pattern` as in timm.list_models.

    Without a pattern, those of papers: the testbeds are there for "*" and "testbed_*".
    timm's own models with our mixers, `vitarium.zoo.fused`, are not among them.
    """
    return [
        name
        for name in timm.list_models(pattern)
        if (module := timm.models.model_entrypoint(name).__module__).startswith(f"{_PACKAGE}.")
        and module != f"{_PACKAGE}.fused"
        and (pattern or name not in _UNLISTED)
    ]


def published(model_name: str) -> Published | None:
    """The published figures of "name" (its default checkpoint) or "name.tag"; None if none.

    Raises:
        ValueError: timm knows no such model or tag.
    """
    try:
        cfg = timm.get_pretrained_cfg(model_name, allow_unregistered=False)
    except RuntimeError as error:
        raise ValueError(
            f"model {model_name!r} is unknown; vitarium.zoo.list_models() has ours"
        ) from error
    tagged = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
    return _PUBLISHED.get(tagged)
