"""A cell's packed weights, laid end to end, to the dense weights of its convolutions, and the gradients' way back."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import kernel, launch, padded, pieces


@triton.jit
def _product(weights_ptr, out_ptr, job_ptr, C: tl.constexpr, P: tl.constexpr):
    """A stage of an edge. Depthwise offset, pointwise offset, taps, out offset:
    out[tap, i, o] = depthwise[tap, i] * pointwise[i, o]."""
    depthwise_ptr, pointwise_ptr = weights_ptr + tl.load(job_ptr), weights_ptr + tl.load(job_ptr + 1)
    out_ptr += tl.load(job_ptr + 3)
    ci, co = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    mask = (ci < C) & (co < C)
    pointwise = tl.load(pointwise_ptr + ci * C + co, mask=mask, other=0.0)
    for tap in range(tl.program_id(0), tl.load(job_ptr + 2).to(tl.int32), tl.num_programs(0)):
        depthwise = tl.load(depthwise_ptr + tap * C + ci, mask=ci < C, other=0.0)
        tl.store(out_ptr + (tap * C + ci) * C + co, (depthwise * pointwise).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _halves(weights_ptr, out_ptr, job_ptr, BLOCK: tl.constexpr):
    """A factorized reduction. Even offset, odd offset, out offset, rows, columns of even, columns of both, edges.
    out[e, tap, row, column]: of tap 0 the first columns are even's, of tap 1 the last are odd's, the others 0."""
    rows, half, width = tl.load(job_ptr + 3), tl.load(job_ptr + 4), tl.load(job_ptr + 5)
    size = tl.load(job_ptr + 6) * 2 * rows * width
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < size
        column, row, tap, e = i % width, (i // width) % rows, (i // (width * rows)) % 2, i // (width * rows * 2)
        even = mask & (tap == 0) & (column < half)
        odd = mask & (tap == 1) & (column >= half)
        value = tl.load(weights_ptr + tl.load(job_ptr) + (e * rows + row) * half + column, mask=even, other=0.0)
        at = tl.load(job_ptr + 1) + (e * rows + row) * (width - half) + column - half
        value += tl.load(weights_ptr + at, mask=odd, other=0.0)
        tl.store(out_ptr + tl.load(job_ptr + 2) + i, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def expand(weights_ptr, out_ptr, job_ptr, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    """Dense weights of a job, shared out to the programs of axis 0. A job: kind (0: see _product, 1: see _halves), and
    what it needs."""
    if tl.load(job_ptr) == 1:
        _halves(weights_ptr, out_ptr, job_ptr + 1, BLOCK)
    else:
        _product(weights_ptr, out_ptr, job_ptr + 1, C, P)


@kernel
def expand_kernel(weights_ptr, out_ptr, jobs_ptr, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (programs, jobs). For stages alone; a cell's are expanded by mix_fwd_kernel."""
    expand(weights_ptr, out_ptr, jobs_ptr + tl.program_id(1) * 8, C, P, BLOCK)


@triton.jit
def _contract(dense_ptr, weights_ptr, out_ptr, job_ptr, C: tl.constexpr, P: tl.constexpr):
    """Depthwise offset, pointwise offset, taps, dense offset: the gradient of a stage's dense weight becomes those of
    its two factors, which lie in out as the weights do."""
    at_depthwise, at_pointwise = tl.load(job_ptr), tl.load(job_ptr + 1)
    dense_ptr += tl.load(job_ptr + 3)
    c, ci, co = tl.arange(0, P), tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    mask = (ci < C) & (co < C)
    pointwise = tl.load(weights_ptr + at_pointwise + ci * C + co, mask=mask, other=0.0)
    d_pointwise = tl.zeros([P, P], tl.float32)
    for tap in range(0, tl.load(job_ptr + 2).to(tl.int32)):
        dense = tl.load(dense_ptr + (tap * C + ci) * C + co, mask=mask, other=0.0)
        depthwise = tl.load(weights_ptr + at_depthwise + tap * C + c, mask=c < C, other=0.0)
        d_pointwise += dense * depthwise[:, None]
        tl.store(out_ptr + at_depthwise + tap * C + c, tl.sum(dense * pointwise, 1), mask=c < C)
    tl.store(out_ptr + at_pointwise + ci * C + co, d_pointwise, mask=mask)


