"""Depthwise convolutions of a derived cell, with the normalization and the ReLU before them, and their backward; that
of poolings and identities is in the same kernel, which gathers all that comes back to a state.

Maps are matrices of N*H*W rows of C channels. A program has a tile of rows and a block of COLUMNS channels; a map's
border is zero behind the ReLU, whatever the normalization makes of zero. Gradients are gathered, tap by tap.
"""

import triton
import triton.language as tl

from .affine import activated, affine, incoming, path_scale
from .convolution import position, within
from .launch import kernel
from .statistics import counters_of, take_sums


@kernel
def arrange_kernel(params_ptr, out_ptr, jobs_ptr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Depthwise weights, (C, taps) in params, become (taps, C). Grid (blocks, jobs): offset, taps, out offset."""
    jobs_ptr += tl.program_id(1) * 3
    taps = tl.load(jobs_ptr + 1).to(tl.int32)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(params_ptr + tl.load(jobs_ptr) + (i % C) * taps + i // C, mask=i < taps * C)
    tl.store(out_ptr + tl.load(jobs_ptr + 2) + i, value, mask=i < taps * C)


@kernel
def depthwise_fwd_kernel(
    x_ptr, weight_ptr, params_ptr, mean_ptr, inverse_ptr, out_ptr, jobs_ptr, M, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, ROWS, STRIDE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, jobs, blocks of channels). A job: x offset, its row of the statistics, weight offset, side,
    dilation, out offset."""
    jobs_ptr += tl.program_id(1) * 6
    x_ptr += tl.multiple_of(tl.load(jobs_ptr), 8)
    weight_ptr += tl.multiple_of(tl.load(jobs_ptr + 2), 4)
    side, dilation = tl.load(jobs_ptr + 3).to(tl.int32), tl.load(jobs_ptr + 4).to(tl.int32)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside, kept = rows < M, c < C
    mean, scale, shift = affine(mean_ptr, inverse_ptr, params_ptr, tl.load(jobs_ptr + 1).to(tl.int32), c, kept, ROWS, C)
    n, oy, ox = position(rows, OH, OW)
    pad = dilation * (side - 1) // 2
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for tap in range(0, side * side):
        y, x = oy * STRIDE + tap // side * dilation - pad, ox * STRIDE + tap % side * dilation - pad
        loaded = inside & within(y, x, H, W)
        where = ((n * H + y) * W + x).to(tl.int64) * C
        value = tl.load(x_ptr + where[:, None] + c[None, :], mask=loaded[:, None] & kept[None, :], other=0.0)
        weight = tl.load(weight_ptr + tap * C + c, mask=kept, other=0.0)
        total += tl.where(loaded[:, None], activated(value, mean, scale, shift), 0.0) * weight[None, :]
    where = rows.to(tl.int64) * C
    out_ptr += tl.multiple_of(tl.load(jobs_ptr + 5), 8)
    mask = inside[:, None] & kept[None, :]
    tl.store(out_ptr + where[:, None] + c[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _convolved(
    total, d_ptr, weight_ptr, segment, n, y, x, inside, c, OH, OW, STRIDE: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Adds the gradient that a depthwise convolution passes back: offset of its own, weight offset, side, dilation."""
    d_ptr += tl.multiple_of(tl.load(segment), 8)
    weight_ptr += tl.multiple_of(tl.load(segment + 1), 4)
    side, dilation = tl.load(segment + 2).to(tl.int32), tl.load(segment + 3).to(tl.int32)
    pad = dilation * (side - 1) // 2
    for tap in range(0, side * side):
        top, left = y + pad - tap // side * dilation, x + pad - tap % side * dilation
        loaded = inside
        if STRIDE == 2:
            loaded = loaded & (((top | left) & 1) == 0)
            top, left = top >> 1, left >> 1
        loaded = loaded & within(top, left, OH, OW)
        where = ((n * OH + top) * OW + left).to(tl.int64) * C
        d = tl.load(d_ptr + where[:, None] + c[None, :], mask=loaded[:, None] & (c < C)[None, :], other=0.0)
        weight = tl.load(weight_ptr + tap * C + c, mask=c < C, other=0.0)
        total += d.to(tl.float32) * weight[None, :]
    return total


@triton.jit
def _pooled_back(
    d_ptr, d_row, scales_ptr, edge, index_ptr, mode, n, y, x, inside, c, H, W, OH, OW, IMAGES, STRIDE: tl.constexpr,
    DROP: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient that a 3x3 pooling passes back; mode 1: of maxima, where index says, 2: of averages."""
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    scale = path_scale(scales_ptr, edge, n, inside, IMAGES, DROP)
    for tap in range(0, 9):
        top, left = y + 1 - tap // 3, x + 1 - tap % 3
        loaded = inside
        if STRIDE == 2:
            loaded = loaded & (((top | left) & 1) == 0)
            top, left = top >> 1, left >> 1
        loaded = loaded & within(top, left, OH, OW)
        where = ((n * OH + top) * OW + left).to(tl.int64)
        mask = loaded[:, None] & (c < C)[None, :]
        d = tl.load(d_ptr + (where * d_row)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        share = scale
        if mode == 1:
            largest = tl.load(index_ptr + (where * C)[:, None] + c[None, :], mask=mask, other=255)
            d = tl.where(largest == tap, d, 0.0)
        else:  # of an average the padding does not count
            first, last = tl.maximum(top * STRIDE - 1, 0), tl.minimum(top * STRIDE + 2, H)
            start, end = tl.maximum(left * STRIDE - 1, 0), tl.minimum(left * STRIDE + 2, W)
            share = scale / tl.maximum((last - first) * (end - start), 1).to(tl.float32)
        total += d * share[:, None]
    return total


@kernel
def source_bwd_kernel(
    d_ptr, d_out_ptr, x_ptr, weight_ptr, params_ptr, mean_ptr, inverse_ptr, index_ptr, scales_ptr, out_ptr,
    partial_ptr, gradient_ptr, counters_ptr, jobs_ptr, segments_ptr, others_ptr, M, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, IMAGES, ROWS, STRIDE: tl.constexpr, C: tl.constexpr, OUT_ROW: tl.constexpr,
    NORMALIZE: tl.constexpr, POOLED: tl.constexpr, DROP: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of a map that edges leave, behind its normalization. Grid (tiles, jobs, blocks of channels). A job:
    x offset, row of the statistics, first segment, segments (see _convolved), first of what else passes back, how many,
    out offset. Of these: mode (0: adds as it is, 1: maxima, 2: averages), own, offset (see incoming), edge whose
    samples are scaled, index offset. With NORMALIZE, also the gradients of the normalization's shift and scale, over
    partial[job, tile].
    """
    tile, job, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    jobs_ptr += job * 7
    rows, c = tile * BLOCK + tl.arange(0, BLOCK), block * COLUMNS + tl.arange(0, COLUMNS)
    inside, kept = rows < M, c < C
    mask, where = inside[:, None] & kept[None, :], rows.to(tl.int64)
    n, y, x = position(rows, H, W)
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    first = tl.load(jobs_ptr + 2).to(tl.int32)
    for s in range(first, first + tl.load(jobs_ptr + 3).to(tl.int32)):
        total = _convolved(
            total, d_ptr, weight_ptr, segments_ptr + s * 4, n, y, x, inside, c, OH, OW, STRIDE, C
        )  # fmt: skip
    row = tl.load(jobs_ptr + 1).to(tl.int32)
    mean, scale, shift = affine(mean_ptr, inverse_ptr, params_ptr, row, c, kept, ROWS, C)
    x_ptr += tl.multiple_of(tl.load(jobs_ptr), 8)
    raw = tl.load(x_ptr + (where * C)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    total = tl.where(activated(raw, mean, scale, shift) > 0, total, 0.0)

    first = tl.load(jobs_ptr + 4).to(tl.int32)
    for i in range(first, first + tl.load(jobs_ptr + 5).to(tl.int32)):
        other = others_ptr + i * 5
        mode, edge = tl.load(other), tl.load(other + 3).to(tl.int32)
        passed_ptr, passed_row = incoming(d_ptr, d_out_ptr, other + 1, ALIGN, C, OUT_ROW)
        if mode == 0:
            total += tl.load(passed_ptr + (where * passed_row)[:, None] + c[None, :], mask=mask, other=0.0)
        elif POOLED:
            total += _pooled_back(
                passed_ptr, passed_row, scales_ptr, edge, index_ptr + tl.multiple_of(tl.load(other + 4), 8), mode, n, y,
                x, inside, c, H, W, OH, OW, IMAGES, STRIDE, DROP, C, BLOCK, COLUMNS,
            )  # fmt: skip

    stored = tl.where(mask, total, 0.0).to(out_ptr.dtype.element_ty)
    out_ptr += tl.multiple_of(tl.load(jobs_ptr + 6), 8)
    tl.store(out_ptr + (where * C)[:, None] + c[None, :], stored, mask=mask)
    if NORMALIZE:
        d, tiles = stored.to(tl.float32), tl.num_programs(0)
        inverse = tl.load(inverse_ptr + row * C + c, mask=kept, other=0.0)
        normalized = (raw - mean[None, :]) * inverse[None, :]
        take_sums(
            partial_ptr, counters_ptr + counters_of(job * tl.num_programs(2) + block, tiles),
            gradient_ptr + (ROWS + row) * C, gradient_ptr + row * C, tl.sum(d, 0), tl.sum(d * normalized, 0), job, c,
            kept, C,
        )  # fmt: skip


@kernel
def depthwise_wgrad_kernel(
    d_ptr, x_ptr, params_ptr, mean_ptr, inverse_ptr, partial_ptr, jobs_ptr, M, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, ROWS, STRIDE: tl.constexpr, TAPS: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (parts of the rows, jobs, TAPS times blocks of channels), TAPS the most of any job. A job: x offset, its row
    of the statistics, offset of the output's gradient, side, dilation, partial offset. partial[part, channel, tap]."""
    part, parts, jobs_ptr = tl.program_id(0), tl.num_programs(0), jobs_ptr + tl.program_id(1) * 6
    tap = tl.program_id(2) % TAPS
    side, dilation = tl.load(jobs_ptr + 3).to(tl.int32), tl.load(jobs_ptr + 4).to(tl.int32)
    if tap >= side * side:
        return
    c = tl.program_id(2) // TAPS * COLUMNS + tl.arange(0, COLUMNS)
    kept = c < C
    x_ptr += tl.multiple_of(tl.load(jobs_ptr), 8)
    d_ptr += tl.multiple_of(tl.load(jobs_ptr + 2), 8)
    mean, scale, shift = affine(mean_ptr, inverse_ptr, params_ptr, tl.load(jobs_ptr + 1).to(tl.int32), c, kept, ROWS, C)
    pad = dilation * (side - 1) // 2
    down, across = tap // side * dilation - pad, tap % side * dilation - pad
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for tile in range(part, tl.cdiv(M, BLOCK), parts):
        rows = tile * BLOCK + tl.arange(0, BLOCK)
        n, oy, ox = position(rows, OH, OW)
        y, x = oy * STRIDE + down, ox * STRIDE + across
        loaded = (rows < M) & within(y, x, H, W)
        mask = loaded[:, None] & kept[None, :]
        where = ((n * H + y) * W + x).to(tl.int64) * C
        value = tl.load(x_ptr + where[:, None] + c[None, :], mask=mask, other=0.0)
        d = tl.load(d_ptr + (rows.to(tl.int64) * C)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        total += activated(value, mean, scale, shift) * d  # outside, d is 0
    taps = side * side
    where = tl.load(jobs_ptr + 5) + part * (taps * C) + c * taps + tap
    tl.store(partial_ptr + where, tl.sum(total, 0), mask=kept)
