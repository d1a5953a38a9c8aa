"""The loaders' readers against one another: same images, same choices; shards, resuming, errors."""

import gc
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from fpdarts.cli import main
from fpdarts.data import Augmentation, DataError, ImageData, Images, Loader, augmentation, in_memory, open_data
from fpdarts.data import loader as loader_module
from fpdarts.data.loader import dali_installed, select_reader
from fpdarts.data.preflight import check_folder
from fpdarts.run import load_checkpoint, read_metrics
from tests.made import random_pixels, write_image

needs_dali = pytest.mark.skipif(not dali_installed(), reason="nvidia-dali is not installed")
READERS = ["resident", "torchvision", pytest.param("dali", marks=needs_dali)]
FILE_READERS = READERS[1:]


def write_jpegs(root, size, parts=("train", "test"), count=7):
    """Two classes of smooth colours, as photographs are; size: of (part, label, number) -> width and height."""
    for part in parts:
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                seed = 100 * label + number + (50 if part == "test" else 0)
                coarse = Image.fromarray(random_pixels(6, 5, 3, seed=seed))
                file = root / part / name / f"{number}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                coarse.resize(size(number), Image.Resampling.BICUBIC).save(file)
    return root


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Files of many sizes, wide and high, some smaller than what is read, under protocol imagenet."""
    root = write_jpegs(tmp_path_factory.mktemp("large"), lambda number: (25 + 23 * number, 130 - 17 * number))
    write_image(root / "test" / "dog" / "grey.png", 60, 45, mode="L")
    return open_data(root, "imagenet", image_size=32)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Files of one size, under protocol cifar."""
    return open_data(write_jpegs(tmp_path_factory.mktemp("small"), lambda number: (32, 32)))


COLOURS = Image.fromarray(random_pixels(9, 12, 3)).resize((57, 43))  # an odd number of pixels
GREY = COLOURS.convert("L")
EXIF = Image.Exif()
EXIF[0x010F] = "Maker"
TURNED = Image.Exif()
TURNED[0x0112] = 6


def saved(image, **options):
    return lambda path: image.save(path, **options)


ODD_FILES = {  # suffix, what writes it, whether DALI shows it otherwise than Pillow, or fails
    "TIFF": ("tiff", saved(COLOURS), False),
    "TIFF, turned": ("tiff", saved(COLOURS, tiffinfo={274: 6}), True),
    "TIFF, bilevel": ("tiff", saved(GREY.convert("1")), True),
    "TIFF, grey and alpha": ("tiff", saved(Image.merge("LA", (GREY, GREY))), True),
    "TIFF, LAB": ("tiff", saved(COLOURS.convert("LAB")), True),
    "PPM": ("ppm", saved(COLOURS), False),
    "PPM, plain": ("ppm", lambda path: path.write_text("P3 2 2 255 " + "9 8 7 " * 4), False),
    "PPM of other levels": ("ppm", lambda path: path.write_bytes(b"P6 8 8 100\n" + bytes(range(96)) * 2), True),
    "PGM of 16 bits": ("pgm", lambda path: path.write_bytes(b"P5 8 8 65535\n" + bytes(range(128))), True),
    "JPEG, turned": ("jpg", saved(COLOURS, exif=TURNED), False),
    "JPEG in CMYK": ("jpg", saved(COLOURS.convert("CMYK")), False),
    "JPEG in CMYK without Adobe's mark": ("jpg", lambda path: write_unmarked_cmyk(path), True),
    "WebP with EXIF": ("webp", saved(COLOURS, exif=EXIF), False),
    "WebP with an odd chunk": ("webp", lambda path: write_odd_webp(path), True),
}


def write_unmarked_cmyk(path):
    COLOURS.convert("CMYK").save(path)
    before, mark, after = path.read_bytes().partition(b"\xff\xee\x00\x0eAdobe")
    assert mark
    path.write_bytes(before + after[7:])


def write_odd_webp(path):
    """Lossless, with EXIF tags after a chunk of an odd number of bytes."""
    for height in range(20, 60):
        COLOURS.resize((40, height)).save(path, lossless=True, exif=EXIF)
        if path.read_bytes()[34] % 2:  # the length of the chunk that follows the extended header
            return
    raise AssertionError("none has an odd number of bytes")


def make(images, data, reader, augment=None, batch_size=4, **options):
    if reader == "resident":
        images = in_memory(images, data, augment)
    return Loader(images, data, batch_size, augment, options.pop("seed", 5), reader=reader, workers=1, **options)


