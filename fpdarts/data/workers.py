"""Files decoded by Pillow and cut out by torchvision, in the worker processes of PyTorch's DataLoader."""

import gc
import signal
from collections.abc import Iterator

import torch
from torch import Tensor

from fpdarts.data.augment import Views
from fpdarts.data.folder import read_image, worker_ended, wrong_size
from fpdarts.data.images import Images
from fpdarts.errors import DataError


class TorchvisionReader:
    """images: files or pixels. side: of what is read. resized: whether boxes or sizes will be asked for; otherwise the
    images must have that side. workers: processes, which live as long as this reader."""

    def __init__(self, images: Images, side: int, resized: bool, batch_size: int, device: torch.device, workers: int):
        self._source = _Source(images, side, resized)
        self._workers, self._pinned = workers, device.type == "cuda"
        self._idle: list[tuple] = []  # one for each epoch that was under way at once

    def __call__(self, order: Tensor, views: Views, places: list[slice]) -> Iterator[Tensor]:
        plan, batches = self._idle.pop() if self._idle else self._make()
        plan.order, plan.views, plan.places = order, views, places
        for pixels in _arriving(batches):
            if isinstance(pixels, DataError):
                try:
                    raise pixels
                finally:
                    del pixels  # or error and frame would refer to each other, and keep the workers
            yield pixels
        self._idle.append((plan, batches))  # not where an epoch was left in the middle: its workers end with it

    def _make(self):
        plan = _Plan()
        batches = torch.utils.data.DataLoader(
            self._source,
            batch_sampler=plan,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            collate_fn=_stack,
            pin_memory=self._pinned,
            worker_init_fn=_leave_interrupts_to_parent,
            generator=torch.Generator(),  # or else it would draw from the global one
        )
        return plan, batches


def _leave_interrupts_to_parent(_):
    """A terminal sends Ctrl-C to all, and a worker that ended by it would be told as an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _arriving(batches: torch.utils.data.DataLoader) -> Iterator[Tensor | DataError]:
    gc.freeze()  # for workers that are forked: in them the collector would end their parent's DALI pipelines, and wait
    try:
        arriving = iter(batches)
    finally:
        gc.unfreeze()
    try:
        yield from arriving
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise worker_ended(str(error).partition("\n")[0]) from None


class _Plan:
    """What DataLoader sends to its workers: for each batch, a list of (image number, its views)."""

    order: Tensor
    views: Views
    places: list[slice]

    def __iter__(self):
        for place in self.places:
            chosen = {name: field.tolist() for name, field in self.views.at(place).of_files().items()}
            numbers = self.order[place].tolist()
            yield [(number, {name: chosen[name][i] for name in chosen}) for i, number in enumerate(numbers)]

    def __len__(self) -> int:
        return len(self.places)


class _Source(torch.utils.data.Dataset):
    """(image number, views) -> (3, side, side) uint8, or the DataError that says why not: raised in a worker, it would
    reach the user wrapped in that worker's traceback."""

    def __init__(self, images: Images, side: int, resized: bool):
        self.images, self.side, self.resized = images, side, resized

    def __getitem__(self, item: tuple[int, dict]) -> Tensor | DataError:
        from torchvision.transforms.v2 import functional as transforms  # not for those who need no files

        number, views = item
        if self.images.pixels is not None:
            image = self.images.pixels[number]
        else:
            path = self.images.paths[number]
            try:
                image = read_image(path)
            except DataError as error:
                return error
            if not self.resized and image.size != (self.side, self.side):
                return wrong_size(path, image.size, self.side)
            image = transforms.pil_to_tensor(image)
        if "box" in views:
            image = transforms.crop(image, *views["box"])
        if "size" in views:
            image = transforms.resize(image, views["size"], antialias=True)
        if "corner" in views:
            image = transforms.crop(image, *views["corner"], self.side, self.side)  # zeros beyond the image
        return transforms.horizontal_flip(image) if views.get("flip") else image


def _stack(samples: list) -> Tensor | DataError:
    wrong = next((sample for sample in samples if isinstance(sample, DataError)), None)
    if wrong is not None or torch.utils.data.get_worker_info() is None:
        return wrong or torch.stack(samples)
    try:
        # Here, and not by the thread that sends it, whose errors are lost while everybody waits for the batch.
        return torch.stack(samples).share_memory_()
    except RuntimeError as error:
        told = str(error).partition("\n")[0]
        return DataError(
            f"no shared memory for a batch ({told}): give a container more (docker run --shm-size), or take a smaller "
            "--batch-size, fewer --workers or --loader dali"
        )
