"""Data: formats and their errors, subsets, and what an epoch of a loader is. All files are made here, in tmp_path."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fpdarts.data import Augmentation, DataError, ImageData, Images, Loader, augmentation, open_data
from fpdarts.data.folder import read_image
from fpdarts.data.images import NORMALIZATION

IMAGENET_TRAIN = augmentation("imagenet", "retrain")


# ---- making data ----------------------------------------------------------------------------------------------------


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path, width=16, height=None, mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random_pixels(height or width, width, 3, seed=seed)
    Image.fromarray(pixels).convert(mode).save(path)
    return pixels


def write_folder(root, parts=("train", "test"), classes=("cat", "dog"), count=3, size=16, suffix="png"):
    for part in parts:
        for label, name in enumerate(classes):
            for number in range(count):
                write_image(root / part / name / f"{number}.{suffix}", size, seed=10 * label + number)
    return root


def write_pickle(path, content):
    # Protocol 2 and str keys: what Python 3 writes that comes nearest to the published files of Python 2.
    path.write_bytes(pickle.dumps(content, protocol=2))


CIFAR = {  # layout: (folder, train files, test file, meta file, classes)
    "cifar10-python": (
        "cifar-10-batches-py",
        [f"data_batch_{i}" for i in range(1, 6)],
        "test_batch",
        "batches.meta",
        10,
    ),
    "cifar100-python": ("cifar-100-python", ["train"], "test", "meta", 100),
    "cifar10-binary": (
        "cifar-10-batches-bin",
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        "test_batch.bin",
        "batches.meta.txt",
        10,
    ),
    "cifar100-binary": ("cifar-100-binary", ["train.bin"], "test.bin", "fine_label_names.txt", 100),
}


def write_cifar(root, layout, count=4):
    """Returns the folder, and pixels (n, 3072) and labels of all training files and of the test file."""
    name, train, test, meta, classes = CIFAR[layout]
    folder = root / name
    folder.mkdir(parents=True)
    names = [f"class{label}" for label in range(classes)]
    written = []
    for number, file in enumerate([*train, test]):
        pixels = random_pixels(count, 3072, seed=number)
        labels = [(number + 7 * image) % classes for image in range(count)]
        written.append((pixels, labels))
        if layout.endswith("python"):
            fields = {"data": pixels, "fine_labels" if classes == 100 else "labels": labels}
            write_pickle(folder / file, fields | {"coarse_labels": [0] * count, "filenames": ["x.png"] * count})
        else:
            coarse = [np.full((count, 1), 19, np.uint8)] if classes == 100 else []
            records = np.concatenate([*coarse, np.array(labels, np.uint8)[:, None], pixels], axis=1)
            (folder / file).write_bytes(records.tobytes())
    if layout.endswith("python"):
        write_pickle(folder / meta, {"fine_label_names" if classes == 100 else "label_names": names})
    else:
        (folder / meta).write_text("\n".join(names) + "\n\n")
    train_pixels = np.concatenate([pixels for pixels, _ in written[:-1]])
    train_labels = [label for _, labels in written[:-1] for label in labels]
    return folder, (train_pixels, train_labels), written[-1]


def resident(count=40, side=8, classes=4):
    pixels = torch.from_numpy(random_pixels(count, side, side, 3)).permute(0, 3, 1, 2)
    images = Images(torch.arange(count) % classes, pixels)
    return ImageData("made", "cifar", tuple("abcdefghij"[:classes]), images, images, side)


@pytest.fixture
def files(tmp_path):
    """Eight JPEGs of two classes and odd sizes, under protocol imagenet."""
    for part in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            for number in range(4):
                write_image(tmp_path / part / name / f"{number}.JPEG", 90 + 7 * number, 70, seed=10 * label + number)
    return open_data(tmp_path, image_size=32)


def epoch_of(loader, number=0):
    return [(images.clone(), labels.clone()) for images, labels in loader.epoch(number)]


def assert_same_bits(left, right):
    assert len(left) == len(right)
    for (images, labels), (other_images, other_labels) in zip(left, right):
        assert torch.equal(labels, other_labels), "labels"
        assert torch.equal(images, other_images), "images"


def as_bytes(images, data):
    """Normalized images back as 0..255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    return ((images * std + mean) * 255).round().to(torch.uint8)


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
    assert np.array_equal(data.train.pixels[4].permute(1, 2, 0).numpy(), random_pixels(16, 16, 3, seed=11))


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
    monkeypatch.setattr("fpdarts.data.folder.CHUNK", 2)
    data = open_data(write_folder(tmp_path, count=5))
    expected = [random_pixels(16, 16, 3, seed=seed) for seed in (0, 1, 2, 3, 4, 10, 11, 12, 13, 14)]
    assert np.array_equal(data.train.pixels.permute(0, 2, 3, 1).numpy(), np.stack(expected))


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
        open_data(tmp_path, protocol)