def all_of(batches):
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)


# ---- the same for all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["large", "small", "pixels"])
@pytest.mark.parametrize("reader", READERS)
def test_evaluation_is_the_same(kind, reader, request):
    data = request.getfixturevalue("small" if kind == "pixels" else kind)
    part = in_memory(data.test, data, None) if kind == "pixels" else data.test
    images, labels = all_of(make(part, data, reader).epoch())
    expected, expected_labels = all_of(make(data.test, data, "torchvision").epoch())
    assert torch.equal(labels, expected_labels) and torch.equal(labels, data.test.labels)
    # one decoder (libjpeg-turbo) and one resize, so on a CPU the same bits
    assert torch.equal(images, expected)


@pytest.mark.parametrize("stage", ["search", "retrain"])
@pytest.mark.parametrize("kind", ["large", "small", "pixels"])
@pytest.mark.parametrize("reader", READERS)
def test_training_shows_the_same_cut_out_alike(kind, stage, reader, request):
    data = request.getfixturevalue("small" if kind == "pixels" else kind)
    if kind == "large" and reader == "resident":
        pytest.skip("resident images have no random crops of files")
    augment = augmentation(data.protocol, stage)
    part = in_memory(data.train, data, augment) if kind == "pixels" else data.train
    images, labels = all_of(make(part, data, reader, augment).epoch(3))
    expected, expected_labels = all_of(make(data.train, data, "torchvision", augment).epoch(3))
    assert torch.equal(labels, expected_labels)
    assert torch.equal(images, expected)
    assert len(images) == 14 and not torch.equal(labels, data.train.labels)


