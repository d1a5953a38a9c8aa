"""What is done to an image, protocol by protocol: the policies, the choices drawn for an epoch, and the arithmetic that
is done in batches on the device.

Every loader takes its choices from here, so that with the same seed all of them cut out and mirror the same things.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image, in this order. Source of random_resized_crop and jitter: torchvision, whose
    distributions these are.

    padding: zeros added to each side before a random crop to the old size, in pixel values, so before normalization.
    random_resized_crop: a random 8..100 % of the area, of aspect 3/4..4/3, resized to the image size.
    flip: mirrored left to right, every other time.
    jitter: strengths of brightness, contrast, saturation and hue; None for none.
    cutout: side of a square of zeros after normalization; its centre is uniform, what sticks out is cut off.
    """

    padding: int = 0
    flip: bool = False
    cutout: int = 0
    random_resized_crop: bool = False
    jitter: tuple[float, float, float, float] | None = None


_POLICIES = {
    # A mirrored digit is another sign, and a shift by 4 of 8 pixels leaves half of it.
    ("digits", "search"): Augmentation(padding=1),
    ("digits", "retrain"): Augmentation(padding=1),
    ("cifar", "search"): Augmentation(padding=4, flip=True),
    ("cifar", "retrain"): Augmentation(padding=4, flip=True, cutout=16),
    ("imagenet", "search"): Augmentation(random_resized_crop=True, flip=True),
    ("imagenet", "retrain"): Augmentation(random_resized_crop=True, flip=True, jitter=(0.4, 0.4, 0.4, 0.2)),
}


def augmentation(protocol: str, stage: str) -> Augmentation:
    """The protocol's augmentation for stage "search" or "retrain". Raises ValueError for an unknown pair."""
    if (protocol, stage) not in _POLICIES:
        known = ", ".join(f"{protocol}/{stage}" for protocol, stage in _POLICIES)
        raise ValueError(f"no augmentation for {protocol}/{stage}; there are: {known}")
    return _POLICIES[protocol, stage]


@dataclass(frozen=True, eq=False)
class Views:
    """What becomes of each of n images, in this order; None: nothing is done. All int64 on the CPU unless moved.

    box: (n, 4) top, left, height and width of what is cut out of the image. size: (n, 2) height and width it is then
    resized to, bilinear with antialiasing. corner: (n, 2) top and left of the square that is kept of that, of the side
    that the loader is for; zeros where it reaches beyond. flip: (n,) bool, mirrored left to right.
    After that, in batches on the device: jitter, (n, 4) float32 factors of brightness, contrast and saturation and a
    shift of hue in turns, in order (n, 4), of which a batch takes its first image's; then normalization; and cutout,
    (n, 2), the upper left corner of the square of zeros.
    """

    box: Tensor | None = None
    size: Tensor | None = None
    corner: Tensor | None = None
    flip: Tensor | None = None
    jitter: Tensor | None = None
    order: Tensor | None = None
    cutout: Tensor | None = None

    @classmethod
    def drawn(
        cls, augmentation: Augmentation, sizes: Tensor | None, count: int, side: int, generator: torch.Generator
    ) -> "Views":
        """Of an epoch of training. sizes: (count, 2) height and width, needed by random_resized_crop only.

        Corners, flips and cutouts are drawn, wanted or not: switching one off leaves the others as they were.
        """
        corner = torch.randint(2 * augmentation.padding + 1, (2, count), generator=generator).T - augmentation.padding
        flip = torch.rand(count, generator=generator) < 0.5
        cutout = torch.randint(side, (2, count), generator=generator).T - augmentation.cutout // 2
        views = cls(
            corner=corner if augmentation.padding else None,
            flip=flip if augmentation.flip else None,
            cutout=cutout if augmentation.cutout else None,
        )
        if augmentation.random_resized_crop:
            box = _random_boxes(sizes, generator)
            views = replace(views, box=box, size=torch.full((count, 2), side))
        if augmentation.jitter:
            *strengths, hue = augmentation.jitter
            low = torch.tensor([max(0.0, 1 - strength) for strength in strengths] + [-hue])
            high = torch.tensor([1 + strength for strength in strengths] + [hue])
            jitter = low + (high - low) * torch.rand(count, 4, generator=generator)
            views = replace(views, jitter=jitter, order=torch.rand(count, 4, generator=generator).argsort(1))
        return views

    @classmethod
    def central(cls, sizes: Tensor, side: int) -> "Views":
        """For evaluation: the shorter side resized to side * 256 / 224, then the middle. sizes: (n, 2)."""
        short = round(side * 256 / 224)
        # Rounded down and, in the middle, to even, as torchvision's Resize and CenterCrop do.
        size = short * sizes // sizes.min(1, keepdim=True).values
        return cls(size=size, corner=((size - side) / 2).round().long())

    def of_files(self) -> dict[str, Tensor]:
        """What a reader of files does, by name, without what is not done."""
        fields = {"box": self.box, "size": self.size, "corner": self.corner, "flip": self.flip}
        return {name: field for name, field in fields.items() if field is not None}

    def of_batches(self) -> "Views":
        """What is done in batches on the device."""
        return Views(jitter=self.jitter, cutout=self.cutout)

    def at(self, positions: slice | Tensor) -> "Views":
        return self._each(lambda field: field[positions])

    def to(self, device) -> "Views":
        return self._each(lambda field: field.to(device, non_blocking=True))

    def _each(self, change) -> "Views":
        return Views(*(None if (value := getattr(self, f.name)) is None else change(value) for f in fields(self)))


