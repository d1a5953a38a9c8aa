"""The parts of a cell as operators of their own, with the cell's kernels: to be tested and timed alone.

A cell computes the two that are matrix products or one formula a pixel, factorized reduction and normalization, within
its passes over memory; alone they are left to PyTorch.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import require_stage
from ..spec import EPSILON
from .library import (
    PartArguments,
    channels_last,
    channels_last_slice,
    gradient,
    library,
    new_map,
    pointers,
    require_float32,
    threads,
)
from .operators import of_operation

_STAGE, _POOLING, _NODE = range(3)


def _run(part: int, like: Tensor, channels: int, backward: bool, **fields):
    """like: a map of the input's size."""
    fields = {key: value.data_ptr() if isinstance(value, Tensor) else value for key, value in fields.items()}
    library().fpdarts_part(
        PartArguments(
            part=part,
            backward=backward,
            threads=threads(),
            images=like.shape[0],
            channels=channels,
            height=like.shape[2],
            width=like.shape[3],
            **fields,
        )  # fmt: skip
    )


def _shape(like: Tensor, channels: int, stride: int) -> tuple[int, ...]:
    n, _, height, width = like.shape
    return n, channels, -(-height // stride), -(-width // stride)


def _fake(like: Tensor, channels: int, stride: int = 1) -> Tensor:
    """What an operator's map looks like to the compiler."""
    return like.new_empty(_shape(like, channels, stride)).contiguous(memory_format=torch.channels_last)


def _stage_fields(x, step, depthwise, pointwise, stride, dilation):
    edges, kernel, _, c = depthwise.shape
    return {
        "x": x, "step": step, "depthwise": depthwise, "pointwise": pointwise, "edges": edges, "own": x.shape[1] != c,
        "kernel": kernel, "dilation": dilation, "stride": stride,
    }  # fmt: skip


@torch.library.custom_op("fpdarts::stage", mutates_args=(), device_types="cpu")
def _stage(x: Tensor, depthwise: Tensor, pointwise: Tensor, stride: int, dilation: int) -> Tensor:
    (x, step), depthwise, pointwise = channels_last_slice(x), depthwise.contiguous(), pointwise.contiguous()
    edges, _, _, c = depthwise.shape
    out = new_map(_shape(x, edges * c, stride))
    _run(_STAGE, x, c, False, out=out, **_stage_fields(x, step, depthwise, pointwise, stride, dilation))
    return out


@_stage.register_fake
def _(x, depthwise, pointwise, stride, dilation):
    return _fake(x, depthwise.shape[0] * depthwise.shape[3], stride)


@torch.library.custom_op("fpdarts::stage_backward", mutates_args=(), device_types="cpu")
def _stage_backward(
    d_out: Tensor, x: Tensor, depthwise: Tensor, pointwise: Tensor, stride: int, dilation: int, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """need: of x, of the weights."""
    (x, step), depthwise, pointwise = channels_last_slice(x), depthwise.contiguous(), pointwise.contiguous()
    d_out = channels_last(d_out)
    d_x = new_map(x.shape) if need[0] else x.new_empty(0)
    d_depthwise, d_pointwise = gradient(depthwise, need[1]), gradient(pointwise, need[1])
    _run(
        _STAGE, x, depthwise.shape[3], True, d_out=d_out, d_x=d_x if need[0] else None,
        d_depthwise=d_depthwise if need[1] else None, d_pointwise=d_pointwise if need[1] else None,
        **_stage_fields(x, step, depthwise, pointwise, stride, dilation),
    )  # fmt: skip
    return d_x, d_depthwise, d_pointwise


@_stage_backward.register_fake
def _(d_out, x, depthwise, pointwise, stride, dilation, need):
    d_x = _fake(x, x.shape[1]) if need[0] else x.new_empty(0)
    return d_x, gradient(depthwise, need[1]), gradient(pointwise, need[1])


def _save_stage(ctx, inputs, output):
    *tensors, ctx.stride, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_stage(ctx, d_out):
    needed = ctx.needs_input_grad
    gradients = _stage_backward(
        d_out, *ctx.saved_tensors, ctx.stride, ctx.dilation, [needed[0], needed[1] or needed[2]]
    )
    return *(d if wanted else None for d, wanted in zip(gradients, needed)), None, None


_stage.register_autograd(_backward_of_stage, setup_context=_save_stage)


def stage(x, depthwise, pointwise, *, stride=1, dilation=1):
    require_float32({"x": x, "depthwise": depthwise, "pointwise": pointwise})
    require_stage(depthwise.shape[1], dilation, stride)
    return _stage(x, depthwise, pointwise, stride, dilation)


@torch.library.custom_op("fpdarts::pooling", mutates_args=(), device_types="cpu")
def _pooling(x: Tensor, kind: int, stride: int) -> Tensor:
    x, step = channels_last_slice(x)
    out = new_map(_shape(x, x.shape[1], stride))
    _run(_POOLING, x, x.shape[1], False, x=x, step=step, out=out, kind=kind, stride=stride)
    return out


@_pooling.register_fake
def _(x, kind, stride):
    return _fake(x, x.shape[1], stride)


@torch.library.custom_op("fpdarts::pooling_backward", mutates_args=(), device_types="cpu")
def _pooling_backward(d_out: Tensor, x: Tensor, kind: int, stride: int) -> Tensor:
    (x, step), d_out = channels_last_slice(x), channels_last(d_out)
    d_x = new_map(x.shape)
    _run(_POOLING, x, x.shape[1], True, x=x, step=step, d_out=d_out, d_x=d_x, kind=kind, stride=stride)
    return d_x


@_pooling_backward.register_fake
def _(d_out, x, kind, stride):
    return _fake(x, x.shape[1])


def _save_pooling(ctx, inputs, output):
    x, ctx.kind, ctx.stride = inputs
    ctx.save_for_backward(x)


_pooling.register_autograd(
    lambda ctx, d_out: (_pooling_backward(d_out, *ctx.saved_tensors, ctx.kind, ctx.stride), None, None),
    setup_context=_save_pooling,
)


def pooling(x, operation, *, stride=1):
    require_float32({"x": x})
    return _pooling(x, of_operation(operation)[0], stride)


@torch.library.custom_op("fpdarts::node", mutates_args=(), device_types="cpu")
def _node(terms: list[Tensor], coefficients: Tensor, slices: list[int], partial: int) -> Tensor:
    """slices: of each term. coefficients: (terms,)."""
    terms, c = [channels_last(term) for term in terms], terms[0].shape[1]
    out = new_map(_shape(terms[0], partial * c, 1))
    _run_node(terms, c, slices, partial, False, coefficients=coefficients, out=out)
    return out


def _run_node(terms, c, slices, partial, backward, **fields):
    where = (ctypes.c_int64 * len(slices))(*slices)
    addresses = pointers(terms)
    fields |= {"slices": ctypes.addressof(where), "terms": ctypes.addressof(addresses)}
    _run(_NODE, terms[0], c, backward, stride=1, partial=partial, count=len(terms), **fields)


@_node.register_fake
def _(terms, coefficients, slices, partial):
    return _fake(terms[0], partial * terms[0].shape[1])


@torch.library.custom_op("fpdarts::node_backward", mutates_args=(), device_types="cpu")
def _node_backward(
    d_out: Tensor, terms: list[Tensor], coefficients: Tensor, slices: list[int], partial: int
) -> list[Tensor]:
    terms, d_out = [channels_last(term) for term in terms], channels_last(d_out)
    gradients = [new_map(term.shape) for term in terms]
    d_coefficients, addresses = torch.empty_like(coefficients), pointers(gradients)
    _run_node(
        terms, terms[0].shape[1], slices, partial, True, coefficients=coefficients, d_out=d_out,
        d_terms=ctypes.addressof(addresses), d_coefficients=d_coefficients,
    )  # fmt: skip
    return [*gradients, d_coefficients]


@_node_backward.register_fake
def _(d_out, terms, coefficients, slices, partial):
    return [*(torch.empty_like(channels_last(term)) for term in terms), torch.empty_like(coefficients)]


def _save_node(ctx, inputs, output):
    terms, coefficients, ctx.slices, ctx.partial = inputs
    ctx.save_for_backward(coefficients, *terms)


def _backward_of_node(ctx, d_out):
    coefficients, *terms = ctx.saved_tensors
    *d_terms, d_coefficients = _node_backward(d_out, terms, coefficients, ctx.slices, ctx.partial)
    return d_terms, d_coefficients, None, None


_node.register_autograd(_backward_of_node, setup_context=_save_node)


def node(slices):
    terms = [(term, coefficient, s) for s, own in enumerate(slices) for term, coefficient in own]
    require_float32({f"term {i}": term for i, (term, _, _) in enumerate(terms)})
    one = terms[0][0].new_ones(())
    coefficients = torch.stack([one if coefficient is None else coefficient.to(one) for _, coefficient, _ in terms])
    return _node([term for term, _, _ in terms], coefficients, [s for _, _, s in terms], len(slices))


def factorized_reduction(x, even, odd):
    require_float32({"x": x, "even": even, "odd": odd})
    x = F.relu(x)
    n, _, height, width = x.shape
    halves = (
        torch.einsum("nihw,eio->neohw", part, w) for part, w in ((x[:, :, ::2, ::2], even), (x[:, :, 1::2, 1::2], odd))
    )
    return torch.cat(list(halves), 2).reshape(n, -1, height // 2, width // 2)


def normalize(raw, weight=None, statistics=None):
    require_float32({"raw": raw})
    if statistics is None:
        variance, mean = torch.var_mean(raw, (0, 2, 3), correction=0)
        pixels = raw.numel() // raw.shape[1]
        told = mean.detach(), variance.detach() * (pixels / (pixels - 1))
    else:
        (mean, variance), told = statistics, statistics
    scale = (variance + EPSILON).rsqrt()
    if weight is not None:
        scale = scale * weight
    return (raw - mean[:, None, None]) * scale[:, None, None], *told