@needs_dali
@pytest.mark.parametrize("stage", ["evaluation", "search"])
def test_pipeline_of_a_gpu(large, stage):
    """What DALI does by itself with a GPU, done on the CPU: its resize rounds otherwise than PyTorch's."""
    augment = None if stage == "evaluation" else augmentation("imagenet", stage)
    loader = make(large.train, large, "dali", augment)
    loader._read._all_in_dali = True
    images, labels = all_of(loader.epoch(2))
    expected, expected_labels = all_of(make(large.train, large, "torchvision", augment).epoch(2))
    assert torch.equal(labels, expected_labels)
    levels = (images - expected).abs() * 255 * torch.tensor(large.std)[None, :, None, None]
    assert levels.max() < 2.01 and levels.mean() < 0.5, (levels.max(), levels.mean())


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("reader", READERS)
def test_ranks_share_an_evaluation(small, reader, ranks):
    shares = [make(small.test, small, reader, rank=rank, ranks=ranks) for rank in range(ranks)]
    parts = [all_of(share.epoch()) for share in shares]
    assert sum(len(labels) for _, labels in parts) == 14
    images, labels = all_of(make(small.test, small, "resident").epoch())
    for rank, (own, own_labels) in enumerate(parts):
        assert torch.equal(own, images[rank::ranks]) and torch.equal(own_labels, labels[rank::ranks])
        assert len(shares[rank]) == -(-len(own) // 4)


@pytest.mark.parametrize("reader", READERS)
def test_ranks_share_a_training_in_equal_parts(small, reader):
    augment = Augmentation(padding=4, flip=True, cutout=4)
    shares = [make(small.train, small, reader, augment, rank=rank, ranks=3) for rank in range(3)]
    assert [len(share) for share in shares] == [1, 1, 1]
    whole = all_of(make(small.train, small, reader, augment).epoch(1))[0]
    for rank, share in enumerate(shares):
        assert torch.equal(all_of(share.epoch(1))[0], whole[rank:12:3])


def test_more_ranks_than_images(small):
    few = small.test.subset([3, 9])
    loaders = [make(few, small, "resident", rank=rank, ranks=3) for rank in range(3)]
    assert [len(list(loader.epoch())) for loader in loaders] == [1, 1, 0]
    with pytest.raises(DataError, match="2 images are too few for training on 3 ranks"):
        make(few, small, "resident", Augmentation(), ranks=3)
    with pytest.raises(ValueError, match="rank must be at least 0 and below ranks, 2, not 2"):
        make(few, small, "resident", rank=2, ranks=2)


@pytest.mark.parametrize("reader", FILE_READERS)
def test_an_interrupted_loader_goes_on_exactly(large, reader):
    augment = augmentation("imagenet", "retrain")
    uninterrupted = make(large.train, large, reader, augment)
    expected = [batch for _ in range(3) for batch in uninterrupted]  # 3 epochs of 4 batches
    assert len(expected) == 12 and uninterrupted.state_dict()["epoch"] == 3
    for stop in (0, 2, 4, 7):
        before = make(large.train, large, reader, augment)
        batches = (batch for _ in range(3) for batch in before)
        seen = [next(batches) for _ in range(stop)]
        state = before.state_dict()
        assert (state["epoch"], state["batch"]) == divmod(stop, 4)
        after = make(large.train, large, reader, augment)
        after.load_state_dict(state)
        rest = [batch for _ in range(state["epoch"], 3) for batch in after]
        for (images, labels), (other, other_labels) in zip(seen + rest, expected, strict=True):
            assert torch.equal(images, other) and torch.equal(labels, other_labels)


def test_state_of_another_loader_is_refused(small):
    state = make(small.train, small, "resident", Augmentation(), seed=1).state_dict()
    with pytest.raises(ValueError, match="state is of seed 1, but this loader has 2"):
        make(small.train, small, "resident", Augmentation(), seed=2).load_state_dict(state)


@pytest.mark.parametrize("reader", FILE_READERS)
def test_epochs_left_in_the_middle_and_under_way_at_once(large, reader):
    loader = make(large.train, large, reader, augmentation("imagenet", "search"))
    expected = {
        number: all_of(make(large.train, large, reader, loader.augmentation).epoch(number)) for number in (1, 2)
    }
    next(loader.epoch(1))
    for batches, number in zip(zip(*zip(loader.epoch(1), loader.epoch(2))), (1, 2)):
        assert torch.equal(all_of(batches)[0], expected[number][0])
    assert torch.equal(all_of(loader.epoch(2))[0], expected[2][0])


def test_batches_that_are_kept_stay_as_they_are(small):
    loader = make(small.train, small, "resident", Augmentation())
    kept = list(loader.epoch(0))
    copies = [images.clone() for images, _ in kept]
    part_of_one = kept.pop()[0][1:, :, 3]
    as_it_was = part_of_one.clone()
    for number in range(3):
        for images, _ in loader.epoch(number):
            images.zero_()
    for (images, _), copy in zip(kept, copies):
        assert torch.equal(images, copy)
    assert torch.equal(part_of_one, as_it_was)
    places = {images.data_ptr() for _ in range(4) for images, _ in loader.epoch(0)}
    assert len(places) <= 3, "memory that nothing refers to is used again"


# ---- augmentation ---------------------------------------------------------------------------------------------------


def test_resident_batches_wait_for_nothing(small):
    """Nothing is asked of the values, so that a CUDA graph can hold it: fake tensors have none."""
    from torch._subclasses import FakeTensorMode

    from fpdarts.data.augment import Views
    from fpdarts.data.resident import ResidentReader

    pixels = in_memory(small.train, small, None).pixels
    views = Views.drawn(augmentation("cifar", "retrain"), None, 6, 32, torch.Generator())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        reader = ResidentReader(mode.from_tensor(pixels), 4, torch.device("cpu"))
        out = reader.pixels(mode.from_tensor(torch.arange(6)), views._each(mode.from_tensor))
    assert out.shape == (6, 3, 32, 32) and out.dtype == torch.uint8


# ---- choice and errors ----------------------------------------------------------------------------------------------


def test_choice_of_a_reader(small, large, monkeypatch):
    assert select_reader("auto", small)[0] == "resident"
    assert select_reader("torchvision", large) == ("torchvision", "loader: torchvision (as asked)")
    with pytest.raises(ValueError, match="unknown loader 'ffcv'; one of: auto, resident, dali, torchvision"):
        select_reader("ffcv", small)
    with pytest.raises(ValueError, match="resident keeps one crop of each image.*choose dali or torchvision"):
        in_memory(large.train, large, augmentation("imagenet", "search"))
    monkeypatch.setattr(loader_module, "find_spec", lambda name: None)
    assert select_reader("auto", large) == ("torchvision", "loader: torchvision (nvidia-dali is not installed)")
    with pytest.raises(ValueError, match="loader dali: nvidia-dali is not installed; install it"):
        select_reader("dali", large)


@needs_dali
def test_auto_takes_dali_for_files(large):
    assert select_reader("auto", large)[0] == "dali"


@pytest.mark.parametrize("reader", FILE_READERS)
def test_a_file_that_is_damaged_later_is_named(tmp_path, reader):
    data = open_data(write_jpegs(tmp_path, lambda number: (90, 70)), image_size=32)
    loader = make(data.train, data, reader, augmentation("imagenet", "search"))
    path = data.train.paths[9]
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(DataError, match=r"train/dog/2.jpg: cannot be read as an image"):
        all_of(loader.epoch(0))


@needs_dali
def test_a_file_that_only_dali_cannot_decode_is_named(tmp_path):
    """Under the name of a JPEG: where all files are opened first, then; otherwise when it is decoded."""
    data = open_data(write_jpegs(tmp_path, lambda number: (32, 32)))
    Image.fromarray(random_pixels(32, 32, 3)).save(data.train.paths[9], format="GIF")
    assert len(all_of(make(data.train, data, "torchvision", Augmentation()).epoch(0))[1]) == 14
    with pytest.raises(DataError, match=r"train/dog/2.jpg: DALI cannot decode it, though Pillow can .*skip it"):
        all_of(make(data.train, data, "dali", Augmentation()).epoch(0))
    data = open_data(tmp_path, "imagenet", image_size=32)
    with pytest.raises(DataError, match=r"train/dog/2.jpg: DALI cannot decode it as Pillow does"):
        make(data.train, data, "dali", augmentation("imagenet", "search"))


@needs_dali
@pytest.mark.parametrize("kind", ODD_FILES)
def test_files_that_dali_would_show_otherwise_are_refused_and_told(tmp_path, kind):
    suffix, write, differs = ODD_FILES[kind]
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder / f"odd.{suffix}")
    findings = check_folder(tmp_path)["findings"]
    assert ("not for DALI" in findings) == differs
    assert ("TIFF with a rotation tag" in findings) == (kind == "TIFF, turned")
    data = open_data(tmp_path, "imagenet", image_size=32)
    if differs:
        with pytest.raises(DataError, match=rf"odd.{suffix}: DALI cannot decode it as Pillow does"):
            make(data.test, data, "dali")
        assert select_reader("auto", data)[0] == ("dali" if suffix in ("jpg", "png") else "torchvision")
    else:
        assert torch.equal(*(all_of(make(data.test, data, reader).epoch())[0] for reader in ("dali", "torchvision")))


