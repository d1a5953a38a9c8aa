"""open_data: find out what a path holds, and open it under a protocol."""

import os
from pathlib import Path

import numpy as np
import torch

from fpdarts.data.cifar import LAYOUTS, find_cifar, load_cifar
from fpdarts.data.folder import image_size as size_of
from fpdarts.data.folder import is_image_folder, list_folder, skipped, square_size
from fpdarts.data.images import PROTOCOLS, ImageData, Images
from fpdarts.errors import DataError

SMALL = 64  # a folder whose images are no larger is trained like CIFAR


def open_data(
    source: str | Path, protocol: str | None = None, image_size: int | None = None, skip: str | Path | None = None
) -> ImageData:
    """Open and check a data set.

    source: "digits" (built in; write ./digits for a folder of that name), a folder with CIFAR-10 or CIFAR-100 in
        python or binary format or the folder above it, or an image folder: train/ and test/ or val/, a folder a class.
    protocol: "digits", "cifar" or "imagenet"; by default what suits the data: an image folder is cifar if the first
        image of every class is at most 64 pixels wide and high, else imagenet.
    image_size: side of the images that the network sees, a multiple of 32; for protocol imagenet (default 224), since
        the other protocols take images as they are.

    skip: file with the names of files to leave out, a line each, relative to the image folder, as `fpdarts check-data`
        writes it.

    Image folders are only listed: a Loader opens the files, those that it is given.
    Raises DataError (a ValueError) for data that cannot be used, ValueError for an unknown protocol.
    """
    if protocol is not None and protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; one of: {', '.join(PROTOCOLS)}")
    if str(source) == "digits":
        if skip is not None:
            raise DataError("digits: are built in, so there are no files to skip; leave --skip out")
        _require(protocol, "digits", "digits", "its 8x8 images suit no other")
        return _resident("digits", "digits", *_load_digits(), image_size)
    path = Path(os.path.expanduser(source))  # unlike Path's own, it leaves what it cannot expand
    if not path.exists():
        raise DataError(f"{path}: does not exist; give a folder, or 'digits' for the built-in data")
    if not path.is_dir():
        raise DataError(f"{path}: is a file, not a folder; extract an archive first and name its folder")
    if is_image_folder(path):
        return _open_folder(str(source), path, protocol, image_size, skip)
    if skip is not None:
        raise DataError(f"{path}: is no image folder, so there are no files to skip; leave --skip out")
    if found := find_cifar(path):
        _require(protocol, "cifar", str(found[0]), "its images are 32x32")
        return _resident(str(source), "cifar", *load_cifar(*found), image_size)
    raise DataError(
        f"{path}: not recognised; looked for an image folder (train/ and test/ or val/, a folder a class in each) and "
        f"for CIFAR files ({', '.join(layout.train[0] for layout in LAYOUTS)}), in it or in a folder "
        f"{', '.join(layout.folder for layout in LAYOUTS)}"
    )


def _open_folder(source: str, path: Path, protocol: str | None, image_size: int | None, skip) -> ImageData:
    if protocol == "digits":
        raise DataError(
            f"{path}: protocol digits is for the built-in digits only; use cifar or imagenet for an image folder"
        )
    classes, train, test = list_folder(path, skipped(path, skip))
    if protocol is None:
        first = train.limited(len(classes))
        protocol = "cifar" if all(max(size_of(name)) <= SMALL for name in first.paths) else "imagenet"
    if protocol == "cifar":
        side, test_side = square_size(train.paths[0]), square_size(test.paths[0])
        if side != test_side:
            raise DataError(
                f"{path}: test images are {test_side} pixels wide, training images {side}; resize them to one size, "
                "or use protocol imagenet"
            )
        _require_size(source, image_size, side)
        return ImageData(source, protocol, classes, train, test, side)
    image_size = 224 if image_size is None else image_size
    if image_size <= 0 or image_size % 32:
        raise DataError(
            f"image_size {image_size}: protocol imagenet halves it five times, so it must be a multiple of 32"
        )
    return ImageData(source, protocol, classes, train, test, image_size)


def _resident(source, protocol, classes, train, test, image_size) -> ImageData:
    _require_size(source, image_size, train.pixels.shape[-1])
    return ImageData(source, protocol, classes, train, test, train.pixels.shape[-1])


def _require_size(source: str, image_size: int | None, side: int) -> None:
    if image_size not in (None, side):
        raise DataError(
            f"{source}: image_size {image_size}, but the images are {side}x{side}; only protocol imagenet resizes, "
            "so leave image_size out"
        )


def _require(protocol: str | None, only: str, source: str, reason: str) -> None:
    if protocol not in (None, only):
        raise DataError(
            f"{source}: protocol {protocol} does not fit, for {reason}; use protocol {only} or leave it out"
        )


def _load_digits() -> tuple[tuple[str, ...], Images, Images]:
    # Here, because importing scikit-learn takes longer than all the rest of this package.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255, (1797, 8, 8)
    pixels = torch.from_numpy(grey)[:, :, :, None].repeat(1, 1, 1, 3).permute(0, 3, 1, 2)
    images = Images(torch.from_numpy(digits.target.astype(np.int64)), pixels)
    parts = train_test_split(np.arange(len(grey)), test_size=0.2, stratify=digits.target, random_state=0)
    train, test = (images.subset(np.sort(part)) for part in parts)
    return tuple(str(name) for name in digits.target_names), train, test
