"""Convolutions of stride 1 as matrix products over blocks of rows: what is loaded serves outputs above and below it.

The kernels of convolution.py load an element once a tap, and so are bound by the first-level cache and shared memory.
Here a program has outputs in TALL rows, one under the other, of BLOCK columns (of several images, side by side), and
for each column of taps loads the rows that any of its outputs needs: of a 5x5 convolution 8 for 4 rows of outputs in
place of 20. Where an element lies is counted once a column of taps; a row is a distance from there.

Of few channels a column is ACROSS outputs wide: what their taps see, of all channels, is a row of the matrix product,
and the weights of each output stand in columns of their own, among zeros. Of a 5x5 convolution with two outputs that is
6 loads in place of 10; the zeros stand where blocks of a power of two had idle lanes.

In bfloat16 the loops over columns of taps are pipelined (num_stages): Triton then copies the rows of the next columns
to shared memory, all at a time, while these are multiplied. Without that it stores each row there, for the matrix unit,
before it loads the next: a program would wait for every row, one after the other.

Jobs and segments are those of convolution.py. Their taps are a square of side 3 or 5, of dilation 1 or 2. Gradients of
the inputs of stages of stride 2 and of factorized reductions are here as well.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .convolution import activate, open_edges, tap_and_channel
from .launch import SINCE_3_7, TRITON_DTYPE, both, dot_options, kernel, launch, padded, pieces
from .statistics import leave_statistics_of_rows, leave_sums


@triton.jit
def place_of(
    tile, IMAGES, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, TALL: tl.constexpr, ACROSS: tl.constexpr = 1
):  # fmt: skip
    """Of a tile: its first row, and of its columns the image, which column of it each is (see first_of), and whether
    there is one."""
    blocks: tl.constexpr = (H + TALL - 1) // TALL
    columns: tl.constexpr = W // ACROSS
    i = tile // blocks * BLOCK + tl.arange(0, BLOCK)
    return tile % blocks * TALL, i // columns, i % columns, i < IMAGES * columns


@triton.jit
def first_of(column, step, ACROSS: tl.constexpr):
    """x of the first of a column's ACROSS outputs, which lie a step of 1 or 2 apart."""
    if ACROSS == 1:
        return column
    odd = column & (step - 1)
    return (column - odd) * ACROSS + odd


@triton.jit
def zero_totals(BLOCK: tl.constexpr, COLUMNS: tl.constexpr, TALL: tl.constexpr):
    totals = ()
    for _ in tl.static_range(TALL):
        totals = totals + (tl.zeros([BLOCK, COLUMNS], tl.float32),)
    return totals


