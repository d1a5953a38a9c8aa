"""The search space's geometry: operations, edges, and how a cell's parameters and statistics are packed.

This is the one place that says where a number lies. Every back end reads the same tensors, so a state_dict moves
between them unchanged. No torch here: the command line and the genotype code read this file too.

Two orders of a cell's edges are in use:

- *edge order* (alpha, beta, gates, genotypes): node by node, and within a node by source state;
- *source order* (packed weights, running statistics): source state by source state, and within one by node. All
  edges that leave a state read the same slice of channels, so they lie side by side and are computed together.
"""

from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import NamedTuple

EPSILON = 1e-5  # of every batch normalization, as torch.nn.BatchNorm2d


class Operation(NamedTuple):
    """kind: what computes it; stages: how many times ReLU -> depthwise -> pointwise -> normalization are repeated."""

    kind: str  # "none", "pooling", "skip" or "convolution"
    kernel_size: int = 0
    dilation: int = 1
    stages: int = 0


OPERATIONS = {
    "none": Operation("none"),
    "max_pool_3x3": Operation("pooling", 3),
    "avg_pool_3x3": Operation("pooling", 3),
    "skip_connect": Operation("skip"),
    "sep_conv_3x3": Operation("convolution", 3, 1, 2),
    "sep_conv_5x5": Operation("convolution", 5, 1, 2),
    "dil_conv_3x3": Operation("convolution", 3, 2, 1),
    "dil_conv_5x5": Operation("convolution", 5, 2, 1),
}


class Edge(NamedTuple):
    node: int  # 0 .. nodes - 1; its state has index node + 2
    source: int  # 0 .. node + 1


class Parameter(NamedTuple):
    """Shape of a packed weight, and the fan-in of one of the convolutions in it, which its initialization needs."""

    shape: tuple[int, ...]
    fan_in: int

    @property
    def bound(self) -> float:
        """Weights start uniform in (-bound, bound), as torch.nn.Conv2d's do."""
        return 1 / sqrt(self.fan_in)


def edges(nodes: int) -> tuple[Edge, ...]:
    """All edges of a cell in edge order: two inputs and every earlier node feed a node."""
    return tuple(Edge(node, source) for node in range(nodes) for source in range(node + 2))


def _compute_now(spec):
    """What follows from a specification's fields: torch.compile cannot trace the lock around the first time."""
    for name, attribute in vars(type(spec)).items():
        if isinstance(attribute, cached_property):
            getattr(spec, name)


