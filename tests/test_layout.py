"""The shape of the project: which package may import which, and what waits until it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("ops", "zoo", "train", "benchmarks", "cli")  # each may import those before it
ALLOWED = {layer: set(LAYERS[: i + 1]) for i, layer in enumerate(LAYERS)}
ALLOWED["train"].add("configs")
FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def _imports(path: Path) -> list[tuple[str, int, bool]]:
    """(module, line, at the top of the file) of every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(ast.iter_child_nodes(tree))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name, node.lineno, node in top) for name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    for module, line, _ in _imports(path):
        parts = module.split(".")
        if parts[0] == "vitarium":
            assert parts[1] in ALLOWED[layer], f"{path}:{line}: {layer} must not import {module}"
        if layer == "ops":
            assert parts[0] != "timm", f"{path}:{line}: ops knows tensors only"


def test_triton_waits_until_a_kernel_runs() -> None:
    """Everything imports where Triton does not exist."""
    for path in FILES:
        if path.parent.name == "kernels":
            continue
        for module, line, top in _imports(path):
            assert not (top and module.split(".")[0] == "triton"), f"{path}:{line}"
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, vitarium.zoo, vitarium.train, vitarium.benchmarks\n"
        "import vitarium.ops.simulator\n"
        "from vitarium.ops import NeighborhoodAttention\n"
        "x = torch.randn(1, 8, 8, 16, requires_grad=True)\n"
        "NeighborhoodAttention(16, num_heads=1, kernel_size=3)(x).sum().backward()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_names_real_commands() -> None:
    from vitarium.cli.main import COMMANDS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"`{name}`" in text or f"`vitarium {name}`" in text, name
    for picture in [part.split(")")[0] for part in text.split("](")[1:]]:
        if "://" not in picture:
            assert (ROOT / picture).exists(), f"README.md points to {picture}, which is not there"


def test_documents_name_recipes_that_there_are() -> None:
    from vitarium.train.config import recipe_names

    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"--config ([a-z][a-z_0-9]*)(?![a-z_0-9.])", text))
    assert "digits" in named
    assert named <= set(recipe_names())
