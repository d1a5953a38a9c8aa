"""The forward of a derived cell: its buffers, and the launches on them."""

import torch

from ..spec import EPSILON
from . import tuning
from .depthwise import arrange_kernel, depthwise_fwd_kernel
from .derived_plan import NOWHERE, DerivedPlan
from .join import join_fwd_kernel
from .launch import TRITON_DTYPE, dot_options, launch, pieces
from .pointwise import pointwise_fwd_kernel
from .rows import rows_tiles


class DerivedForward:
    """A cell's buffers in one forward, and the launches on them. What backward needs stays here."""

    def __init__(self, p: DerivedPlan, dtype: torch.dtype, weights: dict, path_scales, statistics):
        self.p, self.dtype, self.training, device = p, dtype, statistics is None, p.device
        ordered = sorted(p.at, key=p.at.get)
        self.params = torch.cat([weights[name].reshape(-1) for name in ordered])
        self.arranged = torch.empty(max(p.arranged, 1), device=device)
        self.space = torch.empty(p.space, dtype=dtype, device=device)
        self.index = torch.empty(max(p.indices, 1), dtype=torch.uint8, device=device)
        if self.training:
            self.mean, self.inverse, self.variance = (torch.empty(p.rows, p.c, device=device) for _ in range(3))
        else:
            self.mean, self.variance = (table.float().contiguous() for table in statistics)
            self.inverse = (self.variance + EPSILON).rsqrt()
        self.drop = path_scales is not None
        self.scales = path_scales.float().contiguous() if self.drop else self.params
        self.counters = torch.zeros(p.counters, dtype=torch.int32, device=device)
        self.options = tuning.derived(p.c)
        self.blocks = pieces(p.c, self.options["COLUMNS"])
        self.bytes = dtype.itemsize

    # --- What launches have in common ---

    @property
    def normalizing(self):
        return {"params_ptr": self.params, "mean_ptr": self.mean, "inverse_ptr": self.inverse}

    def sizes(self, stride: int, size=None) -> dict:
        """Runtime arguments of a kernel. size: (H, W) of its maps before the stride, the cell's own if not given."""
        height, width = size or (self.p.inner if stride == 2 else self.p.outer)
        return {"H": height, "W": width, "OH": height // stride, "OW": width // stride}

    def halved(self, stride: int) -> int:
        """Outputs of a pointwise product, at most; with stride 2 those of half a factorized reduction."""
        return self.p.c - self.p.c // 2 if stride == 2 else self.p.c

    def partial(self, elements: int):
        return torch.empty(elements, device=self.p.device)

    def moved(self, elements: float) -> float:
        return elements * self.bytes

    # --- Forward ---

    def arrange(self):
        p = self.p
        rows, jobs = p.table("arrange", p.arrange_jobs)
        if rows:
            launch(
                arrange_kernel, (pieces(max(row[1] for row in rows) * p.c, 256), len(rows)),
                {"params_ptr": self.params, "out_ptr": self.arranged, "jobs_ptr": jobs}, 2 * self.arranged.nbytes,
                C=p.c, BLOCK=256,
            )  # fmt: skip

    def pointwise(self, key, make, x, c_in: int, stride: int, size, activate: bool):
        """size: (H, W) of x; with stride 2 halves of factorized reductions."""
        p = self.p
        rows, jobs = p.table(key, make)
        if not rows:
            return
        wide, options = self.halved(stride), dot_options(self.dtype)
        options |= tuning.pointwise(c_in, wide, options["PRECISION"], self.bytes)
        m, blocks = p.n * (size[0] // stride) * (size[1] // stride), pieces(wide, options["COLUMNS"])
        tiles = pieces(m, options["BLOCK"])
        partial = self.partial(p.rows * tiles * 2 * p.c if self.training else 1)
        tensors = {
            "x_ptr": x, "params_ptr": self.params, "out_ptr": self.space, "partial_ptr": partial, "mean_ptr": self.mean,
            "inverse_ptr": self.inverse, "variance_ptr": self.variance, "counters_ptr": self.counters, "jobs_ptr": jobs,
        }  # fmt: skip
        launch(
            pointwise_fwd_kernel, (tiles, len(rows), blocks), tensors,
            self.moved(len(rows) * m * (c_in + p.c / stride)), M=m, **self.sizes(stride, size), ROWS=p.rows,
            EPSILON=EPSILON, STRIDE=stride, C_IN=c_in, C=p.c, HALF=p.c // stride, ACTIVATE=activate,
            STATISTICS=self.training, WEIGHT_ALIGN=p.weight_align, DTYPE=TRITON_DTYPE[self.dtype], **options,
        )  # fmt: skip

    def preprocess(self, i: int, x):
        p, (raw, row) = self.p, self.p.states[i]
        reduction = p.preprocess(i)
        size = tuple(x.shape[2:])
        if reduction:
            make = lambda: p.halves_jobs([reduction])  # noqa: E731
        else:
            make = lambda: [[0, NOWHERE, p.at[f"preprocess{i}.1.weight"], 0, raw, row]]  # noqa: E731
        self.pointwise(("preprocess", i), make, x, x.shape[1], 2 if reduction else 1, size, True)

    def depthwise(self, key, convolutions, stride: int):
        p = self.p
        rows, jobs = p.table(key, lambda: p.depthwise_jobs(convolutions))
        if not rows:
            return
        tensors = {"x_ptr": self.space, "weight_ptr": self.arranged, **self.normalizing, "out_ptr": self.space}
        options = tuning.depthwise(p.c, self.bytes)
        launch(
            depthwise_fwd_kernel, (rows_tiles(p.n, p.outer, options), len(rows), self.blocks),
            tensors | {"jobs_ptr": jobs}, self.moved(len(rows) * p.c * p.m * (1 + stride * stride)), IMAGES=p.n,
            **self.sizes(stride), ROWS=p.rows, STRIDE=stride, C=p.c, **options,
        )  # fmt: skip

    def level(self, level: int, out):
        p = self.p
        stages = p.of_level(p.convolutions, level)
        firsts, seconds = [v for v in stages if v.source != NOWHERE], [v for v in stages if v.source == NOWHERE]
        for stride in (1, 2):
            self.depthwise(("first", stride, level), [v for v in firsts if v.stride == stride], stride)
        self.pointwise(("first pointwise", level), lambda: p.pointwise_jobs(firsts), self.space, p.c, 1, p.outer, False)
        reductions = p.of_level(p.reductions, level)
        self.pointwise(("halves", level), lambda: p.halves_jobs(reductions), self.space, p.c, 2, p.inner, True)
        self.depthwise(("second", level), seconds, 1)
        self.pointwise(
            ("second pointwise", level), lambda: p.pointwise_jobs(seconds), self.space, p.c, 1, p.outer, False
        )
        self.join(level, out)

    def join(self, level: int, out):
        p = self.p
        rows, jobs = p.table(("join", level), lambda: p.join_jobs(level))
        terms = [row[at : at + 6] for row in rows for at in (2, 8)]
        elements = sum(p.m * (term[5] ** 2 if term[0] else 1) for term in terms)
        elements += sum(p.m * ((row[0] >= 0) + (row[1] >= 0)) for row in rows)
        tensors = {
            "x_ptr": self.space, **self.normalizing, "scales_ptr": self.scales, "index_ptr": self.index, "out_ptr": out,
            "state_ptr": self.space, "jobs_ptr": jobs,
        }  # fmt: skip
        launch(
            join_fwd_kernel, (pieces(p.m, self.options["BLOCK"]), len(rows), self.blocks), tensors,
            self.moved(elements * p.c) + p.m * p.c * sum(term[0] == 1 for term in terms), M=p.m, OH=p.outer[0],
            OW=p.outer[1], IMAGES=p.n, ROWS=p.rows, C=p.c, OUT_ROW=p.out_row,
            POOLED=any(term[0] != 0 for term in terms), DROP=self.drop, ALIGN=p.align, **self.options,
        )  # fmt: skip
