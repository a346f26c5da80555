"""Models of the official repositories, from clones that the user has.

Their code is of many years: it imports modules that later releases of timm have moved and packages
that inference does not need. Within `building` those names lead to what stands for them now;
nothing of the repositories is part of this package.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm.layers
import timm.models
import torch
from torch import Tensor, nn

# Packages that the repositories import, and that evaluation on ImageNet does not use.
UNUSED = ("apex", "cv2", "fairscale", "mmcv", "mmdet", "mmseg", "numpy.lib.arraypad",
          "pkg_resources", "swattention", "mm_modules")  # fmt: skip


@dataclass(frozen=True)
class Official:
    """Where an official model comes from.

    Attributes:
        repository: owner and name.
        folder: of the repository, where its imports start.
        module: that has the factory.
        factory: a function or class.
        arguments: of the factory.
    """

    repository: str
    folder: str
    module: str
    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self, clones: Path) -> nn.Module:
        """The model.

        Args:
            clones: a folder with clones of the repositories, under their names without owner.

        Raises:
            ValueError: the repository is not there.
        """
        folder = clones / self.repository.split("/")[1] / self.folder
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is missing; clone https://github.com/{self.repository} into {clones}"
            )
        with building(folder):
            return getattr(importlib.import_module(self.module), self.factory)(**self.arguments)


class _DeformConv2dPack(nn.Module):
    """What LITv2 compiles by hand: a deformable convolution whose offsets a convolution gives."""

    def __init__(self, dim_in: int, dim_out: int, kernel_size: int, stride: int, padding: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim_out, dim_in, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(dim_out))
        self.conv_offset = nn.Conv2d(
            dim_in, 2 * kernel_size**2, kernel_size, stride=stride, padding=padding
        )
        self.stride, self.padding = stride, padding
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        from torchvision.ops import deform_conv2d

        offset = self.conv_offset(x)
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding)


class _Anything(types.ModuleType):
    """A module of which anything may be imported, and whose decorators change nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "DeformConv2dPack":
            return _DeformConv2dPack
        if name in ("DistributionNotFound",):
            return ModuleNotFoundError
        return _unused


def _unused(*args: Any, **kwargs: Any) -> Any:
    """As a decorator what it is given, or itself."""
    if args and callable(args[0]):
        return args[0]
    if args and isinstance(args[0], str):  # asks for the version of a package
        raise ModuleNotFoundError(args[0])
    return _unused


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if any(name == unused or name.startswith(f"{unused}.") for unused in UNUSED):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _moved() -> dict[str, types.ModuleType]:
    """Modules that timm had: their names led into `timm.layers` and `timm.models` of today."""
    names = {**vars(timm.models), **vars(timm.layers)}
    names = {name: value for name, value in names.items() if not name.startswith("__")}
    names |= {"register_model": lambda function: function, "load_pretrained": None}
    found = {}
    for name in ("layers", "helpers", "registry"):
        module = found[f"timm.models.{name}"] = types.ModuleType(f"timm.models.{name}")
        module.__dict__.update(names)
    return found


def _places(module: types.ModuleType) -> list[str]:
    """Where a module lies."""
    return [str(getattr(module, "__file__", None)), *map(str, getattr(module, "__path__", ()))]


@contextlib.contextmanager
def building(folder: Path) -> Iterator[None]:
    """Imports find the folder's modules, which are forgotten afterwards."""
    before = dict(sys.modules)
    register, cfg = timm.models.register_model, timm.models.vision_transformer._cfg
    finder = _Finder()
    path = sys.path
    sys.modules.update(_moved())
    # Not the working directory, whose packages would stand before theirs that have no __init__.
    sys.path = [str(folder), *(p for p in path if Path(p).resolve() != Path.cwd())]
    sys.meta_path.insert(0, finder)
    timm.models.register_model = lambda function: function
    timm.models.vision_transformer._cfg = lambda **kwargs: kwargs
    try:
        yield
    finally:
        timm.models.register_model, timm.models.vision_transformer._cfg = register, cfg
        sys.meta_path.remove(finder)
        sys.path = path
        # Places first: a namespace package looks for its parent, which may be gone by its turn.
        places = {name: _places(sys.modules[name]) for name in set(sys.modules) - set(before)}
        for name, found in places.items():
            if isinstance(sys.modules[name], _Anything) or any(
                place.startswith(str(folder)) for place in found
            ):
                del sys.modules[name]
        for name in _moved():
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]


