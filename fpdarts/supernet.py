"""The supernet: a stem, cells of mixed operations, and a classifier.

The weights of a cell are packed by the state that their edges leave (see ``fpdarts.kernels.spec``), and computed by
whichever back end ``kernels`` names; this file knows no arithmetic of its own beyond stem and classifier.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fpdarts import kernels as kernel_backends
from fpdarts.genotype import Genotype
from fpdarts.kernels.spec import CellSpec
from fpdarts.network import CifarStem, mean_over_pixels
from fpdarts.space import DEFAULT_SUBSETS, reduction_cells, validate_stem, validate_subsets

WEIGHTINGS = ("sigmoid", "softmax")
ARCHITECTURE = ("alpha_normal", "alpha_reduce", "beta_normal", "beta_reduce")  # the architecture's parameters
_MOMENTUM = 0.1  # of running statistics, as torch.nn.BatchNorm2d


class Cell(nn.Module):
    """Packed weights and running statistics of one cell."""

    def __init__(self, spec: CellSpec):
        super().__init__()
        self.spec = spec
        for name, parameter in spec.parameters.items():
            weight = torch.empty(parameter.shape).uniform_(-parameter.bound, parameter.bound)
            self.register_parameter(name, nn.Parameter(weight))
        table = spec.statistics_rows, spec.slice_channels
        self.register_buffer("running_mean", torch.zeros(table))
        self.register_buffer("running_variance", torch.ones(table))

    def forward(self, inputs, operation_weights, edge_weights, gates, kernels):
        """Returns (output, Statistics of the batch or None in evaluation)."""
        weights = dict(self.named_parameters(recurse=False))
        statistics = None if self.training else (self.running_mean, self.running_variance)
        return kernel_backends.cell(
            self.spec, inputs, weights, operation_weights, edge_weights, gates, statistics, kernels=kernels
        )


def _stem(kind: str, channels: int) -> nn.ModuleList:
    """Two modules: the first makes input state 0, the second makes input state 1 from it."""

    def convolution(c_in, c_out):
        return [nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False), nn.BatchNorm2d(c_out)]

    if kind == "cifar":
        modules = [CifarStem(channels), nn.Identity()]
    else:
        first = nn.Sequential(*convolution(3, channels // 2), nn.ReLU(), *convolution(channels // 2, channels))
        modules = [first, nn.Sequential(nn.ReLU(), *convolution(channels, channels))]
    # the format of all maps; packed weights have four dimensions too, but are to stay as they are
    return nn.ModuleList(modules).to(memory_format=torch.channels_last)


class SuperNet(nn.Module):
    """FP-DARTS's supernet (Wang et al., Pattern Recognition 136, 2023, 109193).

    num_classes: of the classifier.
    init_channels: C of the first cell; doubled in each of the two reduction cells. Must be a multiple of ``partial``.
    cells, nodes: depth, and intermediate nodes of a cell.
    partial: K; path p reads channel slice p of K, all other channels bypass it.
    stem: ``cifar`` (one 3x3 convolution) or ``imagenet`` (three of stride 2).
    subsets: candidate operations of each path, disjoint; one path of all eight makes it PC-DARTS.
    weighting: what makes weights of alpha and beta: ``sigmoid`` (FP-DARTS), or ``softmax`` (over a path's operations,
        and over the edges into a node).
    kernels: the back end, by name; whether it can run is known at the first forward, from the images' device.

    Parameters ``alpha_normal``, ``alpha_reduce``: (edges, operations), operations of path 0 first; ``beta_normal``,
    ``beta_reduce``: (edges,). Edges in edge order.
    Raises ValueError for an unknown name, sizes below 1, subsets that overlap, and channels that K does not cut.
    """

    def __init__(
        self,
        num_classes: int,
        init_channels: int = 16,
        cells: int = 8,
        nodes: int = 4,
        partial: int = 2,
        stem: str = "cifar",
        subsets: Sequence[Sequence[str]] = DEFAULT_SUBSETS,
        weighting: str = "sigmoid",
        kernels: str = "auto",
    ):
        super().__init__()
        validate_stem(stem)
        if weighting not in WEIGHTINGS:
            raise ValueError(f"unknown weighting {weighting!r}; choose one of: {', '.join(WEIGHTINGS)}")
        kernel_backends.validate(kernels)
        sizes = {"num_classes": num_classes, "init_channels": init_channels, "cells": cells, "nodes": nodes}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.kernels, self.weighting, self.nodes = kernels, weighting, nodes
        self.subsets = validate_subsets(subsets)

        self.stem = _stem(stem, 3 * init_channels)
        self.cells = nn.ModuleList()
        wide, channels = (3 * init_channels, 3 * init_channels), init_channels
        halved = stem == "imagenet"  # whether input 0 of the next cell is twice as large as its input 1
        for i in range(cells):
            reduction = i in reduction_cells(cells)
            channels *= 2 if reduction else 1
            self.cells.append(Cell(CellSpec(channels, wide, partial, self.subsets, nodes, reduction, halved)))
            wide, halved = (wide[1], nodes * channels), reduction
        self.classifier = nn.Linear(wide[1], num_classes)

        spec = self.cells[0].spec
        for kind in ("normal", "reduce"):
            self.register_parameter(
                f"alpha_{kind}", nn.Parameter(1e-3 * torch.randn(len(spec.edges), len(spec.operations)))
            )
            self.register_parameter(f"beta_{kind}", nn.Parameter(1e-3 * torch.randn(len(spec.edges))))

    @property
    def gate_shape(self) -> tuple[int, int, int]:
        """(cells, edges, paths)."""
        spec = self.cells[0].spec
        return len(self.cells), len(spec.edges), spec.paths

    def architecture_parameters(self) -> list[nn.Parameter]:
        """alpha and beta, of normal and of reduction cells."""
        return [getattr(self, name) for name in ARCHITECTURE]

    def weight_parameters(self) -> list[nn.Parameter]:
        """All parameters but alpha and beta."""
        return [parameter for name, parameter in self.named_parameters() if name not in ARCHITECTURE]

    def mixing_weights(self, kind: str) -> tuple[Tensor, Tensor]:
        """Activated alpha (edges, operations) and beta (edges,) of ``normal`` or ``reduce`` cells."""
        alpha, beta = getattr(self, f"alpha_{kind}"), getattr(self, f"beta_{kind}")
        if self.weighting == "sigmoid":
            return alpha.sigmoid(), beta.sigmoid()
        by_path = alpha.split([len(subset) for subset in self.subsets], 1)
        by_node = beta.split([node + 2 for node in range(self.nodes)])
        return torch.cat([a.softmax(1) for a in by_path], 1), torch.cat([b.softmax(0) for b in by_node])

    def forward(self, images: Tensor, gates: Tensor) -> Tensor:
        """Logits (N, num_classes).

        images: (N, 3, H, W). gates: (cells, edges, paths), 0 closes a path, any other number multiplies its output.
        Raises ValueError for gates of another shape and for a size that the reductions cannot halve.
        """
        if tuple(gates.shape) != self.gate_shape:
            raise ValueError(f"gates must have shape {self.gate_shape} (cells, edges, paths), not {tuple(gates.shape)}")
        mixing = {kind: self.mixing_weights(kind) for kind in ("normal", "reduce")}
        images = images.contiguous(memory_format=torch.channels_last)
        cifar = isinstance(self.stem[0], CifarStem)
        first = self.stem[0](images, self.kernels) if cifar else self.stem[0](images)
        states = first, self.stem[1](first)
        statistics = []
        for cell, cell_gates in zip(self.cells, gates):
            alpha, beta = mixing["reduce" if cell.spec.reduction else "normal"]
            out, batch = cell(states, alpha, beta, cell_gates, self.kernels)
            states = states[1], out
            statistics.append(batch)
        if any(batch is not None for batch in statistics):
            self._update_statistics(statistics)
        return self.classifier(mean_over_pixels(states[1]))

    @torch.no_grad()
    def _update_statistics(self, batches):
        """Of all cells at once: of tables of one layout, as here, CUDA has a launch for all, not one for each."""
        running, new, updated = [], [], []
        for cell, batch in zip(self.cells, batches):
            if batch is None:  # of a cell in evaluation
                continue
            running += cell.running_mean, cell.running_variance
            new += batch.mean, batch.variance
            updated.append(batch.updated)
        dtype = running[0].dtype
        momenta = torch._foreach_mul([table.to(dtype) for table in updated], _MOMENTUM)  # closed paths rest
        torch._foreach_lerp_(running, [table.to(dtype) for table in new], [m for m in momenta for _ in range(2)])

    @torch.no_grad()
    def genotype(self) -> Genotype:
        """The discrete architecture that alpha and beta now prefer.

        Of each node the two edges with the best score, better one first. The score of an edge is that of its best
        operation, ``none`` excluded: activated alpha times activated beta. Raises ValueError for scores that are no
        numbers.
        """
        edges, names = self.cells[0].spec.edges, self.cells[0].spec.operations
        chosen = {}
        for kind in ("normal", "reduce"):
            alpha, beta = self.mixing_weights(kind)
            scores = alpha * beta[:, None]
            if scores.isnan().any():
                raise ValueError(f"alpha_{kind} or beta_{kind} is not a number: there is no genotype")
            scores[:, [i for i, name in enumerate(names) if name == "none"]] = -1
            best, operation = scores.max(1)
            chosen[kind] = []
            for node in range(self.nodes):
                into = [i for i, edge in enumerate(edges) if edge.node == node]
                into.sort(key=lambda i: -best[i].item())
                chosen[kind] += [(names[operation[i]], edges[i].source) for i in into[:2]]
        concat = tuple(range(2, self.nodes + 2))
        return Genotype(tuple(chosen["normal"]), concat, tuple(chosen["reduce"]), concat)
