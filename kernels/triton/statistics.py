"""Batch statistics: partial sums of tiles merged in a fixed order, so that two runs give the same bits."""

import triton
import triton.language as tl


@triton.jit
def finalize_kernel(
    partial_ptr, mean_ptr, inverse_ptr, variance_ptr, opened_ptr, rows_ptr, M, TILES, EPSILON, C: tl.constexpr,
    P: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (instances,), whose numbers rows holds. Chan's merge of (sum, squares about its mean) of tiles of TILE rows:
    mean, 1 / sqrt(variance + epsilon), and the unbiased variance. Closed instances get 0, 1 and 0."""
    instance = tl.load(rows_ptr + tl.program_id(0))
    c = tl.arange(0, P)
    mean, inverse, unbiased = tl.zeros([P], tl.float32), tl.full([P], 1.0, tl.float32), tl.zeros([P], tl.float32)
    if tl.load(opened_ptr + instance) != 0:
        partial_ptr += instance.to(tl.int64) * TILES * 2 * C
        sums = tl.zeros([P], tl.float32)
        for start in range(0, TILES, BLOCK):
            tile = start + tl.arange(0, BLOCK)
            where = (tile * 2 * C)[:, None] + c[None, :]
            mask = (tile < TILES)[:, None] & (c < C)[None, :]
            sums += tl.sum(tl.load(partial_ptr + where, mask=mask, other=0.0), 0)
        mean = sums / M
        squares = tl.zeros([P], tl.float32)
        for start in range(0, TILES, BLOCK):
            tile = start + tl.arange(0, BLOCK)
            where = (tile * 2 * C)[:, None] + c[None, :]
            mask = (tile < TILES)[:, None] & (c < C)[None, :]
            count = tl.minimum(M - tile * TILE, TILE).to(tl.float32)[:, None]
            away = tl.load(partial_ptr + where, mask=mask, other=0.0) / count - mean[None, :]
            within = tl.load(partial_ptr + where + C, mask=mask, other=0.0)
            squares += tl.sum(tl.where(mask, within + away * away * count, 0.0), 0)
        inverse = 1.0 / tl.sqrt(squares / M + EPSILON)
        unbiased = squares / tl.maximum(M - 1, 1)
    where = instance * C + c
    tl.store(mean_ptr + where, mean, mask=c < C)
    tl.store(inverse_ptr + where, inverse, mask=c < C)
    tl.store(variance_ptr + where, unbiased, mask=c < C)


@triton.jit
def sum_parts_kernel(
    partial_ptr, out_ptr, WIDTH, PARTS, START, SIZE, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr
):  # fmt: skip
    """Grid (blocks of the size,). out[i] = sum of partial[part, START + i] over parts, in order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, PARTS, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        where = part.to(tl.int64)[:, None] * WIDTH + START + i[None, :]
        mask = (part < PARTS)[:, None] & (i < SIZE)[None, :]
        total += tl.sum(tl.load(partial_ptr + where, mask=mask, other=0.0), 0)
    tl.store(out_ptr + i, total, mask=i < SIZE)


@triton.jit
def expand_kernel(depthwise_ptr, pointwise_ptr, out_ptr, TAPS, C: tl.constexpr, P: tl.constexpr):
    """Grid (edges,). out[e, tap, i, o] = depthwise[e, tap, i] * pointwise[e, i, o]: the dense weight of a stage."""
    e = tl.program_id(0)
    ci, co = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    mask = (ci < C) & (co < C)
    pointwise = tl.load(pointwise_ptr + (e * C + ci) * C + co, mask=mask, other=0.0)
    for tap in range(0, TAPS):
        depthwise = tl.load(depthwise_ptr + (e * TAPS + tap) * C + ci, mask=ci < C, other=0.0)
        where = ((e * TAPS + tap) * C + ci) * C + co
        tl.store(out_ptr + where, (depthwise * pointwise).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def contract_kernel(
    partial_ptr, depthwise_ptr, pointwise_ptr, d_depthwise_ptr, d_pointwise_ptr, TAPS, PARTS, TOTAL, START,
    C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Grid (edges,). The gradient of the dense weight, summed over the parts in order, becomes those of its two factors."""
    e = tl.program_id(0)
    ci, co = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    mask = (ci < C) & (co < C)
    pointwise = tl.load(pointwise_ptr + (e * C + ci) * C + co, mask=mask, other=0.0)
    d_pointwise = tl.zeros([P, P], tl.float32)
    for tap in range(0, TAPS):
        dense = tl.zeros([P, P], tl.float32)
        start = START + (e * TAPS + tap) * C * C
        for part in range(0, PARTS):
            where = tl.cast(part, tl.int64) * TOTAL + start + ci * C + co
            dense += tl.load(partial_ptr + where, mask=mask, other=0.0)
        c = tl.arange(0, P)
        where = (e * TAPS + tap) * C + c
        depthwise = tl.load(depthwise_ptr + where, mask=c < C, other=0.0)
        d_pointwise += dense * depthwise[:, None]
        tl.store(d_depthwise_ptr + where, tl.sum(dense * pointwise, 1), mask=c < C)
    tl.store(d_pointwise_ptr + (e * C + ci) * C + co, d_pointwise, mask=mask)


@triton.jit
def moments_kernel(x_ptr, partial_ptr, M, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (tiles,). partial[tile] = (sum, squares about its mean) of rows of C channels."""
    rows, c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, P)
    mask = (rows < M)[:, None] & (c < C)[None, :]
    value = tl.load(x_ptr + (rows.to(tl.int64) * C)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    sums = tl.sum(value, 0)
    count = tl.minimum(M - tl.program_id(0) * BLOCK, BLOCK).to(tl.float32)
    away = tl.where(mask, value - (sums / count)[None, :], 0.0)
    partial_ptr += tl.program_id(0) * 2 * C + c
    tl.store(partial_ptr, sums, mask=c < C)
    tl.store(partial_ptr + C, tl.sum(away * away, 0), mask=c < C)
