"""Everything behind the last normalizations, which is linear: coefficients, node sums, and all of their backward.

A cell's *workspace* holds states, raw outputs and pooled maps, each a matrix of one slice's channels, at an offset of
its own. A *term* of a node is one of them: normalized by a row of the statistics (the last row leaves it as it is) and
multiplied by a coefficient. Coefficients have a row for each edge, in source order, and a column for each operation
and, after those, for each slice that passes as it is; the last coefficient of all is 1. A zero means that its term is
not read.

Node gradients are kept slice by slice, as they were before the shuffle.
"""

import triton
import triton.language as tl

from .launch import both, kernel
from .packing import expand
from .statistics import add_up, finishes_last


@kernel
def mix_fwd_kernel(
    alpha_ptr, beta_ptr, gates_ptr, order_ptr, path_ptr, identity_ptr, uses_ptr, coefficients_ptr, opened_ptr,
    updated_ptr, mean_ptr, inverse_ptr, variance_ptr, counters_ptr, nothing_ptr, weights_ptr, dense_ptr, jobs_ptr,
    EDGES, ROWS, LAST, COUNTERS, OPERATIONS: tl.constexpr, PATHS: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr, USES: tl.constexpr,
):  # fmt: skip
    """All that needs no map. Grid (1 + blocks of the statistics' rows, 1 + jobs): the first of axis 1 mixes, see _mix,
    the others make dense weights, see packing.expand."""
    if tl.program_id(1) == 0:
        _mix(
            alpha_ptr, beta_ptr, gates_ptr, order_ptr, path_ptr, identity_ptr, uses_ptr, coefficients_ptr, opened_ptr,
            updated_ptr, mean_ptr, inverse_ptr, variance_ptr, counters_ptr, nothing_ptr, EDGES, ROWS, LAST, COUNTERS,
            OPERATIONS, PATHS, K, C, P, BLOCK, USES,
        )  # fmt: skip
    else:
        expand(weights_ptr, dense_ptr, jobs_ptr + (tl.program_id(1) - 1) * 8, C, P, 512)


@triton.jit
def _coefficient(value, opened):
    """0 where it is closed, and nowhere else: an open path of no weight has a gradient all the same."""
    return tl.where(opened, tl.where(value == 0, 1e-30, value), 0.0)


