"""`vitarium list`: the models of this package, with published figures, or its mixers."""

from __future__ import annotations

import fnmatch

import timm
from jsonargparse import ArgumentParser, Namespace
from rich import box
from rich.console import Console
from rich.table import Table

from vitarium import zoo
from vitarium.benchmarks import count, flops
from vitarium.benchmarks.table import MIXER_COLUMNS, mixer_rows


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="List the models of this package, with published figures, or its token mixers."
    )
    parser.add_argument(
        "pattern", metavar="PATTERN", type=str, nargs="?", default="", help="such as 'dinat_s_*'"
    )
    parser.add_argument(
        "--mixers", action="store_true", help="list the token mixers instead of the models"
    )
    return parser


def run(config: Namespace) -> None:
    Console().print((mixer_list if config.mixers else model_list)(config.pattern))


def mixer_list(pattern: str = "") -> Table:
    """A row per token mixer whose name matches `pattern`.

    Raises:
        ValueError: none matches.
    """
    rows = [row for row in mixer_rows() if fnmatch.fnmatch(row[0], pattern or "*")]
    if not rows:
        known = ", ".join(row[0] for row in mixer_rows())
        raise ValueError(f"pattern={pattern!r} matches none of our mixers; they are {known}")
    table = Table(
        caption="context: size of a second map to attend to, mixer(x, context)",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for heading in MIXER_COLUMNS:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def model_list(pattern: str = "") -> Table:
    """A row per model and tag that matches `pattern` (as in timm.list_models).

    Raises:
        ValueError: none matches.
    """
    names = zoo.list_models(pattern)
    if not names:
        known = ", ".join(zoo.list_models())
        raise ValueError(f"pattern={pattern!r} matches none of our models; they are {known}")
    table = Table(
        caption="params in M; GFLOPs: 1 multiply-add counts as 1; top-1: ImageNet-1K, published",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("model.tag", overflow="fold")
    for heading in ("params", "GFLOPs", "pixels", "top-1"):
        table.add_column(heading, justify="right")
    table.add_column("licence")
    for name in names:
        for tagged in timm.list_pretrained(f"{name}.*") or [name]:
            table.add_row(tagged, *_figures(tagged))
    return table


def _figures(tagged: str) -> tuple[str, ...]:
    """Published figures where there are, counted ones where not."""
    cfg, published = flops.pretrained_cfg(tagged), zoo.published(tagged)
    if published is not None and published.gflops is not None:
        params, gflops = f"{published.params_M:g}", f"{published.gflops:g}"
    else:
        counts = count(tagged)
        params, gflops = f"{counts.params / 1e6:.3g}", f"{counts.macs / 1e9:.3g}"
    top1 = f"{published.top1:.1f}" if published is not None and published.top1 else ""
    return params, gflops, str(cfg.input_size[-1]), top1, cfg.license or ""
