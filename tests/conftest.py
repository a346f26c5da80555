"""Fixtures that tests of several folders share."""

import json
import lzma
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each
    torch.set_num_threads(1)


class Parity:
    """Goldens of official code: names, shapes and outputs, for weights that a rule draws.

    Every value is drawn from the standard normal distribution, seeded by the CRC-32 of the
    tensor's name, so a golden needs to hold no weights.
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: a file stays with one process, which must not begin it last."""
    items.sort(key=lambda item: item.path.name != "test_contract.py")


@pytest.fixture(scope="session")
def parity() -> type[Parity]:
    return Parity
