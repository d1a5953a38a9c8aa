"""Gradients of the weights of convolutions of stride 1, with rows shared as in rows.py: a row of inputs meets all rows
of outputs that it is a tap of. With outputs side by side each pixel that they see meets the gradients of all; it is
another tap of each, so that these leave their sums in parts of their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .convolution import activate, open_edges, tap_and_channel
from .launch import TRITON_DTYPE, both, dot_options, kernel, launch, padded, pieces
from .rows import edge_and_output, first_of, has_pixel, load_row, place_of, renamed, rows_tiles, zero_totals


@triton.jit
def _gradients(
    x_ptr, d_ptr, partial_ptr, mean_ptr, inverse_ptr, nothing_ptr, EDGE, DISTANCE, edges, opened, chunk, IMAGES,
    H: tl.constexpr, W: tl.constexpr, SIDE: tl.constexpr, DILATION: tl.constexpr, X_ROW: tl.constexpr,
    D_ROW: tl.constexpr, C: tl.constexpr, EDGES: tl.constexpr, NORMALIZE: tl.constexpr, P: tl.constexpr,
    BLOCK: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, ACROSS: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Of the weights of a chunk of columns of taps, or of the pixels that outputs side by side see."""
    PAD: tl.constexpr = DILATION * (SIDE - 1) // 2
    COLUMNS: tl.constexpr = EDGES * ACROSS * P
    # Inputs are the first operand: each warp keeps gradients in registers for all taps. The other way round, groups of
    # warps would read them from shared memory anew for each, and inputs would be stored there once more.
    seen, ci = tap_and_channel(chunk, P, WIDE)
    dx, fits = seen * DILATION - PAD, (seen < SIDE + ACROSS - 1) & (ci < C)
    e, across, co = edge_and_output(EDGES, ACROSS, P)
    inner = co
    if ACROSS > 1:
        inner += across * (DILATION * D_ROW)
    kept = (((opened >> e) & 1) != 0) & (co < C)
    mean, inverse = 0.0, 1.0
    if NORMALIZE:
        mean = tl.load(mean_ptr + ci, mask=ci < C, other=0.0)[:, None]
        inverse = tl.load(inverse_ptr + ci, mask=ci < C, other=1.0)[:, None]
    totals = zero_totals(WIDE, COLUMNS, SIDE)
    blocks: tl.constexpr = (H + TALL - 1) // TALL
    tiles = tl.where(opened != 0, tl.cdiv(IMAGES * (W // ACROSS), BLOCK) * blocks, 0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        y, n, column, inside = place_of(tile, IMAGES, H, W, BLOCK, TALL, ACROSS)
        x = first_of(column, DILATION, ACROSS)
        place = (n * H + y) * W + x
        where = d_ptr + e.to(tl.int64)[None, :] * EDGE + (place * D_ROW)[:, None] + inner[None, :]
        ds = ()
        for r in tl.static_range(TALL):
            mask = both(inside, y + r < H)[:, None] & kept[None, :]
            ds = ds + (tl.load(where + r * W * D_ROW, mask=mask, other=0.0).to(DTYPE),)
        # inputs lie as the product takes them, so that they are copied to shared memory as they come
        mask = has_pixel(x[None, :] + dx[:, None], W) & inside[None, :] & fits[:, None]
        pointer = x_ptr + ((place - PAD * W) * X_ROW)[None, :] + (dx * X_ROW + ci)[:, None]
        nothing = nothing_ptr + ci[:, None]
        for i in tl.static_range(TALL + DILATION * (SIDE - 1)):
            values = load_row(pointer, nothing, mask, y - PAD, H, W, X_ROW, i, NORMALIZE)
            values = activate(values, mean, inverse, NORMALIZE, DTYPE)
            changed = ()
            for ky in tl.static_range(SIDE):
                total = totals[ky]
                if i >= ky * DILATION and i - ky * DILATION < TALL:
                    total = tl.dot(values, ds[i - ky * DILATION], total, input_precision=PRECISION)
                    values = renamed(values)
                changed = changed + (total,)
            totals = changed
    outputs, inputs = e * (SIDE * SIDE * C * C) + co, (seen * C + ci) * C
    real = (e < edges) & (co < C)
    if ACROSS > 1:
        outputs = outputs + across.to(tl.int64) * DISTANCE - across * (C * C)
    where = inputs[:, None] + outputs[None, :]
    mask = fits[:, None] & real[None, :]
    if ACROSS > 1:
        kx = seen[:, None] - across[None, :]
        mask = mask & (kx >= 0) & (kx < SIDE)
    for ky in tl.static_range(SIDE):
        tl.store(partial_ptr + where + ky * SIDE * C * C, totals[ky], mask=mask)


@kernel
def rows_wgrad_kernel(
    d_ptr, x_ptr, partial_ptr, mean_ptr, inverse_ptr, nothing_ptr, opened_ptr, jobs_ptr, IMAGES, H: tl.constexpr,
    W: tl.constexpr, EDGE, DISTANCE, X_ROW: tl.constexpr, D_ROW: tl.constexpr, C: tl.constexpr, EDGES: tl.constexpr,
    NORMALIZE: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, ACROSS: tl.constexpr = 1,
):  # fmt: skip
    """As convolve_wgrad_kernel. Grid (pieces of the tiles, jobs, chunks of columns of taps and input channels). A
    program leaves a part for each of ACROSS outputs."""
    jobs_ptr += tl.program_id(1) * 11
    chunk = tl.program_id(2)
    side, dilation = tl.load(jobs_ptr + 5).to(tl.int32), tl.load(jobs_ptr + 6).to(tl.int32)
    if chunk * WIDE >= (side + ACROSS - 1) * P:
        return
    edges = tl.load(jobs_ptr + 3).to(tl.int32)
    opened = open_edges(opened_ptr, tl.load(jobs_ptr + 2).to(tl.int32), edges, EDGES)
    x_ptr += tl.multiple_of(tl.load(jobs_ptr), 8)
    d_ptr += tl.multiple_of(tl.load(jobs_ptr + 1), 8)
    row = tl.load(jobs_ptr + 10).to(tl.int32)
    mean_ptr, inverse_ptr = mean_ptr + row * C, inverse_ptr + row * C
    partial_ptr += tl.program_id(0).to(tl.int64) * (ACROSS * DISTANCE) + tl.load(jobs_ptr + 9)
    for kind in tl.static_range(4):
        if (side == 3 + kind // 2 * 2) & (dilation == 1 + kind % 2):
            _gradients(
                x_ptr, d_ptr, partial_ptr, mean_ptr, inverse_ptr, nothing_ptr, EDGE, DISTANCE, edges, opened, chunk,
                IMAGES, H, W, 3 + kind // 2 * 2, 1 + kind % 2, X_ROW, D_ROW, C, EDGES, NORMALIZE, P, BLOCK, TALL, WIDE,
                ACROSS, PRECISION, DTYPE,
            )  # fmt: skip


def _wgrad_options(c: int, edges: int, width: int, dtype: torch.dtype) -> dict:
    options = dot_options(dtype)
    return options | tuning.rows_weight_gradient(
        padded(c), padded(edges) * padded(c), width, options["PRECISION"], dtype.itemsize
    )


def _chunks(c: int, side: int, options: dict) -> int:
    """side: the largest of any job."""
    return pieces((side + options["ACROSS"] - 1) * padded(c), options["WIDE"])


def wgrad_grid(tiles: int, jobs: int, c: int, side: int, options: dict) -> tuple[int, int, int]:
    """As many pieces of the tiles as let their programs fill the chip."""
    chunks = _chunks(c, side, options)
    programs = tuning.KNOBS["programs"] * 4 // options["num_warps"]
    return max(1, min(tiles, pieces(programs, jobs * chunks))), jobs, chunks


def rows_wgrad_parts(
    n: int, size: tuple[int, int], c: int, edges: int, side: int, jobs: int, dtype: torch.dtype
) -> int:  # fmt: skip
    """As convolution.wgrad_parts."""
    options = _wgrad_options(c, edges, size[1], dtype)
    return wgrad_grid(rows_tiles(n, size, options), jobs, c, side, options)[0] * options["ACROSS"]


def rows_wgrad(
    d: Tensor, x: Tensor, partial: Tensor, normalizing: dict[str, Tensor], opened: Tensor, jobs: Tensor, *, n: int,
    size: tuple[int, int], x_row: int, d_row: int, edge: int, c: int, edges: int, side: int, normalize: bool,
    parts: int, distance: int, moved: float,
):  # fmt: skip
    """As convolve_wgrad. normalizing: see rows_fwd."""
    options = _wgrad_options(c, edges, size[1], x.dtype)
    tensors = {"d_ptr": d, "x_ptr": x, "partial_ptr": partial, **normalizing, "opened_ptr": opened, "jobs_ptr": jobs}
    grid = parts // options["ACROSS"], len(jobs), _chunks(c, side, options)
    launch(
        rows_wgrad_kernel, grid, tensors, moved, IMAGES=n, H=size[0], W=size[1], EDGE=edge, DISTANCE=distance,
        X_ROW=x_row, D_ROW=d_row, C=c, EDGES=padded(edges), NORMALIZE=normalize, P=padded(c),
        DTYPE=TRITON_DTYPE[x.dtype], **options,
    )  # fmt: skip
