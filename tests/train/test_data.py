"""Data: fixed splits, an order that depends on the seed alone, and transforms that repeat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from vitarium.train.config import AugmentConfig
from vitarium.train.data import EpochBatches, InputConfig, Samples, load_data, read_image, seed_all


def test_digits_are_split_once_and_for_all() -> None:
    first, second = load_data("digits"), load_data("digits")
    assert (len(first.train.targets), len(first.held_out.targets)) == (1437, 360)
    assert first.held_out.targets == second.held_out.targets
    assert first.classes == list("0123456789")
    counts = np.bincount(first.held_out.targets)
    everything = np.bincount(load_digits().target)
    assert np.abs(counts - everything / 5).max() < 1  # stratified
    images = [np.asarray(image).tobytes() for image in first.train.images]
    held_out = {np.asarray(image).tobytes() for image in first.held_out.images}
    assert not held_out & set(images)


def test_folders_are_split_the_same_way_each_time(digit_folders: Path) -> None:
    data = load_data(f"folder:{digit_folders}")
    again = load_data(f"folder:{digit_folders}")
    for split, same in ((data.train, again.train), (data.held_out, again.held_out)):
        assert list(split.images) == list(same.images) and split.targets == same.targets
    assert data.classes == ["class_1", "class_4", "class_7"]
    assert np.bincount(data.held_out.targets).tolist() == [4, 4, 4]
    assert not set(data.train.images) & set(data.held_out.images)


def test_an_epoch_has_every_image_once_in_an_order_of_its_own() -> None:
    batches = EpochBatches(20, 4, seed=1)
    orders = []
    for batches.epoch in (0, 1, 0):
        orders.append([index for batch in batches for index, *_ in batch])
        assert sorted(orders[-1]) == list(range(20))
    assert orders[0] == orders[2] != orders[1]
    assert [i for batch in EpochBatches(20, 4, seed=2) for i, *_ in batch] != orders[0]


def test_an_epoch_goes_on_at_any_batch() -> None:
    batches = EpochBatches(23, 4, seed=1)
    whole = list(batches)
    assert len(whole) == len(batches) == 5  # 3 images fill no batch
    batches.first = 3
    assert list(batches) == whole[3:]


def test_processes_share_a_batch() -> None:
    whole = list(EpochBatches(22, 6, seed=5))
    parts = [list(EpochBatches(22, 3, 5, process, 2)) for process in range(2)]
    assert [first + second for first, second in zip(*parts)] == whole


def test_too_large_a_batch() -> None:
    with pytest.raises(ValueError, match=r"batch_size=8 on 3 process\(es\) exceeds the 20"):
        EpochBatches(20, 8, 0, 0, 3)


def test_the_variation_of_an_image_depends_on_seed_epoch_and_image() -> None:
    inputs = InputConfig((16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    augment = AugmentConfig(scale=(0.3, 1.0), auto_augment="rand-m9-mstd0.5", color_jitter=0.4)
    samples = Samples(load_data("digits").train, inputs.transform(augment))

    def pixels(*key: int) -> np.ndarray:
        torch.rand(int(torch.randint(5, ()))), np.random.rand()
        return np.asarray(samples[key][0])

    assert (pixels(3, 0, 1, 7) == pixels(3, 0, 1, 7)).all()
    assert (pixels(3, 0, 1, 7) != pixels(3, 0, 1, 8)).any()
    assert (pixels(3, 0, 1, 7) != pixels(3, 1, 1, 7)).any()


def test_normalisation_is_that_of_the_model() -> None:
    inputs = InputConfig((4, 4), (0.5, 0.25, 0.0), (0.5, 0.25, 1.0), "bicubic", 1.0)
    white = inputs.normalize(torch.full((1, 3, 4, 4), 255, dtype=torch.uint8))
    assert white.dtype == torch.float32
    assert torch.allclose(white[0, :, 0, 0], torch.tensor([1.0, 3.0, 1.0]))


def test_seeding_covers_every_generator() -> None:
    import random

    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    seed_all(1, 2, 3)
    first = draw()
    seed_all(1, 2, 4)
    assert all(a != b for a, b in zip(draw(), first))
    seed_all(1, 2, 3)
    assert draw() == first


def test_images_of_every_mode_are_read_as_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGB", "RGBA", "P", "1", "LA"):
        Image.new(mode, (5, 7)).save(tmp_path / f"{mode}.png")
        image = read_image(tmp_path / f"{mode}.png")
        assert (image.mode, image.size) == ("RGB", (5, 7))


def test_the_strongest_augmentation_of_recipes_takes_every_image() -> None:
    """RandAugment keeps no bits of some, which Pillow refuses since 13."""
    augment = AugmentConfig(auto_augment="rand-m10-n9-inc1-p1.0")
    transform = InputConfig((16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0).transform(augment)
    image = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
    seed_all(0)
    varied = [transform(image) for _ in range(60)]
    assert all(np.asarray(each).shape == (3, 16, 16) for each in varied)
    assert any(not np.asarray(each).any() for each in varied)
