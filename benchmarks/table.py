"""The README's tables of what is in the library, generated from the registry.

python -m vitarium.benchmarks.table README.md           writes them between their markers
python -m vitarium.benchmarks.table README.md --check   fails if the file differs
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from vitarium import zoo
from vitarium.benchmarks import flops
from vitarium.ops import MIXERS, OPERATORS, Mixer

_SIZES = ("nano", "micro", "mini", "tiny", "small", "medium", "base", "large", "huge")
_SIZE = re.compile(rf"_({'|'.join(_SIZES)})(?=_|$)")
_ARXIV, _LINK = re.compile(r"\d{4}\.\d{5}"), r"[\g<0>](https://arxiv.org/abs/\g<0>)"
_BACKENDS = {
    "reference": "is the definition",
    "torch": "runs anywhere",
    "triton": "is fused",
    "natten": "hands the call to an installed NATTEN",
}
_COLUMNS = ("mixer", "models", "paper", "params, M", "GFLOPs", "published top-1, %")


MIXER_COLUMNS = ("mixer", "operator", "backends", "context", "paper")
PATTERN_COLUMNS = ("operator", "self", "causal self", "cross", "causal cross")


def models_table() -> str:
    """One row per family of models, ordered by mixer."""
    rows = sorted(_row(family, names) for family, names in families().items())
    return markdown(_COLUMNS, rows) + (
        "\n\nGFLOPs count 1 multiply-add as 1, as papers do; top-1 is on ImageNet-1K, as published."
    )


def mixers_table() -> str:
    """One row per mixer."""
    rows = [
        (
            f"`{name}`",
            f"`{operator}`" if operator else "ordinary operations",
            backends,
            context,
            _ARXIV.sub(_LINK, paper),
        )
        for name, operator, backends, context, paper in mixer_rows()
    ]
    present = [b for b in _BACKENDS if any(b in o.implementations for o in OPERATORS.values())]
    return markdown(MIXER_COLUMNS, rows) + (
        f"\n\nBackends: {', '.join(f'`{b}` {_BACKENDS[b]}' for b in present)}.\n"
        "Context: whether `mixer(x, context)` lets x attend to a second map, and of which size."
    )


def mixer_rows() -> list[tuple[str, ...]]:
    """What there is to say of every mixer, in the order of `MIXER_COLUMNS`."""
    return [
        (
            name,
            mixer.operator,
            ", ".join(OPERATORS[mixer.operator].implementations if mixer.operator else ["torch"]),
            OPERATORS[mixer.operator].context if mixer.cross else "no",
            mixer.paper,
        )
        for name, mixer in sorted(MIXERS.items())
    ]


def patterns_table() -> str:
    """Which of the four patterns of attention every operator computes."""
    rows = []
    for name, operator in sorted(OPERATORS.items()):
        optional = "is_causal" in inspect.signature(operator.function).parameters
        context = operator.context or "no"
        cells = []
        for offered in (not operator.always_causal, optional or operator.always_causal):
            cells.append(("yes", context) if offered else ("no", "no"))
        rows.append((f"`{name}`", *(cell for pair in zip(*cells) for cell in pair)))
    return markdown(PATTERN_COLUMNS, rows) + (
        "\n\nCross attention: keys and values come from other tokens than the queries, on a map of "
        "equal\nsize or of any. Causal: by `is_causal` or always, in the order of tokens or along "
        "the axes."
    )


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; bars within cells must have been replaced."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES = {"mixers": mixers_table, "patterns": patterns_table, "models": models_table}


def families() -> dict[str, list[str]]:
    """Registered models by family, `nat_mini` in `nat`, each family from small to large."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(zoo.list_models(), key=_by_size):
        found[family_of(name)].append(name)
    return dict(found)


def family_of(name: str) -> str:
    """A model's name up to its size."""
    size = _SIZE.search(name)
    return name[: size.start()] if size else name


def _by_size(name: str) -> tuple[int, str]:
    size = _SIZE.search(name)
    return (_SIZES.index(size[1]) if size else -1, name)


def _row(family: str, names: list[str]) -> tuple[str, ...]:
    # A family is one architecture: its smallest member has the mixers of all.
    mixers = _mixers_named(names[0])
    sizes = [name.removeprefix(family).strip("_") for name in names]
    papers = dict.fromkeys(paper for name in names for paper in _papers(name))
    published = [figures for name in names if (figures := zoo.published(name)) is not None]
    params = [figures.params_M for figures in published]
    gflops = [figures.gflops for figures in published if figures.gflops is not None]
    if not gflops:
        counts = [_count(name) for name in names]
        params = params or [count.params / 1e6 for count in counts]
        gflops = [count.macs / 1e9 for count in counts]
    return (
        mixers,
        f"`{family}_`: {', '.join(sizes)}" if any(sizes) else f"`{family}`",
        ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers),
        _range(params),
        _range(gflops),
        _range(figures.top1 for figures in published if figures.top1 is not None),
    )


@functools.cache
def _count(name: str) -> flops.Counts:
    return flops.count(name)


@functools.cache
def _mixers_named(name: str) -> str:
    return mixers_of(flops.on_meta(name))


def mixers_of(model: nn.Module) -> str:
    """Names of the mixers in a model, comma-separated."""
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
    """`text` with the present tables between their markers, `<!-- mixers:start -->` and so on.

    Raises:
        ValueError: it has no marker, or those of a table are not there once each, in order.
    """
    present = [name for name in TABLES if f"<!-- {name}:" in text]
    if not present:
        known = ", ".join(f"<!-- {name}:start -->" for name in TABLES)
        raise ValueError(f"no table is marked; known markers are {known}")
    for name in present:
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            raise ValueError(
                f"a table's place must be marked by one {start} and one {end} after it"
            )
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{TABLES[name]()}\n{end}{rest.partition(end)[2]}"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Write or check the table of a file; the return value is the process's exit status."""
    parser = argparse.ArgumentParser(description="The README's tables, from the registry.")
    parser.add_argument("file", type=Path, help="file with the markers")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if it differs")
    options = parser.parse_args(arguments)
    text = options.file.read_text(encoding="utf-8")
    new = updated(text)
    if new == text:
        return 0
    if options.check:
        print(f"{options.file}: a table differs from the registry", file=sys.stderr)
        return 1
    options.file.write_text(new, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
