"""Images in the device's memory as bytes: crops and flips are one gather a batch. Nothing can be faster."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fpdarts.data.augment import Augmentation, Views, crop_and_flip, crop_windows
from fpdarts.data.cache import decoded
from fpdarts.data.images import ImageData, Images


def in_memory(images: Images, data: ImageData, augmentation: Augmentation | None) -> Images:
    """The images with their pixels, (n, 3, H, H) uint8: as they are, or under protocol imagenet the middle that
    evaluation sees. Files are decoded once, and then read from the cache.

    augmentation: what is to be done to them; None for evaluation. Raises DataError naming a file that cannot be used,
    ValueError for an augmentation that needs the files.
    """
    if images.pixels is not None:
        return images
    if augmentation is not None and (augmentation.random_resized_crop or augmentation.jitter):
        raise ValueError(
            f"loader resident keeps one crop of each image, and training under protocol {data.protocol} takes others "
            "each time; choose dali or torchvision"
        )
    return replace(images, pixels=decoded(images.paths, data.image_size, central=data.protocol == "imagenet"))


class ResidentReader:
    """pixels: (n, 3, H, H) uint8, copied to the device. padding: of the crops that will be asked for."""

    def __init__(self, pixels: Tensor, padding: int, device: torch.device):
        self._padding, self._device = padding, device
        self._windows = crop_windows(pixels.to(device), padding)

    def __call__(self, order: Tensor, views: Views, places: list[slice]) -> Iterator[Tensor]:
        order, views = order.to(self._device), views.to(self._device)  # an epoch's choices at once
        for place in places:
            yield self.pixels(order[place], views.at(place))

    def pixels(self, indices: Tensor, views: Views) -> Tensor:
        """(B, 3, H, H) uint8 of the images `indices` (B,), on the device as `views` are. Waits for nothing and has
        shapes that depend on shapes only: a CUDA graph may hold it."""
        return crop_and_flip(self._windows, indices, views, self._padding)
