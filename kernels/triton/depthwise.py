"""Depthwise convolutions of a derived cell, with the normalization and the ReLU before them, and their backward; that
of poolings and identities is in the same kernel, which gathers all that comes back to a state.

Maps are matrices of N*H*W rows of C channels. A program has a block of COLUMNS channels of BLOCK pixels in TALL rows of
a map, one under the other (see rows.place_of), and takes a convolution column of taps by column: a row that it loads
serves all outputs above and below. A map's border is zero behind the ReLU, whatever the normalization makes of zero.
"""

import triton
import triton.language as tl

from .affine import activated, affine, incoming, path_scale
from .convolution import within
from .launch import both, kernel
from .rows import has_pixel, place_of, zero_totals
from .statistics import counters_of, take_sums


@kernel
def arrange_kernel(params_ptr, out_ptr, jobs_ptr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Depthwise weights, (C, taps) in params, become (taps, C). Grid (blocks, jobs): offset, taps, out offset."""
    jobs_ptr += tl.program_id(1) * 3
    taps = tl.load(jobs_ptr + 1).to(tl.int32)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(params_ptr + tl.load(jobs_ptr) + (i % C) * taps + i // C, mask=i < taps * C)
    tl.store(out_ptr + tl.load(jobs_ptr + 2) + i, value, mask=i < taps * C)


@triton.jit
def _weights(weight_ptr, kx, c, kept, SIDE: tl.constexpr, FLIP: tl.constexpr, C: tl.constexpr):
    """Of a column of taps."""
    found = ()
    for ky in tl.static_range(SIDE):
        tap = SIDE * SIDE - 1 - ky * SIDE - kx if FLIP else ky * SIDE + kx
        found += (tl.load(weight_ptr + tap * C + c, mask=kept, other=0.0)[None, :],)
    return found


@triton.jit
def _column(
    x_ptr, n, top, left, kx, inside, c, H: tl.constexpr, W: tl.constexpr, DILATION: tl.constexpr, C: tl.constexpr
):
    """Of a column of taps, whose first one sees pixel (top, left): where it sees row `top`, and whether there are such
    pixels in a row."""
    left += kx * DILATION
    pointer = x_ptr + ((n.to(tl.int64) * H + top) * W + left)[:, None] * C + c[None, :]
    return pointer, inside & has_pixel(left, W)


@triton.jit
def _loaded(pointer, mask, kept, y, i: tl.constexpr, H: tl.constexpr, DISTANCE: tl.constexpr):
    """Row y + i of a map, 0 where there is none, and where there is one."""
    there = both(mask, (y + i >= 0) & (y + i < H))[:, None]
    return tl.load(pointer + i * DISTANCE, mask=there & kept[None, :], other=0.0), there


@triton.jit
def _convolve(
    totals, x_ptr, weight_ptr, mean, scale, shift, n, top, left, inside, c, kept, H: tl.constexpr, W: tl.constexpr,
    SIDE: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, FLIP: tl.constexpr, ACTIVATE: tl.constexpr,
    C: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """totals, TALL rows of outputs, with a depthwise convolution of x added; FLIP: with its taps backwards. (top, left)
    is what the first tap of the first row sees. A row that is loaded serves all outputs above and below it."""
    for kx in range(0, SIDE):
        weights = _weights(weight_ptr, kx, c, kept, SIDE, FLIP, C)
        pointer, mask = _column(x_ptr, n, top, left, kx, inside, c, H, W, DILATION, C)
        for i in tl.static_range((TALL - 1) * STRIDE + DILATION * (SIDE - 1) + 1):
            value, there = _loaded(pointer, mask, kept, top, i, H, W * C)
            if ACTIVATE:
                value = tl.where(there, activated(value, mean, scale, shift), 0.0)
            value = value.to(tl.float32)
            changed = ()
            for r in tl.static_range(TALL):
                total = totals[r]
                if i >= r * STRIDE and (i - r * STRIDE) % DILATION == 0 and (i - r * STRIDE) // DILATION < SIDE:
                    total += value * weights[(i - r * STRIDE) // DILATION]
                changed += (total,)
            totals = changed
    return totals


@kernel
def depthwise_fwd_kernel(
    x_ptr, weight_ptr, params_ptr, mean_ptr, inverse_ptr, out_ptr, jobs_ptr, IMAGES, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, ROWS, STRIDE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    TALL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, jobs, blocks of channels). A job: x offset, its row of the statistics, weight offset, side,
    dilation, out offset."""
    jobs_ptr += tl.program_id(1) * 6
    x_ptr += tl.multiple_of(tl.load(jobs_ptr), 8)
    weight_ptr += tl.multiple_of(tl.load(jobs_ptr + 2), 4)
    side, dilation = tl.load(jobs_ptr + 3).to(tl.int32), tl.load(jobs_ptr + 4).to(tl.int32)
    c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    kept = c < C
    mean, scale, shift = affine(mean_ptr, inverse_ptr, params_ptr, tl.load(jobs_ptr + 1).to(tl.int32), c, kept, ROWS, C)
    y, n, x, inside = place_of(tl.program_id(0), IMAGES, OH, OW, BLOCK, TALL)
    pad = dilation * (side - 1) // 2
    totals = zero_totals(BLOCK, COLUMNS, TALL)
    for kind in tl.static_range(4):
        if (side == 3 + kind // 2 * 2) & (dilation == 1 + kind % 2):
            totals = _convolve(
                totals, x_ptr, weight_ptr, mean, scale, shift, n, y * STRIDE - pad, x * STRIDE - pad, inside, c, kept,
                H, W, 3 + kind // 2 * 2, 1 + kind % 2, STRIDE, False, True, C, TALL,
            )  # fmt: skip
    out_ptr += tl.multiple_of(tl.load(jobs_ptr + 5), 8)
    out_ptr += ((n.to(tl.int64) * OH + y) * OW + x)[:, None] * C + c[None, :]
    for r in tl.static_range(TALL):
        mask = both(inside, y + r < OH)[:, None] & kept[None, :]
        tl.store(out_ptr + r * OW * C, totals[r].to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _halved_back(
    total, d_ptr, weight_ptr, side, dilation, n, y, x, inside, c, OH: tl.constexpr, OW: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Of one row of inputs, total with the gradient added that a depthwise convolution of stride 2 passes back."""
    pad = dilation * (side - 1) // 2
    for tap in range(0, side * side):
        top, left = y + pad - tap // side * dilation, x + pad - tap % side * dilation
        loaded = inside & (((top | left) & 1) == 0)
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


@triton.jit
def _convolved_back(
    totals, d_ptr, weight_ptr, segment, n, y, x, inside, c, kept, OH: tl.constexpr, OW: tl.constexpr,
    STRIDE: tl.constexpr, C: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """totals with the gradient added that a depthwise convolution passes back. A segment: offset of its own, weight
    offset, side, dilation."""
    d_ptr += tl.multiple_of(tl.load(segment), 8)
    weight_ptr += tl.multiple_of(tl.load(segment + 1), 4)
    side, dilation = tl.load(segment + 2).to(tl.int32), tl.load(segment + 3).to(tl.int32)
    if STRIDE == 2:
        changed = ()
        for r in tl.static_range(TALL):
            changed += (
                _halved_back(totals[r], d_ptr, weight_ptr, side, dilation, n, y + r, x, inside, c, OH, OW, C),
            )  # fmt: skip
        totals = changed
    else:
        pad = dilation * (side - 1) // 2
        for kind in tl.static_range(4):
            if (side == 3 + kind // 2 * 2) & (dilation == 1 + kind % 2):
                totals = _convolve(
                    totals, d_ptr, weight_ptr, None, None, None, n, y - pad, x - pad, inside, c, kept, OH, OW,
                    3 + kind // 2 * 2, 1 + kind % 2, 1, True, False, C, TALL,
                )  # fmt: skip
    return totals


@kernel
def source_bwd_kernel(
    d_ptr, d_out_ptr, x_ptr, weight_ptr, params_ptr, mean_ptr, inverse_ptr, index_ptr, scales_ptr, out_ptr,
    partial_ptr, gradient_ptr, counters_ptr, jobs_ptr, segments_ptr, others_ptr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, IMAGES, ROWS, STRIDE: tl.constexpr, C: tl.constexpr, OUT_ROW: tl.constexpr,
    NORMALIZE: tl.constexpr, POOLED: tl.constexpr, DROP: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    TALL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of a map that edges leave, behind its normalization. Grid (tiles, jobs, blocks of channels). A job:
    x offset, row of the statistics, first segment, segments (see _convolved_back), first of what else passes back, how
    many, out offset. Of these: mode (0: adds as it is, 1: maxima, 2: averages), own, offset (see incoming), edge whose
    samples are scaled, index offset. With NORMALIZE, also the gradients of the normalization's shift and scale, over
    partial[job, tile].
    """
    tile, job, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    jobs_ptr += job * 7
    c = block * COLUMNS + tl.arange(0, COLUMNS)
    kept = c < C
    y, n, x, inside = place_of(tile, IMAGES, H, W, BLOCK, TALL)
    place = (n.to(tl.int64) * H + y) * W + x
    totals = zero_totals(BLOCK, COLUMNS, TALL)
    first = tl.load(jobs_ptr + 2).to(tl.int32)
    for s in range(first, first + tl.load(jobs_ptr + 3).to(tl.int32)):
        totals = _convolved_back(
            totals, d_ptr, weight_ptr, segments_ptr + s * 4, n, y, x, inside, c, kept, OH, OW, STRIDE, C, TALL
        )  # fmt: skip
    row = tl.load(jobs_ptr + 1).to(tl.int32)
    mean, scale, shift = affine(mean_ptr, inverse_ptr, params_ptr, row, c, kept, ROWS, C)
    x_ptr += tl.multiple_of(tl.load(jobs_ptr), 8)
    raws, passed = (), ()
    for r in tl.static_range(TALL):
        mask = both(inside, y + r < H)[:, None] & kept[None, :]
        raw = tl.load(x_ptr + (place + r * W)[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        raws += (raw,)
        passed += (tl.where(activated(raw, mean, scale, shift) > 0, totals[r], 0.0),)
    totals = passed

    first = tl.load(jobs_ptr + 4).to(tl.int32)
    for i in range(first, first + tl.load(jobs_ptr + 5).to(tl.int32)):
        other = others_ptr + i * 5
        mode, edge = tl.load(other), tl.load(other + 3).to(tl.int32)
        passed_ptr, passed_row = incoming(d_ptr, d_out_ptr, other + 1, ALIGN, C, OUT_ROW)
        changed = ()
        for r in tl.static_range(TALL):
            total, here = totals[r], both(inside, y + r < H)
            if mode == 0:
                where = passed_ptr + ((place + r * W) * passed_row)[:, None] + c[None, :]
                total += tl.load(where, mask=here[:, None] & kept[None, :], other=0.0).to(tl.float32)
            elif POOLED:
                total += _pooled_back(
                    passed_ptr, passed_row, scales_ptr, edge, index_ptr + tl.multiple_of(tl.load(other + 4), 8), mode,
                    n, y + r, x, here, c, H, W, OH, OW, IMAGES, STRIDE, DROP, C, BLOCK, COLUMNS,
                )  # fmt: skip
            changed += (total,)
        totals = changed

    out_ptr += tl.multiple_of(tl.load(jobs_ptr + 6), 8)
    sum_d, sum_dx = tl.zeros([BLOCK, COLUMNS], tl.float32), tl.zeros([BLOCK, COLUMNS], tl.float32)
    if NORMALIZE:
        inverse = tl.load(inverse_ptr + row * C + c, mask=kept, other=0.0)
    for r in tl.static_range(TALL):
        mask = both(inside, y + r < H)[:, None] & kept[None, :]
        stored = tl.where(mask, totals[r], 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (place + r * W)[:, None] * C + c[None, :], stored, mask=mask)
        if NORMALIZE:
            sum_d += stored.to(tl.float32)
            sum_dx += stored.to(tl.float32) * ((raws[r] - mean[None, :]) * inverse[None, :])
    if NORMALIZE:
        tiles = tl.num_programs(0)
        take_sums(
            partial_ptr, counters_ptr + counters_of(job * tl.num_programs(2) + block, tiles),
            gradient_ptr + (ROWS + row) * C, gradient_ptr + row * C, tl.sum(sum_d, 0), tl.sum(sum_dx, 0), job, c, kept,
            C,
        )  # fmt: skip


@triton.jit
def _tap_gradients(
    partial_ptr, x_ptr, d_ptr, mean, scale, shift, kx, c, kept, IMAGES, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, SIDE: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr, TALL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a column of taps, over a part of the tiles."""
    PAD: tl.constexpr = DILATION * (SIDE - 1) // 2
    part, parts = tl.program_id(0), tl.num_programs(0)
    totals = zero_totals(BLOCK, COLUMNS, SIDE)
    tiles = tl.cdiv(IMAGES * OW, BLOCK) * ((OH + TALL - 1) // TALL)
    for tile in range(part, tiles, parts):
        y, n, x, inside = place_of(tile, IMAGES, OH, OW, BLOCK, TALL)
        where = d_ptr + ((n.to(tl.int64) * OH + y) * OW + x)[:, None] * C + c[None, :]
        ds = ()
        for r in tl.static_range(TALL):
            d, _ = _loaded(where, inside, kept, y, r, OH, OW * C)
            ds += (d.to(tl.float32),)
        top = y * STRIDE - PAD
        pointer, mask = _column(x_ptr, n, top, x * STRIDE - PAD, kx, inside, c, H, W, DILATION, C)
        for i in tl.static_range((TALL - 1) * STRIDE + DILATION * (SIDE - 1) + 1):
            value, there = _loaded(pointer, mask, kept, top, i, H, W * C)
            value = tl.where(there, activated(value, mean, scale, shift), 0.0)
            changed = ()
            for ky in tl.static_range(SIDE):
                total = totals[ky]
                if i >= ky * DILATION and (i - ky * DILATION) % STRIDE == 0 and (i - ky * DILATION) // STRIDE < TALL:
                    total += value * ds[(i - ky * DILATION) // STRIDE]
                changed += (total,)
            totals = changed
    partial_ptr += part * (SIDE * SIDE * C) + c * (SIDE * SIDE) + kx
    for ky in tl.static_range(SIDE):
        tl.store(partial_ptr + ky * SIDE, tl.sum(totals[ky], 0), mask=kept)


@kernel
def depthwise_wgrad_kernel(
    d_ptr, x_ptr, params_ptr, mean_ptr, inverse_ptr, partial_ptr, jobs_ptr, IMAGES, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, ROWS, STRIDE: tl.constexpr, SIDE: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, TALL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (parts of the tiles, jobs, SIDE times blocks of channels), SIDE the largest of any job. A job: x offset, its
    row of the statistics, offset of the output's gradient, side, dilation, partial offset. partial[part, channel,
    tap]."""
    jobs_ptr += tl.program_id(1) * 6
    kx = tl.program_id(2) % SIDE
    side, dilation = tl.load(jobs_ptr + 3).to(tl.int32), tl.load(jobs_ptr + 4).to(tl.int32)
    if kx >= side:
        return
    c = tl.program_id(2) // SIDE * COLUMNS + tl.arange(0, COLUMNS)
    kept = c < C
    x_ptr += tl.multiple_of(tl.load(jobs_ptr), 8)
    d_ptr += tl.multiple_of(tl.load(jobs_ptr + 2), 8)
    partial_ptr += tl.load(jobs_ptr + 5)
    mean, scale, shift = affine(mean_ptr, inverse_ptr, params_ptr, tl.load(jobs_ptr + 1).to(tl.int32), c, kept, ROWS, C)
    for kind in tl.static_range(4):
        if (side == 3 + kind // 2 * 2) & (dilation == 1 + kind % 2):
            _tap_gradients(
                partial_ptr, x_ptr, d_ptr, mean, scale, shift, kx, c, kept, IMAGES, H, W, OH, OW, 3 + kind // 2 * 2,
                1 + kind % 2, STRIDE, C, BLOCK, TALL, COLUMNS,
            )  # fmt: skip
