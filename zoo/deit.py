"""The host of Agent-DeiT and InLine-DeiT: a vision transformer with class token, any mixer.

Touvron et al., "Training data-efficient image transformers & distillation through attention"
(arXiv 2012.12877, ICML 2021).
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import (
    register_notrace_function,
    register_notrace_module,
    resample_abs_pos_embed,
    trunc_normal_,
)
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitarium.ops import build_mixer
from vitarium.zoo.parts import Block
from vitarium.zoo.pyramid import factory_device, init_module

Size = tuple[int, int]


class TokenBlock(Block):
    """`Block` for a class token and the tokens of a map, whose mixer has `mix_tokens`."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """`(B, 1 + H * W, C)` of tokens of that shape, the class token first; `size` is (H, W)."""
        mixed = self.mixer.mix_tokens(self.norm1(x), size)
        return self.fed(x + self.drop_path1(self.ls1(mixed)))


register_notrace_module(TokenBlock)  # one node to torch.fx: its size arithmetic is Python


@register_notrace_function
def resampled(table: Tensor, native: Size, x: Tensor) -> Tensor:
    """The position embedding, made for a map of size `native`, for that of x, `(B, H, W, C)`."""
    size = (x.shape[1], x.shape[2])
    if size == tuple(native):
        return table
    return resample_abs_pos_embed(table, new_size=list(size), old_size=list(native))


class DeiT(VisionTransformer):
    """timm's VisionTransformer, whose blocks are told the height and width of the map.

    Mixers of maps need both; timm's blocks get a sequence of tokens alone. Images have any size:
    they are padded with zeros to whole patches, and the position embedding is interpolated.

    Args:
        mixers: specs of mixers that have `mix_tokens`, one per block.
        embed_dim: channels.
        img_size: side of the square image that the position embedding belongs to.
        patch_size: pixels per patch along each axis.
        mlp_ratio: hidden width of the feed-forward networks over `embed_dim`.
        in_chans, num_classes: channels of the image; classes, 0 for pooled features.
        global_pool: "token" for the class token, "avg", "max", "avgmax", or "" for all tokens.
        fc_norm: norm after pooling, not before; if None, where `global_pool` is not "token".
        drop_rate, pos_drop_rate: dropout before the classifier; after the position embedding.
        proj_drop_rate: dropout after the projections of mixers and feed-forward networks.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        device, dtype: where and in which floating-point type the parameters are made.
    """

    def __init__(
        self,
        *,
        mixers: Sequence[Any],
        embed_dim: int,
        img_size: int = 224,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "avgmax", "max", "token"] = "token",
        fc_norm: bool | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        specs = iter(mixers)

        def block(
            dim: int, mlp_ratio: float, proj_drop: float, drop_path: float, **_: Any
        ) -> TokenBlock:
            with factory_device(device):
                return TokenBlock(
                    dim,
                    build_mixer(next(specs), dim, proj_drop=proj_drop),
                    mlp_ratio=mlp_ratio,
                    drop_path=drop_path,
                    proj_drop=proj_drop,
                    norm_layer=partial(nn.LayerNorm, eps=1e-6),
                )

        super().__init__(
            embed_dim=embed_dim,
            depth=len(mixers),
            img_size=img_size,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
            block_fn=block,  # type: ignore[arg-type]
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            dynamic_img_size=True,
            dynamic_img_pad=True,
            weight_init="skip",
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            fc_norm=fc_norm,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        # Not all versions of timm take both arguments; all but the blocks is small.
        self.to(device=device, dtype=dtype)
        self.init_weights()

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Draw all parameters anew, as `Pyramid.init_weights`; the arguments are timm's, unused."""
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_module)

    def _pos_embed(self, x: Tensor) -> Tensor:
        # timm's own would interpolate in every exported graph, also at the native size.
        token = self.cls_token.expand(x.shape[0], -1, -1)
        table = resampled(self.pos_embed, self.patch_embed.grid_size, x)
        return self.pos_drop(torch.cat([token, x.flatten(1, 2)], 1) + table)

    def _embedded(self, x: Tensor) -> tuple[Tensor, Size]:
        """Tokens of images, the class token first, and the size of their map."""
        x = self.patch_embed(x)
        return self._pos_embed(x), (x.shape[1], x.shape[2])

    def _block(self, block: nn.Module, x: Tensor, size: Size) -> Tensor:
        return checkpoint(block, x, size) if self.grad_checkpointing else block(x, size)

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalised tokens, `(B, 1 + H' * W', C)`, the class token first."""
        x, size = self._embedded(x)
        for block in self.blocks:
            x = self._block(block, x, size)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """The final tokens and those after the blocks that `indices` selects.

        Args:
            x: images, `(B, in_chans, H, W)`.
            indices: the last n blocks if an int, all if None, else indices of blocks.
            return_prefix_tokens: return pairs of a map and the class token, `(B, 1, C)`.
            norm: apply the final norm to the selected tokens.
            stop_early: run no block after the last selected one.
            output_fmt: layout of the maps, "NCHW" or "NLC", a sequence.
            intermediates_only: return the list of maps alone.

        Raises:
            ValueError: `output_fmt` is neither layout.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is unknown; allowed are 'NCHW', 'NLC'")
        take, stop = feature_take_indices(len(self.blocks), indices)
        x, size = self._embedded(x)
        intermediates = []
        for i, block in enumerate(self.blocks[: stop + 1] if stop_early else self.blocks):
            x = self._block(block, x, size)
            if i in take:
                tap = self.norm(x) if norm else x
                prefix, tokens = tap.split((1, tap.shape[1] - 1), 1)
                if output_fmt == "NCHW":
                    tokens = tokens.transpose(1, 2).unflatten(2, size)
                intermediates.append((tokens, prefix) if return_prefix_tokens else tokens)
        return intermediates if intermediates_only else (self.norm(x), intermediates)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict in official or in our names, in our names.

    A position embedding of another image size is interpolated.
    """
    mapped = {
        re.sub(r"^(blocks\.\d+)\.attn\.", r"\1.mixer.", key): value
        for key, value in state_dict.items()
    }
    embedding = mapped.get("pos_embed")
    if embedding is not None and embedding.shape[1] != model.pos_embed.shape[1]:
        mapped["pos_embed"] = resample_abs_pos_embed(
            embedding, new_size=model.patch_embed.grid_size, num_prefix_tokens=1
        )
    return mapped
