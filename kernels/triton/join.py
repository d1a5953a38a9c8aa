"""Where the two edges of a derived cell's node end: normalization, drop-path, poolings and identities, and their sum;
and the sums over a node's gradient from which those of its normalizations follow."""

import triton
import triton.language as tl

from .affine import affine, incoming, path_scale
from .convolution import position, within
from .launch import kernel
from .statistics import add_up, finishes_last


@triton.jit
def _pooled(
    x_ptr, index_ptr, mode, stride, mean, scale, shift, n, oy, ox, rows, inside, c, OH, OW, C: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A 3x3 pooling of a normalized map; mode 1: the maxima, and in index which tap held each, the first of equals; 2:
    the averages, without the padding."""
    largest = tl.full([BLOCK, COLUMNS], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK, COLUMNS], tl.int32)
    total, taken = tl.zeros([BLOCK, COLUMNS], tl.float32), tl.zeros([BLOCK], tl.float32)
    for tap in range(0, 9):
        y, x = oy * stride + tap // 3 - 1, ox * stride + tap % 3 - 1
        loaded = inside & within(y, x, OH * stride, OW * stride)
        where = ((n * (OH * stride) + y) * (OW * stride) + x).to(tl.int64) * C
        value = tl.load(x_ptr + where[:, None] + c[None, :], mask=loaded[:, None] & (c < C)[None, :], other=0.0)
        value = (value.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]
        total += tl.where(loaded[:, None], value, 0.0)
        taken += loaded.to(tl.float32)
        larger = loaded[:, None] & ((value > largest) | (value != value))  # NaN is not to be lost
        largest = tl.where(larger, value, largest)
        index = tl.where(larger, tap, index)
    if mode == 1:
        where = (rows.to(tl.int64) * C)[:, None] + c[None, :]
        tl.store(index_ptr + where, index.to(tl.uint8), mask=inside[:, None] & (c < C)[None, :])
    return tl.where(mode == 1, largest, total / tl.maximum(taken, 1.0)[:, None])


@kernel
def join_fwd_kernel(
    x_ptr, params_ptr, mean_ptr, inverse_ptr, scales_ptr, index_ptr, out_ptr, state_ptr, jobs_ptr, M,
    OH: tl.constexpr, OW: tl.constexpr, IMAGES, ROWS, C: tl.constexpr, OUT_ROW: tl.constexpr, POOLED: tl.constexpr,
    DROP: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, nodes, blocks of channels). A job: place in the cell's output (-1: none), state offset (-1: none),
    and of both edges: mode (0: a map as it is, 1: its maxima, 2: its averages), map offset, row of the statistics that
    normalizes it, edge whose samples are scaled (-1: none), index offset, stride.
    """
    jobs_ptr += tl.program_id(1) * 14
    rows, c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside, kept = rows < M, c < C
    mask = inside[:, None] & kept[None, :]
    n, oy, ox = position(rows, OH, OW)
    where = (rows.to(tl.int64) * C)[:, None] + c[None, :]
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for i in tl.static_range(2):
        term = jobs_ptr + 2 + i * 6
        mode, edge = tl.load(term), tl.load(term + 3).to(tl.int32)
        map_ptr = x_ptr + tl.multiple_of(tl.load(term + 1), 8)
        mean, scale, shift = affine(mean_ptr, inverse_ptr, params_ptr, tl.load(term + 2).to(tl.int32), c, kept, ROWS, C)
        value = tl.zeros([BLOCK, COLUMNS], tl.float32)
        if mode == 0:
            value = tl.load(map_ptr + where, mask=mask, other=0.0).to(tl.float32)
            value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
        elif POOLED:
            value = _pooled(
                map_ptr, index_ptr + tl.multiple_of(tl.load(term + 4), 8), mode, tl.load(term + 5).to(tl.int32), mean,
                scale, shift, n, oy, ox, rows, inside, c, OH, OW, C, BLOCK, COLUMNS,
            )  # fmt: skip
        total += value * path_scale(scales_ptr, edge, n, inside, IMAGES, DROP)[:, None]
    place, state = tl.load(jobs_ptr), tl.load(jobs_ptr + 1)
    if place >= 0:
        out_ptr += tl.multiple_of(place, ALIGN)
        out_where = (rows.to(tl.int64) * OUT_ROW)[:, None] + c[None, :]
        tl.store(out_ptr + out_where, total.to(out_ptr.dtype.element_ty), mask=mask)
    if state >= 0:
        tl.store(state_ptr + tl.multiple_of(state, 8) + where, total.to(state_ptr.dtype.element_ty), mask=mask)


@kernel
def join_reduce_kernel(
    d_ptr, d_out_ptr, raw_ptr, mean_ptr, inverse_ptr, scales_ptr, partial_ptr, gradient_ptr, counters_ptr, jobs_ptr,
    M, OH: tl.constexpr, OW: tl.constexpr, IMAGES, ROWS, C: tl.constexpr, OUT_ROW: tl.constexpr, DROP: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of the scale and the shift of normalizations. Grid (parts of the rows, jobs, blocks of channels). A
    job: own, offset of the gradient (see incoming), edge whose samples are scaled, raw offset, row of the statistics.
    """
    part, job, block, parts = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(0)
    jobs_ptr += job * 5
    c = block * COLUMNS + tl.arange(0, COLUMNS)
    kept = c < C
    d_ptr, d_row = incoming(d_ptr, d_out_ptr, jobs_ptr, ALIGN, C, OUT_ROW)
    edge, row = tl.load(jobs_ptr + 2).to(tl.int32), tl.load(jobs_ptr + 4).to(tl.int32)
    raw_ptr += tl.multiple_of(tl.load(jobs_ptr + 3), 8)
    mean = tl.load(mean_ptr + row * C + c, mask=kept, other=0.0)
    inverse = tl.load(inverse_ptr + row * C + c, mask=kept, other=0.0)
    sum_d, sum_dx = tl.zeros([BLOCK, COLUMNS], tl.float32), tl.zeros([BLOCK, COLUMNS], tl.float32)
    for tile in range(part, tl.cdiv(M, BLOCK), parts):
        rows = tile * BLOCK + tl.arange(0, BLOCK)
        inside, where = rows < M, rows.to(tl.int64)
        mask = inside[:, None] & kept[None, :]
        d = tl.load(d_ptr + (where * d_row)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if DROP:
            d *= path_scale(scales_ptr, edge, rows // (OH * OW), inside, IMAGES, DROP)[:, None]
        raw = tl.load(raw_ptr + (where * C)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        sum_d += d
        sum_dx += d * ((raw - mean[None, :]) * inverse[None, :])
    partial_ptr += job * parts * 2 * C
    tl.store(partial_ptr + part * 2 * C + c, tl.sum(sum_d, 0), mask=kept)
    tl.store(partial_ptr + part * 2 * C + C + c, tl.sum(sum_dx, 0), mask=kept)
    if finishes_last(counters_ptr + job * tl.num_programs(2) + block, parts):
        add_up(partial_ptr, gradient_ptr + (ROWS + row) * C, c, kept, parts, 2 * C, 32)
        add_up(partial_ptr + C, gradient_ptr + row * C, c, kept, parts, 2 * C, 32)
