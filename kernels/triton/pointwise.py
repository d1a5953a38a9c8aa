"""1x1 convolutions of a derived cell as matrix products: forward with the statistics of what they make, and both
gradients, for which the normalization's backward is done on load.

Weights are read as PyTorch keeps them, (outputs, inputs) in float32. A factorized reduction (STRIDE 2) is two
products: half 0, the first HALF outputs, reads the even pixels, half 1 the odd ones. Elsewhere there is but half 0, and
HALF is C.
"""

import triton
import triton.language as tl

from .affine import activated, affine, incoming, normalize_bwd, normalize_bwd_terms, path_scale
from .convolution import position
from .launch import kernel
from .statistics import counters_of, take_statistics


@triton.jit
def _input_rows(rows, half, H, W, OH, OW, STRIDE: tl.constexpr):
    if STRIDE == 1:
        return rows
    else:
        n, y, x = position(rows, OH, OW)
        return (n * H + STRIDE * y + half) * W + STRIDE * x + half


@kernel
def pointwise_fwd_kernel(
    x_ptr, params_ptr, out_ptr, partial_ptr, mean_ptr, inverse_ptr, variance_ptr, counters_ptr, jobs_ptr, M,
    H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, ROWS, EPSILON, STRIDE: tl.constexpr,
    C_IN: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, ACTIVATE: tl.constexpr, STATISTICS: tl.constexpr,
    WEIGHT_ALIGN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, jobs, blocks of outputs). A job: x offset, its row of the statistics (ACTIVATE: normalized by it,
    then ReLU), weight offset, half, out offset, row of the statistics of what is made, which STATISTICS takes over
    partial[row, tile] = (sum, squares about its mean).
    """
    tile, job, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    jobs_ptr += job * 6
    x_ptr += tl.multiple_of(tl.load(jobs_ptr), 8)
    weight_ptr = params_ptr + tl.multiple_of(tl.load(jobs_ptr + 2), WEIGHT_ALIGN)
    x_row, half = tl.load(jobs_ptr + 1).to(tl.int32), tl.load(jobs_ptr + 3).to(tl.int32)
    rows, j = tile * BLOCK + tl.arange(0, BLOCK), block * COLUMNS + tl.arange(0, COLUMNS)
    inside, kept = rows < M, j < tl.where(half == 0, HALF, C - HALF)
    where = _input_rows(rows, half, H, W, OH, OW, STRIDE).to(tl.int64) * C_IN
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for start in range(0, C_IN, BLOCK_K):
        ci = start + tl.arange(0, BLOCK_K)
        values = tl.load(x_ptr + where[:, None] + ci[None, :], mask=inside[:, None] & (ci < C_IN)[None, :], other=0.0)
        if ACTIVATE:
            mean, scale, shift = affine(mean_ptr, inverse_ptr, params_ptr, x_row, ci, ci < C_IN, ROWS, C_IN)
            values = activated(values, mean, scale, shift)
        weights = tl.load(
            weight_ptr + (j * C_IN)[None, :] + ci[:, None], mask=kept[None, :] & (ci < C_IN)[:, None], other=0.0
        )
        total = tl.dot(values.to(DTYPE), weights.to(DTYPE), total, input_precision=PRECISION)

    stored = total.to(out_ptr.dtype.element_ty)
    c = half * HALF + j
    out_ptr += tl.multiple_of(tl.load(jobs_ptr + 4), 8)
    tl.store(out_ptr + (rows.to(tl.int64) * C)[:, None] + c[None, :], stored, mask=inside[:, None] & kept[None, :])
    if STATISTICS:  # of what was stored, rounding included
        row, tiles = tl.load(jobs_ptr + 5).to(tl.int32), tl.num_programs(0)
        value = tl.where(inside[:, None], stored.to(tl.float32), 0.0)
        sums = tl.sum(value, 0)
        away = tl.where(inside[:, None], value - (sums / tl.minimum(M - tile * BLOCK, BLOCK))[None, :], 0.0)
        take_statistics(
            partial_ptr, counters_ptr + counters_of(job * tl.num_programs(2) + block, tiles), mean_ptr, inverse_ptr,
            variance_ptr, sums, tl.sum(away * away, 0), row + j * 0, c, kept, M, EPSILON, C, BLOCK,
        )  # fmt: skip


@kernel
def pointwise_dgrad_kernel(
    d_ptr, d_out_ptr, raw_ptr, x_ptr, params_ptr, mean_ptr, inverse_ptr, gradient_ptr, scales_ptr, out_ptr,
    jobs_ptr, M, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, IMAGES, ROWS,
    STRIDE: tl.constexpr, C_IN: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, OUT_ROW: tl.constexpr,
    ACTIVATED: tl.constexpr, TRAINING: tl.constexpr, DROP: tl.constexpr, ALIGN: tl.constexpr,
    WEIGHT_ALIGN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of x, jobs, blocks of inputs). M, H, W: of x, which with STRIDE 2 has rows that nothing reads: their
    gradient is 0. A job: own, offset of the normalized output's gradient (see incoming), edge whose samples are scaled,
    raw offset, its row of the statistics, offset of each half's weight, out offset, x offset, its row of the statistics
    (ACTIVATED: by it x was normalized, before its ReLU).
    """
    jobs_ptr += tl.program_id(1) * 10
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ci = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside, kept = rows < M, ci < C_IN
    n, y, x = position(rows, H, W)
    d_ptr, d_row = incoming(d_ptr, d_out_ptr, jobs_ptr, ALIGN, C, OUT_ROW)
    raw_ptr += tl.multiple_of(tl.load(jobs_ptr + 3), 8)
    row = tl.load(jobs_ptr + 4).to(tl.int32)
    samples = path_scale(scales_ptr, tl.load(jobs_ptr + 2).to(tl.int32), n, inside, IMAGES, DROP)
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for half in tl.static_range(STRIDE):
        weight_ptr = params_ptr + tl.multiple_of(tl.load(jobs_ptr + 5 + half), WEIGHT_ALIGN)
        loaded, where = inside, rows.to(tl.int64)
        if STRIDE == 2:
            loaded = inside & (y % 2 == half) & (x % 2 == half)
            where = ((n * OH + y // 2) * OW + x // 2).to(tl.int64)
        for start in range(0, C - HALF if half == 1 else HALF, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            c, real = half * HALF + j, j < (C - HALF if half == 1 else HALF)
            mask = loaded[:, None] & real[None, :]
            d = tl.load(d_ptr + (where * d_row)[:, None] + c[None, :], mask=mask, other=0.0)
            raw = tl.load(raw_ptr + (where * C)[:, None] + c[None, :], mask=mask, other=0.0)
            mean, inverse, scale, sum_d, sum_dx = normalize_bwd_terms(
                mean_ptr, inverse_ptr, params_ptr, gradient_ptr, row, c, real, ROWS, C
            )
            d = normalize_bwd(
                d * samples[:, None], raw, mean, inverse, scale, sum_d, sum_dx, M // (STRIDE * STRIDE), TRAINING
            )
            d = tl.where(mask, d, 0.0)
            weights = tl.load(
                weight_ptr + (j * C_IN)[:, None] + ci[None, :], mask=real[:, None] & kept[None, :], other=0.0
            )
            total = tl.dot(d.to(DTYPE), weights.to(DTYPE), total, input_precision=PRECISION)

    mask, where = inside[:, None] & kept[None, :], (rows.to(tl.int64) * C_IN)[:, None] + ci[None, :]
    if ACTIVATED:
        mean, scale, shift = affine(
            mean_ptr, inverse_ptr, params_ptr, tl.load(jobs_ptr + 9).to(tl.int32), ci, kept, ROWS, C_IN
        )
        value = tl.load(x_ptr + tl.multiple_of(tl.load(jobs_ptr + 8), 8) + where, mask=mask, other=0.0)
        total = tl.where(activated(value, mean, scale, shift) > 0, total, 0.0)
    out_ptr += tl.multiple_of(tl.load(jobs_ptr + 7), 8)
    tl.store(out_ptr + where, total.to(out_ptr.dtype.element_ty), mask=mask)


@kernel
def pointwise_wgrad_kernel(
    d_ptr, d_out_ptr, raw_ptr, x_ptr, params_ptr, mean_ptr, inverse_ptr, gradient_ptr, scales_ptr, partial_ptr,
    jobs_ptr, M, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, IMAGES, ROWS,
    STRIDE: tl.constexpr, C_IN: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, OUT_ROW: tl.constexpr,
    ACTIVATE: tl.constexpr, TRAINING: tl.constexpr, DROP: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (parts of the rows, jobs, blocks of outputs and inputs). A job: own, offset of the normalized output's
    gradient (see incoming), edge whose samples are scaled, raw offset, its row of the statistics, x offset, its row of
    the statistics (ACTIVATE: normalized by it, then ReLU), half, partial offset. partial[part, output, input].
    """
    part, parts, jobs_ptr = tl.program_id(0), tl.num_programs(0), jobs_ptr + tl.program_id(1) * 9
    blocks: tl.constexpr = (C_IN + INPUTS - 1) // INPUTS
    half = tl.load(jobs_ptr + 7).to(tl.int32)
    width = tl.where(half == 0, HALF, C - HALF)
    j = tl.program_id(2) // blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    ci = tl.program_id(2) % blocks * INPUTS + tl.arange(0, INPUTS)
    c, real, kept = half * HALF + j, j < width, ci < C_IN
    d_ptr, d_row = incoming(d_ptr, d_out_ptr, jobs_ptr, ALIGN, C, OUT_ROW)
    edge, row = tl.load(jobs_ptr + 2).to(tl.int32), tl.load(jobs_ptr + 4).to(tl.int32)
    raw_ptr += tl.multiple_of(tl.load(jobs_ptr + 3), 8)
    x_ptr += tl.multiple_of(tl.load(jobs_ptr + 5), 8)
    mean, inverse, scale, sum_d, sum_dx = normalize_bwd_terms(
        mean_ptr, inverse_ptr, params_ptr, gradient_ptr, row, c, real, ROWS, C
    )
    if ACTIVATE:
        x_mean, x_scale, x_shift = affine(
            mean_ptr, inverse_ptr, params_ptr, tl.load(jobs_ptr + 6).to(tl.int32), ci, kept, ROWS, C_IN
        )
    total = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    for tile in range(part, tl.cdiv(M, BLOCK), parts):
        rows = tile * BLOCK + tl.arange(0, BLOCK)
        inside, where = rows < M, rows.to(tl.int64)
        mask = inside[:, None] & real[None, :]
        d = tl.load(d_ptr + (where * d_row)[:, None] + c[None, :], mask=mask, other=0.0)
        raw = tl.load(raw_ptr + (where * C)[:, None] + c[None, :], mask=mask, other=0.0)
        if DROP:
            d = d * path_scale(scales_ptr, edge, rows // (OH * OW), inside, IMAGES, DROP)[:, None]
        d = tl.where(mask, normalize_bwd(d, raw, mean, inverse, scale, sum_d, sum_dx, M, TRAINING), 0.0)
        where = _input_rows(rows, half, H, W, OH, OW, STRIDE).to(tl.int64) * C_IN
        values = tl.load(x_ptr + where[:, None] + ci[None, :], mask=inside[:, None] & kept[None, :], other=0.0)
        if ACTIVATE:
            values = activated(values, x_mean, x_scale, x_shift)
        total = tl.dot(tl.trans(d.to(DTYPE)), values.to(DTYPE), total, input_precision=PRECISION)
    where = tl.load(jobs_ptr + 8) + part * (width * C_IN)
    where = where + (j * C_IN)[:, None] + ci[None, :]
    tl.store(partial_ptr + where, total, mask=real[:, None] & kept[None, :])
