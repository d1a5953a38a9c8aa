"""A cell of the supernet as one autograd function: the order in which the kernels run, forward and backward.

Forward, group by group of source states (both inputs together, then node by node): first stages and poolings of all
edges that leave the group, second stages, and the node that is then complete. Backward, the same way back.
"""

import copy
import math

import torch

from .. import Statistics
from ..spec import EPSILON
from .backward import Backward
from .forward import Forward
from .plan import plan


def _forward(spec, inputs, alpha, beta, gates, weights, statistics):
    """Returns (output (N, nodes*C, H', W') channels_last, work)."""
    dtype, device = inputs[0].dtype, inputs[0].device
    p = plan(spec, inputs[0].shape[0], tuple(inputs[1].shape[2:]), device, dtype)
    work = Forward(p, dtype, gates, statistics is None)
    work.mix(alpha, beta, weights)
    if statistics is not None:
        work.statistics["mean_ptr"][:-1] = statistics[0]
        work.statistics["inverse_ptr"][:-1] = (statistics[1] + EPSILON).rsqrt()

    raw = torch.empty(2 * p.k * p.slice_in, dtype=dtype, device=device)
    work.preprocess(inputs, raw)
    work.merge("inputs", ())
    work.normalize_states(raw)
    del raw

    height, width = p.outer
    out = torch.empty(
        p.n, p.nodes * p.k * p.c, height, width, dtype=dtype, device=device, memory_format=torch.channels_last
    )
    flat = out.permute(0, 2, 3, 1).reshape(-1, out.shape[1])
    for group in p.groups:
        work.first_stages(group)
        work.poolings(group)
        work.merge("first", group)
        work.second_stages(group)
        work.merge("second", group)
        work.node(group[-1] - 1, flat)
    del work.partial  # backward does not need it
    return out, work


class _Cell(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, gates, statistics, x0, x1, alpha, beta, *weights):
        out, work = _forward(spec, (x0, x1), alpha, beta, gates, weights, statistics)
        # autograd lets go of what is saved when backward is done, of what ctx holds only together with the whole graph
        ctx.save_for_backward(x0, x1, alpha, beta, work.gates, work.space, work.index)
        del work.gates, work.space, work.index
        ctx.work, ctx.sizes = work, [weight.shape for weight in weights]
        mean, variance = work.statistics["mean_ptr"][:-1], work.statistics["variance_ptr"]
        ctx.mark_non_differentiable(mean, variance, work.updated)
        ctx.set_materialize_grads(False)
        return out, mean, variance, work.updated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, *_):
        if d_out is None:
            return (None,) * len(ctx.needs_input_grad)
        work, p = copy.copy(ctx.work), ctx.work.p
        x0, x1, alpha, beta, work.gates, work.space, work.index = ctx.saved_tensors
        need_x, need_mix, need = ctx.needs_input_grad[3:5], ctx.needs_input_grad[5:7], ctx.needs_input_grad[7:]
        d_out = d_out.to(work.dtype).contiguous(memory_format=torch.channels_last)
        gradients = Backward(work, d_out.permute(0, 2, 3, 1).reshape(-1, d_out.shape[1]))
        for node in reversed(range(p.nodes)):
            if node == p.nodes - 1:
                gradients.state((p.nodes + 1,), gradients.dx)
            else:
                gradients.group((node + 2,))
            gradients.reduce(node, any(need_mix))
        d_inputs, d_weights, d_mix = [None, None], [None] * len(need), (None, None)
        if any(need) or any(need_x):
            gradients.group((0, 1))
            gradients.normalize("states", (0, 1), p.state_normalize_bwd_jobs, gradients.states, p.m_in)
            d_inputs = [gradients.preprocess(i, x) if need_x[i] else None for i, x in enumerate((x0, x1))]
        if any(need):
            flat = gradients.weights((x0, x1)).split([math.prod(size) for size in ctx.sizes])
            d_weights = [part.view(size) if n else None for part, size, n in zip(flat, ctx.sizes, need)]
        if any(need_mix):
            d_mix = gradients.mix(alpha, beta)
        return None, None, None, *d_inputs, *d_mix, *d_weights


def storage(x: torch.Tensor) -> torch.dtype:
    """What a cell's maps are stored in: its input's dtype, or that of autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else x.dtype


def cell(spec, inputs, weights, operation_weights, edge_weights, gates, statistics=None):
    device, dtype = inputs[0].device, storage(inputs[0])
    inputs = [x.to(dtype).contiguous(memory_format=torch.channels_last) for x in inputs]
    weights = [weights[name].float().contiguous() for name in spec.parameters]
    mixing = (tensor.float().contiguous() for tensor in (operation_weights, edge_weights))
    gates = gates.to(torch.float32).contiguous()
    if device.type != "meta":  # there, gates stay where they can be read, to count what is open
        gates = gates.to(device, non_blocking=True)
    out, mean, variance, updated = _Cell.apply(spec, gates, statistics, *inputs, *mixing, *weights)
    return out, None if statistics is not None else Statistics(mean, variance, updated)
