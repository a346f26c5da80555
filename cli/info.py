"""`vitarium info`: one model: size, cost, stages, checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import timm
from jsonargparse import ArgumentParser, Namespace
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from torch import nn

from vitarium import zoo
from vitarium.benchmarks import count, flops
from vitarium.ops import Mixer


def parser() -> ArgumentParser:
    parser = ArgumentParser(description="Describe one model, ours or any other of timm's.")
    parser.add_argument("model", metavar="MODEL", type=str, help="a registered name")
    return parser


def run(config: Namespace) -> None:
    Console().print(describe(config.model))


def describe(name: str) -> RenderableType:
    """Figures, stages with their mixers, and checkpoints of a model.

    Raises:
        ValueError: no model has this name; the message offers the nearest ones.
    """
    model = flops.on_meta(name)
    return Group(_figures(name, model), _stages(model), _checkpoints(name))


def _plain_table(title: str, *headings: str, show_header: bool = True) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=show_header,
        collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _figures(name: str, model: nn.Module) -> Table:
    shape = flops.input_shape(model, None, 1)
    counts = count(name)
    table = _plain_table(name, "", "", show_header=False)
    table.add_row("defined in", type(model).__module__)
    table.add_row("input", "x".join(map(str, shape[1:])))
    table.add_row("params", f"{counts.params:,}")
    table.add_row("GFLOPs", f"{counts.macs / 1e9:.3f} (1 multiply-add counts as 1, as in papers)")
    table.add_row("activations", f"{counts.activations:,}")
    ours = bool(zoo.list_models(name.partition(".")[0]))
    published = zoo.published(name) if ours else None
    if published is not None:
        top1 = f", top-1 {published.top1} %" if published.top1 is not None else ""
        gflops = f"{published.gflops:g} GFLOPs" if published.gflops is not None else "no GFLOPs"
        table.add_row(
            "published",
            f"{published.params_M:g} M params, {gflops} at {published.resolution} pixels{top1}",
        )
    return table


def _stages(model: nn.Module) -> Table:
    table = _plain_table("stages", "module", "channels", "stride", "mixers")
    for stage in getattr(model, "feature_info", ()):
        module = model.get_submodule(stage["module"]) if stage["module"] else model
        mixers = "\n".join(_mixers(module))
        table.add_row(stage["module"], str(stage["num_chs"]), str(stage["reduction"]), mixers)
    return table


def _mixers(module: nn.Module) -> Iterator[str]:
    """Our mixers in a stage, equal ones once and with their number."""
    found = (f"{m.name}({m.extra_repr()})" for m in module.modules() if isinstance(m, Mixer))
    for description, number in Counter(found).items():
        yield f"{number} x {description}"


def _checkpoints(name: str) -> Table:
    table = _plain_table("checkpoints", "tag", "what is known of it")
    bare = name.partition(".")[0]
    ours = bool(zoo.list_models(bare))
    known = timm.models.get_arch_pretrained_cfgs(bare)
    # Ours also load from a file where there is nothing to download.
    for tagged in sorted(known) if ours else timm.list_pretrained(f"{bare}.*"):
        cfg = flops.pretrained_cfg(tagged)
        published = zoo.published(tagged) if ours else None
        papers = [cfg.paper_ids] if isinstance(cfg.paper_ids, str) else cfg.paper_ids or []
        facts = [f"{cfg.input_size[-1]} pixels", f"licence {cfg.license or 'not stated'}", *papers]
        if published is not None and published.top1 is not None:
            facts.insert(1, f"top-1 {published.top1} %")
        source = cfg.url or (f"hf-hub:{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.origin_url)
        lines = [", ".join(facts), source, None if cfg.url else cfg.description]
        table.add_row(cfg.tag or "", "\n".join(filter(None, lines)))
    return table
