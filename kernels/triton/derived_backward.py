"""The backward of a derived cell: its buffers, and the launches on them."""

import torch

from . import tuning
from .depthwise import depthwise_wgrad_kernel, source_bwd_kernel
from .derived_forward import DerivedForward
from .derived_plan import NOWHERE, Factorized
from .join import join_reduce_kernel
from .launch import TRITON_DTYPE, dot_options, launch, pieces
from .packing import collect
from .pointwise import pointwise_dgrad_kernel, pointwise_wgrad_kernel
from .rows import rows_tiles


class DerivedBackward:
    """A cell's buffers in one backward, and the launches on them. d_out: of the cell's output, channels_last."""

    def __init__(self, work: DerivedForward, d_out):
        self.work, self.p, self.d_out = work, work.p, d_out
        self.d = torch.empty(self.p.d_space, dtype=work.dtype, device=self.p.device)
        self.flat = torch.empty(self.p.params, device=self.p.device)  # of all weights, as they lie in params

    @property
    def incoming(self):
        return {"d_ptr": self.d, "d_out_ptr": self.d_out}

    @property
    def arriving(self):
        """Arguments of a kernel that reads the gradients of normalized outputs."""
        p, work = self.p, self.work
        return {"IMAGES": p.n, "ROWS": p.rows, "C": p.c, "OUT_ROW": p.out_row, "DROP": work.drop, "ALIGN": p.align}

    def reduce(self, level: int):
        p, work = self.p, self.work
        rows, jobs = p.table(("reduce", level), lambda: p.reduce_jobs(level))
        if not rows:
            return
        parts = min(pieces(p.m, work.options["BLOCK"]), 64)
        tensors = {
            **self.incoming, "raw_ptr": work.space, "mean_ptr": work.mean, "inverse_ptr": work.inverse,
            "scales_ptr": work.scales, "partial_ptr": work.partial(len(rows) * parts * 2 * p.c),
            "gradient_ptr": self.flat, "counters_ptr": work.counters, "jobs_ptr": jobs,
        }  # fmt: skip
        launch(
            join_reduce_kernel, (parts, len(rows), work.blocks), tensors, work.moved(2 * len(rows) * p.m * p.c), M=p.m,
            OH=p.outer[0], OW=p.outer[1], **self.arriving, **work.options,
        )  # fmt: skip

    def pointwise(self, key, make, x, out, c_in: int, stride: int, size, activated: bool):
        """Gradient of what pointwise convolutions read, size its (H, W)."""
        p, work = self.p, self.work
        rows, jobs = p.table(key, make)
        if not rows:
            return
        m, options = p.n * size[0] * size[1], dot_options(work.dtype)
        options |= tuning.pointwise(work.halved(stride), c_in, options["PRECISION"], work.bytes)
        tensors = {
            **self.incoming, "raw_ptr": work.space, "x_ptr": x, **work.normalizing, "gradient_ptr": self.flat,
            "scales_ptr": work.scales, "out_ptr": out, "jobs_ptr": jobs,
        }  # fmt: skip
        elements = len(rows) * m * (2 * p.c / stride**2 + c_in * (1 + activated))
        launch(
            pointwise_dgrad_kernel, (pieces(m, options["BLOCK"]), len(rows), pieces(c_in, options["COLUMNS"])), tensors,
            work.moved(elements), M=m, **work.sizes(stride, size), **self.arriving, STRIDE=stride, C_IN=c_in,
            HALF=p.c // stride, ACTIVATED=activated, TRAINING=work.training, WEIGHT_ALIGN=p.weight_align,
            DTYPE=TRITON_DTYPE[work.dtype], **options,
        )  # fmt: skip

    def source(self, key, make, stride: int, size, normalize: bool):
        """Gradients of maps that edges leave."""
        p, work = self.p, self.work
        (rows, jobs), (segment_rows, segments), (other_rows, others) = p.tables(key, make)
        if not rows:
            return
        m, options = p.n * size[0] * size[1], tuning.source_gradient(p.c, work.bytes, stride)
        tiles = rows_tiles(p.n, size, options)
        partial = work.partial(len(rows) * tiles * 2 * p.c if normalize else 1)
        pooled = [row for row in other_rows if row[0] != 0]
        maps = 2 * len(rows) * m + len(segment_rows) * p.m + (len(other_rows) - len(pooled)) * m + len(pooled) * p.m
        tensors = {
            **self.incoming, "x_ptr": work.space, "weight_ptr": work.arranged, **work.normalizing,
            "index_ptr": work.index, "scales_ptr": work.scales, "out_ptr": self.d, "partial_ptr": partial,
            "gradient_ptr": self.flat, "counters_ptr": work.counters, "jobs_ptr": jobs, "segments_ptr": segments,
            "others_ptr": others,
        }  # fmt: skip
        launch(
            source_bwd_kernel, (tiles, len(rows), work.blocks), tensors,
            work.moved(maps * p.c) + p.m * p.c * sum(row[0] == 1 for row in other_rows), **work.sizes(stride, size),
            **self.arriving, STRIDE=stride, NORMALIZE=normalize, POOLED=bool(pooled), **options,
        )  # fmt: skip

    def level(self, level: int):
        p, work = self.p, self.work
        states = tuple(
            node + 2 for node in p.levels[level] if node + 2 in p.spec.live and p.d_states[node + 2] != NOWHERE
        )
        self.source(("nodes", level), lambda: p.state_jobs(states), 1, p.outer, False)
        self.reduce(level)
        stages = p.of_level(p.convolutions, level, True)
        ends, seconds = [v for v in stages if v.last], [v for v in stages if v.source == NOWHERE]
        firsts = [v for v in stages if not v.last]
        self.hidden(("ends", level), ends)
        reductions = p.of_level(p.reductions, level, True)
        self.pointwise(
            ("halves dgrad", level), lambda: p.halves_dgrad_jobs(reductions), work.space, self.d, p.c, 2, p.inner, True
        )
        self.source(("between", level), lambda: p.between_jobs(seconds, firsts), 1, p.outer, True)
        self.hidden(("firsts", level), firsts)

    def hidden(self, key, convolutions):
        """Of depthwise outputs."""
        p = self.p
        make = lambda: p.pointwise_dgrad_jobs(convolutions)  # noqa: E731
        self.pointwise(key, make, self.work.space, self.d, p.c, 1, p.outer, False)

    def states(self):
        """Of both input states."""
        p = self.p
        states = tuple(state for state in (0, 1) if state in p.spec.live)
        self.source("states", lambda: p.state_jobs(states), p.stride, p.inner, True)

    def preprocess(self, i: int, x):
        """Gradient of input i."""
        p, d_x, size = self.p, torch.empty_like(x), tuple(x.shape[2:])
        reduction, (raw, row) = p.preprocess(i), p.states[i]
        weights = reduction.halves if reduction else (p.at[f"preprocess{i}.1.weight"], 0)
        make = lambda: [[1, p.d_states[i], NOWHERE, raw, row, *weights, 0, 0, NOWHERE]]  # noqa: E731
        self.pointwise(("preprocess dgrad", i), make, x, d_x, x.shape[1], 2 if reduction else 1, size, True)
        return d_x

    # --- Weights ---

    def weights(self, inputs):
        """Gradients of all convolutions, into self.flat: first parts of their sums, then the sums of these."""
        p, work, launches = self.p, self.work, []
        places, end = [], 0  # rows of collect's table

        def add(convolution, *arguments):
            nonlocal end
            run, sizes = convolution(*arguments, end)
            launches.append(run)
            places.extend(sizes)
            start, size, parts, _, _ = places[-1]
            end = start + size * parts

        live = [v for v in p.convolutions if v.edge // 2 + 2 in p.spec.live]
        for stride in (1, 2):
            found = [v for v in live if v.stride == stride]
            if found:
                add(self.depthwise_weights, found, stride)
        rows = [[*p.arriving(v), v.raw, v.row, v.hidden, NOWHERE, 0, v.pointwise, p.c] for v in live]
        if rows:
            add(self.pointwise_weights, "stages", rows, work.space, p.c, 1, p.outer, False)
        halves = [(v, half) for v in p.reductions if v.edge // 2 + 2 in p.spec.live for half in (0, 1)]
        rows = [self._half(v, half, p.arriving(v)) for v, half in halves]
        if rows:
            add(self.pointwise_weights, "halves", rows, work.space, p.c, 2, p.inner, True)
        for i, x in enumerate(inputs):
            if i in p.spec.live:
                reduction, arriving, (raw, row) = p.preprocess(i), [1, p.d_states[i], NOWHERE], p.states[i]
                if reduction:
                    rows = [self._half(reduction, half, arriving) for half in (0, 1)]
                else:
                    rows = [[*arriving, raw, row, 0, NOWHERE, 0, p.at[f"preprocess{i}.1.weight"], p.c]]
                stride, size = 2 if reduction else 1, tuple(x.shape[2:])
                add(self.pointwise_weights, f"preprocess{i}", rows, x, x.shape[1], stride, size, True)

        partial = work.partial(end)
        for run in launches:
            run(partial)
        _, jobs = p.table(("collect", tuple(map(tuple, places))), lambda: places)
        collect(partial, self.flat, places, jobs)

    def _half(self, v: Factorized, half: int, arriving):
        width = self.p.c // 2 if half == 0 else self.p.c - self.p.c // 2
        return [*arriving, v.raw, v.row, *v.x, half, v.halves[half], width]

    def depthwise_weights(self, convolutions, stride: int, start: int):
        """What launches, given the buffer of all partial sums, and rows of collect's table; start: in the buffer."""
        p, work = self.p, self.work
        side, options = max(v.side for v in convolutions), tuning.depthwise(p.c, work.bytes)
        parts = pieces(2 * tuning.KNOBS["programs"], len(convolutions) * work.blocks * side)
        parts = min(rows_tiles(p.n, p.outer, options), parts)
        places = []
        for v in convolutions:
            places.append([start, v.side**2 * p.c, parts, v.depthwise_at, v.side**2 * p.c])
            start += parts * v.side**2 * p.c

        def run(partial):
            rows = [[*v.x, v.d_hidden, v.side, v.dilation, place[0]] for v, place in zip(convolutions, places)]
            _, jobs = p.table(("depthwise wgrad", stride, places[0][0], parts), lambda: rows)
            tensors = {"d_ptr": self.d, "x_ptr": work.space, **work.normalizing, "partial_ptr": partial}
            launch(
                depthwise_wgrad_kernel, (parts, len(rows), side * work.blocks), tensors | {"jobs_ptr": jobs},
                work.moved(len(rows) * p.c * p.m * (1 + stride**2)), IMAGES=p.n, **work.sizes(stride), ROWS=p.rows,
                STRIDE=stride, SIDE=side, C=p.c, **options,
            )  # fmt: skip

        return run, places

    def pointwise_weights(self, name, found, x, c_in: int, stride: int, size, activate: bool, start: int):
        """As depthwise_weights. found: rows of jobs with the weight's offset and outputs for the partial offset."""
        p, work = self.p, self.work
        m, options = p.n * (size[0] // stride) * (size[1] // stride), dot_options(work.dtype)
        options |= tuning.pointwise_weight_gradient(work.halved(stride), c_in, options["PRECISION"], work.bytes)
        blocks = pieces(work.halved(stride), options["OUTPUTS"]) * pieces(c_in, options["INPUTS"])
        parts = min(pieces(m, options["BLOCK"]), pieces(tuning.KNOBS["programs"], len(found) * blocks))
        places, rows = [], []
        for *row, at, width in found:
            places.append([start, width * c_in, parts, at, width * c_in])
            rows.append([*row, start])
            start += parts * width * c_in

        def run(partial):
            _, jobs = p.table(("pointwise wgrad", name, rows[0][-1], parts), lambda: rows)
            tensors = {
                **self.incoming, "raw_ptr": work.space, "x_ptr": x, **work.normalizing, "gradient_ptr": self.flat,
                "scales_ptr": work.scales, "partial_ptr": partial, "jobs_ptr": jobs,
            }  # fmt: skip
            launch(
                pointwise_wgrad_kernel, (parts, len(found), blocks), tensors,
                work.moved(len(found) * m * (2 * p.c / stride + c_in)), M=m, **work.sizes(stride, size),
                **self.arriving, STRIDE=stride, C_IN=c_in, HALF=p.c // stride, ACTIVATE=activate,
                TRAINING=work.training, DTYPE=TRITON_DTYPE[work.dtype], **options,
            )  # fmt: skip

        return run, places
