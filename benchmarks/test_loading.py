"""pytest-benchmark suite of the loaders: an epoch of augmented batches, against torchvision's usual DataLoader.

Images are made up: smooth colours, so that JPEGs have a photograph's size. Before a loader is timed, an evaluation pass
must give the pixels and labels that torchvision's gives.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.limits import timed
from fpdarts.data import Loader, augmentation, open_data

WORKERS = 2
COUNT = {"cifar": {"small": 2000, "full": 50000}, "imagenet": {"small": 64, "full": 640}}
SIDE = {"cifar": 32, "imagenet": 320}
BATCH = {"cifar": 256, "imagenet": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(protocol, size) -> an image folder, made once."""
    root, made = tmp_path_factory.mktemp("images"), {}

    def make(protocol, size):
        path = root / f"{protocol}-{size}"
        if path not in made:
            made[path] = None
            count, side, random = COUNT[protocol][size], SIDE[protocol], np.random.default_rng(0)
            for part, images in (("train", count), ("test", max(count // 10, 20))):
                for i in range(images):
                    coarse = random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
                    target = path / part / f"class{i % 10}" / f"{i}.{'jpg' if protocol == 'imagenet' else 'png'}"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(target)
        return path

    return make


def usual(path, data, part, training):
    """torchvision's datasets and transforms in a DataLoader with worker processes."""
    side, normalize = data.image_size, v2.Normalize(data.mean, data.std)
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize]
    if data.protocol == "cifar":
        steps = [v2.RandomCrop(side, padding=4), v2.RandomHorizontalFlip()] if training else []
    elif training:
        steps = [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip()]
    else:
        steps = [v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)]
    dataset = ImageFolder(path / part, v2.Compose([*steps, *to_float]))
    return torch.utils.data.DataLoader(
        dataset, BATCH[data.protocol], shuffle=training, num_workers=WORKERS, persistent_workers=True
    )


def ours(path, data, part, training, device):
    images = data.train if part == "train" else data.test
    augment = augmentation(data.protocol, "search") if training else None
    return Loader(images, data, BATCH[data.protocol], augment, 0, device, WORKERS)


@pytest.mark.parametrize("protocol", ["cifar", "imagenet"])
@pytest.mark.parametrize("size", [pytest.param(s, marks=getattr(pytest.mark, s)) for s in ("small", "full")])
@pytest.mark.parametrize("loader", ["torchvision", "fpdarts"])
def test_loading(benchmark, folder, loader, protocol, size, device, limits):
    path = folder(protocol, size)
    data = open_data(str(path), protocol)

    def batches(part, training, epoch=0):
        if loader == "fpdarts":
            return ours(path, data, part, training, device).epoch(epoch)
        return ((x.to(device), y.to(device)) for x, y in usual(path, data, part, training))

    expected = [torch.cat(part) for part in zip(*usual(path, data, "test", False))]
    images, labels = (torch.cat(part).cpu() for part in zip(*batches("test", False)))
    assert torch.equal(labels, expected[1])
    # normalization in another order of roundings
    torch.testing.assert_close(images, expected[0], rtol=0, atol=1e-5, msg=lambda m: f"evaluation pixels: {m}")

    if loader == "fpdarts":
        training = ours(path, data, "train", True, device)
        epochs = iter(range(10**9))

        def epoch():
            for _ in training.epoch(next(epochs)):
                pass

    else:
        training = usual(path, data, "train", True)

        def epoch():
            for x, y in training:
                x.to(device), y.to(device)

    benchmark.group = f"an epoch of {protocol} images, {size}"
    benchmark.pedantic(lambda: timed(epoch, device), rounds=3, warmup_rounds=1)
    count = len(data.train)
    moved = count * 3 * data.image_size**2 * (1 + 4)  # a byte a pixel read, a float32 written
    benchmark.extra_info |= {
        "side": loader,
        "images_per_second": count / benchmark.stats.stats.median,
        "launches": None,
        "flops": 0,
        "bytes": moved,
        "share_of_limit": moved / limits.bytes_per_second / benchmark.stats.stats.median,
    }
