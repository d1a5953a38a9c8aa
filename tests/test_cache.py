"""The cache of decoded images. All files are made here."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fpdarts.data import DataError, in_memory, open_data
from fpdarts.data import cache as cache_module
from tests.made import random_pixels, write_folder, write_image


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An image folder and an empty cache; counts the files that are decoded."""
    monkeypatch.setenv("FPDARTS_CACHE", str(tmp_path / "cache"))
    decode, decoded = cache_module.decode_chunk, []

    def counted(paths, **options):
        decoded.extend(paths)
        return decode(paths, **options)

    monkeypatch.setattr(cache_module, "decode_chunk", counted)
    return write_folder(tmp_path / "images", count=4), tmp_path / "cache", decoded


def pixels_of(path):
    data = open_data(path)
    return in_memory(data.train, data, None).pixels


EXPECTED = np.stack([random_pixels(16, 16, 3, seed=seed) for seed in (0, 1, 2, 3, 10, 11, 12, 13)])


def assert_right(pixels):
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), EXPECTED)


def test_files_are_decoded_once(folder, capsys):
    path, cache, decoded = folder
    assert_right(pixels_of(path))
    assert len(decoded) == 8 and "decoded images are kept in" in capsys.readouterr().err
    assert_right(pixels_of(path))
    assert len(decoded) == 8 and len(list(cache.glob("*.npy"))) == 1
    moved = path.rename(path.with_name("moved"))
    assert_right(pixels_of(moved))
    assert len(decoded) == 8, "the name is made of contents, not of places"


def test_changed_contents_are_decoded_again(folder):
    path, _, decoded = folder
    first = pixels_of(path)
    file = path / "train" / "dog" / "2.png"
    size, times = file.stat().st_size, (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    written = write_image(file, seed=77)
    os.truncate(file, max(size, file.stat().st_size))  # as long as it was, if it can be, and as old
    os.utime(file, ns=times)
    pixels = pixels_of(path)
    assert len(decoded) == 16 and np.array_equal(pixels[6].permute(1, 2, 0).numpy(), written)
    assert torch.equal(pixels[:6], first[:6])


@pytest.mark.parametrize("damage", ["half", "header", "empty", "other", "longer", "syntax", "zip", "order"])
def test_a_damaged_cache_is_made_again(folder, damage):
    path, cache, decoded = folder
    pixels_of(path)
    (file,) = cache.glob("*.npy")
    content = file.read_bytes()
    changes = {
        "longer": (b"", b""),
        "syntax": (b"{'", b"{("),
        "zip": (b"\x93NUM", b"PK\3\4"),
        "order": (b"False", b" True"),
    }
    if damage == "other":
        np.save(file, np.zeros((8, 4, 4, 3), np.uint8))
    elif damage in changes:
        file.write_bytes(content.replace(*changes[damage], 1) + (b"more" if damage == "longer" else b""))
    else:
        os.truncate(file, {"half": file.stat().st_size // 2, "header": 40, "empty": 0}[damage])
    assert_right(pixels_of(path))
    assert len(decoded) == 16
    assert_right(pixels_of(path))
    assert len(decoded) == 16


def test_what_a_killed_process_left_is_no_hindrance(folder):
    path, cache, decoded = folder
    pixels_of(path)
    (file,) = cache.glob("*.npy")
    file.rename(cache / f".{file.name}.partial")  # a process that was killed just before the last step
    assert_right(pixels_of(path))
    assert len(decoded) == 16 and [f.name for f in cache.glob("*.npy*")] == [file.name]


def test_of_several_at_once_one_decodes(folder):
    path, _, decoded = folder
    with ThreadPoolExecutor(4) as pool:
        for pixels in pool.map(pixels_of, [path] * 4):
            assert_right(pixels)
    assert len(decoded) == 8


HOLDER = """
import multiprocessing, sys, time
from pathlib import Path
from fpdarts.data import cache, folder

def slow(paths, **options):
    Path(paths[0]).with_suffix(".begun").touch()
    time.sleep(600)

multiprocessing.set_start_method("fork")  # whose children inherit what is open
folder.CHUNK, folder.cores, cache.decode_chunk = 1, lambda: 2, slow
cache.decoded(tuple(sys.argv[1:]), 16, False)
"""


@pytest.fixture
def holding(folder, monkeypatch):
    """A process that decodes the folder's images, with workers, and does not come to an end."""
    path, _, _ = folder
    monkeypatch.setattr("fpdarts.data.folder.CHUNK", 1)  # as there, for the array's name depends on it
    monkeypatch.setattr("fpdarts.data.folder.cores", lambda: 1)
    files = open_data(path).train.paths
    process = subprocess.Popen([sys.executable, "-c", HOLDER, *files], stdout=subprocess.PIPE)
    while len(list(path.glob("train/*/*.begun"))) < 2:  # both workers
        assert process.poll() is None
        time.sleep(0.05)
    yield process
    process.kill()
    process.communicate(timeout=60)  # at an end when no worker has the other end of the pipe any more


def test_a_killed_process_leaves_neither_lock_nor_workers(folder, holding, capsys):
    path, cache, decoded = folder
    (lock,) = cache.glob("*.lock")
    holding.kill()
    holding.wait()
    assert_right(pixels_of(path))
    assert len(decoded) == 8 and [*cache.glob("*.lock")] == [lock] and "waiting" not in capsys.readouterr().err
    holding.communicate(timeout=60)  # at an end when no worker has the other end of the pipe any more


def test_who_waits_says_so(folder, holding, capfd):
    path, cache, _ = folder
    with ThreadPoolExecutor(1) as pool:
        pixels = pool.submit(pixels_of, path)
        told = ""
        while "\n" not in told:
            told += capfd.readouterr().err
            time.sleep(0.05)
        (lock,) = cache.glob("*.lock")
        assert told == f"waiting for another process that decodes the same images (it holds {lock})\n"
        holding.kill()
        assert_right(pixels.result())


def test_a_cache_that_can_only_be_read_is_used(folder, monkeypatch):
    path, cache, decoded = folder
    pixels_of(path)
    (lock,) = cache.glob("*.lock")
    lock.unlink()
    lock.mkdir()  # cannot be opened, not even by root
    assert_right(pixels_of(path))
    assert len(decoded) == 8


def test_a_user_without_a_home(folder, monkeypatch, capsys):
    path, _, _ = folder
    monkeypatch.delenv("FPDARTS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it does where it does not know
    assert_right(pixels_of(path))
    assert "warning: no cache of decoded images: Could not determine home directory" in capsys.readouterr().err


def test_a_failure_leaves_nothing_half_written(folder):
    path, cache, _ = folder
    (path / "train" / "dog" / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="dog/3.png: cannot be read"):
        pixels_of(path)
    assert not list(cache.glob("*.npy*"))


def test_without_a_cache(folder, monkeypatch, tmp_path, capsys):
    path, cache, decoded = folder
    monkeypatch.setenv("FPDARTS_CACHE", "off")
    assert_right(pixels_of(path))
    assert not cache.exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("FPDARTS_CACHE", str(tmp_path / "file"))
    assert_right(pixels_of(path))
    assert "warning: no cache of decoded images" in capsys.readouterr().err


def test_the_middle_of_an_image_is_another_array(folder):
    path, cache, decoded = folder
    paths = open_data(path).train.paths
    whole, central = (cache_module.decoded(paths, 16, central) for central in (False, True))
    assert len(decoded) == 16 and len(list(cache.glob("*.npy"))) == 2
    assert whole.shape == central.shape and not torch.equal(whole, central)
