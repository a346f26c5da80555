"""DropPos: a vision transformer learns where its patches are (arXiv 2309.03576, NeurIPS 2023).

Of the patches of an image some stay visible, and of those some keep their position embedding; the
others get a learned token in its place. Encoder and a shallow decoder without positions then say of
each of these where in the image it is. Neighbouring answers count as partly right (position
smoothing, less and less as the run goes on), and patches that resemble the whole image count for
more (attentive reconstruction). The images' classes are not used.

    vitarium train --config droppos --output runs/pretraining
    vitarium train --config RECIPE --initial_checkpoint runs/pretraining --output runs/finetuned
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.layers import build_sincos2d_pos_embed, trunc_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitarium.train.config import ConfigError, TrainConfig
from vitarium.train.data import ImageData, batches
from vitarium.train.metrics import Evaluation, Predictions
from vitarium.train.setup import BatchPreparation
from vitarium.train.task import Task
from vitarium.zoo.deit import DeiT


class Answers(NamedTuple):
    """Where a network takes the patches to be whose positions it was not told, `K` per image.

    Attributes:
        logits: `(B, K, N)` over the `N` positions.
        positions: `(B, K)`, where they are.
        weights: `(B, K)`, what each counts in the loss, of 1 for all seen patches of an image.
    """

    logits: Tensor
    positions: Tensor
    weights: Tensor


class PositionReconstruction(nn.Module):
    """A vision transformer, and beside it what pre-training needs and fine-tuning does not.

    The position embedding becomes the fixed one of sines and cosines, as in the official code.

    Args:
        network: timm's VisionTransformer with a class token and absolute position embedding.
        mask_ratio: part of the patches that is not seen.
        position_mask_ratio: part of the seen ones whose positions are dropped.
        decoder_depth, decoder_dim, decoder_num_heads: of the decoder; the network's own width and
            heads if None.
        temperature: of the softmax over similarities to the class token; None weighs all alike.

    Raises:
        ValueError: the network is none that can be trained so, or too few patches remain.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mask_ratio: float = 0.75,
        position_mask_ratio: float = 0.75,
        decoder_depth: int = 2,
        decoder_dim: int | None = None,
        decoder_num_heads: int | None = None,
        temperature: float | None = 0.1,
    ) -> None:
        super().__init__()
        self.network: Any = check_host(network)
        self.temperature = temperature
        self.grid_size = tuple(network.patch_embed.grid_size)
        patches = self.grid_size[0] * self.grid_size[1]
        self.visible = int(patches * (1 - mask_ratio))
        self.told = int(self.visible * (1 - position_mask_ratio))
        if self.told == self.visible:
            raise ValueError(
                f"mask_ratio={mask_ratio} leaves {self.visible} of {patches} patches, of which "
                f"position_mask_ratio={position_mask_ratio} drops no position"
            )
        dim = network.embed_dim
        heads = decoder_num_heads or network.blocks[0].attn.num_heads
        width = decoder_dim or dim
        if width % heads:
            raise ValueError(f"decoder_dim={width} must be a multiple of decoder_num_heads={heads}")
        self.position_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_embed = nn.Linear(dim, width)
        self.decoder_blocks = nn.Sequential(
            *(Block(width, heads, qkv_bias=True) for _ in range(decoder_depth))
        )
        self.decoder_norm = nn.LayerNorm(width)
        self.decoder_head = nn.Linear(width, patches)
        trunc_normal_(self.position_token, std=0.02)
        self._fix_positions()

    def _fix_positions(self) -> None:
        table = self.network.pos_embed
        sines = build_sincos2d_pos_embed(self.grid_size, table.shape[-1], interleave_sin_cos=False)
        with torch.no_grad():
            table.zero_()
            table[0, -len(sines) :] = sines
        table.requires_grad_(False)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Answers:
        """Answers for normalised images `(B, 3, H, W)`.

        Args:
            images: of the network's size.
            noise: `(2, B, N)`, which patches are seen and which are told their position: those of
                least noise; drawn if None.
        """
        network = self.network
        patches = network.patch_embed(images)
        if patches.dim() == 4:  # networks for several sizes keep the map
            patches = patches.flatten(1, 2)
        batch, count, dim = patches.shape
        if noise is None:
            noise = torch.rand(2, batch, count, device=patches.device)
        seen = noise[0].argsort(1)[:, : self.visible]
        told = noise[1].gather(1, seen).argsort(1).argsort(1) < self.told
        table = network.pos_embed[:, -count:].expand(batch, -1, -1)
        index = seen[..., None].expand(-1, -1, dim)
        positions = torch.where(
            told[..., None], table.gather(1, index), self.position_token.to(table.dtype)
        )
        encoded = self._encode(patches.gather(1, index) + positions)
        prefix = network.num_prefix_tokens
        decoded = self.decoder_blocks(self.decoder_embed(encoded))
        logits = self.decoder_head(self.decoder_norm(decoded[:, prefix:]))
        dropped = (~told).nonzero()[:, 1].view(batch, -1)
        logits = logits.gather(1, dropped[..., None].expand(-1, -1, count))
        weights = self._weights(patches, table).gather(1, seen)
        weights = (weights / weights.sum(1, keepdim=True)).gather(1, dropped)
        return Answers(logits, seen.gather(1, dropped), weights)

    def _encode(self, patches: Tensor) -> Tensor:
        """The encoder's normalised tokens, those of class and registers first."""
        network, batch = self.network, len(patches)
        tokens = [network.cls_token, network.reg_token]
        prefix = torch.cat([token for token in tokens if token is not None], 1)
        if not network.no_embed_class:
            prefix = prefix + network.pos_embed[:, : prefix.shape[1]]
        x = torch.cat([prefix.expand(batch, -1, -1), patches], 1)
        x = network.norm_pre(network.pos_drop(x))
        for block in network.blocks:
            x = block(x)
        return network.norm(x)

    @torch.no_grad()
    def _weights(self, patches: Tensor, table: Tensor) -> Tensor:
        """`(B, N)`: how much each patch resembles the class token, once all is seen and told."""
        if self.temperature is None:
            return torch.ones(patches.shape[:2], device=patches.device)
        encoded = self._encode(patches + table).float()
        prefix = self.network.num_prefix_tokens
        similarity = F.cosine_similarity(encoded[:, :1], encoded[:, prefix:], dim=-1)
        return (similarity / self.temperature).softmax(1)


