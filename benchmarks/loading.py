"""How fast do the loaders deliver augmented batches, how long is it to the first, and does a search step wait for them?

    python -m benchmarks.loading --data cifar-10-images --out loading-cifar10.json
    python -m benchmarks.loading --data imagenet-images --protocol imagenet --images 1000 --batch-size 32

``usual`` is what is written without this project: torchvision's ImageFolder and transforms in a DataLoader, whose
workers normalize to float32. Sides are taken in turn, an epoch each a round; a ratio is that of two epochs of a round.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks import report
from benchmarks.limits import measure, synchronize
from fpdarts import config as configuration
from fpdarts.config import SearchConfig
from fpdarts.data import ImageData, Loader, augmentation, in_memory, open_data
from fpdarts.data.augment import Views
from fpdarts.data.loader import dali_installed
from fpdarts.data.resident import ResidentReader
from fpdarts.gates import GateSampler
from fpdarts.graphs import GraphedStep
from fpdarts.search import build_supernet, optimizers, weight_step


@dataclass(frozen=True)
class Options:
    data: str
    protocol: str | None = None
    readers: tuple[str, ...] = ("resident", "dali", "torchvision", "usual")
    images: int | None = None
    """Of an epoch: the first ones of each class, or all of them again and again if there are fewer."""
    batch_size: int = 256
    workers: int = 2
    rounds: int = 5
    steps: int = 0
    """Search steps with each reader, of which the share is told that waits for data; 0 for none."""
    init_channels: int = 16
    cells: int = 8
    device: str = "cpu"
    out: str | None = None
    json: bool = False


def made_up(path: Path, protocol: str, count: int, side: int) -> Path:
    """An image folder of ten classes: smooth colours, so that JPEGs have about a photograph's size."""
    random = np.random.default_rng(0)
    for part, images in (("train", count), ("test", max(count // 10, 20))):
        for i in range(images):
            coarse = random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
            target = path / part / f"class{i % 10}" / f"{i}.{'jpg' if protocol == 'imagenet' else 'png'}"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(target)
    return path


def agreement(options: Options, reader: str) -> dict[str, float]:
    """{evaluation, training: largest difference of a pixel, of 255 levels} from torchvision's reader on the CPU.

    On a CPU they are the same bits; decoders and resizes of a GPU have other roundings. Raises ValueError where labels
    differ.
    """
    data, worst = open_data(options.data, options.protocol), {}
    for name, augment in (("evaluation", None), ("training", augmentation(data.protocol, "search"))):
        part = data.train if augment else data.test
        pairs = []
        for side, device in ((reader, options.device), ("torchvision", "cpu")):
            images = in_memory(part, data, augment) if side == "resident" else part
            loader = Loader(images, data, options.batch_size, augment, 0, device, options.workers, side)
            pairs.append([torch.cat([batch.cpu() for batch in batches]) for batches in zip(*loader.epoch())])
        (images, labels), (expected, expected_labels) = pairs
        if not torch.equal(labels, expected_labels):
            raise ValueError(f"{name}: {reader} gives other labels than torchvision")
        levels = 255 * torch.tensor(data.std)[None, :, None, None]
        worst[name] = ((images - expected).abs() * levels).max().item()
    return worst


def usual(
    path: str, data: ImageData, part: str, training: bool, batch_size: int, workers: int, times: int = 1,
    most: int | None = None,
):  # fmt: skip
    """torchvision's datasets and transforms in a DataLoader with worker processes; all images so many times, or at most
    so many, from all classes."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    side, steps = data.image_size, []
    if data.protocol == "cifar" and training:
        steps = [v2.RandomCrop(side, padding=4), v2.RandomHorizontalFlip()]
    elif data.protocol == "imagenet":
        resized = [v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)]
        steps = [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip()] if training else resized
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    dataset = torch.utils.data.ConcatDataset([ImageFolder(Path(path) / part, v2.Compose(steps))] * times)
    if most is not None and most < len(dataset):
        dataset = torch.utils.data.Subset(dataset, [i * len(dataset) // most for i in range(most)])
    return torch.utils.data.DataLoader(
        dataset,
        batch_size,
        shuffle=training,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def _side(reader: str, options: Options, data: ImageData, times: int) -> Callable[[int], Iterable]:
    """A function of the epoch's number that gives its batches, on the device."""
    if reader == "usual":
        batches = usual(options.data, data, "train", True, options.batch_size, options.workers, times, options.images)
        return lambda _: ((x.to(options.device), y.to(options.device)) for x, y in batches)
    augment = augmentation(data.protocol, "search")
    images = in_memory(data.train, data, augment) if reader == "resident" else data.train
    images = images.subset(torch.arange(len(images)).repeat(times))
    if options.images is not None and options.images < len(images):
        images = images.limited(options.images)
    return Loader(images, data, options.batch_size, augment, 0, options.device, options.workers, reader).epoch


def _first_batch(reader: str, options: Options, times: int) -> float:
    """Seconds from the path to a batch on the device; imports and the files' way into memory are not in it."""
    if reader in ("torchvision", "usual"):
        import_module("torchvision.transforms.v2")
    elif reader == "dali":
        import_module("nvidia.dali")
    start = time.perf_counter()
    batches = iter(_side(reader, options, open_data(options.data, options.protocol), times)(0))
    next(batches)
    synchronize(options.device)
    return time.perf_counter() - start  # and then its workers end


def _epoch(epoch: Callable[[int], Iterable], number: int, device: str) -> float:
    """Images a second."""
    start, images = time.perf_counter(), 0
    for _, labels in epoch(number):
        images += len(labels)
    synchronize(device)
    return images / (time.perf_counter() - start)


def _waiting(epoch: Callable[[int], Iterable], options: Options, data: ImageData) -> dict:
    """{step: median seconds, waiting: the share of all steps' time that passes before the next batch is there}."""
    config = SearchConfig(init_channels=options.init_channels, cells=options.cells, batch_size=options.batch_size)
    config = configuration.resolved(replace(config, amp="off"), data.protocol)
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = build_supernet(config, len(data.classes)).to(device)
    sgd, _ = optimizers(config, model, device)
    gates = GateSampler(*model.gate_shape, seed=0)
    batches = itertools.chain.from_iterable(epoch(number) for number in itertools.count())
    seconds, waited = [], []
    for step in range(options.steps + 2):  # two to warm up
        start = time.perf_counter()
        batch = next(batches)
        arrived = time.perf_counter()
        weight_step(model, sgd, batch, gates.sample(), config)
        synchronize(options.device)
        if step >= 2:
            seconds.append(time.perf_counter() - start)
            waited.append(arrived - start)
    return {"step": statistics.median(seconds), "waiting": sum(waited) / sum(seconds)}


def main(options: Options) -> dict:
    data = open_data(options.data, options.protocol)
    readers = [reader for reader in options.readers if reader != "resident" or data.protocol != "imagenet"]
    if "usual" in readers and data.train.paths is None:
        raise ValueError(f"usual reads image folders, and {options.data} is none; leave it out of --readers")
    times = -(-options.images // len(data.train)) if options.images else 1
    result = {"data": Path(options.data).name, "protocol": data.protocol, "images": options.images or len(data.train)}
    result |= {"batch_size": options.batch_size, "workers": options.workers, "device": options.device}
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, FPDARTS_CACHE=cache):
        for reader in readers:
            first[reader] = _first_batch(reader, options, times)
        if "resident" in readers:
            first["resident, from the cache"] = _first_batch("resident", options, times)
        sides = {reader: _side(reader, options, data, times) for reader in readers}
        for epoch in sides.values():
            _epoch(epoch, 0, options.device)
        speeds: dict[str, list[float]] = {reader: [] for reader in readers}
        for number in range(1, options.rounds + 1):
            turn = number % len(readers)
            for reader in readers[turn:] + readers[:turn]:
                speeds[reader].append(_epoch(sides[reader], number, options.device))
        waiting = {reader: _waiting(sides[reader], options, data) for reader in readers if options.steps}
    limit = measure(options.device).bytes_per_second
    moved = 3 * data.image_size**2 * (1 + 4)  # a byte a pixel read, a float32 written
    result["first_batch_seconds"] = first
    result["images_per_second"] = {
        reader: {
            "median": statistics.median(own),
            "all": own,
            "share_of_copy_bandwidth": statistics.median(own) * moved / limit,
        }
        for reader, own in speeds.items()
    }
    if "usual" in readers:
        ratios = {reader: [a / b for a, b in zip(own, speeds["usual"])] for reader, own in speeds.items()}
        result["over_usual"] = {
            reader: {"median": statistics.median(own), "low": min(own), "high": max(own)}
            for reader, own in ratios.items()
            if reader != "usual"
        }
    if waiting:
        result["search_step"] = waiting
    if options.out:
        report.write(options.out, result, options.device)
    return result


def on_device(device: str, dry_run: bool) -> dict:
    """Every reader on a device, with images that are made up: is it right, and how fast? For benchmarks.gpu."""
    dali = ("dali",) if dali_installed() else ()
    counts = {"imagenet": (16, 64) if dry_run else (1024, 320), "cifar": (40 if dry_run else 5000, 32)}
    result = {"graph": _check_graph()} if device == "cuda" else {}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, FPDARTS_CACHE=f"{folder}/cache"):
        for protocol, (count, side) in counts.items():
            path = made_up(Path(folder) / protocol, protocol, count, side)
            readers = ("torchvision", *dali, *(("resident",) if protocol == "cifar" else ()))
            options = Options(
                str(path), protocol, (*readers, "usual"), batch_size=16 if dry_run else 128,
                workers=min(8, os.cpu_count()), rounds=1 if dry_run else 5, device=device,
            )  # fmt: skip
            levels = {reader: agreement(options, reader) for reader in readers}
            result[protocol] = {"levels": levels, **main(options)}
            print(protocol, levels, show(result[protocol], options), sep="\n")
    return result


def _check_graph() -> str:
    """Whether a CUDA graph can hold what the resident reader does for a batch. Raises ValueError if it cannot."""
    pixels = torch.randint(256, (500, 3, 32, 32), dtype=torch.uint8)
    reader = ResidentReader(pixels, 4, torch.device("cuda"))
    step = GraphedStep(lambda order, corner, flip: (reader.pixels(order, Views(corner=corner, flip=flip)),))
    for seed in range(5):
        drawn = Views.drawn(augmentation("cifar", "search"), None, 64, 32, torch.Generator().manual_seed(seed))
        order, views = torch.randperm(500)[:64].cuda(), drawn.to("cuda")
        if not torch.equal(step(order, views.corner, views.flip)[0], reader.pixels(order, views)):
            raise ValueError("a CUDA graph of the resident reader gives other images")
    return "equal"


def show(result: dict, options: Options) -> str:
    lines = [f"{'reader':<26}{'first batch':>12}{'images/s':>12}{'over usual':>24}{'step waits':>12}"]
    for reader, seconds in result["first_batch_seconds"].items():
        speed = result["images_per_second"].get(reader)
        ratio = result.get("over_usual", {}).get(reader)
        waits = result.get("search_step", {}).get(reader)
        cells = [
            f"{seconds:.2f} s",
            f"{speed['median']:,.0f}" if speed else "",
            f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "",
            f"{waits['waiting']:.1%}" if waits else "",
        ]
        lines.append(f"{reader:<26}{cells[0]:>12}{cells[1]:>12}{cells[2]:>24}{cells[3]:>12}")
    return "\n".join(lines)


if __name__ == "__main__":
    report.command("loading", Options, main, show, __doc__)
