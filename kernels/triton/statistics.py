"""Batch statistics and other sums over all rows of a map: every program leaves its share, and the last one to finish
adds them up, always in the same order. So no sum needs a launch of its own, and two runs give the same bits.
"""

import triton
import triton.language as tl

from .launch import kernel


@triton.jit
def finishes_last(counter_ptr, programs):
    """Whether this is the last of some programs to come here; what all of them stored before can then be read. The
    counter, 0 at first, is set back, so that it serves the next launch."""
    tl.debug_barrier()  # one thread counts, but only when all have stored
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def merge_statistics(
    partial_ptr, mean_ptr, inverse_ptr, variance_ptr, instance, c, mask, M, tiles, EPSILON, C: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chan's merge of (sum, squares about its own mean) of tiles of TILE rows, for channel c of an instance, columns of
    a block: mean, 1 / sqrt(variance + epsilon) and the unbiased variance."""
    partial_ptr += instance.to(tl.int64) * (tiles * 2 * C) + c
    sums = tl.zeros([c.shape[0]], tl.float32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        where = partial_ptr[None, :] + (tile * (2 * C))[:, None]
        sums += tl.sum(tl.load(where, mask=(tile < tiles)[:, None] & mask[None, :], other=0.0, cache_modifier=".cg"), 0)
    mean = sums / M
    squares = tl.zeros([c.shape[0]], tl.float32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        where = partial_ptr[None, :] + (tile * (2 * C))[:, None]
        inside = (tile < tiles)[:, None] & mask[None, :]
        count = tl.maximum(tl.minimum(M - tile * TILE, TILE), 1).to(tl.float32)[:, None]
        away = tl.load(where, mask=inside, other=0.0, cache_modifier=".cg") / count - mean[None, :]
        within = tl.load(where + C, mask=inside, other=0.0, cache_modifier=".cg")
        squares += tl.sum(tl.where(inside, within + away * away * count, 0.0), 0)
    where = instance * C + c
    tl.store(mean_ptr + where, mean, mask=mask)
    tl.store(inverse_ptr + where, 1.0 / tl.sqrt(squares / M + EPSILON), mask=mask)
    tl.store(variance_ptr + where, squares / tl.maximum(M - 1, 1), mask=mask)


@triton.jit
def merge_sums(partial_ptr, sums_ptr, c, mask, parts, stride, BLOCK: tl.constexpr):
    """sums[c] = sum over parts of partial[part * stride + c]."""
    total = tl.zeros([c.shape[0]], tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        where = partial_ptr + (part * stride)[:, None] + c[None, :]
        total += tl.sum(
            tl.load(where, mask=(part < parts)[:, None] & mask[None, :], other=0.0, cache_modifier=".cg"), 0
        )
    tl.store(sums_ptr + c, total, mask=mask)


@kernel
def moments_kernel(
    x_ptr, partial_ptr, mean_ptr, inverse_ptr, variance_ptr, counter_ptr, M, EPSILON, C: tl.constexpr, P: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles,). Statistics of rows of C channels."""
    rows, c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, P)
    mask = (rows < M)[:, None] & (c < C)[None, :]
    value = tl.load(x_ptr + (rows.to(tl.int64) * C)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    sums = tl.sum(value, 0)
    count = tl.minimum(M - tl.program_id(0) * BLOCK, BLOCK).to(tl.float32)
    away = tl.where(mask, value - (sums / count)[None, :], 0.0)
    where = partial_ptr + tl.program_id(0) * 2 * C + c
    tl.store(where, sums, mask=c < C)
    tl.store(where + C, tl.sum(away * away, 0), mask=c < C)
    if finishes_last(counter_ptr, tl.num_programs(0)):
        merge_statistics(
            partial_ptr, mean_ptr, inverse_ptr, variance_ptr, c * 0, c, c < C, M, tl.num_programs(0), EPSILON, C, BLOCK,
            32,
        )  # fmt: skip