@triton.jit
def _mix(
    alpha_ptr, beta_ptr, gates_ptr, order_ptr, path_ptr, identity_ptr, uses_ptr, coefficients_ptr, opened_ptr,
    updated_ptr, mean_ptr, inverse_ptr, variance_ptr, counters_ptr, nothing_ptr, EDGES, ROWS, LAST, COUNTERS,
    OPERATIONS: tl.constexpr, PATHS: tl.constexpr, K: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    BLOCK: tl.constexpr, USES: tl.constexpr,
):  # fmt: skip
    """Program 0 makes the coefficients; the others say which rows are open: those of which any of the gates that
    ``uses`` lists (-1: none, -2: always) is not 0. identity: by edge and slice, the operation that is one, or -1. Every
    row of the statistics, and one behind the last, starts as what normalizes nothing, and so stays where closed.
    Counters start as 0; nothing: see rows.load_row.
    """
    c = tl.arange(0, P)
    for start in range(tl.program_id(0) * BLOCK, COUNTERS, tl.num_programs(0) * BLOCK):
        counter = start + tl.arange(0, BLOCK)
        tl.store(counters_ptr + counter, 0, mask=counter < COUNTERS)
    if tl.program_id(0) == 0:
        r = tl.arange(0, BLOCK)
        mask = r < EDGES
        edge = tl.load(order_ptr + r, mask=mask, other=0)
        beta = tl.load(beta_ptr + edge, mask=mask, other=0.0).to(tl.float32)
        out_ptr = coefficients_ptr + r * (OPERATIONS + K)
        for o in range(0, OPERATIONS):
            path = tl.load(path_ptr + o)
            gate = tl.load(gates_ptr + edge * PATHS + path, mask=mask, other=0.0).to(tl.float32)
            alpha = tl.load(alpha_ptr + edge * OPERATIONS + o, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptr + o, _coefficient(beta * gate * alpha, gate != 0), mask=mask)
        for s in tl.static_range(K):
            through, passes = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int1)
            for p in tl.static_range(PATHS):
                gate = tl.load(gates_ptr + edge * PATHS + p, mask=mask, other=0.0).to(tl.float32)
                if p == s:
                    o = tl.load(identity_ptr + r * K + s, mask=mask, other=-1)
                    through += gate * tl.load(alpha_ptr + edge * OPERATIONS + o, mask=mask & (o >= 0), other=0.0).to(
                        tl.float32
                    )
                    passes = passes | ((gate != 0) & (o >= 0))
                else:
                    through += gate
                    passes = passes | (gate != 0)
            tl.store(out_ptr + OPERATIONS + s, _coefficient(beta * through, passes), mask=mask)
        tl.store(coefficients_ptr + LAST, 1.0)
        tl.store(nothing_ptr + c, tl.full([P], float("-inf"), tl.float32).to(nothing_ptr.dtype.element_ty))
    else:
        row = (tl.program_id(0) - 1) * BLOCK + tl.arange(0, BLOCK)
        mask = row < ROWS
        opened = tl.zeros([BLOCK], tl.int32)
        for u in tl.static_range(USES):
            use = tl.load(uses_ptr + row * USES + u, mask=mask, other=-1)
            value = tl.load(gates_ptr + use, mask=mask & (use >= 0), other=0.0)
            opened = opened | ((use == -2) | (value != 0)).to(tl.int32)
        tl.store(opened_ptr + row, opened, mask=mask)
        where = (row * C)[:, None] + c[None, :]
        inside = (row <= ROWS)[:, None] & (c < C)[None, :]
        tl.store(mean_ptr + where, tl.zeros([BLOCK, P], tl.float32), mask=inside)
        tl.store(inverse_ptr + where, tl.full([BLOCK, P], 1.0, tl.float32), mask=inside)
        inside = inside & mask[:, None]
        tl.store(variance_ptr + where, tl.zeros([BLOCK, P], tl.float32), mask=inside)
        tl.store(updated_ptr + where, tl.zeros([BLOCK, P], tl.float32) + opened.to(tl.float32)[:, None], mask=inside)


