"""What is looked at before a run: check-data, split-imagenet and lists of files. All files are made here."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fpdarts.data import DataError, open_data, read_split, write_split
from fpdarts.data.preflight import check_folder
from tests.command import run
from tests.made import random_pixels, write_folder, write_image

# ---- check-data -----------------------------------------------------------------------------------------------------


@pytest.fixture
def messy(tmp_path):
    """A folder with one of everything, and what check-data must find in it."""
    root = write_folder(tmp_path / "messy", count=2, size=24, suffix="jpg")
    cat, dog = root / "train" / "cat", root / "train" / "dog"
    write_image(cat / "grey.png", mode="L")
    write_image(cat / "print.jpg", mode="CMYK")
    write_image(cat / "clear.png", mode="RGBA")
    Image.fromarray(np.full((8, 8), 0x80FF, np.uint16)).save(cat / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(random_pixels(9, 12, 3)).save(dog / "turned.jpg", exif=exif)
    Image.fromarray(random_pixels(9, 12, 3)).save(dog / "really.jpg", format="PNG")
    Image.fromarray(random_pixels(9, 12, 3)).quantize(16).save(dog / "moving.jpg", format="GIF")
    write_image(dog / "forgotten.png")
    (dog / "forgotten.png").rename(dog / "forgotten.old")
    (dog / "notes.txt").write_text("not for training")
    (dog / "empty.jpg").touch()
    (dog / "text.jpg").write_text("no image")
    write_image(dog / "cut.jpg", 60)
    os.truncate(dog / "cut.jpg", (dog / "cut.jpg").stat().st_size // 2)
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(cat / "float.tiff")
    (root / "train" / "bird").mkdir()
    findings = {
        "empty file": ["train/dog/empty.jpg"],
        "not an image": ["train/dog/text.jpg"],
        "truncated or damaged": ["train/dog/cut.jpg"],
        "range unknown": ["train/cat/float.tiff"],
        "name of another format": ["train/dog/moving.jpg", "train/dog/really.jpg"],
        "image without an image's name": ["train/dog/forgotten.old"],
        "no image": ["train/dog/notes.txt"],
        "not for DALI": ["train/dog/moving.jpg"],
        "greyscale": ["train/cat/grey.png"],
        "CMYK": ["train/cat/print.jpg"],
        "16-bit": ["train/cat/deep.png"],
        "palette or transparency": ["train/cat/clear.png", "train/dog/moving.jpg"],
        "rotated by its EXIF tag": ["train/dog/turned.jpg"],
    }
    return root, findings


def test_check_data_finds_one_of_everything(messy, capsys, tmp_path):
    root, expected = messy
    status, out, err = run(capsys, "check-data", root, "--json", "--bad", tmp_path / "bad.txt")
    report = json.loads(out)
    assert report["findings"] == expected
    assert report["problems"] == [
        "train/bird/ has no image that can be used",
        "train/bird/ has no counterpart in test/",
    ]
    assert report["bad"] == ["train/cat/float.tiff", "train/dog/cut.jpg", "train/dog/empty.jpg", "train/dog/text.jpg"]
    assert report["images"] == 2 * 2 * 2 + 4 + 3 and report["classes"] == 3 and not report["ok"]
    assert status == 1 and "4 files cannot be used" in err and "2 problems" in err
    assert (tmp_path / "bad.txt").read_text().split() == report["bad"]

    (root / "train" / "bird").rmdir()
    data = open_data(root, "imagenet", image_size=32, skip=tmp_path / "bad.txt")
    from fpdarts.data import Loader

    batches = list(Loader(data.train, data, 4, None, 0, reader="torchvision", workers=0).epoch())
    assert sum(len(labels) for _, labels in batches) == 4 + 4 + 3, "all but the bad ones can be used"


def test_check_data_of_a_good_folder(tmp_path, capsys):
    root = write_folder(tmp_path / "good")
    status, out, err = run(capsys, "check-data", root)
    assert status == 0 and out == f"12 usable images of 2 classes in {root}\n" and not err
    (root / "test" / "dog" / "1.png").write_text("no image")
    status, out, err = run(capsys, "check-data", root)
    assert status == 1 and "not an image: 1 (stops a run: repair, remove or skip it)\n    test/dog/1.png" in out
    assert "--bad FILE lists them for --skip" in err
    status, _, err = run(capsys, "check-data", root / "train")
    assert status == 1 and "is no image folder" in err


def test_names_that_are_not_plain_text_can_be_skipped(tmp_path, capsys):
    root = write_folder(tmp_path / "images")
    folder, listed = root / "train" / "cat", tmp_path / "bad.txt"
    names = ["\x0b.png", "\u2028.png", "\x85 \r.png", " .png", os.fsdecode(b"caf\xe9.png")]
    for name in names:
        (folder / name).write_text("no image")
    (folder / "nothing.png").symlink_to("nowhere")
    status, out, err = run(capsys, "check-data", root, "--bad", listed)
    assert status == 1 and "not an image: 6" in out and f"6 files cannot be used (listed in {listed})" in err
    assert b"train/cat/caf\xe9.png\n" in listed.read_bytes()
    data = open_data(root, skip=listed)
    assert [os.path.basename(path) for path in data.train.paths] == ["0.png", "1.png", "2.png"] * 2
    listed.write_bytes(listed.read_bytes().replace(b"\n", b"\r\n"))  # as an editor of Windows leaves it
    assert open_data(root, skip=listed).train.paths == data.train.paths

    (folder / "two\nlines.png").write_text("no image")
    listed.unlink()
    status, _, err = run(capsys, "check-data", root, "--bad", listed)
    assert status == 1 and r"'train/cat/two\nlines.png': has a line break in its name" in err and not listed.exists()


def test_check_data_of_images_too_large(tmp_path, capsys, monkeypatch):
    root = write_folder(tmp_path)
    write_image(root / "test" / "dog" / "0.png", 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    status, out, _ = run(capsys, "check-data", root)
    assert status == 1 and "too large: 1 (stops a run, for it has more pixels than Pillow opens" in out


def test_check_data_of_the_root(monkeypatch):
    from fpdarts.data import preflight

    monkeypatch.setattr(preflight.Path, "is_dir", lambda path: True)
    monkeypatch.setattr(preflight, "class_folders", lambda part: ["cat"])
    monkeypatch.setattr(preflight, "class_files", lambda folder: [f"{folder}/0.png"])
    monkeypatch.setattr(preflight, "_with_progress", lambda files: [(file, ["not an image"]) for file in files])
    assert preflight.check_folder("/")["bad"] == ["test/cat/0.png", "train/cat/0.png"]


def test_16_bit_colours_are_told(tmp_path):
    root = write_folder(tmp_path, suffix="png")
    rows = b"".join(b"\0" + random_pixels(16 * 3 * 2, seed=row).tobytes() for row in range(16))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    content = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    (root / "train" / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert check_folder(root)["findings"] == {"16-bit": ["train/cat/0.png"]}


def test_check_data_of_parts(tmp_path, capsys):
    report = json.loads(run(capsys, "check-data", write_folder(tmp_path, ("train",)), "--json")[1])
    assert report["problems"] == ["test/ and val/ are missing; one of them is needed"]


# ---- split-imagenet -------------------------------------------------------------------------------------------------


@pytest.fixture
def splittable(tmp_path):
    return write_folder(tmp_path / "images", classes=("a b", "cat", "dog"), count=8, size=32, suffix="jpg")


def test_split_is_balanced_and_reproducible(splittable, tmp_path, capsys):
    data = open_data(splittable)
    for out, seed in (("one", 3), ("two", 3), ("other", 4)):
        arguments = f"split-imagenet --weights 0.5 --architecture 0.25 --seed {seed}".split()
        status, told, _ = run(capsys, *arguments, "--data", splittable, "--out", tmp_path / out)
        assert status == 0 and told.endswith(
            "weights.txt: 12 images\n" + f"{tmp_path / out}/architecture.txt: 6 images\n"
        )
    one, two, other = (
        [(tmp_path / d / f"{n}.txt").read_text() for n in ("weights", "architecture")] for d in ("one", "two", "other")
    )
    assert one == two and one != other
    weights, architecture = read_split(tmp_path / "one", data.train, data)
    assert weights.labels.bincount().tolist() == [4, 4, 4] and architecture.labels.bincount().tolist() == [2, 2, 2]
    assert not {*weights.paths} & {*architecture.paths}
    assert one[0].splitlines()[0].startswith("a b/") and one[0].splitlines()[0].endswith(".jpg 0")
    assert [path.rpartition("train/")[2] for path in weights.paths] == [line[:-2] for line in one[0].splitlines()]
    status, _, err = run(capsys, *arguments, "--data", splittable, "--out", tmp_path / "one")
    assert status == 1 and "weights.txt exists; choose another --out" in err


def test_split_needs_names_only(tmp_path, capsys):
    """Neither pixels nor their sizes; and with the list of check-data, search takes what it wrote."""
    root = write_folder(tmp_path / "images", count=8)
    write_image(root / "train" / "cat" / "1.png", 60, 40)  # protocol cifar would not have it
    (root / "train" / "cat" / "0.png").write_text("no image")
    (root / "train" / "cat" / "0.png").rename(root / "train" / "cat" / os.fsdecode(b"\xe9\x85.png"))
    bad, arguments = tmp_path / "bad.txt", "--weights 0.5 --architecture 0.25 --data".split()
    run(capsys, "check-data", root, "--bad", bad)
    status, _, err = run(capsys, "split-imagenet", *arguments, root, "--out", tmp_path / "all")
    assert status == 0, err
    status, out, err = run(capsys, "split-imagenet", *arguments, root, "--out", tmp_path / "good", "--skip", bad)
    assert status == 0 and "weights.txt: 7 images" in out, err
    whole, data = open_data(root, "imagenet"), open_data(root, "imagenet", skip=bad)
    assert len(data.train) == len(whole.train) - 1
    for split, part in (("all", whole), ("good", data)):
        assert len(read_split(tmp_path / split, part.train, part)[0]) == (8 if split == "all" else 7)
    listed = tmp_path / "all" / "weights.txt"
    listed.write_bytes(b"cat/\xe9\x85.png 0\n" + listed.read_bytes())
    with pytest.raises(DataError, match="weights.txt: line 1 names .* or left out by --skip; split .* the same --skip"):
        read_split(tmp_path / "all", data.train, data)
    status, _, err = run(capsys, "split-imagenet", "--data", "digits", "--out", tmp_path / "digits")
    assert status == 1 and "digits: is no image folder" in err
    status, _, err = run(capsys, "split-imagenet", *arguments, root, "--out", tmp_path / "s", "--seed", 10**20)
    assert status == 1 and "--seed must be at least 0 and below 2^64, not 1" in err


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (("cat/0.jpg 1\nbird/0.jpg 3\n", "dog/1.jpg 2\n"), "weights.txt: line 2 names bird/0.jpg, which is not in"),
        (("cat/0.jpg 2\n", "dog/1.jpg 2\n"), "line 1 gives cat/0.jpg the label 2, but its folder is class 1"),
        (("cat/0.jpg 1\n", "cat/0.jpg 1\n"), "architecture.txt: line 1 names cat/0.jpg, which .*weights.txt does too"),
        (("cat/0.jpg 1\n", ""), "architecture.txt: lists no images"),
        (("cat/0.jpg\n", "dog/1.jpg 2\n"), "line 1 is not a file name and a label: 'cat/0.jpg'"),
        (("cat/0.jpg 1\n", None), "architecture.txt: cannot be read"),
    ],
)
def test_errors_of_lists(splittable, tmp_path, lists, message):
    data = open_data(splittable)
    for name, text in zip(("weights", "architecture"), lists):
        if text is not None:
            (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_split(tmp_path, data.train, data)


def test_errors_of_splitting(splittable, tmp_path):
    digits = open_data("digits")
    with pytest.raises(DataError, match="digits: is no image folder, whose files could be listed"):
        write_split(digits, 0.1, 0.1, 0, tmp_path)
    with pytest.raises(DataError, match="digits: is no image folder, whose files .* could list"):
        read_split(tmp_path, digits.train, digits)
    with pytest.raises(ValueError, match="--weights must lie between 0 and 1, not 1.5"):
        write_split(open_data(splittable), 1.5, 0.1, 0, tmp_path)
    with pytest.raises(ValueError, match="are more than all images together"):
        write_split(open_data(splittable), 0.8, 0.3, 0, tmp_path)


def test_search_reads_the_lists(splittable, tmp_path, capsys):
    write_split(open_data(splittable), 0.5, 0.25, 0, tmp_path / "split")
    arguments = ["search", "--data", splittable, "--split", tmp_path / "split", "--out", tmp_path / "run", "--json"]
    arguments += "--epochs 1 --init-channels 4 --cells 3 --batch-size 6 --architecture-from 0".split()
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["split"] == str(tmp_path / "split")
    assert "loader: resident" in err
    moved = (tmp_path / "split").rename(tmp_path / "moved")
    again = ["search", "--resume", "--out", tmp_path / "run", "--split", moved]
    assert run(capsys, *again)[0] == 0
    lists = [(moved / name).read_text() for name in ("weights.txt", "architecture.txt")]
    for name, text in zip(("architecture.txt", "weights.txt"), lists):
        (moved / name).write_text(text)
    status, _, err = run(capsys, *again)
    assert status == 1 and "(or --split is not)" in err
    for given in ("--limit 9", "--weight-fraction 0.5", "--architecture-fraction 0.1"):
        status, _, err = run(capsys, *arguments[:5], *given.split())
        assert status == 1 and f"{given.split()[0]} and --split exclude each other" in err


def test_a_run_goes_on_with_the_same_files_only(splittable, tmp_path, capsys):
    again = ["search", "--resume", "--out", tmp_path / "run"]
    options = "--epochs 1 --init-channels 4 --cells 3 --batch-size 6 --architecture-from 0".split()
    status, _, err = run(capsys, "search", "--data", splittable, *again[2:], *options)
    assert status == 0, err
    splittable = splittable.rename(tmp_path / "moved")
    again += "--data", splittable
    assert run(capsys, *again)[0] == 0
    tested = next((splittable / "test" / "cat").iterdir())
    renamed = tested.rename(tested.with_name("another.jpg"))
    status, _, err = run(capsys, *again)
    assert status == 1 and "is not the data that the run in" in err
    renamed.rename(tested)
    one, other = splittable / "train" / "cat" / "7.jpg", splittable / "train" / "dog" / "9.jpg"
    one.rename(other)
    status, _, err = run(capsys, *again)
    assert status == 1 and "is not the data that the run in" in err
    checkpoint = tmp_path / "run" / "checkpoints" / "epoch-0000.pt"
    saved = torch.load(checkpoint)
    assert saved["data"].pop("listing")  # as an older version left it, which noticed less
    torch.save(saved, checkpoint)
    assert run(capsys, *again)[0] == 0