def test_truncated_image(tmp_path):
    write_folder(tmp_path)
    file = tmp_path / "train" / "dog" / "1.png"
    os.truncate(file, file.stat().st_size // 2)
    for protocol in ("cifar", "imagenet"):  # verify() reads the checksums of a PNG, so this does not wait for a worker
        with pytest.raises(DataError, match=r"train/dog/1\.png: cannot be read"):
            open_data(tmp_path, protocol)


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


# ---- subsets --------------------------------------------------------------------------------------------------------


def numbered(labels):
    """Images whose pixels hold their number."""
    labels = torch.tensor(labels)
    return Images(labels, torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4))


def numbers(images):
    return images.pixels[:, 0, 0, 0].tolist()


def test_subset_keeps_order_and_kind():
    images = numbered([0, 1, 2, 0])
    assert numbers(images.subset([3, 0])) == [3, 0] and images.subset([3, 1]).labels.tolist() == [0, 1]
    assert images.subset(torch.tensor([2])).labels.tolist() == [2]
    files = Images(torch.tensor([0, 1, 1]), paths=("a", "b", "c"))
    assert files.subset([2, 0]).paths == ("c", "a") and len(files.subset([1])) == 1


def test_limited_takes_the_first_of_each_class():
    images = numbered([0, 0, 0, 1, 1, 2, 2, 2, 2, 1])
    assert numbers(images.limited(3)) == [0, 3, 5]
    assert numbers(images.limited(6)) == [0, 1, 3, 4, 5, 6]
    assert images.limited(8).labels.bincount().tolist() == [3, 3, 2]
    assert numbers(images.limited(100)) == list(range(10))
    assert numbered([0, 1, 1, 1, 1, 1]).limited(4).labels.tolist() == [0, 1, 1, 1]  # a small class gives what it has
    with pytest.raises(DataError, match="limit of 2 images is too small for 3 classes"):
        images.limited(2)


@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.29])
def test_split_is_a_balanced_partition(fraction):
    images = numbered([label for label in range(2) for _ in range(100)])
    first, second = images.split(fraction, seed=1)
    assert sorted(numbers(first) + numbers(second)) == list(range(200))
    assert first.labels.bincount().tolist() == [round(100 * fraction)] * 2
    assert numbers(first) == numbers(images.split(fraction, seed=1)[0])
    assert numbers(first) != numbers(images.split(fraction, seed=2)[0])


def test_split_of_uneven_classes():
    images = numbered([0] * 3 + [1] * 5 + [2] * 7)
    first, second = images.split(0.5, seed=0)
    assert abs(len(first) - len(second)) == 1
    assert (first.labels.bincount() - second.labels.bincount()).abs().max() <= 1


def test_split_errors():
    with pytest.raises(DataError, match="one part would be empty"):
        numbered([0, 1]).split(0.1, seed=0)
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1"):
        numbered([0, 1]).split(1.0, seed=0)


# ---- epochs ---------------------------------------------------------------------------------------------------------


def test_evaluation_covers_every_image_once_in_order():
    data = resident(count=41)
    loader = Loader(data.test, data, 8, None, seed=0)
    batches = epoch_of(loader)
    assert len(batches) == len(loader) == 6 and [len(labels) for _, labels in batches] == [8] * 5 + [1]
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(as_bytes(images, data), data.test.pixels)
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.test.labels)
    expected = torchvision_normalize(data.test.pixels, data)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)  # two roundings of values up to 3


def torchvision_normalize(pixels, data):
    from torchvision.transforms import v2

    return v2.functional.normalize(v2.functional.to_dtype(pixels, torch.float32, scale=True), data.mean, data.std)


