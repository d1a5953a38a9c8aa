"""Parameters and multiply-adds of a network, to compare with published figures."""

from copy import deepcopy

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fpdarts.genotype import Genotype
from fpdarts.network import DerivedNetwork
from fpdarts.space import validate_stem

_IMAGE_SIZE = {"cifar": 32, "imagenet": 224}
_NUM_CLASSES = {"cifar": 10, "imagenet": 1000}


class _Macs(TorchDispatchMode):
    """Multiply-adds of convolutions and linear layers that run within it."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if name == "convolution":
            self.total += out.numel() * args[1][0].numel()  # what one output element sums over, grouped or not
        elif name in ("mm", "addmm"):
            self.total += out.numel() * args[-2].shape[1]
        return out


def count(network: DerivedNetwork, image_size: int) -> dict[str, int]:
    """{"parameters": .., "macs": ..} of a network for one (3, image_size, image_size) image.

    macs: multiply-adds of convolutions and linear layers in evaluation. A submodule named ``auxiliary_head`` counts in
    neither, as in published figures. Nothing is computed: the image passes through a copy without memory, whatever the
    network's device and kernels.
    """
    parameters = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("auxiliary_head."))
    copy = deepcopy(network).to("meta").eval()  # where the auxiliary head does not run
    copy.kernels = "auto"  # the reference there
    weight = next(copy.parameters())
    with torch.no_grad(), _Macs() as macs:
        copy(torch.empty(1, 3, image_size, image_size, device="meta", dtype=weight.dtype))
    return {"parameters": parameters, "macs": macs.total}


def count_genotype(
    genotype: Genotype, stem: str, init_channels: int, cells: int, num_classes: int | None = None
) -> dict[str, int]:
    """count of a genotype's network, for 32x32 images and 10 classes (stem "cifar") or 224x224 and 1000 ("imagenet").

    Raises ValueError as DerivedNetwork does.
    """
    validate_stem(stem)
    if num_classes is None:
        num_classes = _NUM_CLASSES[stem]
    for name, value in {"init_channels": init_channels, "cells": cells, "num_classes": num_classes}.items():
        if value >= 2**31:
            raise ValueError(f"{name} must be below 2**31, got {value}")
    with torch.device("meta"):
        network = DerivedNetwork(genotype, num_classes, init_channels, cells, stem, auxiliary=False)
    return count(network, _IMAGE_SIZE[stem])
