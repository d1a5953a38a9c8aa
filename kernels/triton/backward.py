"""The backward of a cell: its buffers, and the launches on them."""

import torch
from torch import Tensor

from . import tuning
from .convolution import convolve_dgrad, convolve_wgrad
from .forward import Forward
from .launch import launch, padded, pieces
from .mixture import draw_kernel, mix_bwd_kernel, node_reduce_kernel, state_bwd_kernel
from .packing import collect, contract_kernel, gather_kernel


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
        tiles = tuning.tiles(max(p.m, p.m_in))
        # of nodes and of convolutions; of input states, in tiles of half the size
        shares = max(p.node_jobs * self.parts, 2 * p.edges * len(p.convolutions) * tiles, 2 * 2 * p.k * 2 * tiles)
        self.partial = torch.empty(shares * p.c, device=device)

    @property
    def taking_sums(self) -> dict[str, Tensor]:
        return {"partial_ptr": self.partial, "sums_ptr": self.sums, "counters_ptr": self.work.counters}

    def reduce(self, node: int, with_through: bool):
        """Sums over a node's gradient: all that its normalizations' backward, d_alpha and d_beta need."""
        p, work = self.p, self.work
        rows, entries = p.jobs(("reduce", with_through), node, lambda: p.reduce_entries(node, with_through))
        tensors = {
            "d_ptr": self.nodes, "work_ptr": work.space, **work.normalizing, "coefficients_ptr": work.coefficients,
            **self.taking_sums, "entries_ptr": entries,
        }  # fmt: skip
        moved = work.moved(lambda: p.m * p.c * (work.count_terms(node, with_through) + p.k))
        launch(node_reduce_kernel, (self.parts, len(rows)), tensors, moved, M=p.m, **work.block)

    def draw(self, name, group, make, d, m: int):
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
        options = work.block | tuning.drawing(padded(p.c))
        launch(draw_kernel, (tuning.tiles(m), len(jobs)), tensors, moved, M=m, TRAINING=work.training, **options)

    def group(self, group):
        """From the gradients of the nodes at the edges' ends to that of the group's states."""
        p, work = self.p, self.work
        self.draw("last draw", group, lambda: p.last_draw_jobs(group), self.nodes, p.m)
        jobs, _, *tables = p.jobs("second dgrad", group, lambda: p.second_stage_dgrad_jobs(group))
        if jobs:
            moved = work.moved(lambda: 3 * p.m * p.c * work.count_open(job[4] for job in jobs))
            convolve_dgrad(
                self.raw, work.dense, work.space, self.raw, self.partial, self.sums, *work.normalizing.values(),
                work.opened, work.counters, *tables, **work.second_shape, x_row=p.c, dx_row=p.c, d_row=p.c,
                edge=p.slice, weight_row=p.c, edges=1, normalize=True, moved=moved,
            )  # fmt: skip
            self.draw("first draw", group, lambda: p.first_draw_jobs(group), self.raw, p.m)

        dx, m = (self.states, p.m_in) if group[0] < 2 else (self.dx, p.m)
        jobs, segments, *tables = p.jobs("first dgrad", group, lambda: p.first_stage_dgrad_jobs(group))
        if jobs:

            def elements():
                opened = [work.count_open(range(s[1], s[1] + s[2])) for s in segments]
                return p.c * (sum(opened) * p.m + 2 * len(jobs) * m)

            convolve_dgrad(
                self.raw, work.dense, work.space, dx, self.partial, self.sums, *work.normalizing.values(), work.opened,
                work.counters, *tables, **work.shape(group), x_row=p.c, dx_row=p.c, d_row=p.c, edge=p.slice,
                weight_row=p.c, edges=max(s[2] for s in segments), normalize=False,
                moved=work.moved(elements),
            )  # fmt: skip
        self.state(group, dx)

    def state(self, group, dx):
        """Adds what poolings, the bypass and the cell's output pass back."""
        p, work = self.p, self.work
        jobs, poolings, through, *tables = p.jobs("state", group, lambda: p.state_jobs(group))
        is_node = group[0] >= 2
        m, size = (p.m, p.outer) if is_node else (p.m_in, p.inner)
        tensors = {
            "d_ptr": self.nodes, "dx_ptr": dx, "d_pooled_ptr": self.raw, "index_ptr": work.index, "d_out_ptr": self.out,
            "state_ptr": work.space, "out_ptr": self.nodes if is_node else dx, **self.taking_sums,
            "coefficients_ptr": work.coefficients, "opened_ptr": work.opened, "jobs_ptr": tables[0],
            "poolings_ptr": tables[1], "through_ptr": tables[2],
        }  # fmt: skip

        stride = p.spec.stride(group[0]) if group[0] <= p.nodes else 1
        options = tuning.state_gradient(padded(p.c), work.bytes, stride)

        def elements():
            pools = sum(work.open_on_host[pooling[3]] for pooling in poolings)
            return p.c * (3 * m * len(jobs) + p.m * (pools + len(through)))

        launch(
            state_bwd_kernel, (pieces(m, options["BLOCK"]), len(jobs)), tensors, work.moved(elements), M=m, H=size[0],
            W=size[1], OH=p.outer[0], OW=p.outer[1], SLICE=p.slice,
            D_OUT=(group[0] - 2) * p.k * p.c if is_node else 0, STRIDE=stride, K=p.k, IS_NODE=is_node,
            OUT_ROW=p.nodes * p.k * p.c, **(work.block | options),
        )  # fmt: skip

    def preprocess(self, i: int, x) -> Tensor:
        """Gradient of input i."""
        p, work = self.p, self.work
        d_x, offset = torch.empty_like(x), i * p.k * p.slice_in
        jobs = p.cached(("preprocess dgrad", i), lambda: [[0, 0, 0, 1, 0, 0]])
        segment = [offset, i * p.k, p.k, p.preprocess_weight(i)[1], p.c, *p.preprocess_geometry(i)]
        segments = p.cached(("preprocess segments", i), lambda: [segment])
        convolve_dgrad(
            self.states, work.preprocess_weights(i), x, d_x, self.partial, self.sums, *work.normalizing.values(),
            work.opened, work.counters, jobs, segments, **p.preprocess_shape(i), x_row=x.shape[1], dx_row=x.shape[1],
            d_row=p.c, edge=p.slice_in, weight_row=p.k * p.c, edges=p.k, normalize=False,
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
            tensors = (buffer[start:], *work.normalizing.values(), work.opened)
            if isinstance(which, str):
                i = int(which[-1])
                x, geometry = inputs[i], p.preprocess_geometry(i)
                job = [0, i * p.k * p.slice_in, i * p.k, p.k, *geometry, 0, 0]
                jobs = p.cached(("preprocess wgrad", i), lambda job=job: [job])
                moved = work.moved(lambda x=x: x.numel() + p.k * p.m_in * c)
                convolve_wgrad(
                    self.states, x, *tensors, jobs, **p.preprocess_shape(i), **common, x_row=x.shape[1],
                    edge=p.slice_in, edges=p.k, taps=geometry[0], normalize=False, moved=moved,
                )  # fmt: skip
                continue
            if which == 0:
                rows, jobs = p.jobs("first wgrad", sources, lambda s=sources: p.first_stage_wgrad_jobs(s))
                shape, read = work.shape(sources), p.m_in if sources[0] < 2 else p.m
            else:
                rows, jobs = p.jobs("second wgrad", sources, p.second_stage_wgrad_jobs)
                shape, read = work.second_shape, p.m

            def elements(rows=rows, read=read):
                opened = [work.count_open(range(job[2], job[2] + job[3])) for job in rows]
                return c * sum((n > 0) * read + n * p.m for n in opened)

            convolve_wgrad(
                self.raw, work.space, *tensors, jobs, **shape, **common, x_row=c, edge=p.slice,
                edges=max(job[3] for job in rows), taps=max(job[4] for job in rows), normalize=which == 1,
                moved=work.moved(elements),
            )  # fmt: skip

        gradient = torch.empty_like(work.weights)
        tensors = {"dense_ptr": buffer, "out_ptr": gradient}
        collect(buffer, buffer, *p.jobs("collect", (), p.collect_jobs))
        rows, jobs = p.jobs("contract", (), p.contract_jobs)
        if rows:
            launch(
                contract_kernel, (len(rows),), tensors | {"weights_ptr": work.weights, "jobs_ptr": jobs}, 0, C=c,
                P=padded(c),
            )  # fmt: skip
        rows, jobs = p.jobs("gather", (), p.gather_jobs)
        largest = max(job[2] * job[3] * job[4] for job in rows)
        launch(gather_kernel, (pieces(largest, 256), len(rows)), tensors | {"jobs_ptr": jobs}, 0, C=c, BLOCK=256)
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
