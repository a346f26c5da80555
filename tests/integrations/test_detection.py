"""Our backbones inside torchvision's detectors."""

import pytest
import timm
import torch
from torchvision.models.detection import FasterRCNN

from vitarium import zoo


def _scene(height: int, width: int, box: tuple[int, int, int, int], seed: int):
    """A noisy image with one bright rectangle, and the target that says where it is."""
    image = 0.1 * torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    left, top, right, bottom = box
    image[:, top:bottom, left:right] += 0.8
    return image, {"boxes": torch.tensor([box], dtype=torch.float32), "labels": torch.tensor([1])}


@pytest.mark.parametrize("name", ["nat_mini", "crossformer_tiny"])
def test_faster_rcnn_learns_on_images_of_several_shapes(name):
    torch.manual_seed(0)
    body = timm.create_model(name, features_only=True, embed_dim=32, depths=(1, 1, 1, 1))
    backbone = zoo.BackboneWithFPN(body, out_channels=32)
    model = FasterRCNN(backbone, num_classes=2, min_size=64, max_size=160)
    scenes = [_scene(64, 110, (20, 10, 60, 50), 0), _scene(90, 64, (8, 30, 50, 70), 1)]
    images, targets = map(list, zip(*scenes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sums = []
    for _ in range(3):
        losses = model(images, targets)
        loss = sum(losses.values())
        sums.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in body.model.stem.parameters())
        optimizer.step()
    assert sums[2] < sums[0]
    with torch.no_grad():
        found = model.eval()(images)
    for prediction, image in zip(found, images):
        boxes = prediction["boxes"]
        assert boxes.isfinite().all()
        assert (boxes[:, 0::2] <= image.shape[2]).all() and (boxes[:, 1::2] <= image.shape[1]).all()


@torch.no_grad()
def test_pyramid_has_one_map_per_feature_and_a_pooled_one():
    body = timm.create_model("dinat_nano", features_only=True, out_indices=(1, 2))
    maps = zoo.BackboneWithFPN(body, out_channels=8)(torch.randn(1, 3, 40, 72))
    assert {name: tuple(x.shape) for name, x in maps.items()} == {
        "0": (1, 8, 5, 9),
        "1": (1, 8, 3, 5),
        "pool": (1, 8, 2, 3),
    }


def test_a_body_without_features_is_refused():
    with pytest.raises(TypeError, match="features_only=True"):
        zoo.BackboneWithFPN(timm.create_model("dinat_nano"))
