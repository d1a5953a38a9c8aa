"""check-data: look into every file of an image folder before a run does, and tell what will be done with it."""

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from PIL import Image

from fpdarts.data.folder import (
    class_files,
    class_folders,
    in_chunks,
    is_image_folder,
    not_for_dali,
    read_image,
    test_part,
)
from fpdarts.errors import DataError

# Findings that stop a run; the others are only told. Each with what is done with such a file.
BAD = {
    "empty file": "stops a run: repair, remove or skip it",
    "not an image": "stops a run: repair, remove or skip it",
    "truncated or damaged": "stops a run: repair, remove or skip it",
    "too large": "stops a run, for it has more pixels than Pillow opens: make it smaller or skip it",
    "range unknown": "stops a run, for 32-bit levels have no known range: convert or skip it",
}
TOLD = {
    "name of another format": "read as what it is; its name does not matter",
    "image without an image's name": "left out, for its suffix is none of an image; rename it to use it",
    "no image": "left out",
    "not for DALI": "the loader dali refuses it: convert or skip it, or choose --loader torchvision",
    "greyscale": "repeated to three channels",
    "CMYK": "converted to RGB, without a colour profile",
    "16-bit": "the upper 8 bits are used; the loader dali may round to the next level",
    "palette or transparency": "converted to RGB; transparency is dropped",
    "rotated by its EXIF tag": "used as it is stored; the tag is ignored",
    "TIFF with a rotation tag": "turned as the tag says, by Pillow itself",
}


def check_folder(path: str | Path) -> dict:
    """Decode every file of an image folder, on all cores, with a progress bar where standard error is a terminal.

    Returns {path, classes, images: those that can be used, findings: {kind: [file, ...]} with files relative to path,
    bad: files that stop a run, problems: what is wrong with the folder itself, ok: nothing is bad or wrong}.
    Raises DataError if it is no image folder.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_dir() or not is_image_folder(path):
        raise DataError(f"{path}: is no image folder; one has train/ and test/ or val/, with a folder a class in each")
    problems, files, classes = [], [], {}
    for part, missing in (
        ("train", "train/ is missing"),
        (test_part(path), "test/ and val/ are missing; one of them is needed"),
    ):
        if not (path / part).is_dir():
            problems.append(missing)
            continue
        classes[part] = class_folders(path / part)
        for name in classes[part]:
            files += class_files(os.path.join(path, part, name))

    findings: dict[str, list[str]] = {kind: [] for kind in (*BAD, *TOLD)}
    usable = dict.fromkeys((f"{part}/{name}" for part, names in classes.items() for name in names), 0)
    prefix = os.path.join(path, "")  # of / it is / itself
    for file, kinds in _with_progress(sorted(files)):
        name = file.removeprefix(prefix)
        for kind in kinds:
            findings[kind].append(name)
        if not {*kinds} & {*BAD, "no image", "image without an image's name"}:
            usable["/".join(Path(name).parts[:2])] += 1
    problems += [f"{name}/ has no image that can be used" for name, count in usable.items() if not count]
    for here, there in itertools.permutations(classes, 2):
        lacking = [name for name in classes[here] if name not in classes[there]]
        problems += [f"{here}/{name}/ has no counterpart in {there}/" for name in lacking]
    bad = sorted(name for kind in BAD for name in findings[kind])
    return {
        "path": str(path),
        "classes": len(set().union(*classes.values())),
        "images": sum(usable.values()),
        "findings": {kind: names for kind, names in findings.items() if names},
        "bad": bad,
        "problems": problems,
        "ok": not bad and not problems,
    }


def _with_progress(files: list[str]) -> Iterator[tuple[str, list[str]]]:
    from tqdm import tqdm

    bar = tqdm(total=len(files), unit="file", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    with bar:
        for looked_at in in_chunks(_look_at_all, tuple(files)):
            bar.update(len(looked_at))
            yield from looked_at


def _look_at_all(files: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    return [(file, _look_at(file)) for file in files]


def _look_at(file: str) -> list[str]:
    """Kinds of findings."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    named = file.lower().endswith(IMG_EXTENSIONS)
    try:
        if not os.path.getsize(file):
            return ["empty file" if named else "no image"]
        with Image.open(file) as image:
            kinds = _kinds(image, file)
    except Image.DecompressionBombError:
        return ["too large" if named else "no image"]
    except Exception:  # PIL's decoders raise many kinds
        return ["not an image" if named else "no image"]
    if not named:
        return ["image without an image's name"]
    try:
        read_image(file)
    except DataError as error:
        return ["range unknown" if "range is not known" in str(error) else "truncated or damaged"]
    return kinds


def _kinds(image: Image.Image, file: str) -> list[str]:
    # PNG and TIFF of 16-bit colours have a mode of 8 bits; only how they are stored tells, until they are decoded.
    deep = image.format in ("PNG", "TIFF") and any(";16" in str(tile[3]) for tile in image.tile)
    turned = False
    with suppress(Exception):  # of damaged tags, which no picture needs
        turned = image.getexif().get(0x0112, 1) != 1
    registered = Image.registered_extensions().get(os.path.splitext(file)[1].lower(), image.format)
    found = {
        "name of another format": image.format not in (registered, "MPO"),  # MPO: JPEG with a second picture
        "not for DALI": not_for_dali(image),
        "greyscale": image.mode in ("1", "L", "LA"),
        "CMYK": image.mode == "CMYK",
        "16-bit": image.mode.startswith("I;16") or deep,
        "palette or transparency": image.mode in ("P", "PA", "LA", "RGBA") or "transparency" in image.info,
        "rotated by its EXIF tag": turned and image.format != "TIFF",
        "TIFF with a rotation tag": turned and image.format == "TIFF",
    }
    return [kind for kind, is_so in found.items() if is_so]


def summary(report: dict, some: int = 3) -> str:
    """For people: a line a finding, with its number, what is done, and the first few files."""
    lines = [f"{report['images']:,} usable images of {report['classes']:,} classes in {report['path']}"]
    for kind, names in report["findings"].items():
        shown = ", ".join(names[:some]) + (f" and {len(names) - some:,} more" if len(names) > some else "")
        lines.append(f"{kind}: {len(names):,} ({(BAD | TOLD)[kind]})\n    {shown}")
    return "\n".join([*lines, *(f"PROBLEM: {problem}" for problem in report["problems"])])
