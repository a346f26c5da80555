"""`vitarium doctor`: versions, devices, and which backends can run here and why not."""

from __future__ import annotations

import torch
from jsonargparse import ArgumentParser, Namespace
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vitarium.benchmarks import record
from vitarium.benchmarks.candidates import why_not
from vitarium.benchmarks.suite import Setting
from vitarium.ops import OPERATORS


def parser() -> ArgumentParser:
    return ArgumentParser(
        description="Versions, devices, and for every operator which of its backends run here. "
        "Each is tried with the operator's first test case."
    )


def run(config: Namespace) -> None:
    console = Console()
    for table in (_versions(), _devices(), _backends()):
        console.print(table)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _versions() -> Table:
    table = _table("library", "version")
    for name, version in record.versions().items():
        table.add_row(name, version)
    return table


def _device_names() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def _devices() -> Table:
    table = _table("device", "processor", "details")
    for name in _device_names():
        machine = record.this_machine(name)
        if machine.device == "cpu":
            details = f"{machine.cores} cores, {machine.threads} threads used; {machine.system}"
        else:
            properties = torch.cuda.get_device_properties(name)
            details = (
                f"{properties.total_memory / 2**30:.0f} GiB, "
                f"compute capability {properties.major}.{properties.minor}"
            )
        table.add_row(name, machine.processor, details)
    return table


def _backends() -> Table:
    table = _table("operator", "backend", "device", "runs")
    for name, operator in OPERATORS.items():
        for backend in operator.implementations:
            for device in _device_names():
                table.add_row(name, backend, device, _verdict(name, backend, device))
    return table


def _verdict(operator: str, backend: str, device: str) -> str:
    """Whether a backend runs, float32, on a device; if not, why."""
    setting = Setting(operator, OPERATORS[operator].cases[0], "float32", "forward")
    try:
        reason = why_not(setting, backend, torch.device(device))
    except Exception as failure:  # what a doctor is for
        return f"[red]fails[/red]: {escape(f'{type(failure).__name__}: {failure}')}"
    if reason is None:
        return "[green]yes[/green]"
    return f"no: {escape(reason.rpartition('cannot run this call: ')[2])}"
