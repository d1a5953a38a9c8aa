"""Launches, bytes and FLOPs of what PyTorch dispatches: exact counts without a GPU, on the meta device if need be."""

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# make no kernel: they return another view of the same memory, or memory with nothing in it
_FREE = set(
    "view _unsafe_view transpose slice select split expand t detach alias as_strided unsqueeze squeeze permute "
    "split_with_sizes _reshape_alias unbind narrow empty empty_like new_empty empty_strided new_empty_strided "
    "lift_fresh resolve_conj resolve_neg".split()
)


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


class Count(TorchDispatchMode):
    """Counts what runs within it on a device.

    device: of which type; what touches only tensors of others is bookkeeping (gates live on the CPU).

    A call of an ATen operator is a launch, and moves each of its tensors once. Except that batch normalization reads
    its input twice, forward (statistics, then application) and backward, and that a convolution's backward is a launch
    for each of its gradients, with that gradient's operands. Views are free.
    """

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device = torch.device(device).type
        self.launches, self.bytes, self.flops = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if name in _FREE:
            return out
        read, written = self._tensors((args, kwargs)), self._tensors(out)
        if not read and not written:
            return out
        launches, moved = 1, _bytes(read) + _bytes(written)
        if "batch_norm" in name:
            moved += _bytes(args[:2] if "backward" in name else args[:1])
        elif name == "convolution":
            self.flops[name] += 2 * out.numel() * args[1][0].numel()
        elif name == "convolution_backward":
            (gradient, x, weight), (d_x, d_weight) = args[:3], args[-1][:2]
            launches = d_x + d_weight
            moved = launches * _bytes([gradient, x, weight])
            self.flops[name] += launches * 2 * gradient.numel() * weight[0].numel()
        elif name in ("mm", "addmm"):
            self.flops[name] += 2 * out.numel() * args[-2].shape[1]
        self.launches[name] += launches
        self.bytes[name] += moved
        return out

    def _tensors(self, tree) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type == self.device]

    def total(self) -> dict[str, int]:
        return {what: sum(getattr(self, what).values()) for what in ("launches", "bytes", "flops")}
