"""A cell of the supernet as one autograd function: the order in which the kernels run, forward and backward.

Forward, group by group of source states (both inputs together, then node by node): first stages and poolings of all
edges that leave the group, second stages, and the node that is then complete. Backward, the same way back.
"""

import torch
from torch import Tensor

from .. import Statistics
from ..spec import EPSILON, CellSpec
from . import tuning
from .convolution import convolve_dgrad, convolve_fwd, convolve_wgrad
from .launch import is_counting, launch, padded, pieces
from .mixture import (
    draw_kernel,
    fold_kernel,
    mix_bwd_kernel,
    mix_fwd_kernel,
    node_fwd_kernel,
    node_reduce_kernel,
    normalize_fwd_kernel,
    state_bwd_kernel,
)
from .plan import Plan, plan
from .pools import pool_fwd_kernel
from .statistics import contract_kernel, expand_kernel, finalize_kernel, sum_parts_kernel

BLOCK = tuning.STATISTICS_BLOCK


class _Work:
    """A cell's buffers in one forward, and the launches on them. What backward needs stays here."""

    def __init__(self, p: Plan, dtype: torch.dtype, gates: Tensor):
        self.p, self.dtype, device = p, dtype, p.device
        self.gates = gates
        self.space = torch.empty(p.workspace, dtype=dtype, device=device)
        self.index = torch.empty(p.index_size, dtype=torch.uint8, device=device)
        self.mean, self.inverse = (torch.empty(p.instances + 1, p.c, device=device) for _ in range(2))
        self.opened = torch.empty(p.instances, dtype=torch.int32, device=device)
        self.coefficients = torch.empty(p.one + 1, device=device)
        self.partial = torch.empty(p.instances * pieces(max(p.m, p.m_in), BLOCK) * 2 * p.c, device=device)
        self.dense_at, size = {}, 0  # offset of each convolution's dense weights
        for v in p.convolutions:
            self.dense_at[v.name] = size
            size += p.edges * v.taps * p.c * p.c
        self.dense_size = size
        self.dense = torch.empty(size, dtype=dtype, device=device)
        self.open_on_host = None
        if is_counting():
            flat = [value != 0 for row in gates.tolist() for value in row] if gates.device.type == "cpu" else None
            self.open_on_host = p.open_instances(flat)
        self.bytes = {torch.float32: 4, torch.bfloat16: 2}[dtype]
        self.block = {"C": p.c, "P": padded(p.c), "BLOCK": BLOCK}

    # Counting ---------------------------------------------------------------------------------------------------------

    def count_open(self, instances) -> int:
        return sum(self.open_on_host[i] for i in instances)

    def moved(self, elements) -> float:
        """elements: a function, called only when launches are counted; returns what open paths read and write."""
        return elements() * self.bytes if self.open_on_host is not None else 0

    # Forward ----------------------------------------------------------------------------------------------------------

    def mix(self, alpha, beta):
        p = self.p
        tensors = {"alpha_ptr": alpha, "beta_ptr": beta, "gates_ptr": self.gates, **p.mix_tables}
        tensors |= {"coefficients_ptr": self.coefficients, "opened_ptr": self.opened}
        tensors |= {"mean_ptr": self.mean, "inverse_ptr": self.inverse}
        block = padded(p.edges)
        launch(
            mix_fwd_kernel, (1 + pieces(p.instances, block),), tensors, 0, EDGES=p.edges, ROWS=p.instances, LAST=p.one,
            OPERATIONS=len(p.spec.operations), PATHS=p.spec.paths, K=p.k, C=p.c, P=padded(p.c), BLOCK=block,
            USES=p.mix_tables["uses_ptr"].shape[1],
        )  # fmt: skip

    def expand(self, weights):
        p, c = self.p, self.p.c
        for v in p.convolutions:
            out = self.dense[self.dense_at[v.name] :]
            if v.skew:  # a factorized reduction: even pixels make the first channels, odd ones the others
                even, odd = weights[f"{v.name}_even"], weights[f"{v.name}_odd"]
                rows = len(even)
                dense = out[: rows * 2 * c * c].view(rows, 2, c, c).zero_()
                dense[:, 0, :, : even.shape[2]] = even
                dense[:, 1, :, even.shape[2] :] = odd
                continue
            tensors = {"depthwise_ptr": weights[v.depthwise], "pointwise_ptr": weights[v.pointwise], "out_ptr": out}
            launch(expand_kernel, (p.edges,), tensors, 0, TAPS=v.taps, C=c, P=padded(c))

    def finalize(self, instances, m, variance):
        rows = self.p.cached(("rows", tuple(instances)), lambda: instances)
        tensors = {
            "partial_ptr": self.partial, "mean_ptr": self.mean, "inverse_ptr": self.inverse, "variance_ptr": variance,
            "opened_ptr": self.opened, "rows_ptr": rows,
        }  # fmt: skip
        tiles = pieces(m, BLOCK)
        moved = self.moved(lambda: 0) + len(instances) * tiles * 2 * self.p.c * 4
        launch(
            finalize_kernel, (len(instances),), tensors, moved, M=m, TILES=tiles, EPSILON=EPSILON, C=self.p.c,
            P=padded(self.p.c), TILE=BLOCK, BLOCK=32,
        )  # fmt: skip

    def preprocess(self, i, x, weight, raw, training):
        """Raw, not normalized, into raw's slices. weight: (taps * C_in, C) or (C_in, C)."""
        p = self.p
        jobs = p.cached(("preprocess", i), lambda: [p.preprocess_job(i)])
        convolve_fwd(
            x, weight, raw, self.partial, self.mean, self.inverse, self.opened, jobs, **p.preprocess_shape(i),
            x_row=x.shape[1], out_row=p.c, edge=p.slice_in, weight_row=p.c * p.k, edges=p.k, normalize=False,
            statistics=training, block=BLOCK, moved=self.moved(lambda: x.numel() + p.m_in * p.c * p.k),
        )  # fmt: skip

    def normalize_states(self, raw):
        p = self.p
        tensors = {"raw_ptr": raw, "out_ptr": self.space, "mean_ptr": self.mean, "inverse_ptr": self.inverse}
        launch(
            normalize_fwd_kernel, (pieces(p.m_in, BLOCK), 2 * p.k), tensors,
            self.moved(lambda: 4 * p.k * p.m_in * p.c), M=p.m_in, SLICE=p.slice_in, first=0, **self.block,
        )  # fmt: skip

    def shape(self, group):
        """Of the convolutions of a group's edges."""
        p = self.p
        size = p.inner if group[0] < 2 else p.outer
        return {"n": p.n, "size": size, "out_size": p.outer, "stride": p.spec.stride(group[0]), "c_in": p.c, "c": p.c}

    def first_stages(self, group, training):
        p = self.p
        rows, jobs = p.jobs("first", group, lambda: p.first_stage_jobs(group, self.dense_at))
        read = p.m_in if group[0] < 2 else p.m

        def elements():
            opened = [self.count_open(range(job[8], job[8] + job[10])) for job in rows]
            return p.c * sum((n > 0) * read + n * p.m for n in opened)

        if rows:
            convolve_fwd(
                self.space, self.dense, self.space, self.partial, self.mean, self.inverse, self.opened, jobs,
                **self.shape(group), x_row=p.c, out_row=p.c, edge=p.slice, weight_row=p.c,
                edges=max(job[10] for job in rows), normalize=False, statistics=training, block=BLOCK,
                moved=self.moved(elements),
            )  # fmt: skip

    def poolings(self, group, training):
        p = self.p
        rows, jobs = p.jobs("pool", group, lambda: p.pool_jobs(group))
        if not rows:
            return
        size, read = (p.inner, p.m_in) if group[0] < 2 else (p.outer, p.m)
        tensors = {
            "x_ptr": self.space, "out_ptr": self.space, "index_ptr": self.index, "partial_ptr": self.partial,
            "opened_ptr": self.opened, "jobs_ptr": jobs,
        }  # fmt: skip
        moved = self.moved(lambda: sum(p.c * (read + p.m) for job in rows if job[4] < 0 or self.open_on_host[job[4]]))
        launch(
            pool_fwd_kernel, (pieces(p.m, BLOCK), len(rows)), tensors, moved, M=p.m, H=size[0], W=size[1],
            OH=p.outer[0], OW=p.outer[1], STRIDE=p.spec.stride(group[0]), X_ROW=p.c, OUT_ROW=p.c, STATISTICS=training,
            **self.block,
        )  # fmt: skip

    def second_stages(self, group, training):
        p = self.p
        rows, jobs = p.jobs("second", group, lambda: p.second_stage_jobs(group, self.dense_at))
        if rows:
            moved = self.moved(lambda: 2 * p.m * p.c * self.count_open(job[8] for job in rows))
            convolve_fwd(
                self.space, self.dense, self.space, self.partial, self.mean, self.inverse, self.opened, jobs,
                **self.second_shape, x_row=p.c, out_row=p.c, edge=p.slice, weight_row=p.c, edges=1, normalize=True,
                statistics=training, block=BLOCK, moved=moved,
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
            "out_ptr": out[:, node * p.k * p.c :], "mean_ptr": self.mean, "inverse_ptr": self.inverse,
            "coefficients_ptr": self.coefficients, "terms_ptr": terms, "starts_ptr": starts,
        }  # fmt: skip
        moved = self.moved(lambda: p.m * p.c * (self.count_terms(node, True) + 2 * p.k))
        launch(
            node_fwd_kernel, (pieces(p.m, BLOCK), p.k), tensors, moved, M=p.m, SLICE=p.slice, K=p.k,
            OUT_ROW=out.shape[1], **self.block,
        )  # fmt: skip

    def count_terms(self, node, with_through):
        count = 0
        for terms in self.p.terms(node):
            for _, row, _ in terms:
                count += self.open_on_host[row] if row < self.p.instances else with_through
        return count