def check_host(network: nn.Module) -> nn.Module:
    """The network itself, if it can be trained to reconstruct positions.

    Raises:
        ValueError: it can not; the message says which can.
    """
    which = (
        "DropPos trains timm's VisionTransformer with class token and absolute position "
        "embedding, such as vit_small_patch16_224 or deit_small_patch16_224"
    )
    name = type(network).__name__
    if isinstance(network, DeiT):
        raise ValueError(f"{which}; the mixers of this {name} need whole maps of tokens")
    if not isinstance(network, VisionTransformer):
        raise ValueError(
            f"{which}; {name} is another network: its layers tell tokens where they are, or need "
            "whole maps of them"
        )
    if network.cls_token is None or network.pos_embed is None:
        raise ValueError(f"{which}; this {name} lacks one of them")
    if network.pos_embed.shape[-1] % 4:
        raise ValueError(f"DropPos: embed_dim={network.embed_dim} must be a multiple of 4")
    if any(hasattr(block.attn, "rel_pos") for block in network.blocks):
        raise ValueError(f"{which}; attention of this {name} has relative positions")
    return network


def smoothed_targets(positions: Tensor, grid_size: tuple[int, int], sigma: float) -> Tensor:
    """Positions as distributions that neighbours have a part of.

    The part of a position at distance d, in patches, is `exp(-d / sigma^2)`, normalised.

    Args:
        positions: indices in row-major order, of any shape.
        grid_size: rows and columns.
        sigma: width; 0 gives one-hot distributions.

    Returns:
        `(*positions.shape, rows * columns)`.
    """
    rows, columns = grid_size
    if sigma == 0:
        return F.one_hot(positions, rows * columns).float()
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    table = (-torch.cdist(places, places) / sigma**2).softmax(-1)
    return table.to(positions.device)[positions]


