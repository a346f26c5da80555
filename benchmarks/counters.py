"""Three counters side by side: ours, torch's and fvcore's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from vitarium.benchmarks import flops, guard


@dataclass(frozen=True)
class Counted:
    """Of one image of a model: parameters, multiply-adds by three counters, activations by two.

    `torch` is `FlopCounterMode`, which counts no activations. `failure` says why there are none.
    """

    name: str
    params: int = 0
    macs: dict[str, int] = field(default_factory=dict)
    activations: dict[str, int] = field(default_factory=dict)
    failure: str | None = None

    @property
    def equal(self) -> bool:
        """Whether all counters gave one number, which is not zero."""
        return all(
            len(set(c.values())) == 1 and all(c.values()) for c in (self.macs, self.activations)
        )


def bench_flops(
    names: Sequence[str],
    *,
    image_size: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Counted]:
    """Count models by every counter; nothing is timed.

    Args:
        names: models registered with timm.
        image_size: side of the images; each model's own if None.
        progress: called with the name of each model.

    Raises:
        ValueError: an unknown name, or no image size.
    """
    for name in names:
        flops.check_name(name)
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size} must be at least 1")
    found = []
    for name in names:
        progress(name)
        try:
            found.append(count_by_all(name, image_size))
        except Exception as error:  # of one model's own code: the others are counted all the same
            found.append(Counted(name, failure=guard.reason(error)))
    return found


def count_by_all(name: str, image_size: int | None = None) -> Counted:
    """Counts of one model."""
    on_meta = flops.on_meta(name, image_size)
    ours = flops.count(on_meta, image_size)
    torchs = flops.count_with_torch(on_meta, image_size)
    fvcores = flops.count_with_fvcore(flops.build(name, image_size), image_size)
    return Counted(
        name,
        ours.params,
        {"ours": ours.macs, "torch": torchs, "fvcore": fvcores.macs},
        {"ours": ours.activations, "fvcore": fvcores.activations},
    )


def counters_table(counted: Sequence[Counted]) -> Table:
    """A row per model."""
    table = Table(
        title="GFLOPs and activations (M) of one image, by counter",
        caption="1 multiply-add counts as 1, as in papers; torch counts no activations",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("model", overflow="fold")
    for heading in ("ours", "torch", "fvcore", "activ.\nours", "activ.\nfvcore"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in counted:
        if row.failure is not None:
            table.add_row(row.name, *[""] * 5, f"failed: {row.failure}")
            continue
        macs = [f"{row.macs[name] / 1e9:.4g}" for name in ("ours", "torch", "fvcore")]
        activations = [f"{row.activations[name] / 1e6:.4g}" for name in ("ours", "fvcore")]
        table.add_row(row.name, *macs, *activations, "equal" if row.equal else "differ")
    return table
