"""A cell of a derived network as a PyTorch operator, as operators.py does it for a cell of the search."""

import torch
from torch import Tensor

from .. import Statistics
from ..spec import DerivedCellSpec
from .library import batch_tables, cell_backward, cell_forward, fake_gradients, require_float32
from .operators import of_operation
from .registration import OPERATORS, below_autograd, derivative, operator


def _geometry(spec: DerivedCellSpec, n: int, size: tuple[int, int]) -> list[int]:
    """DerivedShape in derived.h, the edges, the states of the output; ``size`` of input 1."""
    fields = [spec.channels, spec.reduction, spec.factorized_input, *spec.input_channels]
    fields += [len(spec.edges), len(spec.concat)]
    for edge, (name, source) in enumerate(spec.edges):
        fields += [*of_operation(name), source, spec.node(edge) + 2 in spec.live]
    return [n, *size, *(int(field) for field in (*fields, *spec.concat))]  # see operators.py


def _out_shape(geometry: list[int]) -> tuple[int, int, int, int]:
    n, height, width, channels, reduction = geometry[:5]
    stride = 2 if reduction else 1
    return n, geometry[9] * channels, height // stride, width // stride


@operator("derived_cell")
def _derived_cell(
    geometry: list[int],
    rows: list[int],
    unread: list[bool],
    x0: Tensor,
    x1: Tensor,
    weights: list[Tensor],
    path_scales: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, batch mean, batch variance, work). rows: (normalizations, C). unread: whether the output does not depend
    on an input, on a weight."""
    batch = batch_tables(rows, rows)
    out, work = cell_forward(
        "derived", geometry, _out_shape(geometry), (x0, x1), weights, path_scales=path_scales, given_mean=mean,
        given_variance=variance, mean=batch[0], variance=batch[1],
    )  # fmt: skip
    return out, *batch, work


@torch.library.register_fake(_derived_cell, lib=OPERATORS)
def _(geometry, rows, unread, x0, x1, weights, path_scales, mean, variance):
    out = x0.new_empty(_out_shape(geometry)).contiguous(memory_format=torch.channels_last)
    size = torch.library.get_ctx().new_dynamic_size()  # depends on the processor's vectors
    return out, x0.new_empty(rows), x0.new_empty(rows), x0.new_empty(size)


@torch.library.custom_op("fpdarts::derived_cell_backward", mutates_args=(), device_types="cpu")
def _derived_cell_backward(
    geometry: list[int],
    need: list[bool],
    d_out: Tensor,
    x0: Tensor,
    x1: Tensor,
    weights: list[Tensor],
    path_scales: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    work: Tensor,
) -> list[Tensor]:
    """Gradients of x0, x1 and of each weight; empty where not needed. need: of x0, of x1, of each weight."""
    return cell_backward(
        "derived", geometry, need, d_out, (x0, x1), weights, path_scales=path_scales, given_mean=mean,
        given_variance=variance, work=work,
    )  # fmt: skip


@_derived_cell_backward.register_fake
def _(geometry, need, d_out, x0, x1, weights, path_scales, mean, variance, work):
    return fake_gradients((x0, x1), weights, need)


class _DerivedCell(torch.autograd.Function):
    @staticmethod
    def forward(ctx, geometry, rows, unread, x0, x1, path_scales, mean, variance, *weights):
        with below_autograd():
            out, *others, work = _derived_cell(geometry, rows, unread, x0, x1, weights, path_scales, mean, variance)
        ctx.geometry, ctx.unread = geometry, unread
        ctx.save_for_backward(x0, x1, path_scales, mean, variance, work, *weights)
        ctx.mark_non_differentiable(*others, work)
        ctx.set_materialize_grads(False)
        return out, *others, work

    @staticmethod
    def backward(ctx, d_out, *_):
        needed = ctx.needs_input_grad
        if d_out is None:
            return (None,) * len(needed)
        needed = *needed[3:5], *needed[8:]
        # of the weights all that the output depends on, if any
        need = [*needed[:2], *[any(needed[2:])] * len(needed[2:])]
        need = [asked and not unread for asked, unread in zip(need, ctx.unread)]
        x0, x1, path_scales, mean, variance, work, *weights = ctx.saved_tensors
        gradients = _derived_cell_backward(
            ctx.geometry, need, d_out, x0, x1, weights, path_scales, mean, variance, work
        )
        told = [d if made and asked else None for d, made, asked in zip(gradients, need, needed)]
        return None, None, None, *told[:2], None, None, None, *told[2:]


def _differentiable(geometry, rows, unread, x0, x1, weights, *others):
    return _DerivedCell.apply(geometry, rows, unread, x0, x1, *others, *weights)


derivative(_derived_cell, _differentiable)


def derived_cell(spec, inputs, weights, path_scales=None, statistics=None):
    require_float32({"input 0": inputs[0], "input 1": inputs[1], **weights})
    geometry = _geometry(spec, inputs[0].shape[0], tuple(inputs[1].shape[2:]))
    mean, variance = (None, None) if statistics is None else (table.float().contiguous() for table in statistics)
    if path_scales is not None:
        path_scales = path_scales.detach().float().reshape(len(spec.edges), -1).contiguous()
    out, *batch, _ = _derived_cell(
        geometry, [len(spec.normalizations), spec.channels],
        [*(i not in spec.live for i in range(2)), *(name in spec.unread for name in spec.parameters)], *inputs,
        [weights[name] for name in spec.parameters], path_scales, mean, variance,
    )  # fmt: skip
    return out, Statistics(*batch) if statistics is None else None
