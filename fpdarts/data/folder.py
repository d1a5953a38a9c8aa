"""Image folders: train/ and test/ (or val/), a folder a class, and the decoding of image files."""

import gc
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fpdarts.data.augment import Views
from fpdarts.data.images import Images
from fpdarts.data.lists import read_list
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
        lines = read_list(listed)
    except OSError as error:
        raise DataError(f"{listed}: cannot be read as a list of files ({error}); check-data writes one") from None
    names = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for number, name in names:
        if os.path.isabs(name) or os.pardir in Path(name).parts:  # would leave out nothing, for no file is listed so
            raise DataError(f"{listed}: line {number} names {name}; name it as in {path}: train/<class>/<file>")
        if not os.path.lexists(path / name):  # a link to nothing is there, and is one of those to be left out
            raise DataError(f"{listed}: line {number} names {name}, which is not in {path}; check the data again")
    return frozenset(str(path / name) for _, name in names)


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
    if len(classes) == 1:
        raise DataError(f"{path}: {classes[0]} is the only class; at least two are needed, a folder each")
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


def class_files(folder: str) -> list[str]:
    """Every file of a class, whatever it is, and of the folders in it, but hidden ones; the order depends on the names
    only. Raises OSError for a folder that cannot be read.

    Links to folders are followed, but for one that leads back to where it lies in, whose images are listed anyway, or
    are another class's.
    """

    def fail(error):
        raise error

    found, above = [], {folder: (os.path.realpath(folder),)}  # above: the real folders that each is reached through
    for root, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        found.append((root, sorted(name for name in names if not name.startswith("."))))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in list(folders):
            real = os.path.realpath(os.path.join(root, name))
            if any(Path(outer).is_relative_to(real) for outer in above[root]):
                folders.remove(name)
            else:
                above[os.path.join(root, name)] = (*above[root], real)
    return [os.path.join(root, name) for root, names in sorted(found) for name in names]


def _list_files(part: Path, classes: tuple[str, ...], skip: frozenset[str]) -> Images:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in class_files(os.path.join(part, name))
        if file.lower().endswith(IMG_EXTENSIONS) and file not in skip
    ]
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
    """The decoded image, converted to RGB; orientation tags are ignored but for those of TIFF, as Pillow does it.

    Raises DataError naming the path.
    """
    try:
        with Image.open(path) as image:
            if image.format == "PNG":  # of which Pillow decodes what is there, whatever the checksums say of it
                with Image.open(path) as again:
                    again.verify()
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # straight to RGB, PIL warns
            elif image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
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


def header_sizes(paths: tuple[str, ...], for_dali: bool = False) -> Tensor:
    """(n, 2) int64 height and width of every file, from its header. Raises DataError naming the first that is none, or,
    for_dali, that the loader dali cannot take."""
    return torch.tensor(list(itertools.chain(*in_chunks(partial(_header_sizes, for_dali=for_dali), paths))))


def _header_sizes(paths: tuple[str, ...], for_dali: bool) -> list[tuple[int, int]]:
    sizes = []
    for path in paths:
        try:
            with Image.open(path) as image:
                refused = for_dali and not_for_dali(image)
                sizes.append(image.size[::-1])
                image.verify()  # the checksums of a PNG; of a JPEG nothing
        except Exception as error:
            raise _unreadable(path, error) from error
        if refused:
            raise DataError(
                f"{path}: DALI cannot decode it as Pillow does; convert or skip it, or choose --loader torchvision"
            )
    return sizes


_IN_DALI = ("JPEG", "MPO", "PNG", "TIFF", "BMP", "PPM", "WEBP", "JPEG2000")


def not_for_dali(image: Image.Image) -> bool:
    """Whether DALI cannot decode an opened file, or shows something else than Pillow: found with DALI 2.4 on a CPU."""
    if image.format == "TIFF":
        turned = image.getexif().get(0x0112, 1) != 1  # by Pillow only, whose height may be DALI's width
        return turned or image.mode in ("LA", "LAB") or 258 not in image.tag_v2  # bits a sample, which may be left out
    if image.format == "PPM":  # whose levels are scaled by Pillow only
        codec, _, _, arguments = image.tile[0]
        return image.mode == "I" or (codec != "raw" and image.mode != "1" and arguments[-1] != 255)
    if image.format in ("JPEG", "MPO"):  # inverted or not, which only Adobe's mark tells
        return image.mode == "CMYK" and "adobe" not in image.info
    if image.format == "BMP":
        return any(str(tile[3][0]) in ("BGR;15", "BGR;16") for tile in image.tile)
    if image.format == "PNG":  # an animation, whose first picture is none of it
        return bool(image.info.get("default_image"))
    if image.format == "WEBP":
        return "exif" in image.info and _has_odd_chunk(image.filename)
    return image.format not in _IN_DALI or (image.format == "JPEG2000" and image.mode == "LA")


def _has_odd_chunk(path: str) -> bool:
    """Of a WebP file, before its EXIF tags: DALI forgets the byte that fills up such a chunk, and finds no tags."""
    with open(path, "rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8 and not head.startswith(b"EXIF"):
            size = int.from_bytes(head[4:], "little")
            if size % 2:
                return True
            file.seek(size, os.SEEK_CUR)
    return False


def refuse_for_dali(paths: tuple[str, ...]) -> None:
    """Raises DataError naming the first file that the loader dali cannot take.

    What is named as a JPEG or PNG is not looked at: a million files are not opened to find one of a wrong name.
    """
    header_sizes(tuple(path for path in paths if not path.lower().endswith((".jpg", ".jpeg", ".png"))), for_dali=True)


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
    with ProcessPoolExecutor(processes, initializer=_begin_worker) as pool:
        try:
            yield from pool.map(work, chunks)
        except BrokenProcessPool:
            raise worker_ended("it was killed") from None


def worker_ended(how: str) -> DataError:
    return DataError(
        f"a process that reads images ended ({how}); memory may be short, and fewer --workers need less. A run that "
        "has begun goes on with --resume"
    )


def _begin_worker() -> None:
    gc.freeze()  # or the collector would end DALI pipelines of the parent that this process was forked from, and wait
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's process would wait for more work for ever where the one that gave it out was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unreadable(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path}: cannot be read as an image ({type(error).__name__}: {error}); repair it, or remove or skip it (not "
        "once a run has begun: that goes on with a readable image of the same name)"
    )
