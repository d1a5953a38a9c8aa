"""Files read, decoded and cut out by NVIDIA DALI: on the GPU where there is one, else on the CPU, without any driver.

Which images, which boxes, flips and so on is told to DALI for each batch: the order, the random choices, sharding and
the end of an epoch are the Loader's, so that there is no state of a pipeline to be saved or to go wrong.
"""

import os
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from fpdarts.data.augment import Views
from fpdarts.data.folder import read_image, refuse_for_dali, wrong_size
from fpdarts.data.images import Images
from fpdarts.errors import DataError

PREFETCH = 3  # batches that are under way; more did not help


class DaliReader:
    """images: files or pixels. side: of what is read. resized: whether boxes or sizes will be asked for; otherwise the
    images must have that side. batch_size: the largest. workers: threads. Raises DataError naming a file of a kind that
    DALI decodes otherwise than Pillow, or not at all.

    Of a JPEG only the box is decoded, and what lies above it: one that is cut short stops the first epoch whose box
    reaches so far."""

    def __init__(self, images: Images, side: int, resized: bool, batch_size: int, device: torch.device, workers: int):
        if images.pixels is None and not resized:  # else the Loader has looked at them all
            refuse_for_dali(images.paths)
        self._images, self._side, self._resized, self._batch_size = images, side, resized, batch_size
        self._device, self._workers = device, workers
        self._all_in_dali = device.type == "cuda"  # else PyTorch does what follows the box
        self._idle: dict[tuple[str, ...], list] = {}  # pipelines by what they are fed; one for each epoch under way

    def __call__(self, order: Tensor, views: Views, places: list[slice]) -> Iterator[Tensor]:
        fed = tuple(views.of_files())
        if "size" in fed and not self._all_in_dali:
            fed = tuple(name for name in fed if name not in ("size", "corner"))
        idle = self._idle.setdefault(fed, [])
        source, pipeline = idle.pop() if idle else self._make(fed, self._batch_size)
        source.batches = (self._inputs(order[place], views.at(place), fed) for place in places)
        stream = None if self._device.type == "cpu" else torch.cuda.current_stream(self._device)
        space = torch.empty(self._batch_size, self._side, self._side, 3, dtype=torch.uint8)  # of resized images
        for place in places:
            try:
                outputs, shapes = pipeline.run(stream)
            except RuntimeError as error:
                ahead = order[place.start : place.start + PREFETCH * self._batch_size]
                raise self._named(error, ahead.tolist()) from error
            yield self._pixels(outputs, shapes, order[place], views.at(place), space)
        _end(pipeline)
        idle.append((source, pipeline))  # not where an epoch was left in the middle: its pipeline ends with it

    def _inputs(self, indices: Tensor, views: Views, fed: tuple[str, ...]) -> list:
        if self._images.pixels is None:
            paths = [self._images.paths[number] for number in indices.tolist()]
            images = [np.frombuffer(os.fsencode(path), np.uint8) for path in paths]
        else:
            images = self._images.pixels[indices].permute(0, 2, 3, 1).contiguous().numpy()
        # As arrays of numpy: for tensors DALI asks torch for a CUDA stream, which fails without a driver.
        kinds = (np.float32 if name == "size" else np.int32 for name in fed)  # as DALI's arguments are
        return [images, *(np.ascontiguousarray(getattr(views, name), kind) for name, kind in zip(fed, kinds))]

    def _make(self, fed: tuple[str, ...], batch_size: int):
        gpu = self._device.type == "cuda"
        files, side = self._images.pixels is None, self._side
        source = _Source()

        @pipeline_def(
            batch_size=batch_size,
            num_threads=max(1, self._workers),
            device_id=torch.empty(0, device=self._device).get_device() if gpu else None,
            prefetch_queue_depth=PREFETCH,
        )
        def pipeline():
            images, *rest = fn.external_source(
                source,
                num_outputs=1 + len(fed),
                dtype=[types.UINT8] + [types.FLOAT if name == "size" else types.INT32 for name in fed],
                ndim=[1 if files else 3] + [0 if name == "flip" else 1 for name in fed],
                layout=["" if files else "HWC"] + [""] * len(fed),
            )
            views = dict(zip(fed, rest))
            if files:
                # As Pillow decodes: orientation tags are ignored, chroma is interpolated.
                how = dict(output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True)
                how["device"] = "mixed" if gpu else "cpu"
                images = fn.io.file.read(images)
                if "box" in views:
                    start, shape = views["box"][:2], views["box"][2:]
                    images = fn.decoders.image_slice(images, start=start, shape=shape, axes=[0, 1], **how)
                else:
                    images = fn.decoders.image(images, **how)
            elif gpu:
                images = images.gpu()
            shapes = images.shape()  # before anything hides it
            if "size" in views:
                images = fn.resize(images, size=views["size"], interp_type=types.INTERP_LINEAR, antialias=True)
            if "corner" in views:
                images = fn.slice(
                    images, start=views["corner"], shape=[side, side], axes=[0, 1], out_of_bounds_policy="pad"
                )
            if "flip" in views:
                images = fn.flip(images, horizontal=views["flip"])
            return images, shapes

        made = pipeline()
        made.build()
        return source, made

    def _pixels(self, outputs, shapes, indices: Tensor, views: Views, space: Tensor) -> Tensor:
        """(B, 3, side, side) of a pipeline's outputs, in `space` where they are still to be resized."""
        side = self._side
        if not self._resized and self._images.pixels is None:
            sizes = np.asarray(shapes.as_tensor())[:, :2]
            if len(wrong := np.flatnonzero((sizes != side).any(1))):
                height, width = sizes[wrong[0]].tolist()
                raise wrong_size(self._images.paths[indices[wrong[0]]], (width, height), side)
        if self._all_in_dali or views.size is None:
            return torch.from_dlpack(outputs.as_tensor()).permute(0, 3, 1, 2)
        # PyTorch resizes bytes on the CPU in a third of DALI's time or less, and bit for bit as torchvision does; only
        # on a processor without AVX2 does torchvision resize in float, which rounds some pixels to the next level.
        pixels = space[: len(outputs)].permute(0, 3, 1, 2)
        for place, size in enumerate(views.size.tolist()):
            image = torch.from_dlpack(outputs[place]).permute(2, 0, 1)[None]
            if views.corner is None:
                into = pixels[place : place + 1]
                torch.ops.aten._upsample_bilinear2d_aa.out(image, size, False, None, None, out=into)
            else:
                image = F.interpolate(image, size, mode="bilinear", antialias=True)
                top, left = views.corner[place].tolist()
                pixels[place] = image[0, :, top : top + side, left : left + side]
        return pixels

    def _named(self, error: RuntimeError, numbers: list[int]) -> DataError:
        """The file among those under way that cannot be decoded, by Pillow or, one by one, by DALI."""
        if self._images.pixels is None:
            paths = [self._images.paths[number] for number in numbers]
            for path in paths:
                try:
                    read_image(path)
                except DataError as found:
                    return found
            for path in paths:
                source, pipeline = self._make((), 1)
                source.batches = iter([[[np.frombuffer(os.fsencode(path), np.uint8)]]])
                try:
                    pipeline.run()
                except RuntimeError as found:
                    return DataError(
                        f"{path}: DALI cannot decode it, though Pillow can ({_reason(found)}); convert or skip it, or "
                        "choose --loader torchvision"
                    )
        return DataError(f"DALI failed ({_reason(error)}); try --loader torchvision")


def _reason(error: RuntimeError) -> str:
    """What DALI says of it, without the traceback through its pipeline that it says first."""
    return " ".join(str(error).rpartition("encountered:")[2].split())[:500]


class _Source:
    """What a pipeline asks for its next batch."""

    batches: Iterator = iter(())

    def __call__(self):
        return next(self.batches)


def _end(pipeline):
    """Let it find out that its source has no more, for only then it can begin again."""
    try:
        pipeline.run()
    except StopIteration:
        pipeline.reset()
