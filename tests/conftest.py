"""Fixtures that tests of several folders share."""

import copy
import json
import lzma
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitarium import zoo

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each
    torch.set_num_threads(1)


class Parity:
    """Goldens of official code: names, shapes and outputs, for weights that a rule draws.

    Every value is drawn from the standard normal distribution, seeded by the CRC-32 of the
    tensor's name, so a golden needs to hold no weights. Beside the goldens lie tables of what is
    published of each model, whose rows models are compared with.
    """

    @staticmethod
    def load(path: Path) -> dict[str, Any]:
        return json.loads(lzma.decompress(path.read_bytes()))

    @staticmethod
    def fill(key: str, shape: tuple[int, ...]) -> Tensor:
        """The float64 tensor stored under `key`."""
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
        normal = generator.standard_normal(shape)
        if key.endswith("running_var"):
            normal = 1 + 0.5 * np.tanh(normal)
        elif key.endswith("running_mean"):
            normal = 0.1 * normal
        elif len(shape) <= 1:
            normal = 0.1 * normal if key.endswith("bias") else 1 + 0.1 * normal
        else:
            normal = normal / math.sqrt(math.prod(shape[1:]))
        return torch.from_numpy(np.asarray(normal))

    @classmethod
    def state_dict(cls, entries: Iterable[tuple[str, list[int], str]]) -> dict[str, Tensor]:
        """The state dict that a golden lists as (name, shape, kind); zeros where not "float"."""
        return {
            key: cls.fill(key, tuple(shape))
            if kind == "float"
            else torch.zeros(shape, dtype=torch.long)
            for key, shape, kind in entries
        }

    @staticmethod
    def image(batch: int, channels: int, height: int, width: int) -> Tensor:
        """Standard normal float64 images, always the same."""
        generator = np.random.Generator(np.random.PCG64(0))
        return torch.from_numpy(generator.standard_normal((batch, channels, height, width)))

    @staticmethod
    def close(output: Tensor, golden: Mapping[str, Any], tolerance: float = 1e-9) -> None:
        """Asserts that the output is the golden's, where its numbers are known."""
        want = golden["output"]
        assert list(output.shape) == want["shape"]
        values = next(want[name] for name in ("full", "values", "first64", "first") if name in want)
        known = torch.tensor(values, dtype=torch.float64)
        atol = tolerance * output.abs().max().item()
        found = output.flatten()[: len(known)]
        torch.testing.assert_close(found, known, rtol=tolerance, atol=atol)

    # --- models, their features and their logits -------------------------------------------------

    @classmethod
    def official(
        cls,
        golden: Mapping[str, Any],
        folder: Path,
        name: str | None = None,
        stored: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> nn.Module:
        """A float64 model in evaluation, with as many parameters as the golden's.

        Its weights are the golden's, which timm loads strictly from a file.

        Args:
            golden: what `load` returns; its "arguments", if any, are the model's.
            folder: where the file is written.
            name: the registered name of the model; by default the golden's "model".
            stored: what the file holds; by default the weights under "model".
            arguments: further arguments of the model.
        """
        file = folder / "official.pth"
        torch.save(stored or {"model": cls.state_dict(golden["state_dict"])}, file)
        model = timm.create_model(
            name or golden["model"],
            pretrained=True,
            pretrained_cfg_overlay={"file": str(file)},
            dtype=torch.float64,
            **golden.get("arguments", {}),
            **arguments,
        ).eval()
        assert sum(p.numel() for p in model.parameters()) == golden["params"]
        return model

    @staticmethod
    def close_features(computed: Iterable[Tensor], listed: Iterable[Mapping[str, Any]]) -> None:
        """Asserts that features are those that a golden lists, in the same order.

        Their shapes are equal, and their means, standard deviations and first values within 1e-6
        of the standard deviation. A map in NHWC is compared as tokens where tokens are listed.
        """
        for have, want in zip(computed, listed, strict=True):
            if have.ndim == 4 and len(want["shape"]) == 3:
                have = have.flatten(1, 2)
            name, tolerance = want.get("name", want.get("stage")), 1e-6 * want["std"]
            first = want["first"] if "first" in want else want["first8"]
            assert list(have.shape) == want["shape"], name
            assert have.mean().item() == pytest.approx(want["mean"], abs=tolerance), name
            assert have.std(unbiased=False).item() == pytest.approx(want["std"], abs=tolerance)
            assert have.flatten()[: len(first)].tolist() == pytest.approx(first, abs=tolerance)

    @staticmethod
    def close_logits(computed: Tensor, golden: Mapping[str, Any]) -> None:
        """Asserts that logits are the golden's within 1e-6 of their standard deviation."""
        logits = torch.tensor(golden["logits"], dtype=torch.float64)
        assert (computed - logits).abs().max() < 1e-6 * logits.std()

    # --- published figures -----------------------------------------------------------------------

    @staticmethod
    def cost(name: str, resolution: int) -> tuple[int, float]:
        """The parameters of a model, and its billions of multiply-adds on one square image."""
        model = timm.create_model(name, device="meta").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, resolution, resolution, device="meta"))
        # The counter has 2 operations per multiply-add, papers have 1.
        return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9

    @staticmethod
    def check_published(name: str, row: Mapping[str, Any], **fields: Any) -> PretrainedCfg:
        """Asserts that a model states a published row, and returns its configuration for timm.

        The figures are the row's, and so is the input size; there are 1000 classes; the first
        convolutions and the classifier are where the configuration says.

        Args:
            name: the registered name of the model.
            row: an entry of a table of published figures.
            fields: what further fields of the configuration hold.
        """
        size = row["resolution"]
        figures = zoo.Published(row["top1"], row["params_M"], row["gflops"], size)
        assert zoo.published(name) == figures
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.input_size == (3, size, size)
        assert cfg.num_classes == 1000
        assert {field: getattr(cfg, field) for field in fields} == fields
        model = timm.create_model(name, device="meta")
        convs = [cfg.first_conv] if isinstance(cfg.first_conv, str) else cfg.first_conv
        assert all(isinstance(model.get_submodule(conv), nn.Conv2d) for conv in convs)
        assert model.get_submodule(cfg.classifier) is model.get_classifier()
        return cfg


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: a file stays with one process, which must not begin it last."""
    items.sort(key=lambda item: item.path.name != "test_contract.py")


@pytest.fixture(scope="session")
def parity() -> type[Parity]:
    return Parity


class LowRank(nn.Module):
    """A linear layer and a product of two thin ones beside it, as adapters of others put it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        like = base.weight
        self.down = nn.Parameter(torch.randn(4, base.in_features).to(like) / 8)
        self.up = nn.Parameter(torch.randn(base.out_features, 4).to(like) / 8)

    def __getattr__(self, name: str) -> Any:  # weight, bias, in_features and so on
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_layer, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.T @ self.up.T


@pytest.fixture(scope="session")
def adapted():
    """Copies of a module: all of its linear layers with an adapter, and with it merged."""

    def copies(module: nn.Module) -> tuple[nn.Module, nn.Module]:
        ours, merged = copy.deepcopy(module), copy.deepcopy(module)
        for name, layer in list(ours.named_modules()):
            if isinstance(layer, nn.Linear):
                adapter = LowRank(layer)
                ours.set_submodule(name, adapter)
                with torch.no_grad():
                    merged.get_submodule(name).weight += adapter.up @ adapter.down
        return ours, merged

    return copies


@pytest.fixture(scope="session")
def unheard():
    """The layers of some types whose hooks do not run when `call()` calls the module."""

    def names(module: nn.Module, call: Callable[[], object], *types: type[nn.Module]) -> set[str]:
        layers = {n: m for n, m in module.named_modules() if isinstance(m, types)}
        heard: set[str] = set()
        handles = [
            layer.register_forward_hook(lambda *_, name=name: heard.add(name))
            for name, layer in layers.items()
        ]
        call()
        for handle in handles:
            handle.remove()
        return layers.keys() - heard

    return names
