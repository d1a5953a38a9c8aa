"""Where everything of a derived cell lies, and the tables of jobs that its kernels read, made once for a shape.

A cell's maps are matrices, a row a pixel, of C channels, at offsets in one workspace; their gradients lie in another.
Two kinds of things are computed: convolutions (a stage: depthwise, pointwise, normalization) and factorized reductions.
Nodes are taken level by level: a node's level is one more than the highest of the states that it reads.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from ..spec import OPERATIONS, DerivedCellSpec
from .launch import pieces
from .rows import rows_tiles
from .statistics import counters

MAP, MAXIMA, AVERAGES = 0, 1, 2  # how a node reads a map
NOWHERE = -1


@dataclass(frozen=True)
class Convolution:
    """A stage on an edge. x: what it reads, (offset, row of the statistics that normalizes it). Offsets: of the
    depthwise output, the raw output, and the gradients of both."""

    edge: int
    source: int  # the state, NOWHERE for a second stage
    last: bool
    side: int
    dilation: int
    stride: int
    x: tuple[int, int]
    depthwise: int  # in the weights that lie (taps, C)
    depthwise_at: int  # in params
    pointwise: int  # in params
    row: int
    hidden: int
    raw: int
    d_hidden: int
    d_normalized: int


@dataclass(frozen=True)
class Factorized:
    """A factorized reduction. d_x: offset of the gradient that it passes back."""

    edge: int
    x: tuple[int, int]
    halves: tuple[int, int]  # in params
    row: int
    raw: int
    d_x: int


class DerivedPlan:
    """size: (H, W) of input 1."""

    def __init__(self, spec: DerivedCellSpec, n: int, size: tuple[int, int], device: torch.device):
        self.spec, self.n, self.device, self.c = spec, n, device, spec.channels
        self.inner, self.stride = size, 2 if spec.reduction else 1
        self.outer = size[0] // self.stride, size[1] // self.stride
        self.m_in, self.m = n * math.prod(self.inner), n * math.prod(self.outer)
        # of at most two normalizations an edge, a block of channels at a time, in the smallest tiles that there are
        smallest = {"BLOCK": 8, "TALL": 1}
        tiles = max(rows_tiles(n, self.inner, smallest), rows_tiles(n, self.outer, smallest))
        self.counters = counters(2 * len(spec.edges) * pieces(self.c, 16), tiles)
        self.rows, self.out_row = len(spec.normalizations), len(spec.concat) * self.c
        self._tables, self.space, self.d_space, self.indices, self.arranged = {}, 0, 0, 0, 0

        self.at = {}  # of every weight in params: scales, then shifts, then the others
        for name, row in spec.normalizations.items():
            self.at[f"{name}.weight"], self.at[f"{name}.bias"] = row * self.c, (self.rows + row) * self.c
        self.params = 2 * self.rows * self.c
        for name, shape in spec.parameters.items():
            if name not in self.at:
                self.at[name] = self.params
                self.params += math.prod(shape)
        self.weight_align = math.gcd(16, *self.at.values())
        self.align = math.gcd(8, self.c)

        consumed = {source for _, source in spec.edges}
        self.states, self.d_states = [], []  # (offset, row), offset; a node that no edge leaves has none
        for state in range(spec.nodes + 2):
            kept, rows = state < 2 or state in consumed, self.m_in if state < 2 else self.m
            name = f"preprocess{state}.{'norm' if f'preprocess{state}' in spec.factorized else '2'}"
            row = spec.normalizations[name] if state < 2 else NOWHERE
            self.states.append((self._take("space", rows) if kept else NOWHERE, row))
            self.d_states.append(self._take("d_space", rows) if kept else NOWHERE)
        self.convolutions, self.reductions, self.index = [], [], {}
        for edge, (name, source) in enumerate(spec.edges):
            self._add_edge(edge, OPERATIONS[name], source)
        levels = [0, 0]
        for node in range(spec.nodes):
            levels.append(1 + max(levels[source] for _, source in spec.edges[2 * node : 2 * node + 2]))
        of = range(1, max(levels) + 1)
        self.levels = [[node for node in range(spec.nodes) if levels[node + 2] == level] for level in of]

    def _take(self, buffer: str, rows: int) -> int:
        at = getattr(self, buffer)
        setattr(self, buffer, at + -(-rows * self.c // 16) * 16)
        return at

    def _add_edge(self, edge, operation, source):
        spec, x = self.spec, self.states[source]
        if spec.edges[edge][0] == "max_pool_3x3":
            self.index[edge] = self._take("indices", self.m)
        if f"operations.{edge}" in spec.factorized:
            name = f"operations.{edge}"
            halves = self.at[f"{name}.even.weight"], self.at[f"{name}.odd.weight"]
            places = self._take("space", self.m), self._take("d_space", self.m_in)
            self.reductions.append(Factorized(edge, x, halves, spec.normalizations[f"{name}.norm"], *places))
        for i, stage in enumerate(spec.stages(edge)):
            last, arranged = i == operation.stages - 1, self.arranged
            self.arranged += operation.kernel_size**2 * self.c
            row = spec.normalizations[stage.normalization]
            convolution = Convolution(
                edge, NOWHERE if i else source, last, operation.kernel_size, operation.dilation,
                1 if i else spec.stride(edge), x, arranged, self.at[stage.depthwise], self.at[stage.pointwise], row,
                self._take("space", self.m), self._take("space", self.m), self._take("d_space", self.m),
                NOWHERE if last else self._take("d_space", self.m),
            )  # fmt: skip
            self.convolutions.append(convolution)
            x = convolution.raw, row

    def preprocess(self, i: int) -> Factorized | None:
        """Of an input that is factorized."""
        name = f"preprocess{i}"
        if name not in self.spec.factorized:
            return None
        halves = self.at[f"{name}.even.weight"], self.at[f"{name}.odd.weight"]
        raw, row = self.states[i]
        return Factorized(NOWHERE, (0, NOWHERE), halves, row, raw, 0)

    # --- Tables ---

    def table(self, key, make) -> tuple[list[list[int]], torch.Tensor]:
        """Rows that make returns, and the same on the device; made once."""
        if key not in self._tables:
            rows = make()
            self._tables[key] = rows, torch.tensor(rows or [[0]], dtype=torch.int64, device=self.device)
        return self._tables[key]

    def tables(self, key, make) -> list[tuple[list[list[int]], torch.Tensor]]:
        """The same of the several lists that make returns."""
        if key not in self._tables:
            self._tables[key] = [self.table((key, i), lambda rows=rows: rows) for i, rows in enumerate(make())]
        return self._tables[key]

    def of_level(self, found: list, level: int, live=False) -> list:
        nodes = [node for node in self.levels[level] if not live or node + 2 in self.spec.live]
        return [item for item in found if item.edge // 2 in nodes]

    def gradient_at(self, edge: int) -> list[int]:
        """Of what an edge ends in: (whether in a buffer of its own, offset)."""
        state = edge // 2 + 2
        if self.d_states[state] != NOWHERE:
            return [1, self.d_states[state]]
        return [0, self.spec.concat.index(state) * self.c]

    def arrange_jobs(self):
        return [[v.depthwise_at, v.side**2, v.depthwise] for v in self.convolutions]

    def depthwise_jobs(self, convolutions):
        return [[*v.x, v.depthwise, v.side, v.dilation, v.hidden] for v in convolutions]

    def pointwise_jobs(self, convolutions):
        return [[v.hidden, NOWHERE, v.pointwise, 0, v.raw, v.row] for v in convolutions]

    def halves_jobs(self, reductions):
        return [[*v.x, v.halves[half], half, v.raw, v.row] for v in reductions for half in (0, 1)]

    def join_jobs(self, level: int):
        jobs, ends = [], {v.edge: (v.raw, v.row) for v in (*self.convolutions, *self.reductions)}
        for node in self.levels[level]:
            state = node + 2
            place = self.spec.concat.index(state) * self.c if state in self.spec.concat else NOWHERE
            jobs.append([place, self.states[state][0]])
            for edge in (2 * node, 2 * node + 1):
                name, source = self.spec.edges[edge]
                mode = {"max_pool_3x3": MAXIMA, "avg_pool_3x3": AVERAGES}.get(name, MAP)
                scaled = NOWHERE if self.spec.is_identity(edge) else edge
                at = ends.get(edge, self.states[source])
                jobs[-1] += [mode, *at, scaled, self.index.get(edge, 0), self.spec.stride(edge)]
        return jobs

    # --- Tables of the backward ---

    def reduce_jobs(self, level: int):
        ends = [v for v in self.of_level(self.convolutions, level, True) if v.last]
        ends += self.of_level(self.reductions, level, True)
        return [[*self.gradient_at(v.edge), v.edge, v.raw, v.row] for v in ends]

    def arriving(self, v: Convolution | Factorized) -> list[int]:
        """The gradient of a convolution's normalized output: (own, offset), and the edge whose samples are scaled."""
        if isinstance(v, Convolution) and not v.last:
            return [1, v.d_normalized, NOWHERE]
        return [*self.gradient_at(v.edge), v.edge]

    def pointwise_dgrad_jobs(self, convolutions):
        return [[*self.arriving(v), v.raw, v.row, v.pointwise, 0, v.d_hidden, 0, NOWHERE] for v in convolutions]

    def halves_dgrad_jobs(self, reductions):
        return [[*self.arriving(v), v.raw, v.row, *v.halves, v.d_x, *v.x] for v in reductions]

    @cached_property
    def passing_back(self) -> dict[int, tuple[list[list[int]], list[list[int]]]]:
        """Of every live state that has a gradient of its own: (convolutions, all else that passes back to it)."""
        found = {}
        for state in self.spec.live:
            if self.d_states[state] == NOWHERE:
                continue
            segments, others = [], []
            if state in self.spec.concat:
                others.append([MAP, 0, self.spec.concat.index(state) * self.c, NOWHERE, 0])
            for edge, (name, source) in enumerate(self.spec.edges):
                if source == state and edge // 2 + 2 in self.spec.live:
                    if self.spec.is_identity(edge):
                        others.append([MAP, *self.gradient_at(edge), NOWHERE, 0])
                    elif name == "max_pool_3x3":
                        others.append([MAXIMA, *self.gradient_at(edge), edge, self.index[edge]])
                    elif name == "avg_pool_3x3":
                        others.append([AVERAGES, *self.gradient_at(edge), edge, 0])
                    segments += [
                        [v.d_hidden, v.depthwise, v.side, v.dilation]
                        for v in self.convolutions
                        if v.edge == edge and v.source == state
                    ]
                    others += [[MAP, 1, v.d_x, NOWHERE, 0] for v in self.reductions if v.edge == edge]
            found[state] = segments, others
        return found

    def state_jobs(self, states: tuple[int, ...]):
        """(jobs, segments, others)."""
        jobs, segments, others = [], [], []
        for state in states:
            own_segments, own_others = self.passing_back[state]
            jobs.append([
                *self.states[state], len(segments), len(own_segments), len(others), len(own_others),
                self.d_states[state],
            ])  # fmt: skip
            segments += own_segments
            others += own_others
        return jobs, segments, others

    def between_jobs(self, seconds: list[Convolution], firsts: list[Convolution]):
        """What second stages read: (jobs, segments, others)."""
        by_edge = {v.edge: v for v in firsts}
        jobs = [[*v.x, i, 1, 0, 0, by_edge[v.edge].d_normalized] for i, v in enumerate(seconds)]
        return jobs, [[v.d_hidden, v.depthwise, v.side, v.dilation] for v in seconds], []


@cache  # see plan._plan
def derived_plan(spec: DerivedCellSpec, n: int, size: tuple[int, int], device: torch.device) -> DerivedPlan:
    return DerivedPlan(spec, n, size, device)
