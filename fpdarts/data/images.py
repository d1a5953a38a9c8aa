"""The types that the other files of this package pass on: a set of labelled images, and a data set of two such sets."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fpdarts.errors import DataError

# Mean and standard deviation of each channel, with pixels in 0..1: of the digits', CIFAR-10's and ImageNet's training
# images. Other images of a protocol are normalized by the same.
NORMALIZATION = {
    "digits": ((0.3054,) * 3, (0.3760,) * 3),
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
PROTOCOLS = tuple(NORMALIZATION)


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images: resident (pixels), or files that are decoded when they are needed (paths), or both.

    labels: (n,) int64. pixels: (n, 3, H, H) uint8, channels_last, or None. paths: n file names, or None.
    """

    labels: Tensor
    pixels: Tensor | None = None
    paths: tuple[str, ...] | None = None

    def __post_init__(self):
        given = [field for field in (self.pixels, self.paths) if field is not None]
        if not given:
            raise ValueError("Images: give pixels or paths")
        if any(len(field) != len(self.labels) for field in given):
            raise ValueError("Images: as many labels as images are needed")
        if self.labels.dtype != torch.int64 or (self.pixels is not None and self.pixels.dtype != torch.uint8):
            raise ValueError("Images: labels must be int64, and pixels uint8, 0 to 255")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices) -> "Images":
        """The images at `indices` (integers), in that order. Raises ValueError for anything else, as a mask is."""
        indices = torch.as_tensor(indices)
        if indices.numel() and (indices.is_floating_point() or indices.dtype == torch.bool):
            raise ValueError(f"images are chosen by their numbers, not by {indices.dtype}; of a mask, take nonzero()")
        indices = indices.long()
        return Images(
            self.labels[indices],
            None if self.pixels is None else self.pixels[indices],
            None if self.paths is None else tuple(self.paths[i] for i in indices.tolist()),
        )

    def limited(self, count: int) -> "Images":
        """`count` images, as evenly over the classes as their sizes allow: the first of each class, order kept.

        All images if there are no more than `count`. Raises DataError if `count` is less than the number of classes.
        """
        classes = len(self.labels.unique())
        if count < classes:
            raise DataError(
                f"a limit of {count} images is too small for {classes} classes: set it to {classes} or more"
            )
        by_class = self.labels.argsort(stable=True)
        sizes = self.labels.bincount()
        first = sizes.cumsum(0) - sizes
        rank = torch.empty_like(self.labels)  # an image's place within its class
        rank[by_class] = torch.arange(len(self)) - first[self.labels[by_class]]
        # All the first images come first, then all the second ones, ...: any prefix of this order is balanced.
        balanced = by_class[rank[by_class].argsort(stable=True)]
        return self.subset(balanced[:count].sort().values)

    def split(self, fraction: float, seed: int) -> tuple["Images", "Images"]:
        """A random partition, balanced over the classes to within one image; the first part holds `fraction` of all.

        A pure function of the images, `fraction` and `seed`. Raises DataError if a part would be empty.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must lie between 0 and 1, not {fraction}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"--seed must be at least 0 and below 2^64, not {seed}")
        shuffled = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        shuffled = shuffled[self.labels[shuffled].argsort(stable=True)]  # class by class, random within a class
        # Every (1 / fraction)-th image of that order: each class gives its share, and so does the whole.
        quota = (torch.arange(len(self) + 1, dtype=torch.float64) * fraction + 1e-9).floor()  # 0.29 * 100 is 28.999...
        chosen = quota.diff() > 0
        if not 0 < chosen.sum() < len(self):
            raise DataError(
                f"{len(self)} images cannot be divided at {fraction}: one part would be empty; use more images"
            )
        return self.subset(shuffled[chosen].sort().values), self.subset(shuffled[~chosen].sort().values)

    def parts(self, weights: float, architecture: float, seed: int) -> tuple["Images", "Images"]:
        """Two disjoint parts for a search, balanced over the classes: these fractions of all. Raises as split does."""
        share = architecture / (1 - weights)
        try:
            first, rest = self.split(weights, seed)
            return first, rest if share > 1 - 1e-9 else rest.split(share, seed)[0]
        except DataError:
            raise DataError(
                f"{len(self)} training images are too few for parts of {weights} (weights) and {architecture} "
                "(architecture) of them: raise both fractions, or use more images"
            ) from None


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set for classification.

    source: "digits" or the path as given. protocol: "digits", "cifar" or "imagenet"; it decides normalization and
    augmentation. classes: the name of each label. image_size: side of the square images that the network sees.
    """

    source: str
    protocol: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    image_size: int

    def listing(self, images: Images) -> str:
        """A digest of the names, relative to the source, and labels of some of its images: other files give another."""
        digest = hashlib.blake2b(images.labels.numpy().tobytes(), digest_size=16)
        prefix = f"{Path(os.path.expanduser(self.source))}{os.sep}"
        for path in images.paths or ():
            digest.update(os.fsencode(path.removeprefix(prefix)) + b"\0")
        return digest.hexdigest()

    @property
    def mean(self) -> tuple[float, float, float]:
        return NORMALIZATION[self.protocol][0]

    @property
    def std(self) -> tuple[float, float, float]:
        return NORMALIZATION[self.protocol][1]
