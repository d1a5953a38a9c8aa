"""The parts of a cell as functions of their own, with the cell's kernels: to be tested and timed alone."""

import torch
from torch import Tensor

from .. import require_stage
from ..spec import EPSILON
from . import tuning
from .convolution import convolve_dgrad, convolve_fwd, convolve_wgrad, wgrad_parts
from .launch import launch, padded, pieces, require_addressable
from .mixture import TOGETHER, node_fwd_kernel, node_reduce_kernel, normalize_bwd_kernel, normalize_fwd_kernel
from .packing import collect, expand_kernel, unpack
from .pools import AVERAGE, MAXIMUM, pool_fwd
from .rows import forward_options, rows_dgrad, rows_fwd, rows_shares, rows_tiles
from .rows_wgrad import rows_wgrad, rows_wgrad_parts
from .states import state_bwd_kernel
from .statistics import merge_statistics, moments_kernel

EDGES = 4  # of one job, as in a cell


def _table(rows, device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x such that its pixels are rows a fixed distance apart, and that distance: itself where it is so, as a slice of a
    wider channels_last map is."""
    n, c, h, w = x.shape
    row = x.stride(3)
    if x.stride() != (h * w * row, 1, w * row, row) or row < c:
        x, row = x.contiguous(memory_format=torch.channels_last), c
    require_addressable(n * h * w * row, n, (h, w))
    return x, row


def _normalizing_nothing(none: Tensor) -> dict[str, Tensor]:
    return {"mean_ptr": none, "inverse_ptr": none, "nothing_ptr": none}


def _new(n: int, c: int, size, like: Tensor) -> Tensor:
    require_addressable(n * c * size[0] * size[1], n, size)
    return torch.empty(n, c, *size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _strided(size, stride: int):
    return tuple(-(-side // stride) for side in size)


class _Dense(torch.autograd.Function):
    """ReLU and a convolution by dense weights of several edges: weight (E, taps, c_in, c)."""

    @staticmethod
    def forward(ctx, x, weight, geometry, stride):
        x, x_row = _rows(x)
        edges, taps, c_in, c = weight.shape
        n, wide, *size = x.shape
        out = _new(n, edges * c, _strided(size, stride), x)
        own = wide != c_in  # a slice an edge
        each = taps * c_in * c
        step = 1 if own else EDGES
        firsts = range(0, edges, step)
        jobs = [[e * c_in if own else 0, e * each, each, *geometry, e, e * c, min(step, edges - e), 0] for e in firsts]
        opened, weight = torch.ones(edges, dtype=torch.int32, device=x.device), weight.contiguous()
        # stages of stride 1, whose taps are a square, have kernels of their own
        ctx.square = stride == 1 and geometry[0] == geometry[1] ** 2
        ctx.shape = {"n": n, "size": tuple(size), "c": c}
        ctx.any_shape = {"out_size": tuple(out.shape[2:]), "stride": stride, "c_in": c_in}
        m = n * out.shape[2] * out.shape[3]
        shares = rows_shares(n, size, forward_options(c, step, size[1], x.dtype)) if ctx.square else tuning.tiles(m)
        partial = torch.empty(edges * shares * 3 * c, device=x.device)  # statistics, which only a cell reads
        common = {
            "x_row": x_row, "out_row": edges * c, "edge": c, "shares": shares, "edges": step,
            "moved": (x.numel() + out.numel()) * x.element_size(),
        }  # fmt: skip
        maps, table = (x, weight, out, partial), _table(jobs, x.device)
        if ctx.square:
            rows_fwd(
                *maps, _normalizing_nothing(partial), opened, table, **ctx.shape, **common, normalize=False
            )  # fmt: skip
        else:
            convolve_fwd(*maps, opened, table, **ctx.shape, **ctx.any_shape, **common, weight_row=c)
        ctx.save_for_backward(x, weight, opened)
        ctx.geometry, ctx.own, ctx.x_row = geometry, own, x_row
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        x, weight, opened = ctx.saved_tensors
        edges, taps, c_in, c = weight.shape
        geometry, own, each = ctx.geometry, ctx.own, taps * c_in * c
        d = d.contiguous(memory_format=torch.channels_last)
        none = torch.empty(1, device=x.device)
        normalizing = _normalizing_nothing(none)
        step = 1 if own else EDGES
        firsts = range(0, edges, step)
        common = {"x_row": ctx.x_row, "d_row": edges * c, "edge": c, "edges": step}
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = _new(x.shape[0], x.shape[1], x.shape[2:], x)
            segments = [[e * c, e, min(step, edges - e), e * each, each, *geometry] for e in firsts]
            jobs = [[e * c_in, e * c_in, e, 1, 0, 0] for e in firsts] if own else [[0, 0, 0, len(segments), 0, 0]]
            tables = _table(jobs, x.device), _table(segments, x.device)
            moved = {"dx_row": x.shape[1], "moved": (d.numel() + 2 * x.numel()) * x.element_size()}
            if ctx.square or (ctx.any_shape["stride"] == 2 and c_in == c):
                rows_dgrad(
                    d, weight, x, d_x, none, normalizing, opened, *tables, **ctx.shape, **common, **moved,
                    stride=ctx.any_shape["stride"], normalize=False,
                )  # fmt: skip
            else:
                convolve_dgrad(
                    d, weight, x, d_x, opened, *tables, **ctx.shape, **ctx.any_shape, **common, **moved, weight_row=c
                )  # fmt: skip
        if ctx.needs_input_grad[1]:
            jobs = [[e * c_in if own else 0, e * c, e, min(step, edges - e), *geometry, e * each, 0] for e in firsts]
            n, size, out_size = x.shape[0], ctx.shape["size"], ctx.any_shape["out_size"]
            if ctx.square:
                parts = rows_wgrad_parts(n, size, c, step, geometry[1], len(jobs), x.dtype)
            else:
                parts = wgrad_parts(n * out_size[0] * out_size[1], c_in, c, step, taps, len(jobs), x.dtype)
            partial = torch.empty(parts, edges * each, device=x.device)
            moved = (d.numel() + x.numel()) * x.element_size() + partial.nbytes
            common |= {"parts": parts, "distance": edges * each, "moved": moved}
            table = _table(jobs, x.device)
            if ctx.square:
                rows_wgrad(
                    d, x, partial, normalizing, opened, table, **ctx.shape, **common, side=geometry[1], normalize=False
                )  # fmt: skip
            else:
                convolve_wgrad(d, x, partial, opened, table, **ctx.shape, **ctx.any_shape, **common, taps=taps)
            d_weight = torch.empty_like(weight)
            row = [0, edges * each, parts, 0, edges * each]
            collect(partial, d_weight, [row], _table([row], x.device))
        return d_x, d_weight, None, None


class _Expand(torch.autograd.Function):
    """(E, taps, c), (E, c, c) -> (E, taps, c, c)."""

    @staticmethod
    def forward(ctx, depthwise, pointwise):
        edges, taps, c = depthwise.shape
        weights = torch.cat([depthwise.reshape(-1), pointwise.reshape(-1)])
        ctx.save_for_backward(weights)
        ctx.shape = edges, taps, c
        out = torch.empty(edges, taps, c, c, device=depthwise.device)
        jobs = [[0, e * taps * c, (edges * taps + e * c) * c, taps, e * taps * c * c, 0, 0, 0] for e in range(edges)]
        tensors = {"weights_ptr": weights, "out_ptr": out, "jobs_ptr": _table(jobs, out.device)}
        launch(expand_kernel, (4, edges), tensors, 0, C=c, P=padded(c), BLOCK=512)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        (weights,) = ctx.saved_tensors
        edges, taps, c = ctx.shape
        gradient = torch.empty_like(weights)
        nothing = [0] * 5
        jobs = [[0, e * taps * c, (edges * taps + e * c) * c, taps, e * taps * c * c, *nothing] for e in range(edges)]
        unpack(d.contiguous(), weights, gradient, _table(jobs, d.device), c)
        depthwise, pointwise = gradient.split([edges * taps * c, edges * c * c])
        return depthwise.view(edges, taps, c), pointwise.view(edges, c, c)


def stage(x, depthwise, pointwise, *, stride=1, dilation=1):
    edges, k, _, c = depthwise.shape
    require_stage(k, dilation, stride)
    dense = _Expand.apply(depthwise.float().reshape(edges, k * k, c).contiguous(), pointwise.float().contiguous())
    return _Dense.apply(x, dense, [k * k, k, dilation, dilation * (k - 1) // 2, 0], stride)


def factorized_reduction(x, even, odd):
    taps = torch.nn.functional.pad(even, (0, odd.shape[2])), torch.nn.functional.pad(odd, (even.shape[2], 0))
    return _Dense.apply(x, torch.stack(taps, 1).float(), [2, 1, 1, 0, 1], 2)


class _Pooling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mode, stride):
        x, x_row = _rows(x)
        n, c, *size = x.shape
        out_size = _strided(size, stride)
        out, m = _new(n, c, out_size, x), n * out_size[0] * out_size[1]
        index = torch.empty(m * c, dtype=torch.uint8, device=x.device)
        none, opened = torch.empty(1, device=x.device), torch.ones(1, dtype=torch.int32, device=x.device)
        pool_fwd(
            x, out, index, none, opened, _table([[0, 0, 0, mode, -1]], x.device), n=n, size=tuple(size),
            out_size=tuple(out_size), stride=stride, x_row=x_row, out_row=c, shares=0, c=c,
            moved=(x.numel() + out.numel()) * x.element_size(),
        )  # fmt: skip
        ctx.save_for_backward(index, opened)
        ctx.mode, ctx.stride, ctx.shape = mode, stride, x.shape
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        index, opened = ctx.saved_tensors
        n, c, *size = ctx.shape
        d = d.contiguous(memory_format=torch.channels_last)
        d_x = _new(n, c, size, d)
        zeros = torch.zeros(1, device=d.device)
        options = tuning.state_gradient(padded(c), d.element_size(), ctx.stride)
        tiles = rows_tiles(n, size, options)
        partial = torch.empty(tiles * 2 * c, device=d.device)
        tables = [[[-1, 0, 1, 0, 0, 0, 0, 0, 0, 0]], [[0, 0, ctx.mode, 0]], [[0, 0]]]
        jobs, poolings, through = (_table(rows, d.device) for rows in tables)
        tensors = {
            "d_ptr": d, "dx_ptr": d, "d_pooled_ptr": d, "index_ptr": index, "d_out_ptr": d, "state_ptr": d_x,
            "out_ptr": d_x, "partial_ptr": partial, "coefficients_ptr": zeros, "opened_ptr": opened, "jobs_ptr": jobs,
            "poolings_ptr": poolings, "through_ptr": through,
        }  # fmt: skip
        launch(
            state_bwd_kernel, (tiles, 1), tensors, (d.numel() + d_x.numel()) * d.element_size(), IMAGES=n, H=size[0],
            W=size[1], OH=d.shape[2], OW=d.shape[3], SLICE=0, D_OUT=0, STRIDE=ctx.stride, K=1, C=c, IS_NODE=False,
            OUT_ROW=c, P=padded(c), **options,
        )  # fmt: skip
        return d_x, None, None


def pooling(x, operation, *, stride=1):
    return _Pooling.apply(x, MAXIMUM if operation == "max_pool_3x3" else AVERAGE, stride)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw, weight, mean, variance):
        raw = raw.contiguous(memory_format=torch.channels_last)
        n, c, h, w = raw.shape
        m, device = n * h * w, raw.device
        block = {"C": c, "P": padded(c)}
        table, scales = torch.empty(2, c, device=device), torch.empty(2, c, device=device)
        ctx.training = mean is None
        if ctx.training:
            tiles, variance = tuning.tiles(m), torch.empty(1, c, device=device)
            partial = torch.empty(tiles * 3 * c, device=device)
            tensors = {"x_ptr": raw, "partial_ptr": partial}
            launch(moments_kernel, (tiles,), tensors, raw.nbytes, M=m, SHARES=tiles, BLOCK=tuning.block(), **block)
            statistics = {"mean_ptr": table, "inverse_ptr": scales, "variance_ptr": variance}
            opened = torch.ones(1, dtype=torch.int32, device=device)
            merge_statistics(partial, statistics, opened, _table([[0, tiles]], device), tiles, c)
            variance = variance[0]
        else:
            table[0], scales[0] = mean, (variance + EPSILON).rsqrt()
        # the second row normalizes and multiplies by the weight
        table[1], scales[1] = table[0], scales[0] if weight is None else scales[0] * weight
        out = torch.empty_like(raw)
        tensors = {"raw_ptr": raw, "out_ptr": out, "mean_ptr": table, "inverse_ptr": scales}
        launch(
            normalize_fwd_kernel, (tuning.tiles(m), 1), tensors, 2 * raw.nbytes, M=m, SLICE=0, first=1,
            BLOCK=tuning.block(), **block,
        )  # fmt: skip
        ctx.save_for_backward(raw, table, scales)
        ctx.has_weight = weight is not None
        mean = table[0].clone()
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d, *_):
        raw, table, scales = ctx.saved_tensors
        n, c, h, w = raw.shape
        m, device = n * h * w, raw.device
        d = d.contiguous(memory_format=torch.channels_last)
        block = {"C": c, "P": padded(c), "BLOCK": tuning.block()}
        one, opened = torch.ones(1, device=device), torch.ones(1, dtype=torch.int32, device=device)
        together, parts = TOGETHER.value, min(tuning.tiles(m), 64)
        entries = [[0, 0, 0, 1]] + [[0, 0, 0, -1]] * (together - 1)
        partial, sums = torch.empty((1 + together) * parts * c, device=device), torch.empty(2, c, device=device)
        tensors = {
            "d_ptr": d, "work_ptr": raw, "mean_ptr": table, "inverse_ptr": scales, "coefficients_ptr": one,
            "partial_ptr": partial, "sums_ptr": sums, "counters_ptr": torch.zeros(1, dtype=torch.int32, device=device),
            "groups_ptr": _table([[0, 0]], device), "entries_ptr": _table(entries, device),
        }  # fmt: skip
        options = block | tuning.reducing(padded(c), raw.element_size())
        launch(node_reduce_kernel, (parts, 1), tensors, 2 * raw.nbytes, M=m, **options)
        d_raw = torch.empty_like(raw)
        tensors = {
            "d_ptr": d, "raw_ptr": raw, "out_ptr": d_raw, "mean_ptr": table, "inverse_ptr": scales,
            "coefficients_ptr": one, "sums_ptr": sums, "opened_ptr": opened,
            "jobs_ptr": _table([[0, 0, 0, 1, 0, 0, 1]], device), "parts_ptr": _table([[0, 0, 0, 1]], device),
        }  # fmt: skip
        launch(normalize_bwd_kernel, (tuning.tiles(m), 1), tensors, 3 * raw.nbytes, M=m, TRAINING=ctx.training, **block)
        return d_raw, sums[1] if ctx.has_weight else None, None, None


def normalize(raw, weight=None, statistics=None):
    given = (None, None) if statistics is None else tuple(s.float() for s in statistics)
    return _Normalize.apply(raw, None if weight is None else weight.float(), *given)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sizes, coefficients, *terms):
        """sizes: terms of each slice. coefficients: (terms,)."""
        terms = [term.contiguous(memory_format=torch.channels_last) for term in terms]
        terms = [term.clone() if term.data_ptr() % 16 else term for term in terms]  # aligned, for wide loads
        base, k = terms[0], len(sizes)
        n, c, h, w = base.shape
        m, device = n * h * w, base.device
        # terms are tensors of their own: their places are told as distances from the first
        places = [(term.data_ptr() - base.data_ptr()) // base.element_size() for term in terms]
        table = [[place, 0, i] for i, place in enumerate(places)]
        starts = [sum(sizes[:s]) for s in range(k + 1)]
        out, state = _new(n, k * c, (h, w), base), torch.empty(k * m * c, dtype=base.dtype, device=device)
        tensors = {
            "work_ptr": base, "state_ptr": state, "out_ptr": out, "mean_ptr": torch.zeros(1, c, device=device),
            "inverse_ptr": torch.ones(1, c, device=device), "coefficients_ptr": coefficients,
            "terms_ptr": _table(table, device), "starts_ptr": _table(starts, device),
        }  # fmt: skip
        options = tuning.node(padded(c), k, base.element_size())
        launch(
            node_fwd_kernel, (pieces(m, options["BLOCK"]),), tensors, sum(t.nbytes for t in terms) + 2 * out.nbytes,
            M=m, SLICE=m * c, K=k, OUT_ROW=k * c, C=c, P=padded(c), **options,
        )  # fmt: skip
        ctx.save_for_backward(coefficients, *terms)
        ctx.sizes = sizes
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        coefficients, *terms = ctx.saved_tensors
        k = len(ctx.sizes)
        slices = [d[:, s::k] for s, size in enumerate(ctx.sizes) for _ in range(size)]
        d_terms = [part * c.to(part.dtype) for part, c in zip(slices, coefficients.unbind())]
        d_coefficients = [(part.float() * term.float()).sum() for part, term in zip(slices, terms)]
        return None, torch.stack(d_coefficients), *d_terms


def node(slices):
    terms = [term for terms in slices for term, _ in terms]
    one = torch.ones((), device=terms[0].device)
    given = [one if coefficient is None else coefficient.float() for terms in slices for _, coefficient in terms]
    return _Node.apply([len(terms) for terms in slices], torch.stack(given), *terms)
