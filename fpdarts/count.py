"""Parameters and multiply-adds of a network, to compare with published figures."""

import torch
from torch import nn

from fpdarts.genotype import Genotype
from fpdarts.network import DerivedNetwork
from fpdarts.space import STEMS

_IMAGE_SIZE = {"cifar": 32, "imagenet": 224}
_NUM_CLASSES = {"cifar": 10, "imagenet": 1000}


def count(network: nn.Module, image_size: int) -> dict[str, int]:
    """{"parameters": .., "macs": ..} of a network for one (3, image_size, image_size) image.

    macs: multiply-adds of convolutions and linear layers in evaluation. A submodule named ``auxiliary_head`` counts in
    neither, as in published figures. One image passes through the network on the network's device: build it under
    ``torch.device("meta")`` and that takes no memory or time. The network is left as it was.
    """
    parameters = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("auxiliary_head."))
    macs = 0

    def add_macs(module, inputs, out):
        nonlocal macs
        # All dimensions of a weight but the first are what one output element sums over, grouped or not.
        macs += out.numel() * module.weight[0].numel()

    handles = [m.register_forward_hook(add_macs) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    modes = [(module, module.training) for module in network.modules()]
    weight = next(network.parameters())
    try:
        network.eval()  # the auxiliary head does not run, and running statistics stay
        with torch.no_grad():
            network(torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype))
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    return {"parameters": parameters, "macs": macs}


def count_genotype(
    genotype: Genotype, stem: str, init_channels: int, cells: int, num_classes: int | None = None
) -> dict[str, int]:
    """count of a genotype's network, for 32x32 images and 10 classes (stem "cifar") or 224x224 and 1000 ("imagenet").

    Raises ValueError as DerivedNetwork does.
    """
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}; the stems are: {', '.join(STEMS)}")
    if num_classes is None:
        num_classes = _NUM_CLASSES[stem]
    with torch.device("meta"):
        network = DerivedNetwork(genotype, num_classes, init_channels, cells, stem, auxiliary=False)
    return count(network, _IMAGE_SIZE[stem])