@kernel
def mix_bwd_kernel(
    sums_ptr, alpha_ptr, beta_ptr, gates_ptr, order_ptr, path_ptr, identity_ptr, summed_ptr, d_alpha_ptr,
    d_beta_ptr, OPERATIONS: tl.constexpr, PATHS: tl.constexpr, K: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Grid (edges,), rows of the coefficients. A coefficient's gradient is the sum over channels of its row of sums;
    summed: by row and operation, whether there is one."""
    r = tl.program_id(0)
    c = tl.arange(0, P)
    edge = tl.load(order_ptr + r)
    beta = tl.load(beta_ptr + edge).to(tl.float32)
    sums_ptr += r * (OPERATIONS + K) * C
    d_beta = 0.0
    for o in range(0, OPERATIONS):
        gate = tl.load(gates_ptr + edge * PATHS + tl.load(path_ptr + o)).to(tl.float32)
        alpha = tl.load(alpha_ptr + edge * OPERATIONS + o).to(tl.float32)
        summed = tl.load(summed_ptr + r * OPERATIONS + o) != 0
        d = tl.sum(tl.load(sums_ptr + o * C + c, mask=both(c < C, summed), other=0.0), 0)
        d_alpha = d * beta * gate
        d_beta += d * gate * alpha
        for s in tl.static_range(K):
            if tl.load(identity_ptr + r * K + s) == o:
                d = tl.sum(tl.load(sums_ptr + (OPERATIONS + s) * C + c, mask=c < C, other=0.0), 0)
                d_alpha += d * beta * gate
                d_beta += d * gate * alpha
        tl.store(d_alpha_ptr + edge * OPERATIONS + o, d_alpha)
    for s in tl.static_range(K):
        through = 0.0
        for p in tl.static_range(PATHS):
            if p != s:
                through += tl.load(gates_ptr + edge * PATHS + p).to(tl.float32)
        d_beta += through * tl.sum(tl.load(sums_ptr + (OPERATIONS + s) * C + c, mask=c < C, other=0.0), 0)
    tl.store(d_beta_ptr + edge, d_beta)


@triton.jit
def _normalized(pointer, rows, c, row, mask, mean_ptr, inverse_ptr, C: tl.constexpr):
    """A block of a workspace matrix, normalized by a row of the statistics."""
    value = tl.load(pointer + (rows.to(tl.int64) * C)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + row * C + c, mask=c < C, other=0.0)
    inverse = tl.load(inverse_ptr + row * C + c, mask=c < C, other=0.0)
    return (value - mean[None, :]) * inverse[None, :]


STAGES = tl.constexpr(4)


@triton.jit
def _sum_of_terms(
    s, work_ptr, mean_ptr, inverse_ptr, coefficients_ptr, terms_ptr, starts_ptr, rows, c, mask, C: tl.constexpr
):
    """Of slice s. What is closed is not read. Terms are copied to shared memory some STAGES ahead: the compiler would
    let each wait for the one before it."""
    total = tl.zeros(mask.shape, tl.float32)
    where = (rows.to(tl.int64) * C)[:, None] + c[None, :]
    first, end = tl.load(starts_ptr + s).to(tl.int32), tl.load(starts_ptr + s + 1).to(tl.int32)
    for t in tl.range(first, end, num_stages=STAGES):
        coefficient = tl.load(coefficients_ptr + tl.load(terms_ptr + t * 3 + 2))
        row = tl.load(terms_ptr + t * 3 + 1).to(tl.int32)
        place = tl.multiple_of(tl.load(terms_ptr + t * 3), 8)
        value = tl.load(work_ptr + place + where, mask=both(mask, coefficient != 0), other=0.0)
        mean = tl.load(mean_ptr + row * C + c, mask=c < C, other=0.0)
        scale = tl.load(inverse_ptr + row * C + c, mask=c < C, other=0.0) * coefficient
        if coefficient != 0:
            total += (value.to(tl.float32) - mean[None, :]) * scale[None, :]
    return total


@triton.jit
def _store_shuffled(
    total, rows, channel, state_ptr, out_ptr, M, SLICE, K: tl.constexpr, C: tl.constexpr, OUT_ROW: tl.constexpr
):
    mask, rows = (rows < M)[:, None] & (channel < K * C)[None, :], rows.to(tl.int64)
    tl.store(
        state_ptr + (rows * C)[:, None] + ((channel // C) * SLICE + channel % C)[None, :],
        total.to(state_ptr.dtype.element_ty), mask=mask,
    )  # fmt: skip
    tl.store(out_ptr + (rows * OUT_ROW)[:, None] + channel[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@kernel
def node_fwd_kernel(
    work_ptr, state_ptr, out_ptr, mean_ptr, inverse_ptr, coefficients_ptr, terms_ptr, starts_ptr, M, SLICE,
    K: tl.constexpr, C: tl.constexpr, OUT_ROW: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles,). Sums each slice's terms (offset, statistics row, coefficient) and stores them shuffled, channel
    K*c + slice: in the state's slices, SLICE elements apart, and in the cell's output of rows of OUT_ROW channels.
    """
    rows, c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, P)
    mask = (rows < M)[:, None] & (c < C)[None, :]
    given = work_ptr, mean_ptr, inverse_ptr, coefficients_ptr, terms_ptr, starts_ptr, rows, c, mask
    if K == 2 or K == 4:  # interleaved in registers, so that rows are stored whole
        first, last = _sum_of_terms(0, *given, C), _sum_of_terms(K - 1, *given, C)
        if K == 4:
            first = tl.interleave(first, _sum_of_terms(2, *given, C))
            last = tl.interleave(_sum_of_terms(1, *given, C), last)
        whole = tl.interleave(first, last)
        _store_shuffled(whole, rows, tl.arange(0, K * P), state_ptr, out_ptr, M, SLICE, K, C, OUT_ROW)
    else:
        for s in tl.static_range(K):
            total = _sum_of_terms(s, *given, C)
            channel = tl.where(c < C, K * c + s, K * C)
            _store_shuffled(total, rows, channel, state_ptr, out_ptr, M, SLICE, K, C, OUT_ROW)


