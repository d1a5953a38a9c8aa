"""What the kernels of a derived cell share: its affine normalizations, forward and backward, and where gradients lie.

``params`` are the scales of all normalizations, rows of C, then all shifts, then the other weights. Their gradients lie
in ``gradient`` alike, and are the sums that the backward of a normalization needs: of d * normalized, and of d. Row -1
normalizes nothing.
"""

import triton
import triton.language as tl

from .launch import both


@triton.jit
def affine(mean_ptr, inverse_ptr, params_ptr, row, c, inside, ROWS, C: tl.constexpr):
    """Of channels c: mean, scale and shift; the normalized value is (x - mean) * scale + shift."""
    there, where = both(inside, row >= 0), row * C + c
    mean = tl.load(mean_ptr + where, mask=there, other=0.0)
    inverse = tl.load(inverse_ptr + where, mask=there, other=1.0)
    scale = tl.load(params_ptr + where, mask=there, other=1.0)
    return mean, inverse * scale, tl.load(params_ptr + ROWS * C + where, mask=there, other=0.0)


@triton.jit
def activated(x, mean, scale, shift):
    """ReLU of a normalized block."""
    x = (x.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def incoming(own_ptr, out_ptr, where_ptr, ALIGN: tl.constexpr, C: tl.constexpr, OUT_ROW: tl.constexpr):
    """Where a gradient lies, (whether in a buffer of the cell's own, offset) of a job: its pointer, and the distance of
    its rows. A node that no edge leaves has its gradient in that of the cell's output."""
    own = tl.load(where_ptr) != 0
    pointer = tl.where(own, own_ptr, out_ptr) + tl.multiple_of(tl.load(where_ptr + 1), ALIGN)
    return pointer, tl.where(own, C, OUT_ROW)


@triton.jit
def path_scale(scales_ptr, edge, n, inside, IMAGES, DROP: tl.constexpr):
    """What drop-path multiplies samples n of an edge by; edge -1 is not dropped."""
    scale = tl.full([n.shape[0]], 1.0, tl.float32)
    if DROP:
        scale = tl.load(scales_ptr + edge * IMAGES + n, mask=both(inside, edge >= 0), other=1.0)
    return scale


@triton.jit
def normalize_bwd(d, raw, mean, inverse, scale, sum_d, sum_dx, M, TRAINING: tl.constexpr):
    """Backward of a normalization, on a block: from the gradient of what is normalized to that of raw."""
    d = d.to(tl.float32)
    if TRAINING:
        d -= (sum_d[None, :] + (raw.to(tl.float32) - mean[None, :]) * (inverse * sum_dx)[None, :]) / M
    return d * (inverse * scale)[None, :]


@triton.jit
def normalize_bwd_terms(mean_ptr, inverse_ptr, params_ptr, gradient_ptr, row, c, inside, ROWS, C: tl.constexpr):
    """Of channels c, what ``normalize_bwd`` takes: mean, 1 / sqrt(variance), scale, sum of d, sum of d * normalized."""
    where = row * C + c
    mean = tl.load(mean_ptr + where, mask=inside, other=0.0)
    inverse = tl.load(inverse_ptr + where, mask=inside, other=0.0)
    scale = tl.load(params_ptr + where, mask=inside, other=0.0)
    sum_d = tl.load(gradient_ptr + ROWS * C + where, mask=inside, other=0.0)
    return mean, inverse, scale, sum_d, tl.load(gradient_ptr + where, mask=inside, other=0.0)
