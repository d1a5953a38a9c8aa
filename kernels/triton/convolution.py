"""Convolutions as matrix products over gathered rows (implicit GEMM): forward, both gradients, and the weights'
packing.

Depthwise followed by pointwise, with nothing between, is one dense convolution by depthwise * pointwise, which tensor
cores compute for all edges that leave a state at once. The same kernels serve stages of stride 2, factorized reductions
(two taps, (0, 0) and (1, 1), of stride 2) and preprocessing (one tap); stages of stride 1, and the gradients of what
leaves a state at stride 2, have kernels of their own (rows.py).

A *job* is one such convolution: a row of a table of int64 on the device. Its taps lie at

    dy = (tap // side) * dilation - pad,    dx = (tap % side) * dilation + (tap // side) * skew - pad

Maps are matrices of N*H*W rows and of channels, rows ``ROW`` elements apart, so that a slice of a wider map and a map
of its own are read alike. ``opened[i]`` is 0 for an instance i (a row of the cell's statistics) whose path is closed:
it is neither computed nor read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import INTERPRETED, TRITON_DTYPE, dot_options, kernel, launch, padded, pieces
from .statistics import leave_statistics


@triton.jit
def position(rows, HEIGHT, WIDTH):
    """Image, y and x of rows of a map."""
    x = rows % WIDTH
    rest = rows // WIDTH
    return rest // HEIGHT, rest % HEIGHT, x


@triton.jit
def tap_and_channel(chunk, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Split of k = chunk * BLOCK + 0..BLOCK-1 into k // WIDE and k % WIDE; both powers of two, written so that the
    compiler sees runs of neighbouring channels, without which loads are not wide."""
    k = tl.arange(0, BLOCK)
    if BLOCK >= WIDE:
        return chunk * (BLOCK // WIDE) + k // WIDE, k % WIDE
    else:
        return chunk // (WIDE // BLOCK) + k * 0, (chunk % (WIDE // BLOCK)) * BLOCK + k


@triton.jit
def _offsets(tap, side, dilation, pad, skew):
    """dy and dx of taps, of which there are fewer than 64 and a side has fewer than 8: division by a multiplication."""
    row = (tap * ((1023 + side) // side)) >> 10
    return row * dilation - pad, (tap - row * side) * dilation + row * skew - pad


@triton.jit
def within(y, x, HEIGHT, WIDTH):
    """Whether a pixel lies in a map: as an unsigned number, what is negative is too large as well. Sizes are constants,
    here and wherever pixels are counted: most are powers of two, by which division is a shift."""
    return (y.to(tl.uint32, bitcast=True) < HEIGHT) & (x.to(tl.uint32, bitcast=True) < WIDTH)


@triton.jit
def open_edges(opened_ptr, first, edges, EDGES: tl.constexpr):
    """Bit e: whether instance first + e is open. A scalar: a loaded vector would hide from the compiler that the mask
    is the same for all channels of an edge."""
    bits = 0
    for e in tl.static_range(EDGES):
        if e < edges:
            bits += (tl.load(opened_ptr + first + e) != 0).to(tl.int32) << e
    return bits


# Of two bfloat16 at a time. The compiler would round float32's maxima; nan stays nan here as well.
_RELU = tl.constexpr("{ .reg .b32 zero; mov.b32 zero, 0; max.NaN.bf16x2 $0, $1, zero; }")


@triton.jit
def activate(x, mean, inverse, NORMALIZE: tl.constexpr, DTYPE: tl.constexpr):
    """ReLU, after normalization where there is one, by blocks of which x is one or that are spread over it."""
    if not INTERPRETED and not NORMALIZE and x.dtype == tl.bfloat16 and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(_RELU, "=r,r", [x], tl.bfloat16, is_pure=True, pack=2)
    x = x.to(tl.float32)
    if NORMALIZE:
        x = x * inverse - mean * inverse  # one instruction; all that take its ReLU do it alike
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)


@kernel
def convolve_fwd_kernel(
    x_ptr, other_ptr, weight_ptr, out_ptr, partial_ptr, opened_ptr, jobs_ptr, M, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, EDGE, SHARES, STRIDE: tl.constexpr, X_ROW: tl.constexpr, OUT_ROW: tl.constexpr,
    WEIGHT_ROW: tl.constexpr, C_IN: tl.constexpr, C: tl.constexpr, EDGES: tl.constexpr, P_IN: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, jobs). A job: x offset, weight offset, weight's edge distance, taps, side, dilation, pad, skew,
    first output instance, output offset, edges, whether it reads other in place of x. Statistics of the outputs are
    left in partial[instance, tile], see leave_statistics.
    """
    tile, jobs_ptr = tl.program_id(0), jobs_ptr + tl.program_id(1) * 12
    taps, side = tl.load(jobs_ptr + 3).to(tl.int32), tl.load(jobs_ptr + 4).to(tl.int32)
    dilation, pad = tl.load(jobs_ptr + 5).to(tl.int32), tl.load(jobs_ptr + 6).to(tl.int32)
    skew, first = tl.load(jobs_ptr + 7).to(tl.int32), tl.load(jobs_ptr + 8).to(tl.int32)
    edges = tl.load(jobs_ptr + 10).to(tl.int32)
    opened = open_edges(opened_ptr, first, edges, EDGES)
    if opened == 0:
        return
    x_ptr = tl.where(tl.load(jobs_ptr + 11) == 0, x_ptr, other_ptr) + tl.multiple_of(tl.load(jobs_ptr), 8)
    weight_ptr += tl.multiple_of(tl.load(jobs_ptr + 1), 8)
    weight_edge = tl.multiple_of(tl.load(jobs_ptr + 2).to(tl.int32), 8)
    out_ptr += tl.multiple_of(tl.load(jobs_ptr + 9), 8)

    rows = tile * BLOCK + tl.arange(0, BLOCK)
    inside = rows < M
    n, oy, ox = position(rows, OH, OW)
    base = ((n * H + oy * STRIDE) * W + ox * STRIDE) * X_ROW
    column = tl.arange(0, EDGES * P)
    e, co = column // P, column % P
    kept = (((opened >> e) & 1) != 0) & (co < C)
    total = tl.zeros([BLOCK, EDGES * P], tl.float32)
    for chunk in range(0, tl.cdiv(taps * P_IN, BLOCK_K)):
        tap, ci = tap_and_channel(chunk, P_IN, BLOCK_K)
        dy, dx = _offsets(tap, side, dilation, pad, skew)
        y, x = (oy * STRIDE)[:, None] + dy[None, :], (ox * STRIDE)[:, None] + dx[None, :]
        fits = ((tap < taps) & (ci < C_IN))[None, :]
        loaded = inside[:, None] & fits & within(y, x, H, W)
        values = tl.load(x_ptr + base[:, None] + ((dy * W + dx) * X_ROW + ci)[None, :], mask=loaded, other=0.0)
        values = activate(values, 0.0, 1.0, False, DTYPE)
        weights = weight_ptr + ((tap * C_IN + ci) * WEIGHT_ROW)[:, None] + (e * weight_edge + co)[None, :]
        weights = tl.load(weights, mask=((tap < taps) & (ci < C_IN))[:, None] & kept[None, :], other=0.0).to(DTYPE)
        total = tl.dot(values, weights, total, input_precision=PRECISION)

    stored = total.to(out_ptr.dtype.element_ty)
    where = e.to(tl.int64)[None, :] * EDGE + (rows.to(tl.int64) * OUT_ROW)[:, None] + co[None, :]
    tl.store(out_ptr + where, stored, mask=inside[:, None] & kept[None, :])
    value = stored.to(tl.float32)  # statistics are of what was stored, rounding included
    count = tl.minimum(M - tile * BLOCK, BLOCK).to(tl.float32)
    sums = tl.sum(value, 0)  # rows outside are 0: their inputs were
    away = tl.where(inside[:, None], value - (sums / count)[None, :], 0.0)
    leave_statistics(partial_ptr, tile, count, sums, tl.sum(away * away, 0), first + e, co, kept, SHARES, C)


@kernel
def convolve_dgrad_kernel(
    d_ptr, weight_ptr, x_ptr, dx_ptr, opened_ptr, jobs_ptr, segments_ptr, M, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, EDGE, STRIDE: tl.constexpr, X_ROW: tl.constexpr, DX_ROW: tl.constexpr,
    D_ROW: tl.constexpr, WEIGHT_ROW: tl.constexpr, C_IN: tl.constexpr, C: tl.constexpr, EDGES: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of x, jobs, blocks of input channels). A job: x offset, dx offset, first segment, segments, and, for
    rows_dgrad_kernel and its launcher, the rows of x's statistics and of its sums (of a second stage). A segment: d
    offset, first instance, edges, weight offset, weight's edge distance, taps, side, dilation, pad, skew.
    dx = (x > 0) * sum over segments.
    """
    tile, jobs_ptr = tl.program_id(0), jobs_ptr + tl.program_id(1) * 6
    start, count = tl.load(jobs_ptr + 2).to(tl.int32), tl.load(jobs_ptr + 3).to(tl.int32)
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    inside = rows < M
    n, y, x = position(rows, H, W)
    ci = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    WIDE: tl.constexpr = EDGES * P
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for s in range(start, start + count):
        segment = segments_ptr + s * 10
        opened = open_edges(opened_ptr, tl.load(segment + 1).to(tl.int32), tl.load(segment + 2).to(tl.int32), EDGES)
        if opened != 0:
            d = d_ptr + tl.multiple_of(tl.load(segment), 8)
            weight = weight_ptr + tl.multiple_of(tl.load(segment + 3), 8)
            weight_edge = tl.multiple_of(tl.load(segment + 4).to(tl.int32), 8)
            taps, side = tl.load(segment + 5).to(tl.int32), tl.load(segment + 6).to(tl.int32)
            dilation, pad = tl.load(segment + 7).to(tl.int32), tl.load(segment + 8).to(tl.int32)
            skew = tl.load(segment + 9).to(tl.int32)
            for chunk in range(0, tl.cdiv(taps * WIDE, BLOCK_K)):
                tap, column = tap_and_channel(chunk, WIDE, BLOCK_K)
                dy, dx = _offsets(tap, side, dilation, pad, skew)
                top, left = y[:, None] - dy[None, :], x[:, None] - dx[None, :]
                if EDGES == 1:  # said apart: behind a division by the width the compiler sees no run of channels
                    co, d_inner, weight_inner = column, column, column
                    kept = (tap < taps) & (co < C)
                else:
                    e, co = column // P, column % P
                    d_inner, weight_inner = e.to(tl.int64) * EDGE + co, e * weight_edge + co
                    kept = (tap < taps) & (((opened >> e) & 1) != 0) & (co < C)
                loaded = inside[:, None] & kept[None, :]
                if STRIDE == 2:
                    loaded = loaded & (((top | left) & 1) == 0)
                    top, left = top >> 1, left >> 1
                loaded = loaded & within(top, left, OH, OW)
                where = d_inner[None, :] + ((n[:, None] * OH + top) * OW + left) * D_ROW
                values = tl.load(d + where, mask=loaded, other=0.0).to(DTYPE)
                where = (weight_inner + tap * (C_IN * WEIGHT_ROW))[:, None] + (ci * WEIGHT_ROW)[None, :]
                weights = tl.load(weight + where, mask=kept[:, None] & (ci < C_IN)[None, :], other=0.0).to(DTYPE)
                total = tl.dot(values, weights, total, input_precision=PRECISION)

    mask = inside[:, None] & (ci < C_IN)[None, :]
    x_ptr += tl.multiple_of(tl.load(jobs_ptr), 8)
    value = tl.load(x_ptr + (rows.to(tl.int64) * X_ROW)[:, None] + ci[None, :], mask=mask, other=0.0).to(tl.float32)
    out = tl.where(mask & (value > 0), total, 0.0)
    dx_ptr += tl.multiple_of(tl.load(jobs_ptr + 1), 8)
    tl.store(dx_ptr + (rows.to(tl.int64) * DX_ROW)[:, None] + ci[None, :], out.to(dx_ptr.dtype.element_ty), mask=mask)


@kernel
def convolve_wgrad_kernel(
    d_ptr, x_ptr, partial_ptr, opened_ptr, jobs_ptr, M, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr,
    OW: tl.constexpr, EDGE, DISTANCE, STRIDE: tl.constexpr, X_ROW: tl.constexpr, D_ROW: tl.constexpr,
    C_IN: tl.constexpr, C: tl.constexpr, EDGES: tl.constexpr, P_IN: tl.constexpr, P: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (parts of the rows, jobs, chunks of taps and input channels). A job: x offset, d offset, first instance,
    edges, taps, side, dilation, pad, skew, offset in a part's results, for rows_wgrad_kernel the statistics row of x.
    partial: parts DISTANCE apart, in each a job's edges, taps, input and output channels from its offset on, 0 for
    closed edges. A later kernel sums up, part by part.
    """
    part, jobs_ptr, chunk = tl.program_id(0), jobs_ptr + tl.program_id(1) * 11, tl.program_id(2)
    taps, side = tl.load(jobs_ptr + 4).to(tl.int32), tl.load(jobs_ptr + 5).to(tl.int32)
    edges = tl.load(jobs_ptr + 3).to(tl.int32)
    opened = open_edges(opened_ptr, tl.load(jobs_ptr + 2).to(tl.int32), edges, EDGES)
    if chunk * BLOCK_K >= taps * P_IN:
        return
    dilation, pad = tl.load(jobs_ptr + 6).to(tl.int32), tl.load(jobs_ptr + 7).to(tl.int32)
    skew = tl.load(jobs_ptr + 8).to(tl.int32)
    x_ptr += tl.multiple_of(tl.load(jobs_ptr), 8)
    d_ptr += tl.multiple_of(tl.load(jobs_ptr + 1), 8)
    tap, ci = tap_and_channel(chunk, P_IN, BLOCK_K)
    dy, dx = _offsets(tap, side, dilation, pad, skew)
    fits = (tap < taps) & (ci < C_IN)
    column = tl.arange(0, EDGES * P)
    e, co = column // P, column % P
    kept = (((opened >> e) & 1) != 0) & (co < C)
    total = tl.zeros([EDGES * P, BLOCK_K], tl.float32)
    tiles = tl.where(opened != 0, tl.cdiv(M, BLOCK), 0)
    for tile in range(part, tiles, tl.num_programs(0)):
        rows = tile * BLOCK + tl.arange(0, BLOCK)
        inside = rows < M
        n, oy, ox = position(rows, OH, OW)
        base = ((n * H + oy * STRIDE) * W + ox * STRIDE) * X_ROW
        y, x = (oy * STRIDE)[:, None] + dy[None, :], (ox * STRIDE)[:, None] + dx[None, :]
        loaded = inside[:, None] & fits[None, :] & within(y, x, H, W)
        values = tl.load(x_ptr + base[:, None] + ((dy * W + dx) * X_ROW + ci)[None, :], mask=loaded, other=0.0)
        values = activate(values, 0.0, 1.0, False, DTYPE)
        where = e.to(tl.int64)[None, :] * EDGE + (rows.to(tl.int64) * D_ROW)[:, None] + co[None, :]
        d = tl.load(d_ptr + where, mask=inside[:, None] & kept[None, :], other=0.0).to(DTYPE)
        total = tl.dot(tl.trans(d), values, total, input_precision=PRECISION)
    where = (e * taps * (C_IN * C) + co)[:, None] + ((tap * C_IN + ci) * C)[None, :]
    partial_ptr += part.to(tl.int64) * DISTANCE + tl.load(jobs_ptr + 9)
    tl.store(partial_ptr + where, total, mask=((e < edges) & (co < C))[:, None] & fits[None, :])


def _geometry(size, out_size):
    """Arguments that say where rows lie."""
    return {"H": size[0], "W": size[1], "OH": out_size[0], "OW": out_size[1]}


def convolve_fwd(
    x: Tensor, weight: Tensor, out: Tensor, partial: Tensor, opened: Tensor, jobs: Tensor, *, n: int,
    size: tuple[int, int], out_size: tuple[int, int], stride: int, x_row: int, out_row: int, edge: int, shares: int,
    weight_row: int, c_in: int, c: int, edges: int, moved: float, other: Tensor | None = None,
) -> int:  # fmt: skip
    """n, size, out_size: images, and (H, W) of the maps. edge: elements between the outputs of two edges of a job.
    shares: of statistics of each instance, for which partial has place; the number of those that were left there is
    returned. In evaluation nobody reads them: one kernel serves both. other: a map like x, for jobs that read that."""
    p_in, p, m = padded(c_in), padded(c), n * out_size[0] * out_size[1]
    edges, options = padded(edges), dot_options(out.dtype)
    options |= tuning.convolution(p_in, edges * p, size[1], options["PRECISION"], out.element_size())
    tensors = {
        "x_ptr": x, "other_ptr": x if other is None else other, "weight_ptr": weight, "out_ptr": out,
        "partial_ptr": partial, "opened_ptr": opened, "jobs_ptr": jobs,
    }  # fmt: skip
    launch(
        convolve_fwd_kernel, (tuning.tiles(m), len(jobs)), tensors, moved, M=m, **_geometry(size, out_size),
        EDGE=edge, SHARES=shares, STRIDE=stride, X_ROW=x_row, OUT_ROW=out_row, WEIGHT_ROW=weight_row, C_IN=c_in, C=c,
        EDGES=edges, P_IN=p_in, P=p, BLOCK=tuning.block(), DTYPE=TRITON_DTYPE[out.dtype], **options,
    )  # fmt: skip
    return tuning.tiles(m)


def convolve_dgrad(
    d: Tensor, weight: Tensor, x: Tensor, dx: Tensor, opened: Tensor, jobs: Tensor, segments: Tensor, *, n: int,
    size: tuple[int, int], out_size: tuple[int, int], stride: int, x_row: int, dx_row: int, d_row: int, edge: int,
    weight_row: int, c_in: int, c: int, edges: int, moved: float,
):  # fmt: skip
    p_in, p, m = padded(c_in), padded(c), n * size[0] * size[1]
    edges = padded(
        edges if edges == 1 else max(edges, 16 // p)
    )  # or else a tap is narrower than a matrix product's step
    options = dot_options(dx.dtype)
    options |= tuning.data_gradient(p_in, edges * p, stride, options["PRECISION"], dx.element_size())
    tensors = {
        "d_ptr": d, "weight_ptr": weight, "x_ptr": x, "dx_ptr": dx, "opened_ptr": opened, "jobs_ptr": jobs,
        "segments_ptr": segments,
    }  # fmt: skip
    launch(
        convolve_dgrad_kernel, (tuning.tiles(m), len(jobs), pieces(c_in, options["COLUMNS"])), tensors, moved, M=m,
        **_geometry(size, out_size), EDGE=edge, STRIDE=stride, X_ROW=x_row, DX_ROW=dx_row, D_ROW=d_row,
        WEIGHT_ROW=weight_row, C_IN=c_in, C=c, EDGES=edges, P=p, BLOCK=tuning.block(), DTYPE=TRITON_DTYPE[dx.dtype],
        **options,
    )  # fmt: skip


def _wgrad_options(c_in: int, c: int, edges: int, dtype: torch.dtype) -> dict:
    options = dot_options(dtype)
    return options | tuning.weight_gradient(
        padded(c_in), padded(edges) * padded(c), options["PRECISION"], dtype.itemsize
    )


def wgrad_parts(m: int, c_in: int, c: int, edges: int, taps: int, jobs: int, dtype: torch.dtype) -> int:
    """How many parts a weight gradient is cut into, so that its programs fill the chip."""
    options = _wgrad_options(c_in, c, edges, dtype)
    chunks = pieces(taps * padded(c_in), options["BLOCK_K"])
    return max(1, min(pieces(m, options["BLOCK"]), pieces(tuning.KNOBS["programs"], jobs * chunks)))


def convolve_wgrad(
    d: Tensor, x: Tensor, partial: Tensor, opened: Tensor, jobs: Tensor, *, n: int, size: tuple[int, int],
    out_size: tuple[int, int], stride: int, x_row: int, d_row: int, edge: int, c_in: int, c: int, edges: int, taps: int,
    parts: int, distance: int, moved: float,
):  # fmt: skip
    """Partial gradients, float32, parts of them, distance apart. taps: the most of any job."""
    p_in, p, m, edges = padded(c_in), padded(c), n * out_size[0] * out_size[1], padded(edges)
    options = _wgrad_options(c_in, c, edges, x.dtype)
    tensors = {"d_ptr": d, "x_ptr": x, "partial_ptr": partial, "opened_ptr": opened, "jobs_ptr": jobs}
    launch(
        convolve_wgrad_kernel, (parts, len(jobs), pieces(taps * p_in, options["BLOCK_K"])), tensors, moved, M=m,
        **_geometry(size, out_size), EDGE=edge, DISTANCE=distance, STRIDE=stride, X_ROW=x_row, D_ROW=d_row, C_IN=c_in,
        C=c, EDGES=edges, P_IN=p_in, P=p, DTYPE=TRITON_DTYPE[x.dtype], **options,
    )  # fmt: skip
