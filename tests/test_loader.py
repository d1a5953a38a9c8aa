"""Subsets, and what an epoch of a loader is: order, batches, augmentation. All files are made here, in tmp_path."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from fpdarts.data import Augmentation, DataError, ImageData, Images, Loader, augmentation, open_data
from tests.made import random_pixels, write_image

IMAGENET_TRAIN = augmentation("imagenet", "retrain")


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


def test_seeds_of_more_than_32_bits():
    from fpdarts.data.loader import _mix

    assert _mix(5, 3) == int(np.random.SeedSequence((5, 3)).generate_state(1, np.uint64)[0]), "as runs have begun with"
    mixed = [_mix(seed, epoch) for seed in (0, 1, 2**32, 2**32 + 1, 2**64 - 1) for epoch in (0, 1, 2)]
    assert len({*mixed}) == len(mixed)
    data = resident()
    with pytest.raises(ValueError, match="seed must be below 2.64, but is 99999999999999999999"):
        Loader(data.train, data, 8, None, seed=99999999999999999999)
    with pytest.raises(ValueError, match="--seed must be at least 0 and below 2.64, not 99999999999999999999"):
        data.train.split(0.5, seed=99999999999999999999)


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
    # 37 = 32 * 256 / 224, rounded; of bytes, which torchvision resizes as Pillow does to within two levels
    transform = v2.Compose([v2.PILToTensor(), v2.Resize(37), v2.CenterCrop(32)])
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


def test_the_parts_of_imagenet_are_a_tenth_and_a_fortieth():
    weights, architecture = numbered([0, 1] * 100).parts(0.1, 0.025, 0)
    assert (len(weights), len(architecture)) == (20, 5)
    assert not set(numbers(weights)) & set(numbers(architecture))


def test_images_are_chosen_by_numbers_and_have_their_dtypes():
    images = numbered([0, 1, 1])
    assert numbers(images.subset([])) == [] and numbers(images.subset(np.array([2, 0]))) == [2, 0]
    for wrong in (images.labels == 1, np.array([True, False, True]), [0.7]):
        with pytest.raises(ValueError, match="images are chosen by their numbers, not by torch"):
            images.subset(wrong)
    for labels, pixels in ((images.labels.int(), images.pixels), (images.labels, images.pixels / 255)):
        with pytest.raises(ValueError, match="labels must be int64, and pixels uint8"):
            Images(labels, pixels)