def test_an_interrupt_is_not_the_workers_to_end_by(tmp_path):
    data = open_data(write_jpegs(tmp_path, lambda number: (90, 70)), image_size=32)
    batches = make(data.train, data, "torchvision").epoch()
    next(batches)  # now all have begun
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) > 1


def test_a_failed_epoch_leaves_no_workers(tmp_path):
    data = open_data(write_jpegs(tmp_path, lambda number: (90, 70)), image_size=32)
    loader = make(data.train, data, "torchvision")
    os.truncate(data.train.paths[9], 400)
    gc.collect()
    gc.disable()  # which would find a cycle sooner or later
    try:
        try:
            list(loader.epoch())
        except DataError as error:
            assert "dog/2.jpg" in str(error)
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


@pytest.mark.parametrize("reader", READERS)
def test_a_file_of_another_size_is_named(tmp_path, reader):
    data = open_data(write_jpegs(tmp_path, lambda number: (32, 32)))
    write_image(tmp_path / "train" / "dog" / "2.jpg", 36)
    with pytest.raises(DataError, match=r"train/dog/2.jpg: is 36x36, but the first image is 32x32"):
        all_of(make(data.train, data, reader, augmentation("cifar", "search")).epoch(0))


def test_skipped_files_are_left_out(tmp_path):
    write_jpegs(tmp_path / "images", lambda number: (32, 32))
    (tmp_path / "bad.txt").write_text("train/cat/3.jpg\ntest/dog/0.jpg\n")
    data = open_data(tmp_path / "images", skip=tmp_path / "bad.txt")
    assert (len(data.train), len(data.test)) == (13, 13)
    assert not any(path.endswith(("train/cat/3.jpg", "test/dog/0.jpg")) for path in data.train.paths + data.test.paths)
    (tmp_path / "bad.txt").write_text("train/cat/3.jpg\ntrain/cat/none.jpg\n")
    with pytest.raises(DataError, match="bad.txt: line 2 names train/cat/none.jpg, which is not in"):
        open_data(tmp_path / "images", skip=tmp_path / "bad.txt")
    for name in (tmp_path / "images/train/cat/3.jpg", "train/cat/../cat/3.jpg"):  # which would leave out nothing
        (tmp_path / "bad.txt").write_text(f"\n{name}\n")
        with pytest.raises(DataError, match="bad.txt: line 2 names .*3.jpg; name it as in .*images: train/<class>/"):
            open_data(tmp_path / "images", skip=tmp_path / "bad.txt")
    with pytest.raises(DataError, match="nowhere.txt: cannot be read as a list"):
        open_data(tmp_path / "images", skip=tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="digits: are built in, so there are no files to skip"):
        open_data("digits", skip="bad.txt")


