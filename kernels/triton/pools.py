"""3x3 poolings and the 2x2 maxima of the bypass, forward; their backward is part of the state's gradient (node.py)."""

import triton.language as tl

from .convolution import position
from .launch import kernel
from .statistics import leave_statistics

MAXIMUM, AVERAGE, BYPASS = 0, 1, 2  # mode of a job


@kernel
def pool_fwd_kernel(
    x_ptr, out_ptr, index_ptr, partial_ptr, opened_ptr, jobs_ptr, M, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, SHARES, STRIDE: tl.constexpr, X_ROW: tl.constexpr, OUT_ROW: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, jobs). A job: x offset, out offset, index offset, mode, instance (-1: always open, no statistics).
    index: which tap held the maximum, the first of equals, uint8. Statistics as the convolution's.
    """
    tile, jobs_ptr = tl.program_id(0), jobs_ptr + tl.program_id(1) * 5
    mode, instance = tl.load(jobs_ptr + 3), tl.load(jobs_ptr + 4).to(tl.int32)
    if instance >= 0:
        if tl.load(opened_ptr + instance) == 0:
            return
    x_ptr += tl.multiple_of(tl.load(jobs_ptr), 8)
    rows, c = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, P)
    inside = rows < M
    n, oy, ox = position(rows, OH, OW)
    size = tl.where(mode == 2, 2, 3)
    pad = tl.where(mode == 2, 0, 1)
    largest = tl.full([BLOCK, P], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK, P], tl.int32)
    total = tl.zeros([BLOCK, P], tl.float32)
    taken = tl.zeros([BLOCK], tl.float32)
    for tap in range(0, size * size):
        y, x = oy * STRIDE + tap // size - pad, ox * STRIDE + tap % size - pad
        loaded = inside & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        where = ((n * H + y) * W + x) * X_ROW
        value = tl.load(x_ptr + where[:, None] + c[None, :], mask=loaded[:, None] & (c < C)[None, :], other=0.0)
        value = value.to(tl.float32)
        total += value
        taken += loaded.to(tl.float32)
        larger = loaded[:, None] & ((value > largest) | (value != value))  # NaN is not to be lost
        largest = tl.where(larger, value, largest)
        index = tl.where(larger, tap, index)
    out = tl.where(mode == 1, total / tl.maximum(taken, 1.0)[:, None], largest)
    mask = inside[:, None] & (c < C)[None, :]
    stored = tl.where(mask, out, 0.0).to(out_ptr.dtype.element_ty)
    where = rows.to(tl.int64)[:, None]
    out_ptr += tl.multiple_of(tl.load(jobs_ptr + 1), 8)
    tl.store(out_ptr + where * OUT_ROW + c[None, :], stored, mask=mask)
    if mode != 1:
        index_ptr += tl.load(jobs_ptr + 2)
        tl.store(index_ptr + where * C + c[None, :], index.to(tl.uint8), mask=mask)
    if instance >= 0:
        value = stored.to(tl.float32)
        count = tl.minimum(M - tile * BLOCK, BLOCK).to(tl.float32)
        sums = tl.sum(value, 0)
        away = tl.where(mask, value - (sums / count)[None, :], 0.0)
        leave_statistics(
            partial_ptr, tile, count, sums, tl.sum(away * away, 0), instance + c * 0, c, c < C, SHARES, C
        )  # fmt: skip