@triton.jit
def load_row(
    pointer, nothing, mask, y, H: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr, i: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Row y + i, of W pixels, ROW elements apart. What lies outside reads as what is 0 behind the ReLU, of rows to be
    normalized at nothing, a block of pointers to -inf: a copy into shared memory that waits for nobody can put no other
    number than 0 in its place."""
    mask = both(both(mask, y + i >= 0), y + i < H)
    if NORMALIZE:
        found = tl.where(mask, pointer + i * (W * ROW), nothing)
        if SINCE_3_7:
            # Both lie in one workspace, as aligned as ROW is, which is not known any more behind a choice of pointers.
            ALIGNED: tl.constexpr = 8 if ROW % 8 == 0 else 4 if ROW % 4 == 0 else 1
            BYTES: tl.constexpr = ALIGNED * pointer.dtype.element_ty.primitive_bitwidth // 8
            found = tl.multiple_of(found, [1, BYTES] if nothing.shape[0] == 1 else [BYTES, 1])
        return tl.load(found)
    return tl.load(pointer + i * (W * ROW), mask=mask, other=0.0)


@triton.jit
def renamed(values):
    """The same under another name, for the next product of a row. Since Triton 3.7, of those that ask for the very
    same, only the first has it computed in its own layout; for the others it would be stored to shared memory once
    more, between barriers."""
    if SINCE_3_7:
        integer: tl.constexpr = tl.int16 if values.dtype.primitive_bitwidth == 16 else tl.int32
        values = values.to(integer, bitcast=True).to(values.dtype, bitcast=True)
    return values


@triton.jit
def _products(
    totals, weights, pointer, nothing, mask, y, mean, inverse, H: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr,
    SIDE: tl.constexpr, DILATION: tl.constexpr, TALL: tl.constexpr, ACTIVATE: tl.constexpr, NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """totals with the products of one column of taps added. pointer: to what the first output's first tap reads, in row
    y; nothing: see load_row."""
    for i in tl.static_range(TALL + DILATION * (SIDE - 1)):
        values = load_row(pointer, nothing, mask, y, H, W, ROW, i, NORMALIZE)
        if ACTIVATE:
            values = activate(values, mean, inverse, NORMALIZE, DTYPE)
        values = values.to(DTYPE)
        changed = ()
        for r in tl.static_range(TALL):
            total = totals[r]
            if i >= r and (i - r) % DILATION == 0 and (i - r) // DILATION < SIDE:
                total = tl.dot(values, weights[(i - r) // DILATION], total, input_precision=PRECISION)
                if ACTIVATE:
                    values = renamed(values)
            changed = changed + (total,)
        totals = changed
    return totals


@triton.jit
def _forward(
    totals, x_ptr, weight_ptr, mean_ptr, inverse_ptr, nothing_ptr, weight_edge, opened, y, n, column, inside,
    H: tl.constexpr, W: tl.constexpr, SIDE: tl.constexpr, DILATION: tl.constexpr, X_ROW: tl.constexpr, C: tl.constexpr,
    EDGES: tl.constexpr, NORMALIZE: tl.constexpr, P: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    ACROSS: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    PAD: tl.constexpr = DILATION * (SIDE - 1) // 2
    SEEN: tl.constexpr = SIDE + ACROSS - 1  # pixels of a row that outputs side by side read
    e, across, co = edge_and_output(EDGES, ACROSS, P)
    kept = (((opened >> e) & 1) != 0) & (co < C)
    x = first_of(column, DILATION, ACROSS)
    base = ((n * H + y - PAD) * W + x) * X_ROW
    for chunk in range(0, (SEEN * P + WIDE - 1) // WIDE):
        seen, ci = tap_and_channel(chunk, P, WIDE)
        dx, fits = seen * DILATION - PAD, (seen < SEEN) & (ci < C)
        kx, used = seen[:, None], fits[:, None] & kept[None, :]
        if ACROSS > 1:
            kx -= across[None, :]
            used = used & (kx >= 0) & (kx < SIDE)
        mask = inside[:, None] & fits[None, :] & has_pixel(x[:, None] + dx[None, :], W)
        mean, inverse = 0.0, 1.0
        if NORMALIZE:
            mean = tl.load(mean_ptr + ci, mask=ci < C, other=0.0)[None, :]
            inverse = tl.load(inverse_ptr + ci, mask=ci < C, other=1.0)[None, :]
        weights = ()
        for ky in tl.static_range(SIDE):
            where = ((ky * SIDE + kx) * C + ci[:, None]) * C + (e * weight_edge + co)[None, :]
            loaded = tl.load(weight_ptr + where, mask=used, other=0.0)
            weights = weights + (loaded.to(DTYPE),)
        totals = _products(
            totals, weights, x_ptr + base[:, None] + (dx * X_ROW + ci)[None, :], nothing_ptr + ci[None, :], mask,
            y - PAD, mean, inverse, H, W, X_ROW, SIDE, DILATION, TALL, True, NORMALIZE, PRECISION, DTYPE,
        )  # fmt: skip
    return totals


@triton.jit
def edge_and_output(EDGES: tl.constexpr, ACROSS: tl.constexpr, P: tl.constexpr):
    """Of the columns of sums: edge, which of the outputs side by side, and channel."""
    i = tl.arange(0, EDGES * ACROSS * P)
    return i // (ACROSS * P), i // P % ACROSS, i % P


@triton.jit
def has_pixel(x, W: tl.constexpr):
    """Whether there is a pixel at x."""
    return x.to(tl.uint32, bitcast=True) < W


@kernel
def rows_fwd_kernel(
    x_ptr, weight_ptr, out_ptr, partial_ptr, mean_ptr, inverse_ptr, nothing_ptr, opened_ptr, jobs_ptr, IMAGES,
    H: tl.constexpr, W: tl.constexpr, EDGE, SHARES, X_ROW: tl.constexpr, OUT_ROW: tl.constexpr, C: tl.constexpr,
    EDGES: tl.constexpr, NORMALIZE: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, TALL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr, ACROSS: tl.constexpr = 1,
):  # fmt: skip
    """As convolve_fwd_kernel, but the last number of a job is the statistics row of x, of a second stage, and a tile
    leaves a share of statistics for each of ACROSS outputs. nothing: see load_row."""
    tile, jobs_ptr = tl.program_id(0), jobs_ptr + tl.program_id(1) * 12
    side, dilation = tl.load(jobs_ptr + 4).to(tl.int32), tl.load(jobs_ptr + 5).to(tl.int32)
    first, edges = tl.load(jobs_ptr + 8).to(tl.int32), tl.load(jobs_ptr + 10).to(tl.int32)
    opened = open_edges(opened_ptr, first, edges, EDGES)
    if opened == 0:
        return
    x_ptr += tl.multiple_of(tl.load(jobs_ptr), 8)
    weight_ptr += tl.multiple_of(tl.load(jobs_ptr + 1), 8)
    weight_edge = tl.multiple_of(tl.load(jobs_ptr + 2).to(tl.int32), 8)
    out_ptr += tl.multiple_of(tl.load(jobs_ptr + 9), 8)
    row = tl.load(jobs_ptr + 11).to(tl.int32)
    mean_ptr, inverse_ptr = mean_ptr + row * C, inverse_ptr + row * C

    y, n, column, inside = place_of(tile, IMAGES, H, W, BLOCK, TALL, ACROSS)
    totals = zero_totals(BLOCK, EDGES * ACROSS * P, TALL)
    for kind in tl.static_range(4):
        if (side == 3 + kind // 2 * 2) & (dilation == 1 + kind % 2):
            totals = _forward(
                totals, x_ptr, weight_ptr, mean_ptr, inverse_ptr, nothing_ptr, weight_edge, opened, y, n, column,
                inside, H, W, 3 + kind // 2 * 2, 1 + kind % 2, X_ROW, C, EDGES, NORMALIZE, P, TALL, WIDE, ACROSS,
                PRECISION, DTYPE,
            )  # fmt: skip

    e, across, co = edge_and_output(EDGES, ACROSS, P)
    kept = (((opened >> e) & 1) != 0) & (co < C)
    place = ((n * H + y) * W + first_of(column, dilation, ACROSS)).to(tl.int64)
    inner, share = co, tile
    if ACROSS > 1:
        inner, share = co + across * dilation * OUT_ROW, tile * ACROSS + across
    where = e.to(tl.int64)[None, :] * EDGE + place[:, None] * OUT_ROW + inner[None, :]
    for r in tl.static_range(TALL):
        stored = totals[r].to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + where + r * W * OUT_ROW, stored, mask=both(inside, y + r < H)[:, None] & kept[None, :])
    leave_statistics_of_rows(
        partial_ptr, share, totals, inside, y, H, TALL, out_ptr.dtype.element_ty, first + e, co, kept, SHARES, C
    )  # fmt: skip


@triton.jit
def _taps(parity, taps, side, dilation, STRIDE: tl.constexpr):
    """Along one axis, the taps through which inputs of a parity pass to outputs: how many, the last one, their
    distance, and where, from an input's own place on, the output of the last one lies; the others follow."""
    pad = dilation * (side - 1) // 2
    count, last, step, low = side, side - 1, 1, -pad
    if STRIDE == 2:
        if taps == 2:  # of a factorized reduction, one for each parity
            count, last, low = 1, parity, 0
        elif dilation == 2:
            count, low = tl.where(parity == 0, side, 0), -(side // 2)
        else:
            first = (parity + pad) % 2
            count, step = (side - first + 1) // 2, 2
            last, low = first + 2 * (count - 1), (parity + pad - first) // 2 - (count - 1)
    return count, last, step, low


@triton.jit
def _backward(
    totals, d_ptr, weight_ptr, weight_edge, EDGE, opened, y, n, x, inside, across, ci, last, step, low, x_count, x_last,
    x_step, x_low, side, OH: tl.constexpr, OW: tl.constexpr, COUNT: tl.constexpr, DILATION: tl.constexpr,
    D_ROW: tl.constexpr, C: tl.constexpr, EDGES: tl.constexpr, P: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    ACROSS: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What is convolved lies mirrored: an input's gradient comes from the outputs that it is a tap of. See _taps. Of
    inputs side by side all pixels between their first and last taps are read, with dilation too: they are next to each
    other for all segments."""
    STEP: tl.constexpr = DILATION if ACROSS == 1 else 1
    base = ((n * OH + y + low) * OW + x) * D_ROW
    pixels = x_count if ACROSS == 1 else DILATION * (x_count - 1) + ACROSS
    for chunk in range(0, tl.cdiv(pixels * EDGES * P, WIDE)):
        seen, column = tap_and_channel(chunk, EDGES * P, WIDE)
        dx = x_low + seen * STEP
        if EDGES == 1:  # said apart: behind a division by the width the compiler sees no run of channels
            co, inner, weight_inner = column, column, column
            fits = (seen < pixels) & (co < C)
        else:
            e, co = column // P, column % P
            inner, weight_inner = e.to(tl.int64) * EDGE + co, e * weight_edge + co
            fits = (seen < pixels) & (((opened >> e) & 1) != 0) & (co < C)
        mask = inside[:, None] & fits[None, :] & has_pixel(x[:, None] + dx[None, :], OW)
        tap, used = seen[:, None], fits[:, None] & (ci < C)[None, :]
        if ACROSS > 1:
            first = tap - across[None, :]
            tap = first // DILATION
            used = used & (first >= 0) & (first % DILATION == 0) & (tap < x_count)
        weights = ()
        for ky in tl.static_range(COUNT):
            place = (last - ky * step) * side + x_last - tap * x_step
            where = weight_inner[:, None] + place * (C * C) + (ci * C)[None, :]
            loaded = tl.load(weight_ptr + where, mask=used, other=0.0)
            weights = weights + (loaded.to(DTYPE),)
        totals = _products(
            totals, weights, d_ptr + base[:, None] + (dx * D_ROW + inner)[None, :], None, mask, y + low, 0.0, 1.0, OH,
            OW, D_ROW, COUNT, DILATION, TALL, False, False, PRECISION, DTYPE,
        )  # fmt: skip
    return totals


@kernel
def rows_dgrad_kernel(
    d_ptr, weight_ptr, x_ptr, dx_ptr, partial_ptr, mean_ptr, inverse_ptr, opened_ptr, jobs_ptr, segments_ptr, IMAGES,
    H: tl.constexpr, W: tl.constexpr, EDGE, STRIDE: tl.constexpr, X_ROW: tl.constexpr, DX_ROW: tl.constexpr,
    D_ROW: tl.constexpr, C: tl.constexpr, EDGES: tl.constexpr, NORMALIZE: tl.constexpr, P: tl.constexpr,
    BLOCK: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr, ACROSS: tl.constexpr = 1,
):  # fmt: skip
    """As convolve_dgrad_kernel. Grid (tiles, jobs, blocks of channels, with STRIDE 2 of each of four parities): inputs
    that lie at even or odd y and x are each a map of the outputs' size, of fewer taps of stride 1. With NORMALIZE, x is
    normalized by a job's row of the statistics, and shares of sum dx and sum dx * x are left in partial."""
    OH: tl.constexpr = (H + STRIDE - 1) // STRIDE
    OW: tl.constexpr = (W + STRIDE - 1) // STRIDE
    COUNTS: tl.constexpr = (3, 3, 5, 5) if STRIDE == 1 else (1, 2, 3, 5)
    DILATIONS: tl.constexpr = (1, 2, 1, 2) if STRIDE == 1 else (1, 1, 1, 1)
    tile, jobs_ptr = tl.program_id(0), jobs_ptr + tl.program_id(1) * 6
    start, count = tl.load(jobs_ptr + 2).to(tl.int32), tl.load(jobs_ptr + 3).to(tl.int32)
    y, n, column, inside = place_of(tile, IMAGES, OH, OW, BLOCK, TALL, ACROSS)
    x = first_of(column, 1, ACROSS)
    y_parity, x_parity = 0, 0
    if STRIDE == 2:
        y_parity, x_parity = tl.program_id(2) // 2 % 2, tl.program_id(2) % 2
    i = tl.arange(0, ACROSS * COLUMNS)
    across, ci = i // COLUMNS, tl.program_id(2) // (STRIDE * STRIDE) * COLUMNS + i % COLUMNS
    totals = zero_totals(BLOCK, ACROSS * COLUMNS, TALL)
    any_open = 0
    for s in range(start, start + count):
        segment = segments_ptr + s * 10
        opened = open_edges(opened_ptr, tl.load(segment + 1).to(tl.int32), tl.load(segment + 2).to(tl.int32), EDGES)
        any_open += opened
        taps, side = tl.load(segment + 5).to(tl.int32), tl.load(segment + 6).to(tl.int32)
        dilation = tl.load(segment + 7).to(tl.int32)
        y_count, last, step, low = _taps(y_parity, taps, side, dilation, STRIDE)
        x_count, x_last, x_step, x_low = _taps(x_parity, taps, side, dilation, STRIDE)
        if taps == 2:
            x_count, x_last = tl.where(y_parity == x_parity, 1, 0), 0
        if (opened != 0) & (y_count > 0) & (x_count > 0):
            d = d_ptr + tl.multiple_of(tl.load(segment), 8)
            weight = weight_ptr + tl.multiple_of(tl.load(segment + 3), 8)
            weight_edge = tl.multiple_of(tl.load(segment + 4).to(tl.int32), 8)
            if STRIDE == 2:
                dilation = 1  # of the outputs that an input passes to
            for kind in tl.static_range(4):
                if (y_count == COUNTS[kind]) & (dilation == DILATIONS[kind]):
                    totals = _backward(
                        totals, d, weight, weight_edge, EDGE, opened, y, n, x, inside, across, ci, last, step, low,
                        x_count, x_last, x_step, x_low, side, OH, OW, COUNTS[kind], DILATIONS[kind], D_ROW, C, EDGES, P,
                        TALL, WIDE, ACROSS, PRECISION, DTYPE,
                    )  # fmt: skip

    if NORMALIZE:
        if any_open == 0:
            return  # and nobody asks for dx
    y, x = y * STRIDE + y_parity, x[:, None] * STRIDE + (x_parity + across * STRIDE)[None, :]
    place, inside = ((n * H + y) * W).to(tl.int64)[:, None] + x, inside[:, None] & (x < W)
    x_ptr += tl.multiple_of(tl.load(jobs_ptr), 8)
    dx_ptr += tl.multiple_of(tl.load(jobs_ptr + 1), 8)
    if NORMALIZE:
        row = tl.load(jobs_ptr + 4).to(tl.int32)
        mean = tl.load(mean_ptr + row * C + ci, mask=ci < C, other=0.0)
        inverse = tl.load(inverse_ptr + row * C + ci, mask=ci < C, other=1.0)
    sum_d, sum_dx = (
        tl.zeros([BLOCK, ACROSS * COLUMNS], tl.float32), tl.zeros([BLOCK, ACROSS * COLUMNS], tl.float32)
    )  # fmt: skip
    for r in tl.static_range(TALL):
        mask = both(inside, y + r * STRIDE < H) & (ci < C)[None, :]
        value = tl.load(x_ptr + (place + r * STRIDE * W) * X_ROW + ci[None, :], mask=mask, other=0.0).to(tl.float32)
        if NORMALIZE:
            value = value * inverse[None, :] - (mean * inverse)[None, :]
        out = tl.where(mask & (value > 0), totals[r], 0.0)
        where = (place + r * STRIDE * W) * DX_ROW + ci[None, :]
        tl.store(dx_ptr + where, out.to(dx_ptr.dtype.element_ty), mask=mask)
        if NORMALIZE:
            sum_d += out
            sum_dx += out * value
    if NORMALIZE:
        sum_d, sum_dx = tl.sum(sum_d, 0), tl.sum(sum_dx, 0)
        shares = tl.num_programs(0) * ACROSS
        leave_sums(partial_ptr, sum_d, sum_dx, tl.program_id(1), tile * ACROSS + across, shares, ci, ci < C, C)


def rows_tiles(n: int, size: tuple[int, int], options: dict) -> int:
    return pieces(n * size[1] // options.get("ACROSS", 1), options["BLOCK"]) * pieces(size[0], options["TALL"])


def rows_shares(n: int, size: tuple[int, int], options: dict) -> int:
    """How many shares of statistics or of sums the tiles leave."""
    return rows_tiles(n, size, options) * options["ACROSS"]


def forward_options(c: int, edges: int, width: int, dtype: torch.dtype) -> dict:
    options, columns = dot_options(dtype), padded(edges) * padded(c)
    return options | tuning.rows_forward(padded(c), columns, width, options["PRECISION"], dtype.itemsize)


def rows_fwd(
    x: Tensor, weight: Tensor, out: Tensor, partial: Tensor, normalizing: dict[str, Tensor], opened: Tensor,
    jobs: Tensor, *, n: int, size: tuple[int, int], x_row: int, out_row: int, edge: int, shares: int, c: int,
    edges: int, normalize: bool, moved: float,
) -> int:  # fmt: skip
    """As convolve_fwd. normalizing: mean_ptr and inverse_ptr, by a row of which x is normalized, and nothing_ptr,
    to -inf, of x's dtype, as often as a slice has channels, padded."""
    options = forward_options(c, edges, size[1], out.dtype)
    tensors = {
        "x_ptr": x, "weight_ptr": weight, "out_ptr": out, "partial_ptr": partial, **normalizing, "opened_ptr": opened,
        "jobs_ptr": jobs,
    }  # fmt: skip
    launch(
        rows_fwd_kernel, (rows_tiles(n, size, options), len(jobs)), tensors, moved, IMAGES=n, H=size[0], W=size[1],
        EDGE=edge, SHARES=shares, X_ROW=x_row, OUT_ROW=out_row, C=c, EDGES=padded(edges), NORMALIZE=normalize,
        P=padded(c), DTYPE=TRITON_DTYPE[out.dtype], **options,
    )  # fmt: skip
    return rows_shares(n, size, options)


def data_gradient_options(c: int, edges: int, width: int, stride: int, dtype: torch.dtype) -> dict:
    options, wide = dot_options(dtype), padded(edges) * padded(c)
    return options | tuning.rows_data_gradient(padded(c), wide, width, stride, options["PRECISION"], dtype.itemsize)


def rows_dgrad(
    d: Tensor, weight: Tensor, x: Tensor, dx: Tensor, partial: Tensor, normalizing: dict[str, Tensor], opened: Tensor,
    jobs: Tensor, segments: Tensor, *, n: int, size: tuple[int, int], stride: int, x_row: int, dx_row: int, d_row: int,
    edge: int, c: int, edges: int, normalize: bool, moved: float,
) -> int:  # fmt: skip
    """As convolve_dgrad, of stride 2 too. size: of x. Returns how many shares of sums a job leaves in partial, with
    normalize."""
    if not normalize:  # one alone would be a kernel of its own, and spill; of fewer than 16 columns loads are narrow
        edges = max(edges, 2, 16 // padded(c))
    options = data_gradient_options(c, edges, size[1], stride, dx.dtype)
    out_size = tuple(pieces(side, stride) for side in size)
    tensors = {
        "d_ptr": d, "weight_ptr": weight, "x_ptr": x, "dx_ptr": dx, "partial_ptr": partial,
        "mean_ptr": normalizing["mean_ptr"], "inverse_ptr": normalizing["inverse_ptr"], "opened_ptr": opened,
        "jobs_ptr": jobs, "segments_ptr": segments,
    }  # fmt: skip
    grid = rows_tiles(n, out_size, options), len(jobs), stride * stride * pieces(c, options["COLUMNS"])
    launch(
        rows_dgrad_kernel, grid, tensors, moved, IMAGES=n, H=size[0], W=size[1], EDGE=edge, STRIDE=stride, X_ROW=x_row,
        DX_ROW=dx_row, D_ROW=d_row, C=c, EDGES=padded(edges), NORMALIZE=normalize, P=padded(c),
        DTYPE=TRITON_DTYPE[dx.dtype], **options,
    )  # fmt: skip
    return rows_shares(n, out_size, options)
