"""Multi-axis attention: MaxViT's block of local windows and a global grid.

Tu et al., "MaxViT: Multi-Axis Vision Transformer" (arXiv 2204.01697), section 3.2. Both attentions
cost linear time in the number of tokens, and together every token reaches every other.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitarium.ops.mixer import Mixer
from vitarium.ops.window import NAME
from vitarium.ops.window_mixers import GridAttention, Pair, WindowAttention

_ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # name in timm, approximation in torch


class MultiAxisAttention(Mixer, name="multi_axis"):
    """MaxViT's block without its convolution: window attention, then grid attention.

    Each is followed by a feed-forward network, and all four are residual and pre-normalised:

        x = x + scale * attention(norm(x));  x = x + scale * mlp(norm(x))

    With `parallel`, both attentions read the same normalised map and give half of the channels
    each, and one network follows. Cost for N tokens: 2 (4 N C^2 + 2 N w^2 C) of the attentions and
    4 N C^2 expand_ratio of the networks, in multiply-adds.

    Args:
        dim: number of channels C.
        num_heads: number of heads; `dim // dim_head` if None.
        dim_head: width of a head, where `num_heads` is None.
        window_size: the window of the first attention.
        grid_size: the grid of the second; `window_size` if None.
        parallel: both attentions side by side, timm's `ParallelPartitionAttention`.
        no_block_attn: the grid only.
        attn_bias: biases of the projections of both attentions.
        rel_pos_type, rel_pos_dim, padding: as in `WindowAttention`.
        head_first: the order of the outputs of `qkv`, as in `WindowAttention`.
        expand_ratio: hidden width of the feed-forward network over `dim`.
        act_layer: its activation, "gelu" or "gelu_tanh".
        norm_eps: epsilon of the layer norms.
        init_values: initial value of the layer scale; no layer scale if None.
        proj_drop: dropout rate after the projections and in the feed-forward network.
        drop_path: rate at which a residual branch is left out of a sample in training.

    Raises:
        ValueError: a width, size or choice is impossible; the message says which.
    """

    paper = "MaxViT (arXiv 2204.01697)"
    linear = True
    operator = NAME
    official_names: ClassVar[dict[str, str | None]] = {
        # timm's parallel block has all of its parts at the top.
        r"((norm[12]|mlp|ls[12])\..*)": r"attn_parallel.\1",
        r"(attn_(block|grid)\.(qkv|proj|rel_pos)\..*)": r"attn_parallel.attn.\1",
    }
    cost = "8*N*C**2 + 4*N*window_size**2*C + 4*N*C**2*expand_ratio"
    examples = (
        {"dim": 32, "num_heads": 2, "window_size": 4},
        {"dim": 32, "dim_head": 8, "window_size": 4, "grid_size": 3, "init_values": 0.1},
        {"dim": 32, "dim_head": 16, "window_size": 3, "parallel": True, "padding": "mask"},
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        dim_head: int = 32,
        window_size: int | Pair = 7,
        grid_size: int | Pair | None = None,
        parallel: bool = False,
        no_block_attn: bool = False,
        attn_bias: bool = True,
        rel_pos_type: str | None = "bias",
        rel_pos_dim: int = 512,
        head_first: bool = True,
        padding: str = "zeros",
        expand_ratio: float = 4.0,
        act_layer: str = "gelu",
        norm_eps: float = 1e-6,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_heads is None:
            if dim_head < 1 or dim % dim_head:
                raise ValueError(f"MultiAxisAttention: dim_head={dim_head} must divide dim={dim}")
            num_heads = dim // dim_head
        if parallel and (no_block_attn or dim % 2):
            raise ValueError(
                "MultiAxisAttention: parallel=True needs an even dim and no_block_attn=False, "
                f"got dim={dim}, no_block_attn={no_block_attn}"
            )
        if act_layer not in _ACTIVATIONS:
            raise ValueError(
                f"MultiAxisAttention: act_layer={act_layer!r}; allowed are "
                f"{', '.join(_ACTIVATIONS)}"
            )
        super().__init__(dim)
        if dim * expand_ratio < 1:
            raise ValueError(f"MultiAxisAttention: expand_ratio={expand_ratio} must be positive")
        factory = {"device": device, "dtype": dtype}
        attention: dict[str, Any] = {
            "num_heads": num_heads,
            "qkv_bias": attn_bias,
            "proj_bias": attn_bias,
            "rel_pos_type": rel_pos_type,
            "rel_pos_dim": rel_pos_dim,
            "head_first": head_first,
            "padding": padding,
            "proj_drop": proj_drop,
            "dim_out": dim // 2 if parallel else dim,
            **factory,
        }
        block: dict[str, Any] = {
            "hidden": int(dim * expand_ratio),
            "activation": act_layer,
            "norm_eps": norm_eps,
            "init_values": init_values,
            "proj_drop": proj_drop,
            "drop_path": drop_path,
            **factory,
        }
        windows = WindowAttention(dim, window_size=window_size, **attention)
        grid = GridAttention(
            dim, grid_size=window_size if grid_size is None else grid_size, **attention
        )
        if parallel:
            self.attn_parallel = _Block(dim, _SideBySide(windows, grid), **block)
        else:
            self.attn_block = nn.Identity() if no_block_attn else _Block(dim, windows, **block)
            self.attn_grid = _Block(dim, grid, **block)
        self.parallel = parallel

    def mix(self, x: Tensor) -> Tensor:
        return self.attn_parallel(x) if self.parallel else self.attn_grid(self.attn_block(x))

    @torch.no_grad()
    def attention_map(self, x: Tensor, query: tuple[int, int]) -> Tensor:
        """As in `Mixer`; with `parallel`, of the windows' heads, then the grid's."""
        if not self.parallel:
            return super().attention_map(x, query)
        x = self.attn_parallel.norm1(x)
        attn = self.attn_parallel.attn
        assert isinstance(attn, _SideBySide)
        maps = [part.attention_map(x, query) for part in (attn.attn_block, attn.attn_grid)]
        return torch.cat(maps, dim=1)


class _Block(nn.Module):
    """A pre-normalised attention and feed-forward network, both residual."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        hidden: int,
        activation: str,
        norm_eps: float,
        init_values: float | None,
        proj_drop: float,
        drop_path: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, **factory)
        self.attn = attn
        self.ls1 = _LayerScale(dim, init_values, **factory) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, **factory)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(dim, hidden, **factory),
                act=nn.GELU(approximate=_ACTIVATIONS[activation]),
                drop1=nn.Dropout(proj_drop),
                fc2=nn.Linear(hidden, dim, **factory),
                drop2=nn.Dropout(proj_drop),
            )
        )
        self.ls2 = _LayerScale(dim, init_values, **factory) if init_values else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.ls1(self.attn(self.norm1(x))))
        return x + self._dropped(self.ls2(self.mlp(self.norm2(x))))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return branch
        kept = branch.new_empty(len(branch), 1, 1, 1).bernoulli_(1 - self.drop_path)
        return branch * (kept / (1 - self.drop_path))


class _LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, dim: int, init_values: float, **factory: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values), **factory))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _SideBySide(nn.Module):
    """Two mixers of the same map, each of which gives half of the channels."""

    def __init__(self, attn_block: Mixer, attn_grid: Mixer) -> None:
        super().__init__()
        self.attn_block = attn_block
        self.attn_grid = attn_grid

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.attn_block(x), self.attn_grid(x)], dim=-1)
