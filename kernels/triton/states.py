"""The gradient of a state: what convolutions, poolings, the bypass and the cell's output pass back."""

import triton
import triton.language as tl

from .launch import both, kernel
from .pools import inverse_count
from .rows import has_pixel, place_of
from .statistics import leave_sums


@triton.jit
def _passed_back(
    totals, d_ptr, index_ptr, AVERAGED: tl.constexpr, n, y, x, inside, c, H: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """totals, of rows of inputs from y on, with what the outputs of a 3x3 pooling of stride 1 that see them pass back:
    a share of an average, or all where the maximum lay here. Each row of outputs is read once for all."""
    where = (((n * H + y) * W + x).to(tl.int64) * C)[:, None] + c[None, :]
    for i in tl.static_range(-1, TALL + 1):
        row = both(both(inside, y + i >= 0), y + i < H)
        for dx in tl.static_range(-1, 2):
            mask, place = (row & has_pixel(x + dx, W))[:, None] & (c < C)[None, :], where + (i * W + dx) * C
            d = tl.load(d_ptr + place, mask=mask, other=0.0).to(tl.float32)
            if AVERAGED:
                d *= (inverse_count(y + i, H, 1) * inverse_count(x + dx, W, 1))[:, None]
            else:
                index = tl.load(index_ptr + place, mask=mask, other=255)
            changed = ()
            for r in tl.static_range(TALL):
                total = totals[r]
                if i - r <= 1 and r - i <= 1:
                    total += d if AVERAGED else tl.where(index == (r - i + 1) * 3 + 1 - dx, d, 0.0)
                changed = changed + (total,)
            totals = changed
    return totals


@triton.jit
def _passed_back_strided(
    total, d_ptr, index_ptr, AVERAGED: tl.constexpr, n, y, x, inside, c, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The same of stride 2, of one row of inputs."""
    where = (((n * OH + y // 2) * OW + x // 2).to(tl.int64) * C)[:, None] + c[None, :]
    for ky in range(3):
        # the first tap is one of the next output, where y is odd, and the last one of y's own
        dy = (2 - ky) // 2
        oy = y // 2 + dy
        row = both(inside, (oy < OH) & ((y + ky) % 2 == 1))
        for kx in tl.static_range(3):
            dx = (2 - kx) // 2
            ox = x // 2 + dx
            fits = row & (ox < OW) & ((x + kx) % 2 == 1)
            mask, place = fits[:, None] & (c < C)[None, :], where + (dy * OW + dx) * C
            d = tl.load(d_ptr + place, mask=mask, other=0.0).to(tl.float32)
            if AVERAGED:
                total += d * (inverse_count(oy, H, 2) * inverse_count(ox, W, 2))[:, None]
            else:
                total += tl.where(tl.load(index_ptr + place, mask=mask, other=255) == ky * 3 + kx, d, 0.0)
    return total


@triton.jit
def _pooling(
    totals, d_ptr, index_ptr, AVERAGED: tl.constexpr, n, y, x, inside, c, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, STRIDE: tl.constexpr, C: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    if STRIDE == 1:
        totals = _passed_back(totals, d_ptr, index_ptr, AVERAGED, n, y, x, inside, c, H, W, C, TALL)
    else:
        totals = (_passed_back_strided(totals[0], d_ptr, index_ptr, AVERAGED, n, y, x, inside, c, H, W, OH, OW, C),)
    return totals


@kernel
def state_bwd_kernel(
    d_ptr, dx_ptr, d_pooled_ptr, index_ptr, d_out_ptr, state_ptr, out_ptr, partial_ptr, coefficients_ptr, opened_ptr,
    jobs_ptr, poolings_ptr, through_ptr, IMAGES, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    SLICE, D_OUT, STRIDE: tl.constexpr, K: tl.constexpr, C: tl.constexpr, IS_NODE: tl.constexpr,
    OUT_ROW: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """The gradient of a state. Grid (tiles, jobs), see rows.place_of; TALL is 1 at stride 2. A job, a slice: dx offset
    (of the convolutions; -1: none), first pooling, poolings, bypass index offset, first edge, edges, state offset, out
    offset, slice, row of its sums. Of a pooling: offset of its gradient, index offset, mode, instance. Of an edge: d
    offset, coefficient of what it lets through.

    A node's gradient has the cell's output added, from d_out (rows of OUT_ROW, from D_OUT on), and is stored slice by
    slice as before the shuffle. An input state's is stored as it is, with shares of the sums of it and of it * state.
    """
    tl.static_assert(STRIDE == 1 or TALL == 1)
    jobs_ptr += tl.program_id(1) * 10
    c = tl.arange(0, P)
    y, n, x, inside = place_of(tl.program_id(0), IMAGES, H, W, BLOCK, TALL)
    pixel = ((n * H + y) * W + x).to(tl.int64)
    where, masks = (pixel * C)[:, None] + c[None, :], ()
    for r in tl.static_range(TALL):
        masks = masks + (both(inside, y + r < H)[:, None] & (c < C)[None, :],)
    dx, totals = tl.load(jobs_ptr), ()
    convolved_ptr = dx_ptr + tl.multiple_of(tl.maximum(dx, 0), 8)
    for r in tl.static_range(TALL):
        found = tl.load(convolved_ptr + where + r * W * C, mask=both(masks[r], dx >= 0), other=0.0)
        totals = totals + (found.to(tl.float32),)

    # where a pixel's share of what passes comes from, and of which channels; all are loaded, since a mask that depends
    # on data would make loads narrow
    over, chosen = where, masks[0]
    if STRIDE == 2:
        over = (((n * OH + y // 2) * OW + x // 2).to(tl.int64) * C)[:, None] + c[None, :]
        largest = tl.load(index_ptr + tl.multiple_of(tl.load(jobs_ptr + 3), 8) + over, mask=masks[0], other=0)
        chosen = largest == ((y % 2) * 2 + x % 2)[:, None]
    first = tl.load(jobs_ptr + 4).to(tl.int32)
    for i in range(first, first + tl.load(jobs_ptr + 5).to(tl.int32)):
        coefficient = tl.load(coefficients_ptr + tl.load(through_ptr + i * 2 + 1))
        passed_ptr, changed = d_ptr + tl.multiple_of(tl.load(through_ptr + i * 2), 8), ()
        for r in tl.static_range(TALL):
            mask = both(masks[r], coefficient != 0)
            passed = coefficient * tl.load(passed_ptr + over + r * W * C, mask=mask, other=0.0).to(tl.float32)
            changed = changed + (totals[r] + (passed if STRIDE == 1 else tl.where(chosen, passed, 0.0)),)
        totals = changed

    first = tl.load(jobs_ptr + 1).to(tl.int32)
    for i in range(first, first + tl.load(jobs_ptr + 2).to(tl.int32)):
        pooling = poolings_ptr + i * 4
        if tl.load(opened_ptr + tl.load(pooling + 3)) != 0:
            pooled = d_pooled_ptr + tl.multiple_of(tl.load(pooling), 8)
            index = index_ptr + tl.multiple_of(tl.load(pooling + 1), 8)
            if tl.load(pooling + 2) == 0:
                totals = _pooling(totals, pooled, index, False, n, y, x, inside, c, H, W, OH, OW, STRIDE, C, TALL)
            else:
                totals = _pooling(totals, pooled, index, True, n, y, x, inside, c, H, W, OH, OW, STRIDE, C, TALL)

    out = out_ptr + tl.multiple_of(tl.load(jobs_ptr + 7), 8)
    if IS_NODE:
        channel = tl.load(jobs_ptr + 8).to(tl.int32) * C + c
        given = d_out_ptr + D_OUT + (pixel * OUT_ROW)[:, None] + channel[None, :]
        out += (pixel * C)[:, None] + ((channel % K) * SLICE + channel // K)[None, :]
        for r in tl.static_range(TALL):
            total = totals[r] + tl.load(given + r * W * OUT_ROW, mask=masks[r], other=0.0).to(tl.float32)
            tl.store(out + r * W * C, total.to(out_ptr.dtype.element_ty), mask=masks[r])
    else:
        state = state_ptr + tl.multiple_of(tl.load(jobs_ptr + 6), 8) + where
        sums, products = tl.zeros([BLOCK, P], tl.float32), tl.zeros([BLOCK, P], tl.float32)
        for r in tl.static_range(TALL):
            stored = tl.where(masks[r], totals[r], 0.0).to(out_ptr.dtype.element_ty)
            tl.store(out + where + r * W * C, stored, mask=masks[r])
            stored = stored.to(tl.float32)
            sums += stored
            products += stored * tl.load(state + r * W * C, mask=masks[r], other=0.0).to(tl.float32)
        leave_sums(
            partial_ptr, tl.sum(sums, 0), tl.sum(products, 0), tl.program_id(1), tl.program_id(0), tl.num_programs(0),
            c, c < C, C,
        )  # fmt: skip
