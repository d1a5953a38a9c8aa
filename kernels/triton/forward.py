"""The forward of a cell: its buffers, and the launches on them."""

import torch
from torch import Tensor

from . import tuning
from .convolution import convolve_fwd
from .launch import is_counting, launch, padded, pieces
from .mixture import mix_fwd_kernel, node_fwd_kernel, normalize_fwd_kernel
from .plan import Plan
from .pools import pool_fwd
from .rows import rows_fwd
from .statistics import merge_statistics


class Forward:
    """A cell's buffers in one forward, and the launches on them. What backward needs stays here."""

    def __init__(self, p: Plan, dtype: torch.dtype, gates: Tensor, training: bool):
        self.p, self.dtype, self.training, device = p, dtype, training, p.device
        self.gates = gates
        self.space = torch.empty(p.workspace, dtype=dtype, device=device)
        self.index = torch.empty(p.index_size, dtype=torch.uint8, device=device)
        mean, inverse = (torch.empty(p.instances + 1, p.c, device=device) for _ in range(2))
        variance = torch.empty(p.instances, p.c, device=device)
        self.statistics = {"mean_ptr": mean, "inverse_ptr": inverse, "variance_ptr": variance}
        self.normalizing = {"mean_ptr": mean, "inverse_ptr": inverse}
        self.opened = torch.empty(p.instances, dtype=torch.int32, device=device)
        self.updated = torch.empty(p.instances, p.c, device=device)
        self.coefficients = torch.empty(p.one + 1, device=device)
        self.counters = torch.empty(p.node_jobs, dtype=torch.int32, device=device)
        self.partial = torch.empty(p.instances * p.shares * 3 * p.c, device=device)
        self.left = []  # (instance, its shares of statistics) that are to be merged
        self.open_on_host = None
        if is_counting():
            flat = [value != 0 for row in gates.tolist() for value in row] if gates.device.type == "cpu" else None
            self.open_on_host = p.open_instances(flat)
        self.bytes = dtype.itemsize
        self.block = {"C": p.c, "P": padded(p.c), "BLOCK": tuning.block(), "num_warps": 4}

    @property
    def nothing(self) -> dict[str, Tensor]:
        """Where rows_fwd and rows_wgrad read what lies outside."""
        return {"nothing_ptr": self.space[self.p.nothing :]}

    # --- Counting ---

    def count_open(self, instances) -> int:
        return sum(self.open_on_host[i] for i in instances)

    def moved(self, elements) -> float:
        """elements: a function, called only when launches are counted; returns what open paths read and write."""
        return elements() * self.bytes if self.open_on_host is not None else 0

    # --- Forward ---

    def mix(self, alpha, beta, weights):
        """Coefficients, what is open; packed weights end to end, and the dense ones of the convolutions."""
        p = self.p
        self.weights = torch.cat([weight.reshape(-1) for weight in weights])
        self.dense = torch.empty(p.dense_at["end"], dtype=self.dtype, device=p.device)
        rows, jobs = p.jobs("expand", (), p.expand_jobs)
        tensors = {"alpha_ptr": alpha, "beta_ptr": beta, "gates_ptr": self.gates, **p.mix_tables, **self.statistics}
        tensors |= {"coefficients_ptr": self.coefficients, "opened_ptr": self.opened, "updated_ptr": self.updated}
        tensors |= {"counters_ptr": self.counters, **self.nothing}
        tensors |= {"weights_ptr": self.weights, "dense_ptr": self.dense, "jobs_ptr": jobs}
        block = padded(p.edges)  # registers are said because the compiler takes 74 on sm_120, and spills
        launch(
            mix_fwd_kernel, (1 + pieces(p.instances + 1, block), 1 + len(rows)), tensors,
            self.weights.nbytes + self.dense.nbytes, EDGES=p.edges, ROWS=p.instances, LAST=p.one, COUNTERS=p.node_jobs,
            OPERATIONS=len(p.spec.operations), PATHS=p.spec.paths, K=p.k, C=p.c, P=padded(p.c), BLOCK=block,
            USES=p.mix_tables["uses_ptr"].shape[1], maxnreg=128,
        )  # fmt: skip

    def preprocess_weights(self, i: int) -> Tensor:
        return self.dense if self.p.preprocess_weight(i)[0] else self.weights

    def preprocess(self, inputs, raw):
        """Raw, not normalized, into raw's slices. Inputs of one shape share a launch."""
        p = self.p
        alike = p.preprocess_shape(0) == p.preprocess_shape(1)
        for group in ((0, 1),) if alike else ((0,), (1,)):
            i, x = group[0], inputs[group[0]]
            jobs = p.cached(("preprocess", group), lambda: [p.preprocess_job(j, j > i) for j in group])
            elements = len(group) * (x.numel() + p.m_in * p.c * p.k)
            count = convolve_fwd(
                x, self.preprocess_weights(i), raw, self.partial, self.opened, jobs, **p.preprocess_shape(i),
                x_row=x.shape[1], out_row=p.c, edge=p.slice_in, shares=p.shares, weight_row=p.c * p.k, edges=p.k,
                moved=self.moved(lambda: elements), other=inputs[group[-1]],
            )  # fmt: skip
            self.left += [(j * p.k + s, count) for j in group for s in range(p.k)]

    def normalize_states(self, raw):
        p = self.p
        launch(
            normalize_fwd_kernel, (tuning.tiles(p.m_in), 2 * p.k),
            {"raw_ptr": raw, "out_ptr": self.space, **self.normalizing}, self.moved(lambda: 4 * p.k * p.m_in * p.c),
            M=p.m_in, SLICE=p.slice_in, first=0, **self.block,
        )  # fmt: skip

    def merge(self, name, group):
        """The statistics of what was launched before."""
        if self.training and self.left:
            jobs = self.p.cached(("merge", name, group), lambda: self.left)
            merge_statistics(self.partial, self.statistics, self.opened, jobs, self.p.shares, self.p.c)
        self.left = []

    def shape(self, group):
        """Of the convolutions of a group's edges."""
        p = self.p
        size = p.inner if group[0] < 2 else p.outer
        return {"n": p.n, "size": size, "out_size": p.outer, "stride": p.spec.stride(group[0]), "c_in": p.c, "c": p.c}

    def first_stages(self, group):
        p = self.p
        table, jobs = p.jobs("first", group, lambda: p.first_stage_jobs(group))
        read = p.m_in if group[0] < 2 else p.m

        def elements():
            opened = [self.count_open(range(job[8], job[8] + job[10])) for job in table]
            return p.c * sum((n > 0) * read + n * p.m for n in opened)

        if not table:
            return
        maps, shape = (self.space, self.dense, self.space, self.partial), self.shape(group)
        common = {
            "x_row": p.c, "out_row": p.c, "edge": p.slice, "shares": p.shares, "edges": max(job[10] for job in table),
            "moved": self.moved(elements),
        }  # fmt: skip
        if shape["stride"] == 1:
            count = rows_fwd(
                *maps, self.normalizing | self.nothing, self.opened, jobs, **self.square, **common, normalize=False
            )  # fmt: skip
        else:
            count = convolve_fwd(*maps, self.opened, jobs, **shape, **common, weight_row=p.c)
        self.left += [(job[8] + e, count) for job in table for e in range(job[10])]

    def poolings(self, group):
        p = self.p
        table, jobs = p.jobs("pool", group, lambda: p.pool_jobs(group))
        if not table:
            return
        read = p.m_in if group[0] < 2 else p.m
        shape = self.shape(group)
        moved = self.moved(lambda: sum(p.c * (read + p.m) for job in table if job[4] < 0 or self.open_on_host[job[4]]))
        count = pool_fwd(
            self.space, self.space, self.index, self.partial, self.opened, jobs, n=p.n, size=shape["size"],
            out_size=p.outer, stride=shape["stride"], x_row=p.c, out_row=p.c, shares=p.shares, c=p.c, moved=moved,
        )  # fmt: skip
        self.left += [(job[4], count) for job in table if job[4] >= 0]

    def second_stages(self, group):
        p = self.p
        table, jobs = p.jobs("second", group, lambda: p.second_stage_jobs(group))
        if table:
            moved = self.moved(lambda: 2 * p.m * p.c * self.count_open(job[8] for job in table))
            count = rows_fwd(
                self.space, self.dense, self.space, self.partial, self.normalizing | self.nothing, self.opened, jobs,
                **self.square, x_row=p.c, out_row=p.c, edge=p.slice, shares=p.shares, edges=1, normalize=True,
                moved=moved,
            )  # fmt: skip
            self.left += [(job[8], count) for job in table]

    @property
    def square(self):
        """Shape of stages of stride 1."""
        return {"n": self.p.n, "size": self.p.outer, "c": self.p.c}

    def node(self, node, out):
        p = self.p
        terms, starts = p.node_terms(node)
        tensors = {
            "work_ptr": self.space, "state_ptr": self.space[p.state(node + 2, 0) :],
            "out_ptr": out[:, node * p.k * p.c :], **self.normalizing, "coefficients_ptr": self.coefficients,
            "terms_ptr": terms, "starts_ptr": starts,
        }  # fmt: skip
        moved = self.moved(lambda: p.m * p.c * (self.count_terms(node, True) + 2 * p.k))
        options = tuning.node(padded(p.c), p.k, self.bytes)
        launch(
            node_fwd_kernel, (pieces(p.m, options["BLOCK"]),), tensors, moved, M=p.m, SLICE=p.slice, K=p.k,
            OUT_ROW=out.shape[1], **(self.block | options),
        )  # fmt: skip

    def count_terms(self, node, with_through):
        count = 0
        for terms in self.p.terms(node):
            for _, row, _ in terms:
                count += self.open_on_host[row] if row < self.p.instances else with_through
        return count