def _forward(spec: CellSpec, inputs, alpha, beta, gates, weights, statistics):
    """Returns (output (N, nodes*C, H', W') channels_last, work, (mean, variance) of the batch)."""
    dtype, device = inputs[0].dtype, inputs[0].device
    sizes = [tuple(x.shape[2:]) for x in inputs]
    p = plan(spec, inputs[0].shape[0], spec_inner(spec, sizes), device)
    work = _Work(p, dtype, gates)
    training = statistics is None
    variance = torch.empty(p.instances, p.c, device=device)
    work.mix(alpha, beta)
    if not training:
        work.mean[: p.instances] = statistics[0]
        work.inverse[: p.instances] = (statistics[1] + EPSILON).rsqrt()
    work.expand(weights)

    raw = torch.empty(2 * p.k * p.slice_in, dtype=dtype, device=device)
    work.preprocess_weights = [preprocess_weight(spec, i, weights) for i in range(2)]
    for i, x in enumerate(inputs):
        work.preprocess(i, x, work.preprocess_weights[i], raw, training)
    if training:
        work.finalize(list(range(2 * p.k)), p.m_in, variance)
    work.normalize_states(raw)
    del raw

    height, width = p.outer
    out = torch.empty(
        p.n, p.nodes * p.k * p.c, height, width, dtype=dtype, device=device, memory_format=torch.channels_last
    )
    flat = out.permute(0, 2, 3, 1).reshape(-1, out.shape[1])
    for group in p.groups:
        work.first_stages(group, training)
        work.poolings(group, training)
        known = p.instances_of(group, 0)
        if training and known:
            work.finalize(known, p.m, variance)
        work.second_stages(group, training)
        known = p.instances_of(group, 1)
        if training and known:
            work.finalize(known, p.m, variance)
        work.node(group[-1] - 1, flat)
    return out, work, variance


