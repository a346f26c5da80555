"""timm's models with our mixers, registered with timm: `fused_<name>` for timm's `<name>`.

They are timm's models, with timm's pretrained weights and configurations by timm's tags, and
`swap_mixers` done. `timm.list_models("fused_*")` lists them; `vitarium.zoo.list_models` does not,
whose models are of papers that timm has not.
"""

import sys
from collections.abc import Callable
from typing import Any

import timm
from timm.models import generate_default_cfgs, get_arch_pretrained_cfgs, register_model
from torch import nn

from vitarium.zoo.swap import swap_mixers

PREFIX = "fused_"
# Names in timm whose mixers `swap_mixers` replaces, and names among them that have others.
PATTERNS = (
    *("swin_*", "swinv2_*", "maxvit_*", "maxxvit*", "coatnet_*", "coatnext_*", "davit_*"),
    *("halonet*", "halo2botnet*", "sehalonet*", "eca_halonext*", "lamhalobotnet*", "haloregnet*"),
    *("focalnet_*", "volo_*", "shvit_*", "efficientvit_m*", "pvt_v2_*"),
    *("beit_*", "beitv2_*", "vit_relpos_*", "vit_srelpos_*"),
)
WITHOUT = ("swinv2_cr_*",)

default_cfgs: dict[str, Any] = {}


def _entry_point(name: str) -> Callable[..., nn.Module]:
    build = timm.models.model_entrypoint(name)

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model = build(pretrained=pretrained, **kwargs)
        swap_mixers(model)
        return model

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__module__ = __name__
    create.__doc__ = f"timm's {name} with the token mixers of this package."
    return create


def _register(name: str) -> None:
    configurations: dict[str, Any] = {
        PREFIX + key: cfg for key, cfg in get_arch_pretrained_cfgs(name).items()
    }
    default_cfgs.update(generate_default_cfgs(configurations))
    setattr(sys.modules[__name__], PREFIX + name, register_model(_entry_point(name)))


for _name in timm.list_models(list(PATTERNS), exclude_filters=list(WITHOUT)):
    _register(_name)
