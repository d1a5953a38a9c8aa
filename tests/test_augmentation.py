"""Augmentations against torchvision's: the boxes that are drawn, the middle, and colours."""

import pytest
import torch
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as transforms

from fpdarts.data.augment import Views, _random_boxes, augmentation, jitter_
from tests.made import random_pixels


@pytest.mark.parametrize("size", [(100, 300), (40, 41), (300, 20), (8, 300)], ids=str)
def test_random_boxes_are_torchvisions(size):
    boxes = _random_boxes(torch.tensor([size]).expand(4000, 2), torch.Generator().manual_seed(1)).double()
    torch.manual_seed(2)
    image = torch.empty(3, *size)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)]
    ).double()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= torch.tensor(size)).all()
    # 6 standard errors of a difference of means
    error = 6 * (boxes.var(0) + theirs.var(0)).div(4000).sqrt() + 1e-9
    assert ((boxes.mean(0) - theirs.mean(0)).abs() < error).all(), (boxes.mean(0), theirs.mean(0))
    if min(size) > 30:  # in narrower ones nearly no try fits, and the spread is that of a few
        assert torch.allclose(boxes.std(0), theirs.std(0), rtol=0.08), (boxes.std(0), theirs.std(0))
    else:
        assert torch.equal(boxes.mode(0).values, theirs.mode(0).values)


def test_the_middle_is_torchvisions():
    transform = v2.Compose([v2.Resize(37, antialias=True), v2.CenterCrop(32)])
    for size in ((50, 71), (71, 50), (37, 37), (20, 33), (400, 401), (33, 200)):
        image = torch.from_numpy(random_pixels(3, *size))
        views = Views.central(torch.tensor([size]), 32)
        (top, left), whole = views.corner[0].tolist(), v2.functional.resize(image, views.size[0].tolist())
        assert torch.equal(whole[:, top : top + 32, left : left + 32], transform(image)), size


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)], ids=str)
def test_jitter_is_torchvisions(order):
    images = torch.rand(5, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    images[0, :, :4] = 0.25  # grey: no hue
    images[1, :, 2] = 0
    jitter = torch.tensor(
        [[1.3, 0.7, 1.4, 0.2], [0.6, 1.4, 0.6, -0.2], [1, 1, 1, 0], [1.4, 1.2, 0.9, 0.03], [1, 0.8, 1.1, -0.1]]
    )
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    expected = []
    for image, factors in zip(images, jitter.tolist()):
        for step in order:
            image = getattr(transforms, names[step])(image, factors[step])
        expected.append(image)
    found = jitter_(images * 255, jitter, list(order)) / 255
    # float32: a hue is a quotient of small differences, which brightness and clamping leave with fewer digits
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=2e-5)


def test_jitter_is_drawn_as_torchvision_draws_it():
    """Brightness, contrast and saturation from 0.6 to 1.4, hue from -0.2 to 0.2, in any order, each image its own."""
    augment = augmentation("imagenet", "retrain")
    sizes = torch.full((4000, 2), 50)
    views = Views.drawn(augment, sizes, 4000, 32, torch.Generator().manual_seed(0))
    low, high = torch.tensor([0.6, 0.6, 0.6, -0.2]), torch.tensor([1.4, 1.4, 1.4, 0.2])
    assert (views.jitter >= low).all() and (views.jitter <= high).all()
    torch.testing.assert_close(views.jitter.amin(0), low, rtol=0, atol=0.01)
    torch.testing.assert_close(views.jitter.amax(0), high, rtol=0, atol=0.01)
    error = 6 * (high - low) / 12**0.5 / 4000**0.5
    assert ((views.jitter.mean(0) - (low + high) / 2).abs() < error).all()
    assert len(views.order.unique(dim=0)) == 24 and len(views.jitter.unique(dim=0)) == 4000
