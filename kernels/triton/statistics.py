"""Batch statistics and other sums over all rows of a map: every program leaves its share, and the last one to finish
adds them up, always in the same order. So no sum needs a launch of its own, and two runs give the same bits.

They add up in two levels, since one program alone would take longer over the shares of thousands than these over all
else: of every GROUP tiles the last one to finish merges the group, and the last of these the groups.
"""

import triton
import triton.language as tl

from .launch import kernel, pieces

GROUP = tl.constexpr(32)  # tiles


def counters(jobs: int, tiles: int) -> int:
    """How many zeros the sums of some jobs need that are cut into tiles."""
    return jobs * (pieces(tiles, GROUP.value) + 1)


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
def counters_of(job, tiles):
    """Where a job's counters begin."""
    return job * (tl.cdiv(tiles, GROUP) + 1)


@triton.jit
def _loaded(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0, cache_modifier=".cg")  # of other programs: not from this one's cache


@triton.jit
def _merged_statistics(partial_ptr, mask, first, count, step, M, C: tl.constexpr, TILE: tl.constexpr):
    """Chan's merge of shares (sum, squares about their own mean), of step tiles each: tiles first, first + step, ..."""
    BLOCK: tl.constexpr = 16 if mask.shape[0] > 64 else 32
    sums = tl.zeros([mask.shape[0]], tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        where = partial_ptr[None, :] + ((first + i * step) * (2 * C))[:, None]
        sums += tl.sum(_loaded(where, (i < count)[:, None] & mask[None, :]), 0)
    mean = sums / tl.minimum(M - first * TILE, count * step * TILE).to(tl.float32)
    squares = tl.zeros([mask.shape[0]], tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tile = first + i * step
        where = partial_ptr[None, :] + (tile * (2 * C))[:, None]
        inside = (i < count)[:, None] & mask[None, :]
        rows = tl.maximum(tl.minimum(M - tile * TILE, step * TILE), 1).to(tl.float32)[:, None]
        away = _loaded(where, inside) / rows - mean[None, :]
        squares += tl.sum(tl.where(inside, _loaded(where + C, inside) + away * away * rows, 0.0), 0)
    return sums, squares


@triton.jit
def take_statistics(
    partial_ptr, counters_ptr, mean_ptr, inverse_ptr, variance_ptr, sums, squares, instance, c, mask, M, EPSILON,
    C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Leaves this tile's share of the statistics of channel c of an instance, columns of a block: the sum over its TILE
    rows, and the squares about its mean. The last one stores mean, 1 / sqrt(variance + epsilon) and the unbiased
    variance. counters: of these columns, see counters_of."""
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    partial_ptr += instance.to(tl.int64) * (tiles * 2 * C) + c
    tl.store(partial_ptr + tile * 2 * C, sums, mask=mask)
    tl.store(partial_ptr + tile * 2 * C + C, squares, mask=mask)
    first = tile // GROUP * GROUP
    count = tl.minimum(tiles - first, GROUP)
    if finishes_last(counters_ptr + 1 + tile // GROUP, count):
        sums, squares = _merged_statistics(partial_ptr, mask, first, count, 1, M, C, TILE)
        tl.debug_barrier()  # where the share of the first tile was, that of the group goes
        tl.store(partial_ptr + first * 2 * C, sums, mask=mask)
        tl.store(partial_ptr + first * 2 * C + C, squares, mask=mask)
        if finishes_last(counters_ptr, tl.cdiv(tiles, GROUP)):
            sums, squares = _merged_statistics(partial_ptr, mask, 0, tl.cdiv(tiles, GROUP), GROUP, M, C, TILE)
            where = instance * C + c
            tl.store(mean_ptr + where, sums / M, mask=mask)
            tl.store(inverse_ptr + where, 1.0 / tl.sqrt(squares / M + EPSILON), mask=mask)
            tl.store(variance_ptr + where, squares / tl.maximum(M - 1, 1), mask=mask)


@triton.jit
def _merged(partial_ptr, mask, first, count, step, C: tl.constexpr):
    """Sums of shares of two sums."""
    BLOCK: tl.constexpr = 16 if mask.shape[0] > 64 else 32
    a, b = tl.zeros([mask.shape[0]], tl.float32), tl.zeros([mask.shape[0]], tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        where = partial_ptr[None, :] + ((first + i * step) * (2 * C))[:, None]
        inside = (i < count)[:, None] & mask[None, :]
        a += tl.sum(_loaded(where, inside), 0)
        b += tl.sum(_loaded(where + C, inside), 0)
    return a, b


@triton.jit
def take_sums(partial_ptr, counters_ptr, a_ptr, b_ptr, a, b, job, c, mask, C: tl.constexpr):
    """Leaves this tile's share of two sums over a job's rows, of channels c, columns of a block. The last one stores
    them to a[c] and b[c]. counters: see take_statistics."""
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    partial_ptr += job.to(tl.int64) * (tiles * 2 * C) + c
    tl.store(partial_ptr + tile * 2 * C, a, mask=mask)
    tl.store(partial_ptr + tile * 2 * C + C, b, mask=mask)
    first = tile // GROUP * GROUP
    count = tl.minimum(tiles - first, GROUP)
    if finishes_last(counters_ptr + 1 + tile // GROUP, count):
        a, b = _merged(partial_ptr, mask, first, count, 1, C)
        tl.debug_barrier()
        tl.store(partial_ptr + first * 2 * C, a, mask=mask)
        tl.store(partial_ptr + first * 2 * C + C, b, mask=mask)
        if finishes_last(counters_ptr, tl.cdiv(tiles, GROUP)):
            a, b = _merged(partial_ptr, mask, 0, tl.cdiv(tiles, GROUP), GROUP, C)
            tl.store(a_ptr + c, a, mask=mask)
            tl.store(b_ptr + c, b, mask=mask)


@triton.jit
def merge_sums(partial_ptr, sums_ptr, c, mask, parts, stride, BLOCK: tl.constexpr):
    """sums[c] = sum over parts, of which there are few, of partial[part * stride + c]."""
    total = tl.zeros([c.shape[0]], tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        where = partial_ptr + (part * stride)[:, None] + c[None, :]
        total += tl.sum(_loaded(where, (part < parts)[:, None] & mask[None, :]), 0)
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
    take_statistics(
        partial_ptr, counter_ptr, mean_ptr, inverse_ptr, variance_ptr, sums, tl.sum(away * away, 0), c * 0, c, c < C, M,
        EPSILON, C, BLOCK,
    )  # fmt: skip
