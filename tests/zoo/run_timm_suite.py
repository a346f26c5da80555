"""Run timm's own model tests, of the installed timm version, on every backbone of this package.

    python tests/zoo/run_timm_suite.py                          # all backbones of papers
    python tests/zoo/run_timm_suite.py nat_mini "dinat_s_*"     # those that match
    python tests/zoo/run_timm_suite.py "fused_halonet*"         # timm's models with our mixers
    python tests/zoo/run_timm_suite.py nat_mini -- -x -k fx     # what follows -- goes to pytest
    python tests/zoo/run_timm_suite.py --sdist timm-1.0.31.tar.gz

The tests are in timm's source distribution, which pip downloads (with `pdm-backend`, its build
backend, into a temporary folder); `--sdist` names one that is there already. pytest needs
`pytest-timeout`. Left out are tests that download weights and those of TorchScript, which PyTorch
has deprecated and mixers do not support.

The file is at the same time the pytest plugin that adds our models to timm's test matrix,
including the tests of feature extraction and pruning, and deselects timm's models.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PATTERNS = "VITARIUM_TIMM_SUITE_MODELS"
# timm selects the models of the feature tests by module; ours are tested as members of this one.
HOST_MODULE = "swin_transformer"
# Parameters of these learn from a loss of their own, so that logits give them no gradient.
INDIRECT = ("testbed_sparsifiner_nano", "testbed_sparsifiner_tiny", "testbed_sparsifiner_small")
GRADIENTS = ("test_model_backward", "test_prune_intermediate_layers_contract")
# timm tells models whose features are sequences by their names too; these are ours, and timm's own
# with our mixers.
SEQUENCES = (
    "NUM_NON_STD = len(NON_STD_FILTERS)\n",
    "NON_STD_FILTERS += ['*_deit_*', *(f'fused_{name}' for name in NON_STD_FILTERS)]\n"
    "NUM_NON_STD = len(NON_STD_FILTERS)\n",
)


def selected() -> set[str]:
    """Models that the patterns name, those of papers without any; timm's with ours by fused_*."""
    import timm

    import vitarium.zoo

    patterns = os.environ.get(PATTERNS, "").split(",")
    return {
        name
        for pattern in patterns
        for name in (
            timm.list_models(pattern)
            if pattern.startswith("fused_")
            else vitarium.zoo.list_models(pattern)
        )
    }


def pytest_configure(config) -> None:
    from timm.models import _registry

    _registry._module_to_models[HOST_MODULE].update(selected())


def pytest_collection_modifyitems(config, items) -> None:
    ours = selected()

    def is_ours(item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "pretrained" in item.originalname or "torchscript" in item.originalname:
            return False
        name = str(parameters.get("model_name", "")).split(".")[0]
        if name in INDIRECT and item.originalname.startswith(GRADIENTS):
            return False
        return name in ours

    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = [item for item in items if is_ours(item)]


def download(folder: Path) -> Path:
    """The source distribution of the installed timm, from the package index."""
    import timm

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    backend = folder / "backend"
    subprocess.run([*pip, "install", "-q", "--target", str(backend), "pdm-backend"], check=True)
    subprocess.run(
        [*pip, "download", "-q", f"timm=={timm.__version__}", "--no-deps", "--no-binary", ":all:",
         "--no-build-isolation", "-d", str(folder)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(backend)},
    )  # fmt: skip
    return folder / f"timm-{timm.__version__}.tar.gz"


def main() -> int:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=[], help="names or patterns of backbones")
    parser.add_argument("--sdist", type=Path, help="timm's source distribution, if at hand")
    options = parser.parse_args(arguments[:split])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with tarfile.open(options.sdist or download(folder)) as archive:
            archive.extractall(folder / "sdist", filter="data")
        (source,) = (folder / "sdist").iterdir()
        # Away from timm's own package, which must not shadow the installed one.
        suite = folder / "suite"
        shutil.copytree(source / "tests", suite / "tests")
        shutil.copy(source / "pyproject.toml", suite)
        tests = suite / "tests" / "test_models.py"
        text = tests.read_text(encoding="utf-8")
        if text.count(SEQUENCES[0]) != 1:
            raise RuntimeError(f"{tests.name} has no single list {SEQUENCES[0]!r} to add ours to")
        tests.write_text(text.replace(*SEQUENCES), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                   "-p", Path(__file__).stem, "tests/test_models.py"]  # fmt: skip
        search = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            PATTERNS: ",".join(options.models),
            "PYTHONPATH": os.pathsep.join(filter(None, search)),
            "HF_HUB_OFFLINE": "1",
        }
        command += arguments[split + 1 :]
        return subprocess.run(command, cwd=suite, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
