"""Models for images of 32 pixels: three stages, small enough to train on a CPU.

They differ from the published backbones in depth and width only. None has published weights.
"""

from functools import partial

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD

from vitarium.zoo.nat import checkpoint_filter_fn, nat
from vitarium.zoo.registry import register_family

VARIANTS = {
    "dinat_nano": partial(
        nat,
        embed_dim=32,
        depths=(2, 1, 1),  # three stages: timm expects that many feature maps of a backbone
        mlp_ratio=2.0,
        kernel_size=3,
        dilations=(2, 1, 1),  # 3 * 2 tokens fit the map of 8x8, 3 * 1 that of 4x4
        head_dim=16,
    ),
}

NANO_CFG = {
    "num_classes": 1000,
    "input_size": (3, 32, 32),
    "pool_size": (2, 2),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": IMAGENET_INCEPTION_MEAN,
    "std": IMAGENET_INCEPTION_STD,
    "first_conv": "stem.conv1",
    "classifier": "head.fc",
    "license": "apache-2.0",
}

register_family(
    __name__,
    VARIANTS,
    default_cfgs={name: NANO_CFG for name in VARIANTS},
    published={},
    checkpoint_filter_fn=checkpoint_filter_fn,
    out_indices=(0, 1, 2),
)
