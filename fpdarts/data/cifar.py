"""CIFAR-10 and CIFAR-100 in their two published formats: python (pickles) and binary."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fpdarts.data.images import Images
from fpdarts.errors import DataError

SIDE = 32
PIXELS = 3 * SIDE * SIDE  # a record is planar: 1024 red bytes, 1024 green, 1024 blue, each row by row
_AGAIN = "the file may be truncated: download and extract the archive again"


@dataclass(frozen=True)
class Layout:
    """Where a published format keeps what. labels: field of the labels, or (binary) the label bytes of a record."""

    folder: str  # the archive extracts to it
    train: tuple[str, ...]
    test: str
    meta: str
    names: str | None  # the field of `meta` that holds the class names; None: a text file, a name a line
    labels: str | int

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.meta)

    def found_in(self, folder: Path) -> bool:
        return (folder / self.train[0]).is_file() or (folder / self.test).is_file()


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
LAYOUTS = (
    Layout("cifar-10-batches-py", _BATCHES, "test_batch", "batches.meta", "label_names", "labels"),
    Layout("cifar-100-python", ("train",), "test", "meta", "fine_label_names", "fine_labels"),
    Layout(
        "cifar-10-batches-bin",
        tuple(f"{batch}.bin" for batch in _BATCHES),
        "test_batch.bin",
        "batches.meta.txt",
        None,
        1,
    ),
    Layout("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", None, 2),
)


def find_cifar(path: Path) -> tuple[Path, Layout] | None:
    """The folder that holds CIFAR files, `path` or the one known folder in it, and their layout; None without one.

    Raises DataError when several are there.
    """
    found = [(path, layout) for layout in LAYOUTS if layout.found_in(path)]
    found = found or [(path / layout.folder, layout) for layout in LAYOUTS if layout.found_in(path / layout.folder)]
    if len(found) > 1:
        names = ", ".join(layout.folder for _, layout in found)
        raise DataError(f"{path}: holds several data sets ({names}); name the folder of one of them")
    return found[0] if found else None


def load_cifar(folder: Path, layout: Layout) -> tuple[tuple[str, ...], Images, Images]:
    """Class names, training images and test images. Raises DataError naming the file, and the field or image."""
    missing = [name for name in layout.files if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: {', '.join(missing)} missing from {layout.folder}: extract the whole archive")
    classes = _read_classes(folder / layout.meta, layout.names)
    read = _read_pickle if isinstance(layout.labels, str) else _read_binary
    parts = []
    for names in (layout.train, (layout.test,)):
        batches = [read(folder / name, layout.labels, len(classes)) for name in names]
        pixels = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, SIDE, SIDE)
        labels = np.concatenate([labels for _, labels in batches])
        parts.append(
            Images(torch.from_numpy(labels), torch.from_numpy(pixels).contiguous(memory_format=torch.channels_last))
        )
    return classes, *parts


def _read_classes(file: Path, field: str | None) -> tuple[str, ...]:
    if field is None:
        names = file.read_text(encoding="utf-8", errors="replace").split("\n")
        names = [name.strip() for name in names if name.strip()]
    else:
        names = _field(_unpickle(file), field, file)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{file}: no class names in {field or 'it'}; {_AGAIN}")
    return tuple(names)


def _read_pickle(file: Path, field: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    content = _unpickle(file)
    pixels, labels = _field(content, "data", file), _field(content, field, file)
    if not (
        isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 2 and pixels.shape[1] == PIXELS
    ):
        found = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise DataError(f"{file}: data is {found}, not uint8 (n, {PIXELS}): 32x32 RGB images are needed; {_AGAIN}")
    if not isinstance(labels, list | np.ndarray) or not all(isinstance(label, int | np.integer) for label in labels):
        raise DataError(f"{file}: {field} is not a list of integers; {_AGAIN}")
    if len(labels) != len(pixels):
        raise DataError(f"{file}: {len(pixels)} images but {len(labels)} {field}; {_AGAIN}")
    return _checked(file, pixels, np.asarray(labels, dtype=np.int64), classes)


def _read_binary(file: Path, label_bytes: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    size = file.stat().st_size
    record = label_bytes + PIXELS
    if size % record:
        raise DataError(
            f"{file}: {size} bytes are not a multiple of {record}, the size of an image and its label; {_AGAIN}"
        )
    records = np.fromfile(file, dtype=np.uint8).reshape(-1, record)
    # CIFAR-100 has the coarse label first; the class is the fine one, next to the pixels.
    return _checked(file, records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int64), classes)


def _checked(file: Path, pixels: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    if not len(labels):
        raise DataError(f"{file}: no images in it; {_AGAIN}")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DataError(
            f"{file}: image {wrong[0]} has label {labels[wrong[0]]}, but there are {classes} classes, "
            f"0..{classes - 1}; {_AGAIN}"
        )
    return pixels, labels


def _field(content, name: str, file: Path):
    if not isinstance(content, dict) or name not in content:
        raise DataError(f"{file}: no field {name!r} in it; {_AGAIN}")
    return content[name]


class _ArrayUnpickler(pickle.Unpickler):
    """Builds plain containers and numpy arrays only: a pickle may otherwise run any code."""

    # Asked of numpy itself, because the module these functions live in has changed its name between versions.
    _reconstruct = staticmethod(np.empty(0).__reduce__()[0])
    _frombuffer = staticmethod(np.empty(1).__reduce_ex__(5)[0])

    def find_class(self, module, name):
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return self._reconstruct
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return self._frombuffer
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in the old protocols
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a CIFAR file")


def _unpickle(file: Path):
    try:
        with file.open("rb") as stream:
            return _ArrayUnpickler(stream, encoding="latin1").load()  # latin1: Python 2 wrote the published files
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{file}: cannot be unpickled ({str(error)[:200]}); {_AGAIN}") from error
