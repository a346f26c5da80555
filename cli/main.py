"""The `vitarium` command: one subcommand per module of this package."""

from __future__ import annotations

import importlib
import sys

from jsonargparse import ArgumentParser

# Each module has `parser() -> ArgumentParser` and `run(config: Namespace) -> int | None`.
COMMANDS = {}


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; the return value is the process's exit status."""
    parser = ArgumentParser(prog="vitarium", description="Efficient vision backbones.")
    commands = parser.add_subcommands(dest="command", required=True)
    modules = {}
    for name, help_text in COMMANDS.items():
        modules[name] = importlib.import_module(f"vitarium.cli.{name}")
        commands.add_subcommand(name, modules[name].parser(), help=help_text)
    config = parser.parse_args(arguments)
    return modules[config.command].run(config[config.command]) or 0


if __name__ == "__main__":
    sys.exit(main())