TOGETHER = tl.constexpr(3)  # terms that a program of node_reduce_kernel multiplies with what it has loaded


@triton.jit
def _folded(values):
    """The upper half of the rows added to the lower one: so a thread adds up rows of its own."""
    return tl.sum(tl.reshape(values, [2, values.shape[0] // 2, values.shape[1]]), 0)


@kernel
def node_reduce_kernel(
    d_ptr, work_ptr, mean_ptr, inverse_ptr, coefficients_ptr, partial_ptr, sums_ptr, counters_ptr, groups_ptr,
    entries_ptr, M, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (parts of the rows, groups). A group: offset of a node gradient's slice, row of the sum over it (-1: none).
    It has TOGETHER entries: term offset, statistics row, coefficient (0: nothing is read and the sum is 0), row of
    sums (-1: there is no entry). sums[row] = sum d * normalized term.
    """
    part, parts, group = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    d_ptr += tl.multiple_of(tl.load(groups_ptr + group * 2), 8)
    alone = tl.load(groups_ptr + group * 2 + 1)
    c = tl.arange(0, P)
    terms, rows, opened, needed, totals = (), (), (), alone >= 0, (tl.zeros([BLOCK // 2, P], tl.float32),)
    for e in tl.static_range(TOGETHER):
        entry = entries_ptr + (group * TOGETHER + e) * 4
        is_open = (tl.load(coefficients_ptr + tl.load(entry + 2)) != 0) & (tl.load(entry + 3) >= 0)
        terms = terms + (work_ptr + tl.multiple_of(tl.load(entry), 8),)
        rows = rows + (tl.load(entry + 1).to(tl.int32) * C,)
        opened, needed = opened + (is_open,), needed | is_open
        totals = totals + (tl.zeros([BLOCK // 2, P], tl.float32),)
    if needed:
        means = ()
        for e in tl.static_range(TOGETHER):
            means = means + (tl.load(mean_ptr + rows[e] + c, mask=both(c < C, opened[e]), other=0.0)[None, :],)
        for tile in range(part, tl.cdiv(M, BLOCK), parts):
            i = tile * BLOCK + tl.arange(0, BLOCK)
            mask = (i < M)[:, None] & (c < C)[None, :]
            where = (i.to(tl.int64) * C)[:, None] + c[None, :]
            d, values = tl.load(d_ptr + where, mask=mask, other=0.0), ()
            for e in tl.static_range(TOGETHER):
                values = values + (tl.load(terms[e] + where, mask=both(mask, opened[e]), other=0.0),)
            d = d.to(tl.float32)
            added = (totals[0] + _folded(d),)
            for e in tl.static_range(TOGETHER):
                added = added + (totals[1 + e] + _folded(d * (values[e].to(tl.float32) - means[e])),)
            totals = added
    partial_ptr += (group * (1 + TOGETHER)) * parts * C
    tl.store(partial_ptr + part * C + c, tl.sum(totals[0], 0), mask=c < C)
    for e in tl.static_range(TOGETHER):
        inverse = tl.load(inverse_ptr + rows[e] + c, mask=both(c < C, opened[e]), other=0.0)
        tl.store(partial_ptr + ((1 + e) * parts + part) * C + c, tl.sum(totals[1 + e], 0) * inverse, mask=c < C)
    if finishes_last(counters_ptr + group, parts):
        for e in tl.static_range(1 + TOGETHER):
            row = alone if e == 0 else tl.load(entries_ptr + (group * TOGETHER + e - 1) * 4 + 3)
            if row >= 0:
                add_up(partial_ptr + e * parts * C, sums_ptr + row * C, c, c < C, parts, C, 32)


@kernel
def normalize_bwd_kernel(
    d_ptr, raw_ptr, out_ptr, mean_ptr, inverse_ptr, coefficients_ptr, sums_ptr, opened_ptr, jobs_ptr, parts_ptr, M,
    TRAINING: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backward of normalizations. Grid (tiles, jobs). A job: raw offset, out offset, statistics row that normalizes
    raw, row of the scale, instance, first part, parts. A part of the incoming gradient: d offset, coefficient, rows of
    the sums of d and of d * normalized.
    """
    jobs_ptr += tl.program_id(1) * 7
    if tl.load(opened_ptr + tl.load(jobs_ptr + 4)) == 0:
        return
    rows, c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, P)
    mask = (rows < M)[:, None] & (c < C)[None, :]
    where = (rows.to(tl.int64) * C)[:, None] + c[None, :]
    gradient, mean_d, mean_dx = tl.zeros([BLOCK, P], tl.float32), tl.zeros([P], tl.float32), tl.zeros([P], tl.float32)
    first = tl.load(jobs_ptr + 5).to(tl.int32)
    for i in range(first, first + tl.load(jobs_ptr + 6).to(tl.int32)):
        part = parts_ptr + i * 4
        coefficient = tl.load(coefficients_ptr + tl.load(part + 1))
        if coefficient != 0:
            d = d_ptr + tl.multiple_of(tl.load(part), 8)
            gradient += coefficient * tl.load(d + where, mask=mask, other=0.0).to(tl.float32)
            if TRAINING:
                mean_d += coefficient * tl.load(sums_ptr + tl.load(part + 2) * C + c, mask=c < C, other=0.0) / M
                mean_dx += coefficient * tl.load(sums_ptr + tl.load(part + 3) * C + c, mask=c < C, other=0.0) / M
    inverse = tl.load(inverse_ptr + tl.load(jobs_ptr + 3) * C + c, mask=c < C, other=0.0)
    if TRAINING:
        raw = raw_ptr + tl.multiple_of(tl.load(jobs_ptr), 8)
        row = tl.load(jobs_ptr + 2).to(tl.int32)
        normalized = _normalized(raw, rows, c, row, mask, mean_ptr, inverse_ptr, C)
        gradient -= mean_d[None, :] + normalized * mean_dx[None, :]
    out = out_ptr + tl.multiple_of(tl.load(jobs_ptr + 1), 8)
    tl.store(out + where, (gradient * inverse[None, :]).to(out_ptr.dtype.element_ty), mask=mask)


@kernel
def normalize_fwd_kernel(
    raw_ptr, out_ptr, mean_ptr, inverse_ptr, M, SLICE, first, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (tiles, instances): instance i, SLICE elements from the last one, by row first + i of the statistics."""
    i = tl.program_id(1)
    rows, c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, P)
    mask = (rows < M)[:, None] & (c < C)[None, :]
    out = _normalized(raw_ptr + i.to(tl.int64) * SLICE, rows, c, first + i, mask, mean_ptr, inverse_ptr, C)
    where = i.to(tl.int64) * SLICE + (rows.to(tl.int64) * C)[:, None] + c[None, :]
    tl.store(out_ptr + where, out.to(out_ptr.dtype.element_ty), mask=mask)
