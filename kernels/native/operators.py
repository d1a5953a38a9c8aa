"""A cell as a PyTorch operator: its forward and backward are one call of the library each.

torch.library is told shapes and derivatives, so that torch.compile takes a cell as it is.
"""

import torch
from torch import Tensor

from .. import Statistics
from ..spec import OPERATIONS, CellSpec
from .library import batch_tables, cell_backward, cell_forward, fake_gradients, gradient, require_float32
from .registration import OPERATORS, below_autograd, derivative, operator

_KINDS = {"none": 0, "max_pool_3x3": 1, "avg_pool_3x3": 2, "skip_connect": 3}  # Kind in cell.h
_CONVOLUTION = 4


def of_operation(name: str) -> list[int]:
    """Its kind, kernel size, dilation and stages, as geometries tell them."""
    operation = OPERATIONS[name]
    return [_KINDS.get(name, _CONVOLUTION), operation.kernel_size, operation.dilation, operation.stages]


def _geometry(spec: CellSpec, n: int, size: tuple[int, int]) -> list[int]:
    """Shape in cell.h, then the operations; ``size`` of input 1."""
    fields = [spec.channels, spec.partial, spec.nodes, spec.reduction, spec.factorized_input]
    fields += [*spec.input_channels, len(spec.operations)]
    for name, path in zip(spec.operations, spec.path_of_operation):
        fields += [*of_operation(name), path]
    return [n, *size, *(int(field) for field in fields)]  # the number of images may be symbolic


def _out_shape(geometry: list[int]) -> tuple[int, int, int, int]:
    n, height, width, channels, _, nodes, reduction = geometry[:7]
    stride = 2 if reduction else 1
    return n, nodes * channels, height // stride, width // stride


@operator("cell")
def _cell(
    geometry: list[int],
    rows: list[int],
    x0: Tensor,
    x1: Tensor,
    weights: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    gates: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, batch mean, batch variance, updated, work). rows: (statistics rows, c)."""
    batch = batch_tables(rows, rows, rows)
    out, work = cell_forward(
        "cell", geometry, _out_shape(geometry), (x0, x1), weights, alpha=alpha, beta=beta, gates=gates, given_mean=mean,
        given_variance=variance, mean=batch[0], variance=batch[1], updated=batch[2],
    )  # fmt: skip
    return out, *batch, work


@torch.library.register_fake(_cell, lib=OPERATORS)
def _(geometry, rows, x0, x1, weights, alpha, beta, gates, mean, variance):
    out = x0.new_empty(_out_shape(geometry)).contiguous(memory_format=torch.channels_last)
    size = torch.library.get_ctx().new_dynamic_size()  # depends on the processor's vectors
    return out, x0.new_empty(rows), x0.new_empty(rows), x0.new_empty(rows), x0.new_empty(size)


@torch.library.custom_op("fpdarts::cell_backward", mutates_args=(), device_types="cpu")
def _cell_backward(
    geometry: list[int],
    need: list[bool],
    d_out: Tensor,
    x0: Tensor,
    x1: Tensor,
    weights: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    gates: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    work: Tensor,
) -> list[Tensor]:
    """Gradients of x0, x1, alpha, beta and of each weight; empty where not needed.

    need: of x0, of x1, of alpha and beta, of the weights.
    """
    d_alpha, d_beta = (gradient(tensor, need[2]) for tensor in (alpha, beta))
    d_x0, d_x1, *d_weights = cell_backward(
        "cell", geometry, need[:2] + need[3:] * len(weights), d_out, (x0, x1), weights, alpha=alpha, beta=beta,
        gates=gates, given_mean=mean, given_variance=variance, work=work, d_alpha=d_alpha if need[2] else None,
        d_beta=d_beta if need[2] else None,
    )  # fmt: skip
    return [d_x0, d_x1, d_alpha, d_beta, *d_weights]


@_cell_backward.register_fake
def _(geometry, need, d_out, x0, x1, weights, alpha, beta, gates, mean, variance, work):
    d_alpha, d_beta = (gradient(tensor, need[2]) for tensor in (alpha, beta))
    d_x0, d_x1, *d_weights = fake_gradients((x0, x1), weights, need[:2] + need[3:] * len(weights))
    return [d_x0, d_x1, d_alpha, d_beta, *d_weights]


class _Cell(torch.autograd.Function):
    @staticmethod
    def forward(ctx, geometry, rows, x0, x1, alpha, beta, gates, mean, variance, *weights):
        with below_autograd():
            out, *others, work = _cell(geometry, rows, x0, x1, weights, alpha, beta, gates, mean, variance)
        ctx.geometry = geometry
        ctx.save_for_backward(x0, x1, alpha, beta, gates, mean, variance, work, *weights)
        ctx.mark_non_differentiable(*others, work)
        ctx.set_materialize_grads(False)
        return out, *others, work

    @staticmethod
    def backward(ctx, d_out, *_):
        needed = ctx.needs_input_grad
        if d_out is None:
            return (None,) * len(needed)
        needed = *needed[2:6], *needed[9:]
        need = [*needed[:2], any(needed[2:4]), any(needed[4:])]
        x0, x1, alpha, beta, gates, mean, variance, work, *weights = ctx.saved_tensors
        gradients = _cell_backward(ctx.geometry, need, d_out, x0, x1, weights, alpha, beta, gates, mean, variance, work)
        told = [gradient if asked else None for gradient, asked in zip(gradients, needed)]
        return None, None, *told[:4], None, None, None, *told[4:]


def _differentiable(geometry, rows, x0, x1, weights, *others):
    return _Cell.apply(geometry, rows, x0, x1, *others, *weights)


derivative(_cell, _differentiable)


def cell(spec, inputs, weights, operation_weights, edge_weights, gates, statistics=None):
    mixing = {"operation_weights": operation_weights, "edge_weights": edge_weights}
    require_float32({"input 0": inputs[0], "input 1": inputs[1], **weights, **mixing})
    geometry = _geometry(spec, inputs[0].shape[0], tuple(inputs[1].shape[2:]))
    mean, variance = (None, None) if statistics is None else (table.float().contiguous() for table in statistics)
    out, *batch, _ = _cell(
        geometry, [spec.statistics_rows, spec.slice_channels], *inputs, [weights[name] for name in spec.parameters],
        operation_weights.contiguous(), edge_weights.contiguous(), gates.to("cpu", torch.float32).contiguous(), mean,
        variance,
    )  # fmt: skip
    return out, Statistics(*batch) if statistics is None else None
