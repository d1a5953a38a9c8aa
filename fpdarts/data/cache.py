"""Decoded image files, kept as one memory-mapped array: a second run begins at once.

The name of an array is made of the contents of its files, so that a changed file is another array. It lies in
$FPDARTS_CACHE, or in fpdarts/ of the user's cache folder; FPDARTS_CACHE=off keeps nothing.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fpdarts.data.folder import decode_chunk, in_chunks
from fpdarts.files import replacing

_VERSION = b"1"  # of how pixels are made; another one finds nothing that an older wrote


def decoded(paths: tuple[str, ...], side: int, central: bool) -> Tensor:
    """(n, 3, side, side) uint8, channels_last, of files, in their order; decoded now, or before and kept.

    central: resize and take the middle, as evaluation does; otherwise every file must have that size. Raises DataError
    naming the file that has not, or cannot be decoded. Where the cache cannot be written, that is said, and the pixels
    stay in memory only.
    """
    decode = partial(decode_chunk, side=side, central=central)
    folder = cache_folder()
    if folder is None:
        return _as_tensor(np.concatenate(list(in_chunks(decode, paths))))
    file = folder / f"{_key(paths, side, central)}.npy"
    shape = (len(paths), side, side, 3)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_suffix(".lock")):  # of several processes one decodes, the others wait for it
            if (pixels := _mapped(file, shape)) is None:
                with replacing(file) as out:
                    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
                    for chunk in in_chunks(decode, paths):
                        out.write(chunk)
                print(f"decoded images are kept in {file}", file=sys.stderr)
                pixels = _mapped(file, shape)
        return _as_tensor(pixels)
    except OSError as error:
        print(f"warning: no cache of decoded images: {error}; FPDARTS_CACHE names another folder", file=sys.stderr)
        return _as_tensor(np.concatenate(list(in_chunks(decode, paths))))


def cache_folder() -> Path | None:
    """Where arrays are kept; None for nowhere."""
    chosen = os.environ.get("FPDARTS_CACHE")
    if chosen == "off":
        return None
    return Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fpdarts").expanduser()


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
        # Copy on write: nothing writes, but torch warns of arrays that cannot be written.
        pixels = np.load(file, mmap_mode="c")
    except (OSError, ValueError, EOFError):
        return None
    return pixels if pixels.shape == shape and pixels.dtype == np.uint8 else None


def _as_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time; the lock of a process that was killed is free again."""
    try:
        import fcntl
    except ImportError:  # not on Windows; there two processes would both decode, and the last one's array stays
        yield
        return
    with open(file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
