"""Where everything of a cell lies: states and raw outputs in its workspace, weights, coefficients, sums."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from ..spec import OPERATIONS, CellSpec
from .launch import padded, require_addressable


@dataclass(frozen=True)
class Convolution:
    """A stage of an operation, or a factorized reduction: a dense convolution of a path's slice."""

    name: str  # key of spec.statistics
    path: int
    stage: int
    taps: int
    side: int
    dilation: int
    pad: int
    skew: int
    first: int  # statistics row of edge row 0
    last: bool  # whether what follows its normalization is the node

    @property
    def geometry(self) -> list[int]:
        return [self.taps, self.side, self.dilation, self.pad, self.skew]

    @property
    def depthwise(self) -> str:
        """Name of the packed weight."""
        return f"{self.name[:-2]}_depthwise_{self.stage}"

    @property
    def pointwise(self) -> str:
        return f"{self.name[:-2]}_pointwise_{self.stage}"


class Layout:
    """For a cell of a spec on maps of (H, W) = size, the size of states 0 and 1, of n images on a device.

    An *instance* is a row of the cell's statistics and, but for preprocessing, the raw output that it normalizes.
    """

    def __init__(self, spec: CellSpec, n: int, size: tuple[int, int], device: torch.device):
        self.spec, self.n, self.device = spec, n, device
        self.c, self.k, self.nodes = spec.slice_channels, spec.partial, spec.nodes
        self.inner = size
        self.outer = tuple(side // 2 for side in size) if spec.reduction else size
        self.m_in, self.m = (n * h * w for h, w in (self.inner, self.outer))
        full = 4 * self.m_in if spec.factorized_input else self.m_in  # of input 0
        elements = (
            self.m_in * self.c,
            full * spec.input_channels[0],
            self.m_in * spec.input_channels[1],
            self.m * self.c * self.k * self.nodes,
        )
        require_addressable(max(elements), n, size)
        self.slice_in, self.slice = (-(-rows * self.c // 16) * 16 for rows in (self.m_in, self.m))
        self.strided = spec.reduction
        self.states_end = 2 * self.k * self.slice_in
        self.raw_start = self.states_end + self.nodes * self.k * self.slice
        self.instances = spec.statistics_rows
        self.bypass_start = self.raw_start + (self.instances - 2 * self.k) * self.slice
        self.nothing = self.bypass_start + (2 * self.k * self.slice if self.strided else 0)  # see rows.load_row
        self.workspace = self.nothing + padded(self.c)
        self.columns = len(spec.operations) + self.k  # of the coefficients
        self.edges = len(spec.edges)
        self.one = self.edges * self.columns  # the coefficient that is 1
        # rows of sums: of each coefficient, of each node's slices, of each instance (d, d * normalized)
        self.node_sums = self.edges * self.columns
        self.instance_sums = self.node_sums + self.nodes * self.k
        self.sums = self.instance_sums + 2 * self.instances
        self.node_jobs = self.edges * self.columns + self.k  # at least those of any node's reduction
        self.groups = [(0, 1), *((source,) for source in range(2, spec.nodes + 1))]

    @cached_property
    def weight_at(self) -> dict[str, int]:
        at, end = {}, 0
        for name, parameter in self.spec.parameters.items():
            at[name] = end
            end += math.prod(parameter.shape)
        return at

    @cached_property
    def dense_at(self) -> dict[str, int]:
        """Of each convolution, of a factorized preprocessing ("preprocess0"), and the end."""
        at, end = {}, 0
        for v in self.convolutions:
            at[v.name] = end
            end += self.edges * self.dense_size(v)
        at["preprocess0"] = end
        at["end"] = end + (2 * self.spec.input_channels[0] * self.c * self.k if self.spec.factorized_input else 0)
        return at

    def dense_size(self, v: Convolution) -> int:
        """Of an edge's dense weight."""
        return v.taps * self.c * self.c

    def dense(self, v: Convolution, row: int) -> int:
        return self.dense_at[v.name] + row * self.dense_size(v)

    def preprocess_weight(self, i: int) -> tuple[bool, int]:
        """(whether it lies with the dense weights, where)."""
        if i == 0 and self.spec.factorized_input:
            return True, self.dense_at["preprocess0"]
        return False, self.weight_at[f"preprocess{i}"]

    def state(self, source: int, s: int) -> int:
        if source < 2:
            return (source * self.k + s) * self.slice_in
        return self.states_end + ((source - 2) * self.k + s) * self.slice

    def raw(self, instance: int) -> int:
        return self.raw_start + (instance - 2 * self.k) * self.slice

    def raw_gradient(self, instance: int) -> int:
        """Gradients of raw outputs have a buffer of their own."""
        return self.raw(instance) - self.raw_start

    def bypass(self, source: int, s: int) -> int:
        return self.bypass_start + (source * self.k + s) * self.slice

    def index(self, source: int) -> int:
        """Of a state's maxima, in a buffer of its own: one path at most pools them."""
        return source * self.slice

    def bypass_index(self, source: int, s: int) -> int:
        """Of the bypass of an input state, at stride 2, behind those."""
        return (self.nodes + 1 + source * self.k + s) * self.slice

    @property
    def index_size(self) -> int:
        return self.bypass_index(2 if self.strided else 0, 0)

    def node_gradient(self, node: int, s: int) -> int:
        return (node * self.k + s) * self.slice

    def state_gradient(self, group, source: int, s: int) -> int:
        return (group.index(source) * self.k + s) * (self.slice_in if source < 2 else self.slice)

    def coefficient(self, row: int, column: int) -> int:
        return row * self.columns + column

    def through(self, row: int, s: int) -> int:
        return self.coefficient(row, len(self.spec.operations) + s)

    @cached_property
    def convolutions(self) -> list[Convolution]:
        found = []
        for column, name in enumerate(self.spec.operations):
            operation, path = OPERATIONS[name], self.spec.path_of_operation[column]
            k, dilation = operation.kernel_size, operation.dilation
            for stage in range(operation.stages):
                key, last = f"{name}_{stage}", stage == operation.stages - 1
                first = self.spec.statistics[key].start
                found.append(Convolution(key, path, stage, k * k, k, dilation, dilation * (k - 1) // 2, 0, first, last))
            if operation.kind == "skip" and self.strided:
                found.append(Convolution(name, path, 0, 2, 1, 1, 0, 1, self.spec.statistics[name].start, True))
        return found

    def column(self, name: str) -> int:
        """Of the coefficients: of an operation, or of the convolution that it ends with."""
        return next(i for i, operation in enumerate(self.spec.operations) if name.startswith(operation))

    def has_row(self, convolution: Convolution, row: int) -> bool:
        """Factorized reductions are on strided edges only."""
        return convolution.skew == 0 or row < self.spec.strided_rows

    @cached_property
    def poolings(self) -> list[tuple[str, int]]:
        """(name, path)."""
        return [
            (name, self.spec.path_of_operation[i])
            for i, name in enumerate(self.spec.operations)
            if OPERATIONS[name].kind == "pooling"
        ]

    def node_of(self, row: int) -> int:
        return self.spec.edges[self.spec.source_order[row]].node

    def source_of(self, row: int) -> int:
        return self.spec.edges[self.spec.source_order[row]].source

    def rows_of(self, sources) -> range:
        """Edge rows of consecutive sources."""
        return range(self.spec.rows_by_source[sources[0]].start, self.spec.rows_by_source[sources[-1]].stop)

    def stage_before(self, convolution: Convolution) -> int:
        """Statistics row of edge row 0 of the first stage."""
        return self.spec.statistics[convolution.name[:-1] + "0"].start

    def terms(self, node: int):
        """Of each slice of a node: (offset, statistics row, coefficient); the row behind all others is no
        normalization."""
        slices = [[] for _ in range(self.k)]
        for row in range(self.edges):
            if self.node_of(row) == node:
                source = self.source_of(row)
                for v in self.convolutions:
                    if v.last and self.has_row(v, row):
                        instance = v.first + row
                        coefficient = self.coefficient(row, self.column(v.name))
                        slices[v.path].append([self.raw(instance), instance, coefficient])
                for name, path in self.poolings:
                    instance = self.spec.statistics[name][source]
                    coefficient = self.coefficient(row, self.column(name))
                    slices[path].append([self.raw(instance), instance, coefficient])
                for s in range(self.k):
                    place = self.bypass(source, s) if self.spec.stride(source) == 2 else self.state(source, s)
                    slices[s].append([place, self.instances, self.through(row, s)])
        return slices

    def preprocess_shape(self, i: int) -> dict:
        factorized = i == 0 and self.spec.factorized_input
        size = tuple(2 * side for side in self.inner) if factorized else self.inner
        return {
            "n": self.n, "size": size, "out_size": self.inner, "stride": 2 if factorized else 1,
            "c_in": self.spec.input_channels[i], "c": self.c,
        }  # fmt: skip

    def preprocess_geometry(self, i: int) -> list[int]:
        """A 1x1 convolution; factorized, one of the even pixels and one of the odd ones."""
        return [2, 1, 1, 0, 1] if i == 0 and self.spec.factorized_input else [1, 1, 1, 0, 0]
