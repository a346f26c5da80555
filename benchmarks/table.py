"""The README's table of what is in the library, generated from the registry.

python -m vitarium.benchmarks.table README.md           writes it between its two markers
python -m vitarium.benchmarks.table README.md --check   fails if the file differs
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from vitarium import zoo
from vitarium.benchmarks import flops
from vitarium.ops import MIXERS, OPERATORS, Mixer

START, END = "<!-- table:start -->", "<!-- table:end -->"
_SIZES = ("nano", "mini", "tiny", "small", "base", "large")
_SIZE = re.compile(rf"_({'|'.join(_SIZES)})(?=_|$)")
_BACKENDS = {
    "reference": "is the definition",
    "torch": "runs anywhere",
    "triton": "is fused",
    "natten": "hands the call to an installed NATTEN",
}
_COLUMNS = ("mixer", "backends", "models", "paper", "params, M", "GFLOPs", "published top-1, %")


def readme_table() -> str:
    """A Markdown table: one row per family of models, ordered by mixer."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
    # A family is one architecture: its smallest member has the mixers of all.
    rows += sorted(
        _row(_mixers_of(names[0]), family, names) for family, names in families().items()
    )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    present = [b for b in _BACKENDS if any(b in o.implementations for o in OPERATORS.values())]
    notes = (
        "GFLOPs count 1 multiply-add as 1, as papers do; top-1 is on ImageNet-1K, as published.",
        f"Backends: {', '.join(f'`{b}` {_BACKENDS[b]}' for b in present)}.",
    )
    return "\n".join((*lines, "", *notes))


def families() -> dict[str, list[str]]:
    """Registered models by family, `nat_mini` in `nat`, each family from small to large."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(zoo.list_models(), key=_by_size):
        size = _SIZE.search(name)
        found[name[: size.start()] if size else name].append(name)
    return dict(found)


def _by_size(name: str) -> tuple[int, str]:
    size = _SIZE.search(name)
    return (_SIZES.index(size[1]) if size else -1, name)


def _row(mixers: str, family: str, names: list[str]) -> tuple[str, ...]:
    operators = dict.fromkeys(MIXERS[mixer].operator for mixer in mixers.split(", "))
    backends = dict.fromkeys(b for name in operators for b in OPERATORS[name].implementations)
    sizes = [name.removeprefix(family).strip("_") for name in names]
    papers = dict.fromkeys(paper for name in names for paper in _papers(name))
    published = [figures for name in names if (figures := zoo.published(name)) is not None]
    params = [figures.params_M for figures in published]
    gflops = [figures.gflops for figures in published]
    if not published:
        counts = [flops.count(name) for name in names]
        params = [count.params / 1e6 for count in counts]
        gflops = [count.macs / 1e9 for count in counts]
    return (
        mixers,
        ", ".join(backends),
        f"`{family}_`: {', '.join(sizes)}" if any(sizes) else f"`{family}`",
        ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers),
        _range(params),
        _range(gflops),
        _range(figures.top1 for figures in published if figures.top1 is not None),
    )


def _mixers_of(name: str) -> str:
    """Names of the mixers in a model, comma-separated."""
    model = flops.on_meta(name)
    return ", ".join(sorted({m.name for m in model.modules() if isinstance(m, Mixer)}))


def _papers(name: str) -> list[str]:
    ids = flops.pretrained_cfg(name).paper_ids or ()
    ids = (ids,) if isinstance(ids, str) else ids
    return [paper.removeprefix("arXiv:") for paper in ids]


def _range(values: Iterable[float]) -> str:
    texts = [f"{value:.4g}" for value in sorted(values)]
    if not texts:
        return ""
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} - {texts[-1]}"


def updated(text: str) -> str:
    """`text` with the present table between its markers.

    Raises:
        ValueError: the markers are not there once each, in this order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"the table's place must be marked by one {START} and one {END} after it")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    return f"{before}{START}\n{readme_table()}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Write or check the table of a file; the return value is the process's exit status."""
    parser = argparse.ArgumentParser(description="The README's table, from the registry.")
    parser.add_argument("file", type=Path, help="file with the two markers")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if it differs")
    options = parser.parse_args(arguments)
    text = options.file.read_text(encoding="utf-8")
    new = updated(text)
    if new == text:
        return 0
    if options.check:
        print(f"{options.file}: the table differs from the registry", file=sys.stderr)
        return 1
    options.file.write_text(new, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
