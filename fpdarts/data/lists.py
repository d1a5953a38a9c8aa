"""Lists of files, a line each, as check-data and split-imagenet write them and --skip and --split read them.

On Linux a name is any bytes, UTF-8 or not: they are kept as they are. A line ends at a newline and nowhere else.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from fpdarts.errors import DataError
from fpdarts.files import replacing


def write_list(file: str | Path, lines: Iterable[str]) -> None:
    """Write the lines, whole or not at all. Raises DataError for a name that no line can hold, OSError."""
    lines = list(lines)
    require_lines(file, lines)
    with replacing(file) as out:
        out.writelines(os.fsencode(f"{line}\n") for line in lines)


def require_lines(file: str | Path, lines: Iterable[str]) -> None:
    """Raises DataError for a name that no line of that file can hold."""
    for line in lines:
        if "\n" in line or line.endswith("\r"):
            raise DataError(f"{line!r}: has a line break in its name, so {file} cannot list it; rename or remove it")


def read_list(file: str | Path) -> list[str]:
    """The lines of a list; an editor's line ends of Windows are no part of them. Raises OSError."""
    lines = [os.fsdecode(line.removesuffix(b"\r")) for line in Path(file).read_bytes().split(b"\n")]
    return lines if lines[-1] else lines[:-1]
