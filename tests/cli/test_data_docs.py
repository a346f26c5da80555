"""docs/data.md: its example runs, and its commands are ones that exist."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_example(tmp_path: Path, capsys) -> None:
    text = DOCS.read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- example: data -->\s+```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"root": tmp_path}
    exec(code, names)
    assert names["image"].size == (30, 20) and names["label"] == "light"
    assert capsys.readouterr().out.splitlines() == [
        "['dark', 'light'] 16 4",
        "{'min': 30.0, 'median': 30.0, 'max': 30.0} []",
    ]


def test_the_commands() -> None:
    text = DOCS.read_text(encoding="utf-8")
    commands = re.findall(r"^    vitarium (.+)$", text, re.MULTILINE)
    assert len(commands) >= 7
    for command in commands:
        name, *arguments = shlex.split(command)
        parser = importlib.import_module(f"vitarium.cli.{name}").parser()
        parser.exit_on_error = False
        parsed = parser.parse_args(arguments)
        assert parsed is not None
    options = set(re.findall(r"--source\.(\w+)", text))
    from vitarium.train.config import config_keys

    assert options <= {key.partition(".")[2] for key in config_keys() if key.startswith("source.")}
    assert len(options) >= 7