_NORM = partial(nn.LayerNorm, eps=1e-6)
_AGENT = partial(Official, "LeapLabTHU/Agent-Attention", "agent_transformer")
_INLINE = partial(Official, "LeapLabTHU/InLine", ".")
_SWIN = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 56}
_PVT = {
    "patch_size": 4, "embed_dims": [64, 128, 320, 512], "mlp_ratios": [8, 8, 4, 4],
    "qkv_bias": True, "norm_layer": _NORM, "depths": [2, 2, 2, 2], "sr_ratios": [8, 4, 2, 1],
}  # fmt: skip
_AGENTS = [9, 16, 49, 49]
_SPLIT = "56-28-14-7"


def _crossformer(
    depths: Sequence[int], group_size: Sequence[int], interval: Sequence[int], acl: bool
) -> Official:
    arguments = {
        "img_size": 224, "patch_size": [4, 8, 16, 32], "embed_dim": 64, "depths": depths,
        "num_heads": [2, 4, 8, 16], "group_size": group_size, "crs_interval": interval,
        "mlp_ratio": [4.0] * 4, "merge_size": [[2, 4]] * 3, "use_acl": acl,
    }  # fmt: skip
    return Official("cheerss/CrossFormer", ".", "models.crossformer", "CrossFormer", arguments)


OFFICIAL: Mapping[str, Official] = {
    "agent_cswin_tiny": _AGENT(
        "models.agent_cswin", "Agent_CSWin_64_24181_tiny_224",
        {"agent_num": _AGENTS, "attn_type": "AABB", "la_split_size": _SPLIT},
    ),
    "agent_deit_tiny": _AGENT(
        "models.agent_deit", "VisionTransformer",
        {"embed_dim": 192, "num_heads": 3, "agent_num": [49] * 4, "agent_layer": -1},
    ),
    "agent_pvt_tiny": _AGENT(
        "models.agent_pvt", "PyramidVisionTransformer",
        {**_PVT, "img_size": 224, "num_heads": [1, 2, 5, 8], "agent_num": _AGENTS},
    ),
    "agent_swin_tiny": _AGENT(
        "models.agent_swin", "AgentSwinTransformer",
        {**_SWIN, "agent_num": _AGENTS, "attn_type": "AAAB"},
    ),
    "biformer_stl": Official("rayleizhu/BiFormer", ".", "models.biformer_stl", "biformer_stl"),
    "biformer_stl_nchw": Official(
        "rayleizhu/BiFormer", ".", "models.biformer_stl_nchw", "biformer_stl_nchw"
    ),
    "biformer_tiny": Official("rayleizhu/BiFormer", ".", "models.biformer", "biformer_tiny"),
    "crossformer_pp_small": _crossformer([2, 2, 18, 2], [4, 4, 14, 7], [4, 2, 1, 1], True),
    "crossformer_tiny": _crossformer([1, 1, 8, 6], [7] * 4, [8, 4, 2, 1], False),
    "flowformer_cv": Official(
        "thuml/Flowformer", "Flowformer_CV", "flowformer", "Flowformer",
        {"img_size": 224, "patch_size": 4, "embed_dim": [96, 192, 384, 768],
         "depth": [3, 3, 10, 3], "mlp_ratio": [4] * 4, "norm_layer": _NORM, "init_values": 1e-5},
    ),
    "inline_cswin_tiny": _INLINE(
        "models.inline_cswin", "inline_cswin_tiny",
        {"attn_type": "IISS", "la_split_size": _SPLIT},
    ),
    "inline_deit_tiny": _INLINE(
        "models.inline_deit", "VisionTransformer", {"embed_dim": 192, "num_heads": 6}
    ),
    "inline_pvt_tiny": _INLINE(
        "models.inline_pvt", "PyramidVisionTransformer",
        {**_PVT, "img_size": 224, "num_heads": [2, 4, 10, 16], "la_sr_ratios": "1111"},
    ),
    "inline_swin_tiny": _INLINE(
        "models.inline_swin", "InLineSwin", {**_SWIN, "attn_type": "IIIS"}
    ),
    "litv2_small": Official(
        "ziplab/LITv2", "classification", "models.litv2", "LITv2",
        {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "alpha": 0.9,
         "local_ws": [0, 0, 2, 1], "num_classes": 1000},
    ),
    "moh_transnext_small_75": Official(
        "SkyworkAI/MoH", "MoH-ViT", "transnext", "moh_transnext_small_75"
    ),
    "transnext_micro": Official(
        "DaiShiResearch/TransNeXt", "classification", "transnext", "transnext_micro"
    ),
}  # fmt: skip
