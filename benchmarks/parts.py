"""Cases of a cell and of its parts: what ``fpdarts.kernels`` declares, against plain modules."""

from collections.abc import Callable
from functools import partial

import torch
from fpdarts.kernels.spec import OPERATIONS, CellSpec
from torch import Tensor, nn

from benchmarks import work
from benchmarks.setting import Case
from benchmarks.work import Passes
from fpdarts import kernels
from fpdarts.check_cases import EDGES, TERMS
from fpdarts.gates import GateSampler
from fpdarts.space import DEFAULT_SUBSETS
from tests.naive import NaiveCell, separable


def _part(side, setting, inputs: dict[str, Tensor], function: Callable, passes: Passes, pack=None) -> Case:
    """A function of tensors to be differentiated, without or with its backward.

    function: of no argument, reads the inputs; returns a tensor or, edge by edge, a list of them.
    pack: makes of name -> gradient of each input the gradients that all sides have.
    """
    leaves, last = list(inputs.values()), {}

    def forward():
        with torch.autocast(torch.device(setting.device).type, torch.bfloat16, enabled=side.bf16):
            out = function()
        return out if isinstance(out, list) else [out]

    out = forward()
    shape = list(out[0].shape)
    widths = [t.shape[1] for t in out]
    shape[1] = sum(widths)
    gradients = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(out[0].dtype)
    gradients = gradients.to(setting.device, memory_format=side.memory_format).split(widths, 1)

    def differentiate(out):
        return torch.autograd.grad(
            out, leaves, gradients, retain_graph=setting.direction == "backward", materialize_grads=True
        )

    def step(i):
        if setting.direction == "forward":
            last.update(out=forward())
        elif setting.direction == "backward":
            last.update(gradients=differentiate(out))
        else:
            last.update(out=forward())
            last.update(gradients=differentiate(last["out"]))

    def results():
        named = {}
        if "out" in last:
            named["out"] = torch.cat(last["out"], 1).detach()
        if "gradients" in last:
            values = dict(zip(inputs, last["gradients"]))
            named |= {f"d_{name}": value for name, value in (pack(values) if pack else values).items()}
        return named

    return Case(step, results, passes.of(setting.direction))


def _state(setting, channels, memory_format):
    state = torch.randn(setting.batch_size, channels, setting.image_size, setting.image_size)
    return state.to(setting.device, memory_format=memory_format).requires_grad_()