@dataclass(frozen=True)
class CellSpec:
    """One cell of the supernet: all that a back end may specialise on.

    channels: C, channels of a node; a path reads C / partial of them.
    input_channels: channels of the two input states before preprocessing.
    partial: K, the number of channel slices; path p reads slice p.
    subsets: the candidate operations of each path.
    reduction: edges from the two inputs have stride 2.
    factorized_input: input 0 is twice as large as input 1 and is brought down by a factorized reduction.
    """

    channels: int
    input_channels: tuple[int, int]
    partial: int
    subsets: tuple[tuple[str, ...], ...]
    nodes: int = 4
    reduction: bool = False
    factorized_input: bool = False

    def __post_init__(self):
        if self.partial < 1 or self.channels % self.partial:
            raise ValueError(
                f"{self.channels} channels cannot be cut into {self.partial} equal slices (partial={self.partial})"
            )
        if len(self.subsets) > self.partial:
            raise ValueError(f"{len(self.subsets)} paths need as many slices, but partial={self.partial}")
        if not all(self.subsets):
            raise ValueError("every path needs operations to choose from, but one of subsets is empty")
        _compute_now(self)

    @property
    def slice_channels(self) -> int:
        """Channels that one path reads, C / K."""
        return self.channels // self.partial

    @property
    def paths(self) -> int:
        return len(self.subsets)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """In edge order."""
        return edges(self.nodes)

    @cached_property
    def source_order(self) -> tuple[int, ...]:
        """source_order[row] is the index in edge order of the edge whose weights lie in that row."""
        return tuple(sorted(range(len(self.edges)), key=lambda e: (self.edges[e].source, self.edges[e].node)))

    @cached_property
    def rows_by_source(self) -> tuple[range, ...]:
        """Rows of the edges that leave each state that has any: 0 .. nodes."""
        sources = [self.edges[e].source for e in self.source_order]
        starts = [sources.index(s) for s in range(self.nodes + 1)] + [len(sources)]
        return tuple(range(a, b) for a, b in zip(starts, starts[1:]))

    def stride(self, source: int) -> int:
        """Stride of the edges that leave a state."""
        return 2 if self.reduction and source < 2 else 1

    @property
    def strided_rows(self) -> int:
        """How many edges have stride 2; they come first in source order."""
        return self.rows_by_source[1].stop if self.reduction else 0

    @cached_property
    def operations(self) -> tuple[str, ...]:
        """All candidate operations, path after path: the columns of alpha."""
        return tuple(name for subset in self.subsets for name in subset)

    @cached_property
    def path_of_operation(self) -> tuple[int, ...]:
        return tuple(p for p, subset in enumerate(self.subsets) for _ in subset)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """Every packed weight by name. Input channels come before output channels; rows are in source order.

        ``<operation>_depthwise_<stage>``: (edges, k, k, c); ``<operation>_pointwise_<stage>``: (edges, c, c).
        ``skip_connect_even``, ``skip_connect_odd`` (reduction cells): (strided edges, c, c // 2) and (.., c - c // 2).
        ``preprocess<i>``: (C_i, C); a factorized one has ``preprocess0_even`` and ``preprocess0_odd``, half of C each.
        """
        c, rows, shapes = self.slice_channels, len(self.edges), {}
        for i, wide in enumerate(self.input_channels):
            if i == 0 and self.factorized_input:
                shapes["preprocess0_even"] = Parameter((wide, self.channels // 2), wide)
                shapes["preprocess0_odd"] = Parameter((wide, self.channels - self.channels // 2), wide)
            else:
                shapes[f"preprocess{i}"] = Parameter((wide, self.channels), wide)
        for name in self.operations:
            operation = OPERATIONS[name]
            k = operation.kernel_size
            for stage in range(operation.stages):
                shapes[f"{name}_depthwise_{stage}"] = Parameter((rows, k, k, c), k * k)
                shapes[f"{name}_pointwise_{stage}"] = Parameter((rows, c, c), c)
            if operation.kind == "skip" and self.reduction:
                shapes[f"{name}_even"] = Parameter((self.strided_rows, c, c // 2), c)
                shapes[f"{name}_odd"] = Parameter((self.strided_rows, c, c - c // 2), c)
        return shapes

    @cached_property
    def statistics(self) -> dict[str, range]:
        """Rows of each normalization in a cell's table of running statistics, (statistics_rows, c).

        ``preprocess<i>``: K rows, the slices of C channels. ``<convolution>_<stage>``: a row an edge, in source order.
        ``<pooling>``: a row a source state, since all edges that leave it share the normalization.
        ``skip_connect`` (reduction cells): a row for each strided edge.
        """
        sizes = {f"preprocess{i}": self.partial for i in range(2)}
        for name in self.operations:
            operation = OPERATIONS[name]
            for stage in range(operation.stages):
                sizes[f"{name}_{stage}"] = len(self.edges)
            if operation.kind == "pooling":
                sizes[name] = len(self.rows_by_source)
            if operation.kind == "skip" and self.reduction:
                sizes[name] = self.strided_rows
        rows, start = {}, 0
        for key, size in sizes.items():
            rows[key] = range(start, start + size)
            start += size
        return rows

    @property
    def statistics_rows(self) -> int:
        return max(rows.stop for rows in self.statistics.values())


class Stage(NamedTuple):
    """Names of a stage's weights, and of its normalization, in a derived cell."""

    depthwise: str
    pointwise: str
    normalization: str


@dataclass(frozen=True)
class DerivedCellSpec:
    """One cell of the derived network: what a genotype says, and its sizes.

    channels: C, channels of a node.
    input_channels: channels of the two input states before preprocessing.
    edges: (operation, source state), two a node, node after node; any operation but ``none``.
    concat: the states, of nodes, whose concatenation is the cell's output.
    reduction: edges from the two inputs have stride 2.
    factorized_input: input 0 is twice as large as input 1 and is brought down by a factorized reduction.

    Weights and normalizations have the names of the network's modules (``operations.3.1.weight``), and so of its
    checkpoints. Every normalization has C channels, and is affine.
    """

    channels: int
    input_channels: tuple[int, int]
    edges: tuple[tuple[str, int], ...]
    concat: tuple[int, ...]
    reduction: bool = False
    factorized_input: bool = False

    def __post_init__(self):
        for i, (name, source) in enumerate(self.edges):
            if OPERATIONS[name].kind == "none" or not 0 <= source < i // 2 + 2:
                raise ValueError(f"edge {i} cannot be {name} from state {source}")
        _compute_now(self)

    @property
    def nodes(self) -> int:
        return len(self.edges) // 2

    def node(self, edge: int) -> int:
        return edge // 2

    def stride(self, edge: int) -> int:
        return 2 if self.reduction and self.edges[edge][1] < 2 else 1

    def is_identity(self, edge: int) -> bool:
        return OPERATIONS[self.edges[edge][0]].kind == "skip" and self.stride(edge) == 1

    def stages(self, edge: int) -> tuple[Stage, ...]:
        """Of an edge's convolution; of any other operation none."""
        start, stages = f"operations.{edge}", range(OPERATIONS[self.edges[edge][0]].stages)
        firsts = [4 * stage + 1 for stage in stages]  # behind a ReLU each
        return tuple(Stage(f"{start}.{i}.weight", f"{start}.{i + 1}.weight", f"{start}.{i + 2}") for i in firsts)

    @cached_property
    def factorized(self) -> dict[str, int]:
        """Every factorized reduction by name, and the channels that it reads."""
        found = {"preprocess0": self.input_channels[0]} if self.factorized_input else {}
        for edge, (name, _) in enumerate(self.edges):
            if OPERATIONS[name].kind == "skip" and self.stride(edge) == 2:
                found[f"operations.{edge}"] = self.channels
        return found

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by name, those of convolutions as torch.nn.Conv2d has them."""
        c, shapes = self.channels, {}

        def normalization(name):
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (c,)

        def factorized(name):
            shapes[f"{name}.even.weight"] = (c // 2, self.factorized[name], 1, 1)
            shapes[f"{name}.odd.weight"] = (c - c // 2, self.factorized[name], 1, 1)
            normalization(f"{name}.norm")

        for i, wide in enumerate(self.input_channels):
            if f"preprocess{i}" in self.factorized:
                factorized(f"preprocess{i}")
            else:
                shapes[f"preprocess{i}.1.weight"] = (c, wide, 1, 1)
                normalization(f"preprocess{i}.2")
        for edge, (name, _) in enumerate(self.edges):
            k = OPERATIONS[name].kernel_size
            for stage in self.stages(edge):
                shapes[stage.depthwise] = (c, 1, k, k)
                shapes[stage.pointwise] = (c, c, 1, 1)
                normalization(stage.normalization)
            if f"operations.{edge}" in self.factorized:
                factorized(f"operations.{edge}")
        return shapes

    @cached_property
    def normalizations(self) -> dict[str, int]:
        """Row of each normalization, by name, in the cell's table of statistics, (rows, C)."""
        names = [name.removesuffix(".bias") for name in self.parameters if name.endswith(".bias")]
        return {name: row for row, name in enumerate(names)}

    @cached_property
    def live(self) -> frozenset[int]:
        """States that the cell's output depends on."""
        live = set(self.concat)
        for edge, (_, source) in reversed(list(enumerate(self.edges))):
            if self.node(edge) + 2 in live:
                live.add(source)
        return frozenset(live)

    @cached_property
    def unread(self) -> frozenset[str]:
        """Weights that it does not depend on: they have no gradient."""
        dead = [f"preprocess{i}." for i in range(2) if i not in self.live]
        dead += [f"operations.{edge}." for edge in range(len(self.edges)) if self.node(edge) + 2 not in self.live]
        return frozenset(name for name in self.parameters if name.startswith(tuple(dead)))
