"""Data: formats and their errors. All files are made here, in tmp_path."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fpdarts.data import DataError, ImageData, Images, Loader, in_memory, open_data
from fpdarts.data.folder import read_image
from fpdarts.data.images import NORMALIZATION
from fpdarts.data.preflight import check_folder
from tests.made import CIFAR, random_pixels, write_cifar, write_folder, write_image, write_pickle


def usable(path, protocol=None):
    """The data set once every loader is made, which is before training starts."""
    data = open_data(path, protocol)
    for part in (data.train, data.test):
        reader = "resident" if data.protocol == "cifar" else "torchvision"
        Loader(in_memory(part, data, None) if reader == "resident" else part, data, 8, None, 0, reader=reader)
    return data


# ---- formats --------------------------------------------------------------------------------------------------------


def test_digits():
    data = open_data("digits")
    assert (data.source, data.protocol, data.image_size) == ("digits", "digits", 8)
    assert data.classes == tuple("0123456789")
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.train.pixels.shape == (1437, 3, 8, 8) and data.train.pixels.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert data.train.pixels.max() == 255 and torch.equal(data.train.pixels[:, 0], data.train.pixels[:, 2])
    assert data.test.labels.bincount().min() >= 34  # stratified: 174 to 183 a class, a fifth of each
    again = open_data("digits")
    assert torch.equal(data.test.pixels, again.test.pixels)


def test_digits_constants_are_those_of_the_training_images():
    pixels = open_data("digits").train.pixels.double() / 255
    assert NORMALIZATION["digits"][0][0] == pytest.approx(pixels.mean().item(), abs=5e-5)
    assert NORMALIZATION["digits"][1][0] == pytest.approx(pixels.std().item(), abs=5e-5)


@pytest.mark.parametrize("parent", [False, True], ids=["folder", "parent"])
@pytest.mark.parametrize("layout", CIFAR)
def test_cifar_formats(tmp_path, layout, parent):
    folder, train, test = write_cifar(tmp_path, layout)
    data = open_data(tmp_path if parent else folder)
    assert (data.protocol, data.image_size) == ("cifar", 32)
    assert data.classes == tuple(f"class{label}" for label in range(CIFAR[layout][4]))
    for images, (pixels, labels) in ((data.train, train), (data.test, test)):
        assert images.labels.tolist() == labels and images.labels.dtype == torch.int64
        assert np.array_equal(images.pixels.numpy(), pixels.reshape(-1, 3, 32, 32))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_cifar_python_in_every_pickle_protocol(tmp_path, protocol):
    folder, (pixels, _), _ = write_cifar(tmp_path, "cifar10-python")
    for file in folder.iterdir():
        file.write_bytes(pickle.dumps(pickle.loads(file.read_bytes()), protocol=protocol))
    assert np.array_equal(open_data(folder).train.pixels.numpy().reshape(-1, 3072), pixels)


def test_cifar_python_as_python_2_wrote_it(tmp_path):
    # {"label_names": ["a"]} and an array with a str (not bytes) buffer, in the opcodes of the published files.
    folder, _, _ = write_cifar(tmp_path, "cifar10-python", count=1)
    pixels = random_pixels(1, 3072)
    body = (
        b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03K\x03aU\x04dataq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05"
        b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03"
        b"U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + pixels.tobytes() + b"tbu."
    )
    (folder / "test_batch").write_bytes(body)
    test = open_data(folder).test
    assert test.labels.tolist() == [3] and np.array_equal(test.pixels.numpy().reshape(1, 3072), pixels)


@pytest.mark.parametrize("second", ["test", "val"])
def test_small_image_folder_is_decoded(tmp_path, second):
    data = open_data(write_folder(tmp_path, ("train", second)))
    assert (data.protocol, data.image_size, data.classes) == ("cifar", 16, ("cat", "dog"))
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = in_memory(data.train, data, None).pixels
    assert np.array_equal(pixels[4].permute(1, 2, 0).numpy(), random_pixels(16, 16, 3, seed=11))


def test_test_is_taken_before_val(tmp_path):
    write_folder(tmp_path, ("train", "val"))
    write_folder(tmp_path, ("test",), count=1)
    assert len(open_data(tmp_path).test) == 2


def test_large_image_folder_stays_on_disk(tmp_path):
    write_folder(tmp_path, ("train", "val"), size=65, suffix="jpg")
    data = open_data(tmp_path)
    assert (data.protocol, data.image_size) == ("imagenet", 224)
    assert data.train.pixels is None and data.train.paths[0] == str(tmp_path / "train" / "cat" / "0.jpg")
    assert open_data(tmp_path, image_size=64).image_size == 64
    shutil.copy(tmp_path / "train" / "cat" / "0.jpg", tmp_path / "train" / "cat" / "_.tmp")  # no image by its name
    (tmp_path / "train" / ".cache").mkdir()
    assert len(open_data(tmp_path).train) == 6


def test_protocol_as_given(tmp_path):
    write_folder(tmp_path, size=16)
    assert open_data(tmp_path, "imagenet").train.pixels is None
    assert open_data(write_folder(tmp_path / "large", size=72), "cifar").image_size == 72


def test_every_chunk_of_files_is_decoded_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("fpdarts.data.folder.CHUNK", 2)  # of ten files: enough for processes
    data = open_data(write_folder(tmp_path, count=5))
    expected = [random_pixels(16, 16, 3, seed=seed) for seed in (0, 1, 2, 3, 4, 10, 11, 12, 13, 14)]
    assert np.array_equal(in_memory(data.train, data, None).pixels.permute(0, 2, 3, 1).numpy(), np.stack(expected))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("L", "png"),
        ("1", "png"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("P", "png"),
        ("CMYK", "jpg"),
        ("L", "jpg"),
        ("RGB", "webp"),
    ],
)
def test_modes_become_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    write_image(path, 12, mode=mode)
    image = read_image(str(path))
    assert (image.mode, image.size) == ("RGB", (12, 12))


def test_16_bit_grey_is_scaled_and_32_bit_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(read_image(str(tmp_path / "deep.png")))[0, 0].tolist() == [0x80] * 3
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match="float.tiff.*range"):
        read_image(str(tmp_path / "float.tiff"))


def test_palette_with_transparency_and_rotation_tag(tmp_path, recwarn):
    image = Image.fromarray(random_pixels(8, 12, 3)).quantize(4)
    image.save(tmp_path / "palette.png", transparency=b"\x00\x80\xff\xff")
    assert read_image(str(tmp_path / "palette.png")).mode == "RGB" and not recwarn.list
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    image.convert("RGB").save(tmp_path / "rotated.jpg", exif=exif)
    assert read_image(str(tmp_path / "rotated.jpg")).size == (12, 8)


# ---- errors ---------------------------------------------------------------------------------------------------------


def remove(*names):
    return lambda root: [
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink() for name in names
    ]


def write_text(name, text="no image"):
    def change(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)

    return change


FOLDER_ERRORS = {
    "no test": (remove("test"), None, r"neither test/ nor val/"),
    "no train": (remove("train"), None, r"no train/"),
    "not recognised": (
        remove("train", "test"),
        None,
        r"not recognised.*train/ and test/.*data_batch_1.*cifar-100-python",
    ),
    "empty class": (write_text("train/bird/readme.txt"), None, r"train.*bird"),
    "empty class in both": (
        lambda root: [(root / part / "bird").mkdir() for part in ("train", "test")],
        None,
        r"train: no images in class bird",
    ),
    "class only in train": (remove("test/dog"), None, r"train has classes that .*test lacks: dog"),
    "class only in test": (remove("train/dog"), None, r"test has classes that .*train lacks: dog"),
    "one class": (remove("train/dog", "test/dog"), None, r"cat is the only class"),
    "no class folders": (remove("train/cat", "train/dog"), None, r"train: no images"),
    "no images": (
        remove(*(f"train/{name}/{number}.png" for name in ("cat", "dog") for number in range(3))),
        None,
        r"train: no images in its class folders.*\.png",
    ),
    "unreadable, probed": (write_text("train/cat/0.png"), None, r"train/cat/0\.png: cannot be read"),
    "unreadable, resident": (write_text("test/dog/2.png"), "cifar", r"test/dog/2\.png: cannot be read"),
    "unreadable, files": (write_text("test/dog/2.png"), "imagenet", r"test/dog/2\.png: cannot be read"),
    "another size": (
        lambda root: write_image(root / "train/dog/1.png", 20),
        "cifar",
        r"train/dog/1\.png: is 20x20, but the first image is 16x16",
    ),
    "not square": (lambda root: write_image(root / "train/cat/0.png", 16, 12), None, r"train/cat/0\.png: is 16x12"),
    "not divisible by 4": (lambda root: write_image(root / "train/cat/0.png", 18), None, r"train/cat/0\.png: is 18x18"),
    "test of another size": (
        lambda root: [write_image(path, 32) for path in root.glob("test/*/*.png")],
        None,
        r"test images are 32 pixels wide, training images 16",
    ),
    "digits for a folder": (lambda root: None, "digits", r"protocol digits is for the built-in digits"),
}


@pytest.mark.parametrize("case", FOLDER_ERRORS)
def test_folder_errors(tmp_path, case):
    change, protocol, message = FOLDER_ERRORS[case]
    change(write_folder(tmp_path))
    with pytest.raises(DataError, match=message):
        usable(tmp_path, protocol)


def test_truncated_image(tmp_path):
    write_folder(tmp_path)
    file = tmp_path / "train" / "dog" / "1.png"
    os.truncate(file, file.stat().st_size // 2)
    for protocol in ("cifar", "imagenet"):  # verify() reads the checksums of a PNG, so this does not wait for a worker
        with pytest.raises(DataError, match=r"train/dog/1\.png: cannot be read"):
            usable(tmp_path, protocol)


def test_png_without_its_end_or_with_a_wrong_checksum(tmp_path):
    """Which Pillow shows all the same; every reader refuses it, and check-data tells so."""
    write_folder(tmp_path)
    cut, wrong = tmp_path / "train" / "cat" / "1.png", tmp_path / "train" / "dog" / "1.png"
    cut.write_bytes(cut.read_bytes()[:-12])
    content = bytearray(wrong.read_bytes())
    content[-13] ^= 255  # the last of the pixels' checksum
    wrong.write_bytes(content)
    for path in (cut, wrong):
        with pytest.raises(DataError, match=rf"{path}: cannot be read as an image"):
            read_image(str(path))
    assert check_folder(tmp_path)["findings"] == {"truncated or damaged": ["train/cat/1.png", "train/dog/1.png"]}


def test_links_to_folders(tmp_path):
    """Followed by the readers as by check-data, but for those that lead back."""
    root = write_folder(tmp_path / "images")
    write_image(tmp_path / "more" / "3.png")
    cat = root / "train" / "cat"
    (cat / "more").symlink_to(tmp_path / "more")
    for name, target in (("itself", "../cat"), ("all", ".."), ("both", "../../..")):
        (cat / name).symlink_to(target)
    (tmp_path / "more" / "back").symlink_to(cat)
    expected = [str(cat / name) for name in ("0.png", "1.png", "2.png", "more/3.png")]
    data = open_data(root)
    assert [*data.train.paths[:4]] == expected and data.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert check_folder(root)["images"] == 7 + 6
    (tmp_path / "more" / "3.png").write_text("no image")
    assert check_folder(root)["bad"] == ["train/cat/more/3.png"]


def test_path_errors(tmp_path):
    with pytest.raises(DataError, match="nowhere: does not exist"):
        open_data(tmp_path / "nowhere")
    (tmp_path / "data.tar.gz").touch()
    with pytest.raises(DataError, match="data.tar.gz: is a file"):
        open_data(tmp_path / "data.tar.gz")
    with pytest.raises(ValueError, match="unknown protocol 'mnist'; one of: digits, cifar, imagenet"):
        open_data("digits", "mnist")


@pytest.mark.parametrize("protocol", ["cifar", "imagenet"])
def test_digits_under_another_protocol(protocol):
    with pytest.raises(DataError, match=f"digits: protocol {protocol} does not fit"):
        open_data("digits", protocol)


def test_image_size_errors(tmp_path):
    with pytest.raises(DataError, match="image_size 32, but the images are 8x8"):
        open_data("digits", image_size=32)
    write_folder(tmp_path)
    with pytest.raises(DataError, match="image_size 100.*multiple of 32"):
        open_data(tmp_path, "imagenet", image_size=100)


def repickle(name, **changes):
    def change(folder):
        content = pickle.loads((folder / name).read_bytes()) | changes
        write_pickle(folder / name, {key: value for key, value in content.items() if value is not None})

    return change


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


class Intruder:
    def __reduce__(self):
        return os.mkdir, ("intruder",)


CIFAR_ERRORS = {
    "missing batch": ("cifar10-python", remove("data_batch_3"), None, "data_batch_3 missing"),
    "missing meta": ("cifar100-python", remove("meta"), None, "meta missing"),
    "missing binary": ("cifar10-binary", remove("test_batch.bin"), None, "test_batch.bin missing"),
    "label too large": (
        "cifar10-python",
        repickle("data_batch_2", labels=[0, 1, 10, 3]),
        None,
        "data_batch_2: image 2 has label 10, but there are 10 classes",
    ),
    "label negative": (
        "cifar100-python",
        repickle("test", fine_labels=[0, -1, 2, 3]),
        None,
        "test: image 1 has label -1",
    ),
    "label too large, binary": (
        "cifar100-binary",
        lambda folder: (folder / "train.bin").write_bytes(bytes([0, 100]) + bytes(3072)),
        None,
        "train.bin: image 0 has label 100",
    ),
    "no labels": ("cifar10-python", repickle("test_batch", labels=None), None, "test_batch: no field 'labels'"),
    "no data": ("cifar10-python", repickle("test_batch", data=None), None, "test_batch: no field 'data'"),
    "no names": (
        "cifar10-python",
        repickle("batches.meta", label_names=None),
        None,
        "batches.meta: no field 'label_names'",
    ),
    "other labels": (
        "cifar10-python",
        repickle("test_batch", labels=["a"] * 4),
        None,
        "test_batch: labels is not a list of",
    ),
    "fewer labels": (
        "cifar10-python",
        repickle("data_batch_5", labels=[1]),
        None,
        "data_batch_5: 4 images but 1 labels",
    ),
    "other shape": (
        "cifar10-python",
        repickle("data_batch_1", data=random_pixels(4, 768)),
        None,
        r"data_batch_1: data is uint8 \(4, 768\)",
    ),
    "other type": ("cifar10-python", repickle("data_batch_1", data=[1]), None, "data_batch_1: data is list"),
    "no images, binary": ("cifar10-binary", cut("test_batch.bin", 0), None, "test_batch.bin: no images"),
    "truncated pickle": ("cifar10-python", cut("data_batch_4", 5000), None, "data_batch_4: cannot be unpickled"),
    "truncated binary": (
        "cifar10-binary",
        cut("data_batch_4.bin", 5000),
        None,
        "data_batch_4.bin: 5000 bytes are not a",
    ),
    "no names, binary": ("cifar10-binary", cut("batches.meta.txt", 0), None, "batches.meta.txt: no class names"),
    "hostile pickle": (
        "cifar10-python",
        repickle("test_batch", extra=Intruder()),
        None,
        "test_batch: .*mkdir is not part of",
    ),
    "digits protocol": (
        "cifar10-python",
        lambda folder: None,
        "digits",
        "cifar-10-batches-py: protocol digits does not fit",
    ),
    "imagenet protocol": ("cifar10-binary", lambda folder: None, "imagenet", "protocol imagenet does not fit"),
}


@pytest.mark.parametrize("case", CIFAR_ERRORS)
def test_cifar_errors(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    layout, change, protocol, message = CIFAR_ERRORS[case]
    folder, _, _ = write_cifar(tmp_path, layout)
    change(folder)
    with pytest.raises(DataError, match=message):
        open_data(folder, protocol)
    assert not (tmp_path / "intruder").exists()


def test_two_cifar_sets_in_one_folder(tmp_path):
    write_cifar(tmp_path, "cifar10-python")
    write_cifar(tmp_path, "cifar100-python")
    with pytest.raises(DataError, match="several data sets.*cifar-10-batches-py, cifar-100-python"):
        open_data(tmp_path)


def test_images_are_normalized_by_the_published_numbers():
    """Of CIFAR-10 the deviation of all pixels, not the mean of the images' own, 0.2023, that is often seen."""
    assert NORMALIZATION["cifar"] == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert NORMALIZATION["imagenet"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_other_labels_are_another_listing():
    paths, pixels = ("a", "b"), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    listings = []
    for labels in ([0, 1], [1, 0]):
        images = Images(torch.tensor(labels), pixels, paths)
        listings.append(ImageData("made", "cifar", ("x", "y"), images, images, 4).listing(images))
    assert listings[0] != listings[1]
