"""Which models a measurement is of: names, families of ours, the smallest of every family."""

from __future__ import annotations

from collections.abc import Sequence

from vitarium import zoo
from vitarium.benchmarks import flops
from vitarium.benchmarks.arguments import known
from vitarium.benchmarks.table import families


def chosen_models(
    names: Sequence[str] = (), *, family: str | None = None, all_smallest: bool = False
) -> list[str]:
    """Names of models, each once, in the order they are asked for.

    Args:
        names: any models that timm knows.
        family: a family of ours, such as "biformer": all its variants, from small to large.
        all_smallest: the smallest variant of every family of ours: of those that a paper
            publishes figures of, if there are any.

    Raises:
        ValueError: a name or family is unknown, or nothing is asked for.
    """
    if isinstance(names, str):
        raise ValueError(f"names={names!r} must be a sequence of model names")
    for name in names:
        flops.check_name(name)
    chosen = list(names)
    if family is not None:
        known("family", [family], families())
        chosen += families()[family]
    if all_smallest:
        chosen += smallest_models()
    if not chosen:
        raise ValueError("no model is named: give at least one name, or a family, or all_smallest")
    return list(dict.fromkeys(chosen))


def smallest_models() -> list[str]:
    """The smallest variant of every family of ours, published ones first."""
    return [
        next((name for name in names if zoo.published(name) is not None), names[0])
        for names in families().values()
    ]
