"""Files that are written whole or not at all, and JSON."""

import errno
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fpdarts.errors import RunError


@contextmanager
def replacing(path: str | os.PathLike, mark: str = "") -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when all of it is on disk. Raises OSError, which names it.

    Until then it lies beside it (a rename stays within one file system) under one hidden name, fixed but for ``mark``,
    so that what a killed process left there is overwritten by the next. A link stays, and what it leads to is replaced;
    what is no file, such as /dev/stdout or a pipe, is written to.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, "wb") as file:
            yield file
        return
    partial = path.with_name(f".{path.name}{mark}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def lock(path: str | os.PathLike, waiting: str | None = None) -> BinaryIO | None:
    """A file that this process locks until it is closed; the lock of a process that was killed is free again.

    Where another process has it: None or, if there is something to say meanwhile, waits for it. Where there are no
    locks, as on some file systems, everybody may have it.
    """
    file = open(path, "ab")
    try:
        import fcntl

        # lockf, not flock: a lock of flock would belong to forked workers too, and outlive this process with them
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not on Windows
        pass
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return file
        if waiting is None:
            file.close()
            return None
        print(waiting, file=sys.stderr)
        fcntl.lockf(file, fcntl.LOCK_EX)
    return file


def require_writable(path: str | os.PathLike):
    """Raises OSError, which names it, where ``replacing`` could not write: before there is anything to write."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.is_file() or not path.exists():
        try:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


def to_json(value: Any, **options) -> str:
    """As json.dumps; a number that is infinite or none becomes null: JSON has no word for it."""
    return json.dumps(_with_words(value), allow_nan=False, **options)


def _with_words(value):
    if isinstance(value, dict):
        return {key: _with_words(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_words(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json_object(path: str | os.PathLike) -> dict:
    """Raises RunError, which names the file, if it holds anything but one object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}; restore it from a copy") from None
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no JSON object; restore it from a copy")
    return value
