"""The shapes of what is timed, and what is then ready to run; benchmarks.cases builds it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from benchmarks.work import Work


@dataclass(frozen=True)
class Setting:
    """Shapes of a case; what a case does not need it ignores."""

    batch_size: int = 64
    init_channels: int = 16
    """C of the whole model, or of the cell that a part belongs to."""
    cells: int = 8
    image_size: int = 32
    """Side of the images, or of the states that a part reads."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    gates: Literal["both", "step"] = "both"
    """Both paths of all edges open, or drawn anew each step: 4/3 of 2 on average, the same draws for all sides."""
    operation: str = "sep_conv_5x5"
    """Of stage and pooling."""
    stride: int = 1
    """Of stage and pooling."""
    reduction: bool = False
    """Of a cell."""
    direction: Literal["forward", "backward", "both"] = "both"
    """Of cell and parts."""
    device: str = "cpu"


@dataclass(frozen=True)
class Case:
    """A side, ready to run.

    step: of a number i, makes the i-th call, which is timed; every side does the same in its i-th.
    results: name -> tensor, of the last call.
    work: of a call, by formula; where gates are drawn, the mean of the draws.
    """

    step: Callable[[int], None]
    results: Callable[[], dict[str, Tensor]]
    work: Work
