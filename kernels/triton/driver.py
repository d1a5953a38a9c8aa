"""A cell of the supernet as one autograd function: the order in which the kernels run, forward and backward.

Forward, group by group of source states (both inputs together, then node by node): first stages and poolings of all
edges that leave the group, second stages, and the node that is then complete. Backward, the same way back.
"""

import math

import torch
from torch import Tensor

from .. import Statistics
from ..spec import EPSILON, CellSpec
from . import tuning
from .convolution import convolve_dgrad, convolve_fwd, convolve_wgrad
from .launch import is_counting, launch, padded, pieces
from .mixture import (
    draw_kernel,
    mix_bwd_kernel,
    mix_fwd_kernel,
    node_fwd_kernel,
    node_reduce_kernel,
    normalize_fwd_kernel,
    state_bwd_kernel,
)
from .packing import contract_kernel, expand_kernel, gather_kernel, halves_kernel
from .plan import Plan, plan
from .pools import pool_fwd_kernel


class _Work:
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
        self.updated = torch.empty(p.instances, 1, device=device)
        self.coefficients = torch.empty(p.one + 1, device=device)
        self.counters = torch.empty(p.counters, dtype=torch.int32, device=device)
        self.partial = torch.empty(p.instances * tuning.tiles(max(p.m, p.m_in)) * 2 * p.c, device=device)
        self.open_on_host = None
        if is_counting():
            flat = [value != 0 for row in gates.tolist() for value in row] if gates.device.type == "cpu" else None
            self.open_on_host = p.open_instances(flat)
        self.bytes = {torch.float32: 4, torch.bfloat16: 2}[dtype]
        self.block = {"C": p.c, "P": padded(p.c), "BLOCK": tuning.block()}

    # Counting ---------------------------------------------------------------------------------------------------------

    def count_open(self, instances) -> int:
        return sum(self.open_on_host[i] for i in instances)

    def moved(self, elements) -> float:
        """elements: a function, called only when launches are counted; returns what open paths read and write."""
        return elements() * self.bytes if self.open_on_host is not None else 0

    # Forward ----------------------------------------------------------------------------------------------------------

    def mix(self, alpha, beta):
        p = self.p
        tensors = {"alpha_ptr": alpha, "beta_ptr": beta, "gates_ptr": self.gates, **p.mix_tables, **self.statistics}
        tensors |= {"coefficients_ptr": self.coefficients, "opened_ptr": self.opened, "updated_ptr": self.updated}
        block = padded(p.edges)
        launch(
            mix_fwd_kernel, (1 + pieces(p.instances + 1, block),), tensors | {"counters_ptr": self.counters}, 0,
            EDGES=p.edges, ROWS=p.instances, LAST=p.one, COUNTERS=p.counters, OPERATIONS=len(p.spec.operations),
            PATHS=p.spec.paths, K=p.k, C=p.c, P=padded(p.c), BLOCK=block, USES=p.mix_tables["uses_ptr"].shape[1],
        )  # fmt: skip

    def expand(self, weights):
        """Packed weights end to end, and the dense ones of the convolutions."""
        p = self.p
        self.weights = torch.cat([weight.reshape(-1) for weight in weights])
        self.dense = torch.empty(p.dense_at["end"], dtype=self.dtype, device=p.device)
        tensors = {"weights_ptr": self.weights, "out_ptr": self.dense}
        rows, jobs = p.jobs("expand", (), p.expand_jobs)
        moved = self.weights.nbytes + self.dense.nbytes
        if rows:
            launch(expand_kernel, (len(rows),), tensors | {"jobs_ptr": jobs}, moved, C=p.c, P=padded(p.c))
        rows, jobs = p.jobs("halves", (), p.halves_jobs)
        if rows:
            largest = max(job[6] * 2 * job[3] * job[5] for job in rows)
            launch(halves_kernel, (pieces(largest, 512), len(rows)), tensors | {"jobs_ptr": jobs}, 0, BLOCK=512)

    def preprocess_weights(self, i: int) -> Tensor:
        return self.dense if self.p.preprocess_weight(i)[0] else self.weights

    def preprocess(self, i, x, raw):
        """Raw, not normalized, into raw's slices."""
        p = self.p
        jobs = p.cached(("preprocess", i), lambda: [p.preprocess_job(i)])
        convolve_fwd(
            x, self.preprocess_weights(i), raw, self.partial, self.statistics, self.opened, self.counters, jobs,
            **p.preprocess_shape(i), x_row=x.shape[1], out_row=p.c, edge=p.slice_in, weight_row=p.c * p.k, edges=p.k,
            normalize=False, training=self.training,
            moved=self.moved(lambda: x.numel() + p.m_in * p.c * p.k),
        )  # fmt: skip

    def normalize_states(self, raw):
        p = self.p
        launch(
            normalize_fwd_kernel, (tuning.tiles(p.m_in), 2 * p.k),
            {"raw_ptr": raw, "out_ptr": self.space, **self.normalizing}, self.moved(lambda: 4 * p.k * p.m_in * p.c),
            M=p.m_in, SLICE=p.slice_in, first=0, **self.block,
        )  # fmt: skip

    def shape(self, group):
        """Of the convolutions of a group's edges."""
        p = self.p
        size = p.inner if group[0] < 2 else p.outer
        return {"n": p.n, "size": size, "out_size": p.outer, "stride": p.spec.stride(group[0]), "c_in": p.c, "c": p.c}

    def first_stages(self, group):
        p = self.p
        rows, jobs = p.jobs("first", group, lambda: p.first_stage_jobs(group))
        read = p.m_in if group[0] < 2 else p.m

        def elements():
            opened = [self.count_open(range(job[8], job[8] + job[10])) for job in rows]
            return p.c * sum((n > 0) * read + n * p.m for n in opened)

        if rows:
            convolve_fwd(
                self.space, self.dense, self.space, self.partial, self.statistics, self.opened, self.counters, jobs,
                **self.shape(group), x_row=p.c, out_row=p.c, edge=p.slice, weight_row=p.c,
                edges=max(job[10] for job in rows), normalize=False, training=self.training,
                moved=self.moved(elements),
            )  # fmt: skip

    def poolings(self, group):
        p = self.p
        rows, jobs = p.jobs("pool", group, lambda: p.pool_jobs(group))
        if not rows:
            return
        size, read = (p.inner, p.m_in) if group[0] < 2 else (p.outer, p.m)
        tensors = {
            "x_ptr": self.space, "out_ptr": self.space, "index_ptr": self.index, "partial_ptr": self.partial,
            **self.statistics, "opened_ptr": self.opened, "counters_ptr": self.counters, "jobs_ptr": jobs,
        }  # fmt: skip
        moved = self.moved(lambda: sum(p.c * (read + p.m) for job in rows if job[4] < 0 or self.open_on_host[job[4]]))
        launch(
            pool_fwd_kernel, (tuning.tiles(p.m), len(rows)), tensors, moved, M=p.m, H=size[0], W=size[1],
            OH=p.outer[0], OW=p.outer[1], EPSILON=EPSILON, STRIDE=p.spec.stride(group[0]), X_ROW=p.c, OUT_ROW=p.c,
            STATISTICS=self.training, **self.block,
        )  # fmt: skip

    def second_stages(self, group):
        p = self.p
        rows, jobs = p.jobs("second", group, lambda: p.second_stage_jobs(group))
        if rows:
            moved = self.moved(lambda: 2 * p.m * p.c * self.count_open(job[8] for job in rows))
            convolve_fwd(
                self.space, self.dense, self.space, self.partial, self.statistics, self.opened, self.counters, jobs,
                **self.second_shape, x_row=p.c, out_row=p.c, edge=p.slice, weight_row=p.c, edges=1, normalize=True,
                training=self.training, moved=moved,
            )  # fmt: skip

    @property
    def second_shape(self):
        p = self.p
        return {"n": p.n, "size": p.outer, "out_size": p.outer, "stride": 1, "c_in": p.c, "c": p.c}

    def node(self, node, out):
        p = self.p
        terms, starts = p.node_terms(node)
        tensors = {
            "work_ptr": self.space, "state_ptr": self.space[p.state(node + 2, 0) :],
            "out_ptr": out[:, node * p.k * p.c :], **self.normalizing, "coefficients_ptr": self.coefficients,
            "terms_ptr": terms, "starts_ptr": starts,
        }  # fmt: skip
        moved = self.moved(lambda: p.m * p.c * (self.count_terms(node, True) + 2 * p.k))
        launch(
            node_fwd_kernel, (tuning.tiles(p.m), p.k), tensors, moved, M=p.m, SLICE=p.slice, K=p.k,
            OUT_ROW=out.shape[1], **self.block,
        )  # fmt: skip

    def count_terms(self, node, with_through):
        count = 0
        for terms in self.p.terms(node):
            for _, row, _ in terms:
                count += self.open_on_host[row] if row < self.p.instances else with_through
        return count


