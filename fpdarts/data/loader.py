"""Batches of an epoch, on the device: a pure function of the seed and the epoch's number, whichever reader serves."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from fpdarts.data.augment import Augmentation, Views, cut_out_, jitter_
from fpdarts.data.folder import cores, header_sizes, refuse_for_dali
from fpdarts.data.images import ImageData, Images
from fpdarts.errors import DataError

READERS = ("resident", "dali", "torchvision")


def dali_installed() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def select_reader(name: str, data: ImageData) -> tuple[str, str]:
    """What will read the images, ``resident``, ``dali`` or ``torchvision``, and a line that tells which it is and why.

    name: one of these or ``auto``. Raises ValueError for an unknown name, and for ``dali`` where it is not installed.
    """
    missing = None if dali_installed() else "nvidia-dali is not installed"
    if name == "auto":
        if data.protocol != "imagenet":
            return "resident", "loader: resident (the images fit into memory)"
        if missing:
            return "torchvision", f"loader: torchvision ({missing})"
        try:
            refuse_for_dali((data.train.paths or ()) + (data.test.paths or ()))
        except DataError as error:
            return "torchvision", f"loader: torchvision ({error})"
        return "dali", "loader: dali (the fastest for files)"
    if name not in READERS:
        raise ValueError(f"unknown loader {name!r}; one of: auto, {', '.join(READERS)}")
    if name == "dali" and missing:
        raise ValueError(f"loader dali: {missing}; install it (Linux on x86-64), or choose torchvision")
    return name, f"loader: {name} (as asked)"


class Loader:
    """Batches of images (B, 3, H, H) float32, channels_last, normalized, with labels (B,) int64, on the device.

    With an augmentation it is for training: shuffled and augmented, and a last batch of a single image is dropped,
    since batch normalization of a 1x1 map needs two. With None it is for evaluation: every image once, in order.

    An epoch depends on the seed and on its number alone: not on earlier epochs, the reader, the number of workers or
    torch's global random state, which it leaves as it is. All choices of an epoch are drawn on the CPU at its start, so
    that every reader on every device shows the same images, cut out and mirrored alike; what differs between readers is
    the arithmetic of decoding and resizing. So a resumed run sees what an uninterrupted one would have seen.

    Iterated over, it goes on from epoch to epoch; state_dict() tells where it is, between batches too. epoch() gives
    any epoch, whatever was read before.

    images: a part of `data`, from which the normalization and the image size come. reader: ``resident`` (pixels in the
        device's memory), ``dali``, ``torchvision`` or ``auto``. workers: threads (dali) or processes (torchvision) that
        decode, None for as many as cores, at most 8; 0 is this process itself. Resident images need none.
    rank, ranks: which share of every epoch is read here. In evaluation the ranks together have every image once; in
        training all have as many batches, and up to ranks - 1 images of an epoch, always others, are left out. For
        loops of one's own, as are iteration and state_dict(): search, retrain and evaluate are one process, and ask
        for epochs.

    Raises ValueError for an augmentation that these images cannot have, DataError for too few images, for files that
    are no images (named; under protocol imagenet their headers are read now) and, in an epoch, naming a file that
    cannot be decoded.
    """

    def __init__(
        self,
        images: Images,
        data: ImageData,
        batch_size: int,
        augmentation: Augmentation | None,
        seed: int,
        device: str | torch.device = "cpu",
        workers: int | None = None,
        reader: str = "auto",
        rank: int = 0,
        ranks: int = 1,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, but is {seed}")
        if seed >= 2**64:
            raise ValueError(f"seed must be below 2^64, but is {seed}")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be at least 0 and below ranks, {ranks}, not {rank}")
        self.images = images
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.seed = seed
        self.device = torch.device(device)
        self.rank, self.ranks = rank, ranks
        self._side = data.image_size
        # (x / 255 - mean) / std as one multiplication and one addition, by maps as large as an image: with only three
        # numbers to repeat along the innermost dimension, the CPU takes almost three times as long.
        mean, std = (torch.tensor(values)[None, :, None, None] for values in (data.mean, data.std))
        self._scale, self._shift = (
            channel.expand(1, 3, self._side, self._side).contiguous(memory_format=torch.channels_last).to(self.device)
            for channel in (1 / (255 * std), -mean / std)
        )
        self._count = len(range(rank, len(images), ranks)) if augmentation is None else len(images) // ranks
        self._length = -(-self._count // batch_size)
        if augmentation is not None and batch_size > 1 and self._count % batch_size == 1:
            self._length -= 1
        if not self._length and (augmentation or not len(images)):
            raise DataError(
                f"{len(images)} images are too few for {'training' if augmentation else 'evaluation'}"
                f"{f' on {ranks} ranks' if ranks > 1 else ''}; use more images"
            )
        self.reader = "resident" if reader == "auto" and images.pixels is not None else select_reader(reader, data)[0]
        self._sizes = self._header_sizes(data)
        self._read = self._make_reader(min(8, cores()) if workers is None else workers)
        self._memory = _Recycled() if self.device.type == "cpu" else None
        self._epoch = self._batch = 0

    def __len__(self) -> int:
        """Batches an epoch."""
        return self._length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What is left of the epoch that state_dict() names."""
        for batch in self.epoch(self._epoch, self._batch):
            self._batch += 1
            if self._batch == len(self):
                self._epoch, self._batch = self._epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where iteration is: the epoch, and how many of its batches were given out; and what these depend on."""
        return {"epoch": self._epoch, "batch": self._batch, **self._identity()}

    def load_state_dict(self, state: dict[str, int]):
        """Go on where another loader was. Raises ValueError, naming the field, if it was one of other batches."""
        for name, value in self._identity().items():
            if (given := state.get(name)) != value:
                raise ValueError(f"the loader's state is of {name} {given}, but this loader has {value}")
        epoch, batch = state.get("epoch", -1), state.get("batch", -1)
        if epoch < 0 or not 0 <= batch <= len(self):
            raise ValueError(f"the loader's state is of batch {batch} of epoch {epoch}, but an epoch has {len(self)}")
        self._epoch, self._batch = epoch, batch

    def _identity(self) -> dict[str, int]:
        fields = {"seed": self.seed, "batch_size": self.batch_size, "images": len(self.images)}
        return {**fields, "rank": self.rank, "ranks": self.ranks}

    def epoch(self, epoch: int = 0, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch number `epoch` (>= 0) from number `first` on, as (images, labels).

        Several epochs may be under way at once.
        """
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        if self.augmentation is None:
            order = torch.arange(len(self.images))
        else:
            order = torch.randperm(len(self.images), generator=generator)
        sizes = None if self._sizes is None else self._sizes[order]
        if self.augmentation is not None:  # for all ranks, of which each then takes its own
            views = Views.drawn(self.augmentation, sizes, len(order), self._side, generator)
        else:
            views = Views() if sizes is None else Views.central(sizes, self._side)
        share = torch.arange(self.rank, len(order), self.ranks)[: self._count]
        order, views = order[share], views.at(share)
        size = self.batch_size
        places = [slice(start, start + size) for start in range(first * size, len(self) * size, size)]
        return self._batches(order, views, places)

    def _batches(self, order: Tensor, views: Views, places: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        labels = self.images.labels[order].to(self.device)
        finishing = views.of_batches().to(self.device)
        # Beside readers that keep all cores busy, threads of torch would only wait for a core at the end of each step.
        threads = 1 if self.device.type == "cpu" and self.reader != "resident" else None
        for place, pixels in zip(places, self._read(order, views, places), strict=True):
            steps = [] if views.order is None else views.order[place.start].tolist()
            with _threads(threads):
                images = self._finished(pixels, finishing.at(place), steps)
            yield images, labels[place]

    def _finished(self, pixels: Tensor, views: Views, steps: list[int]) -> Tensor:
        """Bytes (B, 3, H, H) to what a network reads. steps: of the jitter. Nothing here waits for the device."""
        pixels = pixels.to(self.device, non_blocking=True)  # as bytes: a quarter of the transfer
        if self._memory is None:
            images = pixels.to(torch.float32, memory_format=torch.channels_last)
        else:
            images = self._memory.images(len(pixels), self._side).copy_(pixels)
        if views.jitter is not None:
            jitter_(images, views.jitter, steps)
        images.mul_(self._scale).add_(self._shift)
        return images if views.cutout is None else cut_out_(images, views, self.augmentation.cutout)

    def _header_sizes(self, data: ImageData) -> Tensor | None:
        """(n, 2) heights and widths; None where all images have the size that the network reads."""
        if data.protocol != "imagenet" or self.images.pixels is not None:
            return None
        return header_sizes(self.images.paths, for_dali=self.reader == "dali")

    def _make_reader(self, workers: int):
        """A function of (order, views, places) that yields the bytes of each place's images, (B, 3, H, H)."""
        augmentation, files = self.augmentation or Augmentation(), self.images.pixels is None
        if augmentation.padding and augmentation.random_resized_crop:
            raise ValueError("an augmentation has either padding or random_resized_crop, not both")
        if self.reader == "resident":
            if files:
                raise ValueError("a resident loader needs pixels; fpdarts.data.resident.in_memory reads files into it")
            if augmentation.random_resized_crop or augmentation.jitter:
                raise ValueError(
                    "random_resized_crop and jitter are for files; resident images are padded, flipped and cut out"
                )
            from fpdarts.data.resident import ResidentReader

            return ResidentReader(self.images.pixels, augmentation.padding, self.device)
        if augmentation.random_resized_crop and self._sizes is None:
            raise ValueError("random_resized_crop is for files of protocol imagenet; other images are padded")
        if self._sizes is not None and self.augmentation is not None and not augmentation.random_resized_crop:
            raise ValueError("padding and cutout are for images of one size; files need random_resized_crop")
        if self.reader == "dali":
            from fpdarts.data.dali import DaliReader as Reader
        else:
            from fpdarts.data.workers import TorchvisionReader as Reader
        return Reader(self.images, self._side, self._sizes is not None, self.batch_size, self.device, workers)


def _mix(*numbers: int) -> int:
    """One 64-bit seed out of one or two numbers (0 to 2**64 - 1), of which any change gives an unrelated one."""
    # Of 32 bits each, at fixed places: by itself SeedSequence would take 2**32 for two numbers, 0 and 1.
    words = [number % 2**32 for number in numbers] + [number >> 32 for number in numbers]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


@contextmanager
def _threads(count: int | None):
    """So many threads of torch for a while; None for as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Recycled:
    """Memory of batches on the CPU, used again when nothing refers to it any more.

    A batch of fresh memory costs as much for the system's clearing of its pages as for all that is done with it here.
    """

    def __init__(self):
        self._free: list[np.ndarray] = []

    def images(self, count: int, side: int) -> Tensor:
        """(count, 3, side, side) float32, channels_last, with anything in it."""
        size = count * side * side * 3
        fits = [place for place, memory in enumerate(self._free) if memory.size >= size]
        memory = self._free.pop(fits[0]) if fits else np.empty(size, np.float32)
        view = memory[:size].reshape(count, side, side, 3)
        # torch keeps `view` as long as any tensor shares its memory; `memory` itself is referred to from here only.
        weakref.finalize(view, self._free.append, memory).atexit = False
        return torch.from_numpy(view).permute(0, 3, 1, 2)
