"""A cell's packed weights, laid end to end, to the dense weights of its convolutions, and the gradients' way back."""

import triton.language as tl
from torch import Tensor

from .launch import kernel, launch, pieces


@kernel
def expand_kernel(weights_ptr, out_ptr, jobs_ptr, C: tl.constexpr, P: tl.constexpr):
    """Grid (jobs,), a stage of an edge each: depthwise offset, pointwise offset, taps, out offset.
    out[tap, i, o] = depthwise[tap, i] * pointwise[i, o].
    """
    jobs_ptr += tl.program_id(0) * 4
    depthwise_ptr, pointwise_ptr = weights_ptr + tl.load(jobs_ptr), weights_ptr + tl.load(jobs_ptr + 1)
    out_ptr += tl.load(jobs_ptr + 3)
    ci, co = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    mask = (ci < C) & (co < C)
    pointwise = tl.load(pointwise_ptr + ci * C + co, mask=mask, other=0.0)
    for tap in range(0, tl.load(jobs_ptr + 2).to(tl.int32)):
        depthwise = tl.load(depthwise_ptr + tap * C + ci, mask=ci < C, other=0.0)
        tl.store(out_ptr + (tap * C + ci) * C + co, (depthwise * pointwise).to(out_ptr.dtype.element_ty), mask=mask)


@kernel
def contract_kernel(dense_ptr, weights_ptr, out_ptr, jobs_ptr, C: tl.constexpr, P: tl.constexpr):
    """Grid (jobs,), a stage of an edge each: depthwise offset, pointwise offset, taps, dense offset. The gradient of
    the dense weight becomes those of its two factors, which lie in out as the weights do.
    """
    jobs_ptr += tl.program_id(0) * 4
    at_depthwise, at_pointwise = tl.load(jobs_ptr), tl.load(jobs_ptr + 1)
    dense_ptr += tl.load(jobs_ptr + 3)
    c, ci, co = tl.arange(0, P), tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    mask = (ci < C) & (co < C)
    pointwise = tl.load(weights_ptr + at_pointwise + ci * C + co, mask=mask, other=0.0)
    d_pointwise = tl.zeros([P, P], tl.float32)
    for tap in range(0, tl.load(jobs_ptr + 2).to(tl.int32)):
        dense = tl.load(dense_ptr + (tap * C + ci) * C + co, mask=mask, other=0.0)
        depthwise = tl.load(weights_ptr + at_depthwise + tap * C + c, mask=c < C, other=0.0)
        d_pointwise += dense * depthwise[:, None]
        tl.store(out_ptr + at_depthwise + tap * C + c, tl.sum(dense * pointwise, 1), mask=c < C)
    tl.store(out_ptr + at_pointwise + ci * C + co, d_pointwise, mask=mask)


@kernel
def halves_kernel(weights_ptr, out_ptr, jobs_ptr, BLOCK: tl.constexpr):
    """The dense weights of factorized reductions. Grid (blocks, jobs): even offset, odd offset, out offset, rows,
    columns of even, columns of both, edges. out[e, tap, row, column]: of tap 0 the first columns are even's, of tap 1
    the last are odd's, the others 0.
    """
    jobs_ptr += tl.program_id(1) * 7
    rows, half, width = tl.load(jobs_ptr + 3), tl.load(jobs_ptr + 4), tl.load(jobs_ptr + 5)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < tl.load(jobs_ptr + 6) * 2 * rows * width
    column, row, tap, e = i % width, (i // width) % rows, (i // (width * rows)) % 2, i // (width * rows * 2)
    even = mask & (tap == 0) & (column < half)
    odd = mask & (tap == 1) & (column >= half)
    value = tl.load(weights_ptr + tl.load(jobs_ptr) + (e * rows + row) * half + column, mask=even, other=0.0)
    at = tl.load(jobs_ptr + 1) + (e * rows + row) * (width - half) + column - half
    value += tl.load(weights_ptr + at, mask=odd, other=0.0)
    tl.store(out_ptr + tl.load(jobs_ptr + 2) + i, value.to(out_ptr.dtype.element_ty), mask=mask)


@kernel
def gather_kernel(dense_ptr, out_ptr, jobs_ptr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of weights that are dense already. Grid (blocks, jobs): dense offset, out offset, edges, rows, columns,
    tap, first column, distance of edges, distance of slices in dense. out[e, row, column] = dense[e][slice][tap, row,
    channel], column = slice * C + channel.
    """
    jobs_ptr += tl.program_id(1) * 9
    rows, columns = tl.load(jobs_ptr + 3), tl.load(jobs_ptr + 4)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < tl.load(jobs_ptr + 2) * rows * columns
    column, row, e = i % columns + tl.load(jobs_ptr + 6), (i // columns) % rows, i // (columns * rows)
    where = dense_ptr + tl.load(jobs_ptr) + e * tl.load(jobs_ptr + 7) + (column // C) * tl.load(jobs_ptr + 8)
    where += (tl.load(jobs_ptr + 5) * rows + row) * C + column % C
    tl.store(out_ptr + tl.load(jobs_ptr + 1) + i, tl.load(where, mask=mask, other=0.0), mask=mask)


@kernel
def collect_kernel(partial_ptr, out_ptr, jobs_ptr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Sums the parts of gradients, always in the same order. Grid (blocks, jobs): partial offset, elements, parts, out
    offset, distance of the parts."""
    jobs_ptr += tl.program_id(1) * 5
    size, parts = tl.load(jobs_ptr + 1).to(tl.int32), tl.load(jobs_ptr + 2).to(tl.int32)
    distance = tl.load(jobs_ptr + 4)
    if tl.program_id(0) * BLOCK < size:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        partial_ptr += tl.load(jobs_ptr)
        total = tl.zeros([PARTS, BLOCK], tl.float32)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            where = (part * distance)[:, None] + i[None, :]
            total += tl.load(partial_ptr + where, mask=(part < parts)[:, None] & (i < size)[None, :], other=0.0)
        tl.store(out_ptr + tl.load(jobs_ptr + 3) + i, tl.sum(total, 0), mask=i < size)


def collect(partial: Tensor, out: Tensor, rows: list[list[int]], jobs: Tensor):
    """rows: as collect_kernel's jobs. out may be partial, each result in its first part's place."""
    moved = 4 * sum(size * (parts + 1) for _, size, parts, _, _ in rows)
    launch(
        collect_kernel, (pieces(max(row[1] for row in rows), 32), len(rows)),
        {"partial_ptr": partial, "out_ptr": out, "jobs_ptr": jobs}, moved, BLOCK=32, PARTS=64,
    )  # fmt: skip