def _forward(spec: CellSpec, inputs, alpha, beta, gates, weights, statistics):
    """Returns (output (N, nodes*C, H', W') channels_last, work)."""
    dtype, device = inputs[0].dtype, inputs[0].device
    sizes = [tuple(x.shape[2:]) for x in inputs]
    p = plan(spec, inputs[0].shape[0], spec_inner(spec, sizes), device)
    work = _Work(p, dtype, gates, statistics is None)
    work.mix(alpha, beta)
    if statistics is not None:
        work.statistics["mean_ptr"][:-1] = statistics[0]
        work.statistics["inverse_ptr"][:-1] = (statistics[1] + EPSILON).rsqrt()
    work.expand(weights)

    raw = torch.empty(2 * p.k * p.slice_in, dtype=dtype, device=device)
    for i, x in enumerate(inputs):
        work.preprocess(i, x, raw)
    work.normalize_states(raw)
    del raw

    height, width = p.outer
    out = torch.empty(
        p.n, p.nodes * p.k * p.c, height, width, dtype=dtype, device=device, memory_format=torch.channels_last
    )
    flat = out.permute(0, 2, 3, 1).reshape(-1, out.shape[1])
    for group in p.groups:
        work.first_stages(group)
        work.poolings(group)
        work.second_stages(group)
        work.node(group[-1] - 1, flat)
    return out, work


