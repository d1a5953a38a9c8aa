"""Batch statistics and other sums over all rows of a map: every program leaves its share, and these are added up,
always in the same order. So two runs give the same bits.

In the search, where a map has thousands of tiles, a small kernel adds up what the launches before it left: it costs
less than if each program had to find out whether it is the last. In derived cells, whose programs do more each, the
last one to finish adds up, in two levels: of every GROUP tiles the last one merges the group, and the last of these the
groups.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..spec import EPSILON
from . import tuning
from .launch import both, kernel, launch, padded, pieces

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
def add_up(partial_ptr, sums_ptr, c, mask, parts, stride, BLOCK: tl.constexpr):
    """sums[c] = sum over parts, of which there are few, of partial[part * stride + c]."""
    total = tl.zeros([c.shape[0]], tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        where = partial_ptr + (part * stride)[:, None] + c[None, :]
        total += tl.sum(_loaded(where, (part < parts)[:, None] & mask[None, :]), 0)
    tl.store(sums_ptr + c, total, mask=mask)


@kernel
def moments_kernel(x_ptr, partial_ptr, M, SHARES, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (tiles,). Statistics of rows of C channels, instance 0."""
    rows, c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, P)
    mask = (rows < M)[:, None] & (c < C)[None, :]
    value = tl.load(x_ptr + (rows.to(tl.int64) * C)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    sums = tl.sum(value, 0)
    count = tl.minimum(M - tl.program_id(0) * BLOCK, BLOCK).to(tl.float32)
    away = tl.where(mask, value - (sums / count)[None, :], 0.0)
    leave_statistics(
        partial_ptr, tl.program_id(0), count, sums, tl.sum(away * away, 0), c * 0, c, c < C, SHARES, C
    )  # fmt: skip


@triton.jit
def leave_statistics(partial_ptr, tile, count, sums, squares, instance, c, mask, SHARES, C: tl.constexpr):
    """Leaves a tile's share of the statistics of channel c of an instance, columns of a block: how many rows, their sum
    and the squares about their mean, in partial[instance, tile], of SHARES an instance. merge_statistics is to
    follow."""
    partial_ptr += (instance.to(tl.int64) * SHARES + tile) * (3 * C) + c
    tl.store(partial_ptr, count + sums * 0, mask=mask)
    tl.store(partial_ptr + C, sums, mask=mask)
    tl.store(partial_ptr + 2 * C, squares, mask=mask)


@triton.jit
def leave_statistics_of_rows(
    partial_ptr, tile, rows, inside, y, H: tl.constexpr, TALL: tl.constexpr, DTYPE: tl.constexpr, instance, c, mask,
    SHARES, C: tl.constexpr,
):  # fmt: skip
    """The same of a tile of TALL rows from row y of H on. rows: of each its pixels that are inside, a block; as they
    are stored, in DTYPE, rounding included."""
    sums, squares = tl.zeros(rows[0].shape, tl.float32), tl.zeros(rows[0].shape, tl.float32)
    for r in tl.static_range(TALL):
        sums += tl.where(both(inside, y + r < H)[:, None], rows[r].to(DTYPE).to(tl.float32), 0.0)
    sums = tl.sum(sums, 0)
    count = (tl.sum(inside.to(tl.int32), 0) * tl.minimum(H - y, TALL)).to(tl.float32)
    for r in tl.static_range(TALL):
        away = rows[r].to(DTYPE).to(tl.float32) - (sums / count)[None, :]
        squares += tl.where(both(inside, y + r < H)[:, None], away * away, 0.0)
    leave_statistics(partial_ptr, tile, count, sums, tl.sum(squares, 0), instance, c, mask, SHARES, C)


@kernel
def merge_statistics_kernel(
    partial_ptr, mean_ptr, inverse_ptr, variance_ptr, opened_ptr, jobs_ptr, SHARES, EPSILON, C: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (instances,). A job: instance, its shares. Stores the mean, 1 / sqrt(variance + epsilon) and the unbiased
    variance of an instance that is open, by Chan's merge of its shares."""
    jobs_ptr += tl.program_id(0) * 2
    instance, shares = tl.load(jobs_ptr), tl.load(jobs_ptr + 1).to(tl.int32)
    if tl.load(opened_ptr + instance) == 0:
        return
    c = tl.arange(0, P)
    partial_ptr += instance * SHARES * (3 * C)
    counts, sums = tl.zeros([P], tl.float32), tl.zeros([P], tl.float32)
    for start in range(0, shares, BLOCK):
        i = start + tl.arange(0, BLOCK)
        where, inside = partial_ptr + (i * (3 * C))[:, None] + c[None, :], (i < shares)[:, None] & (c < C)[None, :]
        counts += tl.sum(tl.load(where, mask=inside, other=0.0), 0)
        sums += tl.sum(tl.load(where + C, mask=inside, other=0.0), 0)
    counts = tl.maximum(counts, 1.0)
    mean, squares = sums / counts, tl.zeros([P], tl.float32)
    for start in range(0, shares, BLOCK):
        i = start + tl.arange(0, BLOCK)
        where, inside = partial_ptr + (i * (3 * C))[:, None] + c[None, :], (i < shares)[:, None] & (c < C)[None, :]
        count = tl.load(where, mask=inside, other=0.0)
        away = tl.load(where + C, mask=inside, other=0.0) / tl.maximum(count, 1.0) - mean[None, :]
        squares += tl.sum(tl.load(where + 2 * C, mask=inside, other=0.0) + away * away * count, 0)
    where = instance * C + c
    tl.store(mean_ptr + where, mean, mask=c < C)
    tl.store(inverse_ptr + where, 1.0 / tl.sqrt(squares / counts + EPSILON), mask=c < C)
    tl.store(variance_ptr + where, squares / tl.maximum(counts - 1, 1.0), mask=c < C)


def merge_statistics(
    partial: Tensor, statistics: dict[str, Tensor], opened: Tensor, jobs: Tensor, shares: int, c: int
):  # fmt: skip
    """statistics: mean_ptr, inverse_ptr, variance_ptr. jobs: (instance, its shares) a row; shares: place for
    so many."""
    tensors = {"partial_ptr": partial, **statistics, "opened_ptr": opened, "jobs_ptr": jobs}
    launch(
        merge_statistics_kernel, (len(jobs),), tensors, 0, SHARES=shares, EPSILON=EPSILON, C=c, P=padded(c),
        BLOCK=max(1, tuning.KNOBS["merged"] // padded(c)), num_warps=8,
    )  # fmt: skip


@triton.jit
def leave_sums(partial_ptr, a, b, job, share, shares, c, mask, C: tl.constexpr):
    """Leaves a share of two sums over a job's rows in partial[job, share], of so many a job. merge_sums is to
    follow."""
    partial_ptr += (job.to(tl.int64) * shares + share) * (2 * C) + c
    tl.store(partial_ptr, a, mask=mask)
    tl.store(partial_ptr + C, b, mask=mask)


@kernel
def merge_sums_kernel(
    partial_ptr, sums_ptr, opened_ptr, jobs_ptr, SHARES, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (jobs, 2). A job: row of the first of its two sums, instance, without which it has none."""
    job, which = tl.program_id(0), tl.program_id(1)
    if tl.load(opened_ptr + tl.load(jobs_ptr + job * 2 + 1)) == 0:
        return
    c = tl.arange(0, P)
    partial_ptr += job.to(tl.int64) * SHARES * (2 * C) + which * C
    total = tl.zeros([P], tl.float32)
    for start in range(0, SHARES, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = (i < SHARES)[:, None] & (c < C)[None, :]
        total += tl.sum(tl.load(partial_ptr + (i * (2 * C))[:, None] + c[None, :], mask=inside, other=0.0), 0)
    tl.store(sums_ptr + (tl.load(jobs_ptr + job * 2) + which) * C + c, total, mask=c < C)


def merge_sums(partial: Tensor, sums: Tensor, opened: Tensor, jobs: Tensor, shares: int, c: int):
    tensors = {"partial_ptr": partial, "sums_ptr": sums, "opened_ptr": opened, "jobs_ptr": jobs}
    launch(
        merge_sums_kernel, (len(jobs), 2), tensors, 0, SHARES=shares, C=c, P=padded(c),
        BLOCK=max(1, tuning.KNOBS["merged"] // padded(c)), num_warps=8,
    )  # fmt: skip