def preprocess_weight(spec: CellSpec, i: int, weights) -> Tensor:
    """(taps * C_i, C)."""
    if i == 0 and spec.factorized_input:
        return torch.block_diag(weights["preprocess0_even"], weights["preprocess0_odd"])
    return weights[f"preprocess{i}"]


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
    """A cell's buffers in one backward, and the launches on them."""

    def __init__(self, work: _Work, training: bool):
        p = self.p = work.p
        self.work, self.training, device = work, training, p.device
        self.nodes = torch.empty(p.nodes * p.k * p.slice, dtype=work.dtype, device=device)
        self.raw = torch.empty((p.instances - 2 * p.k) * p.slice, dtype=work.dtype, device=device)
        self.states = torch.empty(2 * p.k * p.slice_in, dtype=work.dtype, device=device)
        self.dx = torch.empty(p.k * p.slice, dtype=work.dtype, device=device)  # of convolutions that leave a node
        # rows that nothing adds to stay 0: operations without a gradient of their own
        self.sums = torch.zeros(p.sums, p.c, device=device)
        self.partial = torch.empty(p.instances * pieces(max(p.m, p.m_in), BLOCK) * 2 * p.c, device=device)
        self.parts = min(pieces(p.m, BLOCK), 64)
        self.reduced = torch.empty((p.node_sums + p.nodes * p.k) * self.parts * p.c, device=device)

    def reduce(self, node: int, with_through: bool):
        """Sums over a node's gradient: all that its normalizations' backward, d_alpha and d_beta need."""
        p, work = self.p, self.work
        rows, entries = p.jobs(("reduce", with_through), node, lambda: p.reduce_entries(node, with_through))
        tensors = {
            "d_ptr": self.nodes, "work_ptr": work.space, "mean_ptr": work.mean, "inverse_ptr": work.inverse,
            "coefficients_ptr": work.coefficients, "partial_ptr": self.reduced, "entries_ptr": entries,
        }  # fmt: skip
        moved = work.moved(lambda: p.m * p.c * (work.count_terms(node, with_through) + p.k))
        launch(node_reduce_kernel, (self.parts, len(rows)), tensors, moved, M=p.m, **work.block)
        places = [row[4] for row in rows]
        self.fold(self.reduced, ("reduce", node, with_through), places, places, self.parts, 1)

    def fold(self, partial, key, rows, places, parts, width):
        p = self.p
        tensors = {"partial_ptr": partial, "sums_ptr": self.sums}
        tensors |= {
            "rows_ptr": p.cached((*key, "to"), lambda: rows),
            "from_ptr": p.cached((*key, "from"), lambda: places),
        }
        moved = len(rows) * parts * width * p.c * 4
        launch(
            fold_kernel, (len(rows), width), tensors, moved, PARTS=parts, WIDTH=width, C=p.c, P=padded(p.c), BLOCK=32
        )

    def fold_instances(self, instances, m: int, key):
        """Sums of (d, d * normalized) that a data gradient left."""
        rows = [self.p.instance_sums + 2 * instance for instance in instances]
        self.fold(self.partial, key, rows, instances, pieces(m, BLOCK), 2)

    def draw(self, name, group, make, d, m: int):
        """Backward of normalizations, into self.raw, or in place for what lies elsewhere."""
        p, work = self.p, self.work
        jobs, _, job_table, part_table = p.jobs(name, group, make)
        if not jobs:
            return
        tensors = {
            "d_ptr": d, "raw_ptr": work.space, "out_ptr": self.states if d is self.states else self.raw,
            "mean_ptr": work.mean, "inverse_ptr": work.inverse, "coefficients_ptr": work.coefficients,
            "sums_ptr": self.sums, "opened_ptr": work.opened, "jobs_ptr": job_table, "parts_ptr": part_table,
        }  # fmt: skip
        moved = work.moved(lambda: m * p.c * sum(2 + job[6] for job in jobs if work.open_on_host[job[4]]))
        launch(draw_kernel, (pieces(m, BLOCK), len(jobs)), tensors, moved, M=m, TRAINING=self.training, **work.block)

    def group(self, group):
        """From the gradients of the nodes at the edges' ends to that of the group's states."""
        p, work = self.p, self.work
        self.draw("last draw", group, lambda: p.last_draw_jobs(group), self.nodes, p.m)
        jobs, segments, job_table, segment_table = p.jobs(
            "second dgrad", group, lambda: p.second_stage_dgrad_jobs(group, work.dense_at)
        )
        if jobs:
            moved = work.moved(lambda: 3 * p.m * p.c * work.count_open(job[5] for job in jobs))
            convolve_dgrad(
                self.raw, work.dense, work.space, self.raw, self.partial, work.mean, work.inverse, work.opened,
                job_table, segment_table, **work.second_shape, x_row=p.c, dx_row=p.c, d_row=p.c, edge=p.slice,
                weight_row=p.c, edges=1, normalize=True, block=BLOCK, moved=moved,
            )  # fmt: skip
            self.fold_instances(p.between(group), p.m, ("between", group))
            self.draw("first draw", group, lambda: p.first_draw_jobs(group), self.raw, p.m)

        dx = self.states if group[0] < 2 else self.dx
        jobs, segments, job_table, segment_table = p.jobs(
            "first dgrad", group, lambda: p.first_stage_dgrad_jobs(group, work.dense_at)
        )
        m = p.m_in if group[0] < 2 else p.m
        if jobs:

            def elements():
                opened = [work.count_open(range(s[1], s[1] + s[2])) for s in segments]
                return p.c * (sum(opened) * p.m + 2 * len(jobs) * m)

            convolve_dgrad(
                self.raw, work.dense, work.space, dx, self.partial, work.mean, work.inverse, work.opened, job_table,
                segment_table, **work.shape(group), x_row=p.c, dx_row=p.c, d_row=p.c, edge=p.slice, weight_row=p.c,
                edges=max(s[2] for s in segments), normalize=False, block=BLOCK, moved=work.moved(elements),
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
            "state_ptr": work.space, "out_ptr": self.nodes if is_node else dx, "partial_ptr": self.partial,
            "coefficients_ptr": work.coefficients, "opened_ptr": work.opened, "jobs_ptr": tables[0],
            "poolings_ptr": tables[1], "through_ptr": tables[2],
        }  # fmt: skip

        def elements():
            pools = sum(work.open_on_host[pooling[3]] for pooling in poolings)
            return p.c * (3 * m * len(jobs) + p.m * (pools + len(through)))

        launch(
            state_bwd_kernel, (pieces(m, BLOCK), len(jobs)), tensors, work.moved(elements), M=m, H=size[0], W=size[1],
            OH=p.outer[0], OW=p.outer[1], SLICE=p.slice, D_OUT=(group[0] - 2) * p.k * p.c if is_node else 0,
            STRIDE=p.spec.stride(group[0]) if group[0] <= p.nodes else 1, K=p.k, IS_NODE=is_node,
            OUT_ROW=p.nodes * p.k * p.c, **work.block,
        )  # fmt: skip

    def stage_weights(self, weights) -> dict[str, Tensor]:
        """Gradients of all packed weights but the preprocessing's."""
        p, work, c = self.p, self.work, self.p.c
        gradients = {}
        strided = [source for source in (0, 1) if p.strided]
        plain = [source for source in range(p.nodes + 1) if source not in strided]
        for stage in (0, 1):
            convolutions = [v for v in p.convolutions if v.stage == stage]
            if not convolutions:
                continue
            at, total = {}, 0
            for v in convolutions:
                at[v.name] = total
                total += p.edges * v.taps * c * c
            taps = max(v.taps for v in convolutions)
            partials = []
            for sources in (strided, plain) if stage == 0 else (plain,):
                if not sources:
                    continue
                key = tuple(sources)
                if stage == 0:
                    rows, jobs = p.jobs("first wgrad", key, lambda: p.first_stage_wgrad_jobs(sources, at))
                    shape, edges = work.shape((sources[0],)), max(job[3] for job in rows)
                else:
                    rows, jobs = p.jobs("second wgrad", key, lambda: p.second_stage_wgrad_jobs(at))
                    shape, edges = work.second_shape, 1
                read = p.m_in if sources[0] < 2 else p.m

                def elements(rows=rows, read=read):
                    opened = [work.count_open(range(job[2], job[2] + job[3])) for job in rows]
                    return c * sum((n > 0) * read + n * p.m for n in opened)

                partial = convolve_wgrad(
                    self.raw, work.space, work.mean, work.inverse, work.opened, jobs, total, **shape, x_row=c, d_row=c,
                    edge=p.slice, edges=edges, taps=taps, normalize=stage == 1, moved=work.moved(elements),
                )  # fmt: skip
                partials.append((range(0, p.edges) if stage else p.rows_of(sources), partial))
            for v in convolutions:
                gradients |= self.contract(v, at[v.name], partials, weights)
        return gradients

    def contract(self, v, start: int, partials, weights) -> dict[str, Tensor]:
        """From the gradient of a convolution's dense weights to those of its packed ones. partials: [(edge rows, partial)]."""
        p, c = self.p, self.p.c
        if v.skew:
            _, partial = partials[0]
            even, odd = weights[f"{v.name}_even"], weights[f"{v.name}_odd"]
            size = len(even) * 2 * c * c
            dense = torch.empty(size, dtype=torch.float32, device=p.device)
            self.sum_parts(partial, start, size, dense)
            dense = dense.view(-1, 2, c, c)
            half = even.shape[2]
            return {f"{v.name}_even": dense[:, 0, :, :half], f"{v.name}_odd": dense[:, 1, :, half:]}
        depthwise, pointwise = weights[v.depthwise], weights[v.pointwise]
        d_depthwise, d_pointwise = torch.empty_like(depthwise), torch.empty_like(pointwise)
        for rows, partial in partials:
            part = slice(rows.start, rows.stop)
            tensors = {
                "partial_ptr": partial, "depthwise_ptr": depthwise[part], "pointwise_ptr": pointwise[part],
                "d_depthwise_ptr": d_depthwise[part], "d_pointwise_ptr": d_pointwise[part],
            }  # fmt: skip
            parts, total = partial.shape
            launch(
                contract_kernel, (len(rows),), tensors, parts * len(rows) * v.taps * c * c * 4, TAPS=v.taps, PARTS=parts,
                TOTAL=total, START=start + rows.start * v.taps * c * c, C=c, P=padded(c),
            )  # fmt: skip
        return {v.depthwise: d_depthwise, v.pointwise: d_pointwise}

    def sum_parts(self, partial, start: int, size: int, out):
        parts, width = partial.shape
        launch(
            sum_parts_kernel, (pieces(size, 256),), {"partial_ptr": partial, "out_ptr": out}, parts * size * 4,
            WIDTH=width, PARTS=parts, START=start, SIZE=size, BLOCK=256, BLOCK_PARTS=16,
        )  # fmt: skip

    def preprocess(self, i: int, x, need_x: bool, need_weight: bool):
        """Returns (gradient of input i or None, of its weights by name)."""
        p, work = self.p, self.work
        shape = p.preprocess_shape(i)
        geometry, first = p.preprocess_geometry(i), i * p.k
        taps, weight = geometry[0], work.preprocess_weights[i]
        moved = work.moved(lambda: x.numel() + p.k * p.m_in * p.c)
        d_x, gradients = None, {}
        offset = i * p.k * p.slice_in
        common = {"edge": p.slice_in, "edges": p.k, "x_row": x.shape[1], "d_row": p.c, "normalize": False}
        if need_x:
            d_x = torch.empty_like(x)
            jobs = p.cached(("preprocess dgrad", i), lambda: [[0, 0, 0, 1, 0, 0]])
            segments = p.cached(
                ("preprocess segments", i), lambda: [[offset, first, p.k, 0, p.c, *p.preprocess_geometry(i)]]
            )
            convolve_dgrad(
                self.states, weight, x, d_x, self.partial, work.mean, work.inverse, work.opened, jobs, segments, **shape,
                **common, dx_row=x.shape[1], weight_row=p.k * p.c, block=BLOCK, moved=2 * moved,
            )  # fmt: skip
        if need_weight:
            jobs = p.cached(("preprocess wgrad", i), lambda: [[0, offset, first, p.k, *geometry, 0, 0]])
            size = taps * shape["c_in"] * p.k * p.c
            partial = convolve_wgrad(
                self.states, x, work.mean, work.inverse, work.opened, jobs, size, **shape, **common, taps=taps,
                moved=moved,
            )  # fmt: skip
            dense = torch.empty(size, dtype=torch.float32, device=p.device)
            self.sum_parts(partial, 0, size, dense)
            dense = dense.view(p.k, taps, -1, p.c).permute(1, 2, 0, 3).flatten(2)  # (taps, C_in, C)
            if taps == 2:
                half = dense.shape[2] // 2
                gradients = {"preprocess0_even": dense[0, :, :half], "preprocess0_odd": dense[1, :, half:]}
            else:
                gradients = {f"preprocess{i}": dense[0]}
        return d_x, gradients

    def mix(self, alpha, beta):
        """Gradients of alpha and beta."""
        p, work = self.p, self.work
        d_alpha, d_beta = torch.empty_like(alpha), torch.empty_like(beta)
        tables = {key: value for key, value in p.mix_tables.items() if key != "uses_ptr"}
        tensors = {"sums_ptr": self.sums, "alpha_ptr": alpha, "beta_ptr": beta, "gates_ptr": work.gates, **tables}
        launch(
            mix_bwd_kernel, (p.edges,), tensors | {"d_alpha_ptr": d_alpha, "d_beta_ptr": d_beta}, 0,
            OPERATIONS=len(p.spec.operations), PATHS=p.spec.paths, K=p.k, C=p.c, P=padded(p.c),
        )  # fmt: skip
        return d_alpha, d_beta