@pytest.mark.parametrize("kind", ["resident", "files"])
def test_batches_are_what_a_network_reads(kind, request):
    data = resident() if kind == "resident" else request.getfixturevalue("files")
    stage = augmentation(data.protocol, "retrain")
    for choice in (None, stage):
        images, labels = next(Loader(data.train, data, 4, choice, seed=0).epoch(0))
        assert images.shape == (4, 3, data.image_size, data.image_size) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.shape == (4,) and labels.dtype == torch.int64


def test_training_visits_every_image_once_in_another_order_each_epoch():
    data = resident()
    loader = Loader(data.train, data, 16, Augmentation(), seed=3)
    visited = [as_bytes(torch.cat([images for images, _ in loader.epoch(number)]), data) for number in (0, 1)]
    position = {image.numpy().tobytes(): number for number, image in enumerate(data.train.pixels)}
    orders = [[position[image.contiguous().numpy().tobytes()] for image in images] for images in visited]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert orders[0] != orders[1] != list(range(40))


@pytest.mark.parametrize(("count", "batches"), [(16, 2), (17, 2), (18, 3), (7, 1)])
def test_training_drops_a_last_single_image(count, batches):
    data = resident(count)
    loader = Loader(data.train, data, 8, Augmentation(), seed=0)
    assert len(loader) == len(epoch_of(loader)) == batches
    assert min(len(labels) for _, labels in loader.epoch(0)) > 1
    assert len(Loader(data.train, data, 1, Augmentation(), seed=0)) == count  # asked for, not left over


