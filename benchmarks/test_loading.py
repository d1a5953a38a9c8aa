"""pytest-benchmark suite of the loaders: an epoch of augmented batches, against torchvision's usual DataLoader.

Images are made up. Before a loader is timed, an evaluation pass must give torchvision's pixels and labels.
"""

import pytest
import torch

from benchmarks.limits import timed
from benchmarks.loading import made_up, usual
from fpdarts.data import Loader, augmentation, in_memory, open_data

WORKERS = 2
COUNT = {"cifar": {"small": 2000, "full": 50000}, "imagenet": {"small": 64, "full": 640}}
SIDE = {"cifar": 32, "imagenet": 320}
BATCH = {"cifar": 256, "imagenet": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(protocol, size) -> an image folder, made once."""
    root, made = tmp_path_factory.mktemp("images"), {}

    def make(protocol, size):
        if (protocol, size) not in made:
            target = root / f"{protocol}-{size}"
            made[protocol, size] = made_up(target, protocol, COUNT[protocol][size], SIDE[protocol])
        return made[protocol, size]

    return make


@pytest.mark.parametrize("protocol", ["cifar", "imagenet"])
@pytest.mark.parametrize("size", [pytest.param(s, marks=getattr(pytest.mark, s)) for s in ("small", "full")])
@pytest.mark.parametrize("reader", ["usual", "torchvision", "dali", "resident"])
def test_loading(benchmark, folder, reader, protocol, size, device, limits, monkeypatch, tmp_path):
    if reader == "dali":
        pytest.importorskip("nvidia.dali")
    if reader == "resident" and protocol == "imagenet":
        pytest.skip("resident images have no random crops of files")
    monkeypatch.setenv("FPDARTS_CACHE", str(tmp_path))
    path = folder(protocol, size)
    data = open_data(path, protocol)

    def batches(part, training):
        """A function of the epoch's number."""
        if reader == "usual":
            made = usual(path, data, part, training, BATCH[protocol], WORKERS)
            return lambda _: ((x.to(device), y.to(device)) for x, y in made)
        images = data.train if part == "train" else data.test
        augment = augmentation(protocol, "search") if training else None
        images = in_memory(images, data, augment) if reader == "resident" else images
        return Loader(images, data, BATCH[protocol], augment, 0, device, WORKERS, reader).epoch

    expected = [torch.cat(part) for part in zip(*usual(path, data, "test", False, BATCH[protocol], WORKERS))]
    images, labels = (torch.cat(part).cpu() for part in zip(*batches("test", False)(0)))
    assert torch.equal(labels, expected[1])
    # bytes are resized instead of Pillow's images, 2 levels in places, or more with a GPU's decoder; then roundings
    levels = (images - expected[0]).abs() * 255 * torch.tensor(data.std)[None, :, None, None]
    assert levels.max() < (0.01 if protocol == "cifar" else 2.01 if device == "cpu" else 24), levels.max()
    assert levels.mean() < (0.3 if device == "cpu" else 1.5)

    training, epochs = batches("train", True), iter(range(10**9))

    def epoch():
        for _ in training(next(epochs)):
            pass

    benchmark.group = f"an epoch of {protocol} images, {size}"
    benchmark.pedantic(lambda: timed(epoch, device), rounds=3, warmup_rounds=1)
    count = len(data.train)
    moved = count * 3 * data.image_size**2 * (1 + 4)  # a byte a pixel read, a float32 written
    benchmark.extra_info |= {
        "side": reader,
        "images_per_second": count / benchmark.stats.stats.median,
        "launches": None,
        "flops": 0,
        "bytes": moved,
        "share_of_limit": moved / limits().bytes_per_second / benchmark.stats.stats.median,
    }