@triton.jit
def _gather(dense_ptr, out_ptr, job_ptr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Dense offset, out offset, edges, rows, columns, tap, first column, distance of edges, distance of slices in
    dense: of weights that are dense already. out[e, row, column] = dense[e][slice][tap, row, channel], column =
    slice * C + channel."""
    rows, columns = tl.load(job_ptr + 3), tl.load(job_ptr + 4)
    size = tl.load(job_ptr + 2) * rows * columns
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < size
        column, row, e = i % columns + tl.load(job_ptr + 6), (i // columns) % rows, i // (columns * rows)
        where = dense_ptr + tl.load(job_ptr) + e * tl.load(job_ptr + 7) + (column // C) * tl.load(job_ptr + 8)
        where += (tl.load(job_ptr + 5) * rows + row) * C + column % C
        tl.store(out_ptr + tl.load(job_ptr + 1) + i, tl.load(where, mask=mask, other=0.0), mask=mask)


@kernel
def unpack_kernel(
    dense_ptr, weights_ptr, out_ptr, jobs_ptr, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradients of dense weights become those of the packed ones. Grid (programs, jobs). A job: kind (0: a stage of an
    edge, one program's work, see _contract; 1: see _gather), and what it needs."""
    jobs_ptr += tl.program_id(1) * 10
    if tl.load(jobs_ptr) == 1:
        _gather(dense_ptr, out_ptr, jobs_ptr + 1, C, BLOCK)
    elif tl.program_id(0) == 0:
        _contract(dense_ptr, weights_ptr, out_ptr, jobs_ptr + 1, C, P)


def unpack(dense: Tensor, weights: Tensor, out: Tensor, jobs: Tensor, c: int):
    tensors = {"dense_ptr": dense, "weights_ptr": weights, "out_ptr": out, "jobs_ptr": jobs}
    launch(unpack_kernel, (16, len(jobs)), tensors, 0, C=c, P=padded(c), BLOCK=256)


MANY = tl.constexpr(128)  # parts, of which a program takes so many that it waits for memory a few times only


@triton.jit
def _collected(partial_ptr, out_ptr, size, parts, distance, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    if start < size:
        i = start + tl.arange(0, BLOCK)
        total = tl.zeros([PARTS, BLOCK], tl.float32)
        for first in range(0, parts, PARTS):
            part = first + tl.arange(0, PARTS)
            where = (part * distance)[:, None] + i[None, :]
            total += tl.load(partial_ptr + where, mask=(part < parts)[:, None] & (i < size)[None, :], other=0.0)
        tl.store(out_ptr + i, tl.sum(total, 0), mask=i < size)


@kernel
def collect_kernel(partial_ptr, out_ptr, jobs_ptr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Sums the parts of gradients, always in the same order. Grid (blocks, jobs): partial offset, elements, parts, out
    offset, distance of the parts; but for parts all are multiples of ALIGNED. A program takes BLOCK elements and PARTS
    parts at a time, of MANY parts more at fewer elements."""
    jobs_ptr += tl.program_id(1) * 5
    size, parts = tl.load(jobs_ptr + 1).to(tl.int32), tl.load(jobs_ptr + 2).to(tl.int32)
    size, distance = tl.multiple_of(size, ALIGNED), tl.multiple_of(tl.load(jobs_ptr + 4), ALIGNED)
    partial_ptr += tl.multiple_of(tl.load(jobs_ptr), ALIGNED)
    out_ptr += tl.multiple_of(tl.load(jobs_ptr + 3), ALIGNED)
    if parts < MANY:
        _collected(partial_ptr, out_ptr, size, parts, distance, BLOCK, PARTS)
    else:
        _collected(partial_ptr, out_ptr, size, parts, distance, BLOCK // 8, PARTS * 8)


def collect(partial: Tensor, out: Tensor, rows: list[list[int]], jobs: Tensor):
    """rows: as collect_kernel's jobs. out may be partial, each result in its first part's place."""
    moved, block = 4 * sum(size * (parts + 1) for _, size, parts, _, _ in rows), 256
    blocks = max(pieces(size, block if parts < MANY.value else block // 8) for _, size, parts, _, _ in rows)
    aligned = all(number % 4 == 0 for at, size, _, to, distance in rows for number in (at, size, to, distance))
    launch(
        collect_kernel, (blocks, len(rows)), {"partial_ptr": partial, "out_ptr": out, "jobs_ptr": jobs}, moved,
        ALIGNED=4 if aligned else 1, BLOCK=block, PARTS=8,
    )  # fmt: skip
