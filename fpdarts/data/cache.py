"""Decoded image files, kept as one memory-mapped array: a second run begins at once.

The name of an array is made of the contents of its files, so that a changed file is another array. It lies in
$FPDARTS_CACHE, or in fpdarts/ of the user's cache folder; FPDARTS_CACHE=off keeps nothing.
"""

import hashlib
import math
import os
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fpdarts.data.folder import decode_chunk, in_chunks
from fpdarts.files import lock, replacing

_VERSION = b"1"  # of how pixels are made; another one finds nothing that an older wrote


def decoded(paths: tuple[str, ...], side: int, central: bool) -> Tensor:
    """(n, 3, side, side) uint8, channels_last, of files, in their order; decoded now, or before and kept.

    central: resize and take the middle, as evaluation does; otherwise every file must have that size. Raises DataError
    naming the file that has not, or cannot be decoded. Where the cache cannot be written, that is said, and the pixels
    stay in memory only.
    """
    decode = partial(decode_chunk, side=side, central=central)
    try:
        folder = cache_folder()
        if folder is None:
            return _as_tensor(np.concatenate(list(in_chunks(decode, paths))))
        file = folder / f"{_key(paths, side, central)}.npy"
        shape = (len(paths), side, side, 3)
        # Before anything is written: the cache may lie where others made it, and may only be read.
        if (pixels := _mapped(file, shape)) is not None:
            return _as_tensor(pixels)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_suffix(".lock")):  # of several processes one decodes, the others wait for it
            if (pixels := _mapped(file, shape)) is None:
                for left in folder.glob(f".{file.name}*.partial"):  # by a process that was killed
                    left.unlink(missing_ok=True)
                # a name of its own: where locks do not work two write at a time, and the last one's array stays
                with replacing(file, f".{secrets.token_hex(8)}") as out:
                    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
                    for chunk in in_chunks(decode, paths):
                        out.write(chunk)
                print(f"decoded images are kept in {file}", file=sys.stderr)
                if (pixels := _mapped(file, shape)) is None:
                    raise OSError(f"{file} cannot be read back")
        return _as_tensor(pixels)
    except OSError as error:
        print(f"warning: no cache of decoded images: {error}; FPDARTS_CACHE names another folder", file=sys.stderr)
        return _as_tensor(np.concatenate(list(in_chunks(decode, paths))))


def cache_folder() -> Path | None:
    """Where arrays are kept; None for nowhere. Raises OSError where the user's home directory is not known."""
    chosen = os.environ.get("FPDARTS_CACHE")
    if chosen == "off":
        return None
    try:
        return Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fpdarts").expanduser()
    except RuntimeError as error:
        raise OSError(str(error)) from None


def _key(paths: tuple[str, ...], side: int, central: bool) -> str:
    total = hashlib.blake2b(_VERSION + f" {side} {central} {len(paths)}".encode(), digest_size=16)
    for digest in in_chunks(_digest, paths):
        total.update(digest)
    return total.hexdigest()


def _digest(paths: tuple[str, ...]) -> bytes:
    digest = hashlib.blake2b()
    for path in paths:
        content = Path(path).read_bytes()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()


def _mapped(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array in a file; None if there is none, or another than expected, as a full disk or a copy may leave it."""
    try:
        with open(file, "rb") as stored:
            np.lib.format.read_magic(stored)
            header = np.lib.format.read_array_header_1_0(stored)
            size = stored.tell() + math.prod(shape)
            if header != (shape, False, np.dtype(np.uint8)) or os.fstat(stored.fileno()).st_size != size:
                return None
            # Copy on write: nothing writes, but torch warns of arrays that cannot be written.
            return np.memmap(stored, np.uint8, "c", stored.tell(), shape)
    except Exception:  # numpy reads a header as Python's source, so that a damaged one raises many kinds
        return None


def _as_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


_IN_THIS_PROCESS = threading.Lock()  # between its threads, for which a file's lock is one and the same


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time, and of each one thread."""
    with _IN_THIS_PROCESS, lock(file, f"waiting for another process that decodes the same images (it holds {file})"):
        yield
