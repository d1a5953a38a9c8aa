"""3x3 poolings and the 2x2 maxima of the bypass, forward; their backward is part of the state's (mixture.py)."""

import triton
import triton.language as tl

from .convolution import position
from .launch import kernel
from .statistics import leave_statistics

MAXIMUM, AVERAGE, BYPASS = 0, 1, 2  # mode of a job


@triton.jit
def inverse_count(o, SIDE: tl.constexpr, STRIDE: tl.constexpr):
    """Along one axis of SIDE pixels, of how many the 3 that output o sees are: an average's padding does not count."""
    count = tl.minimum(o * STRIDE + 2, SIDE) - tl.maximum(o * STRIDE - 1, 0)
    return 1.0 / tl.maximum(count, 1).to(tl.float32)  # of what lies outside, any number


@triton.jit
def _seen(
    pointer, tap: tl.constexpr, oy, ox, inside, c, H: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr,
    SIZE: tl.constexpr, X_ROW: tl.constexpr, C: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """What outputs see through a tap. pointer: to what the first tap of a window without padding sees."""
    dy: tl.constexpr = tap // SIZE - (SIZE - 1) // 2
    dx: tl.constexpr = tap % SIZE - (SIZE - 1) // 2
    y, x = oy * STRIDE + dy, ox * STRIDE + dx
    mask = (inside & (y >= 0) & (y < H) & (x >= 0) & (x < W))[:, None] & (c < C)[None, :]
    return tl.load(pointer + (dy * W + dx) * X_ROW, mask=mask, other=OTHER).to(tl.float32)


@triton.jit
def _maxima(
    pointer, oy, ox, inside, c, H: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr,
    X_ROW: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """And which tap held each, the first of equals."""
    largest, index = tl.full([BLOCK, P], float("-inf"), tl.float32), tl.zeros([BLOCK, P], tl.int32)
    for tap in tl.static_range(SIZE * SIZE):
        value = _seen(pointer, tap, oy, ox, inside, c, H, W, STRIDE, SIZE, X_ROW, C, float("-inf"))
        larger = (value > largest) | (value != value)  # NaN is not to be lost
        largest = tl.where(larger, value, largest)
        index = tl.where(larger, tap, index)
    return largest, index


@kernel
def pool_fwd_kernel(
    x_ptr, out_ptr, index_ptr, partial_ptr, opened_ptr, jobs_ptr, M, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, SHARES, STRIDE: tl.constexpr, X_ROW: tl.constexpr, OUT_ROW: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, jobs). A job: x offset, out offset, index offset, mode, instance (-1: always open, no statistics).
    index: which tap held the maximum, the first of equals, uint8. Statistics as the convolution's.
    """
    tile, jobs_ptr = tl.program_id(0), jobs_ptr + tl.program_id(1) * 5
    mode, instance = tl.load(jobs_ptr + 3), tl.load(jobs_ptr + 4).to(tl.int32)
    if instance >= 0:
        if tl.load(opened_ptr + instance) == 0:
            return
    x_ptr += tl.multiple_of(tl.load(jobs_ptr), 8)
    rows, c = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, P)
    inside = rows < M
    n, oy, ox = position(rows, OH, OW)
    pointer = x_ptr + (((n * H + oy * STRIDE) * W + ox * STRIDE) * X_ROW)[:, None] + c[None, :]
    index = tl.zeros([BLOCK, P], tl.int32)
    if mode == 0:
        out, index = _maxima(pointer, oy, ox, inside, c, H, W, STRIDE, 3, X_ROW, C, P, BLOCK)
    elif mode == 1:
        out = tl.zeros([BLOCK, P], tl.float32)
        for tap in tl.static_range(9):
            out += _seen(pointer, tap, oy, ox, inside, c, H, W, STRIDE, 3, X_ROW, C, 0.0)
        out *= (inverse_count(oy, H, STRIDE) * inverse_count(ox, W, STRIDE))[:, None]
    else:
        out, index = _maxima(pointer, oy, ox, inside, c, H, W, STRIDE, 2, X_ROW, C, P, BLOCK)
    mask = inside[:, None] & (c < C)[None, :]
    stored = tl.where(mask, out, 0.0).to(out_ptr.dtype.element_ty)
    where = rows.to(tl.int64)[:, None]
    out_ptr += tl.multiple_of(tl.load(jobs_ptr + 1), 8)
    tl.store(out_ptr + where * OUT_ROW + c[None, :], stored, mask=mask)
    if mode != 1:
        index_ptr += tl.load(jobs_ptr + 2)
        tl.store(index_ptr + where * C + c[None, :], index.to(tl.uint8), mask=mask)
    if instance >= 0:
        value = stored.to(tl.float32)
        count = tl.minimum(M - tile * BLOCK, BLOCK).to(tl.float32)
        sums = tl.sum(value, 0)
        away = tl.where(mask, value - (sums / count)[None, :], 0.0)
        leave_statistics(
            partial_ptr, tile, count, sums, tl.sum(away * away, 0), instance + c * 0, c, c < C, SHARES, C
        )  # fmt: skip
