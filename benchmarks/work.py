"""The work that an operation cannot do without, by formula: floating-point operations, and the fewest bytes moved.

FLOPs are those of convolutions and linear layers (a multiply-add counts as two); normalization, pooling and sums are
counted by their bytes, which is what limits them. The fewest bytes are those of the fused form: every tensor that has
to exist is written once, and read once by each operation that needs it, for all its edges together (neighbouring rows
of a convolution come from a cache). Nothing normalized exists, no concatenation and no copy of a slice. Should a design
show a share above 1, it does with less: then the formula is to be corrected.
"""

from collections.abc import Sequence
from typing import NamedTuple

from fpdarts.kernels.spec import OPERATIONS, CellSpec, DerivedCellSpec


class Work(NamedTuple):
    """flops; elements: of activations, read and written."""

    flops: float = 0
    elements: float = 0

    def __add__(self, other):
        return Work(self.flops + other.flops, self.elements + other.elements)

    def bytes(self, element_size: int = 4) -> float:
        return self.elements * element_size


class Passes(NamedTuple):
    """Work of a forward and of a backward."""

    forward: Work = Work()
    backward: Work = Work()

    def __add__(self, other):
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def of(self, direction: str) -> Work:
        """direction: ``forward``, ``backward`` or ``both``."""
        return self.forward + self.backward if direction == "both" else getattr(self, direction)


def convolution(macs: float, read: float, written: float, d_input=True, d_weight=True) -> Passes:
    """macs: multiply-adds of the forward. read, written: elements of its input and its output."""
    passes = d_input + d_weight
    backward = Work(2 * macs * passes, (written + read + read * d_input) if passes else 0)
    return Passes(Work(2 * macs, read + written), backward)