def _random_boxes(sizes: Tensor, generator: torch.Generator) -> Tensor:
    """(n, 4) boxes for images of sizes (n, 2): of ten tries the first that fits, else the largest of allowed aspect in
    the middle."""
    tries, (height, width) = 10, sizes.double().T
    area = (0.08 + 0.92 * torch.rand(len(sizes), tries, generator=generator)) * (height * width)[:, None]
    widest = torch.tensor(4 / 3).log()
    aspect = (widest * (2 * torch.rand(len(sizes), tries, generator=generator) - 1)).exp()
    place = torch.rand(len(sizes), 2, generator=generator)

    shapes = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], 2).round()  # (n, tries, 2)
    fits = ((shapes >= 1) & (shapes <= sizes[:, None])).all(2)
    first = fits.byte().argmax(1)
    shape = shapes[torch.arange(len(sizes)), first].long()
    fallback = torch.stack([height.minimum((width * 4 / 3).round()), width.minimum((height * 4 / 3).round())], 1).long()
    none = ~fits.any(1)[:, None]
    shape = torch.where(none, fallback, shape)
    free = sizes - shape
    corner = torch.where(none, free // 2, (place * (free + 1)).long().minimum(free))
    return torch.cat([corner, shape], 1)


def crop_windows(pixels: Tensor, padding: int) -> Tensor:
    """Every crop of the zero-padded images, as a view: pixels (n, 3, H, H) -> (n, 3, 2*padding+1, 2*padding+1, H, H).

    Indexed with images and offsets it gathers a batch of crops in one pass. Padding is done once here, not each step.
    """
    side = pixels.shape[-1]
    padded = F.pad(pixels, (padding,) * 4).contiguous(memory_format=torch.channels_last)
    return padded.unfold(2, side, 1).unfold(3, side, 1)


def crop_and_flip(windows: Tensor, indices: Tensor, views: Views, padding: int) -> Tensor:
    """Images `indices` (B,) of crop_windows(), cropped and mirrored as drawn: (B, 3, H, H) uint8."""
    if views.corner is None:
        crops = windows[indices, :, 0, 0]
    else:
        crops = windows[indices, :, views.corner[:, 0] + padding, views.corner[:, 1] + padding]
    return crops if views.flip is None else torch.where(views.flip[:, None, None, None], crops.flip(3), crops)


def jitter_(images: Tensor, jitter: Tensor, order: list[int]) -> Tensor:
    """Colour jitter of images (B, 3, H, W) float32 in 0..255, in place: torchvision's ColorJitter on float images.

    jitter: (B, 4), as in Views. order: of the four steps, 0 brightness, 1 contrast, 2 saturation, 3 hue.

    It differs from torchvision's in two ways: an image is not rounded to bytes between the four steps (one level at
    most each), and the images of a batch have the order of the steps in common.
    """
    for step in order:
        factor = jitter[:, step, None, None, None]
        if step == 3:
            images.copy_(_hue_shifted(images, factor[:, 0]))
            continue
        if step == 0:
            images.mul_(factor)
        else:
            red, green, blue = images.unbind(1)
            grey = (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]
            images.lerp_(grey.mean((1, 2, 3), keepdim=True) if step == 1 else grey, 1 - factor)
        images.clamp_(0, 255)
    return images


def _hue_shifted(images: Tensor, shift: Tensor) -> Tensor:
    """images (B, 3, H, W) with their hue turned by shift (B, 1, 1), in turns; value and saturation stay."""
    red, green, blue = images.unbind(1)
    value, least = images.amax(1), images.amin(1)
    chroma = value - least
    turn = torch.where(
        value == red,
        (green - blue) / chroma,
        torch.where(value == green, 2 + (blue - red) / chroma, 4 + (red - green) / chroma),
    )
    turn = torch.where(chroma == 0, 0.0, turn) + 6 * shift  # in sixths
    # The fall of each channel below the value, by the distance of the hue from that channel's own.
    places = (5 - 2 * torch.arange(3, device=images.device))[None, :, None, None]  # a list would wait for a GPU
    distance = (places + turn[:, None]) % 6
    return value[:, None] - chroma[:, None] * distance.minimum(4 - distance).clamp_(0, 1)


def cut_out_(images: Tensor, views: Views, side: int) -> Tensor:
    """Zero a square of `side` pixels in every one of the images (B, 3, H, H), in place."""
    places = torch.arange(images.shape[-1], device=images.device)
    rows, columns = places - views.cutout[:, :1], places - views.cutout[:, 1:]  # (B, H)
    rows, columns = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]  # (B, 1, H, H)
    return images.mul_(~inside)  # on the CPU twice as fast as masked_fill_
