"""Which training images train the weights and which the architecture, as two lists of files."""

import os
from collections.abc import Iterator
from pathlib import Path

from fpdarts.data.images import ImageData, Images
from fpdarts.data.lists import read_list, require_lines, write_list
from fpdarts.errors import DataError

NAMES = ("weights.txt", "architecture.txt")


def write_split(data: ImageData, weights: float, architecture: float, seed: int, out: str | Path) -> dict[str, int]:
    """Write two disjoint lists, balanced over the classes, into the directory `out`; the number of images in each.

    weights, architecture: fractions of the training images. A line is a file's name, relative to train/, and its label,
    which is the format of DALI's file_list too. A pure function of the files' names, the fractions and the seed.
    Raises DataError for data that are no image folder or too few and for a name with a line break, FileExistsError
    rather than write over a list.
    """
    if data.train.paths is None:
        raise DataError(f"{data.source}: is no image folder, whose files could be listed; search divides it itself")
    for name, value in (("weights", weights), ("architecture", architecture)):
        if not 0 < value < 1:
            raise ValueError(f"--{name} must lie between 0 and 1, not {value}")
    if weights + architecture > 1 + 1e-9:
        raise ValueError(f"--weights {weights} and --architecture {architecture} are more than all images together")
    out, prefix = Path(out), _prefix(data)
    for name in NAMES:
        if (out / name).exists():
            raise FileExistsError(f"{out / name} exists; choose another --out, or remove it")
    lists = {}
    for name, images in zip(NAMES, data.train.parts(weights, architecture, seed)):
        pairs = zip(images.paths, images.labels.tolist())
        lists[out / name] = [f"{path.removeprefix(prefix)} {label}" for path, label in pairs]
        require_lines(out / name, lists[out / name])  # of both, before either is written
    out.mkdir(parents=True, exist_ok=True)
    for file, lines in lists.items():
        write_list(file, lines)
    return {file.name: len(lines) for file, lines in lists.items()}


def read_split(folder: str | Path, images: Images, data: ImageData) -> tuple[Images, Images]:
    """The images of both lists in the directory `folder`, out of all training images.

    Raises DataError naming the list and line: no such file, another label, listed twice.
    """
    if images.paths is None:
        raise DataError(f"{data.source}: is no image folder, whose files {folder} could list; leave --split out")
    prefix = _prefix(data)
    numbers = {path.removeprefix(prefix): number for number, path in enumerate(images.paths)}
    labels, seen, parts = images.labels.tolist(), {}, []
    for file in (Path(folder) / name for name in NAMES):
        part = []
        for line, name, label in _lines(file):
            number = numbers.get(name)
            if number is None:
                raise DataError(
                    f"{file}: line {line} names {name}, which is not in {prefix} or left out by --skip; "
                    "split the data again, with the same --skip"
                )
            if labels[number] != label:
                raise DataError(
                    f"{file}: line {line} gives {name} the label {label}, but its folder is class {labels[number]}; "
                    "split the data again"
                )
            if name in seen:
                raise DataError(f"{file}: line {line} names {name}, which {seen[name]} does too; an image has one use")
            seen[name] = file
            part.append(number)
        if not part:
            raise DataError(f"{file}: lists no images; split the data again")
        parts.append(images.subset(part))
    return parts[0], parts[1]


def _prefix(data: ImageData) -> str:
    return f"{Path(os.path.expanduser(data.source)) / 'train'}/"


def _lines(file: Path) -> Iterator[tuple[int, str, int]]:
    """Line number, file name and label."""
    try:
        lines = read_list(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error}); fpdarts split-imagenet writes it") from None
    for number, line in enumerate(lines, 1):
        name, _, label = line.rpartition(" ")
        if not name or not label.isdecimal():
            raise DataError(f"{file}: line {number} is not a file name and a label: {line[:100]!r}")
        yield number, name, int(label)