def position_loss(answers: Answers, grid_size: tuple[int, int], sigma: float) -> Tensor:
    """Cross-entropy with the smoothed positions, a weighted mean over the batch; a scalar."""
    targets = smoothed_targets(answers.positions, grid_size, sigma)
    losses = -(targets * answers.logits.float().log_softmax(-1)).sum(-1)
    return (losses * answers.weights).sum() / answers.weights.sum()


class DropPos(Task):
    """Position reconstruction; the figures of its evaluation are of dropped positions."""

    of_classes = False

    def __init__(self, config: TrainConfig, data: ImageData, device: torch.device) -> None:
        super().__init__(config, data, device)
        options = config.droppos
        if config.augment.mixup or config.augment.cutmix:
            raise ConfigError(
                "task='droppos' has no use for augment.mixup and augment.cutmix; set both to 0"
            )
        if set(self.sizes) != {self.inputs.image_size[0]}:
            raise ConfigError("task='droppos' has images of one size; progressive must be off")
        try:
            self.module: Any = PositionReconstruction(
                self.network,
                mask_ratio=options.mask_ratio,
                position_mask_ratio=options.position_mask_ratio,
                decoder_depth=options.decoder_depth,
                decoder_dim=options.decoder_dim,
                decoder_num_heads=options.decoder_num_heads,
                temperature=options.temperature,
            )
        except ValueError as error:
            raise ConfigError(f"task='droppos' with model={config.model!r}: {error}") from None
        size = tuple(self.network.patch_embed.img_size)
        if size != tuple(self.inputs.image_size):
            raise ConfigError(
                f"image_size={self.inputs.image_size[0]} is not the model's {size[0]}; for "
                "task='droppos' set model_kwargs.img_size to it"
            )
        self.grid_size = self.module.grid_size
        self._prepare = BatchPreparation(config, len(data.classes), self.inputs, device)
        # The classifier is not trained; without gradient no optimizer touches it.
        self.network.get_classifier().requires_grad_(False)
        self.network.fc_norm.requires_grad_(False)

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        self._prepare.start_epoch(epoch, self.sizes[epoch])

    def network_of(self, module: Any) -> nn.Module:
        return module.network

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self._prepare(images, targets)

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        sigma = self.config.droppos.sigma * (1 - self.progress)
        return position_loss(model(images), self.grid_size, sigma)

    @torch.no_grad()
    def evaluate(
        self,
        module: nn.Module,
        loader: DataLoader[Any],
        accelerator: Accelerator,
        before_batch: Callable[[], None],
    ) -> Evaluation:
        """Accuracy over all dropped positions of the held-out images, which are always the same."""
        module.eval()
        patches = self.grid_size[0] * self.grid_size[1]
        parts: list[Predictions] = []
        rates: list[tuple[int, float]] = []
        for images, places in batches(loader, accelerator.device):
            before_batch()
            noise = torch.stack([_noise(place, patches) for place in places.tolist()], 1)
            start = time.perf_counter()
            with accelerator.autocast():
                answers = module(
                    self.inputs.normalize(images).to(accelerator.device),
                    noise.to(accelerator.device),
                )
            count = answers.positions.shape[1]
            index = places.cpu().numpy()[:, None] * count + np.arange(count)
            target = answers.positions.flatten().cpu().numpy()
            logits = answers.logits.flatten(0, 1)
            parts.append(Predictions.from_logits(logits, target, index.flatten()))
            rates.append((len(images), time.perf_counter() - start))
        if accelerator.num_processes > 1:  # a process may have had no image
            parts, rates = map(gather_object, (parts, rates))
        if not parts:
            raise ValueError("none of the held-out images can be read")
        seen, seconds = (sum(values) for values in zip(*rates))
        total = len(loader.dataset)  # type: ignore[arg-type]
        return Evaluation(Predictions.joined(parts), patches, total - seen, seen / seconds)

    def rank(self, record: Mapping[str, Any]) -> tuple[float, ...]:
        return (-record["loss"],)


def _noise(place: int, patches: int) -> Tensor:
    """`(2, patches)`, a function of an image's place in the data set."""
    return torch.rand(2, patches, generator=torch.Generator().manual_seed(place))