class _Cell(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, gates, statistics, x0, x1, alpha, beta, *weights):
        named = dict(zip(spec.parameters, weights))
        out, work, variance = _forward(spec, (x0, x1), alpha, beta, gates, named, statistics)
        ctx.save_for_backward(x0, x1, alpha, beta, *weights)
        ctx.spec, ctx.work, ctx.training = spec, work, statistics is None
        mean, updated = work.mean[:-1], work.opened[:, None].float()
        ctx.mark_non_differentiable(mean, variance, updated)
        return out, mean, variance, updated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, *_):
        x0, x1, alpha, beta, *weights = ctx.saved_tensors
        spec, p, weights = ctx.spec, ctx.work.p, dict(zip(ctx.spec.parameters, weights))
        need_x, need_mix, need = ctx.needs_input_grad[3:5], ctx.needs_input_grad[5:7], ctx.needs_input_grad[7:]
        gradients = _Gradients(ctx.work, ctx.training)
        d_out = d_out.to(ctx.work.dtype).contiguous(memory_format=torch.channels_last)
        gradients.out = d_out.permute(0, 2, 3, 1).reshape(-1, d_out.shape[1])
        for node in reversed(range(p.nodes)):
            if node == p.nodes - 1:
                gradients.state((p.nodes + 1,), gradients.dx)
            else:
                gradients.group((node + 2,))
            gradients.reduce(node, any(need_mix))
        found, d_inputs = {}, [None, None]
        if any(need) or any(need_x):
            gradients.group((0, 1))
            gradients.fold_instances(range(2 * p.k), p.m_in, ("states",))
            gradients.draw("states", (0, 1), p.state_draw_jobs, gradients.states, p.m_in)
            if any(need):
                found = gradients.stage_weights(weights)
            for i, x in enumerate((x0, x1)):
                wanted = any(n for name, n in zip(spec.parameters, need) if name.startswith(f"preprocess{i}"))
                d_inputs[i], more = gradients.preprocess(i, x, need_x[i], wanted)
                found |= more
        d_alpha, d_beta = gradients.mix(alpha, beta) if any(need_mix) else (None, None)
        return None, None, None, *d_inputs, d_alpha, d_beta, *(found.get(name) for name in spec.parameters)


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