def stage(n: int, channels: int, size: tuple[int, int], edges: int, operation: str, stride: int, d_weight=True):
    """First stages of a convolution on all edges that leave a state: they read its slice once. Output not normalized.

    n: images. channels: of the slice. size: (H, W) of the state.
    """
    read = n * channels * size[0] * size[1]
    written = edges * n * channels * -(-size[0] // stride) * -(-size[1] // stride)
    return convolution(written * (OPERATIONS[operation].kernel_size ** 2 + channels), read, written, True, d_weight)


def stem(n: int, size: tuple[int, int], channels: int, stride: int = 1, d_weight=True) -> Passes:
    """A 3x3 convolution of images and its normalization, of which all but the result follows from sums over patches
    (kernels/csrc/stem.h).
    """
    read, written = 3 * n * size[0] * size[1], n * channels * -(-size[0] // stride) * -(-size[1] // stride)
    return convolution(27 * written, read, written, False, d_weight)


def pooling(n: int, channels: int, size: tuple[int, int], stride: int) -> Passes:
    """Backward reads the gradient and, to know the maxima, the input."""
    read = n * channels * size[0] * size[1]
    written = n * channels * -(-size[0] // stride) * -(-size[1] // stride)
    return Passes(Work(0, read + written), Work(0, written + 2 * read))


def node(n: int, channels: int, size: tuple[int, int], terms: int) -> Passes:
    """Sum of `terms` terms in each channel slice of a node of `channels` channels, coefficients differentiated."""
    out = n * channels * size[0] * size[1]
    return Passes(Work(0, (terms + 1) * out), Work(0, (1 + 2 * terms) * out))


def cell(
    spec: CellSpec,
    n: int,
    sizes: Sequence[tuple[int, int]],
    gates: Sequence[Sequence[float]],
    d_weight=True,
    d_inputs=(True, True),
) -> Passes:
    """A cell in the fused form.

    n: images. sizes: (H, W) of its two inputs. gates: [edge][path], closed paths cost nothing.
    d_weight: gradients of weights (a weight step) rather than those of alpha and beta (an architecture step).
    d_inputs: whether each input's gradient is needed.
    """
    total, c = Passes(), spec.slice_channels
    inner = sizes[1][0] * sizes[1][1] * n  # pixels of states 0 and 1
    outer = inner // 4 if spec.reduction else inner  # pixels of the nodes
    for i, (wide, size) in enumerate(zip(spec.input_channels, sizes)):
        read, written = n * wide * size[0] * size[1], inner * spec.channels
        total += convolution(written * wide, read, written, d_inputs[i], d_weight)
        if d_weight or d_inputs[i]:
            total += Passes(Work(), Work(0, 2 * written))  # the normalization's backward: a reduction, then on load

    for source, rows in enumerate(spec.rows_by_source):
        edges = [spec.source_order[row] for row in rows]
        pixels = inner if source < 2 else outer
        d_state = source >= 2 or d_weight or d_inputs[source]
        if spec.stride(source) == 2:  # the pooled bypass
            moved = Work(0, (pixels + outer) * spec.channels)
            total += Passes(moved, moved if d_state else Work())
        for p in range(spec.paths):
            opened = sum(gates[e][p] != 0 for e in edges)
            if opened:
                for name in spec.subsets[p]:
                    total += _operation(
                        spec, name, opened, pixels * c, outer * c, spec.stride(source), d_state, d_weight
                    )
        if d_state:
            total += Passes(Work(), Work(0, pixels * spec.channels))

    for i in range(spec.nodes):
        total += _node(spec, [e for e, edge in enumerate(spec.edges) if edge.node == i], gates, outer * c, d_weight)
    return total


def _operation(spec, name, opened, read, written, stride, d_state, d_weight):
    """On `opened` edges that leave one state; gradients of what follows the last normalization are the node's."""
    operation, c = OPERATIONS[name], spec.slice_channels
    if operation.kind == "pooling":
        return Passes(Work(0, read + written), Work(0, opened * written + 2 * written if d_state else 0))
    if operation.kind == "skip" and stride == 2:
        return convolution(opened * written * c, read, opened * written, d_state, d_weight)
    total, macs = Passes(), opened * written * (operation.kernel_size**2 + c)
    for stage in range(operation.stages):
        # the gradient of what is normalized is formed on load, from the gradient behind it and the raw output
        if stage == 0:
            total += convolution(macs, read, opened * written, d_state, d_weight)
        else:
            total += convolution(macs, opened * written, opened * written, d_state or d_weight, d_weight)
        if d_state or d_weight:
            total += Passes(Work(), Work(0, opened * written))
    return total


def _node(spec, into, gates, slice_elements, d_weight):
    """Sum and shuffle; backward, the reduction from which the normalizations' gradients, d_alpha and d_beta follow."""
    normalized, through = 0, 0
    for e in into:
        opened = [p for p in range(spec.paths) if gates[e][p] != 0]
        for p in opened:
            kinds = [OPERATIONS[name].kind for name in spec.subsets[p]]
            strided = spec.stride(spec.edges[e].source) == 2
            normalized += sum(kind in ("pooling", "convolution") or (kind == "skip" and strided) for kind in kinds)
        if opened:
            through += spec.partial if len(opened) > 1 or spec.partial > 2 else 1
    out = spec.partial
    forward = normalized + through + out
    return Passes(
        Work(0, forward * slice_elements), Work(0, (normalized + out + (0 if d_weight else through)) * slice_elements)
    )


def supernet(model, n: int, size: tuple[int, int], gates, d_weight=True) -> Passes:
    """A forward and a backward of a SuperNet: stem, cells, classifier.

    model: of any device, the meta device too. n: images of `size` (H, W). gates: (cells, edges, paths).
    """
    total, sizes = Passes(), []
    for module in model.stem.modules():
        if hasattr(module, "kernel_size"):
            before, size = size, tuple(-(-side // module.stride[0]) for side in size)
            if module.in_channels == 3:
                total += stem(n, before, module.out_channels, module.stride[0], d_weight)
            else:
                read, written = (
                    n * c * s[0] * s[1] for c, s in ((module.in_channels, before), (module.out_channels, size))
                )
                total += convolution(written * module.weight[0].numel(), read, written, d_weight, d_weight)
                total += Passes(Work(), Work(0, 2 * written if d_weight else 0))  # the normalization's
            sizes.append(size)
    sizes = [sizes[0], sizes[0]] if len(sizes) == 1 else sizes[1:]
    for i, (module, cell_gates) in enumerate(zip(model.cells, gates.tolist())):
        d_inputs = (d_weight or i > 1, d_weight or i > 0)  # without weights nobody asks for the stem's
        total += cell(module.spec, n, sizes, cell_gates, d_weight, d_inputs)
        out = tuple(side // 2 for side in sizes[1]) if module.spec.reduction else sizes[1]
        sizes = [sizes[1], out]
    features = n * model.classifier.in_features
    pixels = sizes[1][0] * sizes[1][1]
    macs = features * model.classifier.out_features
    return total + Passes(Work(2 * macs, features * pixels), Work(2 * macs * (1 + d_weight), features * pixels))


def derived_cell(spec: DerivedCellSpec, n: int, sizes: Sequence[tuple[int, int]]) -> Passes:
    """A cell of a derived network in the fused form, in training.

    n: images. sizes: (H, W) of its two inputs. A convolution reads its input and writes its output raw, and the next
    one normalizes on load; a node reads two maps and writes its state.
    """
    total, c = Passes(), spec.channels
    inner = n * c * sizes[1][0] * sizes[1][1]  # elements of states 0 and 1
    outer = inner // 4 if spec.reduction else inner

    def normalized(macs, read, written):
        return convolution(macs, read, written) + Passes(Work(), Work(0, written))  # backward reads raw outputs again

    for wide, size in zip(spec.input_channels, sizes):
        total += normalized(inner * wide, n * wide * size[0] * size[1], inner)
    for edge, (name, source) in enumerate(spec.edges):
        operation, read = OPERATIONS[name], inner if source < 2 else outer
        if operation.kind == "pooling":
            total += Passes(Work(0, read + outer), Work(0, read + outer))
        elif operation.kind == "skip" and spec.stride(edge) == 2:
            total += normalized(outer * c, read, outer)
        for stage in range(operation.stages):
            total += convolution(outer * operation.kernel_size**2, outer if stage else read, outer)
            total += normalized(outer * c, outer, outer)
    return total + Passes(Work(0, 3 * spec.nodes * outer), Work(0, 3 * spec.nodes * outer))


def network(model, n: int, size: tuple[int, int]) -> Passes:
    """A forward and a backward of a DerivedNetwork in training, stem and auxiliary head included."""
    import torch
    from torch import nn

    from fpdarts.network import Cell, CifarStem

    total, handles = Passes(), []

    def add(module, inputs, out):
        nonlocal total
        read, written = inputs[0].numel(), out.numel()
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            total += convolution(written * module.weight[0].numel(), read, written, inputs[0].shape[1] != 3)
            total += Passes(Work(), Work(0, written))  # its normalization's backward reads the raw output again
        else:
            total += Passes(Work(0, read + written), Work(0, read + written))

    def add_stem(module, inputs, out):
        nonlocal total
        total += stem(n, size, out.shape[1])

    def add_cell(module, inputs, out):
        nonlocal total
        total += derived_cell(module.spec, n, [tuple(x.shape[2:]) for x in inputs[:2]])

    with torch.device("meta"):
        for module in model.modules():
            if isinstance(module, CifarStem):
                handles.append(module.register_forward_hook(add_stem))
            elif isinstance(module, (nn.Conv2d, nn.Linear, nn.AvgPool2d)):
                handles.append(module.register_forward_hook(add))  # a cell's own modules are not called
            elif isinstance(module, Cell):
                handles.append(module.register_forward_hook(add_cell))
        try:
            model(torch.empty(n, 3, *size))
        finally:
            for handle in handles:
                handle.remove()
    return total