def spec_inner(spec: CellSpec, sizes) -> tuple[int, int]:
    """(H, W) of states 0 and 1. Raises ValueError for sizes that do not fit each other or do not halve."""
    for what, size in (("a factorized reduction", sizes[0] if spec.factorized_input else (0, 0)),
                       ("a reduction cell", sizes[1] if spec.reduction else (0, 0))):  # fmt: skip
        if size[0] % 2 or size[1] % 2:
            raise ValueError(
                f"{what} has stride 2 and needs an even size, but its input is {size[0]}x{size[1]}; "
                "use images whose sides every reduction can halve, or fewer cells"
            )
    first = tuple(side // 2 for side in sizes[0]) if spec.factorized_input else sizes[0]
    if first != sizes[1]:
        names = [f"{size[0]}x{size[1]}" for size in sizes]
        raise ValueError(f"the inputs of a cell have sizes {names[0]} and {names[1]}, which do not fit each other")
    return sizes[1]


class _Gradients:
    """A cell's buffers in one backward, and the launches on them. out: of the cell's output, a row a pixel."""

    def __init__(self, work: _Work, out: Tensor):
        p = self.p = work.p
        self.work, self.out, device = work, out, p.device
        self.nodes = torch.empty(p.nodes * p.k * p.slice, dtype=work.dtype, device=device)
        self.raw = torch.empty((p.instances - 2 * p.k) * p.slice, dtype=work.dtype, device=device)
        self.states = torch.empty(2 * p.k * p.slice_in, dtype=work.dtype, device=device)
        self.dx = torch.empty(p.k * p.slice, dtype=work.dtype, device=device)  # of convolutions that leave a node
        self.sums = torch.empty(p.sums, p.c, device=device)
        self.parts = min(tuning.tiles(p.m), 64)
        shares = max(p.counters * self.parts, 2 * p.edges * len(p.convolutions) * tuning.tiles(max(p.m, p.m_in)))
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
        launch(draw_kernel, (tuning.tiles(m), len(jobs)), tensors, moved, M=m, TRAINING=work.training, **work.block)

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

        def elements():
            pools = sum(work.open_on_host[pooling[3]] for pooling in poolings)
            return p.c * (3 * m * len(jobs) + p.m * (pools + len(through)))

        launch(
            state_bwd_kernel, (tuning.tiles(m), len(jobs)), tensors, work.moved(elements), M=m, H=size[0], W=size[1],
            OH=p.outer[0], OW=p.outer[1], SLICE=p.slice, D_OUT=(group[0] - 2) * p.k * p.c if is_node else 0,
            STRIDE=p.spec.stride(group[0]) if group[0] <= p.nodes else 1, K=p.k, IS_NODE=is_node,
            OUT_ROW=p.nodes * p.k * p.c, **work.block,
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
        tensors = {"partial_ptr": buffer, "out_ptr": gradient}
        rows, jobs = p.jobs("contract", (), p.contract_jobs)
        if rows:
            moved = 2 * 4 * c * c * sum(job[2] * job[5] for job in rows)  # written before, read now
            launch(
                contract_kernel, (len(rows),), tensors | {"weights_ptr": work.weights, "jobs_ptr": jobs}, moved, C=c,
                P=padded(c),
            )  # fmt: skip
        rows, jobs = p.jobs("gather", (), p.gather_jobs)
        largest = max(job[4] * job[5] * job[6] for job in rows)
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


class _Cell(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, gates, statistics, x0, x1, alpha, beta, *weights):
        out, work = _forward(spec, (x0, x1), alpha, beta, gates, weights, statistics)
        ctx.save_for_backward(x0, x1, alpha, beta)
        ctx.work, ctx.sizes = work, [weight.shape for weight in weights]
        mean, variance = work.statistics["mean_ptr"][:-1], work.statistics["variance_ptr"]
        ctx.mark_non_differentiable(mean, variance, work.updated)
        ctx.set_materialize_grads(False)
        return out, mean, variance, work.updated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, *_):
        x0, x1, alpha, beta = ctx.saved_tensors
        work, p = ctx.work, ctx.work.p
        need_x, need_mix, need = ctx.needs_input_grad[3:5], ctx.needs_input_grad[5:7], ctx.needs_input_grad[7:]
        d_out = d_out.to(work.dtype).contiguous(memory_format=torch.channels_last)
        gradients = _Gradients(work, d_out.permute(0, 2, 3, 1).reshape(-1, d_out.shape[1]))
        for node in reversed(range(p.nodes)):
            if node == p.nodes - 1:
                gradients.state((p.nodes + 1,), gradients.dx)
            else:
                gradients.group((node + 2,))
            gradients.reduce(node, any(need_mix))
        d_inputs, d_weights, d_mix = [None, None], [None] * len(need), (None, None)
        if any(need) or any(need_x):
            gradients.group((0, 1))
            gradients.draw("states", (0, 1), p.state_draw_jobs, gradients.states, p.m_in)
            d_inputs = [gradients.preprocess(i, x) if need_x[i] else None for i, x in enumerate((x0, x1))]
        if any(need):
            flat = gradients.weights((x0, x1)).split([math.prod(size) for size in ctx.sizes])
            d_weights = [part.view(size) if n else None for part, size, n in zip(flat, ctx.sizes, need)]
        if any(need_mix):
            d_mix = gradients.mix(alpha, beta)
        return None, None, None, *d_inputs, *d_mix, *d_weights


def cell(spec, inputs, weights, operation_weights, edge_weights, gates, statistics=None):
    device, dtype = inputs[0].device, inputs[0].dtype
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"triton kernels compute in float32 or bfloat16, not {dtype}; use --kernels reference")
    inputs = [x.to(dtype).contiguous(memory_format=torch.channels_last) for x in inputs]
    weights = [weights[name].float().contiguous() for name in spec.parameters]
    mixing = (tensor.float().contiguous() for tensor in (operation_weights, edge_weights))
    gates = gates.to(torch.float32).contiguous()
    if device.type != "meta":  # there, gates stay where they can be read, to count what is open
        gates = gates.to(device, non_blocking=True)
    out, mean, variance, updated = _Cell.apply(spec, gates, statistics, *inputs, *mixing, *weights)
    return out, None if statistics is not None else Statistics(mean, variance, updated)
