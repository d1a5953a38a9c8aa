"""The tables of jobs that a cell's kernels read, each row a job: made once for a shape, and kept."""

from functools import cache, cached_property

import torch

from ..spec import OPERATIONS, CellSpec
from . import tuning
from .convolution import wgrad_parts
from .launch import dot_options, padded
from .layout import Layout
from .mixture import TOGETHER
from .pools import AVERAGE, BYPASS, MAXIMUM, pool_tiles
from .rows import data_gradient_options, forward_options, rows_shares
from .rows_wgrad import rows_wgrad_parts

ALWAYS, NEVER = -2, -1  # in the table of what opens a row of the statistics


class Plan(Layout):
    """A layout with its tables. What a job's columns are, its kernel says."""

    def __init__(self, spec: CellSpec, n: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype):
        super().__init__(spec, n, size, device)
        self.dtype, self._tables = dtype, {}

    @cached_property
    def shares(self) -> int:
        """The most tiles that a map is cut into, which leave shares of its statistics or of sums."""
        edges = {1, *(padded(len(rows)) for rows in self.spec.rows_by_source)}
        options = [forward_options(self.c, count, self.outer[1], self.dtype) for count in edges]
        options.append(data_gradient_options(self.c, 1, self.outer[1], 1, self.dtype))
        found = [tuning.tiles(max(self.m, self.m_in))]
        found += [pool_tiles(self.n, self.outer, self.c, self.dtype, stride) for stride in (1, 2)]
        return max(*found, *(rows_shares(self.n, self.outer, o) for o in options))

    # --- Tables ---

    def table(self, rows) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def cached(self, key, make) -> torch.Tensor:
        """A table on the device, made once."""
        if key not in self._tables:
            self._tables[key] = self.table(make())
        return self._tables[key]

    def jobs(self, name: str, group, make) -> tuple:
        """What make returns, a list of rows or several, with each as a table on the device; made once."""
        if (name, group) not in self._tables:
            lists = make()
            several = isinstance(lists, tuple)
            tables = tuple(self.table(rows or [[0]]) for rows in (lists if several else (lists,)))
            self._tables[name, group] = (lists if several else (lists,)) + tables
        return self._tables[name, group]

    def open_instances(self, gates: list[bool] | None) -> list[bool]:
        """gates: of each edge and path, flat; None where they are not known, which counts all as open."""
        uses = self.mix_uses
        return [any(u == ALWAYS or (u >= 0 and (gates is None or gates[u])) for u in row) for row in uses]

    @cached_property
    def mix_tables(self) -> dict[str, torch.Tensor]:
        spec = self.spec
        identity = [[-1] * self.k for _ in range(self.edges)]
        for column, name in enumerate(spec.operations):
            if OPERATIONS[name].kind == "skip":
                for row in range(spec.strided_rows, self.edges):
                    identity[row][spec.path_of_operation[column]] = column
        return {
            "order_ptr": self.table(spec.source_order),
            "path_ptr": self.table(spec.path_of_operation),
            "identity_ptr": self.table(identity),
            "uses_ptr": self.table(self.mix_uses),
        }

    @cached_property
    def mix_uses(self) -> list[list[int]]:
        """Of every instance, the gates that open it, by their place in (edges, paths)."""
        spec, paths = self.spec, self.spec.paths
        uses = [[NEVER] * max(len(rows) for rows in spec.rows_by_source) for _ in range(self.instances)]
        for instance in range(2 * self.k):
            uses[instance][0] = ALWAYS
        for convolution in self.convolutions:
            for row in range(self.edges):
                if self.has_row(convolution, row):
                    gate = spec.source_order[row] * paths + convolution.path
                    uses[convolution.first + row][0] = gate
        for name, path in self.poolings:
            for source, rows in enumerate(spec.rows_by_source):
                for i, row in enumerate(rows):
                    uses[spec.statistics[name][source]][i] = spec.source_order[row] * paths + path
        return uses

    # --- Jobs of the forward ---

    def preprocess_job(self, i: int, is_other: bool) -> list[int]:
        """The slices of the state are its edges: they lie side by side in the weights' columns."""
        return [
            0, self.preprocess_weight(i)[1], self.c, *self.preprocess_geometry(i), i * self.k,
            i * self.k * self.slice_in, self.k, int(is_other),
        ]  # fmt: skip

    def expand_jobs(self):
        """Of dense weights: products of two factors, and halves of factorized reductions."""
        jobs = []
        for v in self.convolutions:
            if not v.skew:
                for row in range(self.edges):
                    jobs.append([
                        0, self.weight_at[v.depthwise] + row * v.taps * self.c,
                        self.weight_at[v.pointwise] + row * self.c * self.c,
                        v.taps, self.dense(v, row), 0, 0, 0,
                    ])  # fmt: skip
        found = [(v.name, self.c, self.c, self.spec.strided_rows) for v in self.convolutions if v.skew]
        if self.spec.factorized_input:
            found.append(("preprocess0", self.spec.input_channels[0], self.c * self.k, 1))
        for name, rows, width, edges in found:
            even, odd = self.weight_at[f"{name}_even"], self.weight_at[f"{name}_odd"]
            jobs.append([1, even, odd, self.dense_at[name], rows, width // 2, width, edges])
        return jobs

    def first_stage_jobs(self, group):
        jobs = []
        for source in group:
            rows = self.spec.rows_by_source[source]
            for v in self.convolutions:
                if v.stage == 0 and self.has_row(v, rows.start):
                    first = v.first + rows.start
                    jobs.append([
                        self.state(source, v.path), self.dense(v, rows.start), self.dense_size(v), *v.geometry, first,
                        self.raw(first), len(rows), 0,
                    ])  # fmt: skip
        return jobs

    def second_stage_jobs(self, group):
        jobs = []
        for source in group:
            for row in self.spec.rows_by_source[source]:
                for v in self.convolutions:
                    if v.stage == 1:
                        before = self.stage_before(v) + row
                        jobs.append([
                            self.raw(before), self.dense(v, row), self.dense_size(v), *v.geometry, v.first + row,
                            self.raw(v.first + row), 1, before,
                        ])  # fmt: skip
        return jobs

    def pool_jobs(self, group):
        jobs = []
        for source in group:
            for name, path in self.poolings:
                instance = self.spec.statistics[name][source]
                mode = MAXIMUM if name.startswith("max") else AVERAGE
                jobs.append([self.state(source, path), self.raw(instance), self.index(source), mode, instance])
            if self.spec.stride(source) == 2:
                for s in range(self.k):
                    jobs.append([
                        self.state(source, s), self.bypass(source, s), self.bypass_index(source, s), BYPASS, -1
                    ])  # fmt: skip
        return jobs

    def node_terms(self, node: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Terms of all slices, and where each slice's begin."""
        slices = self.terms(node)
        starts = [sum(len(terms) for terms in slices[:s]) for s in range(self.k + 1)]
        return (
            self.cached(("terms", node), lambda: [term for terms in slices for term in terms]),
            self.cached(("starts", node), lambda: starts),
        )

    # --- Jobs of the backward: maps ---

    def summed(self) -> list[list[int]]:
        """By edge row and operation, whether its normalized output is a term of a node."""
        found = [[0] * len(self.spec.operations) for _ in range(self.edges)]
        for node in range(self.nodes):
            for terms in self.terms(node):
                for _, instance, coefficient in terms:
                    if instance < self.instances:
                        found[coefficient // self.columns][coefficient % self.columns] = 1
        return found

    def reduce_entries(self, node: int, with_through: bool):
        """Sums over a node's gradient: (groups, entries)."""
        groups, entries, together = [], [], TOGETHER.value
        for s, terms in enumerate(self.terms(node)):
            found = [[*term, term[2]] for term in terms if term[1] < self.instances or with_through]
            for first in range(0, max(len(found), 1), together):
                alone = -1 if first else self.node_sums + node * self.k + s
                groups.append([self.node_gradient(node, s), alone])
                entries += (found[first : first + together] + [[0, 0, 0, -1]] * together)[:together]
        return groups, entries

    @cached_property
    def reduced_together(self) -> int:
        """The most groups of any node's reduction."""
        return max(len(self.reduce_entries(node, True)[0]) for node in range(self.nodes))

    def node_part(self, row: int, path: int, column: int):
        """Of what comes from the node at an edge's end: gradient, coefficient, sums of it and of it times the term."""
        node, coefficient = self.node_of(row), self.coefficient(row, column)
        return [self.node_gradient(node, path), coefficient, self.node_sums + node * self.k + path, coefficient]

    def last_normalize_bwd_jobs(self, group):
        """Normalizations right before a node: (jobs, parts)."""
        jobs, parts = [], []

        def add(instance, sources):
            d = self.raw_gradient(instance)
            jobs.append([self.raw(instance), d, instance, instance, instance, len(parts), len(sources)])
            parts.extend(sources)

        for source in group:
            rows = self.spec.rows_by_source[source]
            for v in self.convolutions:
                for row in rows:
                    if v.last and self.has_row(v, row):
                        add(v.first + row, [self.node_part(row, v.path, self.column(v.name))])
            for name, path in self.poolings:
                column = self.column(name)
                add(self.spec.statistics[name][source], [self.node_part(row, path, column) for row in rows])
        return jobs, parts

    def first_normalize_bwd_jobs(self, group):
        """Normalizations between the two stages; the gradient lies where its own is to go."""
        jobs, parts = [], []
        for instance in self.between(group):
            d, sums = self.raw_gradient(instance), self.instance_sums + 2 * instance
            jobs.append([self.raw(instance), d, instance, instance, instance, len(parts), 1])
            parts.append([d, self.one, sums, sums + 1])
        return jobs, parts

    def between(self, group) -> list[int]:
        """Instances of first stages that a second one follows."""
        rows = [row for source in group for row in self.spec.rows_by_source[source]]
        return [self.stage_before(v) + row for v in self.convolutions if v.stage == 1 for row in rows]

    def second_stage_dgrad_jobs(self, group):
        """(jobs, segments)."""
        jobs, segments = [], []
        for source in group:
            for row in self.spec.rows_by_source[source]:
                for v in self.convolutions:
                    if v.stage == 1:
                        before = self.stage_before(v) + row
                        d = self.raw_gradient(before)
                        jobs.append([self.raw(before), d, len(segments), 1, before, self.instance_sums + 2 * before])
                        segments.append([
                            self.raw_gradient(v.first + row), v.first + row, 1, self.dense(v, row), self.dense_size(v),
                            *v.geometry,
                        ])  # fmt: skip
        return jobs, segments

    def first_stage_dgrad_jobs(self, group):
        """A job a slice that any convolution reads: (jobs, segments). Gradients lie source by source, slice by
        slice."""
        jobs, segments = [], []
        for source in group:
            rows = self.spec.rows_by_source[source]
            for path in range(self.spec.paths):
                start = len(segments)
                for v in self.convolutions:
                    if v.stage == 0 and v.path == path and self.has_row(v, rows.start):
                        first = v.first + rows.start
                        segments.append([
                            self.raw_gradient(first), first, len(rows), self.dense(v, rows.start), self.dense_size(v),
                            *v.geometry,
                        ])  # fmt: skip
                if len(segments) > start:
                    jobs.append([
                        self.state(source, path), self.state_gradient(group, source, path), start,
                        len(segments) - start, 0, 0,
                    ])  # fmt: skip
        return jobs, segments

    def state_jobs(self, group):
        """The gradient of states, a job a slice: (jobs, poolings, edges). No edge leaves the last node, (nodes +
        1,)."""
        jobs, poolings, through = [], [], []
        for source in group:
            rows = self.spec.rows_by_source[source] if source <= self.nodes else range(0)
            for s in range(self.k):
                first, start = len(poolings), len(through)
                through += [[self.node_gradient(self.node_of(row), s), self.through(row, s)] for row in rows]
                for name, path in self.poolings if rows else ():
                    if path == s:
                        instance = self.spec.statistics[name][source]
                        mode = MAXIMUM if name.startswith("max") else AVERAGE
                        poolings.append([self.raw_gradient(instance), self.index(source), mode, instance])
                convolved = rows and any(
                    v.stage == 0 and v.path == s and self.has_row(v, rows.start) for v in self.convolutions
                )
                out = self.state_gradient(group, source, s) if source < 2 else self.node_gradient(source - 2, 0)
                jobs.append([
                    self.state_gradient(group, source, s) if convolved else -1, first, len(poolings) - first,
                    self.bypass_index(source, s) if source < 2 else 0, start, len(through) - start,
                    self.state(source, s), out, s, self.instance_sums + 2 * (source * self.k + s),
                ])  # fmt: skip
        return jobs, poolings, through

    def state_normalize_bwd_jobs(self):
        """Normalizations of the input states, in place; a state is its own normalized output: (jobs, parts)."""
        jobs, parts = [], []
        for instance in range(2 * self.k):
            d, sums = instance * self.slice_in, self.instance_sums + 2 * instance
            jobs.append([d, d, self.instances, instance, instance, instance, 1])
            parts.append([d, self.one, sums, sums + 1])
        return jobs, parts

    # --- Jobs of the backward: weights ---

    @cached_property
    def weight_gradients(self):
        """The launches that weight gradients take: [(which, sources, parts, distance of parts, offset in the buffer)],
        and the buffer's size."""
        launches, end = [], 0

        def add(which, sources, parts, distance):
            nonlocal end
            launches.append((which, sources, parts, distance, end))
            end += -(-parts * distance // 16) * 16  # aligned, for wide loads

        strided = tuple(source for source in (0, 1) if self.strided)
        plain = tuple(source for source in range(self.nodes + 1) if source not in strided)
        for stage, groups in ((0, (strided, plain)), (1, (strided + plain,))):
            for sources in filter(None, groups):
                jobs = self.second_stage_wgrad_jobs() if stage else self.first_stage_wgrad_jobs(sources)
                if jobs:
                    edges, taps, side = (max(job[i] for job in jobs) for i in (3, 4, 5))
                    if stage == 0 and sources == strided:
                        parts = wgrad_parts(self.m, self.c, self.c, edges, taps, len(jobs), self.dtype)
                    else:
                        parts = rows_wgrad_parts(self.n, self.outer, self.c, edges, side, len(jobs), self.dtype)
                    add(stage, sources, parts, self.dense_at["preprocess0"])
        for i, wide in enumerate(self.spec.input_channels):
            taps = self.preprocess_geometry(i)[0]
            parts = wgrad_parts(self.m_in, wide, self.c, self.k, taps, 1, self.dtype)
            add(f"preprocess{i}", (), parts, taps * wide * self.k * self.c)
        return launches, end

    def first_stage_wgrad_jobs(self, sources):
        jobs = []
        for source in sources:
            rows = self.spec.rows_by_source[source]
            for v in self.convolutions:
                if v.stage == 0 and self.has_row(v, rows.start):
                    first = v.first + rows.start
                    jobs.append([
                        self.state(source, v.path), self.raw_gradient(first), first, len(rows), *v.geometry,
                        self.dense(v, rows.start), 0,
                    ])  # fmt: skip
        return jobs

    def second_stage_wgrad_jobs(self):
        jobs = []
        for row in range(self.edges):
            for v in self.convolutions:
                if v.stage == 1:
                    before = self.stage_before(v) + row
                    jobs.append([
                        self.raw(before), self.raw_gradient(v.first + row), v.first + row, 1, *v.geometry,
                        self.dense(v, row), before,
                    ])  # fmt: skip
        return jobs

    def collect_jobs(self):
        """In place: the sum goes where the first part was. Weights that lie side by side are one job."""
        jobs = []
        for which, sources, parts, distance, start in self.weight_gradients[0]:
            if isinstance(which, str):
                jobs.append([start, distance, parts, start, distance])
                continue
            rows = self.rows_of(sources) if which == 0 else range(self.edges)
            for v in self.convolutions:
                for row in rows:
                    if v.stage == which and self.has_row(v, row):
                        at, size = start + self.dense(v, row), self.dense_size(v)
                        if jobs and [sum(jobs[-1][:2]), *jobs[-1][2::2]] == [at, parts, distance]:
                            jobs[-1][1] += size
                        else:
                            jobs.append([at, size, parts, at, distance])
        return jobs

    def contract_jobs(self):
        jobs = []
        for which, sources, _, _, start in self.weight_gradients[0]:
            rows = self.rows_of(sources) if which == 0 else range(self.edges)
            for v in self.convolutions:
                if v.stage == which and not v.skew:
                    for row in rows:
                        jobs.append([
                            0, self.weight_at[v.depthwise] + row * v.taps * self.c,
                            self.weight_at[v.pointwise] + row * self.c * self.c,
                            v.taps, start + self.dense(v, row), 0, 0, 0, 0, 0,
                        ])  # fmt: skip
        return jobs

    def gather_jobs(self):
        jobs, c, wide = [], self.c, self.c * self.k
        for which, sources, _, _, start in self.weight_gradients[0]:
            if which == 0 and self.strided and sources == (0, 1):
                for v in self.convolutions:
                    if v.skew:
                        at = start + self.dense(v, 0)
                        for tap, (half, first, columns) in enumerate(
                            (("even", 0, c // 2), ("odd", c // 2, c - c // 2))
                        ):
                            out = self.weight_at[f"{v.name}_{half}"]
                            jobs.append([1, at, out, self.spec.strided_rows, c, columns, tap, first, 2 * c * c, 0])
            if isinstance(which, str):
                i = int(which[-1])
                taps, rows = self.preprocess_geometry(i)[0], self.spec.input_channels[i]
                halves = ((which, 0, wide),)
                if taps == 2:
                    halves = (f"{which}_even", 0, wide // 2), (f"{which}_odd", wide // 2, wide - wide // 2)
                for tap, (name, first, columns) in enumerate(halves):
                    jobs.append([1, start, self.weight_at[name], 1, rows, columns, tap, first, 0, taps * rows * c])
        return jobs


def plan(spec: CellSpec, n: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Plan:
    return _plan(spec, n, size, device, dtype, dot_options(dtype)["PRECISION"])


@cache  # without bounds: a CUDA graph goes on reading the tables of the plan that it was captured with
def _plan(spec, n, size, device, dtype, _precision):
    """Tiles are of other sizes in another precision, and so is what is left for each."""
    return Plan(spec, n, size, device, dtype)
