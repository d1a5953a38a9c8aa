"""The backward of a cell: its buffers, and the launches on them."""

import torch
from torch import Tensor

from . import tuning
from .convolution import convolve_dgrad, convolve_wgrad
from .forward import Forward
from .launch import launch, padded
from .mixture import TOGETHER, mix_bwd_kernel, node_reduce_kernel, normalize_bwd_kernel
from .packing import collect, unpack
from .rows import rows_dgrad, rows_tiles
from .rows_wgrad import rows_wgrad
from .states import state_bwd_kernel
from .statistics import merge_sums


class Backward:
    """A cell's buffers in one backward, and the launches on them. out: of the cell's output, a row a pixel."""

    def __init__(self, work: Forward, out: Tensor):
        p = self.p = work.p
        self.work, self.out, device = work, out, p.device
        self.nodes = torch.empty(p.nodes * p.k * p.slice, dtype=work.dtype, device=device)
        self.raw = torch.empty((p.instances - 2 * p.k) * p.slice, dtype=work.dtype, device=device)
        self.states = torch.empty(2 * p.k * p.slice_in, dtype=work.dtype, device=device)
        self.dx = torch.empty(p.k * p.slice, dtype=work.dtype, device=device)  # of convolutions that leave a node
        self.sums = torch.empty(p.sums, p.c, device=device)
        self.parts = min(tuning.tiles(p.m), 64)
        # of nodes; of second stages; of input states
        between = len(p.between(range(p.nodes + 1)))
        nodes = p.reduced_together * (1 + TOGETHER.value) * self.parts
        shares = max(nodes, 2 * between * p.shares, 2 * 2 * p.k * self.state_tiles((0, 1))[0])
        self.partial = torch.empty(shares * p.c, device=device)

    def reduce(self, node: int, with_through: bool):
        """Sums over a node's gradient: all that its normalizations' backward, d_alpha and d_beta need."""
        p, work = self.p, self.work
        table, _, groups, entries = p.jobs(("reduce", with_through), node, lambda: p.reduce_entries(node, with_through))
        tensors = {
            "d_ptr": self.nodes, "work_ptr": work.space, **work.normalizing, "coefficients_ptr": work.coefficients,
            "partial_ptr": self.partial, "sums_ptr": self.sums, "counters_ptr": work.counters, "groups_ptr": groups,
            "entries_ptr": entries,
        }  # fmt: skip
        moved = work.moved(lambda: p.m * p.c * (work.count_terms(node, with_through) + p.k))
        options = work.block | tuning.reducing(padded(p.c), work.bytes)
        launch(node_reduce_kernel, (self.parts, len(table)), tensors, moved, M=p.m, **options)

    def normalize(self, name, group, make, d, m: int):
        """Backward of normalizations, into self.raw, or in place for input states."""
        p, work = self.p, self.work
        jobs, _, job_table, part_table = p.jobs(name, group, make)
        if not jobs:
            return
        tensors = {
            "d_ptr": d, "raw_ptr": work.space, "out_ptr": self.states if d is self.states else self.raw,
            **work.normalizing, "coefficients_ptr": work.coefficients, "sums_ptr": self.sums,
            "opened_ptr": work.opened, "jobs_ptr": job_table, "parts_ptr": part_table,
        }  # fmt: skip
        moved = work.moved(lambda: m * p.c * sum(2 + job[6] for job in jobs if work.open_on_host[job[4]]))
        options = work.block | tuning.normalize_backward(padded(p.c), work.bytes)
        launch(
            normalize_bwd_kernel, (tuning.tiles(m), len(jobs)), tensors, moved, M=m, TRAINING=work.training, **options
        )

    def group(self, group):
        """From the gradients of the nodes at the edges' ends to that of the group's states."""
        p, work = self.p, self.work
        self.normalize("last normalize", group, lambda: p.last_normalize_bwd_jobs(group), self.nodes, p.m)
        jobs, _, *tables = p.jobs("second dgrad", group, lambda: p.second_stage_dgrad_jobs(group))
        if jobs:
            moved = work.moved(lambda: 3 * p.m * p.c * work.count_open(job[4] for job in jobs))
            shares = rows_dgrad(
                self.raw, work.dense, work.space, self.raw, self.partial, work.normalizing, work.opened, *tables,
                **work.square, stride=1, x_row=p.c, dx_row=p.c, d_row=p.c, edge=p.slice, edges=1, normalize=True,
                moved=moved,
            )  # fmt: skip
            self.merge(("second dgrad", group), [[job[5], job[4]] for job in jobs], shares)
            self.normalize("first normalize", group, lambda: p.first_normalize_bwd_jobs(group), self.raw, p.m)

        dx, m = (self.states, p.m_in) if group[0] < 2 else (self.dx, p.m)
        jobs, segments, *tables = p.jobs("first dgrad", group, lambda: p.first_stage_dgrad_jobs(group))
        if jobs:

            def elements():
                opened = [work.count_open(range(s[1], s[1] + s[2])) for s in segments]
                return p.c * (sum(opened) * p.m + 2 * len(jobs) * m)

            shape = work.shape(group)
            rows_dgrad(
                self.raw, work.dense, work.space, dx, self.partial, work.normalizing, work.opened, *tables, n=p.n,
                size=shape["size"], stride=shape["stride"], c=p.c, x_row=p.c, dx_row=p.c, d_row=p.c, edge=p.slice,
                edges=max(s[2] for s in segments), normalize=False, moved=work.moved(elements),
            )  # fmt: skip
        self.state(group, dx)

    def merge(self, name, jobs, shares: int):
        """Sums of which the launch before left shares. jobs: as merge_sums_kernel's."""
        table = self.p.cached(("merge", name), lambda: jobs)
        merge_sums(self.partial, self.sums, self.work.opened, table, shares, self.p.c)

    def state_tiles(self, group) -> tuple[int, dict]:
        """Tiles of the gradient of a group's states, and options."""
        p = self.p
        stride, size = (p.spec.stride(0), p.inner) if group[0] < 2 else (1, p.outer)
        options = tuning.state_gradient(padded(p.c), self.work.bytes, stride)
        return rows_tiles(p.n, size, options), options | {"STRIDE": stride, "H": size[0], "W": size[1]}

    def state(self, group, dx):
        """Adds what poolings, the bypass and the cell's output pass back."""
        p, work = self.p, self.work
        jobs, poolings, through, *tables = p.jobs("state", group, lambda: p.state_jobs(group))
        is_node = group[0] >= 2
        m = p.m if is_node else p.m_in
        tensors = {
            "d_ptr": self.nodes, "dx_ptr": dx, "d_pooled_ptr": self.raw, "index_ptr": work.index, "d_out_ptr": self.out,
            "state_ptr": work.space, "out_ptr": self.nodes if is_node else dx, "partial_ptr": self.partial,
            "coefficients_ptr": work.coefficients, "opened_ptr": work.opened, "jobs_ptr": tables[0],
            "poolings_ptr": tables[1], "through_ptr": tables[2],
        }  # fmt: skip

        def elements():
            pools = sum(work.open_on_host[pooling[3]] for pooling in poolings)
            return p.c * (3 * m * len(jobs) + p.m * (pools + len(through)))

        tiles, options = self.state_tiles(group)
        launch(
            state_bwd_kernel, (tiles, len(jobs)), tensors, work.moved(elements), IMAGES=p.n, OH=p.outer[0],
            OW=p.outer[1], SLICE=p.slice, D_OUT=(group[0] - 2) * p.k * p.c if is_node else 0, K=p.k, IS_NODE=is_node,
            OUT_ROW=p.nodes * p.k * p.c, **(work.block | options),
        )  # fmt: skip
        if not is_node:
            self.merge("states", [[job[9], i] for i, job in enumerate(jobs)], tiles)

    def preprocess(self, i: int, x) -> Tensor:
        """Gradient of input i."""
        p, work = self.p, self.work
        d_x, offset = torch.empty_like(x), i * p.k * p.slice_in
        jobs = p.cached(("preprocess dgrad", i), lambda: [[0, 0, 0, 1, 0, 0]])
        segment = [offset, i * p.k, p.k, p.preprocess_weight(i)[1], p.c, *p.preprocess_geometry(i)]
        segments = p.cached(("preprocess segments", i), lambda: [segment])
        convolve_dgrad(
            self.states, work.preprocess_weights(i), x, d_x, work.opened, jobs, segments, **p.preprocess_shape(i),
            x_row=x.shape[1], dx_row=x.shape[1], d_row=p.c, edge=p.slice_in, weight_row=p.k * p.c, edges=p.k,
            moved=work.moved(lambda: 2 * x.numel() + p.k * p.m_in * p.c),
        )  # fmt: skip
        return d_x

    def weights(self, inputs) -> Tensor:
        """Of all packed weights, end to end."""
        p, work, c = self.p, self.work, self.p.c
        launches, size = p.weight_gradients
        buffer = torch.empty(size, device=p.device)
        for which, sources, parts, distance, start in launches:
            common = {"d_row": c, "parts": parts, "distance": distance}
            if isinstance(which, str):
                i = int(which[-1])
                x, geometry = inputs[i], p.preprocess_geometry(i)
                job = [0, i * p.k * p.slice_in, i * p.k, p.k, *geometry, 0, 0]
                jobs = p.cached(("preprocess wgrad", i), lambda job=job: [job])
                moved = work.moved(lambda x=x: x.numel() + p.k * p.m_in * c)
                convolve_wgrad(
                    self.states, x, buffer[start:], work.opened, jobs, **p.preprocess_shape(i), **common,
                    x_row=x.shape[1], edge=p.slice_in, edges=p.k, taps=geometry[0], moved=moved,
                )  # fmt: skip
                continue
            if which == 0:
                table, jobs = p.jobs("first wgrad", sources, lambda s=sources: p.first_stage_wgrad_jobs(s))
                read = p.m_in if sources[0] < 2 else p.m
            else:
                table, jobs = p.jobs("second wgrad", sources, p.second_stage_wgrad_jobs)
                read = p.m

            def elements(table=table, read=read):
                opened = [work.count_open(range(job[2], job[2] + job[3])) for job in table]
                return c * sum((n > 0) * read + n * p.m for n in opened)

            edges = max(job[3] for job in table)
            common |= {"x_row": c, "edge": p.slice, "edges": edges, "moved": work.moved(elements)}
            shape = work.shape(sources)
            if which == 0 and shape["stride"] == 2:
                convolve_wgrad(
                    self.raw, work.space, buffer[start:], work.opened, jobs, **shape, **common,
                    taps=max(job[4] for job in table),
                )  # fmt: skip
            else:
                rows_wgrad(
                    self.raw, work.space, buffer[start:], work.normalizing | work.nothing, work.opened, jobs,
                    **work.square, **common, side=max(job[5] for job in table), normalize=which == 1,
                )  # fmt: skip

        gradient = torch.empty_like(work.weights)
        collect(buffer, buffer, *p.jobs("collect", (), p.collect_jobs))
        unpack(buffer, work.weights, gradient, p.cached("unpack", lambda: p.contract_jobs() + p.gather_jobs()), c)
        return gradient

    def mix(self, alpha, beta):
        """Gradients of alpha and beta."""
        p, work = self.p, self.work
        d_alpha, d_beta = torch.empty_like(alpha), torch.empty_like(beta)
        tensors = {"sums_ptr": self.sums, "alpha_ptr": alpha, "beta_ptr": beta, "gates_ptr": work.gates}
        tensors |= {key: value for key, value in p.mix_tables.items() if key != "uses_ptr"}
        tensors |= {"summed_ptr": p.cached("summed", p.summed), "d_alpha_ptr": d_alpha, "d_beta_ptr": d_beta}
        launch(
            mix_bwd_kernel, (p.edges,), tensors, 0, OPERATIONS=len(p.spec.operations), PATHS=p.spec.paths, K=p.k, C=p.c,
            P=padded(p.c),
        )  # fmt: skip
        return d_alpha, d_beta
