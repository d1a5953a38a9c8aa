"""What is done to a training image, protocol by protocol, and the batched form of it for resident images."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image, in this order. Resident images know only padding, flip and cutout, files only
    the others and flip.

    padding: zeros added to each side before a random crop to the old size, in pixel values, so before normalization.
    random_resized_crop: a random 8..100 % of the area, of aspect 3/4..4/3, resized to the image size.
    flip: mirrored left to right, every other time.
    jitter: strengths of brightness, contrast, saturation and hue, in torchvision's sense; None for none.
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
class Draws:
    """For n images, each field (n,): crop offsets 0..2*padding, flips, the cutout's upper left corner."""

    top: Tensor
    left: Tensor
    flip: Tensor
    cutout_top: Tensor
    cutout_left: Tensor

    @classmethod
    def of(cls, augmentation: Augmentation, count: int, side: int, generator: torch.Generator) -> "Draws":
        """All choices are drawn, wanted or not: switching one augmentation off leaves the others as they were."""
        top, left = torch.randint(2 * augmentation.padding + 1, (2, count), generator=generator)
        flip = torch.rand(count, generator=generator) < 0.5
        cutout = torch.randint(side, (2, count), generator=generator) - augmentation.cutout // 2
        return cls(top, left, flip, *cutout)

    def to(self, device) -> "Draws":
        return Draws(*(field.to(device) for field in vars(self).values()))

    def at(self, positions: slice) -> "Draws":
        return Draws(*(field[positions] for field in vars(self).values()))


def crop_windows(pixels: Tensor, padding: int) -> Tensor:
    """Every crop of the zero-padded images, as a view: pixels (n, 3, H, H) -> (n, 3, 2*padding+1, 2*padding+1, H, H).

    Indexed with images and offsets it gathers a batch of crops in one pass. Padding is done once here, not each step.
    """
    side = pixels.shape[-1]
    padded = torch.nn.functional.pad(pixels, (padding,) * 4).contiguous(memory_format=torch.channels_last)
    return padded.unfold(2, side, 1).unfold(3, side, 1)


def crop_and_flip(windows: Tensor, indices: Tensor, draws: Draws, augmentation: Augmentation) -> Tensor:
    """Images `indices` (B,) of crop_windows(), cropped and mirrored as drawn: (B, 3, H, H) uint8."""
    crops = windows[indices, :, draws.top, draws.left]
    return torch.where(draws.flip[:, None, None, None], crops.flip(3), crops) if augmentation.flip else crops


def cut_out_(images: Tensor, draws: Draws, side: int) -> Tensor:
    """Zero a square of `side` pixels in every one of the images (B, 3, H, H), in place."""
    places = torch.arange(images.shape[-1], device=images.device)
    rows, columns = places - draws.cutout_top[:, None], places - draws.cutout_left[:, None]  # (B, H)
    rows, columns = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]  # (B, 1, H, H)
    return images.mul_(~inside)  # on the CPU twice as fast as masked_fill_
