"""Image folders: train/ and test/ (or val/), a folder a class, and the decoding of image files."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fpdarts.data.images import DataError, Images

CHUNK = 256  # files a task of the thread pool: a future for each of a million files would take a gigabyte


def is_image_folder(path: Path) -> bool:
    return any((path / part).is_dir() for part in ("train", "test", "val"))


def list_folder(path: Path) -> tuple[tuple[str, ...], Images, Images]:
    """Class names (sorted), training files and test files; test/ is taken before val/.

    Raises DataError for a missing part, an empty class and classes that are not in both parts. Opens no image.
    """
    test = path / "test" if (path / "test").is_dir() else path / "val"
    if not (path / "train").is_dir():
        raise DataError(f"{path}: {test.name}/ is there but no train/; put the training images into train/<class>/")
    if not test.is_dir():
        raise DataError(
            f"{path}: train/ is there but neither test/ nor val/; put images for the test into test/<class>/"
        )
    classes, test_classes = _classes(path / "train"), _classes(test)
    for here, there, names in (
        (test, path / "train", sorted(set(test_classes) - set(classes))),
        (path / "train", test, sorted(set(classes) - set(test_classes))),
    ):
        if names:
            raise DataError(f"{here} has classes that {there} lacks: {_some(names)}; both need the same class folders")
    return classes, _list_files(path / "train", classes), _list_files(test, classes)


def _classes(part: Path) -> tuple[str, ...]:
    # Hidden folders (.ipynb_checkpoints and the like) are no classes.
    names = sorted(entry.name for entry in os.scandir(part) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{part}: no images, for it has no class folders; put images into {part}/<class>/")
    return tuple(names)


def _list_files(part: Path, classes: tuple[str, ...]) -> Images:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    labels_of = {name: label for label, name in enumerate(classes)}
    files = make_dataset(str(part), labels_of, IMG_EXTENSIONS, allow_empty=True)
    if not files:
        raise DataError(f"{part}: no images in its class folders; looked for {', '.join(IMG_EXTENSIONS)}")
    labels = torch.tensor([label for _, label in files])
    counts = labels.bincount(minlength=len(classes))
    empty = [name for name, count in zip(classes, counts.tolist()) if not count]
    if empty:
        raise DataError(
            f"{part}: no images in class {_some(empty)}; add images ({', '.join(IMG_EXTENSIONS)}) or remove it"
        )
    return Images(labels, paths=tuple(path for path, _ in files))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_image(path: str) -> Image.Image:
    """The decoded image, converted to RGB; orientation tags are ignored. Raises DataError naming the path."""
    try:
        with Image.open(path) as image:
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # straight to RGB, PIL warns
            elif image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # PIL would clip at 255: all white
            elif image.mode in ("I", "F"):
                raise ValueError("32-bit grey levels, whose range is not known")
            return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise many kinds
        raise _unreadable(path, error) from error


def image_size(path: str) -> tuple[int, int]:
    """Width and height from the header. Raises DataError naming the path."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:
        raise _unreadable(path, error) from error


def check_headers(images: Images) -> None:
    """Open and verify every file without decoding it. Raises DataError naming the first that is no image."""

    def check(paths):
        for path in paths:
            try:
                with Image.open(path) as image:
                    image.verify()
            except Exception as error:
                raise _unreadable(path, error) from error

    for _ in _in_chunks(check, images.paths):
        pass


def decode(images: Images) -> Images:
    """Resident images of files of one square size, divisible by 4. Raises DataError naming the first that differs."""
    width, height = image_size(images.paths[0])
    if width != height or width % 4:
        raise DataError(
            f"{images.paths[0]}: is {width}x{height}; protocol cifar needs square images whose side is divisible by 4 "
            "(two reductions halve it): resize the images, or use protocol imagenet"
        )

    def decode_chunk(paths):
        pixels = np.empty((len(paths), height, width, 3), dtype=np.uint8)
        for row, path in zip(pixels, paths):
            image = read_image(path)
            if image.size != (width, height):
                raise DataError(
                    f"{path}: is {image.width}x{image.height}, but the first image is {width}x{height}; "
                    "protocol cifar needs one size: resize the images, or use protocol imagenet"
                )
            row[:] = image
        return pixels

    pixels = np.concatenate(list(_in_chunks(decode_chunk, images.paths)))
    return Images(images.labels, torch.from_numpy(pixels).permute(0, 3, 1, 2))


def _in_chunks(work, paths: tuple[str, ...]):
    """work(chunk) for every chunk of paths, on threads; results and the first error come in the order of the paths."""
    threads = min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, (paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)))


def _unreadable(path: str, error: Exception) -> DataError:
    return DataError(f"{path}: cannot be read as an image ({type(error).__name__}: {error}); repair or remove it")
