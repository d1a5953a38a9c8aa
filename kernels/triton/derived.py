"""A cell of a derived network as one autograd function: the order in which the kernels run.

Forward, level by level of nodes: depthwise and pointwise convolutions of all its edges, second stages, then the nodes,
which normalize, drop paths and pool as they add. Nothing normalized is stored but nodes that other nodes read. Backward
the same way back: sums over the gradient of a node, from which those of its normalizations follow, then the gradients
of convolutions, which do the normalizations' backward as they load; weights last, all at once.
"""

import copy
import math

import torch

from .. import Statistics
from .derived_backward import DerivedBackward
from .derived_forward import DerivedForward
from .derived_plan import derived_plan
from .driver import storage


class _DerivedCell(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, path_scales, statistics, x0, x1, *weights):
        dtype, device = x0.dtype, x0.device
        p = derived_plan(spec, x0.shape[0], tuple(x1.shape[2:]), device)
        work = DerivedForward(p, dtype, dict(zip(spec.parameters, weights)), path_scales, statistics)
        shape = p.n, p.out_row, *p.outer
        out = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
        work.arrange()
        for i, x in enumerate((x0, x1)):
            work.preprocess(i, x)
        for level in range(len(p.levels)):
            work.level(level, out)
        ctx.save_for_backward(x0, x1, work.scales, work.mean, work.space, work.index)  # see driver.py
        mean, variance = work.mean, work.variance
        del work.scales, work.mean, work.space, work.index
        ctx.work = work
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return out, mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, *_):
        if d_out is None:
            return (None,) * len(ctx.needs_input_grad)
        work, p = copy.copy(ctx.work), ctx.work.p
        *inputs, work.scales, work.mean, work.space, work.index = ctx.saved_tensors
        need_x, need = ctx.needs_input_grad[3:5], ctx.needs_input_grad[5:]
        gradients = DerivedBackward(work, d_out.to(work.dtype).contiguous(memory_format=torch.channels_last))
        for level in reversed(range(len(p.levels))):
            gradients.level(level)
        gradients.states()
        d_inputs = [
            gradients.preprocess(i, x) if need_x[i] and i in p.spec.live else None for i, x in enumerate(inputs)
        ]
        d_weights = [None] * len(need)
        if any(need):
            gradients.weights(inputs)
            unread = p.spec.unread
            for i, (name, shape) in enumerate(p.spec.parameters.items()):
                if need[i] and name not in unread:
                    d_weights[i] = gradients.flat[p.at[name] : p.at[name] + math.prod(shape)].view(shape)
        return None, None, None, *d_inputs, *d_weights


def derived_cell(spec, inputs, weights, path_scales=None, statistics=None):
    dtype = storage(inputs[0])
    inputs = [x.to(dtype).contiguous(memory_format=torch.channels_last) for x in inputs]
    weights = [weights[name].float().contiguous() for name in spec.parameters]
    if path_scales is not None:
        path_scales = path_scales.detach()
    out, mean, variance = _DerivedCell.apply(spec, path_scales, statistics, *inputs, *weights)
    return out, None if statistics is not None else Statistics(mean, variance)
