"""3x3 poolings and the 2x2 maxima of the bypass, forward; their backward is part of the state's (mixture.py)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import both, kernel, launch, padded
from .rows import has_pixel, place_of, rows_tiles
from .statistics import leave_statistics_of_rows

MAXIMUM, AVERAGE, BYPASS = 0, 1, 2  # mode of a job


@triton.jit
def inverse_count(o, SIDE: tl.constexpr, STRIDE: tl.constexpr):
    """Along one axis of SIDE pixels, of how many the 3 that output o sees are: an average's padding does not count."""
    count = tl.minimum(o * STRIDE + 2, SIDE) - tl.maximum(o * STRIDE - 1, 0)
    return 1.0 / tl.maximum(count, 1).to(tl.float32)  # of what lies outside, any number


@triton.jit
def _across(
    pointer, y, x, inside, c, i: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr,
    AVERAGED: tl.constexpr, X_ROW: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of what windows see of input row y + i, the sum, or the maximum and in which column it lies, the first of equals.
    pointer: to x of row y."""
    OTHER: tl.constexpr = 0.0 if AVERAGED else float("-inf")
    for k in tl.static_range(SIZE):
        mask = (inside & has_pixel(x + k - (SIZE - 1) // 2, W))[:, None] & (c < C)[None, :]
        mask = both(both(mask, y + i >= 0), y + i < H)
        value = tl.load(pointer + (i * W + k - (SIZE - 1) // 2) * X_ROW, mask=mask, other=OTHER).to(tl.float32)
        if k == 0:
            found, index = value, tl.zeros(value.shape, tl.int32)
        elif AVERAGED:
            found += value
        else:
            found, index = _larger(found, index, value, k)
    return found, index


@triton.jit
def _larger(found, index, value, i):
    larger = (value > found) | (value != value)  # NaN is not to be lost
    return tl.where(larger, value, found), tl.where(larger, i, index)


@triton.jit
def _pooled(
    pointer, y, x, inside, c, H: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr,
    AVERAGED: tl.constexpr, X_ROW: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    TALL: tl.constexpr,
):  # fmt: skip
    """Sums, or maxima and which tap held each, the first of equals, of TALL rows of outputs. What a window sees of a
    row is gathered once for all outputs above and below it."""
    outs, indices = (), ()
    for _ in tl.static_range(TALL):
        outs += (tl.full([BLOCK, P], 0.0 if AVERAGED else float("-inf"), tl.float32),)
        indices += (tl.zeros([BLOCK, P], tl.int32),)
    for i in tl.static_range((TALL - 1) * STRIDE + SIZE):
        found, column = _across(pointer, y, x, inside, c, i - (SIZE - 1) // 2, H, W, SIZE, AVERAGED, X_ROW, C)
        changed, moved = (), ()
        for r in tl.static_range(TALL):
            out, index = outs[r], indices[r]
            if i >= r * STRIDE and i < r * STRIDE + SIZE:
                if AVERAGED:
                    out += found
                else:
                    out, index = _larger(out, index, found, (i - r * STRIDE) * SIZE + column)
            changed += (out,)
            moved += (index,)
        outs, indices = changed, moved
    return outs, indices


@kernel
def pool_fwd_kernel(
    x_ptr, out_ptr, index_ptr, partial_ptr, opened_ptr, jobs_ptr, IMAGES, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, SHARES, STRIDE: tl.constexpr, X_ROW: tl.constexpr, OUT_ROW: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, jobs), see rows.place_of. A job: x offset, out offset, index offset, mode, instance (-1: always
    open, no statistics). index: which tap held the maximum, the first of equals, uint8. Statistics as the
    convolution's.
    """
    tile, jobs_ptr = tl.program_id(0), jobs_ptr + tl.program_id(1) * 5
    mode, instance = tl.load(jobs_ptr + 3), tl.load(jobs_ptr + 4).to(tl.int32)
    if instance >= 0:
        if tl.load(opened_ptr + instance) == 0:
            return
    x_ptr += tl.multiple_of(tl.load(jobs_ptr), 8)
    c = tl.arange(0, P)
    y, n, x, inside = place_of(tile, IMAGES, OH, OW, BLOCK, TALL)
    pointer = x_ptr + (((n * H + y * STRIDE) * W + x * STRIDE) * X_ROW)[:, None] + c[None, :]
    seen = (pointer, y * STRIDE, x * STRIDE, inside, c)
    outs, indices = (), ()
    for _ in tl.static_range(TALL):
        outs += (tl.zeros([BLOCK, P], tl.float32),)
        indices += (tl.zeros([BLOCK, P], tl.int32),)
    if mode == 0:
        outs, indices = _pooled(*seen, H, W, STRIDE, 3, False, X_ROW, C, P, BLOCK, TALL)
    elif mode == 1:
        outs, indices = _pooled(*seen, H, W, STRIDE, 3, True, X_ROW, C, P, BLOCK, TALL)
        shares = ()
        for r in tl.static_range(TALL):
            count = inverse_count(y + r, H, STRIDE) * inverse_count(x, W, STRIDE)
            shares += (outs[r] * count[:, None],)
        outs = shares
    else:
        outs, indices = _pooled(*seen, H, W, STRIDE, 2, False, X_ROW, C, P, BLOCK, TALL)
    out_ptr += tl.multiple_of(tl.load(jobs_ptr + 1), 8)
    index_ptr += tl.load(jobs_ptr + 2)
    place, channel = ((n * OH + y) * OW + x).to(tl.int64)[:, None], (c < C)[None, :]
    for r in tl.static_range(TALL):
        mask = both(inside, y + r < OH)[:, None] & channel
        stored = outs[r].to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (place + r * OW) * OUT_ROW + c[None, :], stored, mask=mask)
        if mode != 1:
            tl.store(index_ptr + (place + r * OW) * C + c[None, :], indices[r].to(tl.uint8), mask=mask)
    if instance >= 0:
        leave_statistics_of_rows(
            partial_ptr, tile, outs, inside, y, OH, TALL, out_ptr.dtype.element_ty, instance + c * 0, c, c < C, SHARES,
            C,
        )  # fmt: skip


def pool_tiles(n: int, size: tuple[int, int], c: int, dtype: torch.dtype, stride: int) -> int:
    """size: of the outputs."""
    return rows_tiles(n, size, tuning.pooling(padded(c), dtype.itemsize, stride))


def pool_fwd(
    x: Tensor, out: Tensor, index: Tensor, partial: Tensor, opened: Tensor, jobs: Tensor, *, n: int,
    size: tuple[int, int], out_size: tuple[int, int], stride: int, x_row: int, out_row: int, shares: int, c: int,
    moved: float,
) -> int:  # fmt: skip
    """Returns how many shares of statistics each instance has in partial, which has place for shares."""
    tensors = {
        "x_ptr": x, "out_ptr": out, "index_ptr": index, "partial_ptr": partial, "opened_ptr": opened, "jobs_ptr": jobs
    }  # fmt: skip
    count = pool_tiles(n, out_size, c, x.dtype, stride)
    launch(
        pool_fwd_kernel, (count, len(jobs)), tensors, moved, IMAGES=n, H=size[0], W=size[1], OH=out_size[0],
        OW=out_size[1], SHARES=shares, STRIDE=stride, X_ROW=x_row, OUT_ROW=out_row, C=c, P=padded(c),
        **tuning.pooling(padded(c), x.element_size(), stride),
    )  # fmt: skip
    return count