def test_images_in_memory_keep_their_names():
    images = Images(torch.tensor([0, 1]), torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ("a", "b"))
    assert images.subset([1]).paths == ("b",) and images.subset([1]).pixels.shape == (1, 3, 4, 4)
    data = ImageData("made", "cifar", ("x", "y"), images, images, 4)
    assert Loader(images, data, 2, None, 0).reader == "resident"
    assert np.array_equal(next(Loader(images, data, 2, None, 0).epoch())[1], [0, 1])


# ---- whole runs -----------------------------------------------------------------------------------------------------

TINY = "--epochs 2 --init-channels 4 --cells 3 --batch-size 6 --workers 1 --device cpu".split()
TIMES = ("seconds", "images_per_second")


def run(command, folder, out, *more):
    main([command, "--data", str(folder), "--out", str(out), *TINY, *more])
    metrics = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(out)]
    return metrics, load_checkpoint(out)["model"]


def assert_same_run(one, other):
    assert one[0] == other[0]
    assert all(torch.equal(one[1][name], other[1][name]) for name in other[1])


@needs_dali
@pytest.mark.parametrize("command", ["search", "retrain"])
def test_runs_with_any_reader_are_the_same_and_resume(command, small, tmp_path, capsys):
    runs = {}
    for reader in ("resident", "torchvision", "dali"):
        runs[reader] = run(command, small.source, tmp_path / reader, "--loader", reader)
        assert f"loader: {reader} (as asked)" in capsys.readouterr().err
    assert_same_run(runs["torchvision"], runs["resident"])
    assert_same_run(runs["dali"], runs["resident"])

    for file in ("checkpoints/epoch-0001.pt", "result.json"):  # as if it had been stopped in its second epoch
        (tmp_path / "dali" / file).unlink()
    main([command, "--out", str(tmp_path / "dali"), "--resume"])
    assert "from epoch 2" in capsys.readouterr().err
    metrics = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(tmp_path / "dali")]
    assert_same_run((metrics, load_checkpoint(tmp_path / "dali")["model"]), runs["resident"])


@needs_dali
def test_retraining_from_large_files(tmp_path, capsys):
    folder = write_jpegs(tmp_path / "images", lambda number: (80 + 9 * number, 150 - 7 * number))
    options = ["--protocol", "imagenet", "--image-size", "64", "--auxiliary-weight", "0"]
    runs = [
        run("retrain", folder, tmp_path / reader, "--loader", reader, *options) for reader in ("auto", "torchvision")
    ]
    assert "loader: dali (the fastest for files)" in capsys.readouterr().err
    assert_same_run(*runs)
    found = []
    for reader in ("resident", "dali", "torchvision"):
        main(["evaluate", "--run", str(tmp_path / "auto"), "--loader", reader, "--json", "--device", "cpu"])
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] == found[2] and found[0]["images"] == 14


def test_the_list_of_files_to_skip_is_that_of_the_run_s_own_data(tmp_path, capsys):
    folder, other = (write_jpegs(tmp_path / name, lambda number: (32, 32)) for name in ("images", "others"))
    (tmp_path / "bad.txt").write_text("test/dog/0.jpg\n")
    (other / "test" / "dog" / "0.jpg").unlink()  # which the list names
    skip = "--skip", str(tmp_path / "bad.txt")
    run("retrain", folder, tmp_path / "run", "--loader", "torchvision", "--auxiliary-weight", "0", *skip)
    capsys.readouterr()
    for data, images in (([], 13), (["--data", str(other)], 13), (["--data", str(folder)], 14)):
        main(["evaluate", "--run", str(tmp_path / "run"), *data, "--json", "--device", "cpu"])
        assert json.loads(capsys.readouterr().out)["images"] == images
