"""Batches of an epoch, on the device: a pure function of the seed and the epoch's number."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fpdarts.data.augment import Augmentation, Draws, crop_and_flip, crop_windows, cut_out_
from fpdarts.data.folder import read_image
from fpdarts.data.images import DataError, ImageData, Images


class Loader:
    """Batches of images (B, 3, H, H) float32, channels_last, normalized, with labels (B,) int64, on the device.

    With an augmentation it is for training: shuffled and augmented, and a last batch of a single image is dropped,
    since batch normalization of a 1x1 map needs two. With None it is for evaluation: every image once, in order.

    An epoch depends on the seed and on its number alone: not on earlier epochs, the number of workers or torch's global
    random state, which it leaves as it is. So a resumed run sees what an uninterrupted one would have seen. Resident
    images get the same augmentation on every device: all random numbers of an epoch are drawn on the CPU at its start.

    images: a part of `data`, from which the normalization and the image size come. workers: processes that decode
    files; resident images need none and ignore it. Raises ValueError for an augmentation that these images cannot have,
    DataError for too few images and, in an epoch, naming a file that cannot be decoded.
    """

    def __init__(
        self,
        images: Images,
        data: ImageData,
        batch_size: int,
        augmentation: Augmentation | None,
        seed: int,
        device: str | torch.device = "cpu",
        workers: int = 0,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, but is {seed}")
        self.images = images
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.seed = seed
        self.device = torch.device(device)
        self.workers = workers
        self._side = data.image_size
        # (x / 255 - mean) / std as one multiplication and one addition, by maps as large as an image: with only three
        # numbers to repeat along the innermost dimension, the CPU takes almost three times as long.
        mean, std = (torch.tensor(values)[None, :, None, None] for values in (data.mean, data.std))
        self._scale, self._shift = (
            channel.expand(1, 3, self._side, self._side).contiguous(memory_format=torch.channels_last).to(self.device)
            for channel in (1 / (255 * std), -mean / std)
        )
        self._length = -(-len(images) // batch_size)
        if augmentation is not None and batch_size > 1 and len(images) % batch_size == 1:
            self._length -= 1
        if not self._length:
            raise DataError(
                f"{len(images)} images are too few for {'training' if augmentation else 'evaluation'}; use more images"
            )
        if images.pixels is None:
            self._transform = _file_transform(augmentation, data.image_size)
        else:
            if augmentation and (augmentation.random_resized_crop or augmentation.jitter):
                raise ValueError(
                    "random_resized_crop and jitter are for files; resident images are padded, flipped and cut out"
                )
            self._windows = crop_windows(images.pixels.to(self.device), augmentation.padding if augmentation else 0)
            self._labels = images.labels.to(self.device)

    def __len__(self) -> int:
        """Batches an epoch."""
        return self._length

    def epoch(self, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch number `epoch` (>= 0), as (images, labels). Several epochs may be under way at once."""
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        if self.augmentation is None:
            order = torch.arange(len(self.images))
        else:
            order = torch.randperm(len(self.images), generator=generator)
        if self.images.pixels is None:
            return self._from_files(order, epoch)
        return self._from_memory(order, generator)

    def _from_memory(self, order: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        augmentation = self.augmentation or Augmentation()
        draws = Draws.of(augmentation, len(order), self._side, generator).to(self.device)
        order = order.to(self.device)
        for places in self._places():
            indices, drawn = order[places], draws.at(places)
            images = self._normalized(crop_and_flip(self._windows, indices, drawn, augmentation))
            if augmentation.cutout:
                cut_out_(images, drawn, augmentation.cutout)
            yield images, self._labels[indices]

    def _from_files(self, order: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        batches = [order[places] for places in self._places()]
        seeds = None if self.augmentation is None else (self.seed, epoch)
        decoded = torch.utils.data.DataLoader(
            _DecodedFiles(self.images.paths, self._transform, seeds),
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=self.workers,
            collate_fn=_stack,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or else it would draw from the global one
        )
        for batch, images in zip(batches, decoded, strict=True):
            if isinstance(images, DataError):
                raise images
            images = images.to(self.device, non_blocking=True)  # as bytes: a quarter of the transfer
            labels = self.images.labels[batch].to(self.device)
            yield self._normalized(images), labels

    def _places(self) -> Iterator[slice]:
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield slice(start, start + self.batch_size)

    def _normalized(self, pixels: Tensor) -> Tensor:
        images = pixels.to(torch.float32, memory_format=torch.channels_last)
        return images.mul_(self._scale).add_(self._shift)


def _mix(*numbers: int) -> int:
    """One 64-bit seed out of several numbers (>= 0), of which any change gives an unrelated one."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _file_transform(augmentation: Augmentation | None, side: int):
    """PIL image -> (3, side, side) uint8. On PIL images, for colour jitter takes half again as long on tensors."""
    from torchvision.transforms import v2  # here, because resident images do without its second of import

    if augmentation is None:
        return v2.Compose([v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side), v2.PILToTensor()])
    if augmentation.padding or augmentation.cutout or not augmentation.random_resized_crop:
        raise ValueError("padding and cutout are for resident images; files need random_resized_crop")
    steps = [v2.RandomResizedCrop(side)]
    if augmentation.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augmentation.jitter:
        steps.append(v2.ColorJitter(*augmentation.jitter))
    return v2.Compose([*steps, v2.PILToTensor()])


class _DecodedFiles(torch.utils.data.Dataset):
    """File number -> transformed image, or the DataError that says why not: raised in a worker, it would reach the user
    wrapped in that worker's traceback."""

    def __init__(self, paths: tuple[str, ...], transform, seeds: tuple[int, int] | None):
        self.paths = paths
        self.transform = transform
        self.seeds = seeds

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | DataError:
        try:
            image = read_image(self.paths[index])
        except DataError as error:
            return error
        if self.seeds is None:
            return self.transform(image)
        # torchvision draws from the global generator. Only the CPU's is set and put back: torch.manual_seed would also
        # reach those of the GPUs.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_mix(*self.seeds, index))
            return self.transform(image)


def _stack(samples: list) -> Tensor | DataError:
    return next((sample for sample in samples if isinstance(sample, DataError)), None) or torch.stack(samples)