def _slice(setting, memory_format):
    """The first half of a state's channels, where they lie in it. A leaf: PyTorch's gradient of slicing, which fills a
    whole state, is no part's work."""
    state = _state(setting, setting.init_channels, memory_format)
    return state.detach()[:, : setting.init_channels // 2].requires_grad_()


def stage(side, setting):
    c, operation = setting.init_channels // 2, OPERATIONS[setting.operation]
    if operation.kind != "convolution":
        raise ValueError(f"a stage is part of a convolution, not of {setting.operation}")
    k, dilation = operation.kernel_size, operation.dilation
    state = _slice(setting, side.memory_format)
    depthwise, pointwise = torch.randn(EDGES, k, k, c) / k, torch.randn(EDGES, c, c) / c**0.5
    depthwise, pointwise = (w.to(setting.device).requires_grad_() for w in (depthwise, pointwise))
    size = (setting.image_size,) * 2
    passes = work.stage(setting.batch_size, c, size, EDGES, setting.operation, setting.stride)
    if not side.today:
        run = partial(kernels.stage, stride=setting.stride, dilation=dilation, kernels=side.kernels)
        inputs = {"state": state, "depthwise": depthwise, "pointwise": pointwise}
        return _part(side, setting, inputs, lambda: run(state, depthwise, pointwise), passes)

    edges = nn.ModuleList(separable(c, k, setting.stride, dilation)[:3] for _ in range(EDGES))
    with torch.no_grad():
        for edge, d, p in zip(edges, depthwise, pointwise):
            edge[1].weight.copy_(d.permute(2, 0, 1)[:, None])
            edge[2].weight.copy_(p.t()[:, :, None, None])
    edges.to(setting.device, memory_format=side.memory_format)
    inputs = {"state": state}
    for e, edge in enumerate(edges):
        inputs |= {f"depthwise {e}": edge[1].weight, f"pointwise {e}": edge[2].weight}
        if side.name == "compile":
            edge.compile()

    def pack(gradients):
        packed = {"state": gradients["state"]}
        of = {name: [gradients[f"{name} {e}"] for e in range(EDGES)] for name in ("depthwise", "pointwise")}
        packed["depthwise"] = torch.stack([g[:, 0].permute(1, 2, 0) for g in of["depthwise"]])
        packed["pointwise"] = torch.stack([g.flatten(1).t() for g in of["pointwise"]])
        return packed

    return _part(side, setting, inputs, lambda: [edge(state) for edge in edges], passes, pack)


def pooling(side, setting):
    c, stride = setting.init_channels // 2, setting.stride
    state = _slice(setting, side.memory_format)
    modules = {
        "max_pool_3x3": nn.MaxPool2d(3, stride, 1),
        "avg_pool_3x3": nn.AvgPool2d(3, stride, 1, count_include_pad=False),
    }
    if setting.operation not in modules:
        raise ValueError(f"{setting.operation} is no pooling; choose one of: {', '.join(modules)}")
    run = modules[setting.operation]
    if side.name == "compile":
        run.compile()
    if not side.today:
        run = partial(kernels.pooling, operation=setting.operation, stride=stride, kernels=side.kernels)
    passes = work.pooling(setting.batch_size, c, (setting.image_size,) * 2, stride)
    return _part(side, setting, {"state": state}, lambda: run(state), passes)


def _weighted_sum_and_shuffle(slices, coefficients):
    """The node as it is written today: a sum of products a slice, a concatenation, and the shuffle."""
    sums = [sum(w * term for w, term in zip(ws, terms)) for ws, terms in zip(coefficients, slices)]
    out = torch.cat(sums, 1)
    n, channels, h, w = out.shape
    return out.view(n, len(slices), channels // len(slices), h, w).transpose(1, 2).reshape(out.shape)


def node(side, setting):
    c = setting.init_channels // 2
    slices = [[_state(setting, c, side.memory_format) for _ in range(TERMS)] for _ in range(2)]
    coefficients = torch.rand(2, TERMS).to(setting.device).requires_grad_()
    inputs = {f"term {s} {t}": term for s, terms in enumerate(slices) for t, term in enumerate(terms)}
    inputs["coefficients"] = coefficients
    if side.today:
        run = torch.compile(_weighted_sum_and_shuffle) if side.name == "compile" else _weighted_sum_and_shuffle
        function = partial(run, slices, coefficients)
    else:

        def function():
            pairs = [list(zip(terms, ws.unbind())) for terms, ws in zip(slices, coefficients.unbind())]
            return kernels.node(pairs, kernels=side.kernels)

    passes = work.node(setting.batch_size, setting.init_channels, (setting.image_size,) * 2, TERMS)
    return _part(side, setting, inputs, function, passes)


def cell(side, setting):
    c = setting.init_channels
    before = c // 2 if setting.reduction else c
    spec = CellSpec(c, (4 * before, 4 * before), 2, DEFAULT_SUBSETS, reduction=setting.reduction)
    packed = {}
    for name, parameter in spec.parameters.items():
        weight = torch.empty(parameter.shape).uniform_(-parameter.bound, parameter.bound)
        packed[name] = weight.to(setting.device).requires_grad_()
    states = [_state(setting, 4 * before, side.memory_format) for _ in range(2)]
    alpha, beta = (torch.rand(*shape).to(setting.device).requires_grad_() for shape in ((14, 8), (14,)))
    gates = torch.ones(14, 2)
    if setting.gates == "step":
        gates = GateSampler(1, 14).sample()[0]
    inputs = {"input 0": states[0], "input 1": states[1], "operation_weights": alpha, "edge_weights": beta}
    passes = work.cell(spec, setting.batch_size, [(setting.image_size,) * 2] * 2, gates.tolist())
    if not side.today:

        def function():
            return kernels.cell(spec, tuple(states), packed, alpha, beta, gates, kernels=side.kernels)[0]

        return _part(side, setting, inputs | packed, function, passes)

    cell = NaiveCell(spec)
    cell.load_packed(packed)
    cell.to(setting.device, memory_format=side.memory_format)
    if side.name == "compile":
        cell.compile()
    modules = dict(cell.named_parameters())
    opened = gates.tolist() if side.branches else gates

    def pack(gradients):
        for name, parameter in modules.items():
            parameter.grad = gradients.pop(name)
        return gradients | cell.packed_gradients()

    return _part(side, setting, inputs | modules, lambda: cell(states, alpha, beta, opened), passes, pack)