def test_loader_errors(files):
    data = resident(1, classes=1)
    with pytest.raises(DataError, match="1 images are too few for training"):
        Loader(data.train, data, 8, Augmentation(), seed=0)
    assert len(Loader(data.train, data, 8, None, seed=0)) == 1
    data = resident()
    with pytest.raises(ValueError, match="random_resized_crop and jitter are for files"):
        Loader(data.train, data, 8, IMAGENET_TRAIN, seed=0)
    with pytest.raises(ValueError, match="files need random_resized_crop"):
        Loader(files.train, files, 8, augmentation("cifar", "search"), seed=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Loader(data.train, data, 0, None, seed=0)
    with pytest.raises(ValueError, match="seed must not be negative"):
        Loader(data.train, data, 1, None, seed=-1)


def test_resident_epoch_is_pure():
    data = resident(side=32)
    make = lambda seed=5: Loader(data.train, data, 16, augmentation("cifar", "retrain"), seed)  # noqa: E731
    expected = epoch_of(make(), 7)
    loader = make()
    epoch_of(loader, 0)
    next(loader.epoch(7))  # left in the middle
    torch.manual_seed(99)
    assert_same_bits(epoch_of(loader, 7), expected)
    interleaved = [(one, other) for one, other in zip(loader.epoch(7), loader.epoch(8))]
    assert_same_bits([one for one, _ in interleaved], expected)
    assert_same_bits([other for _, other in interleaved], epoch_of(make(), 8))
    assert not torch.equal(expected[0][0], epoch_of(loader, 8)[0][0]), "epochs must differ"
    assert not torch.equal(expected[0][0], epoch_of(make(6), 7)[0][0]), "seeds must differ"


def test_files_epoch_is_pure_and_independent_of_workers(files):
    make = lambda workers: Loader(files.train, files, 3, IMAGENET_TRAIN, 5, workers=workers)  # noqa: E731
    expected = epoch_of(make(0), 1)
    loader = make(2)
    next(loader.epoch(0))  # left in the middle
    assert_same_bits(epoch_of(loader, 1), expected)
    one = make(0)
    epoch_of(one, 0)
    assert_same_bits(epoch_of(one, 1), expected)
    assert not torch.equal(expected[0][0], epoch_of(one, 2)[0][0]), "epochs must differ"


@pytest.mark.parametrize("kind", ["resident", "files", "files, 2 workers"])
def test_global_random_state_is_untouched(kind, request):
    data = resident() if kind == "resident" else request.getfixturevalue("files")
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    data.train.split(0.5, seed=0)
    for choice in (augmentation(data.protocol, "retrain"), None):
        epoch_of(Loader(data.train, data, 4, choice, seed=0, workers=2 if "workers" in kind else 0))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_evaluation_of_files(files):
    from torchvision.transforms import v2

    batches = epoch_of(Loader(files.test, files, 5, None, seed=0, workers=1))
    assert [len(labels) for _, labels in batches] == [5, 3]
    assert torch.equal(torch.cat([labels for _, labels in batches]), files.test.labels)
    transform = v2.Compose([v2.Resize(37), v2.CenterCrop(32), v2.PILToTensor()])  # 37 = 32 * 256 / 224, rounded
    expected = torch.stack([transform(Image.open(path)) for path in files.test.paths])
    assert torch.equal(as_bytes(torch.cat([images for images, _ in batches]), files), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_file_that_fails_to_decode_later_is_named(files, workers):
    path = files.train.paths[6]
    os.truncate(path, os.path.getsize(path) // 2)
    open_data(files.source, image_size=32)  # the header of a JPEG is still good
    with pytest.raises(
        DataError, match=r"^\S*train/dog/2.JPEG: cannot be read as an image \(OSError.*truncated"
    ) as error:
        epoch_of(Loader(files.train, files, 3, IMAGENET_TRAIN, seed=0, workers=workers))
    assert "Traceback" not in str(error.value)


# ---- augmentation ---------------------------------------------------------------------------------------------------


def test_policies():
    assert augmentation("digits", "search") == augmentation("digits", "retrain") == Augmentation(padding=1)
    assert augmentation("cifar", "search") == Augmentation(padding=4, flip=True)
    assert augmentation("cifar", "retrain") == Augmentation(padding=4, flip=True, cutout=16)
    assert augmentation("imagenet", "search") == Augmentation(random_resized_crop=True, flip=True)
    assert IMAGENET_TRAIN == Augmentation(random_resized_crop=True, flip=True, jitter=(0.4, 0.4, 0.4, 0.2))
    with pytest.raises(ValueError, match="no augmentation for cifar/test; there are: digits/search"):
        augmentation("cifar", "test")


def landmarks(count, side, row, column):
    """Images that are 1 everywhere and 255 at one place."""
    pixels = torch.ones(count, 3, side, side, dtype=torch.uint8)
    pixels[:, :, row, column] = 255
    images = Images(torch.zeros(count, dtype=torch.int64), pixels)
    return ImageData("made", "cifar", ("only",), images, images, side)


def all_images(data, choice):
    return torch.cat([images for images, _ in Loader(data.train, data, 500, choice, seed=0).epoch(0)])


def test_crop_offsets_and_padding():
    data = landmarks(4000, 12, 6, 6)
    pixels = as_bytes(all_images(data, Augmentation(padding=4)), data)[:, 0]
    image, row, column = torch.where(pixels == 255)
    assert len(image) == 4000
    for places in (row, column):  # -4..4, each once in nine: 444 expected, 6 standard deviations are 119
        counts = places.bincount(minlength=11)[2:11]
        assert counts.sum() == 4000 and (counts - 444).abs().max() < 119
    assert not torch.equal(row, column)
    padding = (pixels == 0).sum((1, 2))
    down, right = (row - 6).abs(), (column - 6).abs()
    assert torch.equal(padding, 144 - (12 - down) * (12 - right))  # zeros come in exactly where the image has left


def test_flip_is_half_and_exact():
    data = landmarks(4000, 8, 3, 1)
    pixels = as_bytes(all_images(data, Augmentation(flip=True)), data)[:, 0]
    kept, flipped = (pixels[:, 3, 1] == 255), (pixels[:, 3, 6] == 255)
    assert torch.equal(kept, ~flipped)
    assert abs(flipped.sum().item() - 2000) < 190  # 6 standard deviations


@pytest.mark.parametrize("side", [6, 5])
def test_cutout(side):
    data = landmarks(4000, 16, 0, 0)
    images = all_images(data, Augmentation(cutout=side))
    hole = (images == 0).all(1)
    rows, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, rows[:, :, None] & columns[:, None, :]), "a hole is a rectangle"
    for extent in (rows.sum(1), columns.sum(1)):
        assert extent.min() == (side + 1) // 2 and extent.max() == side  # the border cuts off less than half
    # A centre is uniform over 16 places; how many of them leave a hole whole follows.
    whole = (rows.sum(1) == side).float().mean().item()
    assert whole == pytest.approx((17 - side) / 16, abs=0.05)


def test_augmentations_do_not_disturb_each_other():
    data = resident(64)
    plain, with_flip = (all_images(data, Augmentation(padding=2, flip=flip)) for flip in (False, True))
    same = (plain == with_flip).flatten(1).all(1)
    mirrored = (plain == with_flip.flip(3)).flatten(1).all(1)
    assert torch.equal(same, ~mirrored) and 0 < same.sum() < 64
