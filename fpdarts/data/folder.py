"""Image folders: train/ and test/ (or val/), a folder a class, and the decoding of image files."""

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fpdarts.data.augment import Views
from fpdarts.data.images import Images
from fpdarts.errors import DataError

T = TypeVar("T")
CHUNK = 256  # files a task of the pool: a future for each of a million files would take a gigabyte


def is_image_folder(path: Path) -> bool:
    return any((path / part).is_dir() for part in ("train", "test", "val"))


def skipped(path: Path, listed: str | Path | None) -> frozenset[str]:
    """The files that a list names, a line each, relative to the image folder `path`; none without a list.

    Raises DataError for a list that cannot be read, or that names a file which is not there.
    """
    if listed is None:
        return frozenset()
    try:
        names = [line for line in Path(listed).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listed}: cannot be read as a list of files ({error}); check-data writes one") from None
    for number, name in enumerate(names, 1):
        if not (path / name).is_file():
            raise DataError(f"{listed}: line {number} names {name}, which is not in {path}; check the data again")
    return frozenset(str(path / name) for name in names)


def list_folder(path: Path, skip: frozenset[str] = frozenset()) -> tuple[tuple[str, ...], Images, Images]:
    """Class names (sorted), training files and test files but those in `skip`; test/ is taken before val/.

    Raises DataError for a missing part, an empty class and classes that are not in both parts. Opens no image.
    """
    test = path / test_part(path)
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
    return classes, _list_files(path / "train", classes, skip), _list_files(test, classes, skip)


def test_part(path: Path) -> str:
    return "test" if (path / "test").is_dir() else "val"


def class_folders(part: Path) -> list[str]:
    """Names of the classes, sorted. Hidden folders (.ipynb_checkpoints and the like) are none."""
    return sorted(entry.name for entry in os.scandir(part) if entry.is_dir() and not entry.name.startswith("."))


def _classes(part: Path) -> tuple[str, ...]:
    names = class_folders(part)
    if not names:
        raise DataError(f"{part}: no images, for it has no class folders; put images into {part}/<class>/")
    return tuple(names)


def _list_files(part: Path, classes: tuple[str, ...], skip: frozenset[str]) -> Images:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    labels_of = {name: label for label, name in enumerate(classes)}
    files = make_dataset(str(part), labels_of, IMG_EXTENSIONS, allow_empty=True)
    files = [(file, label) for file, label in files if file not in skip]
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


def square_size(path: str) -> int:
    """The side of a square image that protocol cifar can take. Raises DataError naming the file if it is none."""
    width, height = image_size(path)
    if width != height or width % 4:
        raise DataError(
            f"{path}: is {width}x{height}; protocol cifar needs square images whose side is divisible by 4 "
            "(two reductions halve it): resize the images, or use protocol imagenet"
        )
    return width


def decode_chunk(paths: tuple[str, ...], side: int, central: bool) -> np.ndarray:
    """(n, side, side, 3) uint8. central: resized and cut to the middle, as for evaluation under protocol imagenet;
    otherwise every image must have that size. Raises DataError naming the first file that has not."""
    pixels = np.empty((len(paths), side, side, 3), dtype=np.uint8)
    for row, path in zip(pixels, paths):
        image = read_image(path)
        if central:
            row[:] = _middle(image, side)
        elif image.size != (side, side):
            raise wrong_size(path, image.size, side)
        else:
            row[:] = image
    return pixels


def _middle(image: Image.Image, side: int) -> Tensor:
    from torchvision.transforms.v2 import functional as transforms

    views = Views.central(torch.tensor([image.size[::-1]]), side)
    whole = transforms.resize(transforms.pil_to_tensor(image), views.size[0].tolist(), antialias=True)
    return transforms.crop(whole, *views.corner[0].tolist(), side, side).permute(1, 2, 0)


def header_sizes(paths: tuple[str, ...]) -> Tensor:
    """(n, 2) int64 height and width of every file, from its header. Raises DataError naming the first that is none."""
    return torch.tensor(list(itertools.chain(*in_chunks(_header_sizes, paths))))


def _header_sizes(paths: tuple[str, ...]) -> list[tuple[int, int]]:
    sizes = []
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes.append(image.size[::-1])
                image.verify()  # the checksums of a PNG; of a JPEG nothing
        except Exception as error:
            raise _unreadable(path, error) from error
    return sizes


def wrong_size(path: str, size: tuple[int, int], side: int) -> DataError:
    """size: width and height."""
    return DataError(
        f"{path}: is {size[0]}x{size[1]}, but the first image is {side}x{side}; "
        "protocol cifar needs one size: resize the images, or use protocol imagenet"
    )


def in_chunks(work: Callable[[tuple[str, ...]], T], paths: tuple[str, ...]) -> Iterator[T]:
    """work(chunk) for every chunk of paths; results and the first error come in the order of the paths.

    Many files are shared out to processes: opening a small image is Python's work, and threads would wait for one
    another. work: can be pickled.
    """
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    processes = min(16, cores())
    if len(chunks) <= 4 or processes == 1:
        yield from map(work, chunks)
        return
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(work, chunks)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unreadable(path: str, error: Exception) -> DataError:
    return DataError(f"{path}: cannot be read as an image ({type(error).__name__}: {error}); repair or remove it")
